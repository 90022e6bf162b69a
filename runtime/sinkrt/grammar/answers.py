"""Grammars of whole answers: what a model thinks first, and its tool calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from sinkrt.grammar.schema import checked_schema
from sinkrt.grammar.spec import Grammar, lark_json, lark_text
from sinkrt.text import Tokenizer
from sinkrt.text.answer_parts import AnswerParts
from sinkrt.text.tools import Tool
from sinkrt.text.tools.calls import ANY_OBJECT
from sinkrt.text.tools.formats import LarkWriter, Llama
from sinkrt.text.tools.harmony import CHANNEL, ENDS, MESSAGE, START

Mark = Callable[[str], str]
_TEXT = "any_text: /(?s:.*)/\n"
_SPACE = "space: /[ \\n]{0,4}/\n"


@dataclasses.dataclass(frozen=True)
class Calls:
    """Calls that an answer may hold. many: whether there may be several. must: whether there has to be one."""

    tools: Sequence[Tool]
    many: bool = True
    must: bool = False


def answer_grammar(body: Grammar | None, calls: Calls | None, parts: AnswerParts, tokenizer: Tokenizer) -> Grammar:
    """A grammar of whole answers, behind what is thought.

    body: what the text of an answer matches; None: any text. calls: that it may hold instead of such a text, or behind
    any text; their arguments match the tools' schemas. parts: how the answer is taken apart.

    Raises: UsageError for a schema that the format of calls cannot follow.
    """
    rules = "" if calls is None else _call_rules(calls, parts, tokenizer)
    around = _in_channels if parts.has_channels else _in_text
    start, more = around(body, calls, parts, _marker(tokenizer), tokenizer)
    rules = _once(more + rules)
    if body is None:
        return Grammar("lark", f"start: {start}\n{rules}")
    return body if start == "@body" else dataclasses.replace(body, around=start, rules=rules)


def _call_rules(calls: Calls, parts: AnswerParts, tokenizer: Tokenizer) -> str:
    if parts.calls is None:
        raise ValueError("calls without their format")
    for tool in calls.tools:
        checked_schema(tool.parameters)
    return parts.calls.lark(calls.tools, LarkWriter(_marker(tokenizer), lark_text, lark_json), many=calls.many)


def _in_channels(
    body: Grammar | None, calls: Calls | None, _parts: AnswerParts, mark: Mark, _tokenizer: Tokenizer
) -> tuple[str, str]:
    """Start and rules of an answer in gpt-oss's channels."""
    choices = [] if calls is None else ['"commentary" calls']
    if calls is None or not calls.must:
        choices.append(f'"final" {mark(MESSAGE)} {"any_text" if body is None else "@body"}')
    analysis = f'{mark(CHANNEL)} "analysis" {mark(MESSAGE)} any_text {mark(ENDS[0])} {mark(START)} "assistant"'
    return f"analysis? {mark(CHANNEL)} ({' | '.join(choices)})", f"analysis: {analysis}\n{_TEXT}"


def _in_text(
    body: Grammar | None, calls: Calls | None, parts: AnswerParts, mark: Mark, tokenizer: Tokenizer
) -> tuple[str, str]:
    """Start and rules of an answer as text with tags."""
    opening, rules = _thinking(parts, tokenizer)
    if calls is None or parts.calls is None:
        return f"{opening} @body".strip(), rules
    call = f"{mark(parts.calls.start)} calls" if parts.calls.start else "calls"
    if calls.must:
        start = call
    elif body is not None:
        start = f"(@body | {call})"
    elif isinstance(parts.calls, Llama):
        start = "(calls | /[^{ \\n](?s:.*)/)"
    elif tokenizer.special_id(parts.calls.start) is not None:
        start, rules = f"any_text ({call})?", rules + _TEXT
    else:  # lazy: from its first mark on, an answer is a call
        head = f"head[suffix={lark_text(parts.calls.start)}]: /(?s:.*)/\n"
        start, rules = "(head calls | any_text)", rules + head + _TEXT
    return f"{opening} {start}".strip(), rules


def _once(rules: str) -> str:
    """Rules, each of them once."""
    return "".join(f"{rule}\n" for rule in dict.fromkeys(rules.splitlines()))


def loosened(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """Tools that take any object, but for strict ones."""
    return tuple(tool if tool.strict else dataclasses.replace(tool, parameters=ANY_OBJECT) for tool in tools)


def _thinking(parts: AnswerParts, tokenizer: Tokenizer) -> tuple[str, str]:
    """What is thought first, as an expression and its rules."""
    tags = parts.thinking
    if tags is None:
        return "", ""
    mark = _marker(tokenizer)
    if tokenizer.special_id(tags.end) is not None:
        thought = f"thought: any_text {mark(tags.end)}\n{_TEXT}"
    else:
        thought = f"thought[suffix={lark_text(tags.end)}]: /(?s:.*)/\n"
    opening = "thought space" if tags.opened else f"({mark(tags.start)} thought space)?"
    return opening, thought + _SPACE


def _marker(tokenizer: Tokenizer) -> Mark:
    """Gives the expression of Lark for a mark: the token of that name if it is special, else the text."""

    def mark(text: str) -> str:
        token = tokenizer.special_id(text)
        return lark_text(text) if token is None else f"<[{token}]>"

    return mark
