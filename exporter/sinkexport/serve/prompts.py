"""Prompts to ids, outside the event loop: long texts and chat templates take long."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sinkrt.text import Tokenizer
from sinkrt.text.special_text import texts_in

from sinkexport.serve.errors import ApiError
from sinkexport.serve.protocol import ChatRequest, CompletionRequest, Request

CHAT_THREADS = 2
LOOK_S = 0.5
"""How often a request whose prompt takes long checks whether the server is stopping."""
logger = logging.getLogger("sinkexport.serve")


class Prompts:
    """Encodes prompts.

    template_args: variables of the chat template, which a request may change one by one.
    allow_special: whether names of special tokens in texts become those tokens, for requests that do not say.
    require_pinned: raises UsageError for a system message that the sinks do not keep; None: any is accepted.
    stopping: whether the server is stopping, so that nobody waits for a chat template that takes long.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template_args: Mapping[str, Any],
        allow_special: bool,
        require_pinned: Callable[..., None] | None,
        stopping: Callable[[], bool],
    ) -> None:
        self._tokenizer = tokenizer
        self._template_args = template_args
        self._allow_special = allow_special
        self._require_pinned = require_pinned
        self._stopping = stopping
        self._noted = False
        # Threads of their own: a chat template that takes long holds up no other kind of request.
        self._threads = ThreadPoolExecutor(CHAT_THREADS, "sinkexport-chat")

    async def chat(self, body: ChatRequest, new: bool) -> list[int]:
        """Encode the prompt of a chat: all messages, or one more turn of a conversation that has begun.

        Raises: UsageError, ApiError.
        """
        try:
            work = self._threads.submit(self.chat_ids, body, new)
        except RuntimeError:  # closed
            raise ApiError(503, "the server is stopping") from None
        ids = asyncio.wrap_future(work)
        ids.add_done_callback(lambda done: done.cancelled() or done.exception())  # asked for, even if nobody waits
        while not (await asyncio.wait({ids}, timeout=LOOK_S))[0]:
            if self._stopping():
                self.close()
                raise ApiError(503, "the server is stopping")
        if ids.cancelled() or (self._stopping() and ids.exception() is not None):
            raise ApiError(503, "the server is stopping")
        return ids.result()

    async def completion(self, body: CompletionRequest, new: bool) -> list[int]:
        """Encode the prompt of a completion: a text, or ids as they are.

        Raises: UsageError.
        """
        return await asyncio.to_thread(self.completion_ids, body, new)

    def close(self) -> None:
        """Drop what is not done: a template that takes long must not hold up the server's end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._tokenizer.close()

    def chat_ids(self, body: ChatRequest, new: bool) -> list[int]:
        """Do the work of `chat` in the caller's thread."""
        messages = [message.plain for message in body.messages]
        args = {**self._template_args, **(body.chat_template_kwargs or {})}
        if self._require_pinned is not None:
            for message in messages:
                if message["role"] == "system":
                    self._require_pinned(message["content"], template_args=args)
        allow = self._allows(body, messages)
        if new:
            return self._tokenizer.chat_ids(messages, template_args=args, allow_special=allow)
        if len(messages) != 1 or messages[0]["role"] != "user":
            roles = ", ".join(message["role"] for message in messages)
            raise ApiError(
                400,
                f"messages: received {roles}, expected one user message: conversation "
                f"'{body.conversation}' has begun and knows the earlier ones",
                param="messages",
            )
        return self._tokenizer.next_turn_ids(messages[0]["content"], template_args=args, allow_special=allow)

    def completion_ids(self, body: CompletionRequest, new: bool) -> list[int]:
        """Do the work of `completion` in the caller's thread."""
        if isinstance(body.prompt, str):
            allow = self._allows(body, body.prompt)
            return self._tokenizer.prompt_ids(body.prompt, begun=not new, allow_special=allow)
        return [int(token) for token in body.prompt if isinstance(token, int)]

    def _allows(self, body: Request, texts: Any) -> bool:
        """Whether special tokens are allowed; the first time that some stay text, the log says so."""
        allow = self._allow_special if body.allow_special is None else body.allow_special
        if not allow and not self._noted:
            name = next(filter(None, map(self._tokenizer.special_in, texts_in(texts))), None)
            if name is not None:
                self._noted = True
                logger.warning(
                    "'%s' in a request was taken as ordinary text; \"allow_special\": true in the request, "
                    "or --allow-special, makes it a token; said once",
                    name,
                )
        return allow
