"""The file that scales and shifts a model's attention weights, for `export --affine` (affine-scaled attention).

Each query head of a layer turns the softmax weights w of a token into ``a(x) w + b(x) / n`` over the n tokens that it
sees (arXiv:2602.23057); x is the hidden state that the layer's projections read:

    a(x) = activation(scale.weight x + scale.bias)
    b(x) = bias.weight x + bias.bias, or, with scale.average instead of the two, scale.average - a(x)

A safetensors file with any of the tensors ``layers.N.scale.weight``, ``layers.N.bias.weight`` [Hq, hidden],
``layers.N.scale.bias``, ``layers.N.bias.bias`` and ``layers.N.scale.average`` [Hq]. What is absent changes
nothing: a = 1 without scale.weight and scale.bias, b = 0 without any other; an absent weight is 0, an absent scale.bias
1, or 0 beside a scale.weight with an activation. The file's metadata may name the activation of all its scales,
``linear`` (if absent), ``sigmoid`` or ``clip`` (to 0 .. 1).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from sinkrt.contract import AffineAttention, Manifest
from sinkrt.errors import BundleError, UsageError, problem

Array = npt.NDArray[np.float32]

FILE_NAME = "affine_attention.safetensors"
"""Its copy in a bundle, for `verify` and `eval`; the graphs have their own."""

ACTIVATIONS = ("linear", "sigmoid", "clip")
TENSORS: Mapping[str, str] = {
    "scale.weight": "scale_weight",
    "scale.bias": "scale_bias",
    "scale.average": "scale_average",
    "bias.weight": "bias_weight",
    "bias.bias": "bias_bias",
}
"""Name in a layer -> field of `LayerAffine`."""

_NAME = re.compile(r"layers\.(0|[1-9]\d{0,5})\.(.+)")
_DTYPES = ("F16", "F32", "F64")


@dataclasses.dataclass(frozen=True, eq=False)
class LayerAffine:
    """A layer's tensors, float32: weights [Hq, hidden], the others [Hq]; None: absent."""

    activation: str = ACTIVATIONS[0]
    scale_weight: Array | None = None
    scale_bias: Array | None = None
    scale_average: Array | None = None
    bias_weight: Array | None = None
    bias_bias: Array | None = None

    @property
    def has_scale(self) -> bool:
        """Whether there are tensors of a(x); without any it is 1."""
        return self.scale_weight is not None or self.scale_bias is not None

    @property
    def absent_scale_bias(self) -> float:
        """Value of scale.bias where there is none: no change, or what a layer without bias was trained with."""
        return 1.0 if self.activation == "linear" else 0.0

    def changed_heads(self, num_q_heads: int) -> tuple[int, ...]:
        """Query heads that are changed: not a = 1 and b = 0 for every x."""

        def differ(values: Array | None, unchanged: float, absent: float) -> npt.NDArray[np.bool_]:
            """[Hq]."""
            rows = np.full(num_q_heads, absent) if values is None else values
            return (rows.reshape(num_q_heads, -1) != unchanged).any(axis=1)

        is_changed = differ(self.bias_weight, 0, 0) | differ(self.bias_bias, 0, 0)
        if self.has_scale:
            is_changed |= differ(self.scale_weight, 0, 0) | differ(self.scale_bias, 1, self.absent_scale_bias)
        if (self.has_scale and self.activation == "sigmoid") or self.scale_average is not None:
            is_changed |= True
        return tuple(np.flatnonzero(is_changed).tolist())


