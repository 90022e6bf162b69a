"""`verify` passes a good bundle, fails each kind of bad one where it goes wrong, and refuses what it cannot compare."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sinkexport.config import ExportConfig
from sinkexport.evaluation.comparison import default_tolerance
from sinkexport.evaluation.defaults import DEFAULT_TOLERANCE
from sinkexport.evaluation.parity import ParityReport, compare, verify
from sinkexport.reference.calls import calls_reference
from sinkexport.reference.streaming import StreamingReference, streaming_reference
from sinkexport.sources import LoadedModel
from sinkexport.util.progress import silent
from sinkrt.contract import Manifest, load_manifest
from sinkrt.errors import BundleError, UsageError
from sinkrt.ring import Ring

from tests.exporter.tiny_models import COMMON, random_model, tiny_model, tiny_tokenizer
from tests.support import export_model, random_ids, run_cli

S, W, B = 4, 12, 2
C = S + W
CONFIG = ExportConfig(S, W, B)


def export(
    model: Any, folder: Path, config: ExportConfig = CONFIG, tokenizer: Any = None, *, check: bool = True
) -> Path:
    export_model(model, folder, config, tokenizer=tokenizer, check=check)
    return folder


@pytest.fixture(scope="module")
def bundle(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("verify") / "bundle", tokenizer=tiny_tokenizer())


def by_name(report: ParityReport) -> dict[str, Any]:
    return {c.name: c for c in report.comparisons}


def test_good_bundle(bundle: Path, loaded: LoadedModel) -> None:
    threads = torch.get_num_threads()
    stages: list[tuple[str, int, int]] = []
    report = verify(bundle, loaded, report=lambda *stage: stages.append(stage))
    found = by_name(report)
    assert report.passed
    assert report.failures == ()
    assert (found["dense"].positions, found["streaming"].positions) == (C, C + 6 * W) == (C, report.num_tokens)
    assert found["prefill"].positions >= 10
    assert [found[name].reference for name in ("dense", "streaming", "prefill")] == [None, "re-rotating", None]
    for comparison in found.values():
        assert comparison.max_relative_error < 1e-4
        assert comparison.top1_agreement == 1.0
    assert 0 < found["streaming"].max_error < 1e-3  # two implementations: equal bits would mean that one is compared
    assert stages[-1][0] == "prefill"
    assert [done for stage, done, _ in stages if stage == "stream"] == list(range(1, report.num_tokens + 1))
    assert torch.get_num_threads() == threads


def test_report_as_json(bundle: Path, loaded: LoadedModel) -> None:
    report = verify(bundle, loaded, wraps=1, dense_tokens=5)
    facts = json.loads(report.to_json())
    assert facts["passed"] is True
    assert facts["tolerance"] == DEFAULT_TOLERANCE["float32"]
    assert [(c["name"], c["positions"]) for c in facts["comparisons"][:2]] == [("dense", 5), ("streaming", C + W)]


def test_default_tolerance_grows_with_the_float32_angles_of_the_reference(bundle: Path) -> None:
    manifest = load_manifest(bundle)

    def tolerance(dtype: str, window_size: int) -> float:
        facts = dataclasses.replace(manifest.stream, window_size=window_size)
        changed = copy.copy(manifest)  # its states are not looked at
        object.__setattr__(changed, "stream", facts)
        object.__setattr__(changed, "weights_dtype", dtype)
        return default_tolerance(changed)

    assert tolerance("float32", 60) == DEFAULT_TOLERANCE["float32"] == 1e-3
    assert tolerance("float32", 8188) == pytest.approx(2e-6 * 8192)
    assert tolerance("float16", 8188) == DEFAULT_TOLERANCE["float16"]


@pytest.mark.slow
def test_half_precision(tmp_path: Path, loaded: LoadedModel) -> None:
    half = export(tiny_model("llama", dtype=torch.float16), tmp_path / "half", ExportConfig(S, W, B, "fp16"))
    report = verify(half, loaded, wraps=2)
    assert report.passed
    assert report.tolerance == DEFAULT_TOLERANCE["float16"]
    assert by_name(report)["streaming"].max_relative_error > DEFAULT_TOLERANCE["float32"]


def test_text_is_encoded_spread_over_the_streams_and_repeated(
    bundle: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[list[int]] = []
    original = StreamingReference.step

    def step(self: StreamingReference, ids: torch.Tensor) -> torch.Tensor:
        fed.append(ids.tolist())
        return original(self, ids)

    monkeypatch.setattr(StreamingReference, "step", step)
    report = verify(bundle, loaded, text=" ".join(f"w{i}" for i in range(10, 31)), wraps=1)
    assert report.passed
    assert report.ids == "text of 21 tokens"
    # Before them the reference tries itself on some tokens of its own.
    assert fed[-(C + W) :] == [[10 + t % 21, 10 + (10 + t) % 21] for t in range(C + W)]


# --- bundles that are wrong -------------------------------------------------------------------------------------------


def other_weights(folder: Path) -> Path:
    return export(tiny_model("llama", seed=1), folder)


def wrong_frequency(folder: Path) -> Path:
    model = tiny_model("llama")
    model.model.rotary_emb.inv_freq[1] *= 1.02
    return export(model, folder)


def wrong_shift(folder: Path) -> Path:
    """The query is turned back one token too late: nothing shows before the first eviction."""

    class Later(Ring):
        @property
        def capacity(self) -> int:
            return super().capacity + 1

    class Late(ExportConfig):
        def ring(self, own_window: int | None, window_size: int | None = None) -> Ring:
            ring = super().ring(own_window, window_size)
            return Later(ring.num_sink_tokens, ring.window_size)

    return export(tiny_model("llama"), folder, Late(S, W, B), check=False)  # which would refuse it


@pytest.mark.parametrize(
    ("sabotage", "failing", "first_position"),
    [
        (other_weights, {"dense", "streaming"}, 0),
        (wrong_frequency, {"dense", "streaming"}, 1),
        (wrong_shift, {"streaming"}, C),
    ],
)
def test_bad_bundle_fails(
    sabotage: Callable[[Path], Path], failing: set[str], first_position: int, loaded: LoadedModel, tmp_path: Path
) -> None:
    bad = sabotage(tmp_path / "bad")
    before = loaded.model(torch.ones(1, 3, dtype=torch.int64)).logits
    report = verify(bad, loaded)
    found = by_name(report)
    assert not report.passed
    assert {name for name, c in found.items() if c.failed_position is not None} == failing
    assert found["streaming"].failed_position == found["streaming"].worst_position == first_position
    assert found["streaming"].positions == first_position + 1  # it does not go on for minutes
    assert "prefill" not in found
    assert len(report.failures) == len(failing)
    assert (
        f"streaming: error {found['streaming'].max_relative_error:.2e} of the logits' spread at position "
        in (report.failures[-1])
    )
    assert torch.equal(loaded.model(torch.ones(1, 3, dtype=torch.int64)).logits, before)

    lenient = by_name(verify(bad, loaded, tolerance=1e6))
    assert lenient["streaming"].positions == C + 6 * W
    assert lenient["streaming"].max_relative_error > 0.05


class FakeSession:
    """A session made of the reference itself, streaming with a geometry of its own, with errors put in."""

    def __init__(self, reference: StreamingReference) -> None:
        self.reference = reference
        self.spoil: Callable[[int, np.ndarray], None] = lambda _t, _logits: None
        self.forgetful = False
        self.position = 0

    def reset(self) -> None:
        self.reference.reset()
        self.position = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        logits = self.reference.step(torch.from_numpy(ids.copy())).numpy()
        self.spoil(self.position, logits)
        self.position += 1
        return logits

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        skip = 1 if self.forgetful and ids.shape[1] > C else 0
        return [self.step(column) for column in ids.T[skip:]][-1]


def compare_fake(
    manifest: Manifest, loaded: LoadedModel, geometry: tuple[int, int], change: Callable[[FakeSession], None]
) -> ParityReport:
    ids = random_ids(B, C + 6 * W, first=0)
    with streaming_reference(tiny_model("llama"), *geometry) as reference:
        session = FakeSession(reference)
        change(session)
        comparisons = tuple(compare(session, loaded.model, manifest, ids, 1e-3, 256, lambda *_: None))
    return ParityReport("b", "m", "float32", S, W, B, "random", ids.shape[1], 6, 1e-3, comparisons)


class RecordedSession:
    """Steps with these logits [B, N, vocab], and a prefill of them."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits, self.position = logits, 0

    def reset(self) -> None:
        self.position = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        return self.prefill(ids[:, None])

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self.position += ids.shape[1]
        return self.logits[:, self.position - 1]


