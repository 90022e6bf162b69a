"""Checks of a tokenizer against its model before anything is exported."""

from __future__ import annotations

import dataclasses
from typing import Any

from sinkrt.errors import SinkError, UsageError, problem

from sinkexport.loading.tokenizers.source_tokenizer import TOKENIZER_FILE, SourceTokenizer, broken_template
from sinkexport.loading.tokenizers.tokenizer_json import TokenizerJson
from sinkexport.loading.tokenizers.turn_ends import stated_ids

_USER = "user message 91fe"
SHOWN = 3
"""Tokens that a message names at most."""


def fitted(tokenizer: SourceTokenizer, num_rows: int) -> SourceTokenizer:
    """The tokenizer without added tokens that the model has no embedding for; most have none of these.

    num_rows: of the embedding. Added without resizing the embedding, such a token would end in an error; its text is
    encoded as any other text instead, and `remarks` say so.

    Raises: UsageError if other tokens are outside, or if the beginning of texts or the chat template needs them.
    """
    outside = {text: number for text, number in tokenizer.vocabulary.items() if number >= num_rows}
    if not outside:
        return tokenizer
    added = {token.content for token in tokenizer.library.get_added_tokens_decoder().values()}
    file = TokenizerJson(
        tokenizer.library.to_str().encode() if tokenizer.tokenizer_json is None else tokenizer.tokenizer_json
    )
    base = [text for text in outside if text not in added or text in file.vocabulary]
    names = _listed([f"{text!r} ({number})" for text, number in sorted(outside.items(), key=lambda item: item[1])])
    if base:
        raise UsageError(
            problem(
                "tokenizer",
                received=f"{tokenizer.num_tokens:,} tokens, {names} among them",
                expected=f"at most {num_rows:,}, the rows of the embedding",
                fix="use the tokenizer that belongs to the model",
            )
        )
    template = tokenizer.chat_template or ""
    needed = [text for text in outside if text in template or outside[text] in tokenizer.encode("a")]
    needed += [text for name, text in tokenizer.special_tokens.items() if text in outside and name in template]
    if needed:
        raise UsageError(
            problem(
                "tokenizer",
                received=f"{_listed(needed)}, added without resizing the embedding of "
                f"{num_rows:,} rows, and in use in every text or chat",
                expected="ids inside the embedding",
                fix="resize the model's embedding, or use its own tokenizer",
            )
        )
    file.remove(set(outside.values()))
    remark = (
        f"{names}: added to the tokenizer without resizing the embedding of {num_rows:,} rows: left out, their "
        "text is encoded as any other"
    )
    named = {name: text for name, text in tokenizer.special_tokens.items() if text not in outside}
    config = {name: value for name, value in tokenizer.config.items() if not _names(value, outside)}
    return dataclasses.replace(
        tokenizer,
        library=file.library(),
        tokenizer_json=file.content(),
        special_tokens=named,
        config=config,
        remarks=(*tokenizer.remarks, remark),
    )


def named(tokenizer: SourceTokenizer, config: Any) -> SourceTokenizer:
    """The tokenizer with the names of `config` for bos_token and eos_token, where its own files have none.

    Chat templates ask for them, and a runtime knows the ids only.
    """
    own = dict(tokenizer.special_tokens)
    for name in ("bos_token", "eos_token"):
        number = next(iter(stated_ids(config, f"{name}_id")), None)
        text = None if number is None or number < 0 else tokenizer.library.id_to_token(number)
        if text is not None:
            own.setdefault(name, text)
    return tokenizer if own == tokenizer.special_tokens else dataclasses.replace(tokenizer, special_tokens=own)


def check_tokens(tokenizer: SourceTokenizer) -> None:
    """Every added token must encode to its own id, and a text to ids that the vocabulary has.

    Raises: UsageError naming the first that do not.
    """
    wrong = []
    # From the file, if there is one: the library numbers tokens anew where ids before them are missing.
    file = TokenizerJson(tokenizer.tokenizer_json or tokenizer.library.to_str().encode())
    listed = {token["content"]: token["id"] for token in file.tokens.values()}
    for text, numbers in file.template_tokens().items():  # which have ids of their own in the file
        if numbers != [tokenizer.token_id(text)]:
            wrong.append(f"{text!r} to {numbers} around a text instead of {tokenizer.token_id(text)}")
    for text, number in listed.items():
        if text and tokenizer.encode(text, special=False) != [number]:
            wrong.append(f"{text!r} to {tokenizer.encode(text, special=False)[:4]} instead of {number}")
    if wrong:
        raise UsageError(
            problem(
                TOKENIZER_FILE,
                received=f"added tokens that encode {_listed(wrong)}",
                expected="each to its own id",
                fix="repair the tokenizer's files",
            )
        )


def check_template(tokenizer: SourceTokenizer) -> None:
    """The chat template must render a user's message.

    Raises: UsageError if it cannot.
    """
    if tokenizer.chat_template is None:
        return
    try:
        tokenizer.runtime.render_chat([{"role": "user", "content": _USER}])
    except UsageError as error:
        raise error if "the source's own" in str(error) else broken_template(error) from error
    except SinkError as error:
        raise broken_template(error) from error


def opening_size(tokenizer: SourceTokenizer | None, system: str) -> int:
    """Tokens with which every conversation under a system message begins, up to the user's first words.

    Raises: UsageError for a model without a chat template, or whose template refuses or drops the message.
    """
    if tokenizer is None or tokenizer.chat_template is None:
        raise UsageError(
            problem(
                "--pin-system",
                received="a model without a chat template",
                expected="an instruction-tuned model",
                fix="use --sink-tokens",
            )
        )
    reason = system_refusal(tokenizer)
    if reason is not None:
        raise UsageError(
            problem(
                "--pin-system",
                received=f"a model whose chat template {reason}",
                expected="a model that knows system messages",
                fix="leave it out, or put the text into the first user message",
            )
        )
    return tokenizer.runtime.opening_size(system)


def system_refusal(tokenizer: SourceTokenizer) -> str | None:
    """Reason why the chat template takes no system message; None if it takes one.

    Raises: UsageError if the template cannot be rendered at all.
    """
    facts = tokenizer.runtime.template_facts
    if facts.has_system:
        return None
    return (
        f"refuses a system message ({facts.system_refusal})"
        if facts.system_refusal
        else ("leaves a system message out")
    )


def _names(value: object, texts: dict[str, int]) -> bool:
    content = value.get("content") if isinstance(value, dict) else value
    return isinstance(content, str) and content in texts


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
