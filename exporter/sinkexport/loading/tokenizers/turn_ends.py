"""The ends of a turn: every id after which an answer is over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sinkrt.errors import UsageError, problem

from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer


def end_ids(
    tokenizer: SourceTokenizer | None, config: Any, generation_config: Any | None, num_tokens: int
) -> tuple[int, ...]:
    """The union of what the tokenizer, the model's and the generation configuration say, ascending.

    num_tokens: V of the model, tokens that it can give. An id outside is left out if nobody stated it (transformers
    fills in what a class had once); a model without any keeps none.

    Raises: UsageError for a stated id outside the vocabulary, or one that is no id.
    """
    ends = set(() if tokenizer is None else tokenizer.end_ids)
    for name, ids in (
        ("config.json", stated_ids(config, "eos_token_id")),
        ("generation_config.json", stated_ids(generation_config, "eos_token_id")),
    ):
        for number, is_stated in ids.items():
            if 0 <= number < num_tokens:
                ends.add(number)
            elif is_stated:
                raise outside(f"eos_token_id of {name}", number, num_tokens)
    return tuple(sorted(number for number in ends if number < num_tokens))


def beginning_id(tokenizer: SourceTokenizer | None, config: Any, num_tokens: int) -> int | None:
    """The id of the beginning-of-text token: the configuration's, or the tokenizer's; None if there is none.

    Raises: UsageError as `end_ids`.
    """
    for number, is_stated in stated_ids(config, "bos_token_id").items():
        if 0 <= number < num_tokens:
            return number
        if is_stated:
            raise outside("bos_token_id of config.json", number, num_tokens)
    own = None if tokenizer is None else tokenizer.token_id(tokenizer.special_tokens.get("bos_token"))
    return own if own is not None and own < num_tokens else None


def stated_ids(config: Any | None, key: str) -> Mapping[int, bool]:
    """The ids of a configuration, and whether it really states them or a class fills them in.

    Raises: UsageError for what is no id.
    """
    value = getattr(config, key, None)
    if config is None or value is None:
        return {}
    ids = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    for number in ids:
        if isinstance(number, bool) or not isinstance(number, int):
            raise UsageError(
                problem(
                    key,
                    received=repr(number)[:80],
                    expected="an id, or a list of ids",
                    fix="repair config.json and generation_config.json",
                )
            )
    is_copy = getattr(config, "_from_model_config", False)  # of a generation configuration that nobody wrote
    return dict.fromkeys(ids, not is_copy and value != _default(config, key))


def _default(config: Any, key: str) -> Any:
    """Default of a configuration's class; None if it cannot be had."""
    try:
        return getattr(type(config)(), key, None)
    except Exception:  # classes that cannot do without arguments
        return None


def outside(what: str, number: int, num_tokens: int) -> UsageError:
    """The refusal of an id that the model has no row for."""
    return UsageError(
        problem(
            what, received=number, expected=f"an id of the vocabulary of {num_tokens:,}", fix="repair the model's files"
        )
    )