def test_a_model_that_cannot_be_re_rotated_is_followed(bundle: Path) -> None:
    """Two attention calls a layer; as many tokens as the work allows."""
    model = random_model(transformers.DiffLlamaConfig(**COMMON))
    manifest, ids = load_manifest(bundle), random_ids(B, C + 6 * W, first=0)
    with calls_reference(model, S, W) as reference:
        logits = torch.stack(list(reference.logits(torch.from_numpy(ids))), dim=1).numpy()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    reports = []
    for max_work in (1e99, num_parameters * B * 2 * C * 5.5):
        found = tuple(compare(RecordedSession(logits), model, manifest, ids, 1e-3, 256, silent, max_work=max_work))
        reports.append(ParityReport("b", "m", "float32", S, W, B, "random", ids.shape[1], 6, 1e-3, found))
    assert all(report.passed for report in reports)
    assert [by_name(report)["streaming"].reference for report in reports] == ["call-following"] * 2
    assert [by_name(report)["streaming"].positions for report in reports] == [C + 6 * W, C + 5]
    assert [len(report.remarks) for report in reports] == [0, 1]
    assert f"streaming: {C + 5} of {C + 6 * W} tokens" in reports[1].remarks[0]
    logits[1, C + 2, 5] += 1
    found = tuple(compare(RecordedSession(logits), model, manifest, ids, 1e-3, 256, silent))
    assert found[-1].failed_position == C + 2


