"""Chat templates: messages rendered so that none is lost in silence.

A template may want contents as a text or as a list of parts, may know no system message, and may leave out earlier
answers. `ChatTemplate.facts` finds that out by rendering conversations of marker words. Every later rendering is
compared with one of the same messages made of marker words: a message that does not reach the model is an error.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sinkrt.errors import BundleError, UsageError, problem
from sinkrt.text.chat_messages import Message, message_text, shaped
from sinkrt.text.template_args import check_template_args
from sinkrt.text.template_facts import MODES, TemplateFacts, facts_of, probes
from sinkrt.text.template_process import TIME_LIMIT_S, TemplateFailure, TemplateProcess, require_jinja
from sinkrt.text.template_worker import environment
from sinkrt.text.thinking import Thinking, thinking_in
from sinkrt.text.tools import ToolFacts, call_probes, tool_facts_of
from sinkrt.text.tools.harmony import CHANNEL, MESSAGE, START

MAX_TEMPLATE_CHARACTERS = 2**20
MAX_OPENINGS, MAX_OPENING_KEY = 64, 1024
"""Sets of variables for which what opens an answer is remembered, and the longest one, characters of JSON."""
RETRY_S = 60.0
"""How long a template that has failed as a whole is not tried again."""


class ChatTemplate:
    """A chat template in Jinja and the variables that it always gets.

    source: its text. special_tokens: texts by name (``bos_token``), or lists of texts.
    time_limit_s: of one rendering, and of the first, which compiles the template.

    Raises: BundleError if it is no Jinja.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any] | None = None, time_limit_s: float = TIME_LIMIT_S
    ) -> None:
        _check_syntax(source)
        self._special_tokens = dict(special_tokens or {})
        self._process = TemplateProcess(source, time_limit_s)
        self._facts: TemplateFacts | None = None
        self._failure: tuple[str, float] | None = None  # the reason, and when to try again
        self._tools: ToolFacts | str | None = None  # a text: why there are none
        self._openings: dict[str, str] = {}  # by the variables' JSON
        self._word = "q" + secrets.token_hex(8)  # begins every marker: no text of a template or a user has it

    @property
    def facts(self) -> TemplateFacts:
        """Facts of the template, found on first use by some renderings.

        Raises: UsageError if it cannot be rendered at all: too slow, too large, unknown filters.
        """
        if self._facts is None:
            if self._failure is not None and time.monotonic() < self._failure[1]:
                raise self._broken(self._failure[0])  # a template that hangs must not run for every message
            try:
                self._facts = self._probe()
            except TemplateFailure as failure:
                self._failure = str(failure), time.monotonic() + RETRY_S
                raise self._broken(str(failure)) from None
        return self._facts

    def literals(self) -> str:
        """All text that the template writes by itself.

        Raises: UsageError as `facts`.
        """
        self.facts  # noqa: B018 - raises for a template that has failed before
        return str(self._call(self._process.facts)["literals"])

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        args: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        check: bool = True,
        now: float | None = None,
    ) -> str:
        """The text of a conversation.

        messages: each with ``role`` and ``content``, a text, text parts or None. args: further variables. tools: as
        OpenAI has them. check: make sure that every message and tool is in the text. now: the time that it shows, in
        seconds since 1970; None: that of the call.

        Raises: UsageError if the template refuses the messages, leaves one out, or fails.
        """
        wants, variables = self.facts.wants, {}
        if tools or any(m.get("tool_calls") or m.get("role") == "tool" for m in messages):
            facts = self.tools()
            messages, variables = facts.prepared(messages), facts.variables(tools)
        markers = self._markers(len(messages))
        jobs = [self._job([shaped(m, wants) for m in messages], add_generation_prompt, args) | variables]
        if check and messages:
            marked = [
                {**m, "content": marker if message_text(m).strip() else ""}
                for m, marker in zip(messages, markers, strict=True)
            ]
            jobs.append(self._job([shaped(m, wants) for m in marked], add_generation_prompt, args) | variables)
        rendered, *others = self._renderings(jobs, now)
        text = self._text(rendered)
        if others:
            self._check_kept(messages, markers, text, others[0].get("text"))
            self._check_tools(messages, tools, text)
        return text

    def render_next_turn(
        self, message: str, *, args: Mapping[str, Any] | None = None, check: bool = True, now: float | None = None
    ) -> str:
        """Text that the template adds for one more user message after an answer, the opening not repeated.

        Templates render whole conversations only, so this is the end of one with an answer already in it.

        Raises: UsageError as `render`, and if the template leaves out earlier answers.
        """
        if not self.facts.keeps_history:
            raise UsageError(
                problem(
                    "chat template",
                    received="one that leaves out earlier answers",
                    expected="one that keeps them as they are",
                    fix="use --prompt, or feed the turns as text",
                )
            )
        first, answer = self._markers(2)
        past = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
        whole = self.render([*past, {"role": "user", "content": message}], args=args, check=check, now=now)
        return whole.rpartition(answer)[2]

    def thinking(self, args: Mapping[str, Any] | None = None) -> Thinking | None:
        """How the template marks what the model thinks; None if it does not.

        Raises: UsageError as `render`.
        """
        literals = self.literals()
        return None if thinking_in(literals, "") is None else thinking_in(literals, self._opening(args))

    @property
    def has_channels(self) -> bool:
        """Whether answers are written in gpt-oss's channels.

        Raises: UsageError as `facts`.
        """
        literals = self.literals()
        opens = self.facts.generation_prompt.rstrip().endswith(f"{START}assistant")
        return opens and CHANNEL in literals and MESSAGE in literals

    def tools(self) -> ToolFacts:
        """What the template does with tools, found on first use by some renderings.

        Raises: UsageError if it cannot be given tools, or its format of calls is unknown; as `facts`.
        """
        if self._tools is None:
            wants = self.facts.wants
            jobs = [
                {**self._job([shaped(m, wants) for m in probe.pop("messages")], True, None), **probe}
                for probe in call_probes(self._word)
            ]
            ends = [text for text in self._special_tokens.values() if isinstance(text, str)]
            self._tools = tool_facts_of(self._renderings(jobs, None), self._word, ends)
        if isinstance(self._tools, str):
            raise UsageError(
                problem(
                    "tools",
                    received=f"some for a model whose chat template {self._tools}",
                    expected="a template that shows tools, calls and results",
                    fix="leave tools out, or export a model that was trained to call them",
                )
            )
        return self._tools

    def _opening(self, args: Mapping[str, Any] | None) -> str:
        """What opens an answer to a user, under these variables."""
        key = json.dumps(args or {}, sort_keys=True, default=repr)
        opening = self._openings.get(key)
        if opening is None:
            (marker,) = self._markers(1)
            try:
                text = self.render([{"role": "user", "content": marker}], args=args, check=False)
            except UsageError:  # it wants other messages: what is known of it without the variables
                return self.facts.generation_prompt
            opening = text.rpartition(marker)[2]
            if len(self._openings) >= MAX_OPENINGS:
                self._openings.clear()
            if len(key) <= MAX_OPENING_KEY:
                self._openings[key] = opening
        return opening

    def require_system(self) -> None:
        """Make sure that a system message reaches the model.

        Raises: UsageError.
        """
        facts = self.facts
        if not facts.has_system:
            why = f"refuses it ({facts.system_refusal})" if facts.system_refusal else "leaves it out"
            raise UsageError(
                problem(
                    "system message",
                    received=f"one for a model whose chat template {why}",
                    expected="a template that knows system messages",
                    fix="put the text into the first user message",
                )
            )

    def close(self) -> None:
        """End the process that renders. A later call starts another."""
        self._process.close()

    # --- renderings ---

    def _job(self, messages: list[dict[str, Any]], generate: bool, args: Mapping[str, Any] | None) -> dict[str, Any]:
        if args:
            check_template_args(args, self.facts.variables, self._special_tokens)
        return {
            **self._special_tokens,
            **(args or {}),
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": generate,
        }

    def _renderings(self, jobs: list[dict[str, Any]], now: float | None) -> list[dict[str, str]]:
        renderings: list[dict[str, str]] = self._call(lambda: self._process.render(jobs, now))
        return renderings

    def _call(self, function: Any) -> Any:
        try:
            return function()
        except TemplateFailure as failure:
            raise self._broken(str(failure)) from None

    @staticmethod
    def _broken(reason: str) -> UsageError:
        return UsageError(
            problem(
                "chat template",
                received=f"one that fails ({reason})",
                expected="one that renders a conversation in seconds",
                fix="use --prompt, or export with another template",
            )
        )

    @staticmethod
    def _text(rendering: Mapping[str, str]) -> str:
        if "error" in rendering:
            raise UsageError(
                problem(
                    "chat",
                    received=f"messages that the template refuses ({rendering['error']})",
                    expected="roles in the order that the model knows",
                    fix="see the model's card",
                )
            )
        return rendering["text"]

    def _markers(self, count: int) -> list[str]:
        return [f"{self._word}x{i}z" for i in range(count)]

    def _check_kept(self, messages: Sequence[Message], markers: list[str], text: str, marked: str | None) -> None:
        """Make sure that every message is in the text: by its marker word, or itself where those are refused.

        Raises: UsageError.
        """
        for message, marker in zip(messages, markers, strict=True):
            if message.get("tool_calls"):  # what is said beside calls is the template's own affair
                continue
            content = message_text(message).strip()
            if content and (content not in text if marked is None else marker not in marked.lower()):
                role = message.get("role")
                if role == "system":
                    self.require_system()
                raise UsageError(
                    problem(
                        "chat template",
                        received=f"a message of role '{role}', which it leaves out",
                        expected="messages that all reach the model",
                        fix="leave it out, or put its text into a user message",
                    )
                )

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str) -> None:
        """Make sure that every tool and every call is in the text.

        Raises: UsageError.
        """
        names = [tool["function"]["name"] for tool in tools]
        names += [call["function"]["name"] for m in messages for call in m.get("tool_calls") or ()]
        lost = next((name for name in names if name not in text), None)
        if lost is not None:
            raise UsageError(
                problem(
                    "chat template",
                    received=f"the tool '{lost}', which it leaves out",
                    expected="tools and calls that all reach the model",
                    fix="leave it out",
                )
            )

    def _probe(self) -> TemplateFacts:
        """Find out what the template does.

        Raises: TemplateFailure.
        """
        markers = self._markers(3)
        conversations = probes(markers)
        jobs = [
            self._job([shaped(m, wants) for m in messages], generate, None)
            for wants in MODES
            for messages, generate in conversations
        ]
        variables = frozenset(self._process.facts()["variables"])
        results, size = self._process.render(jobs), len(conversations)
        renderings = {wants: results[i * size : (i + 1) * size] for i, wants in enumerate(MODES)}
        return facts_of(renderings, markers, variables)


