"""Models that were trained with a token of their own for the sink (StreamingLLM, arXiv:2309.17453, section 3.3).

Such a model needs one sink, provided that every stream begins with that token. That is the tokenizer's business: the
bundle's adds it to every text, and the chat template to every conversation, so that no runtime has to know.
"""

from __future__ import annotations

import dataclasses
import json

import tokenizers
from sinkrt.errors import UsageError, problem

from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer

AUTO = "auto"


def with_sink_token(tokenizer: SourceTokenizer | None, token: str, vocab_size: int) -> SourceTokenizer:
    """A copy of a tokenizer that begins every text and every conversation with `token`.

    token: its text, or ``auto``: the one special token that has "sink" in its name.

    Raises: UsageError if there is no such token or the model has no vector for it.
    """
    if tokenizer is None:
        raise _refused("a model without a tokenizer", "a model folder with its tokenizer")
    found = _special_sink(tokenizer.library) if token == AUTO else token
    number = tokenizer.token_id(found)
    if number is None or number >= vocab_size:
        raise _refused(f"'{found}'", f"a token of the model's vocabulary of {vocab_size}")
    library = tokenizers.Tokenizer.from_str(tokenizer.library.to_str())
    library.add_special_tokens([tokenizers.AddedToken(found, special=True, normalized=False)])
    first = tokenizers.processors.TemplateProcessing(
        single=[found, "$A"], pair=[found, "$A", "$B:1"], special_tokens=[(found, number)]
    )
    before = [] if library.post_processor is None else [library.post_processor]
    library.post_processor = tokenizers.processors.Sequence([*before, first])
    template = tokenizer.chat_template
    if template is not None:
        template = "{{- " + json.dumps(found) + " -}}" + template
    return dataclasses.replace(tokenizer, library=library, tokenizer_json=None, chat_template=template)


def _special_sink(library: tokenizers.Tokenizer) -> str:
    named = [t.content for t in library.get_added_tokens_decoder().values() if "sink" in t.content.lower()]
    if len(named) != 1:
        raise _refused(f"auto, and {len(named)} added tokens with 'sink' in their name", "exactly one")
    content: str = named[0]
    return content


def _refused(received: str, expected: str) -> UsageError:
    return UsageError(problem("--sink-token", received=received, expected=expected, fix="pass the token's text"))
