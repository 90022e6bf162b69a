"""The session against a NumPy stream that keeps every token, and against everything that callers get wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sinkrt import BackendError, BundleError, Session, UsageError
from sinkrt.contract import MANIFEST_NAME

from tests.runtime.faults import load_faulty
from tests.runtime.toy import EOS, VOCAB_SIZE, Toy, build_toy, reference_logits, rehash, toy_ids

TOYS = [
    Toy(),
    Toy(num_sink_tokens=0, window_size=5),
    Toy(num_sink_tokens=3, window_size=1),
    Toy(num_sink_tokens=5, window_size=3),
    Toy(batch=3, num_q_heads=2, num_kv_heads=2),
]


@pytest.mark.parametrize("toy", TOYS, ids=str)
def test_steps_match_a_stream_that_keeps_every_token(toy: Toy, tmp_path: Path) -> None:
    ids = toy_ids(toy.batch, 6 * toy.capacity + 7)
    with Session.load(build_toy(tmp_path / "bundle", toy), threads=1) as session:
        logits = np.stack([session.step(column).copy() for column in ids.T], axis=1)  # [B, N, V]
        assert session.position.tolist() == [ids.shape[1]] * toy.batch
    for stream in range(toy.batch):
        np.testing.assert_allclose(logits[stream], reference_logits(toy, ids[stream].tolist()), atol=2e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31])
def test_prefill_gives_what_steps_give(session: Session, length: int) -> None:
    ids = toy_ids(1, length)
    for column in ids.T:
        stepped = session.step(column).copy()
    after = {name: buffer.copy() for name, buffer in session.buffers.items()}
    session.reset()
    np.testing.assert_array_equal(session.prefill(ids), stepped)
    for name, buffer in session.buffers.items():
        np.testing.assert_array_equal(buffer, after[name], err_msg=name)


def test_prefill_takes_one_dimension_for_one_stream(session: Session) -> None:
    flat = session.prefill([1, 2, 3]).copy()
    session.reset()
    np.testing.assert_array_equal(session.prefill([[1, 2, 3]]), flat)


def test_prefill_in_pieces(session: Session) -> None:
    ids = toy_ids(1, 29)
    whole = session.prefill(ids).copy()
    session.reset()
    for piece in np.split(ids, [1, 4, 12, 28], axis=1):
        logits = session.prefill(piece)
    np.testing.assert_array_equal(logits, whole)


def test_position_is_a_copy(session: Session) -> None:
    session.step([1])
    session.position[0] = 99
    assert session.position.tolist() == [1]
    assert session.position.dtype == np.int64


def test_reset_starts_the_stream_again(session: Session) -> None:
    first = session.prefill(toy_ids(1, 20)).copy()
    session.reset()
    assert session.position[0] == 0
    assert not any(buffer.any() for name, buffer in session.buffers.items() if "_" in name)
    np.testing.assert_array_equal(session.prefill(toy_ids(1, 20)), first)


def test_facts(session: Session) -> None:
    toy = Toy()
    assert (session.num_sink_tokens, session.window_size) == (toy.num_sink_tokens, toy.window_size)
    assert (session.capacity, session.batch) == (toy.capacity, toy.batch)
    assert session.manifest.model.name == "toy"


# --- what callers get wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(3, id="scalar"),
        pytest.param([], id="empty"),
        pytest.param([1, 2], id="two for one stream"),
        pytest.param([[1]], id="two axes"),
        pytest.param([1.0], id="float"),
        pytest.param([True], id="bool"),
        pytest.param(["a"], id="text"),
        pytest.param([-1], id="negative"),
        pytest.param([VOCAB_SIZE], id="past the vocabulary"),
        pytest.param([2**70], id="beyond int64"),
        pytest.param(np.array([2**63], dtype=np.uint64), id="beyond int64, unsigned"),
        pytest.param([[1], [2, 3]], id="ragged"),
        pytest.param(None, id="none"),
    ],
)
def test_bad_ids_of_a_step(session: Session, ids: Any) -> None:
    session.prefill([1, 2, 3])
    with pytest.raises(UsageError) as caught:
        session.step(ids)
    assert_one_line(caught.value)
    assert session.position[0] == 3


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([], id="empty"),
        pytest.param([[]], id="empty row"),
        pytest.param([[1, 2], [3, 4]], id="two streams for one"),
        pytest.param([[[1]]], id="three axes"),
        pytest.param([[1, 2, VOCAB_SIZE]], id="the last past the vocabulary"),
        pytest.param([[1.5, 2.0]], id="float"),
        pytest.param("text", id="text"),
        pytest.param([[1, 2], [3]], id="ragged"),
        pytest.param(7, id="scalar"),
    ],
)
def test_bad_ids_of_a_prefill_feed_nothing(session: Session, ids: Any) -> None:
    with pytest.raises(UsageError) as caught:
        session.prefill(ids)
    assert_one_line(caught.value)
    assert session.position[0] == 0


def test_every_integer_type_is_taken(session: Session) -> None:
    for dtype in (np.int8, np.uint8, np.int32, np.uint64, np.int64):
        session.step(np.array([7], dtype=dtype))
    assert session.position[0] == 5


def test_one_dimension_is_ambiguous_for_several_streams(tmp_path: Path) -> None:
    with (
        Session.load(build_toy(tmp_path / "bundle", Toy(batch=2)), threads=1) as session,
        pytest.raises(UsageError, match=r"expected integers \[2, "),
    ):
        session.prefill([1, 2])


def test_position_limit(tmp_path: Path) -> None:
    with Session.load(build_toy(tmp_path / "bundle", Toy(position_limit=10)), threads=1) as session:
        session.prefill([1] * 9)
        with pytest.raises(UsageError, match="at most 10 tokens"):
            session.prefill([1, 1])
        assert session.position[0] == 9, "a prompt that does not fit must not be fed in part"
        session.step([1])
        with pytest.raises(UsageError, match="at most 10 tokens"):
            session.step([1])
        session.save_state(tmp_path / "full")
        session.load_state(tmp_path / "full")
        session.reset()
        session.step([1])


@pytest.mark.parametrize("threads", [0, -2])
def test_bad_threads(toy_bundle: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        Session.load(toy_bundle, threads=threads)


def test_backends(toy_bundle: Path) -> None:
    with pytest.raises(UsageError, match="ort-cuda"):  # lists what there is
        Session.load(toy_bundle, "onnx")
    for name, problem in (("ort-cuda", "onnxruntime-gpu"), ("tensorrt", "without a decode engine")):
        with pytest.raises(BackendError, match=problem) as caught:
            Session.load(toy_bundle, name)
        assert_one_line(caught.value)


def test_a_closed_session(toy_bundle: Path, tmp_path: Path) -> None:
    session = Session.load(toy_bundle, threads=1)
    session.close()
    session.close()
    for use in (
        lambda: session.step([1]),
        lambda: session.prefill([1]),
        session.reset,
        lambda: session.buffers,
        lambda: session.save_state(tmp_path / "s"),
        lambda: session.load_state(tmp_path / "s"),
        lambda: session.generate("a"),
    ):
        with pytest.raises(UsageError, match="closed"):
            use()


# --- interrupted -----------------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(toy_bundle: Path) -> Iterator[tuple[Session, Any]]:
    """A session and its `FaultyBackend`."""
    session, backend = load_faulty(toy_bundle)
    with session:
        yield session, backend


def fail_once(backend: Any, error: BaseException, *, at: int = 1, after: bool = False) -> None:
    """Let the run of this number, from 1, raise: before the graph has written the state, or after."""
    left = at

    def run() -> None:
        nonlocal left
        left -= 1
        if left != 0 or after:
            backend.real.run()
        if left == 0:
            raise error

    backend.run = run


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), BackendError("decode step: failed")], ids=["ctrl-c", "error"])
@pytest.mark.parametrize("fed", [0, 1, 5, 20])
def test_a_failed_step_can_be_taken_again(
    faulty: tuple[Session, Any], error: BaseException, after: bool, fed: int
) -> None:
    session, backend = faulty
    ids = toy_ids(1, fed + 20)[0].tolist()
    want = reference_logits(Toy(), ids)
    if fed:
        session.prefill(ids[:fed])
    fail_once(backend, error, after=after)
    with pytest.raises(type(error)):
        session.step([3])  # another token than the one that is fed in its place
    assert session.position[0] == fed
    for token, row in zip(ids[fed:], want[fed:], strict=True):
        np.testing.assert_allclose(session.step([token])[0], row, atol=2e-5)


def test_an_interrupted_prefill_counts_what_was_fed(faulty: tuple[Session, Any]) -> None:
    session, backend = faulty
    ids = toy_ids(1, 12)[0].tolist()
    fail_once(backend, KeyboardInterrupt(), at=8)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(ids)
    assert session.position[0] == 7
    np.testing.assert_allclose(session.prefill(ids[7:])[0], reference_logits(Toy(), ids)[-1], atol=2e-5)


def test_a_failing_graph_is_one_line(faulty: tuple[Session, Any]) -> None:
    session, backend = faulty

    class Broken:
        def run_with_iobinding(self, _binding: object, _options: object) -> None:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : node 7\nmore\nlines")

    backend.real.step = dataclasses.replace(backend.real.step, session=Broken())
    with pytest.raises(BackendError, match="node 7") as caught:
        session.step([1])
    assert_one_line(caught.value)


# --- generate --------------------------------------------------------------------------------------------------------


def test_greedy_text_is_what_steps_give(session: Session) -> None:
    text = "".join(session.generate("Hello", max_tokens=40, ignore_eos=True))
    assert session.position[0] == len("Hello") + 40
    session.reset()
    logits = session.prefill(session.tokenizer.encode("Hello"))
    ids = []
    for _ in range(40):
        ids.append(int(logits[0].argmax()))
        logits = session.step([ids[-1]])
    assert text == session.tokenizer.decode(ids)
    assert text


def test_ids_are_a_prompt_too(session: Session) -> None:
    text = list(session.generate("Hello", max_tokens=10))
    for prompt in (list(b"Hello"), np.frombuffer(b"Hello", dtype=np.uint8)):
        session.reset()
        assert list(session.generate(prompt, max_tokens=10)) == text


def test_a_seed_repeats_and_seeds_differ(session: Session) -> None:
    def sampled(seed: int | None) -> str:
        session.reset()
        return "".join(session.generate("x", max_tokens=40, temperature=1.0, seed=seed, ignore_eos=True))

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)
    assert sampled(None) != sampled(None)


def test_answers_of_one_stream_draw_afresh(session: Session) -> None:
    def answer() -> str:
        return "".join(session.generate("abcdefgh", max_tokens=30, temperature=3.0, seed=1, ignore_eos=True))

    # Eight tokens fill the toy's cache of eight: both answers start from the same window.
    assert answer() != answer()


def test_stops_at_the_end_of_text_and_does_not_feed_it(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = iter([ord("h"), ord("i"), EOS])
    monkeypatch.setattr("sinkrt.sampler.Sampler.sample", lambda *_: next(plan))
    assert list(session.generate("a")) == ["h", "i"]
    assert session.position[0] == 3


def test_ignore_eos_goes_on(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = iter([EOS, ord("h"), EOS, ord("i")])
    monkeypatch.setattr("sinkrt.sampler.Sampler.sample", lambda *_: next(plan))
    assert list(session.generate("a", ignore_eos=True, max_tokens=4)) == ["h", "i"]
    assert session.position[0] == 5


def test_pieces_hold_whole_characters(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = iter("né🙂".encode())
    monkeypatch.setattr("sinkrt.sampler.Sampler.sample", lambda *_: next(plan))
    assert list(session.generate("a", max_tokens=7)) == ["n", "é", "🙂"]


def test_an_answer_that_ends_inside_a_character(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = iter("a🙂".encode())
    monkeypatch.setattr("sinkrt.sampler.Sampler.sample", lambda *_: next(plan))
    assert "".join(session.generate("a", max_tokens=3)) == "a\N{REPLACEMENT CHARACTER}"


def test_the_stream_goes_on_after_an_abandoned_answer(session: Session) -> None:
    for _ in session.generate("Hello", ignore_eos=True):
        if session.position[0] >= 12:
            break
    position = int(session.position[0])
    session.step([1])
    assert session.position[0] == position + 1


@pytest.mark.parametrize("penalty", [1.0, 5.0])
def test_penalty_looks_back_over_the_stream(session: Session, penalty: float) -> None:
    """The history is the session's: what was fed before `generate` counts, as far as the cache reaches."""
    ids = list(range(40, 48))  # C tokens
    logits = session.prefill(ids)[0].copy()
    session.reset()
    session.prefill(ids[:-1])
    chosen: list[int] = []
    step = session.step
    session.step = lambda ids: (chosen.extend(ids), step(ids))[1]  # type: ignore[method-assign, assignment, return-value]
    list(session.generate(ids[-1:], max_tokens=1, repetition_penalty=penalty, ignore_eos=True))
    seen = logits[ids]
    logits[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
    assert chosen == [int(logits.argmax())]


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_bad_options_feed_nothing(session: Session, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))) as caught:
        session.generate("a", **options)
    assert_one_line(caught.value)
    assert session.position[0] == 0


