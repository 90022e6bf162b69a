"""Text in and out: the bundle's tokenizer, its streaming decoder and its chat template.

Twin of runtime/cpp/src/text, which has no chat templates.
"""

from sinkrt.text.stream_decoder import MAX_PENDING, REPLACEMENT, StreamingDecoder
from sinkrt.text.tokenizer import OPENING_MESSAGES, Tokenizer, common_start
from sinkrt.text.tokenizer_files import named_special_tokens

__all__ = [
    "MAX_PENDING",
    "OPENING_MESSAGES",
    "REPLACEMENT",
    "StreamingDecoder",
    "Tokenizer",
    "common_start",
    "named_special_tokens",
]
