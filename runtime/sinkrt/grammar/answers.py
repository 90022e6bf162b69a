"""Grammars of whole answers: what a model thinks first, and its tool calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from sinkrt.grammar.schema import checked_schema
from sinkrt.grammar.spec import Grammar, lark_json, lark_text
from sinkrt.text import Tokenizer
from sinkrt.text.answer_parts import AnswerParts
from sinkrt.text.tools import Harmony, Tool, ToolFormat
from sinkrt.text.tools.calls import ANY_OBJECT
from sinkrt.text.tools.formats import LarkWriter, Llama
from sinkrt.text.tools.harmony import CHANNEL, ENDS, MESSAGE, START

_TEXT = "any_text: /(?s:.*)/\n"
_SPACE = "space: /[ \\n]{0,4}/\n"


def formatted(grammar: Grammar, parts: AnswerParts, tokenizer: Tokenizer) -> Grammar:
    """A grammar of answers whose text, behind what is thought, matches another."""
    if parts.has_channels:
        mark = _marker(tokenizer)
        opening = f'analysis? {mark(CHANNEL)} "final" {mark(MESSAGE)}'
        return dataclasses.replace(grammar, opening=opening, rules=_analysis(tokenizer))
    opening, rules = _thinking(parts, tokenizer)
    return dataclasses.replace(grammar, opening=opening, rules=rules) if opening else grammar


def calling(
    form: ToolFormat, tools: Sequence[Tool], parts: AnswerParts, tokenizer: Tokenizer, *, must: bool, many: bool
) -> Grammar:
    """A grammar of answers that call tools, behind what is thought.

    must: whether there has to be a call; otherwise any text may be there instead, or before it. many: whether there may
    be several calls. Arguments match the tools' schemas.

    Raises: UsageError for a schema that the format cannot follow.
    """
    mark = _marker(tokenizer)
    for tool in tools:
        checked_schema(tool.parameters)
    rules = form.lark(tools, LarkWriter(mark, lark_text, lark_json), many=many)
    if isinstance(form, Harmony):
        said = "" if must else f' | "final" {mark(MESSAGE)} any_text'
        start = f'start: analysis? {mark(CHANNEL)} ("commentary" calls{said})\n'
        return Grammar("lark", start + _analysis(tokenizer) + rules)
    opening, thought = _thinking(parts, tokenizer)
    more = thought
    if isinstance(form, Llama):
        start = "calls" if must else "(calls | /[^{ \\n](?s:.*)/)"
    elif must:
        start = f"{mark(form.start)} calls"
    elif tokenizer.special_id(form.start) is not None:
        start = f"any_text ({mark(form.start)} calls)?"
        more += "" if "any_text:" in thought else _TEXT
    else:  # lazy: from its first mark on, an answer is a call
        start = "(head calls | any_text)"
        more += f"head[suffix={lark_text(form.start)}]: /(?s:.*)/\n" + ("" if "any_text:" in thought else _TEXT)
    return Grammar("lark", f"start: {opening} {start}\n{more}{rules}")


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


def _analysis(tokenizer: Tokenizer) -> str:
    """Rule of a message of gpt-oss in which it thinks, and the start of the next one."""
    mark = _marker(tokenizer)
    begun = f'{mark(CHANNEL)} "analysis" {mark(MESSAGE)}'
    return f'analysis: {begun} any_text {mark(ENDS[0])} {mark(START)} "assistant"\n{_TEXT}'


def _marker(tokenizer: Tokenizer) -> Callable[[str], str]:
    """Gives the expression of Lark for a mark: the token of that name if it is special, else the text."""

    def mark(text: str) -> str:
        token = tokenizer.special_id(text)
        return lark_text(text) if token is None else f"<[{token}]>"

    return mark
