"""Show the tables of model families and of quantisation recipes."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click
from rich.table import Column, Table

from sinkexport.families import describe
from sinkexport.util.console import listed, table_console

if TYPE_CHECKING:
    from sinkexport.quant.recipe import Recipe


def show_families(as_json: bool) -> None:
    """Print the model families that export."""
    families = describe()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(family) for family in families], indent=1))
        return
    headers = ("models", "positions", "layers", "exact", "remark", "tested by")
    table = Table(Column("family", no_wrap=True), *headers, box=None, pad_edge=False)
    for family in families:
        table.add_row(
            family.family,
            family.examples,
            family.positions,
            family.layers,
            "yes" if family.exact else "no",
            family.reason,
            ", ".join(family.tested_by),
        )
    table_console().print(table)


def show_recipes(as_json: bool) -> None:
    """Print the recipes that come with this package."""
    from sinkexport.quant.recipe import load_recipe, recipe_names

    recipes = [load_recipe(name) for name in recipe_names()]
    if as_json:
        click.echo(json.dumps([recipe.model_dump() for recipe in recipes], indent=1))
        return
    table = Table("recipe", "weights", "inputs", "output projection", "window", "targets", "", box=None, pad_edge=False)
    for recipe in recipes:
        table.add_row(
            recipe.name,
            _weights(recipe),
            recipe.activations.mode,
            recipe.lm_head,
            recipe.kv,
            listed(recipe.targets),
            recipe.description,
        )
    table_console().print(table)


def _weights(recipe: Recipe) -> str:
    weights = recipe.weights
    if weights is None:
        return "as stored" if recipe.stored == "keep" else "float"
    share = "channel" if weights.block_size is None else f"{weights.block_size} inputs"
    return f"int{weights.bits}, a scale per {share}"
