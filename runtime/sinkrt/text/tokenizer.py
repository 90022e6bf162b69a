"""The bundle's tokenizer, with its streaming decoder and its chat template.

Twin of runtime/cpp/include/sinkrt/tokenizer.h, which has no chat templates.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sinkrt.contract import Manifest
from sinkrt.errors import UsageError, problem
from sinkrt.text.chat_messages import joined, message_text
from sinkrt.text.chat_template import ChatTemplate, choose_template
from sinkrt.text.special_text import ControlTokens, Marks, PlainEncoder, names_in, pattern, split, texts_in
from sinkrt.text.stream_decoder import StreamingDecoder
from sinkrt.text.template_facts import TemplateFacts
from sinkrt.text.thinking import Thinking
from sinkrt.text.token_bytes import TokenBytes
from sinkrt.text.tokenizer_files import read_tokenizer_files
from sinkrt.text.tools import ToolFacts

OPENING_MESSAGES = ("0", "?")
"""Two user messages that begin differently: what two conversations share up to them is their opening."""


class Tokenizer:
    """A bundle's tokenizer. Make one with `Tokenizer.load`.

    template: Jinja source of the chat template, several by name, or None. special_tokens: their texts by name
    (``bos_token``), or lists of texts, for it.

    `encode` and `encode_next` do as the library does: the name of a special token becomes that token. `prompt_ids`,
    `chat_ids` and `next_turn_ids` are for what users write: there it stays text unless `allow_special` says otherwise.

    Raises: BundleError if the template is no Jinja.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, template: Any | None, special_tokens: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        chosen = choose_template(template)
        self._template = None if chosen is None else ChatTemplate(chosen, special_tokens)
        self._newline = self.encode("\n", special=False)
        added = tokenizer.get_added_tokens_decoder().items()
        self._special_names = {i: token.content for i, token in added if token.special}
        self._special_control = ControlTokens.of(tokenizer)
        self._special = pattern(self._special_control.special)
        self._plain_encoders: dict[ControlTokens, PlainEncoder] = {}

    @classmethod
    def load(cls, bundle: Path, manifest: Manifest) -> Tokenizer:
        """Read the tokenizer files of a bundle.

        Raises: UsageError if it has none; BundleError if they are unreadable.
        """
        return cls(*read_tokenizer_files(bundle, manifest))

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return self._template is not None

    @property
    def template_facts(self) -> TemplateFacts:
        """Facts of the chat template, found on first use.

        Raises: UsageError if there is none, or it cannot be rendered at all.
        """
        return self._the_template.facts

    def close(self) -> None:
        """End the process that renders the chat template, if there is one. A later call starts another."""
        if self._template is not None:
            self._template.close()

    # --- text to ids ---

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the model starts its texts with, if anything.

        Raises: UsageError for text that is not valid Unicode (a lone surrogate).
        """
        with utf8_errors():
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def encode_next(self, text: str) -> list[int]:
        """Token ids of a text inside a stream: nothing that marks the beginning of one is added.

        Some tokenizers put a space before every text. So the text is encoded after a line break, which is then
        taken off again.
        """
        size = len(self._newline)
        ids = self.encode("\n" + text, special=False)
        if size and ids[:size] == self._newline:
            return ids[size:]
        return self.encode(text, special=False)  # the line break became part of another token

    def prompt_ids(self, text: str, *, begun: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of a text to continue. begun: inside a stream, as `encode_next`.

        allow_special: the names of special tokens in the text become those tokens. A text that then begins with what
        the model starts its texts with, as a rendered chat does, gets it once.

        Raises: UsageError as `encode`.
        """
        if self.special_in(text) is None:
            return self.encode_next(text) if begun else self.encode(text)
        if not allow_special:
            pieces = split(text, self._special)
            return self._plain_ids(pieces, self._special_control, special=not begun, begun=begun)
        if begun:
            return self.encode_next(text)
        ids, start = self.encode(text, special=False), self._start
        overlap = next((n for n in range(len(start), 0, -1) if ids[:n] == start[-n:]), 0)
        return self.encode(text) if not overlap else [*start, *ids[overlap:]]

    def special_in(self, text: str) -> str | None:
        """The first special token whose name is in a text, or None."""
        found = self._special.search(text)
        return None if found is None else found[0]

    def special_text(self, token: int) -> str:
        """The name of a special token, which decoded text leaves out; "" for any other id."""
        return self._special_names.get(token, "")

    def special_id(self, name: str) -> int | None:
        """The id of the special token of that name, or None."""
        return next((i for i, other in self._special_names.items() if other == name), None)

    def _plain_ids(
        self, pieces: list[tuple[str, bool]], control: ControlTokens, *, special: bool = False, begun: bool
    ) -> list[int]:
        """Ids of a text in pieces, some of them the user's own, as `encode` or `encode_next` gives them."""
        encoder = self._plain_encoder(control)
        with utf8_errors():
            ids = encoder.encode([("\n", False), *pieces] if begun else pieces, special=special)
            if begun and ids[: len(self._newline)] != self._newline:
                return encoder.encode(pieces, special=special)
        return ids[len(self._newline) :] if begun else ids

    # --- ids to text ---

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of some ids, special tokens left out unless `special`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """Gives the bytes of single tokens."""
        return TokenBytes(self._tokenizer)

    def streaming_decoder(self, after: Sequence[int] = ()) -> StreamingDecoder:
        """A decoder for ids that come one by one. after: what the stream has taken before, for the first space."""
        return StreamingDecoder(self._tokenizer, after)

    # --- chats ---

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages of ``role`` and ``content`` by the chat template.

        template_args: further variables of the template, such as ``enable_thinking``.

        Raises: UsageError if the bundle has no template, or the template refuses the messages or leaves one out.
        """
        return self._the_template.render(messages, add_generation_prompt=add_generation_prompt, args=template_args)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_args: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        allow_special: bool = False,
    ) -> list[int]:
        """Token ids of a conversation. tools: that the model may call, as OpenAI has them.

        What looks like a control token in a message or an argument is ordinary text, unless `allow_special`.

        Raises: UsageError as `render_chat`.
        """
        messages = [joined(message) for message in messages]  # two parts can make a control token together
        given: dict[str, Any] = {"args": template_args or {}, "tools": list(tools)}
        # One time for all renderings: they are compared.
        render = functools.partial(
            self._the_template.render, add_generation_prompt=add_generation_prompt, now=time.time()
        )
        text = render(messages, **given)
        if allow_special or not self._has_control(messages, given):
            return self.encode(text, special=False)
        pieces = self._pieces(text, messages, given, render)
        return self._plain_ids(pieces, self._chat_control, begun=False)

    def next_turn_ids(
        self, message: str, *, template_args: Mapping[str, Any] | None = None, allow_special: bool = False
    ) -> list[int]:
        """Token ids of `render_next_turn`, inside a stream; the message is treated as in `chat_ids`.

        Raises: UsageError as `render_next_turn`.
        """

        now = time.time()

        given: dict[str, Any] = {"args": template_args or {}}

        def render(messages: Sequence[Mapping[str, Any]], *, args: Any, check: bool = True) -> str:
            return self._the_template.render_next_turn(message_text(messages[0]), args=args, check=check, now=now)

        messages = [{"role": "user", "content": message}]
        text = render(messages, **given)
        if allow_special or not self._has_control(messages, given):
            return self.encode_next(text)
        pieces = self._pieces(text, messages, given, render)
        return self._plain_ids(pieces, self._chat_control, begun=True)

    def opening_size(self, system: str, *, template_args: Mapping[str, Any] | None = None) -> int:
        """Tokens with which every conversation under this system message begins, up to the user's first words.

        As many sinks keep the message in the cache forever.

        Raises: UsageError as `render_chat` does.
        """
        self.require_system()
        first, second = (
            self.chat_ids(
                [{"role": "system", "content": system}, {"role": "user", "content": message}],
                template_args=template_args,
            )
            for message in OPENING_MESSAGES
        )
        return common_start(first, second)

    def require_system(self) -> None:
        """Make sure that the chat template shows a system message.

        Raises: UsageError.
        """
        self._the_template.require_system()

    def render_next_turn(self, message: str, *, template_args: Mapping[str, Any] | None = None) -> str:
        """Text that the chat template adds for one more user message after an answer, the opening not repeated.

        Raises: UsageError as `render_chat` does.
        """
        return self._the_template.render_next_turn(message, args=template_args)

    def thinking(self, template_args: Mapping[str, Any] | None = None) -> Thinking | None:
        """How the chat template marks what the model thinks; None if it does not.

        Raises: UsageError as `render_chat` does.
        """
        return self._the_template.thinking(template_args)

    @property
    def has_channels(self) -> bool:
        """Whether the model writes its answers in gpt-oss's channels.

        Raises: UsageError as `render_chat` does.
        """
        return self._the_template.has_channels

    def tools(self) -> ToolFacts:
        """What the chat template does with tools.

        Raises: UsageError if it cannot be given any; as `render_chat`.
        """
        return self._the_template.tools()

    @property
    def _the_template(self) -> ChatTemplate:
        if self._template is None:
            raise UsageError(
                problem(
                    "chat template",
                    received="a bundle without one",
                    expected="chat_template.jinja",
                    fix="use --prompt, or export an instruction-tuned model",
                )
            )
        return self._template

    @functools.cached_property
    def _chat_control(self) -> ControlTokens:
        """Control tokens, including those that are such only because the chat template writes them."""
        return ControlTokens.of(self._tokenizer, self._the_template.literals())

    def _plain_encoder(self, control: ControlTokens) -> PlainEncoder:
        if control not in self._plain_encoders:
            self._plain_encoders[control] = PlainEncoder(self._tokenizer, control)
        return self._plain_encoders[control]

    @functools.cached_property
    def _start(self) -> list[int]:
        """Ids that the tokenizer puts before a text."""
        whole, text = self.encode("a"), self.encode("a", special=False)
        return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(text)] == text), [])

    def _has_control(self, messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> bool:
        control = pattern(self._chat_control.all)
        wrong = next((name for name in names_in([given, *messages]) if control.search(name)), None)
        if wrong is not None:
            raise UsageError(
                problem(
                    "chat",
                    received=f"a field whose name '{wrong}' holds a control token",
                    expected="control tokens in texts only, where they are ordinary text",
                    fix="rename it",
                )
            )
        return any(control.search(text) for text in texts_in([*messages, given]))

    def _pieces(
        self,
        text: str,
        messages: Sequence[Mapping[str, Any]],
        given: Mapping[str, Any],
        render: Callable[..., str],
    ) -> list[tuple[str, bool]]:
        """A rendered conversation in pieces, each with whether it is a control token that a user has written.

        Those in the messages and in what is given besides (variables, tools) are marked, rendered and found again.

        Raises: UsageError if they are not in `text` as they were written.
        """
        control, marks = self._chat_control, Marks([*texts_in([*messages, given]), text])
        everything = pattern(control.all)
        # What a model has said may hold tokens that its template looks for (</think>), and marks would hide them.
        literals = self._the_template.literals()
        written = {name for name in control.special if name in literals}
        for said in (control.special, control.special - written):
            own = {"assistant": pattern(said)}
            marked = [marks.put(message, own.get(message["role"], everything)) for message in messages]
            again = render(marked, **marks.put(given, everything), check=False)
            if marks.remove(again) == text:
                return marks.pieces(again)
        raise UsageError(
            problem(
                "chat",
                received="a message with a control token, which the chat template changes",
                expected="messages without control tokens",
                fix="leave it out, or pass --allow-special",
            )
        )


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading ids that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@contextlib.contextmanager
def utf8_errors() -> Iterator[None]:
    """Make the library's refusal of text that is not Unicode a UsageError."""
    try:
        yield
    except (TypeError, UnicodeError) as error:  # the library takes Rust strings, which are valid UTF-8
        raise UsageError(
            problem(
                "text",
                received="something that is not Unicode text",
                expected="valid UTF-8",
                fix="check the encoding of the input",
            )
        ) from error
