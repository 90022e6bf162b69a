"""Which instruction set is chosen: the best, or the one that SINKEXPORT_CPU_ISA names; others are refused."""

from __future__ import annotations

import ctypes

import pytest

from tests.plugins.cpu.library import ISAS, isas_here, library


def choose(name: str | None) -> tuple[int, str | None]:
    """The number of the chosen one, or -1 and why not."""
    problem = ctypes.c_char_p()
    chosen = library().sinkexport_cpu_choose_isa(None if name is None else name.encode(), ctypes.byref(problem))
    return chosen, None if problem.value is None else problem.value.decode()


def test_names():
    library().sinkexport_cpu_isa_name.restype = ctypes.c_char_p
    assert tuple(library().sinkexport_cpu_isa_name(i).decode() for i in range(len(ISAS))) == ISAS


def test_the_best_is_chosen_where_none_is_named():
    best = ISAS.index(isas_here()[-1])
    assert choose(None) == (best, None)
    assert choose("") == (best, None)


def test_any_that_the_processor_has_can_be_named(isa):
    assert choose(isa) == (ISAS.index(isa), None)


def assert_refused(name: str) -> None:
    """In one line that says what there is."""
    expected = f"received {name}, expected one that this processor runs: {', '.join(isas_here())}"
    assert choose(name) == (-1, f"SINKEXPORT_CPU_ISA: {expected}")


@pytest.mark.parametrize("name", ["AVX2", "sse", "avx2 "])
def test_unknown_names_are_refused(name):
    assert_refused(name)


def test_what_the_processor_lacks_is_refused():
    for name in set(ISAS) - set(isas_here()):
        assert_refused(name)
