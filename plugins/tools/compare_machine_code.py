"""Compares the machine code of two builds, kernel by kernel: what a change of structure alone must leave as it was.

    cmake -S plugins -B build/plugins -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES=90
    cmake --build build/plugins --target sinkexport_kernels -j
    python plugins/tools/compare_machine_code.py BEFORE/libsinkexport_kernels.a build/plugins/libsinkexport_kernels.a

Takes anything that cuobjdump reads (libraries, object files, cubins), or folders of cubins. Needs no GPU, but
cuobjdump and nvdisasm (CUDA's toolkit; PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm) and c++filt on the PATH.

A kernel that was renamed counts as the same where its code is. Exit code 1: the code of some kernel differs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

INSTRUCTION_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. code: hexadecimal machine code. resources: registers, stack, shared memory."""

    code: str
    resources: str

    def __str__(self) -> str:
        return f"{len(self.code) // (2 * INSTRUCTION_BYTES)} instructions, {self.resources}"


def tool(*command: str, stdin: str | None = None) -> str:
    """What a program of the toolkit prints."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=True)  # noqa: S603 - CUDA's own
    return done.stdout


def read(path: Path) -> dict[str, Kernel]:
    """All kernels of a build, by architecture and demangled name."""
    kernels: dict[str, Kernel] = {}
    for file in sorted(path.glob("*.cubin")) if path.is_dir() else [path]:
        resources: dict[tuple[str, str], str] = {}
        code: dict[tuple[str, str], list[str]] = {}
        arch = name = ""
        for line in tool("cuobjdump", "-sass", str(file)).splitlines():
            if match := re.match(r"\s*code for (sm_\w+)", line):
                arch = match[1]
            elif match := re.match(r"\s*Function : (\S+)", line):
                name = match[1]
                code[arch, name] = []
            elif match := re.search(r"/\* 0x([0-9a-f]{16}) \*/$", line):
                code[arch, name].append(match[1])
        usage = tool("cuobjdump", "-res-usage", str(file))
        for line in usage.splitlines():
            if match := re.match(r"\s*arch = (sm_\w+)", line):
                arch = match[1]
            elif match := re.match(r"\s*Function (\S+):", line):
                name = match[1]
            elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
                resources[arch, name] = f"{match[1]} registers, {match[2]} B stack, {match[3]} B shared"
        names = tool("c++filt", stdin="\n".join(name for _, name in code)).splitlines()
        for ((arch, mangled), words), demangled in zip(code.items(), names, strict=True):
            kernels[f"{arch} {demangled}"] = Kernel("".join(words), resources.get((arch, mangled), "resources unknown"))
    return kernels


def compare(before: dict[str, Kernel], after: dict[str, Kernel]) -> tuple[int, int, list[str]]:
    """How many kernels are the same, how many are under another name, and a paragraph for each other one."""
    same = {name for name in before if before[name] == after.get(name)}
    old = {name: kernel for name, kernel in before.items() if name not in same}
    new = {name: kernel for name, kernel in after.items() if name not in same}
    renamed = collections.Counter(old.values()) & collections.Counter(new.values())
    for side in (old, new):
        left = renamed.copy()
        for name, kernel in list(side.items()):
            if left[kernel]:
                left[kernel] -= 1
                del side[name]
    found = [
        f"{name}\n  before: {old.get(name, 'not there')}\n  after:  {new.get(name, 'not there')}"
        for name in sorted({*old, *new})
    ]
    return len(same), renamed.total(), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    before, after = read(arguments.before), read(arguments.after)
    num_same, num_renamed, differing = compare(before, after)
    print(f"{len(before)} kernels before, {len(after)} after; {num_same} the same, {num_renamed} under another name")
    print(*differing, sep="\n", end="\n" if differing else "")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