def test_fake_session_without_errors_passes(bundle: Path, loaded: LoadedModel) -> None:
    assert compare_fake(load_manifest(bundle), loaded, (S, W), lambda _: None).passed


@pytest.mark.parametrize(("geometry", "position"), [((S - 1, W + 1), C), ((S, W + 1), C), ((S, W - 1), C - 1)])
def test_wrong_eviction_fails_at_its_first_step(
    geometry: tuple[int, int], position: int, bundle: Path, loaded: LoadedModel
) -> None:
    report = compare_fake(load_manifest(bundle), loaded, geometry, lambda _: None)
    assert by_name(report)["streaming"].failed_position == position


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_fails(value: float, bundle: Path, loaded: LoadedModel) -> None:
    def spoil(t: int, logits: np.ndarray) -> None:
        if t == C + 3:
            logits[1, 7] = value

    report = compare_fake(load_manifest(bundle), loaded, (S, W), lambda session: setattr(session, "spoil", spoil))
    assert by_name(report)["streaming"].failed_position == C + 3
    assert not report.passed
    facts = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert facts["comparisons"][1]["max_relative_error"] is None


def test_prefill_that_loses_a_token_fails(bundle: Path, loaded: LoadedModel) -> None:
    report = compare_fake(load_manifest(bundle), loaded, (S, W), lambda session: setattr(session, "forgetful", True))
    found = by_name(report)
    assert found["streaming"].failed_position is None
    assert found["prefill"].failed_position is not None
    assert [line.partition(":")[0] for line in report.failures] == ["prefill"]