def choose_template(templates: Any) -> str | None:
    """The template for chats, of one text or of several by name: a dict, or a list of ``{"name", "template"}``.

    Raises: UsageError if there are several and none is called "default".
    """
    if templates is None or isinstance(templates, str):
        return templates
    if isinstance(templates, Sequence):
        templates = {entry["name"]: entry["template"] for entry in templates}
    if "default" in templates or len(templates) == 1:
        chosen = templates.get("default", next(iter(templates.values())))
        return str(chosen)
    raise UsageError(
        problem(
            "chat template",
            received=f"several ({', '.join(sorted(templates)) or 'none'})",
            expected="one called 'default'",
            fix="keep one in the model's folder",
        )
    )


def _check_syntax(source: str) -> None:
    """Parse only: nothing of the template runs, not even sums of constants.

    Raises: BundleError; UsageError for a Jinja that is too old.
    """
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise BundleError(
            problem(
                "chat template",
                received=f"{len(source)} characters",
                expected=f"at most {MAX_TEMPLATE_CHARACTERS}",
                fix="export the model again",
            )
        )
    require_jinja()
    try:
        environment().parse(source)
    except Exception as error:  # RecursionError and ValueError besides Jinja's own
        reason = " ".join(str(error).split())[:200]
        raise BundleError(
            problem(
                "chat template",
                received=f"text that is no Jinja ({reason})",
                expected="a template",
                fix="export the model again",
            )
        ) from error
