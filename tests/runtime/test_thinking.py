"""Answers taken apart at thinking tags, however they are cut; and the tags found in chat templates."""

from __future__ import annotations

import pytest
from sinkrt.text import Tokenizer
from sinkrt.text.thinking import MAX_HELD_SPACE, Thinking, ThinkingSplitter, thinking_in

from tests.runtime.toy import toy_tokenizer

TAGS = Thinking("<think>", "</think>")
OPENED = Thinking("<think>", "</think>", opened=True)
CASES = [
    (TAGS, "<think>\nwell\nso\n</think>\n\nYes.", ("well\nso", "Yes.")),
    (TAGS, "\n <think>a</think>b\n", ("a", "b\n")),
    (TAGS, "Yes. <think>no</think>", ("", "Yes. <think>no</think>")),
    (TAGS, "<think>a</think>b<think>c</think>", ("a", "b<think>c</think>")),
    (TAGS, "<think>a  \n", ("a", "")),
    (TAGS, "<think></think>\n\n", ("", "")),
    (TAGS, "<think>\n\n</think>\n\nb", ("", "b")),
    (TAGS, "<thinking> is hard", ("", "<thinking> is hard")),
    (TAGS, "<thi", ("", "<thi")),
    (TAGS, "  ", ("", "  ")),
    (TAGS, "", ("", "")),
    (TAGS, "<think>a < b </thin> c</think> d", ("a < b </thin> c", "d")),
    (TAGS, "<think>a</thi", ("a</thi", "")),
    (OPENED, "well\n</think>\n\nYes.", ("well", "Yes.")),
    (OPENED, "<think>well</think>Yes.", ("well", "Yes.")),
    (OPENED, "</think>Yes.", ("", "Yes.")),
    (OPENED, "still at it", ("still at it", "")),
    (OPENED, "<thin", ("<thin", "")),
    (Thinking("[THINK]", "[/THINK]"), "[THINK]a[/THINK]b", ("a", "b")),
]


@pytest.mark.parametrize(("tags", "text", "expected"), CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_however_it_is_cut(tags: Thinking, text: str, expected: tuple[str, str], size: int) -> None:
    splitter = ThinkingSplitter(tags)
    said = [splitter.push(text[i : i + size]) for i in range(0, len(text), size)]
    said.append(splitter.flush())
    assert ("".join(s.reasoning for s in said), "".join(s.content for s in said)) == expected


def test_what_may_be_shown_is_shown_at_once_and_little_is_held_back() -> None:
    splitter = ThinkingSplitter(OPENED)
    assert splitter.push("abc").reasoning == "abc"
    assert splitter.push(" \n").reasoning == ""
    assert splitter.push("d</").reasoning == " \nd"
    assert splitter.push("x").reasoning == "</x"
    assert len(splitter.push("\n" * 10_000).reasoning) >= 10_000 - MAX_HELD_SPACE
    assert splitter.is_thinking


QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% if force is defined and force %}{{ '<think>\n' }}{% endif %}{% endif %}"
)


def test_tags_of_templates() -> None:
    tokenizer = Tokenizer(toy_tokenizer(), QWEN)
    assert tokenizer.thinking() == TAGS
    assert tokenizer.thinking({"enable_thinking": False}) == TAGS
    assert tokenizer.thinking({"force": True}) == OPENED
    assert tokenizer.thinking({"force": True}) == OPENED  # remembered
    tokenizer.close()
    picky = Tokenizer(
        toy_tokenizer(),
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}</think>",
    )
    assert picky.thinking() == TAGS, "as far as is known"
    picky.close()
    plain = Tokenizer(toy_tokenizer(), "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert plain.thinking() is None
    plain.close()
    assert thinking_in("split('[/THINK]')", "") == Thinking("[THINK]", "[/THINK]")
    assert thinking_in("nothing", "<think>") is None
