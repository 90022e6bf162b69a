"""Chat templates: what they leave out is refused, what they need is passed, and what they cost is limited."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
from sinkexport.config import ExportConfig
from sinkexport.pipeline.export import export_loaded
from sinkexport.sources import LoadedModel
from sinkrt import BundleError, Session, UsageError
from sinkrt.text import Tokenizer
from sinkrt.text.chat_template import ChatTemplate, choose_template
from sinkrt.text.template_args import parse_template_args
from sinkrt.text.template_process import require_jinja
from transformers import PreTrainedTokenizerFast

from tests.exporter.serve.serving import Served, serving, user
from tests.exporter.tiny_models import tiny_model
from tests.runtime.toy import EOS, Toy, build_toy, rehash, toy_tokenizer
from tests.support import run_cli

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As in models that also take pictures: contents are lists of parts, a plain text shows nothing.
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m['content'] %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As in Phi-3: a role without a branch is skipped.
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>{% elif m.role == 'assistant' %}"
    "<|assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As in Gemma.
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
REFUSES_SYSTEM += CHATML
# As in SmolLM3, gpt-oss and DeepSeek: only a system message at the beginning is shown.
FIRST_SYSTEM = CHATML.replace("{{ '<|im", "{% if m.role != 'system' or loop.first %}{{ '<|im", 1)
FIRST_SYSTEM = FIRST_SYSTEM.replace("{% endfor %}", "{% endif %}{% endfor %}")
LAST_ONLY = "{{ '[' + messages[-1].content + ']' }}"
# As in Qwen3 and DeepSeek: what was thought is left out of earlier answers, and the last turn is rendered otherwise.
REASONING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "<a>{% if loop.last %}<think></think>{% endif %}{{ m.content.split('</think>')[-1].lstrip() }}</a>"
    "{% else %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{% endif %}"
)
# Far more work than anybody waits for, and harmless.
SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"

ASKED = [user("Hello")]
TALK = [user("one"), {"role": "assistant", "content": "two"}, user("three")]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, user("Hello")]


@pytest.fixture
def made() -> Iterator[list[ChatTemplate]]:
    """Templates to be closed."""
    templates: list[ChatTemplate] = []
    yield templates
    for template in templates:
        template.close()


# --- what a template does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "wants", "has_system", "keeps_history", "generation_prompt", "closing"),
    [
        (CHATML, "text", True, True, "<|im_start|>assistant\n", "<|im_end|>\n"),
        (PARTS, "parts", True, True, "[assistant]", "\n"),
        (NO_SYSTEM, "text", False, True, "<|assistant|>", "<|end|>"),
        (REFUSES_SYSTEM, "text", False, True, "<|im_start|>assistant\n", "<|im_end|>\n"),
        (LAST_ONLY, "text", False, False, "", "]"),
        (REASONING, "text", True, True, "<a>", "</a>"),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", "text", True, True, "", '"'),
    ],
)
def test_facts(
    source: str,
    wants: str,
    has_system: bool,
    keeps_history: bool,
    generation_prompt: str,
    closing: str,
    made: list[ChatTemplate],
) -> None:
    made.append(ChatTemplate(source))
    facts = made[0].facts
    assert (facts.wants, facts.has_user, facts.has_system, facts.keeps_history) == (
        wants,
        True,
        has_system,
        keeps_history,
    )
    assert (facts.generation_prompt, facts.closing) == (generation_prompt, closing)


def test_a_template_of_parts_shows_the_users_text(made: list[ChatTemplate]) -> None:
    made.append(ChatTemplate(PARTS))
    assert made[0].render(WITH_SYSTEM) == "[system]Be brief.\n[user]Hello\n[assistant]"
    assert made[0].render_next_turn("More") == "\n[user]More\n[assistant]"
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    assert made[0].render([{"role": "user", "content": parts}]) == made[0].render(ASKED)
    made.append(ChatTemplate(CHATML))
    assert made[1].render([{"role": "user", "content": parts}]) == made[1].render(ASKED)


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        (NO_SYSTEM, WITH_SYSTEM, "system message: .* leaves it out"),
        (REFUSES_SYSTEM, WITH_SYSTEM, "System role not supported"),
        (LAST_ONLY, TALK, "a message of role 'user', which it leaves out"),
        (CHATML.replace("in messages", "in messages[:1]"), TALK, "a message of role 'assistant'"),
        ("{{ messages[0].role }}", ASKED, "a message of role 'user'"),
        (FIRST_SYSTEM, [*TALK[:2], *WITH_SYSTEM], "a message of role 'system', which it leaves out"),
        ("{% if messages[0].content == 'Hello' %}{{ messages[0].content }}{% endif %}", ASKED, "role 'user'"),
    ],
)
def test_a_message_that_would_vanish_is_refused(
    source: str, messages: list[dict[str, str]], reason: str, made: list[ChatTemplate]
) -> None:
    made.append(ChatTemplate(source))
    with pytest.raises(UsageError, match=reason) as caught:
        made[0].render(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", None, "   "])
def test_a_message_without_text_cannot_vanish(content: str | None, made: list[ChatTemplate]) -> None:
    made.append(ChatTemplate("{% for m in messages %}{{ m.content | trim }};{% endfor %}"))
    assert made[0].render([{"role": "user", "content": content}, user("x")]) == ";x;"


def test_what_was_thought_may_be_left_out(made: list[ChatTemplate]) -> None:
    made.append(ChatTemplate(REASONING))
    talk = [user(" one "), {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"}, user("three")]
    assert made[0].render(talk) == "<user>one</user><a>two</a><user>three</user><a>"
    assert made[0].render_next_turn(" three") == "</a><user>three</user><a>"
    assert made[0].render_next_turn("x", args={"enable_thinking": False}) == "</a><user>x</user><a><think></think>"


def test_earlier_answers_must_be_kept_for_a_next_turn(made: list[ChatTemplate]) -> None:
    made.append(ChatTemplate(LAST_ONLY))
    with pytest.raises(UsageError, match="earlier answers"):
        made[0].render_next_turn("x")


# --- variables -------------------------------------------------------------------------------------------------------


def test_arguments_reach_the_template(made: list[ChatTemplate]) -> None:
    made.append(ChatTemplate(REASONING))
    assert made[0].render(ASKED, args={"enable_thinking": False}).endswith("<a><think></think>")
    assert made[0].render(ASKED).endswith("<a>")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("messages", "reserved"),
        ("bos_token", "reserved"),
        ("tools", "reserved"),
        ("add_generation_prompt", "reserved"),
        ("pad_token", "reserved"),
        ("raise_exception", "reserved"),
        ("enable_thinkin", "reads: enable_thinking"),
    ],
)
def test_arguments_that_are_refused(name: str, reason: str, made: list[ChatTemplate]) -> None:
    made.append(ChatTemplate(REASONING + "{{ tools }}{{ pad_token }}", {"bos_token": "<s>"}))
    with pytest.raises(UsageError, match=reason):
        made[0].render(ASKED, args={name: 1})


def test_arguments_of_the_command_line() -> None:
    texts = ["a=false", "b=3", 'c={"d": [1]}', "e=high", "f=", "g=x=y"]
    assert parse_template_args(texts) == {"a": False, "b": 3, "c": {"d": [1]}, "e": "high", "f": "", "g": "x=y"}
    for wrong in ("a", "=1", "a b=1"):
        with pytest.raises(UsageError, match="KEY=VALUE"):
            parse_template_args([wrong])


def test_several_templates_by_name() -> None:
    listed = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert choose_template(listed) == choose_template({"default": "b", "rag": "c"}) == choose_template("b") == "b"
    assert choose_template({"rag": "c"}) == "c" and choose_template(None) is None
    with pytest.raises(UsageError, match="rag, tool_use"):
        choose_template({"rag": "c", "tool_use": "a"})
    ours = Tokenizer(toy_tokenizer(), [{"name": "default", "template": CHATML}])
    assert ours.render_chat(ASKED).startswith("<|im_start|>user\nHello")
    ours.close()


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (SLOW, "more than 0.5 s"),
        ("{{ 3 ** (3 ** 16) }}", "more than 0.5 s"),  # a constant: the compiler takes as long as rendering would
        ("{{ messages | lower | center(20000000) }}", "characters"),
        ("{% for a in range(99999) %}{{ ' ' * 1000 }}{% endfor %}", "characters"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
    ],
)
def test_a_template_that_costs_too_much_is_refused(source: str, reason: str, made: list[ChatTemplate]) -> None:
    made.append(ChatTemplate(source, time_limit_s=0.5))
    for _ in range(2):  # the second time at once
        with pytest.raises(UsageError, match=reason) as caught:
            made[0].render(ASKED)
        assert "\n" not in str(caught.value)
    assert "0.5 s" not in reason or not workers()


def test_a_template_that_is_slow_for_some_messages_goes_on_for_others(made: list[ChatTemplate]) -> None:
    made.append(ChatTemplate("{% if messages[0].content == 'slow' %}" + SLOW + "{% endif %}" + CHATML, None, 0.5))
    before = {child.pid for child in psutil.Process().children()}  # dead ones that nobody has waited for too
    want = made[0].render(ASKED)
    with pytest.raises(UsageError, match=r"more than 0\.5 s"):
        made[0].render([user("slow")])
    assert {child.pid for child in psutil.Process().children()} <= before, "a process is left over"
    assert made[0].render(ASKED) == want
    assert len(workers()) == 1


def test_no_process_before_a_chat_and_none_after_it(toy_bundle: Path) -> None:
    with Session.load(toy_bundle, threads=1) as session:
        assert session.tokenizer.has_chat_template
        list(session.generate("Hello", max_tokens=1))
        assert not workers()
        session.tokenizer.render_chat(ASKED)
        assert len(workers()) == 1
    assert not workers()


def test_many_threads_share_a_template(made: list[ChatTemplate]) -> None:
    made.append(ChatTemplate(CHATML))
    found: dict[int, str] = {}

    def render(number: int) -> None:
        found[number] = made[0].render([user(f"text {number}")])

    threads = [threading.Thread(target=render, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: made[0].render([user(f"text {i}")]) for i in range(8)}


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupt_ends_a_rendering(made: list[ChatTemplate]) -> None:
    made.append(ChatTemplate("{% if messages[0].content == 'slow' %}" + SLOW + "{% endif %}" + CHATML, None, 300))
    want = made[0].render(ASKED)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        made[0].render([user("slow")])
    assert not workers()
    assert made[0].render(ASKED) == want


def test_the_process_sees_the_variables_only(made: list[ChatTemplate], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither modules of this package nor keys: a template that gets out of the sandbox finds little."""
    monkeypatch.setenv("SINKEXPORT_API_KEY", "secret")
    made.append(ChatTemplate(CHATML))
    made[0].render(ASKED)
    (worker,) = workers()
    command = worker.cmdline()
    assert "-I" in command and "-S" in command
    assert "secret" not in worker.environ().values()