@pytest.mark.parametrize("prompt", ["", [], "\ud800", [1, VOCAB_SIZE], [0.5]], ids=repr)
def test_bad_prompts_feed_nothing(session: Session, prompt: Any) -> None:
    with pytest.raises(UsageError) as caught:
        session.generate(prompt)
    assert_one_line(caught.value)
    assert session.position[0] == 0


def test_generate_needs_one_stream_and_a_tokenizer(tmp_path: Path) -> None:
    with (
        Session.load(build_toy(tmp_path / "two", Toy(batch=2)), threads=1) as session,
        pytest.raises(UsageError, match="batch 1"),
    ):
        session.generate("a")
    with (
        Session.load(build_toy(tmp_path / "mute", tokenizer=False), threads=1) as session,
        pytest.raises(UsageError, match="tokenizer"),
    ):
        session.generate([1])


def test_logits_that_are_no_numbers(session: Session) -> None:
    session.prefill([1, 2, 3])
    session.buffers["window_v.0"].fill(np.nan)
    with pytest.raises(BackendError, match="logits: received nan"):
        list(session.generate("a"))
    session.reset()
    assert np.isfinite(session.step([1])).all(), "reset must clear what masks cannot hide"


# --- bundles that moved or broke -------------------------------------------------------------------------------------


