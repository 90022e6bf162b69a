"""Fields that would change the answer and that this server does not have: they are refused, not ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sinkexport.serve.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Refused:
    """what: what the field asks for. harmless: values that ask for nothing. fix: what to do instead.

    of_prompt: whether it changes what the model is given, and so the ids of /tokenize.
    """

    what: str
    harmless: tuple[Any, ...] = ()
    fix: str = "leave it out"
    of_prompt: bool = False


_LIMITED = "answers in a given format"
_FORMED = Refused("other names of an answer's form", ({}, [], ""), "use response_format, or structured_outputs")
_CHOSEN = "other ways to choose tokens"
_LENGTH = Refused(
    "other names of an answer's longest length", (-1,), "use max_tokens, or max_output_tokens of responses"
)
_THOUGHT = Refused("other ways to ask for reasoning", (), "use chat_template_kwargs, such as enable_thinking", True)


def _texts(*harmless: Any) -> Refused:
    return Refused("other ways to make a prompt of messages", harmless, of_prompt=True)


REFUSED: Mapping[str, Refused] = {
    "audio": Refused("answers in sound"),
    "functions": Refused("functions", ([],)),
    "moderation": Refused("moderated answers"),
    "web_search_options": Refused("web searches"),
    "tools": Refused("tools of this kind", ([],), of_prompt=True),
    "response_format": Refused(_LIMITED, ({"type": "text"},), "use text.format"),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema"), _FORMED),
    "grammar": _FORMED,
    "structured_outputs": Refused(_LIMITED, ({},), "use text.format"),
    "min_p": Refused(_CHOSEN, (0,)),
    "typical_p": Refused(_CHOSEN, (1,)),
    "mirostat": Refused(_CHOSEN, (0,)),
    "dynatemp_range": Refused(_CHOSEN, (0,)),
    "xtc_probability": Refused(_CHOSEN, (0,)),
    "dry_multiplier": Refused(_CHOSEN, (0,)),
    "repeat_penalty": Refused("llama.cpp's penalties", (1,), "use repetition_penalty"),
    "use_beam_search": Refused("searches among several beams", (False,)),
    "length_penalty": Refused("searches among several beams", (1,)),
    "min_tokens": Refused("shortest lengths", (0,)),
    "stop_token_ids": Refused(
        "stops by token id", ([],), 'use stop, which takes names of special tokens ("<|im_end|>")'
    ),
    "bad_words": Refused("forbidden words", ([],), "use logit_bias"),
    "allowed_token_ids": Refused("lists of allowed tokens", ([],), "use logit_bias"),
    "logits_processors": Refused("programs of a client", ([],)),
    "n_probs": Refused("llama.cpp's probabilities", (0,), "use logprobs"),
    "prompt_logprobs": Refused("log probabilities of a prompt", (False,)),
    "return_token_ids": Refused("ids in answers", (False,), "use /tokenize, or logprobs"),
    "skip_special_tokens": Refused("special tokens in answers", (True,)),
    "include_stop_str_in_output": Refused("stop texts in answers", (False,)),
    "add_generation_prompt": _texts(True),
    "continue_final_message": _texts(False),
    "chat_template": _texts(),
    "documents": _texts([]),
    "truncate_prompt_tokens": Refused(
        "shortened prompts", (), "send less, or name a conversation, which never ends", True
    ),
    "add_special": Refused("llama.cpp's options", (False,), "use add_special_tokens", True),
    "parse_special": Refused("llama.cpp's options", (False,), "use allow_special", True),
    "with_pieces": Refused("llama.cpp's options", (False,), "use return_token_strs", True),
    "lora": Refused("adapters", ([], "")),
    "system": Refused("system messages beside the others", ("",), "put it into the messages"),
    "instructions": Refused("system messages beside the others", ("",), "put it into the messages"),
    "stop_sequences": Refused("other names of stop texts", ([],), "use stop"),
    "max_tokens": _LENGTH,
    "max_completion_tokens": _LENGTH,
    "max_output_tokens": _LENGTH,
    "max_new_tokens": _LENGTH,
    "max_length": _LENGTH,
    "n_predict": _LENGTH,
    "num_predict": _LENGTH,
    "enable_thinking": _THOUGHT,
    "thinking": _THOUGHT,
    "thinking_budget": _THOUGHT,
    "reasoning": _THOUGHT,
    "include_reasoning": Refused("answers without their reasoning", (True,)),
    "n": Refused("several answers of this kind", (1,)),
    "best_of": Refused("several answers of this kind", (1,)),
    "echo": Refused("echoes of the prompt", (False,)),
    "suffix": Refused("texts to be filled in", ("",)),
    "logprobs": Refused("log probabilities of this kind", (False,), 'use include: ["message.output_text.logprobs"]'),
}
"""Refusals by name of the field, where a kind of request does not have a field of that name."""


def refuse(value: Mapping[str, Any], known: Mapping[str, Any], *, only_prompt: bool = False) -> None:
    """Look for fields that ask for what there is not.

    known: fields of the request's kind. only_prompt: the request has no answer, so that only its prompt counts.

    Raises: ApiError 400.
    """
    for name, item in value.items():
        found = None if name in known or item is None else REFUSED.get(name)
        if found is None or (only_prompt and not found.of_prompt) or item in found.harmless:
            continue
        raise ApiError(400, f"{name}: {found.what} are not implemented here; {found.fix}", param=name)
