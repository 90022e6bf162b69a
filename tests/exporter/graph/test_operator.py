"""The torch form of the operator and its expansion in standard ONNX operators against the float64 oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes import common
from sinkexport.graph.convert import convert
from sinkexport.graph.graph_pass import PassContext, run_passes
from sinkexport.model.attention import sink_attention, stream_angles
from sinkexport.targets import ONNX, TARGETS
from sinkrt.ring import phase_frequency

from tests.reference.oracle import Act, SinkAttentionOracle


class Operator(torch.nn.Module):
    """Rotation and sink attention of one layer, as a model's attention function calls them."""

    def __init__(
        self,
        inv_freq: np.ndarray,
        capacity: int,
        scale: float,
        softcap: float,
        interleaved: bool,
        alibi_slopes: np.ndarray | None,
        sink_logit: np.ndarray | None,
        sink_scale: np.ndarray | None,
        act: Act | None = None,
    ) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("calibrated", None if act is None else torch.tensor(act.heads).float())
        per_head = (("alibi_slopes", alibi_slopes), ("sink_logit", sink_logit), ("sink_scale", sink_scale))
        for name, values in per_head:
            self.register_buffer(name, None if values is None else torch.from_numpy(values.astype(np.float32)))
        frequency = [phase_frequency(float(f)) for f in inv_freq]
        self.register_buffer("frequency", torch.tensor(frequency, dtype=torch.int64))
        self.capacity, self.scale, self.softcap, self.interleaved = capacity, scale, softcap, interleaved

    def forward(self, q, k, v, position, states, num_valid=None, affine=(None, None)):
        num_tokens = q.shape[2]
        dim = 2 * self.frequency.shape[0]
        partial = dim if dim < q.shape[-1] else 0
        states, mass = (states, []) if self.act is None else (states[:-1], states[-1:])
        sinks = states[:2] if len(states) == 4 else [None, None]
        angles = (None, None)
        if dim:
            cos, sin = stream_angles(position, self.frequency, num_tokens, 0)
            q, k = (
                torch.onnx.ops.rotary_embedding(x, cos, sin, interleaved=self.interleaved, rotary_embedding_dim=partial)
                for x in (q, k)
            )
            if len(states) == 4:
                angles = stream_angles(position, self.frequency, num_tokens, self.capacity - 1)
        act = {}
        if self.act is not None:
            act = {
                "attention_mass": mass[0],
                "calibrated": self.calibrated,
                "act_alpha": self.act.alpha,
                "act_beta": self.act.beta,
                "act_min_queries": self.act.min_queries,
            }
        out = sink_attention(
            q,
            k,
            v,
            *sinks,
            *states[-2:],
            position,
            *angles,
            num_valid,
            self.scale,
            self.softcap,
            self.interleaved,
            alibi_slopes=self.alibi_slopes,
            sink_logit=self.sink_logit,
            sink_scale=self.sink_scale,
            **act,
            affine_scale=affine[0],
            affine_bias=affine[1],
        )
        return [out[0], *(out[1:5] if len(states) == 4 else out[3:5]), *([out[7]] if act else [])]


CASES = [
    # (B, Hq, Hkv, D, rotary_dim, S, W, softcap, interleaved), and what else there is
    (1, 4, 4, 16, 16, 4, 9, 0.0, False),
    (2, 6, 2, 8, 8, 3, 7, 0.0, False),
    (1, 9, 3, 64, 64, 4, 12, 0.0, False),
    (3, 4, 1, 16, 4, 1, 5, 0.0, False),
    (1, 4, 2, 16, 16, 0, 6, 0.0, False),
    (2, 4, 2, 16, 8, 2, 1, 3.0, True),
    (1, 5, 5, 20, 20, 5, 4, 2.0, True),
    (2, 6, 2, 8, 0, 3, 6, 0.0, False, "alibi"),
    (2, 3, 3, 8, 4, 0, 5, 3.0, False, "alibi, sink logit"),
    (2, 10, 2, 8, 4, 3, 6, 0.0, False, "alibi, sink logit"),
]


