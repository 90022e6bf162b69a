"""Linear attention between layers of softmax attention: its rule for chunks, and streams that stand still."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sinkexport.config import ExportConfig
from sinkexport.recurrent.delta_rule import DecayMasks, chunk_gated_delta_rule
from sinkexport.recurrent.registry import refuse_unknown
from sinkrt import Session
from sinkrt.backends.ort import OrtBackend
from sinkrt.contract import RECURRENT_KINDS
from sinkrt.errors import StateError, UsageError
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from tests.exporter.pipeline.test_families import exported
from tests.exporter.tiny_models import tiny_model
from tests.support import random_ids

HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 4, 8, 16


def arguments(num_tokens: int, kind: str) -> dict[str, torch.Tensor]:
    """float64. ``equal``: one key all along, written with rate 1 and never forgotten, which is the least stable system.
    ``forgetful``: each token forgets nearly all."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key = normal(3, num_tokens, HEADS, KEY_DIM)
    decay = -normal(3, num_tokens, VALUE_HEADS).exp()
    rate = torch.sigmoid(normal(3, num_tokens, VALUE_HEADS))
    if kind == "equal":
        key, decay, rate = key[:, :1].expand_as(key), 0.0 * decay, torch.ones_like(rate)
    if kind == "forgetful":
        decay = 60.0 * decay
    return {
        "query": normal(3, num_tokens, HEADS, KEY_DIM),
        "key": key,
        "g": decay,
        "beta": rate,
        "value": normal(3, num_tokens, VALUE_HEADS, VALUE_DIM),
        "initial_state": normal(3, VALUE_HEADS, KEY_DIM, VALUE_DIM),
    }


def by_steps(given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule itself, a token at a time in float64."""
    query, key = (given[name].repeat_interleave(VALUE_HEADS // HEADS, dim=2) for name in ("query", "key"))
    query, key = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    state, outputs = given["initial_state"], []
    for t in range(query.shape[1]):
        state = state * given["g"][:, t].exp()[..., None, None]
        seen = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        written = given["beta"][:, t, :, None] * (given["value"][:, t] - seen)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], written)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * KEY_DIM**-0.5)
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("kind", ["any", "equal", "forgetful"])
@pytest.mark.parametrize("num_tokens", [2, 3, 16, 61, 64, 200])
def test_chunks_follow_the_rule(num_tokens: int, kind: str) -> None:
    """At most twice as far from float64 as transformers' loop over tokens in float32, or 1e-6."""
    given = arguments(num_tokens, kind)
    single = {name: value.float() for name, value in given.items()}
    wanted = by_steps(given)
    more = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    got = chunk_gated_delta_rule(**single, masks=DecayMasks(num_tokens), **more)
    loop = torch_recurrent_gated_delta_rule(**single, **more)
    for have, theirs, want in zip(got, loop, wanted, strict=True):
        assert have.dtype == torch.float32
        size = want.norm()
        assert (have - want).norm() / size < max(2 * (theirs - want).norm() / size, 1e-6)


def test_what_is_no_token_changes_nothing_to_the_bit() -> None:
    given = {name: value.float() for name, value in arguments(9, "any").items()}
    counts = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    given["g"], given["beta"] = given["g"] * counts, given["beta"] * counts
    _, after = chunk_gated_delta_rule(**given, masks=DecayMasks(9))
    assert torch.equal(after[1:], given["initial_state"][1:])
    assert not torch.equal(after[0], given["initial_state"][0])


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("linear") / "bundle"
    return exported(tiny_model("qwen3_5_text"), folder, ExportConfig(2, 7, batch=3, chunk_size=4))


def rows(session: Session, stream: int) -> list[np.ndarray]:
    """Copies of what linear attention remembers of a stream."""
    states = [state for state in session.manifest.states if state.kind in RECURRENT_KINDS]
    return [np.asarray(session.buffers[state.input])[stream].copy() for state in states]


@pytest.mark.slow
def test_streams_stand_still_to_the_bit(session: Session) -> None:
    session.reset()
    ids = random_ids(3, 12)
    session.prefill(ids)
    before, logits = rows(session, 1), session.logits[1].copy()
    session.step(ids[[0, 2], 0], streams=[0, 2])
    session.prefill(ids[2:, :6], streams=[2])
    assert len(before) == 2
    for was, now in zip(before, rows(session, 1), strict=True):
        np.testing.assert_array_equal(was, now)
    np.testing.assert_array_equal(session.logits[1], logits)
    session.reset([2])
    assert not any(row.any() for row in rows(session, 2))


def test_a_step_that_is_cut_short_cannot_be_repeated(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    session.reset()
    ids = random_ids(3, 5)
    want = session.prefill(ids)[1].copy()

    def interrupted(_backend: OrtBackend) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OrtBackend, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.step([3], streams=[1])
    with pytest.raises(StateError, match=r"stream 1: received one that an error cut short.*reset"):
        session.step([3], streams=[1])
    session.step([3, 4], streams=[0, 2])
    session.reset([1])
    np.testing.assert_allclose(session.prefill(ids[1:2], streams=[1])[1], want, rtol=1e-5)


def test_other_rules_are_refused() -> None:
    stranger = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"those of a Linear in layer 3 \(conv 0, recurrent 0\).*gated delta rule"):
        refuse_unknown({stranger: (3, frozenset({("conv", 0), ("recurrent", 0)}))})
