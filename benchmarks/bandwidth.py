"""Measured memory-read bandwidth: the floor under every decode step, which has to read all weights once.

python benchmarks/bandwidth.py [--threads N] [--mib 512]
"""

from __future__ import annotations

import argparse

from sinkexport.bench.machine import PROBE_BYTES, ReadProbe, physical_cores


def main() -> None:
    """Print one thread's and all threads' bandwidth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--mib", type=int, default=PROBE_BYTES >> 20, help="buffer size, far beyond the caches")
    arguments = parser.parse_args()
    for threads in sorted({1, arguments.threads}):
        print(f"{threads} thread(s): {ReadProbe(threads, arguments.mib << 20).gb_per_s():.1f} GB/s")


if __name__ == "__main__":
    main()
