"""Text in and out: the bundle's tokenizer, a streaming decoder and the chat template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from sinkrt.contract import Manifest
from sinkrt.errors import BundleError, UsageError, problem

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING = 8
"""Tokens that a streaming decoder holds back: a character has at most 4 bytes, so more are no character."""

_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ANSWER = "the-answer-so-far-3f9c1a77"
"""Stands for text that the cache holds already, to be found again in what a template renders."""


class Tokenizer:
    """A bundle's tokenizer. Make one with `Tokenizer.load`.

    template: Jinja source of the chat template, or None. special_tokens: their texts by name (``bos_token``), for it.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, template: str | None, special_tokens: dict[str, str] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens or {}
        self._template = None if template is None else _compiled(template)
        self._newline = self.encode("\n", special=False)

    @classmethod
    def load(cls, bundle: Path, manifest: Manifest) -> Tokenizer:
        """Read the tokenizer files of a bundle.

        Raises: UsageError if it has none; BundleError if they are unreadable.
        """
        facts = manifest.tokenizer
        if facts is None:
            raise UsageError(problem("tokenizer", received="a bundle without one", expected="tokenizer.json",
                                     fix="feed token ids, or export a model folder with its tokenizer"))  # fmt: skip
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(bundle / facts.file))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(problem(facts.file, received=_one_line(error), expected="a tokenizer of 'tokenizers'",
                                      fix="export the model again")) from error  # fmt: skip
        model = manifest.model
        special = {
            name: tokenizer.id_to_token(token) or ""
            for name, token in (("bos_token", model.bos_token_id), ("eos_token", next(iter(model.eos_token_ids), None)))
            if token is not None
        }
        template = None
        try:
            if facts.chat_template is not None:
                template = (bundle / facts.chat_template).read_text(encoding="utf-8")
            if _TOKENIZER_CONFIG in manifest.files:  # what the tokenizer itself calls its special tokens goes first
                special |= _special_tokens(json.loads((bundle / _TOKENIZER_CONFIG).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise BundleError(problem("tokenizer files", received=_one_line(error), expected="UTF-8 text and JSON",
                                      fix="export the model again")) from error  # fmt: skip
        return cls(tokenizer, template, special)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return self._template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the model starts its texts with, if anything.

        Raises: UsageError for text that is not valid Unicode (a lone surrogate).
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except (TypeError, UnicodeError) as error:  # the library takes Rust strings, which are valid UTF-8
            raise UsageError(
                problem("text", received="something that is not Unicode text", expected="valid UTF-8",
                        fix="check the encoding of the input")
            ) from error  # fmt: skip

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

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def streaming_decoder(self) -> StreamingDecoder:
        """A decoder for ids that come one by one."""
        return StreamingDecoder(self._tokenizer)

    def render_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The chat template over messages of ``role`` and ``content``.

        Raises: UsageError if the bundle has no template or the template refuses the messages.
        """
        if self._template is None:
            raise UsageError(problem("chat template", received="a bundle without one", expected="chat_template.jinja",
                                     fix="use --prompt, or export an instruction-tuned model"))  # fmt: skip
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # templates are programs: they fail in any way
            raise UsageError(problem("chat", received=f"messages that the template refuses ({_one_line(error)})",
                                     expected="roles in the order that the model knows",
                                     fix="see the model's card")) from error  # fmt: skip

    def opening_size(self, system: str) -> int:
        """Tokens with which every conversation under this system message begins, up to the user's first words.

        As many sinks keep the message in the cache for ever.

        Raises: UsageError as `render_chat` does.
        """
        first, second = (
            self.encode(self.render_chat([{"role": "system", "content": system}, {"role": "user", "content": message}]),
                        special=False)
            for message in OPENING_MESSAGES
        )  # fmt: skip
        return common_start(first, second)

    def render_next_turn(self, message: str) -> str:
        """What the chat template adds for one more user message after an answer, the opening not repeated.

        Templates render whole conversations only, so this is the end of one with an answer already in it.

        Raises: UsageError as `render_chat` does.
        """
        past = [{"role": "user", "content": _ANSWER}, {"role": "assistant", "content": _ANSWER}]
        whole = self.render_chat([*past, {"role": "user", "content": message}])
        _, found, rest = whole.rpartition(_ANSWER)
        if not found:
            raise UsageError(
                problem("chat template", received="one that leaves out earlier answers",
                        expected="one that keeps them as they are", fix="use --prompt, or feed the turns as text")
            )  # fmt: skip
        return rest


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


OPENING_MESSAGES = ("0", "?")
"""Two user messages that begin differently: what two conversations share up to them is their opening."""


class StreamingDecoder:
    """Turns ids into text as they come, never splitting a character that spans several tokens.

    Like tokenizers' DecodeStream, with two differences that endless streams need: memory is constant even if a
    model repeats special tokens or broken bytes for ever, and no sequence of ids raises.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._context: list[int] = []  # the ids of the last piece: whether a space comes next depends on them
        self._pending: list[int] = []  # ids after it that are no whole character yet

    def push(self, token: int) -> str:
        """The text that `token` completes: empty while a character is still incomplete, and for special tokens."""
        if token in self._special or self._tokenizer.id_to_token(token) is None:
            return ""
        self._pending.append(token)
        piece = self._piece()
        if piece.endswith(REPLACEMENT) and len(self._pending) < MAX_PENDING:
            return ""
        self._context, self._pending = self._pending, []
        return piece

    def flush(self) -> str:
        """What is left when the ids end inside a character, with U+FFFD for what is missing."""
        piece = self._piece() if self._pending else ""
        self._context, self._pending = [], []
        return piece

    def _piece(self) -> str:
        before = str(self._tokenizer.decode(self._context))
        whole = str(self._tokenizer.decode(self._context + self._pending))
        # Bytes can spoil a character before them in the eyes of some decoders; it has been told already, as it was.
        return whole[len(before) :] if whole.startswith(before) else str(self._tokenizer.decode(self._pending))


class _GenerationTag(jinja2.ext.Extension):
    """transformers' ``{% generation %} .. {% endgeneration %}``: marks answers for training, renders its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compiled(template: str) -> jinja2.Template:
    """A chat template with what transformers gives it.

    Raises: BundleError if it is no Jinja.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise BundleError(problem("chat template", received=f"text that is no Jinja ({_one_line(error)})",
                                  expected="a template", fix="export the model again")) from error  # fmt: skip


def _special_tokens(config: Any) -> dict[str, str]:
    """Texts of the special tokens in a tokenizer_config.json: plain, or objects with a ``content``."""
    if not isinstance(config, dict):
        return {}
    found = {name: config.get(name) for name in _SPECIAL_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _raise_exception(message: str) -> Any:
    raise jinja2.TemplateError(message)
