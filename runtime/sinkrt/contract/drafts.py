"""The graph that verifies drafts: what a manifest says of it, and which output has the new rows of a state.

It takes T = K + 1 tokens of each of the B streams, reads the states and writes none. ``<state>.rows`` is what those
tokens would write there, the state's shape with T tokens; sinks of the window's type have no rows of their own, but the
window's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sinkrt.contract.constants import ROWS_SUFFIX, VERIFY
from sinkrt.contract.rules import require
from sinkrt.contract.schema import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from sinkrt.contract.manifest import Manifest

WINDOW_OF = {"sink_k": "window_k", "sink_v": "window_v"}
"""Kinds of states whose new rows may be those of another kind."""


def num_drafts(graphs: Mapping[str, GraphSpec]) -> int:
    """K, drafted tokens that one run verifies; 0: the bundle has no such graph."""
    return graphs[VERIFY].num_tokens - 1 if VERIFY in graphs else 0


def rows_by_state(manifest: Manifest) -> dict[str, str]:
    """Output of the verify graph with the new rows of each state, by the state's name."""
    outputs = {spec.name for spec in manifest.graphs[VERIFY].outputs}
    found = {}
    for state in manifest.states:
        rows = state.input + ROWS_SUFFIX
        if rows not in outputs and state.kind in WINDOW_OF:
            rows = state.input.replace(state.kind, WINDOW_OF[state.kind], 1) + ROWS_SUFFIX
        found[state.input] = rows
    return found


def check_verify(manifest: Manifest) -> None:
    """Compare the verify graph, if there is one, with the streams and states that the manifest announces.

    Raises: BundleError.
    """
    if VERIFY not in manifest.graphs:
        return
    graph, batch = manifest.graphs[VERIFY], manifest.stream.batch
    num_tokens = graph.num_tokens
    name = f"num_tokens of graph '{VERIFY}'"
    require(num_tokens >= 2, name, num_tokens, "2 at least: a token and one that is drafted")
    inputs = {spec.name: (spec.shape, spec.dtype) for spec in graph.inputs}
    wanted = {"ids": (batch, num_tokens), "position": (batch,), "num_valid": (batch,)}
    integers = {name: (shape, "int64") for name, shape in wanted.items()}
    require(inputs == integers, f"inputs of graph '{VERIFY}'", inputs, str(integers))
    rows = rows_by_state(manifest)
    expected = {"logits": TensorSpec("logits", (batch, num_tokens, manifest.model.vocab_size), "float32")}
    for state in manifest.states:
        shape = (*state.shape[:2], num_tokens, *state.shape[3:])
        spec = TensorSpec(rows[state.input], shape, state.dtype)
        same = expected.setdefault(spec.name, spec)
        require(same == spec, f"rows of state '{state.input}'", "those of another size", f"{state.input}{ROWS_SUFFIX}")
        least = state.shape[2] if state.kind.startswith("window") else num_tokens
        require(num_tokens <= least, name, num_tokens, f"at most {least}, the window of '{state.input}'")
    found = {spec.name: spec for spec in graph.outputs}
    names = f"outputs of graph '{VERIFY}'"
    require(found == expected, names, sorted(found), f"{sorted(expected)} as states have them")
