"""Feed-forward blocks that a conversion leaves as they are, though a layout of the table fits."""

import re
from collections.abc import Iterable

from gatedffn.storage.blocks import generic, is_at
from gatedffn.storage.rows import LAYOUTS

MOST_SHOWN = 3


def blocks_left(names: Iterable[str]) -> dict[str, tuple[int, list[str]]]:
    """Modules that hold every matrix of a layout at one of its places, among tensors that are left.

    By their path with {n} for its numbers: how many there are, and the layouts whose names fit.
    """
    rows: dict[str, list[str]] = {}
    for row in LAYOUTS.values():
        for stored in row.stored:
            rows.setdefault(stored.name, []).append(row.name)
    deepest = max(name.count(".") for name in rows) + 1
    held: dict[tuple[str, str], set[str]] = {}
    for name in names:
        words = name.split(".")
        for cut in range(max(0, len(words) - deepest), len(words)):
            rest = ".".join(words[cut:])
            path = ".".join(words[:cut])
            for tail in generic(rest) & rows.keys():
                for row_name in rows[tail]:
                    held.setdefault((path, row_name), set()).add(tail)
    fitting: dict[str, list[str]] = {}
    for (path, row_name), tails in held.items():
        row = LAYOUTS[row_name]
        if {stored.name for stored in row.stored} <= tails and is_at(path, row.places):
            fitting.setdefault(path, []).append(row_name)
    found: dict[str, tuple[int, list[str]]] = {}
    for path, known in fitting.items():
        kind = re.sub(r"(?<![^.])[0-9]+(?![^.])", "{n}", path)
        found[kind] = (found[kind][0] + 1 if kind in found else 1, known)
    return found


def note(names: Iterable[str]) -> list[str]:
    """One line about the blocks that are left, if there are some."""
    parts = []
    for path, (count, known) in blocks_left(names).items():
        more = ", ..." if len(known) > MOST_SHOWN else ""
        blocks = "1 block" if count == 1 else f"{count} blocks"
        parts.append(f"{path} ({blocks}; named as in {', '.join(known[:MOST_SHOWN])}{more})")
    if not parts:
        return []
    return [f"feed-forward blocks left as they were: {'; '.join(parts)}"]
