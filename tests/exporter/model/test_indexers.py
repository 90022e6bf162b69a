"""Indexers choose all tokens of a cache that they may choose whole; parameters that nothing reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sinkexport.families.indexers import EveryToken, every_token_chosen, find_indexers, refuse_small_indexes
from sinkexport.families.unread import unread_weights

from tests.exporter.tiny_models import tiny_model
from tests.support import refused

LIMITS = {"deepseek_v32": 64, "glm_moe_dsa": 64, "minimax_m3_vl_text": 20}


@pytest.mark.parametrize("name", LIMITS)
def test_a_cache_that_is_larger_is_refused_with_the_number(name: str) -> None:
    model = tiny_model(name)
    refuse_small_indexes(model, LIMITS[name])
    with refused(f"chooses {LIMITS[name]} tokens", f"a cache of {LIMITS[name] + 1}", "--window"):
        refuse_small_indexes(model, LIMITS[name] + 1)


def test_a_dynamic_mask_that_keeps_fewer_is_refused() -> None:
    model = tiny_model("doge")
    refuse_small_indexes(model, 64)
    with refused("keeps 64 tokens", "a cache of 65"):
        refuse_small_indexes(model, 65)


def test_an_unknown_indexer_is_refused() -> None:
    model = tiny_model("deepseek_v32")
    for module in find_indexers(model).values():
        del module.index_topk
    with refused("an indexer of an unknown kind"):
        refuse_small_indexes(model, 4)


@pytest.mark.parametrize("name", LIMITS)
def test_up_to_its_number_an_indexer_chooses_all(name: str) -> None:
    """What the export relies on, by the family's own attention."""
    model = tiny_model(name)
    ids = torch.arange(3, 3 + LIMITS[name])[None]
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        for module in find_indexers(model).values():  # other scores, the same choice
            for parameter in module.parameters():
                parameter.normal_()
        got = model(ids, use_cache=False).logits
    assert float((got - wanted).abs().max()) < 1e-4 * float(wanted.std())


def test_contexts_nest_and_leave_the_model_as_it_was() -> None:
    model = tiny_model("glm_moe_dsa")
    before: dict[str, Any] = find_indexers(model)
    assert len(before) == 1  # the other layer shares it
    with every_token_chosen(model) as outer, every_token_chosen(model) as inner:
        assert [type(one) for one in outer] == [EveryToken]
        assert inner == outer
    assert find_indexers(model) == before


def test_parameters_that_nothing_reads() -> None:
    model = tiny_model("minimax_m3_vl_text")
    indexers = tuple(f"{name}." for name in find_indexers(model))
    unread = unread_weights(model)
    assert unread
    assert unread == {name for name, _ in model.named_parameters() if name.startswith(indexers)}
    unread = unread_weights(tiny_model("gemma3n_text"))  # without the scales that its configuration turns off
    assert {name.rpartition(".")[2] for name in unread} == {"correct_output_scale"}
    assert not unread_weights(tiny_model("llama"))


def test_a_buffer_that_nothing_reads() -> None:
    model = tiny_model("llama")
    model.register_buffer("scale_of_images", torch.ones(3))
    model.model.register_buffer("scratch", torch.ones(3), persistent=False)
    assert unread_weights(model) == {"scale_of_images"}
