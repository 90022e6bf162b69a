"""Writes SentencePiece's `precompiled_charsmap`: a Darts double array and the texts that it points to."""

from __future__ import annotations

import base64
import struct


def charsmap(pairs: dict[str, str]) -> str:
    """The base64 text for what some texts become."""
    texts, places = bytearray(), dict[str, int]()
    for value in pairs.values():
        if value not in places:
            places[value] = len(texts)
            texts += value.encode() + b"\0"
    trie: dict[int, dict] = {}
    leaves: dict[int, int] = {}
    for key, value in pairs.items():
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        leaves[id(node)] = places[value]
    units = _units(trie, leaves)
    blob = struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + bytes(texts)
    return base64.b64encode(blob).decode()


def _units(trie: dict[int, dict], leaves: dict[int, int]) -> list[int]:
    """Units of the double array: label in bits 0-7, whether there is a leaf in bit 8, offset from bit 10 on.

    A node's children are at its base exclusive-or their label, and its leaf at its base.
    """
    units = [0] * 256
    used = {0}
    waiting = [(0, 0, trie)]
    free = 1
    while waiting:
        place, label, node = waiting.pop()
        leaf = id(node) in leaves
        wanted = [*node, *([0] if leaf else [])]
        while free in used:
            free += 1
        base = free - free % 256 if not leaf and 0 not in wanted else free
        while not wanted or any(base ^ byte in used or (base ^ byte) == place for byte in wanted) or base == place:
            base += 1
        units += [0] * (max(base ^ byte for byte in (*wanted, 0)) + 256 - len(units))
        offset = place ^ base
        assert offset < 1 << 21
        units[place] = offset << 10 | leaf << 8 | label
        if leaf:
            used.add(base)
            units[base] = leaves[id(node)] | 1 << 31
        for byte, child in node.items():
            used.add(base ^ byte)
            waiting.append((base ^ byte, byte, child))
    return units
