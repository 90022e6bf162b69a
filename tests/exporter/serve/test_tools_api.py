"""Tools and forms over HTTP: OpenAI's types and client, whole and streamed, and second turns with results of calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel
from sinkexport.serve.settings import Limits
from sinkrt.sampler import Sampler

from tests.exporter.serve.serving import MANY, Served, serving, user
from tests.exporter.serve.shapes import completion_chunk, events, strict
from tests.runtime import tool_templates
from tests.runtime.toy import EOS, build_toy

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
LIMITS = Limits(max_tokens=900, max_waiting=3, grace_s=0)
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTIONS = [
    {"name": "get_weather", "description": "Weather of a city.", "parameters": CITY, "strict": True},
    {"name": "now", "strict": True},
]
TOOLS: list[Any] = [{"type": "function", "function": function} for function in FUNCTIONS]
FLAT: list[Any] = [{"type": "function", **function} for function in FUNCTIONS]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
SHORT = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "short", "schema": SHORT, "strict": True}}


DRAWN: dict[str, Any] = {
    "temperature": 1,
    "seed": 5,
    "logit_bias": {"9": -5, "10": -2, "13": -5, "32": -5, str(EOS): 5},
}
"""White space is seldom and ends are likely, so that random answers are short."""


def served_with(tmp_path_factory: pytest.TempPathFactory, template: str) -> Iterator[Served]:
    bundle = build_toy(tmp_path_factory.mktemp("tools") / "toy", MANY, template=template)
    with serving(bundle, LIMITS) as served:
        yield served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served_with(tmp_path_factory, tool_templates.HERMES)


def ask(served: Served, body: dict[str, Any], path: str = CHAT, status: int = 200) -> dict[str, Any]:
    response = httpx.post(served.url + path, json={**DRAWN, **body}, timeout=60)
    assert response.status_code == status, response.text
    return dict(response.json())


def stream(served: Served, body: dict[str, Any], path: str = CHAT) -> list[dict[str, Any]]:
    body = {**DRAWN, **body, "stream": True}
    return events(httpx.post(served.url + path, json=body, timeout=60))


def check_calls(calls: list[Any], most: int = 99) -> None:
    assert 1 <= len(calls) <= most
    for called in calls:
        arguments = json.loads(called.function.arguments)
        jsonschema.validate(arguments, CITY if called.function.name == "get_weather" else {"maxProperties": 0})
    assert len({called.id for called in calls}) == len(calls)


def gathered(chunks: list[ChatCompletionChunk], choice: int = 0) -> dict[int, dict[str, str]]:
    """Calls put together of their deltas, by index: the first one has id and name, the others more of the arguments."""
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for one in chunk.choices:
            for delta in one.delta.tool_calls or [] if one.index == choice else []:
                if delta.index not in calls:
                    assert delta.id and delta.type == "function" and delta.function.name
                    calls[delta.index] = {"id": delta.id, "name": delta.function.name, "arguments": ""}
                else:
                    assert delta.id is None and delta.function.name is None
                calls[delta.index]["arguments"] += delta.function.arguments or ""
    return calls


# --- chats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls(served: Served, choice: Any, parallel: bool) -> None:
    body = {"messages": [user("hi")], "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel}
    whole = strict(ChatCompletion, ask(served, body)).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    check_calls(whole.message.tool_calls, 99 if parallel and choice == "required" else 1)
    if choice == NAMED:
        assert [c.function.name for c in whole.message.tool_calls] == ["get_weather"]
    chunks = [strict(ChatCompletionChunk, chunk) for chunk in stream(served, body)]
    assert [c.choices[0].finish_reason for c in chunks][-1] == "tool_calls"
    expected = [(c.function.name, c.function.arguments) for c in whole.message.tool_calls]
    assert [(c["name"], c["arguments"]) for c in gathered(chunks).values()] == expected
    assert not any(c.choices[0].delta.content for c in chunks)


def test_several_answers_each_with_its_own_calls_and_log_probabilities(served: Served) -> None:
    body = {"messages": [user("hi")], "tools": TOOLS, "tool_choice": "required", "n": 3, "presence_penalty": 0.1}
    whole = strict(ChatCompletion, ask(served, {**body, "logprobs": True, "top_logprobs": 1}))
    for choice in whole.choices:
        check_calls(choice.message.tool_calls)
    assert sum(len(choice.logprobs.content) for choice in whole.choices) == whole.usage.completion_tokens
    chunks = [strict(ChatCompletionChunk, chunk) for chunk in stream(served, body)]
    for i, choice in enumerate(whole.choices):
        calls = gathered(chunks, i)
        assert [c["arguments"] for c in calls.values()] == [c.function.arguments for c in choice.message.tool_calls]


def test_a_second_turn_with_the_clients_own_objects(served: Served) -> None:
    client, model = served.client(), "toy"
    messages: list[Any] = [user("hi")]
    how: Any = {"model": model, "tools": TOOLS, "seed": 1, "max_tokens": 900}
    first = client.chat.completions.create(messages=messages, tool_choice="required", **how)
    called = first.choices[0].message
    results = [{"role": "tool", "tool_call_id": c.id, "content": f"result {c.id}"} for c in called.tool_calls or []]
    for said in (called, called.model_dump(), called.model_dump(exclude_none=True)):
        body = {**how, "max_tokens": 4, "messages": [*messages, said, *results]}
        second = client.chat.completions.create(**body)
        assert second.usage and first.usage and second.usage.prompt_tokens > first.usage.prompt_tokens
        parts = [{**r, "content": [{"type": "text", "text": r["content"]}]} for r in results]
        again = client.chat.completions.create(**{**body, "messages": [*messages, said, *parts]})
        assert again.usage and again.usage.prompt_tokens == second.usage.prompt_tokens
    ids = ask(served, {"messages": [user("hi")], "tools": TOOLS}, "/tokenize")["count"]
    assert ids == first.usage.prompt_tokens


def test_the_clients_own_helpers(served: Served) -> None:
    class Short(BaseModel):
        a: Literal[1, 22]
        b: bool | None

    client, chat = served.client(), [user("hi")]
    parsed = client.chat.completions.parse(
        model="toy", messages=chat, response_format=Short, max_tokens=900, seed=3, logit_bias=DRAWN["logit_bias"]
    )  # type: ignore[call-overload]
    assert isinstance(parsed.choices[0].message.parsed, Short)
    tool = openai.pydantic_function_tool(Short)
    named: Any = {"type": "function", "function": {"name": "Short"}}
    with client.chat.completions.stream(
        model="toy", messages=chat, tools=[tool], tool_choice=named, max_tokens=900, logit_bias=DRAWN["logit_bias"]
    ) as helper:
        kinds = [event.type for event in helper]
        final = helper.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    assert final.tool_calls and isinstance(final.tool_calls[0].function.parsed_arguments, Short)


def steer(monkeypatch: pytest.MonkeyPatch, served: Served, prompt: dict[str, Any], text: str) -> None:
    """Make a model say a text to a prompt, whatever its logits are."""
    ids = [*text.encode(), EOS]
    start = ask(served, prompt, "/tokenize")["count"]

    def sample(_self: Sampler, _logits: Any, _recent: Any, position: int, _allowed: Any = None) -> int:
        return ids[min(position - start, len(ids) - 1)]

    monkeypatch.setattr(Sampler, "sample", sample)


LOOSE = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "count"),
    [
        (CALL, None, 1),
        (f"Let me see. \n{CALL}\n{CALL}", "Let me see.", 2),
        ("No call.", "No call.", 0),
        ('<tool_call>\n{"name": ', '<tool_call>\n{"name": ', 0),
        ("<tool_call>x</tool_call> y", "<tool_call>x</tool_call> y", 0),
    ],
)
def test_calls_that_the_model_makes_by_itself(
    served: Served, monkeypatch: pytest.MonkeyPatch, text: str, content: str | None, count: int
) -> None:
    prompt = {"messages": [user("hi")], "tools": LOOSE}
    steer(monkeypatch, served, prompt, text)
    whole = strict(ChatCompletion, ask(served, prompt)).choices[0]
    assert whole.message.content == content
    assert [c.function.arguments for c in whole.message.tool_calls or []] == ['{"city": "Oslo"}'] * count
    assert whole.finish_reason == ("tool_calls" if count else "stop")
    chunks = [strict(ChatCompletionChunk, chunk) for chunk in stream(served, prompt)]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (content or "")
    assert len(gathered(chunks)) == count
    cut = ask(served, {**prompt, "max_tokens": len(text)})["choices"][0]
    assert cut["finish_reason"] == "length"
    asked = {"input": "hi", "tools": [{"type": "function", **LOOSE[0]["function"]}]}
    response = strict(Response, ask(served, asked, RESPONSES))
    expected = ([] if content is None else ["message"]) + ["function_call"] * count
    assert [item.type for item in response.output] == expected
    for event in (found := stream(served, asked, RESPONSES)):
        strict(ResponseStreamEvent, event)
    assert [item["type"] for item in found[-1]["response"]["output"]] == expected
    assert [e["sequence_number"] for e in found] == list(range(len(found)))


def test_tools_that_may_not_be_called_are_not_shown(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"messages": [user("hi")], "tools": LOOSE, "tool_choice": "none"}
    steer(monkeypatch, served, {"messages": [user("hi")]}, CALL)
    whole = ask(served, body)
    assert whole["choices"][0]["message"]["content"] == CALL
    assert whole["usage"]["prompt_tokens"] == ask(served, {"messages": [user("hi")]}, "/tokenize")["count"]


def test_schemas_of_tools_that_are_not_strict_are_hints(served: Served) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    body = {"messages": [user("hi")], "tools": tools, "tool_choice": "required", "max_tokens": 40}
    ask(served, body)
    for schema, words in (({}, None), ({"properties": {"a": {}}}, None), ({"type": "array"}, "of the type object")):
        tools[0]["function"]["parameters"] = schema  # type: ignore[index]
        answer = ask(served, body, status=200 if words is None else 400)
        assert words is None or words in answer["error"]["message"]
    tools[0]["function"]["parameters"] = odd  # type: ignore[index]
    tools[0]["function"]["strict"] = True  # type: ignore[index]
    assert "uniqueItems" in ask(served, body, status=400)["error"]["message"]


# --- channels --------------------------------------------------------------------------------------------------------


def test_channels_of_gpt_oss(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks are text here: the toy has no special tokens of that name."""
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    call = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>'
    prompt = {"messages": [user("hi")], "tools": LOOSE}
    for served in served_with(tmp_path_factory, tool_templates.GPT_OSS):
        steer(monkeypatch, served, prompt, f"{thought}<|channel|>final<|message|>Yes.")
        whole = ask(served, prompt)
        message = whole["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
        assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
        steer(monkeypatch, served, prompt, thought + call)
        message = ask(served, prompt)["choices"][0]["message"]
        assert message["content"] is None and message["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "cold"}
        ask(served, {**prompt, "messages": [user("hi"), message, result]})
        monkeypatch.undo()
        forced = ask(served, {"messages": [user("hi")], "response_format": FORM, "logit_bias": {"60": 9, "123": 5}})
        if forced["choices"][0]["finish_reason"] == "stop":
            jsonschema.validate(json.loads(forced["choices"][0]["message"]["content"]), SHORT)


# --- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"response_format": FORM}, None),
        ({"structured_outputs": {"json": SHORT}}, None),
        ({"structured_outputs": {"json": json.dumps(SHORT)}}, None),
        ({"structured_outputs": {"regex": "[a-f]{5}"}}, "[a-f]{5}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9] "y"'}}, "x[0-9]y"),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]/ "y"'}}, "x[0-9]y"),
    ],
)
def test_forms(served: Served, form: dict[str, Any], pattern: str | None) -> None:
    for path, prompt in ((CHAT, {"messages": [user("hi")]}), (COMPLETIONS, {"prompt": "hi", "max_tokens": 500})):
        kind: Any = ChatCompletion if path == CHAT else Completion
        choice = strict(kind, ask(served, {**prompt, **form, "ignore_eos": True, "stop": ["never"]}, path)).choices[0]
        text = choice.message.content if path == CHAT else choice.text
        assert choice.finish_reason == "stop"
        if pattern is None:
            jsonschema.validate(json.loads(text), SHORT)
        else:
            assert re.fullmatch(pattern, text)
    chunks = [completion_chunk(c) for c in stream(served, {"prompt": "hi", "max_tokens": 500, **form}, COMPLETIONS)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_any_object(served: Served) -> None:
    body = {"messages": [user("hi")], "response_format": {"type": "json_object"}, "logit_bias": {"125": 20}}
    assert isinstance(json.loads(ask(served, body)["choices"][0]["message"]["content"]), dict)


def test_an_answer_that_is_cut_says_so(served: Served) -> None:
    body = {"messages": [user("hi")], "response_format": FORM, "max_tokens": 2}
    choice = ask(served, body)["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("{")
    asked = {"input": "hi", "text": {"format": {"type": "json_object"}}, "max_output_tokens": 1}
    assert ask(served, asked, RESPONSES)["status"] == "incomplete"


def test_a_form_or_calls(served: Served) -> None:
    seen = set()
    for seed in range(12):
        body = {"messages": [user("hi")], "tools": TOOLS, "response_format": FORM, "seed": seed}
        body |= {"parallel_tool_calls": False, "logit_bias": {**DRAWN["logit_bias"], "60": 2}}
        message = strict(ChatCompletion, ask(served, body)).choices[0].message
        seen.add(message.content is None)
        if message.content is None:
            check_calls(message.tool_calls)
        else:
            jsonschema.validate(json.loads(message.content), SHORT)
    assert seen == {True, False}


# --- responses -------------------------------------------------------------------------------------------------------


def test_responses_with_calls_and_what_came_of_them(served: Served) -> None:
    client = served.client()
    how: Any = {"model": "toy", "tools": FLAT, "max_output_tokens": 900}
    body = {"input": "hi", "tools": FLAT, "tool_choice": {"type": "function", "name": "get_weather"}}
    response = strict(Response, ask(served, body, RESPONSES))
    (item,) = response.output
    assert (item.type, item.name, item.status) == ("function_call", "get_weather", "completed")
    jsonschema.validate(json.loads(item.arguments), CITY)
    output: Any = {"type": "function_call_output", "call_id": item.call_id, "output": "cold"}
    second = client.responses.create(input=[output], previous_response_id=response.id, **how)
    echoed = client.responses.create(input=[user("hi"), item.model_dump(), output], **how)
    referred = client.responses.create(input=[user("hi"), {"type": "item_reference", "id": item.id}, output], **how)
    counts = {r.usage.input_tokens for r in (second, echoed, referred) if r.usage}
    assert len(counts) == 1
    found = stream(served, body, RESPONSES)
    for event in found:
        strict(ResponseStreamEvent, event)
    names = [event["type"].removeprefix("response.") for event in found]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert names == ["created", "in_progress", *call, "completed"]
    assert found[3]["delta"] == found[4]["arguments"] == item.arguments


def test_forms_of_responses(served: Served) -> None:
    form = {"format": {"type": "json_schema", "name": "short", "schema": SHORT, "strict": True}}
    response = strict(Response, ask(served, {"input": "hi", "text": form}, RESPONSES))
    jsonschema.validate(json.loads(response.output_text), SHORT)
    assert response.text.format.schema_ == SHORT


# --- refusals --------------------------------------------------------------------------------------------------------


BROKEN = {"id": "a", "function": {"name": "x", "arguments": "["}}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tool_choice": NAMED}, "tool_choice: received \"get_weather\", expected one of the tools' names"),
        ({"tools": TOOLS + TOOLS}, "tools: received two functions of one name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name: received"),
        ({"tools": TOOLS, "conversation": "ada"}, "tools: received some, expected none in a named conversation"),
        ({"response_format": {"type": "json_schema"}}, "response_format: expected"),
        ({"response_format": FORM, "structured_outputs": {"regex": "a"}}, "received both, expected one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "received regex and choice, expected one of"),
        ({"structured_outputs": {"regex": "("}}, "unclosed group"),
        ({"guided_regex": "a"}, "use response_format, or structured_outputs"),
        ({"messages": [{"role": "assistant", "tool_calls": [BROKEN]}]}, "the text of a JSON object"),
    ],
)  # fmt: skip
def test_refusals(served: Served, body: dict[str, Any], words: str) -> None:
    error = ask(served, {"messages": [user("hi")], **body}, status=400)["error"]
    assert words in error["message"] and "\n" not in error["message"]


def test_models_without_tools_refuse_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    for served in served_with(tmp_path_factory, tool_templates.NO_TOOLS):
        error = ask(served, {"messages": [user("hi")], "tools": TOOLS}, status=400)["error"]
        assert "has no place for tools" in error["message"]
        ask(served, {"messages": [user("hi")], "tools": TOOLS, "tool_choice": "none", "max_tokens": 2})
