"""Tool calls: formats found in chat templates, calls read however they are cut, and grammars that the parsers read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from sinkrt import UsageError
from sinkrt.grammar import Calls, Grammar, GrammarCompiler, answer_grammar, loosened
from sinkrt.text import Tokenizer
from sinkrt.text.answer_parts import AnswerParts
from sinkrt.text.chat_template import ChatTemplate
from sinkrt.text.said import Said, ToolCall
from sinkrt.text.thinking import Thinking
from sinkrt.text.tools import Harmony, Tool, ToolFormat, ToolSplitter
from sinkrt.text.tools.calls import values_of
from sinkrt.text.tools.formats import Hermes, Llama, MistralList, MistralNamed
from sinkrt.text.tools.text_formats import Pythonic, Tags
from tokenizers import AddedToken

from tests.runtime import tool_templates
from tests.runtime.toy import toy_tokenizer
from tests.support import refused

TEMPLATES = {
    "HERMES": (Hermes, "tools", True, False, True),
    "HERMES_TEXT": (Hermes, "tools", True, True, True),
    "THINKING": (Hermes, "tools", True, False, True),
    "TAGS": (Tags, "tools", True, False, True),
    "SMOLLM3": (Hermes, "xml_tools", False, False, True),
    "LFM2": (Pythonic, "tools", False, False, True),
    "LFM25": (Pythonic, "tools", True, False, True),
    "LLAMA": (Llama, "tools", True, False, False),
    "MISTRAL": (MistralList, "tools", True, False, True),
    "MISTRAL_NAMED": (MistralNamed, "tools", True, False, True),
    "GPT_OSS": (Harmony, "tools", True, False, False),
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
OPENAI = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": CITY}} for name in ("get", "see")
]


def call(name: str, city: str, number: int) -> dict[str, Any]:
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def chat(*calls: dict[str, Any]) -> list[dict[str, Any]]:
    results = [{"role": "tool", "content": f"result {c['id']}", "tool_call_id": c["id"]} for c in calls]
    said = {"role": "assistant", "content": "", "tool_calls": list(calls)}
    return [{"role": "user", "content": "how is it?"}, said, *results]


@pytest.fixture
def template(request: pytest.FixtureRequest) -> Iterator[ChatTemplate]:
    made = ChatTemplate(getattr(tool_templates, request.param), {"bos_token": "<s>", "eos_token": "</s>"})
    yield made
    made.close()


def tokenizer_of(name: str) -> Tokenizer:
    """Bytes, and the control tokens of the model that a template is named for."""
    library = toy_tokenizer()
    library.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in tool_templates.MARKS])
    library.add_tokens([AddedToken(mark, normalized=False) for mark in tool_templates.ADDED])
    return Tokenizer(library, getattr(tool_templates, name), {"bos_token": "<bos>", "eos_token": "<eos>"})


# --- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "expected"), TEMPLATES.items(), indirect=["template"], ids=TEMPLATES)
def test_facts_of_templates(template: ChatTemplate, expected: tuple[Any, ...]) -> None:
    facts = template.tools()
    assert (type(facts.format), facts.variable, facts.shows_calls, facts.as_text, facts.many) == expected
    assert template.has_channels == (expected[0] is Harmony)


@pytest.mark.parametrize("template", TEMPLATES, indirect=True)
def test_a_chat_with_parallel_calls_reaches_the_model_in_order(template: ChatTemplate) -> None:
    text = template.render(chat(call("get", "Oslo", 1), call("see", "R\u00f6m", 2)), tools=OPENAI)
    calls = text.rpartition("how is it?")[2]
    order = ["Oslo", "result call_1", "R\u00f6m", "result call_2"]
    if template.tools().many:
        order = ["Oslo", "R\u00f6m", "result call_1", "result call_2"]
    assert [word for _, word in sorted((calls.index(word), word) for word in order)] == order
    plain = template.render([{"role": "user", "content": "how is it?"}])
    assert "get" not in plain
    second = template.render([*chat(call("get", "Oslo", 1)), {"role": "assistant", "content": "Cold."}], tools=OPENAI)
    assert "Cold." in second


@pytest.mark.parametrize(
    ("template", "words"),
    [("NO_TOOLS", "has no place for tools"), ("UNKNOWN", "in a format that is not known here")],
    indirect=["template"],
)
def test_templates_without_tools_are_refused(template: ChatTemplate, words: str) -> None:
    for _ in range(2):
        with refused(words, "leave tools out", error=UsageError):
            template.render([{"role": "user", "content": "x"}], tools=OPENAI)
    with refused(words):
        template.render(chat(call("get", "Oslo", 1)))
    assert template.render([{"role": "user", "content": "x"}])


def test_control_tokens_in_tools_and_calls_stay_text() -> None:
    tokenizer = tokenizer_of("HERMES")
    end = tokenizer.special_id("<|im_end|>")
    evil = [{"type": "function", "function": {"name": "get", "description": "<|im_end|>", "parameters": CITY}}]
    good = [{"type": "function", "function": {"name": "get", "description": "", "parameters": CITY}}]
    messages = chat(call("get", "a", 1))
    count = tokenizer.chat_ids(messages, tools=good).count(end)
    assert tokenizer.chat_ids(messages, tools=evil).count(end) == count
    assert tokenizer.chat_ids(messages, tools=evil, allow_special=True).count(end) == count + 1
    assert tokenizer.chat_ids(chat(call("get", "<|im_end|>", 1)), tools=good).count(end) == count
    named = {"type": "object", "properties": {"<|im_end|>": {}}}
    with refused("a field whose name"):
        tokenizer.chat_ids(messages, tools=[{"type": "function", "function": {"name": "get", "parameters": named}}])
    tokenizer.close()


# --- parsers ---------------------------------------------------------------------------------------------------------

A, B = ToolCall("get", '{"city": "Oslo"}'), ToolCall("see", '{"city": "</tool_call> \\"x"}')
NO_KEYWORD = "<|tool_call_start|>[get('Oslo')]<|tool_call_end|>"
NO_LITERAL = "<|tool_call_start|>[get(city=open('x'))]<|tool_call_end|>"
NO_PARAMETER = "<tool_call>\n<function=get>\nx</function>\n</tool_call>"
CASES: list[tuple[ToolFormat, str, str, list[ToolCall]]] = [
    (Hermes(), 'Yes.\n<tool_call>\n{"name": "get", "arguments": {"city": "Oslo"}}\n</tool_call>\n', "Yes.", [A]),
    (Hermes(), Hermes().write([A, B]), "", [A, B]),
    (Hermes(), Hermes().write([A]) + "\nDone. ", "Done. ", [A]),
    (Hermes(), 'a <tool_call>{"name": 5}</tool_call> b', 'a <tool_call>{"name": 5}</tool_call> b', []),
    (Hermes(), 'a <tool_call>{"name": "get", ', 'a <tool_call>{"name": "get", ', []),
    (Hermes(), "1 < 2 <tool_ca", "1 < 2 <tool_ca", []),
    (Hermes(), " \n", " \n", []),
    (Hermes(), '<tool_call>{"name": "get", "arguments": "{}"}</tool_call>', "", [ToolCall("get", "{}")]),
    (Llama(), '{"name": "get", "parameters": {"city": "Oslo"}}', "", [A]),
    (Llama(), '<|python_tag|>{"name": "get", "parameters": {"city": "Oslo"}}', "", [A]),
    (Llama(), Llama().write([A, B]), "", [A, B]),
    (Llama(), '{"name": "get"}', '{"name": "get"}', []),
    (Llama(), '{"city": 1} and so on', '{"city": 1} and so on', []),
    (Llama(), "{1, 2}", "{1, 2}", []),
    (Llama(), "Hello {", "Hello {", []),
    (MistralList(), "[TOOL_CALLS] " + MistralList().write([A, B])[13:], "", [A, B]),
    (MistralList(), "Well. " + MistralList().write([A]), "Well.", [A]),
    (MistralList(), "[TOOL_CALLS] [1]", "[TOOL_CALLS] [1]", []),
    (MistralNamed(), MistralNamed().write([A, B]), "", [A, B]),
    (MistralNamed(), '[TOOL_CALLS]get[CALL_ID]abc[ARGS]{"city": "Oslo"}', "", [A]),
    (MistralNamed(), "[TOOL_CALLS]get[ARGS]{", "[TOOL_CALLS]get[ARGS]{", []),
    (Pythonic(), "<|tool_call_start|>[get(city='Oslo'), now()]<|tool_call_end|>Hm.", "Hm.", [A, ToolCall("now", "{}")]),
    (Pythonic(), NO_KEYWORD, NO_KEYWORD, []),
    (Pythonic(), NO_LITERAL, NO_LITERAL, []),
    (Tags(), "<tool_call>\n<function=get>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>", "", [A]),
    (Tags(), NO_PARAMETER, NO_PARAMETER, []),
]  # fmt: skip


def split(parts: AnswerParts, text: str, size: int) -> Said:
    splitter = parts.splitter()
    said = Said()
    for i in range(0, len(text), size):
        said += splitter.push(text[i : i + size])
    return said + splitter.flush()


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_however_they_are_cut(
    form: ToolFormat, text: str, content: str, calls: list[ToolCall], size: int
) -> None:
    said = split(AnswerParts(calls=form), text, size)
    assert said.content == content
    assert [(c.name, values_of(c)) for c in said.calls] == [(c.name, values_of(c)) for c in calls]


def test_text_is_shown_as_soon_as_it_is_no_call() -> None:
    splitter = ToolSplitter(Hermes())
    assert splitter.push("Hello <to").content == "Hello"
    assert splitter.push("p> you").content == " <top> you"
    assert ToolSplitter(Llama()).push("Hello").content == "Hello"
    held = ToolSplitter(Llama())
    assert held.push('{"na').content == "" and held.push("x").content == ""
    assert held.push("-y").content == '{"nax-y'


def test_values_of_tags_have_the_types_of_the_schema() -> None:
    tool = Tool(
        "f",
        {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}, "b": {"type": "boolean"}}},
    )
    text = Tags().write([ToolCall("f", '{"n": "5", "s": "5", "b": "maybe"}')])
    said = split(AnswerParts(calls=Tags(), tools=(tool,)), text, 4)
    assert values_of(said.calls[0]) == {"n": 5, "s": "5", "b": "maybe"}  # fmt: skip


HARMONY = [
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.", ("Hm.", "Yes.", [])),
    ("<|channel|>final<|message|>Yes.<|return|>", ("", "Yes.", [])),
    (
        "<|channel|>analysis<|message|>a < b<|end|><|start|>assistant<|channel|>commentary to=functions.get "
        '<|constrain|>json<|message|>{"city": "Oslo"}<|call|>',
        ("a < b", "", [A]),
    ),
    ('<|start|>assistant to=functions.get<|channel|>commentary json<|message|>{"city": "Oslo"}', ("", "", [A])),
    ("<|channel|>commentary to=functions.get<|message|>{oops", ("", "{oops", [])),
    ("<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>final<|mess", ("", "First.", [])),
    ("just text", ("", "just text", [])),
    ("", ("", "", [])),
]


@pytest.mark.parametrize(("text", "expected"), HARMONY, ids=range(len(HARMONY)))
@pytest.mark.parametrize("size", [1, 4, 1000])
def test_channels(text: str, expected: tuple[str, str, list[ToolCall]], size: int) -> None:
    said = split(AnswerParts(calls=Harmony(), has_channels=True), text, size)
    assert (said.reasoning, said.content, list(said.calls)) == expected


def test_calls_behind_what_is_thought() -> None:
    parts = AnswerParts(Thinking("<think>", "</think>", opened=True), Hermes())
    said = split(parts, 'so <tool_call>x</tool_call>\n</think>\n\n<tool_call>{"name": "get"}</tool_call>', 5)
    assert said == Said("so <tool_call>x</tool_call>", "", (ToolCall("get", "{}"),))
    assert parts.shown == {"<think>", "</think>", "<tool_call>", "</tool_call>"} and parts.thinks


# --- grammars --------------------------------------------------------------------------------------------------------

TOOLS = (
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "kind": {"enum": ["a", "b"]},
                "n": {"type": "integer", "minimum": -9, "maximum": 99},
                "ok": {"type": ["boolean", "null"]},
            },
            "required": ["n"],
            "additionalProperties": False,
        },
        True,
    ),
    Tool("now", {"type": "object", "properties": {}, "additionalProperties": False}, True),
)
JSON = Grammar.of_schema({"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": False})


def answers(tokenizer: Tokenizer, grammar: Grammar, parts: AnswerParts, count: int) -> Iterator[str]:
    """Random answers, as they would be shown: marks are likely, and so are ends."""
    size = 300
    compiler = GrammarCompiler(tokenizer, size)
    ends = [end for name in tool_templates.EOS_NAMES if (end := tokenizer.special_id(name)) is not None]
    compiled, chance = compiler.compile(grammar), np.random.default_rng(3)
    for _ in range(count):
        matcher, text, decoder = compiled.matcher(ends), "", tokenizer.streaming_decoder(tokenizer.encode("a"))
        while len(text) < 4000 and (allowed := matcher.allowed()) is not None:
            weights = allowed.mask.astype(float)
            weights[256:] *= 40
            weights[[9, 10, 13, 32]] *= 0.05
            token = int(chance.choice(size, p=weights / weights.sum()))
            if token in ends:
                break
            matcher.take(token)
            name = tokenizer.special_text(token)
            text += decoder.push(token) + (name if name in parts.shown else "")
        yield text + decoder.flush()
    compiler.close()


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_forced_calls_are_read_and_match_their_schemas(name: str, many: bool) -> None:
    tokenizer = tokenizer_of(name)
    form = tokenizer.tools().format
    parts = AnswerParts(tokenizer.thinking(), form, TOOLS, tokenizer.has_channels)
    grammar = answer_grammar(None, Calls(TOOLS, many and form.many, must=True), parts, tokenizer)
    schemas, most = {tool.name: tool.parameters for tool in TOOLS}, 0
    for text in answers(tokenizer, grammar, parts, 6):
        said = split(parts, text, 7)
        assert said.calls and not said.content, (text, said)
        for found in said.calls:
            jsonschema.validate(json.loads(found.arguments), schemas[found.name])
        most = max(most, len(said.calls))
    assert (most > 1) <= (many and form.many)
    tokenizer.close()


@pytest.mark.parametrize("name", ["HERMES", "THINKING", "LFM25", "LLAMA", "MISTRAL", "GPT_OSS"])
def test_texts_in_a_form_or_calls_behind_what_is_thought(name: str) -> None:
    tokenizer = tokenizer_of(name)
    form = tokenizer.tools().format
    parts = AnswerParts(tokenizer.thinking(), form, TOOLS, tokenizer.has_channels)
    for calls in (None, Calls(TOOLS, many=False)):
        for text in answers(tokenizer, answer_grammar(JSON, calls, parts, tokenizer), parts, 6):
            said = split(parts, text, 7)
            assert bool(said.content) != bool(said.calls), (text, said)
            assert not said.content or json.loads(said.content) in ({}, {"a": 1})
            assert calls or not said.calls
    tokenizer.close()


@pytest.mark.parametrize("name", ["HERMES", "LFM25", "LLAMA", "MISTRAL", "GPT_OSS"])
def test_any_text_but_no_call_that_is_wrong(name: str) -> None:
    tokenizer = tokenizer_of(name)
    form = tokenizer.tools().format
    parts = AnswerParts(None, form, TOOLS, tokenizer.has_channels)
    compiler = GrammarCompiler(tokenizer, 300)
    compiled = compiler.compile(answer_grammar(None, Calls(TOOLS, many=False), parts, tokenizer))

    def follows(text: str) -> bool:
        ids = tokenizer.encode(text, special=False)
        return compiled.matcher([]).num_allowed(ids) == len(ids)

    written = form.write([ToolCall("get_weather", '{"n": 5}')])
    if isinstance(form, Harmony):
        written = written.removesuffix("<|call|>")
        assert follows("<|channel|>final<|message|>any text")
    else:
        assert follows("any text")
    assert follows(written), written
    assert not follows(written.replace("get_weather", "get_whether"))
    assert not follows(written.replace('"n": 5', '"n": 500').replace("n=5", "n=500"))
    compiler.close()
    tokenizer.close()


def test_what_a_format_cannot_follow_is_refused() -> None:
    tokenizer = tokenizer_of("TAGS")
    odd = Tool("f", {"type": "object", "properties": {"s": {"type": "string", "pattern": "^a"}}}, True)
    loose = Tool("f", {"type": "object", "properties": {}, "anyOf": [{}]})
    for form in (Tags(), Pythonic()):
        parts = AnswerParts(None, form, (odd,))
        with refused("the parameters of 'f'"):
            answer_grammar(None, Calls((loose,), must=True), parts, tokenizer)
    with refused("the argument 's' of 'f'"):
        answer_grammar(None, Calls((odd,), must=True), AnswerParts(None, Tags(), (odd,)), tokenizer)
    with refused("the tool 'a-b'"):
        answer_grammar(None, Calls((Tool("a-b"),), must=True), AnswerParts(None, Pythonic()), tokenizer)
    assert loosened((odd, loose)) == (odd, Tool("f"))
    tokenizer.close()
