"""A run on a GPU in words: each bar beside its figure, the card and its limits, and each step."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from gatedffn.bench.gpu_bars import BARS, Bar
from gatedffn.bench.gpu_bars import Record as Record

State = dict[str, Any]
NONE = "-"
VERSIONS = ("python", "torch", "gatedffn", "commit")
OF_GPU = ("driver", "cuda", "triton")


def summary(steps: Mapping[str, State]) -> tuple[str, list[State]]:
    """The text, and the bars with their figures for programs."""
    found = {name: of["records"] for name, of in steps.items()}
    bars = [_bar(bar, bar.figure(found), steps.get(bar.step)) for bar in BARS]
    lines = [
        "# gatedffn on a GPU",
        "",
        *_surroundings(found),
        "",
        *_table(
            ("", "to reach", "found", "", "card", "limits of the same run"),
            [_cells(bar, found) for bar in bars],
        ),
        "",
        "A step that failed or was left is tried again by the same command.",
        "",
        *_table(
            ("step", "", "seconds", "why"),
            [
                (name, of["state"], f"{of.get('seconds') or 0.0:.0f}", "; ".join(of["why"]))
                for name, of in steps.items()
            ],
        ),
    ]
    return "\n".join(lines) + "\n", bars


def _bar(bar: Bar, figure: float | None, of: State | None) -> State:
    state = "left" if of is None else of["state"]
    return {
        "bar": bar.words,
        "step": bar.step,
        "reach": bar.reach,
        "found": figure,
        "met": None if figure is None else bar.met(figure),
        "state": state,
    }


def _cells(bar: State, found: Mapping[str, list[Record]]) -> tuple[str, ...]:
    figure = bar["found"]
    if figure is None:
        return (bar["bar"], bar["reach"], NONE, f"not measured: {bar['state']}", "", "")
    records = found[bar["step"]]
    cards = dict.fromkeys(record["machine"]["gpu"]["name"] for record in records)
    word = "reached" if bar["met"] else "missed"
    return (bar["bar"], bar["reach"], f"{figure:.3g}", word, ", ".join(cards), _limits(records))


def _limits(records: list[Record]) -> str:
    limits = [record["limit"] for record in records if record["kind"] == "time"]
    if not limits:
        return ""
    flops, moved = (
        statistics.median(limit[name] for limit in limits)
        for name in ("flops_per_second", "bytes_per_second")
    )
    return f"product {flops / 1e12:,.1f} TFLOP/s, copy {moved / 1e9:,.0f} GB/s"


def _surroundings(found: Mapping[str, list[Record]]) -> Iterator[str]:
    """Each card and set of versions that figures come from."""
    machines = {
        _machine(record["machine"]): None
        for records in found.values()
        for record in records
        if "machine" in record
    }
    yield from machines or ("Nothing has been measured.",)
    others = {
        f"{record['contestant']} {record['version']}": None
        for records in found.values()
        for record in records
        if record["kind"] == "time" and record["version"]
    }
    if others:
        yield f"Measured: {', '.join(others)}."


def _machine(machine: State) -> str:
    gpu = machine["gpu"]
    versions = [f"{name} {gpu[name]}" for name in OF_GPU]
    versions += [f"{name} {machine[name]}" for name in VERSIONS]
    return f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB: {', '.join(versions)}."


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    for line in (head, ("---",) * len(head), *rows):
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in line)
        yield f"| {' | '.join(cells)} |"
