"""Models whose layers transformers rescales: their weights stay those of the file.

RWKV's outputs stay those of transformers. Mamba's are those before saving, since transformers loads other weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from sinkexport.config import ExportConfig
from sinkexport.pipeline.checks import check_model
from sinkexport.pipeline.export import export_loaded
from sinkexport.sources import load_model
from sinkrt.errors import UsageError

from tests.fidelity.test_derived_weights import random_model
from tests.support import refused


@pytest.mark.parametrize("rescale_every", [0, 2])
def test_weights_stay_those_of_the_file(rescale_every: int, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 5, "rescale_every": rescale_every}
    random_model("RwkvConfig", **sizes).save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    saved = {name: weight.clone() for name, weight in own.state_dict().items()}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, own(ids).logits, rtol=0, atol=0)
    assert all(torch.equal(loaded.model.state_dict()[name], weight) for name, weight in saved.items())
    export_loaded(loaded, tmp_path / "bundle", ExportConfig(num_sink_tokens=2, window_size=9, chunk_size=3))


@pytest.mark.parametrize("family", ["Mamba", "Mamba2", "FalconMamba"])
def test_a_scale_for_training_changes_no_loaded_weight(family: str, tmp_path: Path) -> None:
    sizes = {"head_dim": 8, "num_heads": 12, "n_groups": 4} if family == "Mamba2" else {"state_size": 8}
    model = random_model(f"{family}Config", rescale_prenorm_residual=True, num_hidden_layers=2, **sizes)
    model.save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert all(torch.equal(loaded.model.state_dict()[name], weight) for name, weight in model.state_dict().items())


def test_half_precision_is_refused_by_what_stays_in_float32(tmp_path: Path) -> None:
    random_model("RwkvConfig").save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), "float16")
    with refused("which this family keeps in float32", "--dtype fp32", error=UsageError):
        export_loaded(loaded, tmp_path / "out", ExportConfig(2, 9, dtype="fp16"))


def test_half_precision_is_refused_by_what_the_family_makes_in_float32(tmp_path: Path) -> None:
    model = random_model("LlamaConfig").half()
    model.model.layers[0].mlp.act_fn.slope = torch.nn.Parameter(torch.ones(1))
    with refused("'model.layers.0.mlp.act_fn.slope', which this family keeps in float32", "--dtype fp32"):
        check_model(model, ExportConfig(2, 9, dtype="fp16"))
