"""Text in and out: the bundle's tokenizer, a streaming decoder and the chat template."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers.decoders import DecodeStream

from sinkrt.contract import Manifest
from sinkrt.errors import BundleError, UsageError, problem


class Tokenizer:
    """A bundle's tokenizer. Make one with `Tokenizer.load`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, template: str | None, manifest: Manifest) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._manifest = manifest

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
            raise BundleError(problem(facts.file, received=str(error)[:120], expected="a tokenizer of 'tokenizers'",
                                      fix="export the model again")) from error  # fmt: skip
        template = (bundle / facts.chat_template).read_text(encoding="utf-8") if facts.chat_template else None
        return cls(tokenizer, template, manifest)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return self._template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the model starts its texts with, if anything."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

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
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        facts = self._manifest.model
        try:
            return environment.from_string(self._template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self._token_text(facts.bos_token_id),
                eos_token=self._token_text(facts.eos_token_ids[0] if facts.eos_token_ids else None),
            )
        except jinja2.TemplateError as error:
            raise UsageError(problem("chat", received=f"messages that the template refuses ({error})",
                                     expected="roles in the order that the model knows",
                                     fix="see the model's card")) from error  # fmt: skip

    def _token_text(self, token: int | None) -> str:
        return (self._tokenizer.id_to_token(token) or "") if token is not None else ""


class StreamingDecoder:
    """Turns ids into text as they come, never splitting a character that spans several tokens."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes: empty while a character is still incomplete."""
        piece = self._stream.step(self._tokenizer, token)
        if piece is None:
            self._pending.append(token)
            return ""
        self._pending.clear()
        return str(piece)

    def flush(self) -> str:
        """What is left when the ids end inside a character, with U+FFFD for what is missing."""
        rest = str(self._tokenizer.decode(self._pending, skip_special_tokens=True)) if self._pending else ""
        self._pending.clear()
        return rest


def _raise_exception(message: str) -> Any:
    raise jinja2.TemplateError(message)
