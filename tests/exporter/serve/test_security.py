"""Who may ask and see what: several keys, conversations of each, and logs without what people write."""

from __future__ import annotations

import hmac
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from sinkexport.serve.keys import ApiKeys, read_api_keys
from sinkexport.serve.settings import Limits
from sinkrt import UsageError
from sinkrt.sampler import Sampler

from tests.exporter.serve.serving import Served, many_bundle, serving, user
from tests.runtime.toy import build_toy

__all__ = ["many_bundle"]  # a fixture
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEYS = {"ada": "sk-ada", "bob": "sk-bob"}
LIMITS = Limits(max_tokens=50, grace_s=0)
SECRET = "zanzibar-4711"


def post(served: Served, path: str, body: Any, key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(served.url + path, json=body, headers=headers, timeout=60)


# --- keys ---


def test_files_with_several_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# who\n\nada: sk-ada\nbob:\tsk-bob\r\nsk=only:x==\n", encoding="utf-8")
    assert read_api_keys(file, None) == {**KEYS, "default": "sk=only:x=="}
    for bad, words in (
        ("ada: a\nada: b", "two of the same name"),
        ("ada: a\nbob: a", "the same key twice"),
        ("a\nb", "two of the same name"),
        ("ada: a\nb c: d", "lines that are none"),
        ("ada: a b", "without one"),
        ("# only\n", "without one"),
        (f"{'x' * 65}: a", "without one"),
        ("ada: schlüssel\nbob: b", "lines that are none"),
    ):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(UsageError, match=words) as error:
            read_api_keys(file, None)
        assert "schl" not in str(error.value)
        assert "\n" not in str(error.value)


def test_all_keys_are_compared_whatever_is_sent() -> None:
    """And by digests of one length: how long it takes says nothing."""
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    table = ApiKeys({f"k{i}": f"key-{i}" for i in range(5)}, compare)
    for sent, name in ((b"Bearer key-0", "k0"), (b"bearer  key-4 ", "k4"), (b"Bearer x" * 99, None), (b"", None)):
        compared.clear()
        assert table.name_of([sent]) == name
        assert compared == [(32, 32)] * 5
    assert table.name_of([b"Bearer key-0", b"Bearer key-0"]) is None
    assert table.name_of([b"Basic key-0"]) is None


def test_each_key_has_its_own_conversations_and_figures(many_bundle: Path) -> None:
    chat = {"messages": [user("hi")], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    named = {**chat, "conversation": "c"}
    with serving(many_bundle, LIMITS, api_key=KEYS) as served:
        assert post(served, CHAT, named, "sk-ada").json()["conversation"]["new"] is True
        assert post(served, CHAT, named, "sk-bob").json()["conversation"]["new"] is True
        assert post(served, CHAT, named, "sk-ada").json()["conversation"]["new"] is False
        gone = httpx.delete(served.url + "/v1/conversations/c", headers={"Authorization": "Bearer sk-bob"})
        assert gone.status_code == 200
        assert post(served, CHAT, named, "sk-ada").json()["conversation"]["new"] is False

        one = {"max_tokens": 1, "logit_bias": {"65": 100}}
        assert post(served, COMPLETIONS, {"prompt": [7] * 9, **one}, "sk-ada").json()["choices"][0]["text"] == "A"
        for key, cached in (("sk-bob", 0), ("sk-ada", 10)):  # what one has sent, the other cannot find out
            answer = post(served, COMPLETIONS, {"prompt": [7] * 9 + [65, 5], **one}, key).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
        assert post(served, CHAT, chat, "sk-eve").status_code == 401
        assert post(served, CHAT, {}, "sk-bob").status_code == 400
        served.wait_idle()
        text = httpx.get(served.url + "/metrics", headers={"Authorization": "Bearer sk-bob"}).text
    values = {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE)}
    assert values['sinkexport_key_requests_total{key="ada",status="200"}'] == 5
    assert values['sinkexport_key_requests_total{key="bob",status="400"}'] == 1
    answers = {key: values[f'sinkexport_key_tokens_total{{key="{key}",kind="answer"}}'] for key in KEYS}
    prompts = {key: values[f'sinkexport_key_tokens_total{{key="{key}",kind="prompt"}}'] for key in KEYS}
    assert sum(answers.values()) == values["sinkexport_answer_tokens_total"]
    assert sum(prompts.values()) == values["sinkexport_prompt_tokens_total"]
    assert answers["ada"] >= 15
    assert "sk-" not in text


# --- control tokens ---


def test_the_option_for_special_tokens_is_for_completions(many_bundle: Path) -> None:
    """In chats the template writes control tokens, and only a request itself may let its texts do so."""
    text = "a<eos><bos>"

    def tokens(served: Served, path: str, body: dict[str, Any]) -> int:
        usage = post(served, path, {"max_tokens": 1, **body}).json()["usage"]
        return int(usage.get("prompt_tokens", usage.get("input_tokens")))

    with serving(many_bundle, LIMITS, allow_special=True) as served:
        assert tokens(served, COMPLETIONS, {"prompt": text}) == 3
        assert tokens(served, COMPLETIONS, {"prompt": text, "allow_special": False}) == len(text)
        assert post(served, "/tokenize", {"prompt": text}).json()["count"] == 3
        plain = tokens(served, CHAT, {"messages": [user("x" * len(text))]})
        assert tokens(served, CHAT, {"messages": [user(text)]}) == plain
        assert tokens(served, CHAT, {"messages": [user(text)], "allow_special": True}) == plain - len(text) + 3
        responses = {"max_tokens": None, "max_output_tokens": 1}
        assert tokens(served, "/v1/responses", {"input": text, **responses}) == plain
        assert tokens(served, "/v1/responses", {"input": "x", "instructions": text, **responses}) > plain


# --- logs ---


def test_nothing_that_people_write_is_logged(many_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At any level, whatever goes wrong."""
    broken = {"temperature": SECRET, "stop": [5, SECRET]}
    with caplog.at_level(logging.DEBUG), serving(many_bundle, LIMITS) as served:
        for path, body in (
            (CHAT, {"messages": [user(SECRET)], "user": SECRET, "new_field": SECRET, "max_tokens": 2}),
            (CHAT, {"messages": [user(SECRET + "<eos>")], "max_tokens": 2, "stream": True}),
            (CHAT, {"messages": [{"role": "tool", "content": SECRET}]}),
            (CHAT, {"messages": [user(SECRET)], "chat_template_kwargs": {"x": SECRET}}),
            (CHAT, {"messages": [user(SECRET)], "tools": [SECRET], "model": SECRET}),
            (COMPLETIONS, {"prompt": SECRET, "max_tokens": 2}),
            (COMPLETIONS, {"prompt": SECRET * 5000}),
            ("/v1/responses", {"input": SECRET, "instructions": SECRET, "max_output_tokens": 2}),
            ("/tokenize", {"prompt": SECRET}),
            *((COMPLETIONS, {"prompt": SECRET, name: value}) for name, value in broken.items()),
        ):
            assert post(served, path, body).status_code < 500
        content = json.dumps({"prompt": SECRET})[:-3]
        httpx.post(served.url + CHAT, content=content, headers={"Content-Type": "application/json"})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sampler, "sample", lambda *_: 1 / 0)
            assert post(served, CHAT, {"messages": [user(SECRET)]}).status_code == 500
    lines = [f"{record.getMessage()} {record.exc_info} {record.exc_text}" for record in caplog.records]
    assert any("ZeroDivisionError" in line for line in lines)
    assert any("ignored, since unknown" in line for line in lines)
    assert [line for line in lines if SECRET in line] == []


# --- templates ---

HOSTILE = {
    "large": "{{ 'x' * 10**9 }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_get_nowhere(tmp_path: Path, name: str) -> None:
    template = HOSTILE[name] + "{{ messages[0].content }}"
    with serving(build_toy(tmp_path / "toy", template=template), LIMITS) as served:
        response = post(served, CHAT, {"messages": [user("hi")], "max_tokens": 1})
        if name == "globals":  # an unknown attribute is nothing
            assert response.json()["usage"]["prompt_tokens"] == len("hi")
        else:
            assert response.status_code == 400, response.text
        assert "root:" not in response.text
        assert post(served, COMPLETIONS, {"prompt": "hi", "max_tokens": 1}).status_code == 200


# --- options ---


@pytest.mark.parametrize(
    ("option", "value"), [("--body-timeout", "0"), ("--idle-timeout", "nan"), ("--stall-timeout", "1e9")]
)
def test_times_to_wait_are_checked(many_bundle: Path, option: str, value: str) -> None:
    arguments = [sys.executable, "-m", "sinkexport.cli", "serve", str(many_bundle), option, value]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert option in done.stderr
    assert done.stderr.count("\n") == 1