def test_an_error_of_the_session_comes_out(bundle: Path, loaded: LoadedModel) -> None:
    def spoil(t: int, _logits: np.ndarray) -> None:
        if t == 20:
            raise BundleError("broken")

    with pytest.raises(BundleError, match="broken"):
        compare_fake(load_manifest(bundle), loaded, (S, W), lambda session: setattr(session, "spoil", spoil))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("mistral", {}, "architecture"),
        ("llama", {"num_hidden_layers": 1}, "layers"),
        ("llama", {"vocab_size": 50}, "vocabulary"),
        ("llama", {"hidden_size": 96}, "hidden size"),
    ],
)
def test_another_model_is_refused(name: str, change: dict[str, int], what: str, bundle: Path) -> None:
    config = tiny_model(name).config
    for key, value in change.items():
        setattr(config, key, value)
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UsageError, match=f"^model's {what}: received .*expected .*bundle"):
        verify(bundle, LoadedModel(other, None, "other"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"wraps": 0}, "^wraps: "),
        ({"dense_tokens": 0}, "^dense_tokens: "),
        ({"tolerance": 0.0}, "^tolerance: "),
        ({"tolerance": float("nan")}, "^tolerance: "),
        ({"text": ""}, "^text: received no tokens"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], reason: str, bundle: Path, loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match=reason):
        verify(bundle, loaded, **arguments)


def test_text_for_a_bundle_without_tokenizer(bundle: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    facts = dataclasses.replace(load_manifest(bundle), tokenizer=None)
    (tmp_path / "manifest.json").write_text(facts.to_json())
    with pytest.raises(UsageError, match="tokenizer"):
        verify(tmp_path, loaded, text="w1 w2")


# --- command line -----------------------------------------------------------------------------------------------------


def test_command_passes(bundle: Path, model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{7 * i % 97}" for i in range(300)))
    out = tmp_path / "report.json"
    arguments = (str(bundle), "--against", str(model_folder), "--text", str(text), "--wraps", "2", "--json", str(out))
    shown = run_cli("verify", *arguments).succeeded()
    lines = shown.out.splitlines()
    assert lines[0].startswith(f"{bundle} against model: S=4 W=12 B=2 float32; 2 wraps, 40 tokens (text of 300 tokens)")
    assert [line.split()[0] for line in lines[2:5]] == ["dense", "streaming", "prefill"]
    assert all(line.rstrip().endswith("ok") for line in lines[2:5])
    assert lines[-1] == "passed"
    assert json.loads(out.read_text())["passed"] is True


def test_command_fails_with_exit_code_1(bundle: Path, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    bad = wrong_shift(tmp_path / "bad")
    shown = run_cli("verify", bad, "--against", model_folder, "--json", out)
    assert shown.code == 1
    assert "FAILED streaming: error " in shown.err
    assert f"at position {C}, above the tolerance of 1.0e-03" in shown.err
    assert "passed" not in shown.out
    assert json.loads(out.read_text())["passed"] is False


def test_command_refuses_with_exit_code_2(bundle: Path, model_folder: Path, tmp_path: Path) -> None:
    tiny_model("mistral").save_pretrained(tmp_path / "other")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    for arguments, reason in (
        ((str(bundle), "--against", str(tmp_path / "other")), "model's architecture"),
        ((str(bundle), "--against", str(tmp_path / "nowhere")), "no such folder"),
        ((str(tmp_path), "--against", str(model_folder)), "manifest.json"),
        ((str(bundle), "--against", str(model_folder), "--text", str(tmp_path / "latin1.txt")), "UTF-8"),
        ((str(bundle), "--against", str(model_folder), "--wraps", "0"), "--wraps"),
        ((str(bundle),), "--against"),
    ):
        run_cli("verify", *arguments).refusal(reason)


def test_the_command_module_imports_nothing_heavy() -> None:
    """`sinkexport verify --help` and bad options answer at once."""
    code = "import sinkexport.commands.verify, sys; sys.exit(any(m in sys.modules for m in ('torch', 'onnxruntime')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
