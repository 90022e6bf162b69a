"""Forms: what an answer looks like on the wire, whole or as server-sent events."""

from sinkexport.serve.forms.base import Answered, Form, Part, Usage
from sinkexport.serve.forms.chat import ChatForm
from sinkexport.serve.forms.completion import CompletionForm
from sinkexport.serve.forms.responses import ResponsesForm

__all__ = ["Answered", "ChatForm", "CompletionForm", "Form", "Part", "ResponsesForm", "Usage"]
