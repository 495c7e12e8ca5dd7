"""Every line of the tables has room on its chip and is made of what it should be, by the data that
the compiler gave; some lines are compiled again, to see that the data is of these kernels.
"""

import json
from typing import Any

import pytest
import triton
from support import ahead, table
from support.ahead import every_target, needs_compiler
from support.table import COMMAND, Record, binary_of, compiled, rows

EVERY = rows()
DATA = table.read()
RECORDS: list[Record] = DATA["rows"]
FUSED = ("hidden_values", "branch_gradients")
# Of each chip one, all kernels and kinds of products among them.
SAMPLE = [
    next(row for row in EVERY if (row.target, row.kernel, row.kind, row.aligned) == wanted)
    for wanted in (
        (80, "few", "half", True),
        (80, "branch_gradients", "half", False),
        (90, "hidden_values", "half", True),
        (100, "branch_gradients", "tf32", True),
        (100, "few, no gate", "float32", True),
    )
]


def of(**wanted: object) -> list[Record]:
    found = [r for r in RECORDS if all(r[name] == value for name, value in wanted.items())]
    assert found, wanted
    return found


def named(record: Record) -> str:
    names = ("kernel", "target", "kind", "cut", "aligned", "tokens")
    return json.dumps({name: record[name] for name in names})


def test_the_data_is_of_every_line() -> None:
    lines = {named(row.named()) for row in EVERY}
    assert {named(record) for record in RECORDS} == lines, f"the tables have changed: {COMMAND}"
    assert len(RECORDS) == len(EVERY)


def test_the_data_is_of_this_compiler() -> None:
    assert DATA["triton"] == triton.__version__, f"Triton has changed: {COMMAND}"


@needs_compiler
@pytest.mark.parametrize("row", SAMPLE, ids=lambda row: f"{row.kernel}-sm_{row.target}-{row.kind}")
def test_some_are_what_the_data_says(row: table.Row, monkeypatch: pytest.MonkeyPatch) -> None:
    (kept,) = (record for record in RECORDS if named(record) == named(row.named()))
    made: dict[str, Any] = json.loads(json.dumps(compiled(row, monkeypatch)))
    assert made == kept, f"the kernels have changed: {COMMAND}"


SPILLING = [
    ("few, no gate", 100, "float32", True, 16, 32),
    ("branch_gradients", 100, "tf32", False, table.TOKENS, 168),
]
"""The lines that do not find room in the registers: slower than they might be, and not wrong."""


@every_target
def test_every_line_fits(target: int) -> None:
    for record in of(target=target):
        if not record["stack"]:
            binary_of(record).assert_fits()
    for record in of(target=target, kind="half", aligned=True):
        binary, times = binary_of(record), record["cut"].get("for_each", 1)
        assert times * binary.shared <= ahead.SHARED[target], f"{times} times: {binary}"
        registers = times * binary.registers * 32 * binary.warps
        assert registers <= ahead.REGISTERS, f"{times} times: {binary}"


def test_no_line_spills_but_two() -> None:
    names = ("kernel", "target", "kind", "aligned", "tokens", "stack")
    spilling = [tuple(record[name] for name in names) for record in RECORDS if record["stack"]]
    assert spilling == SPILLING


@every_target
@pytest.mark.parametrize("kernel", FUSED)
def test_what_fused_kernels_are_made_of(kernel: str, target: int) -> None:
    product = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[target]
    for record in of(kernel=kernel, target=target, kind="half", aligned=True):
        made = set(record["instructions"])
        assert product in made, record
        if target == 80:
            assert "copies of 16 bytes" in made, record
            continue
        assert {"copies of tiles", "stores of tiles"} < made, record
        assert "mma.sync" not in made, record
        assert "loads" not in made or kernel == "hidden_values", record  # the biases
        assert not record["waits"], record
    for kind in ("float32", "tf32"):
        for record in of(kernel=kernel, target=target, kind=kind, aligned=True):
            multiplied = {"mma.sync", "wgmma", "tcgen05"} & set(record["instructions"])
            assert bool(multiplied) == (kind == "tf32"), record


@every_target
@pytest.mark.parametrize("kernel", ["few", "few, no gate"])
def test_few_tokens_read_16_bytes_at_a_time(kernel: str, target: int) -> None:
    for record in of(kernel=kernel, target=target):
        made = set(record["instructions"])
        assert ("loads of 16 bytes" if record["tokens"] == 1 else "copies of 16 bytes") in made
        assert ("mma.sync" in made) == (record["tokens"] > 1 and record["kind"] != "float32")