@dataclasses.dataclass(frozen=True, eq=False)
class AffineFile:
    """A file that was read. layers: those that it has tensors of. raw: its bytes. name: for messages."""

    name: str
    raw: bytes
    layers: Mapping[int, LayerAffine]

    @property
    def sha256(self) -> str:
        """Hash of the file (hex)."""
        return hashlib.sha256(self.raw).hexdigest()

    def facts(self, num_layers: int, num_q_heads: int) -> AffineAttention:
        """The manifest's entry."""
        none = LayerAffine()
        layers = [self.layers.get(i, none) for i in range(num_layers)]
        weights = [w for layer in layers for w in (layer.scale_weight, layer.bias_weight) if w is not None]
        heads = tuple(layer.changed_heads(num_q_heads) for layer in layers)
        return AffineAttention(
            sha256=self.sha256, file=FILE_NAME, has_inputs=any(w.any() for w in weights), heads=heads
        )

    def check_model(self, num_layers: int, num_q_heads: int, hidden_size: int, without: Collection[int] = ()) -> None:
        """without: layers that have no softmax attention.

        Raises: UsageError naming the first tensor that does not fit the model.
        """
        for layer, tensors in sorted(self.layers.items()):
            if layer >= num_layers or layer in without:
                wanted = f"layers 0 .. {num_layers - 1}" if layer >= num_layers else "layers with softmax attention"
                raise self._misfit(f"tensors of layer {layer}", wanted)
            for name, field in TENSORS.items():
                values = getattr(tensors, field)
                shape = (num_q_heads, hidden_size) if name.endswith("weight") else (num_q_heads,)
                if values is not None and values.shape != shape:
                    raise self._misfit(
                        f"'layers.{layer}.{name}' of shape {values.shape}", f"{shape}, as the model has it"
                    )

    def _misfit(self, received: str, expected: str) -> UsageError:
        return UsageError(
            problem(
                "--affine",
                received=f"{received} in '{self.name}'",
                expected=expected,
                fix="make the file for this model",
            )
        )

    @classmethod
    def load(cls, path: Path) -> AffineFile:
        """Read and check a file.

        Raises: UsageError if it cannot be read or is no such file, naming the first thing that is wrong.
        """

        def refused(reason: str) -> UsageError:
            return UsageError(
                problem(
                    "--affine",
                    received=f"'{path}' ({reason})",
                    fix="see docs/sink_tuning.md",
                    expected="a safetensors file of scales and biases",
                )
            )

        try:
            raw = path.read_bytes()
            with safetensors.safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
        except OSError as error:
            raise refused(error.strerror or str(error)) from None
        except safetensors.SafetensorError as error:
            raise refused(str(error)) from None
        activation = metadata.get("activation", ACTIVATIONS[0])
        if activation not in ACTIVATIONS:
            raise refused(f"activation '{activation}', none of {', '.join(ACTIVATIONS)}")
        found: dict[int, dict[str, Array]] = {}
        for name, dtype in sorted(dtypes.items()):
            match = _NAME.fullmatch(name)
            if match is None or match[2] not in TENSORS:
                raise refused(f"unknown tensor '{name}'")
            if dtype not in _DTYPES:
                raise refused(f"'{name}' is {dtype}, none of {', '.join(_DTYPES)}")
            found.setdefault(int(match[1]), {})[TENSORS[match[2]]] = np.empty(0, np.float32)
        arrays = safetensors.numpy.load(raw)
        for layer, tensors in found.items():
            for name, field in TENSORS.items():
                if field in tensors:
                    tensors[field] = arrays[f"layers.{layer}.{name}"].astype(np.float32)
                    if not np.isfinite(tensors[field]).all():
                        raise refused(f"'layers.{layer}.{name}' has numbers that are not finite")
            if "scale_average" in tensors and ("bias_weight" in tensors or "bias_bias" in tensors):
                raise refused(f"layer {layer} has both scale.average and a bias, which is one of the two")
        layers = {layer: LayerAffine(activation, **tensors) for layer, tensors in sorted(found.items())}
        return cls(path.name, raw, layers)


def affine_of(bundle: Path, manifest: Manifest) -> AffineFile | None:
    """Affine file of a bundle; None: its attention weights are those of the softmax.

    Raises: UsageError if the file cannot be read; BundleError if it is not the one that was exported.
    """
    facts = manifest.affine_attention
    if facts is None:
        return None
    file = AffineFile.load(bundle / facts.file)
    if file.sha256 != facts.sha256:
        raise BundleError(
            problem(
                facts.file,
                received=f"sha256 {file.sha256[:12]}..",
                expected=f"{facts.sha256[:12]}..",
                fix="copy or export it again",
            )
        )
    return file
