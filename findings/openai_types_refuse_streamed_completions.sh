#!/usr/bin/env bash
# openai 3.54.0 (Python): its type for the events of a streamed completion has no room for `"finish_reason": null`.
#
# Expected: every event that OpenAI's API and its like send (finish_reason is null until the end) fits the type.
# Happens:  `client.completions.create(stream=True)` promises Completion objects, whose finish_reason is 'stop', 'length'
#           or 'content_filter' by type. The client does not check, so None comes out; strict checks of a server's events
#           against the package's types fail, and type checkers take the test for None away. Chats have a type of their own.
# Matters:  whoever checks a server against the package's types has to make an exception for completions, and a loop that
#           trusts the type ends at the first event.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --quiet --disable-pip-version-check openai==3.54.0
cat > "$work/see.py" <<'PYTHON'
import openai
import pydantic
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

choice = {"index": 0, "finish_reason": None, "logprobs": None}
head = {"id": "x", "created": 0, "model": "m"}
ChatCompletionChunk.model_validate({**head, "object": "chat.completion.chunk", "choices": [{**choice, "delta": {}}]})
event = {**head, "object": "text_completion", "choices": [{**choice, "text": "a"}]}
print("openai", openai.__version__)
print("as the client makes it:", Completion.construct(**event).choices[0].finish_reason)
try:
    Completion.model_validate(event)
except pydantic.ValidationError as error:
    print("as the type says:", error.errors()[0]["msg"], "- received", error.errors()[0]["input"])
else:
    raise SystemExit(1)
PYTHON
"$work/venv/bin/python" "$work/see.py"
