"""The collector is off inside, and afterwards as it was."""

from __future__ import annotations

import gc

import pytest
from sinkexport.util.garbage import no_garbage_collection


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_as_before(was_enabled: bool) -> None:
    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(ValueError, match="inside"), no_garbage_collection():
            assert not gc.isenabled()
            raise ValueError("inside")
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()


def test_objects_are_set_aside_only_after_imports() -> None:
    before = gc.get_freeze_count()
    with no_garbage_collection(is_lasting=True):
        pass
    assert gc.get_freeze_count() == before
