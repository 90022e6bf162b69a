"""Weights that a graph has only in what the model's code computes of them: found, and missed if they are others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sinkexport.config import ExportConfig
from sinkexport.model.derived_constants import derived_constants
from sinkexport.pipeline.export import export_loaded
from sinkexport.sources import load_model
from sinkrt.errors import UsageError

from tests.exporter.tiny_models import COMMON, tiny_model
from tests.support import refused

CONFIG = ExportConfig(num_sink_tokens=2, window_size=9, chunk_size=3)

FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "factors of two attentions": ("DiffLlamaConfig", {}, "model.layers.1.self_attn.lambda_k1"),
    "joined convolutions": (
        "OlmoHybridConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "model.layers.0.linear_attn.conv1d.weight",
    ),
}


def random_model(config_class: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**{**COMMON, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.25) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_compared_with_the_file(name: str, tmp_path: Path) -> None:
    config_class, changes, parameter = FAMILIES[name]
    random_model(config_class, **changes).save_pretrained(tmp_path / "model")
    export_loaded(load_model(str(tmp_path / "model")), tmp_path / "bundle", CONFIG)
    other = load_model(str(tmp_path / "model"))
    with torch.no_grad():
        other.model.get_parameter(parameter).flatten()[1] += 0.01
    with refused("nowhere in the graph", error=UsageError):
        export_loaded(other, tmp_path / "other", CONFIG)


class Folding(torch.nn.Module):
    """x times exp(a) plus b, and a matrix that is no more than turned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor([0.5, -1.0])), torch.nn.Parameter(torch.ones(2))
        self.matrix = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.a.exp() + self.b) @ self.matrix.mT


def test_constants_of_parameters() -> None:
    found = derived_constants(torch.export.export(Folding(), (torch.ones(1, 2),)))
    by_source = {tuple(one.sources): one.values for one in found}
    assert set(by_source) == {("a",), ("matrix",)}
    torch.testing.assert_close(torch.from_numpy(by_source["a",]), torch.tensor([0.5, -1.0]).exp())


def test_the_padding_row_is_the_files(tmp_path: Path) -> None:
    """transformers 5.23 sets it to zeros in this family as it loads a model."""
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    model = random_model("YoutuConfig", **sizes, num_key_value_heads=6, pad_token_id=0)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0.5
    model.save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    assert bool((loaded.model.model.embed_tokens.weight[0] == 0.5).all())
    export_loaded(loaded, tmp_path / "bundle", CONFIG)


def test_a_buffer_that_is_computed_of_the_configuration(tmp_path: Path) -> None:
    """Falcon-H1's multipliers of a projection's parts, one for each output, are in no file."""
    model = tiny_model("falcon_h1", ssm_multipliers=[1.1, 0.9, 1.2, 0.8, 1.3])
    model.save_pretrained(tmp_path / "model")
    export_loaded(load_model(str(tmp_path / "model")), tmp_path / "bundle", CONFIG)


class Computed(torch.nn.Module):
    """Buffers that no file has: one is read as it is, one times a parameter, one is an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0, 4.0]))
        self.register_buffer("read", torch.tensor([0.5, 1.5]), persistent=False)
        self.register_buffer("factor", torch.tensor([3.0, 5.0]), persistent=False)
        self.register_buffer("number", torch.tensor([1, 2]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.read + self.weight * self.factor + self.number


def test_constants_of_buffers_that_no_file_has() -> None:
    found = derived_constants(torch.export.export(Computed(), (torch.ones(1, 2),)))
    by_source = {tuple(one.sources): one.values.tolist() for one in found}
    assert by_source == {(): [0.5, 1.5], ("weight",): [6.0, 20.0]}