@pytest.mark.parametrize("source", ["{% for %}", "{{ '" + "(" * 5, "(" * 3 + "{{" + "(" * 5000, "x" * (2**20 + 1)])
def test_text_that_is_no_template(source: str) -> None:
    with pytest.raises(BundleError, match="chat template") as caught:
        Tokenizer(toy_tokenizer(), source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["3.1.5", "2.11.3"])
def test_an_old_jinja_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(UsageError, match=r"jinja2>=3\.1\.6"):
        require_jinja()


def workers() -> list[psutil.Process]:
    """Processes that render templates for this one."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and any("template_worker" in word for word in child.cmdline())
    ]


# --- run, export, serve ----------------------------------------------------------------------------------------------


def bundle_with(folder: Path, template: str, batch: int = 1) -> Path:
    build_toy(folder, Toy(batch=batch, chunk_size=4))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    rehash(folder)
    return folder


@pytest.mark.parametrize(("source", "reason"), [(NO_SYSTEM, "leaves it out"), (REFUSES_SYSTEM, "not supported")])
@pytest.mark.parametrize("pinned", [[], ["--pin-system"]])
def test_run_refuses_a_system_message_that_would_vanish(
    tmp_path: Path, source: str, reason: str, pinned: list[str]
) -> None:
    bundle = bundle_with(tmp_path / "bundle", source)
    done = run_cli("run", bundle, "--chat", "--system", "Be brief.", *pinned, "--max-tokens", 2, stdin=b"Hello\n")
    done.refusal(reason)
    assert not done.out


def test_run_feeds_the_text_to_a_template_of_parts(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "bundle", PARTS)
    for text in (b"a", b"abcdef"):
        done = run_cli("run", bundle, "--chat", "--max-tokens", 1, "--ignore-eos", "--stats", stdin=text + b"\n")
        assert f"position {len('[user]') + len(text) + len(chr(10) + '[assistant]') + 1}," in done.err, done.err


def test_run_passes_arguments_to_the_template(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "bundle", REASONING)
    common = ["run", bundle, "--chat", "--max-tokens", 1, "--ignore-eos", "--stats"]
    rendered = "<user>Hello</user><a>"
    for flags, more in (([], ""), (["--template-arg", "enable_thinking=false"], "<think></think>")):
        done = run_cli(*common, *flags, stdin=b"Hello\n")
        assert f"position {len(rendered + more) + 1}," in done.err, done.err
    for flag in ("enable_thinkin=false", "messages=[]", "enable_thinking"):
        done = run_cli(*common, "--template-arg", flag, stdin=b"Hello\n")
        assert done.code == 2 and "emplate" in done.err.splitlines()[-1] and not done.out
    assert "reads: enable_thinking" in run_cli(*common, "--template-arg", "enable_thinkin=1", stdin=b"x\n").err
    done = run_cli("run", bundle, "--prompt", "x", "--template-arg", "enable_thinking=false")
    done.refusal("--chat")


@pytest.mark.parametrize(
    ("source", "reason"),
    [(NO_SYSTEM, "system message out"), (REFUSES_SYSTEM, "not supported"), ("{{ messages | no_such }}", "no_such")],
)
def test_export_refuses_to_pin_a_system_message_that_would_vanish(tmp_path: Path, source: str, reason: str) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=toy_tokenizer(), bos_token="<bos>", eos_token="<eos>", chat_template=source
    )
    loaded = LoadedModel(tiny_model("llama", vocab_size=258), tokenizer, "tiny")
    with pytest.raises(UsageError, match=reason):
        export_loaded(loaded, tmp_path / "bundle", ExportConfig(pin_system="Be brief."))
    assert not list(tmp_path.iterdir())


def prompt_tokens(served: Served, messages: list[dict[str, str]], **extra: object) -> int:
    answer = served.client().chat.completions.create(
        model=served.server.model, messages=messages, max_tokens=1, extra_body={"ignore_eos": True, **extra}
    )  # type: ignore[call-overload]
    return int(answer.usage.prompt_tokens)


def test_serve(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "bundle", REASONING.replace("'assistant'", "'assistant' or m.role == 'system'", 1))
    with serving(bundle) as served:
        rendered = len("<user>Hello</user><a>")
        assert prompt_tokens(served, ASKED) == rendered
        thought = prompt_tokens(served, ASKED, chat_template_kwargs={"enable_thinking": False})
        assert thought == rendered + len("<think></think>")
        for wrong in ({"enable_thinkin": False}, {"messages": []}):
            with pytest.raises(openai.BadRequestError, match="template argument"):
                prompt_tokens(served, ASKED, chat_template_kwargs=wrong)
        # Names of special tokens are text; the toy's tokens are bytes.
        assert prompt_tokens(served, [user("a<eos>")]) == rendered - len("Hello") + len("a<eos>")
        assert prompt_tokens(served, [user("a<eos>")], allow_special=True) == rendered - len("Hello") + 2
        client, model = served.client(), served.server.model
        for extra, count in (({}, len("a<eos>")), ({"allow_special": True}, 2)):
            said = client.completions.create(model=model, prompt="a<eos>", max_tokens=1, extra_body=extra)
            assert said.usage is not None and said.usage.prompt_tokens == count


@pytest.mark.parametrize(("source", "reason"), [(NO_SYSTEM, "leaves it out"), (REFUSES_SYSTEM, "not supported")])
def test_serve_refuses_a_system_message_that_would_vanish(tmp_path: Path, source: str, reason: str) -> None:
    with serving(bundle_with(tmp_path / "bundle", source)) as served:
        for role in ("system", "developer"):
            with pytest.raises(openai.BadRequestError, match=reason):
                prompt_tokens(served, [{"role": role, "content": "Be brief."}, user("Hello")])
        assert prompt_tokens(served, ASKED)


def test_serve_ends_and_answers_others_while_a_template_hangs(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path / "bundle", "{% if messages[0].content == 'slow' %}" + SLOW + "{% endif %}" + CHATML)
    failures: list[Exception] = []
    with serving(bundle) as served:
        assert prompt_tokens(served, ASKED)

        def hang() -> None:
            try:
                prompt_tokens(served, [user("slow")])
            except openai.OpenAIError as error:
                failures.append(error)

        threads = [threading.Thread(target=hang) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)  # long enough for the requests to be in the template
        client = served.client()
        assert client.completions.create(model=served.server.model, prompt="x", max_tokens=1).choices
        assert client.models.list().data
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert [type(error) for error in failures] == [openai.InternalServerError] * 4, failures  # 503: it is stopping
    assert not workers()


def test_a_stop_of_a_served_answer_may_be_a_special_token(tmp_path: Path) -> None:
    """The toy says <eos> at some time: as a stop it ends the answer, though the model's own end is ignored."""
    bundle = build_toy(tmp_path / "bundle", Toy(chunk_size=4))
    with Session.load(bundle, threads=1) as session:
        for seed in range(50):
            session.reset()
            list(session.generate("go", max_tokens=60, ignore_eos=True, temperature=1.0, seed=seed))
            if EOS in session.recent_ids().tolist():
                break
        session.reset()
        pieces = list(session.generate("go", max_tokens=60, ignore_eos=True, temperature=1.0, seed=seed, stop="<eos>"))
        assert int(session.position[0]) < 62, "the stop was not seen"
        assert EOS not in session.recent_ids().tolist()
        session.reset()
        again = list(session.generate("go", max_tokens=60, temperature=1.0, seed=seed))
        assert pieces == again


def test_a_template_of_a_million_characters_is_refused() -> None:
    with pytest.raises(BundleError, match="chat template: received 2000000 characters"):
        ChatTemplate("{{ a }}x" * 250_000)