def test_a_moved_bundle_works(tmp_path: Path) -> None:
    build_toy(tmp_path / "here")
    (tmp_path / "far" / "away").mkdir(parents=True)
    moved = (tmp_path / "here").rename(tmp_path / "far" / "away" / "there")
    with Session.load(moved, threads=1) as session:
        np.testing.assert_allclose(session.prefill([1, 2])[0], reference_logits(Toy(), [1, 2])[-1], atol=2e-5)


def test_a_graph_that_is_no_graph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = build_toy(tmp_path / "bundle")
    (bundle / "decode.onnx").write_bytes(b"not a protobuf at all")
    rehash(bundle)
    with pytest.raises(BundleError, match=r"decode\.onnx.*refuses") as caught:
        Session.load(bundle)
    assert_one_line(caught.value)
    assert capfd.readouterr().err == ""  # ONNX Runtime must not log on top of the error


def test_a_graph_of_another_geometry(tmp_path: Path) -> None:
    bundle = build_toy(tmp_path / "bundle")
    other = build_toy(tmp_path / "other", Toy(window_size=7))
    (bundle / "decode.onnx").write_bytes((other / "decode.onnx").read_bytes())
    rehash(bundle)
    with pytest.raises(BundleError, match=r"window_k\.0.*graph and manifest differ") as caught:
        Session.load(bundle)
    assert_one_line(caught.value)


@pytest.mark.parametrize("what", ["ids", "logits", "state names"])
def test_a_manifest_of_another_graph(tmp_path: Path, what: str) -> None:
    import dataclasses

    from sinkrt.contract import load_manifest

    bundle = build_toy(tmp_path / "bundle")
    manifest = load_manifest(bundle)
    graph, states = manifest.graphs["decode"], manifest.states
    if what == "ids":
        graph = dataclasses.replace(graph, inputs=graph.inputs[1:])
    elif what == "logits":
        graph = dataclasses.replace(graph, outputs=(dataclasses.replace(graph.outputs[0], dtype="float16"),))
    else:
        states = (*states, states[0])
    raw = dataclasses.asdict(manifest)
    raw["graphs"] = {"decode": dataclasses.asdict(graph)}
    raw["states"] = [dataclasses.asdict(state) for state in states]
    (bundle / MANIFEST_NAME).write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        Session.load(bundle)
    assert_one_line(caught.value)


def assert_one_line(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text
    assert "received" in text and "expected" in text
    assert len(text) < 600