SCALED = [
    # factors on token 0's weight: (case, of each query head)
    (CASES[1], (0.5, 2.0, 1.0, 1.0, 0.01, 40.0)),
    (CASES[5], (0.3, 1.5, 1.0, 6.0)),  # softcap: the factor comes after it
    (CASES[3], (0.5, 2.0, 1.0, 0.1)),  # one matmul for all query heads
]

CALIBRATED = [
    # later sinks scaled down: (case, factors on token 0's weight, how); GQA and not, softcap and factors, ALiBi, a sink
    # logit; none of some heads, one and several queries before a token can be a sink
    (CASES[1], None, Act(1.3, 0.4, 1, (True, True, False, True, True, True))),
    (CASES[0], None, Act(2.0, 0.0, 3, (True,) * 4)),
    (CASES[5], (0.3, 1.5, 1.0, 6.0), Act(1.0, 0.7, 1, (True, False, True, True))),
    (CASES[3], None, Act(1.2, 0.3, 1, (True, False, True, True))),
    ((2, 3, 3, 8, 4, 2, 5, 3.0, False, "alibi, sink logit"), None, Act(1.0, 0.5, 2, (False, True, True))),
]

ATOL, ACT_ATOL = 2e-5, 2e-4
"""Where later sinks have nearly all of the weights, what the others share is small, and known less exactly."""

FORMS = pytest.mark.parametrize("form", ["torch", "onnx", "tensorrt-native"])


@pytest.mark.parametrize(
    ("case", "sink_scale", "act"),
    [*((case, None, None) for case in CASES), *((*scaled, None) for scaled in SCALED), *CALIBRATED],
    ids=str,
)
@FORMS
def test_against_oracle(case: tuple, sink_scale: tuple | None, act: Act | None, form: str) -> None:
    (batch, *_), (num_sinks, window) = case, case[5:7]
    oracle, operator, states = _subject(case, sink_scale, act)
    atol = ATOL if act is None else ACT_ATOL
    step = operator if form == "torch" else _onnx_form((case, sink_scale, act), 1, form)
    random = np.random.default_rng(7)
    for t in range((6 if act else 3) * (num_sinks + window) + 7):
        q, k, v = _random_tokens(random, case, 1)
        want = oracle.step(q[:, :, 0], k[:, :, 0], v[:, :, 0])
        position = torch.full((batch,), t)
        with torch.no_grad():
            out, *states = step(*(torch.from_numpy(x) for x in (q, k, v)), position, states)
        np.testing.assert_allclose(np.asarray(out)[:, :, 0], want, atol=atol, err_msg=f"t = {t}")


CHUNKS = [
    # T of each of CASES, and some where the sinks straddle chunks, T = W, and T = 2
    *((case, min(case[6], 5)) for case in CASES if case[6] > 1),
    ((2, 4, 2, 8, 8, 5, 6, 0.0, False), 2),
    ((2, 4, 2, 8, 8, 7, 3, 0.0, False), 3),
    ((3, 2, 2, 8, 8, 1, 16, 0.0, False), 16),
    ((2, 4, 1, 8, 4, 0, 4, 2.0, True), 4),
    ((4, 2, 1, 8, 8, 13, 5, 0.0, True), 4),
]


SCALED_CHUNKS = [
    ((2, 4, 2, 8, 8, 5, 6, 2.0, False), 3, (0.2, 1.0, 5.0, 0.9), None),
]

CALIBRATED_CHUNKS = [
    *((case, 5, factors, act) for case, factors, act in (CALIBRATED[0], CALIBRATED[-1])),
    ((2, 4, 1, 8, 4, 1, 4, 2.0, True), 4, None, Act(1.0, 0.4, 1, (True,) * 4)),  # T = W
    ((3, 4, 2, 8, 8, 7, 3, 0.0, False), 2, (0.2, 1.0, 5.0, 0.9), Act(1.2, 0.1, 2, (True, True, False, True))),
]


