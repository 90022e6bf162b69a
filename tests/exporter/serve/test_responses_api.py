"""POST /v1/responses: against OpenAI's types and client, and against the same chat; and what a model thinks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from sinkexport.serve.errors import ApiError
from sinkexport.serve.response_store import ResponseStore
from sinkexport.serve.settings import Limits
from sinkrt.sampler import Sampler

from tests.exporter.serve.serving import MANY, Served, many_bundle, serving, user
from tests.exporter.serve.shapes import events, strict
from tests.runtime.toy import EOS, build_toy

__all__ = ["many_bundle"]  # a fixture
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
LIMITS = Limits(max_tokens=200, max_waiting=3, grace_s=0)
THINKING = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% if reasoning_effort is defined %}{{ reasoning_effort }}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def served(many_bundle: Path) -> Iterator[Served]:
    with serving(many_bundle, LIMITS) as served:
        yield served


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(build_toy(tmp_path_factory.mktemp("thinks") / "toy", MANY, template=THINKING), LIMITS) as served:
        yield served


def post(served: Served, body: dict[str, Any], path: str = RESPONSES) -> httpx.Response:
    return httpx.post(served.url + path, json=body, timeout=60)


def ask(served: Served, body: dict[str, Any], path: str = RESPONSES) -> dict[str, Any]:
    response = post(served, body, path)
    assert response.status_code == 200, response.text
    return dict(response.json())


def chat_text(served: Served, messages: list[dict[str, Any]], **more: Any) -> str:
    body = {"messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **more}
    return str(ask(served, body, CHAT)["choices"][0]["message"]["content"])


BODY = {"input": "hi", "max_output_tokens": 12, "temperature": 0, "ignore_eos": True}


def test_a_response_is_the_chats_answer(served: Served) -> None:
    expected = chat_text(served, [{"role": "system", "content": "Be brief."}, user("hi")])
    response = strict(Response, ask(served, {**BODY, "instructions": "Be brief.", "metadata": {"a": "b"}}))
    assert response.output_text == expected
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.usage.output_tokens, response.model, response.instructions) == (12, "toy", "Be brief.")
    assert response.usage.total_tokens == response.usage.input_tokens + 12
    assert response.metadata == {"a": "b"}
    assert [item.type for item in response.output] == ["message"]


def check_events(found: list[dict[str, Any]]) -> Response:
    """Check a stream as a whole; returns its last response."""
    parsed = [strict(ResponseStreamEvent, event) for event in found]
    assert [event.sequence_number for event in parsed] == list(range(len(parsed)))
    assert [event.type for event in parsed[:2]] == ["response.created", "response.in_progress"]
    last = parsed[-1].response
    assert parsed[-1].type == f"response.{last.status}"
    for index, item in enumerate(last.output):
        mine = [event for event in parsed if getattr(event, "output_index", None) == index]
        assert (mine[0].type, mine[-1].type) == ("response.output_item.added", "response.output_item.done")
        assert mine[-1].item == item
        assert {getattr(event, "item_id", item.id) for event in mine} == {item.id}
        deltas = "".join(event.delta for event in mine if event.type.endswith(".delta"))
        assert deltas == item.content[0].text
        done = next(event for event in mine if event.type.endswith("text.done"))
        assert done.text == deltas
    return last


def test_streams_say_the_same(served: Served) -> None:
    whole = strict(Response, ask(served, BODY))
    last = check_events(events(post(served, {**BODY, "stream": True})))
    assert last.output_text == whole.output_text
    assert last.usage.model_dump() | {"input_tokens_details": 0} == whole.usage.model_dump() | {
        "input_tokens_details": 0
    }
    assert last.status == whole.status


def test_the_official_client(served: Served) -> None:
    client = served.client()
    expected = chat_text(served, [user("hi")])
    extra = {"ignore_eos": True}
    whole = client.responses.create(model="toy", input="hi", max_output_tokens=12, temperature=0, extra_body=extra)
    assert whole.output_text == expected
    pieces = [
        event.delta
        for event in client.responses.create(
            model="toy", input="hi", max_output_tokens=12, temperature=0, stream=True, extra_body=extra
        )
        if event.type == "response.output_text.delta"
    ]
    assert "".join(pieces) == expected
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model="toy", input="hi")


def test_the_official_clients_own_stream(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, "Yes.")
    with served.client().responses.stream(model="toy", input="hi") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text == "Yes."
    says(monkeypatch, "Yes.")
    messages: Any = [user("hi")]
    with served.client().chat.completions.stream(model="toy", messages=messages) as chat:
        assert [event.content for event in chat if event.type == "content.done"] == ["Yes."]
        assert chat.get_final_completion().choices[0].message.content == "Yes."


def test_items_of_an_earlier_response_are_taken(served: Served) -> None:
    client = served.client()
    first = client.responses.create(model="toy", input="hi", max_output_tokens=5, temperature=0)
    items = [{"role": "user", "content": "hi"}, *[item.model_dump() for item in first.output], user("go on")]
    messages = [user("hi"), {"role": "assistant", "content": first.output_text}, user("go on")]
    assert ask(served, {**BODY, "input": items})["output"][0]["content"][0]["text"] == chat_text(served, messages)
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "h"}, {"type": "input_text", "text": "i"}]}]
    assert ask(served, {**BODY, "input": parts})["output"][0]["content"][0]["text"] == chat_text(served, [user("hi")])


def test_log_probabilities(served: Served) -> None:
    body = {**BODY, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = strict(Response, ask(served, body))
    logs = response.output[0].content[0].logprobs
    assert len(logs) == 12
    assert all(len(entry.top_logprobs) == 2 for entry in logs)
    found = events(post(served, {**body, "stream": True}))
    deltas = [event["logprobs"] for event in found if event["type"] == "response.output_text.delta"]
    assert [entry["logprob"] for delta in deltas for entry in delta] == [entry.logprob for entry in logs]
    assert ask(served, BODY)["output"][0]["content"][0]["logprobs"] == []


def test_conversations_go_on(served: Served) -> None:
    for conversation in ("r1", {"id": "r1"}):
        answer = ask(served, {**BODY, "conversation": conversation})
        strict(Response, answer)
        assert answer["conversation"]["id"] == "r1"
    assert answer["conversation"]["new"] is False
    assert httpx.delete(served.url + "/v1/conversations/r1").status_code == 200


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("input", None, "input: received null, expected a text, or a list of items"),
        ("input", [], "input: received an empty list, expected"),
        ("input", 5, "input: received 5, expected a text, or a list of items"),
        ("input", [{"role": "user"}], "input.0: a message: expected with a role and a content"),
        (
            "input",
            [{"type": "function_call", "name": "x"}],
            "input.0: a function_call: expected with a call_id, a name",
        ),
        ("input", [{"type": "computer_call"}], 'input.0.type: received "computer_call", expected'),
        (
            "input",
            [{"type": "function_call_output", "call_id": "x", "output": "y"}],
            "input: received a function_call_out",
        ),
        ("input", [{"type": "item_reference"}], "input.0: an item_reference: expected with an id"),
        (
            "input",
            [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
            'input.0.content.0.type: received "input_image", expected "input_text" or',
        ),
        ("previous_response_id", 5, "previous_response_id: received 5, expected the id of a response"),
        ("background", True, "background: received true, expected false"),
        ("tools", [{"type": "web_search"}], 'tools.0.type: received "web_search", expected "function": other tools'),
        ("text", {"format": {"type": "json_schema"}}, "text.format: schema: expected with the type json_schema"),
        ("text", {"format": {"type": "grammar"}}, "text.format.type: received"),
        ("reasoning", {"effort": "low"}, "reasoning_effort: levels of reasoning are not implemented here"),
        ("max_output_tokens", 0, "max_output_tokens: received 0, expected an integer >= 1"),
        ("conversation", {"id": "a/b"}, "conversation: received"),
        ("conversation", {}, "conversation: received null, expected a name"),
        ("prompt", {"id": "x"}, "prompt: received an object of 1, expected null"),
    ],
)
def test_refusals(served: Served, name: str, value: Any, words: str) -> None:
    response = post(served, {**BODY, name: value})
    assert response.status_code == 400, response.text
    assert words in response.json()["error"]["message"]


def test_nulls_and_harmless_fields(served: Served) -> None:
    from sinkexport.serve.requests import ResponsesRequest

    nulls = dict.fromkeys([*ResponsesRequest.model_fields, "service_tier"])
    harmless = {
        "store": False,
        "truncation": "auto",
        "include": ["reasoning.encrypted_content"],
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"summary": "auto"},
        "stream_options": {"include_obfuscation": False},
        "some_new_field": 1,
    }
    expected = ask(served, BODY)["output"][0]["content"]
    assert ask(served, {**nulls, **BODY})["output"][0]["content"] == expected
    assert ask(served, {**BODY, **harmless})["output"][0]["content"] == expected


def test_a_failure_in_mid_stream_is_an_event(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise FloatingPointError("a bug")

    monkeypatch.setattr(Sampler, "sample", broken)
    found = events(post(served, {**BODY, "stream": True}))
    assert [event["type"] for event in found] == ["response.created", "response.in_progress", "response.failed"]
    failed = strict(ResponseStreamEvent, found[-1])
    assert failed.response.error.code == "server_error"
    assert "FloatingPointError" in failed.response.error.message


# --- responses that are kept ---


def test_items_and_responses_are_referred_to_by_id(served: Served) -> None:
    client = served.client()
    first = client.responses.create(model="toy", input="hi", instructions="Be brief.", max_output_tokens=5)
    said = {"role": "assistant", "content": first.output_text}
    references: list[Any] = [user("hi"), {"type": "item_reference", "id": first.output[0].id}, user("go on")]
    count = ask(served, {"messages": [user("hi"), said, user("go on")]}, "/tokenize")["count"]
    assert ask(served, {**BODY, "input": references})["usage"]["input_tokens"] == count
    second = ask(served, {**BODY, "input": "go on", "previous_response_id": first.id})
    assert second["usage"]["input_tokens"] == count, "instructions are not carried over"
    assert second["previous_response_id"] == first.id
    said = {"role": "assistant", "content": second["output"][0]["content"][0]["text"]}
    found = events(post(served, {**BODY, "input": "?", "previous_response_id": second["id"], "stream": True}))
    assert found[-1]["response"]["usage"]["input_tokens"] > count
    third = found[-1]["response"]["id"]
    assert client.responses.retrieve(third).output_text == found[-1]["response"]["output"][0]["content"][0]["text"]
    client.responses.delete(third)
    for unknown in (third, "resp_1", "../x"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(unknown)
    assert post(served, {**BODY, "previous_response_id": third}).status_code == 404
    assert post(served, {**BODY, "input": [{"type": "item_reference", "id": "msg_1"}]}).status_code == 404
    both = post(served, {**BODY, "previous_response_id": second["id"], "conversation": "new"})
    assert both.status_code == 400
    assert "received both" in both.text


def test_what_is_not_to_be_stored_is_not(served: Served) -> None:
    response = ask(served, {**BODY, "store": False})
    assert httpx.get(f"{served.url}/v1/responses/{response['id']}").status_code == 404
    assert post(served, {**BODY, "previous_response_id": response["id"]}).status_code == 404


def test_the_store_is_bounded_and_each_key_has_its_own() -> None:
    def response(number: int) -> dict[str, Any]:
        return {"id": f"resp_{number}", "output": [{"id": f"msg_{number}", "text": "x" * 1000}]}

    store = ResponseStore(10_000)
    for number in range(100):
        store.keep("ada", response(number), [user("y" * 100)])
        assert store.get("ada", "resp_0").messages == [user("y" * 100)] if number < 9 else True
        if number < 9:
            store.item("ada", "msg_0")
    assert len(store) == 8
    assert store.item("ada", "msg_99")["id"] == "msg_99"
    for owner, name in (("bob", "resp_99"), ("", "resp_99"), ("ada", "resp_90")):
        with pytest.raises(ApiError, match="does not exist"):
            store.get(owner, name)
    with pytest.raises(ApiError):
        store.item("bob", "msg_99")
    store.keep("ada", {"id": "big", "output": [{"id": "m", "text": "x" * 20_000}]}, [])
    assert len(store) == 8, "what is larger than all room is not kept"
    for number in range(92, 100):
        store.drop("ada", f"resp_{number}")
    assert len(store) == 0
    none = ResponseStore(0)
    none.keep("", response(1), [])
    assert len(none) == 0


# --- thinking ---


def says(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let the model say a text."""
    plan = iter([*text.encode(), EOS])
    monkeypatch.setattr(Sampler, "sample", lambda *_: next(plan))


