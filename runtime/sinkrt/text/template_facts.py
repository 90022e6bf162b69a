"""Facts of a chat template, found out by rendering conversations of marker words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from sinkrt.text.chat_messages import Wants

Conversation = tuple[list[dict[str, str]], bool]
"""Messages, and whether an answer is to be opened behind them."""

MODES: tuple[Wants, ...] = ("text", "parts")


@dataclasses.dataclass(frozen=True)
class TemplateFacts:
    """Facts of a chat template.

    wants: the form of a message's content, a text or a list of ``{"type": "text", "text": ..}``.
    has_user, has_system: whether such messages are shown. system_refusal: the template's reason if it raises an error.
    keeps_history: whether earlier questions and answers are shown. generation_prompt: what opens an answer, if
    anything. closing: what follows an answer, None if the template shows none. variables: names that it reads.
    """

    wants: Wants
    has_user: bool
    has_system: bool
    system_refusal: str | None
    keeps_history: bool
    generation_prompt: str
    closing: str | None
    variables: frozenset[str]


def probes(markers: Sequence[str]) -> list[Conversation]:
    """Conversations whose renderings say what a template does. markers: three words, for `facts_of` too."""
    user, answer, second = markers
    asked = {"role": "user", "content": user}
    past = [asked, {"role": "assistant", "content": answer}]
    return [
        ([asked], True),
        ([asked], False),
        ([{"role": "system", "content": answer}, asked], True),
        ([*past, {"role": "user", "content": second}], True),
        (past, False),
    ]


def facts_of(
    renderings: Mapping[Wants, Sequence[Mapping[str, str]]], markers: Sequence[str], variables: frozenset[str]
) -> TemplateFacts:
    """Read the facts off the renderings of `probes`, each ``{"text": ..}`` or ``{"error": ..}``, in both MODES.

    variables: names that the template reads.
    """
    user, answer, second = markers
    kept = {
        wants: (_has(r[0], user), _has(r[2], user, answer), _has(r[3], user, answer, second))
        for wants, r in renderings.items()
    }
    wants = max(MODES, key=lambda mode: (kept[mode], mode == "text"))
    opened, plain, system, _, ended = renderings[wants]
    has_user, has_system, keeps_history = kept[wants]
    before, after = plain.get("text", ""), opened.get("text", "")
    return TemplateFacts(
        wants=wants,
        has_user=has_user,
        has_system=has_system,
        system_refusal=None if has_system else system.get("error"),
        keeps_history=keeps_history,
        generation_prompt=after[len(before) :] if after.startswith(before) else "",
        closing=ended["text"].rpartition(answer)[2] if _has(ended, answer) else None,
        variables=variables,
    )


def _has(rendering: Mapping[str, str], *markers: str) -> bool:
    """Whether a rendering shows all markers, and not as Python or JSON writes a list of parts."""
    text = rendering.get("text", "").lower()
    plain = text.replace('"', "'")
    return all(marker in text for marker in markers) and "'type': 'text'" not in plain and "'type':'text'" not in plain