@pytest.mark.parametrize(
    ("case", "num_tokens", "sink_scale", "act"),
    [*SCALED_CHUNKS, *CALIBRATED_CHUNKS, *((*chunk, None, None) for chunk in CHUNKS)],
    ids=str,
)
@FORMS
@pytest.mark.parametrize("seed", [0, 1])
def test_chunks_against_oracle(
    case: tuple, num_tokens: int, sink_scale: tuple | None, act: Act | None, form: str, seed: int
) -> None:
    """Each stream takes 0 .. T tokens of every chunk, so that their positions drift apart; idle ones change nothing."""
    (batch, *_), (num_sinks, window) = case, case[5:7]
    oracle, operator, states = _subject(case, sink_scale, act)
    atol = ATOL if act is None else ACT_ATOL
    chunk = operator if form == "torch" else _onnx_form((case, sink_scale, act), num_tokens, form)
    random = np.random.default_rng(seed)
    position = np.zeros(batch, dtype=np.int64)
    while position.min() < 6 * window + num_sinks + 7:
        counts = random.integers(0, num_tokens + 1, batch)
        if seed == 1:
            counts[0] = num_tokens  # whole chunks only
        q, k, v = _random_tokens(random, case, num_tokens)
        before = [state.numpy().copy() for state in states]
        with torch.no_grad():
            out, *states = chunk(
                *(torch.from_numpy(x) for x in (q, k, v)), torch.from_numpy(position), states, torch.from_numpy(counts)
            )
        for b in range(batch):
            for i in range(counts[b]):
                want = oracle.step_stream(b, q[b, :, i], k[b, :, i], v[b, :, i])
                at = f"stream {b}, t = {position[b]} + {i}"
                np.testing.assert_allclose(np.asarray(out)[b, :, i], want, atol=atol, err_msg=at)
            if not counts[b]:
                assert all(np.array_equal(old[b], new[b]) for old, new in zip(before, states, strict=True))
        assert np.isfinite(np.asarray(out)).all()
        position += counts


AFFINE = [
    # case, what there is: scale and bias of each query (or one for all: constant), factors on token 0, later sinks
    (CASES[0], "scale, bias", None, None),
    (CASES[1], "scale", None, None),
    (CASES[1], "bias", (0.5, 2.0, 1.0, 1.0, 0.01, 40.0), None),
    (CASES[4], "scale, bias, constant", None, None),
    (CASES[5], "scale, bias", None, None),
    (CASES[7], "scale, bias", None, None),
    (CASES[8], "bias, constant", None, None),
    (CASES[1], "scale, bias", None, CALIBRATED[0][2]),
    (CASES[5], "scale", (0.3, 1.5, 1.0, 6.0), CALIBRATED[2][2]),
    (CALIBRATED[4][0], "bias, constant", None, CALIBRATED[4][2]),
    (CASES[3], "scale, bias", None, CALIBRATED[3][2]),
    (CASES[9], "scale, bias", None, None),
]


@pytest.mark.parametrize(("case", "parts", "sink_scale", "act"), AFFINE, ids=str)
@FORMS
def test_affine_against_oracle(case: tuple, parts: str, sink_scale: tuple | None, act: Act | None, form: str) -> None:
    """Scaled and shifted are the weights after later sinks are calibrated, if they are."""
    (batch, num_q, *_), (num_sinks, window) = case, case[5:7]
    oracle, operator, states = _subject(case, sink_scale, act)
    atol = 5e-5 if act is None else 5 * ACT_ATOL  # as weights, what is uncertain of them is scaled
    random = np.random.default_rng(7)
    pairs, tensors = _random_affine(random, parts, batch, num_q, 1)
    step = operator if form == "torch" else _onnx_form((case, sink_scale, act), 1, form, tensors)
    for t in range(6 * (num_sinks + window) + 7):
        q, k, v = _random_tokens(random, case, 1)
        if "constant" not in parts:
            pairs, tensors = _random_affine(random, parts, batch, num_q, 1)
        want = oracle.step(q[:, :, 0], k[:, :, 0], v[:, :, 0], affine=pairs[:, :, 0])
        position = torch.full((batch,), t)
        with torch.no_grad():
            out, *states = step(*(torch.from_numpy(x) for x in (q, k, v)), position, states, None, tensors)
        np.testing.assert_allclose(np.asarray(out)[:, :, 0], want, atol=atol, err_msg=f"t = {t}")