THOUGHT = "<think>\nHm.\n</think>\n\nYes."


def test_reasoning_is_taken_out_of_a_chat(thinker: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    body: dict[str, Any] = {"messages": [user("hi")], "logprobs": False}
    says(monkeypatch, THOUGHT)
    whole = strict(ChatCompletion, ask(thinker, body, CHAT))
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "Hm.")
    assert whole.usage.completion_tokens == len(THOUGHT)
    assert whole.usage.completion_tokens_details.reasoning_tokens == THOUGHT.index("</think>") + 8
    says(monkeypatch, THOUGHT)
    chunks = [strict(ChatCompletionChunk, chunk) for chunk in events(post(thinker, {**body, "stream": True}, CHAT))]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    says(monkeypatch, THOUGHT)
    assert ask(thinker, {**body, "reasoning_format": "none"}, CHAT)["choices"][0]["message"]["content"] == THOUGHT
    says(monkeypatch, "Yes.")
    plain = ask(thinker, body, CHAT)
    assert plain["choices"][0]["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}
    assert plain["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_a_template_may_open_or_end_the_thinking_itself(thinker: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, "Hm.</think>Yes.")
    opened = ask(thinker, {"messages": [user("<think>")], "reasoning_effort": "low"}, CHAT)["choices"][0]["message"]
    assert (opened["content"], opened["reasoning_content"]) == ("Yes.", "Hm.")
    says(monkeypatch, "Hm.</think>Yes.")
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    closed = ask(thinker, {"messages": [user("hi")], **kwargs}, CHAT)["choices"][0]["message"]
    assert closed["content"] == "Hm.</think>Yes."
    says(monkeypatch, "Hm. And")
    cut = ask(thinker, {"messages": [user("hi")], "reasoning_effort": "low", "max_tokens": 7}, CHAT)["choices"][0]
    assert cut["message"] == {"role": "assistant", "content": "", "refusal": None, "reasoning_content": "Hm. And"}
    assert cut["finish_reason"] == "length"


def test_reasoning_that_was_said_before_is_given_to_the_template(thinker: Served) -> None:
    said = {"role": "assistant", "content": "Yes.", "refusal": None, "reasoning_content": "Hm.", "tool_calls": None}
    other = {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}

    def ids(message: dict[str, Any]) -> list[int]:
        messages = [user("hi"), message, user("?")]
        return list(httpx.post(thinker.url + "/tokenize", json={"messages": messages}).json()["tokens"])

    plain = {"role": "assistant", "content": "<think>Hm.</think>Yes."}
    assert ids(said) == ids(other) == ids(plain)
    assert ids({**plain, "content": "Yes."}) != ids(said)
    assert ids({**said, "reasoning_content": "<eos>"}).count(EOS) == 3, "no control token"
    assert chat_text(thinker, [user("hi"), said, user("?")])


def test_reasoning_items_of_responses(thinker: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, THOUGHT)
    response = strict(Response, ask(thinker, {"input": "hi"}))
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "Hm."
    assert response.output_text == "Yes."
    assert response.status == "completed"
    assert response.usage.output_tokens_details.reasoning_tokens == THOUGHT.index("</think>") + 8
    says(monkeypatch, THOUGHT)
    last = check_events(events(post(thinker, {"input": "hi", "stream": True})))
    assert [item.content[0].text for item in last.output] == ["Hm.", "Yes."]
    says(monkeypatch, "<think>Hm.")
    cut = strict(Response, ask(thinker, {"input": "hi", "max_output_tokens": 10}))
    assert [(item.type, item.status) for item in cut.output] == [("reasoning", "incomplete")]
    for ends in (True, False):  # log probabilities of what is said alone
        text = THOUGHT + " é" if ends else "<think>Hm."
        body = {"input": "hi", "include": ["message.output_text.logprobs"], "stream": True}
        if not ends:
            body["max_output_tokens"] = len(text)
        says(monkeypatch, text)
        last = check_events(events(post(thinker, body)))
        logs = [entry for item in last.output if item.type == "message" for entry in item.content[0].logprobs]
        assert bytes(entry.bytes[0] for entry in logs).decode().strip() == ("Yes. é" if ends else "")
        says(monkeypatch, text)
        whole = strict(Response, ask(thinker, {**body, "stream": False}))
        assert [item.content[0] for item in whole.output] == [item.content[0] for item in last.output]
    monkeypatch.undo()
    items = [user("hi"), *[json.loads(item.model_dump_json()) for item in response.output], user("?")]
    thought = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    expected = ask(thinker, {"messages": [user("hi"), thought, user("?")]}, "/tokenize")["count"]
    assert ask(thinker, {**BODY, "input": items})["usage"]["input_tokens"] == expected
