"""LiteLLM, in an environment of its own, against a server: chats, completions and responses, streamed and not."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices
import litellm

URL, TOOLS_URL = os.environ["BASE_URL"], os.environ["TOOLS_URL"]
HOW = {"api_base": URL, "api_key": "none", "temperature": 0, "max_tokens": 8, "num_retries": 0}
MESSAGES = [{"role": "user", "content": "hi"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY, "strict": True}}]


def main() -> None:
    """Raises: AssertionError where an answer is not as expected."""
    chat = {"model": "openai/toy", "messages": MESSAGES, **HOW}
    whole = litellm.completion(**chat)
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0
    pieces = litellm.completion(**chat, stream=True, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text

    async def later() -> str:
        answer = await litellm.acompletion(**chat)
        return str(answer.choices[0].message.content)

    assert asyncio.run(later()) == text
    echoed = [*MESSAGES, whole.choices[0].message.model_dump(), {"role": "user", "content": "go on"}]
    assert litellm.completion(**{**chat, "messages": echoed}).usage.prompt_tokens > whole.usage.prompt_tokens
    many = litellm.completion(**chat, n=2, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True})
    assert [len(choice.logprobs.content) for choice in many.choices] == [8, 8]
    thought = litellm.completion(**chat, extra_body={"ignore_eos": True, "chat_template_kwargs": {"think": True}})
    assert thought.choices[0].message.reasoning_content
    assert not thought.choices[0].message.content
    pieces = litellm.completion(**chat, stream=True, extra_body={"chat_template_kwargs": {"think": True}})
    assert any(getattr(piece.choices[0].delta, "reasoning_content", None) for piece in pieces)

    completion = {"model": "text-completion-openai/toy", "prompt": "hi", **HOW}
    said = litellm.text_completion(**completion).choices[0].text
    pieces = litellm.text_completion(**completion, stream=True)
    assert "".join(piece.choices[0].text or "" for piece in pieces) == said

    # LiteLLM makes fewer tokens 16, without a word.
    how = {"api_base": URL, "api_key": "none", "temperature": 0, "max_output_tokens": 16}
    response = litellm.responses(model="openai/toy", input="hi", **how)
    said = "".join(part.text for part in response.output[0].content)
    assert said.startswith(text)
    deltas = litellm.responses(model="openai/toy", input="hi", stream=True, **how)
    assert "".join(event.delta for event in deltas if event.type == "response.output_text.delta") == said
    second = litellm.responses(model="openai/toy", input="go on", previous_response_id=response.id, **how)
    assert second.usage.input_tokens > response.usage.input_tokens

    try:
        litellm.completion(**{**chat, "temperature": 9})
    except litellm.BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("a temperature of 9 was taken")
    tools()
    print(f"LiteLLM {importlib.metadata.version('litellm')}: as expected")


def tools() -> None:
    """Raises: AssertionError where a call or a form is not as expected."""
    how = {**HOW, "api_base": TOOLS_URL, "max_tokens": 900}
    chat = {"model": "openai/toy", "messages": MESSAGES, **how, "tools": TOOLS, "parallel_tool_calls": False}
    whole = litellm.completion(**chat, tool_choice="required").choices[0]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    pieces = list(litellm.completion(**chat, tool_choice="required", stream=True))
    rebuilt = litellm.stream_chunk_builder(pieces, messages=MESSAGES).choices[0].message.tool_calls
    assert [c.function.arguments for c in rebuilt] == [call.function.arguments]
    result = {"role": "tool", "tool_call_id": call.id, "content": "cold"}
    second = {**chat, "messages": [*MESSAGES, whole.message.model_dump(), result], "max_tokens": 4}
    assert litellm.completion(**second).usage.completion_tokens <= 4
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    formed = litellm.completion(model="openai/toy", messages=MESSAGES, response_format=form, **how)
    assert json.loads(formed.choices[0].message.content)["city"] in ("Oslo", "Rome")


if __name__ == "__main__":
    main()
