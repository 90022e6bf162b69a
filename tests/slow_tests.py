"""Write ``slow_tests.txt``: tests that `make test-fast` leaves out, by the time that each took in a whole run.

    make test PYTEST_FLAGS=--junitxml=report.xml && python -m tests.slow_tests report.xml

Tests over LIMIT_S are left out, but the quickest of a file stays if it takes less than KEPT_S: every file that can be
tried in a moment is. What is slow by nature (compilers, the real model) has the mark ``slow`` in its file instead.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

PATH = Path(__file__).with_name("slow_tests.txt")
LIMIT_S, KEPT_S = 0.2, 2.0


def read() -> frozenset[str]:
    """Node ids, as pytest prints them."""
    return frozenset(PATH.read_text(encoding="utf-8").splitlines()) if PATH.is_file() else frozenset()


def slow_of(times: dict[str, float]) -> list[str]:
    """Node ids of the tests to leave out. times: seconds by node id, set-up included."""
    files: dict[str, list[str]] = defaultdict(list)
    for test in times:
        files[test.partition("::")[0]].append(test)
    kept = {min(tests, key=lambda test: (times[test], test)) for tests in files.values()}
    return sorted(
        test
        for test, seconds in times.items()
        if seconds > (KEPT_S if test in kept else LIMIT_S) and test.isprintable()
    )


def times_of(report: Path) -> dict[str, float]:
    """Seconds by node id of a JUnit report."""
    times = {}
    for case in ET.parse(report).iter("testcase"):
        parts = str(case.get("classname")).split(".")
        file = next(i for i, part in enumerate(parts) if part.startswith("test_")) + 1  # what follows is a class
        node = "::".join(["/".join(parts[:file]) + ".py", *parts[file:], str(case.get("name"))])
        times[node] = float(case.get("time", 0))
    return times


if __name__ == "__main__":
    PATH.write_text("\n".join(slow_of(times_of(Path(sys.argv[1])))) + "\n", encoding="utf-8")
