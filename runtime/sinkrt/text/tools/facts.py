"""What a chat template does with tools, found out by rendering a chat with a call in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sinkrt.text.said import ToolCall
from sinkrt.text.tools.calls import json_object, json_prefix, values_of
from sinkrt.text.tools.formats import Hermes, Llama, MistralList, MistralNamed, ToolFormat
from sinkrt.text.tools.harmony import Harmony
from sinkrt.text.tools.splitter import ToolSplitter
from sinkrt.text.tools.text_formats import Pythonic, Tags

VARIABLES = ("tools", "xml_tools")
"""Names under which templates read tools: the second one is SmolLM3's."""
FORMATS: tuple[ToolFormat, ...] = (Harmony(), MistralList(), MistralNamed(), Hermes(), Tags(), Pythonic())
"""Formats with marks: what one writes, no other one's parser reads."""
_ID = re.compile(r"[a-zA-Z0-9]{9}")
"""Ids of calls that Mistral's templates take."""


@dataclasses.dataclass(frozen=True)
class ToolFacts:
    """What a template does with tools.

    format: of calls. variable: the template's name of the tools. shows_calls: whether it shows calls of earlier
    messages; otherwise they are written into those messages. as_text: whether it wants arguments as JSON text.
    many: whether a message may hold several calls; otherwise each gets a message of its own.
    """

    format: ToolFormat
    variable: str
    shows_calls: bool
    as_text: bool
    many: bool

    def variables(self, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Variables of the template for some tools, each as OpenAI has it."""
        if not tools:
            return {}
        return {self.variable: list(tools) if self.variable == "tools" else [tool["function"] for tool in tools]}

    def prepared(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as the template takes them. Calls and results have OpenAI's form."""
        out: list[dict[str, Any]] = []
        names: dict[str, str] = {}
        for i, message in enumerate(messages):
            calls = message.get("tool_calls") or ()
            names |= {str(call.get("id")): call["function"]["name"] for call in calls}
            if calls:
                out += self._calling(message, list(messages[i + 1 :]))
            elif message.get("role") == "tool":
                if not self._is_paired(messages, i):
                    out.append(self._result(message, names.get(str(message.get("tool_call_id")))))
            else:
                out.append(dict(message))
        return out

    def _calling(self, message: Mapping[str, Any], after: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
        calls = [self._call(call) for call in message["tool_calls"]]
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        if (
            isinstance(self.format, Harmony)
            and (thought := rest.pop("reasoning_content", None))
            and not rest["content"]
        ):
            rest["thinking"] = thought
        if not self.shows_calls:
            written = self.format.write([ToolCall(c["function"]["name"], c["function"]["arguments"]) for c in calls])
            return [{**rest, "content": "\n".join(filter(None, (rest["content"], written)))}]
        if self.many or len(calls) == 1:
            return [{**rest, "tool_calls": calls}]
        out: list[dict[str, Any]] = []
        for call, given in zip(calls, message["tool_calls"], strict=True):
            head = {**rest, "content": ""} if out else rest
            out.append({**head, "tool_calls": [call]})
            found = next((m for m in _results(after) if m.get("tool_call_id") == given.get("id")), None)
            out += [] if found is None else [self._result(found, call["function"]["name"])]
        return out

    def _is_paired(self, messages: Sequence[Mapping[str, Any]], i: int) -> bool:
        """Whether a result has been put behind its own call already."""
        if self.many or not self.shows_calls:
            return False
        first = i
        while first and messages[first - 1].get("role") == "tool":
            first -= 1
        calls = messages[first - 1].get("tool_calls") or () if first else ()
        ids = [call.get("id") for call in calls]
        same = [m.get("tool_call_id") for m in messages[first:i]]
        return len(calls) > 1 and messages[i].get("tool_call_id") in ids and messages[i]["tool_call_id"] not in same

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function, text = call["function"], str(call["function"]["arguments"])
        arguments: Any = text if self.as_text or not self.shows_calls else json_object(text) or {}
        return {
            "id": _short_id(str(call.get("id"))),
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }

    @staticmethod
    def _result(message: Mapping[str, Any], name: str | None) -> dict[str, Any]:
        named = {"name": name} if name else {}
        return {**message, **named, "tool_call_id": _short_id(str(message.get("tool_call_id")))}


def call_probes(word: str) -> list[dict[str, Any]]:
    """Variables of renderings whose texts say what a template does with tools; for `tool_facts_of`.

    word: begins all names, and is in no template.
    """
    asked = {"role": "user", "content": f"{word}user"}

    def calling(*texts: str, as_text: bool) -> dict[str, Any]:
        calls = [
            {
                "id": f"call0000{i}",
                "type": "function",
                "function": {
                    "name": f"{word}name{i}",
                    "arguments": json.dumps({f"{word}key": text}) if as_text else {f"{word}key": text},
                },
            }
            for i, text in enumerate(texts)
        ]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    def result(i: int) -> dict[str, Any]:
        return {"role": "tool", "content": f"{word}result{i}", "tool_call_id": f"call0000{i}", "name": f"{word}name{i}"}

    properties = {f"{word}key": {"type": "string", "description": f"{word}about"}}
    parameters = {"type": "object", "properties": properties, "required": [f"{word}key"]}
    functions = [
        {"name": f"{word}name{i}", "description": f"{word}description", "parameters": parameters} for i in range(2)
    ]
    given = {"tools": [{"type": "function", "function": f} for f in functions], "xml_tools": functions}
    chats = [[asked], [asked, calling(f"{word}v", as_text=False), result(0)]]
    chats += [[asked, calling(f"{word}v", as_text=True), result(0)]]
    chats += [[asked, calling(f"{word}v", f"{word}v", as_text=t), result(0), result(1)] for t in (False, True)]
    return [{"messages": chat, variable: given[variable]} for variable in VARIABLES for chat in chats]


def tool_facts_of(renderings: Sequence[Mapping[str, str]], word: str, ends: Sequence[str]) -> ToolFacts | str:
    """Read the facts off the renderings of `call_probes`, or the reason why tools cannot be used.

    ends: texts that end an answer.
    """
    size = len(renderings) // len(VARIABLES)
    for i, variable in enumerate(VARIABLES):
        texts = [rendering.get("text", "").replace(word.lower(), word) for rendering in renderings[i * size :][:size]]
        if f"{word}name0" in texts[0]:
            return _facts(variable, texts, word, ends)
    return "has no place for tools"


def _facts(variable: str, texts: Sequence[str], word: str, ends: Sequence[str]) -> ToolFacts | str:
    expected = ToolCall(f"{word}name0", json.dumps({f"{word}key": f"{word}v"}))
    seen = False
    for as_text, text, both in ((False, texts[1], texts[3]), (True, texts[2], texts[4])):
        called, found, _ = text.rpartition(f"{word}user")[2].partition(f"{word}result0")
        if not found:
            continue
        seen = seen or f"{word}name0" in called.partition(f"{word}v")[0]
        form = _format_of(called, expected, ends)
        if form is not None:
            after = both.rpartition(f"{word}user")[2]
            many = all(f"{word}{what}{i}" in after for what in ("name", "result") for i in range(2))
            return ToolFacts(form, variable, True, as_text, many)
    if seen:
        return "writes calls in a format that is not known here"
    if not any(f"{word}result0" in text for text in texts[1:3]):
        return "leaves out the results of tools"
    told = texts[0]
    for form in FORMATS:  # it does not show calls, but may describe them
        if form.start and form.start in told:
            return ToolFacts(form, variable, False, False, True)
    if "<|tool_list_start|>" in told:  # LFM2, whose prompt says nothing else
        return ToolFacts(Pythonic(), variable, False, False, True)
    return "neither shows calls nor describes them"


def _format_of(called: str, expected: ToolCall, ends: Sequence[str]) -> ToolFormat | None:
    """The format whose parser finds just that call in what the template wrote."""
    for end in ends:
        called = called.partition(end)[0] if end and end in called.partition(expected.name)[2] else called
    for form in FORMATS:
        if isinstance(form, Harmony):
            found = form.parse(called[called.find("to=") :]) if "to=functions." in called else None
        else:
            splitter = ToolSplitter(form)
            found = [*splitter.push(called).calls, *splitter.flush().calls]
        if found and len(found) == 1 and found[0].name == expected.name and values_of(found[0]) == values_of(expected):
            return form
    at = called.find("{")
    object_at = json_prefix(called, at) if at >= 0 else None
    if object_at is not None and "parameters" in object_at[0] and Llama().parse(called[at : object_at[1]]):
        return Llama()
    return None


def _results(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results of tools at the beginning of some messages."""
    first = next((i for i, message in enumerate(messages) if message.get("role") != "tool"), len(messages))
    return list(messages[:first])


def _short_id(name: str) -> str:
    """An id of nine letters and digits, which every template takes: itself, or a digest."""
    return name if _ID.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()[:9]