@pytest.mark.parametrize(
    ("case", "num_tokens", "parts", "act"),
    [
        (CASES[1], 5, "scale, bias", None),
        (CASES[8], 5, "scale, bias", None),
        ((2, 4, 2, 8, 8, 5, 6, 2.0, False), 3, "bias", None),
        ((3, 2, 2, 8, 8, 1, 16, 0.0, False), 16, "scale, bias, constant", None),
        ((4, 2, 1, 8, 8, 13, 5, 0.0, True), 4, "scale, bias", None),
        (CASES[1], 5, "scale, bias", CALIBRATED[0][2]),
        ((3, 4, 2, 8, 8, 7, 3, 0.0, False), 2, "bias", CALIBRATED_CHUNKS[-1][3]),
    ],
    ids=str,
)
@FORMS
def test_affine_chunks_against_oracle(case: tuple, num_tokens: int, parts: str, act: Act | None, form: str) -> None:
    """Each stream takes 0 .. T tokens of every chunk, so that each query sees a number of tokens of its own."""
    (batch, num_q, *_), (num_sinks, window) = case, case[5:7]
    oracle, operator, states = _subject(case, None, act)
    atol = 5e-5 if act is None else 5 * ACT_ATOL
    random = np.random.default_rng(3)
    pairs, tensors = _random_affine(random, parts, batch, num_q, num_tokens)
    chunk = operator if form == "torch" else _onnx_form((case, None, act), num_tokens, form, tensors)
    position = np.zeros(batch, dtype=np.int64)
    while position.min() < 6 * window + num_sinks + 7:
        counts = random.integers(0, num_tokens + 1, batch)
        q, k, v = _random_tokens(random, case, num_tokens)
        if "constant" not in parts:
            pairs, tensors = _random_affine(random, parts, batch, num_q, num_tokens)
        with torch.no_grad():
            out, *states = chunk(
                *(torch.from_numpy(x) for x in (q, k, v)),
                torch.from_numpy(position),
                states,
                torch.from_numpy(counts),
                tensors,
            )
        for b in range(batch):
            for i in range(counts[b]):
                want = oracle.step_stream(b, q[b, :, i], k[b, :, i], v[b, :, i], affine=pairs[b, :, i])
                at = f"stream {b}, t = {position[b]} + {i}"
                np.testing.assert_allclose(np.asarray(out)[b, :, i], want, atol=atol, err_msg=at)
        assert np.isfinite(np.asarray(out)).all()
        position += counts


def _random_affine(
    random: np.random.Generator, parts: str, batch: int, num_q: int, num_tokens: int
) -> tuple[np.ndarray, list[torch.Tensor | None]]:
    """a and b [B, Hq, T, 2] for the oracle, and the operator's tensors, [1, Hq, 1] if they are constant."""
    shape = (1, num_q, 1) if "constant" in parts else (batch, num_q, num_tokens)
    values = [random.normal(mean, 2.0, shape).astype(np.float32) for mean in (1.0, 0.0)]
    is_there = [name in parts for name in ("scale", "bias")]
    pairs = [
        np.broadcast_to(x if there else np.float32(1 - i), (batch, num_q, num_tokens))
        for i, (x, there) in enumerate(zip(values, is_there, strict=True))
    ]
    tensors = [torch.from_numpy(x) if there else None for x, there in zip(values, is_there, strict=True)]
    return np.stack(pairs, axis=-1), tensors


