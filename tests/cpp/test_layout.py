"""Layouts of schema 7 in C++: what Python takes is taken, with the same fingerprint; what it refuses is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sinkrt import BundleError
from sinkrt.contract import MANIFEST_NAME, Manifest

from tests.cpp.probe import Probe, ProbeError
from tests.runtime.layouts import examples, faults, layouts

EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_fault_is_refused_as_python_refuses_it(name: str, probe: Probe, tmp_path: Path) -> None:
    check_both_take(probe, tmp_path, EXAMPLES[name])
    for what, text in faults(EXAMPLES[name]):
        check_both_refuse(probe, tmp_path, what, text)


@settings(max_examples=200, deadline=None)
@given(good=layouts(), data=st.data())
def test_any_layout(probe: Probe, good: Manifest, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_both_take(probe, Path(folder), good)
        check_both_refuse(probe, Path(folder), *data.draw(st.sampled_from(list(faults(good)))))


def check_both_take(probe: Probe, folder: Path, good: Manifest) -> None:
    (folder / MANIFEST_NAME).write_text(good.to_json(), encoding="utf-8")
    assert probe.fingerprint(folder) == good.fingerprint
    assert probe.manifest(folder) == good.to_json()


def check_both_refuse(probe: Probe, folder: Path, what: str, text: str) -> None:
    """The same thing is refused first, in one line."""
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError) as python:
        Manifest.from_json(text)
    with pytest.raises(ProbeError) as cpp:
        probe.fingerprint(folder)
        pytest.fail(f"{what}: taken")
    assert str(cpp.value).partition(": received")[0] == str(python.value).partition(": received")[0], what
    assert "\n" not in str(cpp.value)
