"""Openings of chats: ids that all chats of one application begin with, those of system messages and of the template."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from sinkrt.errors import UsageError
from sinkrt.prefix_store import MIN_PREFIX_TOKENS
from sinkrt.text import OPENING_MESSAGES, common_start

from sinkexport.serve.errors import ApiError
from sinkexport.serve.requests import ChatPrompt

OPENING_ROLES = ("system", "developer")
MAX_OPENINGS = 64
"""Openings that are remembered: rendering one takes as long as rendering a chat, twice."""


class Openings:
    """Finds openings. Threads may share one.

    encode: ids of a chat with these variables of the template. max_ids: of a chat; longer ones are refused elsewhere.
    """

    def __init__(self, encode: Callable[[ChatPrompt, Mapping[str, Any]], list[int]], max_ids: int) -> None:
        self._encode, self._max_ids = encode, max_ids
        self._known: collections.OrderedDict[str, list[int]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def size(self, ids: list[int], prompt: ChatPrompt, args: Mapping[str, Any]) -> int:
        """Number of first ids of a chat that belong to its opening; 0 where that is too short to matter."""
        if not MIN_PREFIX_TOKENS < len(ids) <= self._max_ids:
            return 0
        rest = [message["role"] in OPENING_ROLES for message in prompt.messages]
        count = rest.index(False) if False in rest else len(rest)
        opening = dataclasses.replace(prompt, messages=prompt.messages[:count], grammar=None)
        # The messages that follow are not of the opening, but all else of the prompt, such as its tools, is.
        key = json.dumps([dataclasses.asdict(opening), dict(args)], sort_keys=True, default=str)
        with self._lock:
            known = self._known.get(key)
        if known is None:
            known = self._found(opening, args)
            with self._lock:
                self._known[key] = known
                while len(self._known) > MAX_OPENINGS:
                    self._known.popitem(last=False)
        return common_start(known, ids)

    def _found(self, opening: ChatPrompt, args: Mapping[str, Any]) -> list[int]:
        """Ids of an opening; none if the template takes no chat of it and a short message."""
        chats = (
            dataclasses.replace(opening, messages=[*opening.messages, {"role": "user", "content": text}])
            for text in OPENING_MESSAGES
        )
        try:
            first, second = (self._encode(chat, args) for chat in chats)
        except (UsageError, ApiError):
            return []
        return first[: common_start(first, second)]
