"""Layouts of schema 7: caches of any size, latent ones, recurrent states of any number, models without attention."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sinkrt import BundleError
from sinkrt.contract import AttentionCache, Manifest, attention_entries

from tests.runtime.layouts import CacheSizes, cache, examples, faults, layout, layouts
from tests.runtime.toy import Toy

EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_fault_is_refused_in_one_line(name: str) -> None:
    good = EXAMPLES[name]
    assert Manifest.from_json(good.to_json()) == good
    for what, text in faults(good):
        try:
            Manifest.from_json(text)
        except BundleError as error:
            assert str(error).isprintable(), what
        else:
            pytest.fail(f"{what}: taken")


@settings(max_examples=300, deadline=None)
@given(good=layouts(), data=st.data())
def test_any_layout_is_read_and_any_fault_in_it_refused(good: Manifest, data: st.DataObject) -> None:
    assert Manifest.from_json(good.to_json()) == good
    what, text = data.draw(st.sampled_from(list(faults(good))))
    with pytest.raises(BundleError):
        Manifest.from_json(text)
        pytest.fail(f"{what}: taken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"states": m.states[3:]}, "attention[0]: received 'window_k.0', expected 'window_k.1'"),
        (
            lambda m: {"states": m.states[4:] + m.states[:4]},
            "attention[0]: received 'window_k.0', expected 'window_k.1'",
        ),
        (lambda m: {"attention": m.attention[:-1]}, "attention[2]: received no more, expected 'window_k.2'"),
        (
            lambda m: {"attention": (*m.attention, m.attention[2])},
            "attention[3]: received 'window_k.2', expected no more",
        ),
        (
            lambda m: {"attention": None},
            "state 'window_k.1': received float32 [1, 4, 3, 8], expected float32 [1, 2, 3, 8]",
        ),
        (lambda m: {"attention": ()}, "attention: received 0 caches, expected null or a cache"),
        (lambda m: {"head_windows": ()}, "head_windows: received it beside 'attention'"),
    ],
)
def test_the_first_that_disagrees_is_named(change: object, message: str) -> None:
    good = EXAMPLES["heads by layer"]
    assert callable(change)
    with pytest.raises(BundleError) as error:
        dataclasses.replace(good, **change(good))
    assert message in str(error.value)


def test_calls_of_a_layer_ascend() -> None:
    with pytest.raises(BundleError, match=r"attention\[1\]\.call: received 1, expected above 2, the layer's last"):
        layout([CacheSizes(cache(0, 2)), CacheSizes(cache(0, 1))])


def test_uniform_caches_have_one_form() -> None:
    """What `model` says already is not said again: a bundle has one manifest, and one fingerprint."""
    good = layout([CacheSizes(cache(0)), CacheSizes(cache(1))])
    assert good.attention is None and good.caches == (cache(0), cache(1))
    with pytest.raises(BundleError, match="attention: received the sizes that 'model' has, expected null"):
        dataclasses.replace(good, attention=good.caches)
    assert attention_entries(good.model, [cache(0), cache(0)]) == (cache(0), cache(0))


def test_no_attention_is_said_twice() -> None:
    good = EXAMPLES["no attention"]
    assert good.caches == () and good.attention == () and good.is_recurrent
    for change, message in (
        ({"attention": None}, "attention: received null, expected an empty list"),
        ({"attention": (cache(0),)}, "attention: received 1 caches, expected an empty list"),
    ):
        with pytest.raises(BundleError, match=message):
            dataclasses.replace(good, **change)
    for name in ("num_q_heads", "num_kv_heads", "head_dim"):
        with pytest.raises(BundleError, match=r"model\.(num_q_heads|head_dim)"):
            dataclasses.replace(good.model, **{name: 8})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, r"attention\.num_q_heads: received 4, expected a multiple of num_kv_heads=3"),
        ({"num_kv_heads": 0}, r"attention\.num_kv_heads: received 0, expected >= 1"),
        ({"latent": True}, r"attention\.num_kv_heads: received 2, expected 1 in a latent cache"),
        (
            {"latent": True, "num_kv_heads": 1, "value_dim": 9},
            r"attention\.value_dim: received 9, expected at most key_dim=8",
        ),
        ({"value_dim": 0}, r"attention\.value_dim: received 0, expected >= 1"),
        ({"call": -1}, r"attention\.call: received -1, expected >= 0"),
    ],
)
def test_sizes_of_a_cache(change: dict[str, int], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        dataclasses.replace(cache(0), **change)  # type: ignore[arg-type]


def test_the_fingerprint_knows_the_sizes() -> None:
    """Key and value sizes may be exchanged without another change: a saved state must not fit."""
    one, other = (layout([CacheSizes(cache(0, dims=dims))], toy=Toy()) for dims in ((8, 16), (16, 8)))
    assert one.fingerprint != other.fingerprint
    plain = layout([CacheSizes(cache(0))])
    raw = json.loads(plain.to_json())
    del raw["attention"]
    raw["schema_version"] = 6
    assert Manifest.from_json(json.dumps(raw)).fingerprint == plain.fingerprint


def test_names() -> None:
    assert [AttentionCache(3, call, 1, 1, 1, 1, latent=False).suffix for call in (0, 1, 12)] == [
        "3",
        "3.call1",
        "3.call12",
    ]
