"""What a process has mapped, as Linux shows it."""

from __future__ import annotations

from pathlib import Path


def mappings_of(file: Path, process: int | str = "self") -> int:
    """How many pieces of a process's memory are mapped from a file, even if another file has its name by now."""
    lines = Path(f"/proc/{process}/maps").read_text(encoding="utf-8").splitlines()
    return sum(line.removesuffix(" (deleted)").endswith(f" {file.resolve()}") for line in lines)


def flags_at(address: int) -> list[str]:
    """Flags of the piece of memory that has this address: ``hg``: huge pages were asked for."""
    found: list[str] = []
    is_here = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            is_here = start <= address < end
        elif is_here and first == "VmFlags:":
            found = rest
    return found
