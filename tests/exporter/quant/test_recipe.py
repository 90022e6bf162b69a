"""Recipes: the ones that ship, what they may hold, and how a mistake is reported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from sinkexport.config import ExportConfig
from sinkexport.quant.recipe import RECIPES_FOLDER, Recipe, load_recipe, parse_recipe, recipe_names
from sinkrt.errors import UsageError

from tests.support import run_cli

FOLDER = Path(__file__).parents[3] / "recipes"


def raw(recipe: str = "int8-weights", /, **changes: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8"))
    return {**loaded, **changes}


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_by_name_and_by_file_and_can_be_exported(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe == load_recipe(str(FOLDER / f"{name}.yaml"))
    assert recipe.name == name
    for target in recipe.targets:
        if recipe.needs_calibration:
            with pytest.raises(UsageError, match="received no calibration, expected ranges of this model's"):
                ExportConfig(recipe=recipe, target=target)
        else:
            ExportConfig(recipe=recipe, target=target)


def test_the_packages_folder_is_the_projects() -> None:
    assert RECIPES_FOLDER.resolve() == FOLDER.resolve()
    assert {"int8-weights", "int8-dynamic", "int8-smooth", "int4-weights"} <= set(recipe_names())


def keys_of(model: type[pydantic.BaseModel], prefix: str = "") -> set[str]:
    """Every key of the schema, dotted."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        inner = [
            t
            for t in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if isinstance(t, type) and issubclass(t, pydantic.BaseModel)
        ]
        found |= keys_of(inner[0], f"{prefix}{name}.") if inner else {prefix + name}
    return found


def test_readme_explains_every_key_and_no_other() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8").split("## Keys")[1].split("\n```")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    explained = {key for cell in cells for key in re.findall(r"`([a-z_0-9.]+)`", cell)}
    assert explained == keys_of(Recipe)


STATIC = {"mode": "static", "sinks": "separate"}
RANGES = {"method": "minmax", "samples": 4, "length": 64}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"wieghts": 1}, "wieghts: received 1, expected no such key"),
        ({"kv": "int4"}, "kv: received 'int4', expected 'fp' or 'int8'"),
        ({"schema_version": 2}, "schema_version: received 2"),
        ({"name": "A b"}, "name: received 'A b'"),
        ({"weights": {"bits": 5, "granularity": "channel"}}, "weights.bits: received 5, expected 8 or 4"),
        ({"weights": {"bits": 8, "granularity": "channel", "block_size": 32}}, "block_size goes with"),
        ({"weights": {"bits": 4, "granularity": "block", "block_size": 33}}, "weights.block_size: received 33"),
        ({"weights": {"bits": 8, "granularity": "channel", "symmetric": False}}, "needs symmetric: true"),
        ({"activations": {"mode": "static"}}, "sinks goes with mode: static"),
        ({"activations": {"mode": "float", "keep_float": ["*"]}}, "keep_float is of no use with mode: float"),
        ({"activations": STATIC}, "calibration is needed"),
        ({"calibration": RANGES}, "calibration is of no use"),
        ({"activations": STATIC, "calibration": {**RANGES, "percentile": 99.0}}, "percentile goes with"),
        ({"weights": None}, "without weights a recipe has activations.mode: float"),
        ({"smooth": {"alpha": 2}, "calibration": RANGES}, "smooth.alpha: received 2"),
        ({"thresholds": {}}, "thresholds.perplexity_increase: received nothing, expected a value"),
        ({"keep_float": "x"}, "keep_float: received 'x'"),
        ({"targets": []}, "targets"),
        ({"families": {"llama": {"kv": "no"}}}, "for llama: kv: received 'no'"),
        ({"families": {"llama": {"typo": 1}}}, "for llama: typo: received 1, expected no such key"),
    ],
)
def test_mistakes_are_reported_in_one_line(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as failure:
        parse_recipe(raw(**changes), "recipe 'mine.yaml'")
    assert problem in str(failure.value)
    assert str(failure.value).startswith("recipe '")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("content", ["- a list", "just text", "{unclosed: ", "a: 2020-01-01", ""])
def test_files_that_hold_no_recipe(content: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as failure:
        load_recipe(str(file))
    assert "mine.yaml" in str(failure.value)
    assert "\n" not in str(failure.value)


def test_unknown_names_and_missing_files() -> None:
    with pytest.raises(UsageError, match=r"received 'int9', expected bf16-weights \| "):
        load_recipe("int9")
    with pytest.raises(UsageError, match=r"mine\.yaml.*expected a readable YAML file"):
        load_recipe("mine.yaml")


def test_families_replace_keys_and_merge_mappings() -> None:
    recipe = parse_recipe(
        raw(keep_float=["a"], families={"llama": {"keep_float": ["b", "c"], "thresholds": {"kl_divergence": 0.5}}}), "r"
    )
    refined = recipe.for_family("llama")
    assert refined.keep_float == ("b", "c")
    assert refined.thresholds.kl_divergence == 0.5
    assert refined.thresholds.top1_agreement == recipe.thresholds.top1_agreement
    assert recipe.for_family("qwen2") is recipe


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--recipe", "int9"], "recipe: received 'int9'"),
        (["--recipe", "int8-dynamic", "--target", "tensorrt"], "received target tensorrt, expected onnx"),
    ],
)
def test_export_refuses_before_any_work(options: list[str], problem: str, tmp_path: Path) -> None:
    result = run_cli("export", "no-such-model", "-o", tmp_path / "b", *options)
    result.refusal(problem)
    assert not list(tmp_path.iterdir())


def test_an_int8_window_is_refused_for_tensorrt_without_plugins() -> None:
    for config in ({"recipe": parse_recipe(raw("int8-channel", kv="int8"), "r")}, {"kv": "int8"}):
        with pytest.raises(UsageError, match="kv: received int8 with --native"):
            ExportConfig(target="tensorrt", native=True, **config)
        assert ExportConfig(target="tensorrt", **config).has_int8_window


def test_kv_goes_before_the_recipe() -> None:
    recipe = parse_recipe(raw(kv="int8"), "r")
    assert ExportConfig(recipe=recipe).has_int8_window
    assert not ExportConfig(recipe=recipe, kv="fp").has_int8_window
    assert not ExportConfig().has_int8_window


def test_inspect_lists_them() -> None:
    result = run_cli("inspect", "recipes")
    result.succeeded()
    for name in recipe_names():
        assert name in result.out
