"""Requests: OpenAI's chat completions, completions and responses, and the fields that only this server has.

A request that asks for what this server cannot do (pictures, other ways to choose tokens) is refused: an answer that
silently lacks something is worse than none. A field that changes nothing of an answer, or that nobody knows, is
ignored, and the log says so at level DEBUG. A null means that the field is absent. Descriptions of fields say what is
expected, for error messages.
"""

from sinkexport.serve.requests.base import NAME_PATTERN, ChatPrompt, Fields, Request
from sinkexport.serve.requests.chat import ChatRequest
from sinkexport.serve.requests.completion import CompletionRequest
from sinkexport.serve.requests.refused import refuse
from sinkexport.serve.requests.responses import ResponsesRequest
from sinkexport.serve.requests.tokens import DetokenizeRequest, TokenizeRequest
from sinkexport.serve.requests.tools import Offered

__all__ = [
    "NAME_PATTERN",
    "ChatPrompt",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "Fields",
    "Offered",
    "Request",
    "ResponsesRequest",
    "TokenizeRequest",
    "refuse",
]
