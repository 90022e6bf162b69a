"""Prompts to ids, outside the event loop: long texts and chat templates take long."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from sinkrt import UsageError
from sinkrt.grammar import Calls, CompiledGrammar, Grammar, GrammarCompiler, answer_grammar, loosened
from sinkrt.text import Tokenizer
from sinkrt.text.answer_parts import AnswerParts
from sinkrt.text.special_text import texts_in

from sinkexport.serve.errors import ApiError, shown
from sinkexport.serve.openings import Openings
from sinkexport.serve.requests import ChatPrompt, CompletionRequest, Offered, TokenizeRequest

CHAT_THREADS = 2
LOOK_S = 0.5
"""How often a request whose prompt takes long checks whether the server is stopping."""
EFFORT = "reasoning_effort"
"""Variable of chat templates whose models think for longer or shorter."""

T = TypeVar("T")
logger = logging.getLogger("sinkexport.serve")


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A prompt as the model takes it.

    parts: how its answer is taken apart; None: it is not. opening: number of first ids that all chats with these
    system messages begin with; 0: unknown. grammar: what the answer must match; None: anything.
    """

    ids: list[int]
    parts: AnswerParts | None = None
    opening: int = 0
    grammar: CompiledGrammar | None = None


class Prompts:
    """Encodes prompts.

    template_args: variables of the chat template, which a request may change one by one.
    allow_special: whether names of special tokens in the prompts of completions become those tokens, for requests that
    do not say. In chats they do so only if the request says so: there the template writes control tokens.
    require_pinned: raises UsageError for a system message that the sinks do not keep; None: any is accepted.
    grammars: makes grammars ready. stopping: whether the server is stopping, so that nobody waits for a chat template
    that takes long.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template_args: Mapping[str, Any],
        allow_special: bool,
        require_pinned: Callable[..., None] | None,
        grammars: GrammarCompiler,
        stopping: Callable[[], bool],
        max_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._template_args = template_args
        self._allow_special = allow_special
        self._require_pinned = require_pinned
        self._grammars = grammars
        self._stopping = stopping
        self._noted = False
        self._openings = Openings(lambda prompt, args: self._chat_ids(prompt, args, True), max_tokens)
        # Threads of their own: a chat template that takes long holds up no other kind of request.
        self._threads = ThreadPoolExecutor(CHAT_THREADS, "sinkexport-chat")

    async def chat(self, prompt: ChatPrompt, new: bool) -> Rendered:
        """Encode the prompt of a chat: all messages, or one more turn of a conversation that has begun.

        Raises: UsageError, ApiError.
        """
        return await self._in_thread(lambda: self.chat_prompt(prompt, new))

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """Run what renders a chat template, which may take long.

        Raises: ApiError 503 if the server stops meanwhile; what the function raises.
        """
        try:
            work = self._threads.submit(function)
        except RuntimeError:  # closed
            raise ApiError(503, "the server is stopping") from None
        done = asyncio.wrap_future(work)
        done.add_done_callback(lambda end: end.cancelled() or end.exception())  # asked for, even if nobody waits
        while not (await asyncio.wait({done}, timeout=LOOK_S))[0]:
            if self._stopping():
                self.close()
                raise ApiError(503, "the server is stopping")
        if done.cancelled() or (self._stopping() and done.exception() is not None):
            raise ApiError(503, "the server is stopping")
        return done.result()

    async def completion(self, body: CompletionRequest, new: bool) -> Rendered:
        """Encode the prompt of a completion: a text, or ids as they are.

        Raises: UsageError.
        """
        return await asyncio.to_thread(self.completion_prompt, body, new)

    def close(self) -> None:
        """Drop what is not done: a template that takes long must not hold up the server's end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._tokenizer.close()

    def chat_prompt(self, prompt: ChatPrompt, new: bool) -> Rendered:
        """Do the work of `chat` in the caller's thread."""
        args = self._args(prompt)
        ids = self._chat_ids(prompt, args, new)
        parts = self._parts(prompt, args)
        opening = self._openings.size(ids, prompt, args) if new else 0
        return Rendered(ids, parts if prompt.split or parts.calls else None, opening, self._grammar(prompt, parts))

    def _parts(self, prompt: ChatPrompt, args: Mapping[str, Any]) -> AnswerParts:
        """How the answer is taken apart. Thinking counts for its grammar even if it stays in the content."""
        offered = prompt.offered or Offered()
        calls = self._tokenizer.tools().format if offered.functions else None
        return AnswerParts(self._tokenizer.thinking(args), calls, offered.tools, self._tokenizer.has_channels)

    def _grammar(self, prompt: ChatPrompt, parts: AnswerParts) -> CompiledGrammar | None:
        """What the answer must match.

        Raises: UsageError.
        """
        offered = prompt.offered or Offered()
        if prompt.grammar is None and not offered.is_bound:
            return None
        calls = None
        if offered.functions and parts.calls is not None:
            calls = Calls(offered.tools, offered.many and parts.calls.many, offered.must_call)
        body = None if offered.must_call else prompt.grammar
        try:
            return self._grammars.compile(answer_grammar(body, calls, parts, self._tokenizer))
        except UsageError:
            if calls is None or all(tool.strict for tool in calls.tools):
                raise
            # Schemas of tools that are not strict are hints.
            calls = dataclasses.replace(calls, tools=loosened(calls.tools))
            return self._grammars.compile(answer_grammar(body, calls, parts, self._tokenizer))

    def _args(self, prompt: ChatPrompt) -> dict[str, Any]:
        """Variables of the template: the server's, and the request's, which go first."""
        args = {**self._template_args, **prompt.args}
        if prompt.effort is not None:
            if EFFORT not in self._tokenizer.template_facts.variables:
                raise ApiError(
                    400,
                    f"{EFFORT}: levels of reasoning are not implemented here for this model, whose chat template does "
                    f"not know {shown(prompt.effort)}; leave it out",
                    param=EFFORT,
                )
            args[EFFORT] = prompt.effort
        return args

    def _chat_ids(self, prompt: ChatPrompt, args: Mapping[str, Any], new: bool) -> list[int]:
        messages, offered = prompt.messages, prompt.offered or Offered()
        if self._require_pinned is not None:
            for message in messages:
                if message["role"] == "system":
                    self._require_pinned(message["content"], template_args=args)
        tools = offered.shown
        if prompt.conversation is not None and tools:  # their results would be more than one user message
            raise ApiError(400, "tools: received some, expected none in a named conversation", param="tools")
        allow = self._allows(bool(prompt.allow_special), [messages, tools])
        if new:
            return self._tokenizer.chat_ids(messages, template_args=args, tools=tools, allow_special=allow)
        if len(messages) != 1 or messages[0]["role"] != "user":
            roles = ", ".join(message["role"] for message in messages)
            raise ApiError(
                400,
                f"messages: received {roles}, expected one user message: conversation "
                f"'{prompt.conversation}' has begun and knows the earlier ones",
                param="messages",
            )
        return self._tokenizer.next_turn_ids(messages[0]["content"], template_args=args, allow_special=allow)

    def completion_prompt(self, body: CompletionRequest, new: bool) -> Rendered:
        """Do the work of `completion` in the caller's thread."""
        grammar: Grammar | None = body.grammar
        compiled = None if grammar is None else self._grammars.compile(grammar)
        return Rendered(self.completion_ids(body, new), grammar=compiled)

    def completion_ids(self, body: CompletionRequest, new: bool) -> list[int]:
        """The ids of a completion's prompt."""
        if isinstance(body.prompt, str):
            allow = self._allows(body.allow_special, body.prompt)
            return self._tokenizer.prompt_ids(body.prompt, begun=not new, allow_special=allow)
        return [int(token) for token in body.prompt if isinstance(token, int)]

    async def tokens(self, body: TokenizeRequest) -> list[int]:
        """Ids of a text or a chat, as a request for an answer would give them to the model.

        Raises: UsageError, ApiError.
        """
        chat = body.chat
        if chat is not None:
            return await self._in_thread(lambda: self._chat_ids(chat, self._args(chat), True))
        text = body.prompt if body.content is None else body.content
        allow = self._allows(body.allow_special, text)
        return await asyncio.to_thread(
            self._tokenizer.prompt_ids, text or "", begun=not body.special, allow_special=allow
        )

    async def text(self, ids: list[int]) -> str:
        """The text of some ids, names of special tokens included."""
        return await asyncio.to_thread(self._tokenizer.decode, ids, special=True)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token."""
        return self._tokenizer.token_bytes(token)

    def _allows(self, asked: bool | None, texts: Any) -> bool:
        """Whether special tokens are allowed; the first time that some stay text, the log says so."""
        allow = self._allow_special if asked is None else asked
        if not allow and not self._noted:
            name = next(filter(None, map(self._tokenizer.special_in, texts_in(texts))), None)
            if name is not None:
                self._noted = True
                logger.warning(
                    "'%s' in a request was taken as ordinary text; \"allow_special\": true in the request, "
                    "or --allow-special for completions, makes it a token; said once",
                    name,
                )
        return allow
