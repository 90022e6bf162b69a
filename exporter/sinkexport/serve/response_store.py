"""Responses that were given, kept in memory for a while: clients refer to them and to their items by id."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from sinkexport.serve.errors import ApiError, shown


@dataclasses.dataclass(frozen=True)
class Stored:
    """A response, and the messages of the chat before it, as templates take them, without its instructions."""

    response: dict[str, Any]
    messages: Sequence[dict[str, Any]]
    size: int


class ResponseStore:
    """The last responses, each for the key that it was asked for with. One event loop uses it, so it needs no lock.

    max_bytes: of all of them, as JSON; those that nobody has asked for the longest go first.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._responses: collections.OrderedDict[tuple[str, str], Stored] = collections.OrderedDict()
        self._items: dict[tuple[str, str], str] = {}  # by the item's id: the response's

    def __len__(self) -> int:
        return len(self._responses)

    def keep(self, owner: str, response: dict[str, Any], messages: Sequence[dict[str, Any]]) -> None:
        """Keep a response, if there is room for it at all."""
        size = len(json.dumps([response, messages]))
        if size > self._max_bytes:
            return
        self._bytes += size
        self._responses[owner, response["id"]] = Stored(response, messages, size)
        for item in response["output"]:
            self._items[owner, item["id"]] = response["id"]
        while self._bytes > self._max_bytes:
            oldest_owner, name = next(iter(self._responses))
            self.drop(oldest_owner, name)

    def get(self, owner: str, name: str) -> Stored:
        """The response of that id.

        Raises: ApiError 404.
        """
        found = self._responses.get((owner, name))
        if found is None:
            raise _unknown("response", name)
        self._responses.move_to_end((owner, name))
        return found

    def item(self, owner: str, name: str) -> dict[str, Any]:
        """The item of that id of a response's output.

        Raises: ApiError 404.
        """
        response = self._items.get((owner, name))
        if response is None:
            raise _unknown("item", name)
        output: list[dict[str, Any]] = self.get(owner, response).response["output"]
        return next(item for item in output if item["id"] == name)

    def drop(self, owner: str, name: str) -> None:
        """Forget a response.

        Raises: ApiError 404.
        """
        stored = self._responses.pop((owner, name), None)
        if stored is None:
            raise _unknown("response", name)
        self._bytes -= stored.size
        for item in stored.response["output"]:
            del self._items[owner, item["id"]]


def _unknown(what: str, name: str) -> ApiError:
    return ApiError(
        404, f"{what} {shown(name)} does not exist: it was not stored, or is forgotten by now; send its text instead"
    )