def _subject(
    case: tuple, sink_scale: tuple | None = None, act: Act | None = None
) -> tuple[SinkAttentionOracle, Operator, list[torch.Tensor]]:
    """Oracle, operator and empty states of a case."""
    batch, num_q, num_kv, dim, rotary_dim, num_sinks, window, softcap, interleaved, *more = case
    extras = "".join(more)
    slopes = 2.0 ** -np.arange(1, num_q + 1) if "alibi" in extras else None
    sink_logit = np.linspace(-1.0, 3.0, num_q) if "sink logit" in extras else None
    inv_freq = 10000.0 ** (-np.arange(0, rotary_dim, 2) / max(1, rotary_dim))
    scale = dim**-0.5
    oracle = SinkAttentionOracle(
        batch=batch,
        num_sink_tokens=num_sinks,
        window_size=window,
        inv_freq=inv_freq,
        interleaved=interleaved,
        scale=scale,
        softcap=softcap,
        alibi_slopes=slopes,
        sink_logit=sink_logit,
        sink_scale=sink_scale,
        act=act,
    )
    shapes = [(batch, num_kv, num_sinks, dim)] * 2 * bool(num_sinks) + [(batch, num_kv, window, dim)] * 2
    shapes += [(batch, num_q, 2, window)] * (act is not None)
    factors = None if sink_scale is None else np.array(sink_scale)
    operator = Operator(inv_freq, num_sinks + window, scale, softcap, interleaved, slopes, sink_logit, factors, act)
    return oracle, operator, [torch.zeros(shape) for shape in shapes]


def _random_tokens(random: np.random.Generator, case: tuple, num_tokens: int) -> tuple[np.ndarray, ...]:
    """q [B, Hq, T, D], k and v [B, Hkv, T, D]."""
    batch, num_q, num_kv, dim, *_ = case
    shapes = [(batch, heads, num_tokens, dim) for heads in (num_q, num_kv, num_kv)]
    return tuple(2 * random.standard_normal(shape).astype(np.float32) for shape in shapes)


Subject = tuple[tuple, tuple | None, Act | None]
Shape = tuple[int, ...] | None


@functools.cache
def _converted(subject: Subject, num_tokens: int, affine: tuple[Shape, ...]) -> onnx.ModelProto:
    """The operator in ONNX with this project's own nodes: forms and seeds share it."""
    case, batch = subject[0], subject[0][0]
    _, operator, states = _subject(*subject)
    tokens = [torch.from_numpy(x) for x in _random_tokens(np.random.default_rng(0), case, num_tokens)]
    num_valid = None if num_tokens == 1 else torch.ones(batch, dtype=torch.int64)
    affine_tensors = [None if shape is None else torch.zeros(shape) for shape in affine]
    arguments = (*tokens, torch.zeros(batch, dtype=torch.int64), states, num_valid, affine_tensors)
    model = convert(torch.export.export(operator, arguments, strict=False))
    run_passes(model, ("fold_constants",), PassContext(ONNX))
    return ir.to_proto(model)


@functools.cache
def _session(subject: Subject, num_tokens: int, name: str, affine: tuple[Shape, ...]) -> ort.InferenceSession:
    model = ir.from_proto(_converted(subject, num_tokens, affine))
    (target,) = (target for target in TARGETS if target.name == name)
    run_passes(model, ("expand_attention",), PassContext(target))
    common.NameFixPass()(model)
    assert all(node.domain == "" for node in model.graph)
    assert model.opset_imports == {"": target.opset}
    model.ir_version = target.ir_version
    return ort.InferenceSession(ir.to_proto(model).SerializeToString())


def _onnx_form(
    subject: Subject, num_tokens: int, target: str, affine: Sequence[torch.Tensor | None] = (None, None)
) -> Callable[..., list[torch.Tensor]]:
    """The operator for `target` as ONNX Runtime runs it, each state's input and output being one buffer.

    subject: the arguments of `_subject`.
    """
    session = _session(subject, num_tokens, target, tuple(None if x is None else tuple(x.shape) for x in affine))
    inputs, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))

    def run(q, k, v, position, states, num_valid=None, affine=()):
        binding = session.io_binding()
        arrays = [x.numpy().copy() for x in (q, k, v, position, *states, num_valid, *affine) if x is not None]
        for name, array in zip(inputs, arrays, strict=True):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        own = arrays[4 : 4 + len(states)]
        binding.bind_output(outputs[0])
        for name, array in zip(outputs[1:], own, strict=True):
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        session.run_with_iobinding(binding)
        return [torch.from_numpy(array) for array in (binding.get_outputs()[0].numpy(), *own)]

    return run
