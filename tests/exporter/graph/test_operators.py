"""The operators' schemas, and the names that passes have for their inputs."""

from __future__ import annotations

import pytest
from sinkexport.graph.operators import BLOCK_ATTENTION, SINK_ATTENTION, Input, schemas


@pytest.mark.parametrize("operator", [SINK_ATTENTION, BLOCK_ATTENTION])
def test_inputs_have_the_names_of_the_schema(operator: str) -> None:
    names = [parameter.name for parameter in schemas()[operator].inputs]
    assert [Input[name.upper()].value for name in names] == list(range(len(names)))
    if operator == SINK_ATTENTION:
        assert len(names) == len(Input)
