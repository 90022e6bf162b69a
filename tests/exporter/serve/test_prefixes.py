"""Clients with the same system message: the second one's prompt goes on where the first one's differs from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sinkexport.serve.settings import Limits
from sinkrt.prefix_store import MIN_PREFIX_TOKENS

from tests.exporter.serve.serving import Served, serving
from tests.runtime.toy import Toy, build_toy
from tests.support import run_cli

SYSTEM = "You watch a valve and say in few words what it does, all day long, to whoever asks."
LIMITS = Limits(max_tokens=100, grace_s=0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("prefixes") / "toy", Toy(batch=3, chunk_size=16, window_size=400))


def known(served: Served, text: str, *, key: str = "none", system: str = SYSTEM, **options: object) -> int:
    """Ask something. Returns: tokens of the prompt that were not fed, as the client hears."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    answer = served.client(key).chat.completions.create(
        model=served.server.model, messages=messages, max_tokens=5, **options
    )
    return answer.usage.prompt_tokens_details.cached_tokens


def test_a_second_client_is_fed_what_is_its_own(bundle: Path, tmp_path: Path) -> None:
    opening = len(f"[system]{SYSTEM}") + len("\n[user]") + 1
    with serving(bundle, LIMITS, prefix_dir=tmp_path) as served:
        assert known(served, "one") == 0
        assert known(served, "Another") == opening > MIN_PREFIX_TOKENS
        assert known(served, "a third", extra_body={"conversation": "named"}) == opening
        assert known(served, "one", system=SYSTEM.upper()) == 0
        text = served.client().get("/../metrics", cast_to=str)
        assert "sinkexport_prefixes 2.0" in text
    with serving(bundle, LIMITS, prefix_dir=tmp_path) as served:
        assert known(served, "after a restart") == opening
    with serving(bundle, Limits(max_tokens=100, grace_s=0, max_prefix_bytes=0)) as served:
        assert [known(served, "one"), known(served, "two")] == [0, 0]


def test_keys_share_nothing(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, LIMITS, api_key={"ada": "a" * 20, "bob": "b" * 20}, prefix_dir=tmp_path) as served:
        assert [known(served, "x", key="a" * 20), known(served, "y", key="b" * 20)] == [0, 0]
        assert known(served, "z", key="b" * 20) > MIN_PREFIX_TOKENS


def test_answers_are_those_of_a_session_of_its_own(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, LIMITS) as served:
        messages = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{i}?"}] for i in range(4)]
        texts = [
            served.client().chat.completions.create(
                model=served.server.model, messages=each, max_tokens=20, n=2, seed=i
            )
            for i, each in enumerate(messages)
        ]
        served.wait_until(lambda: served.server.decode_loop.totals.conversations == 8)
        scheduler = served.server.decode_loop.scheduler
        copies = sum(c.copy is not None for c in scheduler._conversations.by_age())
        assert scheduler.load.parked == copies, "what is parked is counted once"
        assert len(scheduler._keeper._prefixes) == 1
    with serving(bundle, Limits(max_tokens=100, grace_s=0, max_prefix_bytes=0)) as served:
        for i, each in enumerate(messages):
            plain = served.client().chat.completions.create(
                model=served.server.model, messages=each, max_tokens=20, n=2, seed=i
            )
            assert [c.message.content for c in plain.choices] == [c.message.content for c in texts[i].choices]


def test_a_folder_without_memory_is_refused(bundle: Path, tmp_path: Path) -> None:
    run_cli("serve", bundle, "--prefix-dir", tmp_path, "--max-prefix-mib", 0).refusal(
        "--prefix-dir: received", "--max-prefix-mib 0"
    )
    (tmp_path / "file").write_text("x")
    run_cli("serve", bundle, "--port", 0, "--prefix-dir", tmp_path / "file").refusal("folder for prefixes: received")


def test_a_template_that_takes_no_short_message(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.content | length < 3 %}{{ raise_exception('too short') }}{% endif %}"
        "{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    )
    bundle = build_toy(tmp_path / "toy", Toy(chunk_size=16, window_size=400), template=template)
    with serving(bundle, LIMITS) as served:
        assert [known(served, "long enough"), known(served, "long, too")] == [0, 0]


@pytest.mark.parametrize("keys", [None, {"ada": "a" * 20, "bob": "b" * 20}])
def test_answers_beside_each_other_share_with_their_own_key_only(
    bundle: Path, tmp_path: Path, keys: dict[str, str] | None
) -> None:
    with serving(bundle, LIMITS, api_key=keys) as served:
        for key in ("a" * 20, "b" * 20):
            known(served, "one", key=key, n=2)
            known(served, "two", key=key, n=3)
        served.wait_idle()
        owners = {owner for owner, _ in served.server.decode_loop.scheduler._keeper._prefixes._kept}
        assert owners == ({""} if keys is None else {"ada", "bob"})
