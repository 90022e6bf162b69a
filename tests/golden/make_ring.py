"""Write ``ring.json``: where tokens lie in the cache, by the definition and not by ``sinkrt.ring``.

The Python and the C++ ring replay it. Regenerate with ``python -m tests.golden.make_ring``.

Every value is taken from an explicit list of tokens or from unbounded integers, never from the closed forms under
test. Lists of a stream too long to simulate are built for its last C tokens, by stepping back from t.
Numbers stay below 2^53, so that any JSON reader takes them exactly.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("ring.json")

SMALL_RINGS = ((0, 1), (0, 5), (1, 1), (1, 4), (3, 1), (4, 4), (4, 7), (7, 3))
LARGE_RINGS = ((0, 1024), (4, 1020), (4, 1 << 20))
FAR = (10**7, 2**31 - 1, 2**31, 2**33, 2**40, 2**47 - 1)
INV_FREQS = (1.0, 0.75, 10000.0 ** (-2 / 64), 1e-4, 500000.0 ** (-62 / 64), 3.0e-9)


def streamed(num_sink_tokens: int, window_size: int, last: int) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """Simulate: position -> (sinks, ring with -1 for an empty slot, window tokens oldest first)."""
    sinks: list[int] = []
    ring = [-1] * window_size
    window: list[int] = []
    next_slot = 0
    seen = {}
    for token in range(last + 1):
        if token < num_sink_tokens:
            sinks.append(token)
        else:
            ring[next_slot] = token
            next_slot = 0 if next_slot + 1 == window_size else next_slot + 1
            window = [*window, token][-window_size:]
        seen[token] = (list(sinks), list(ring), list(window))
    return seen


def far_state(num_sink_tokens: int, window_size: int, t: int) -> tuple[list[int], list[int], list[int]]:
    """The same for a full cache, from its last W tokens; a slot holds the token with its residue."""
    window = [t - age for age in reversed(range(window_size))]
    ring = [-1] * window_size
    for token in window:
        ring[divmod(token - num_sink_tokens, window_size)[1]] = token
    return list(range(num_sink_tokens)), ring, window


def ring_case(num_sink_tokens: int, window_size: int, t: int, state: tuple[list[int], list[int], list[int]]) -> Any:
    sinks, ring, window = state
    cached = sinks + window
    return {
        "t": t,
        "is_sink": t in sinks,
        "num_sinks": len(sinks),
        "num_window_tokens": len(window),
        # The query's own in-cache position is t before the cache is full and C - 1 from then on.
        "shift": t - cached.index(t),
        "cached_tokens": cached,
        "token_in_slot": ring,
        # A sink's step writes to the ring too: into slot (t - S) mod W with a floored modulo, which no list shows.
        "slot": ring.index(t) if t in window else divmod(t - num_sink_tokens, window_size)[1],
    }


def rings() -> list[Any]:
    out = []
    for num_sink_tokens, window_size in SMALL_RINGS:
        capacity = num_sink_tokens + window_size
        seen = streamed(num_sink_tokens, window_size, 3 * capacity + 7)
        cases = [ring_case(num_sink_tokens, window_size, t, state) for t, state in seen.items()]
        cases += [ring_case(num_sink_tokens, window_size, t, far_state(num_sink_tokens, window_size, t)) for t in FAR]
        out.append({"num_sink_tokens": num_sink_tokens, "window_size": window_size, "cases": cases})
    for num_sink_tokens, window_size in LARGE_RINGS:  # too large for lists
        capacity = num_sink_tokens + window_size
        slots = {t: (t - num_sink_tokens) - (t - num_sink_tokens) // window_size * window_size for t in FAR}
        cases = [
            {
                "t": t,
                "slot": slot,
                "is_sink": False,
                "num_sinks": num_sink_tokens,
                "num_window_tokens": window_size,
                "shift": t - capacity + 1,
            }
            for t, slot in slots.items()
        ]
        out.append({"num_sink_tokens": num_sink_tokens, "window_size": window_size, "cases": cases})
    return out


def phases() -> list[Any]:
    out = []
    for inv_freq in INV_FREQS:
        frequency = round(Fraction(inv_freq) / Fraction(2 * math.pi) * 2**32)
        positions = (0, 1, 3, 65535, 65536, 65537, *FAR)
        cases = [{"t": t, "phase": t * frequency % 2**32} for t in positions]  # Python's integers do not overflow
        out.append({"inv_freq": inv_freq, "frequency": frequency, "cases": cases})
    return out


def render() -> str:
    """The file's text, one case a line."""
    rows = []
    for kind, groups in (("rings", rings()), ("phases", phases())):
        blocks = []
        for group in groups:
            head = json.dumps({key: value for key, value in group.items() if key != "cases"})[:-1]
            cases = ",\n    ".join(json.dumps(case) for case in group["cases"])
            blocks.append(f'  {head}, "cases": [\n    {cases}\n  ]}}')
        rows.append(f' "{kind}": [\n' + ",\n".join(blocks) + "\n ]")
    return "{\n" + ",\n".join(rows) + "\n}\n"


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
