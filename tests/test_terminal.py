"""What the commands show on a terminal of 80 columns, and how they end."""

import io
import os
import subprocess
import sys

import pytest
from compare.conftest import made_up
from rich.console import Console
from typer.testing import CliRunner

from gatedffn.bench.report import HEADERS, MEMORY_HEADERS, SUMMARY_HEADERS
from gatedffn.cli.app import app, as_typed, main
from gatedffn.cli.compare_shown import show_results
from gatedffn.cli.tables import print_table
from gatedffn.compare.look import interval, signed
from gatedffn.errors import DataError
from gatedffn.layouts import LAYOUTS
from gatedffn.variants import VARIANTS


def shown(*arguments: str) -> str:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "80"}).output


def in_columns(text: str) -> list[str]:
    """The lines of a text that fits 80 columns and was cut nowhere."""
    lines = text.splitlines()
    assert lines
    assert "…" not in text
    assert max(map(len, lines)) <= 80
    return lines


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["variants"], list(VARIANTS)),
        (["convert", "--list"], list(LAYOUTS)),
        (["variants", "xielu"], []),
    ],
)
def test_tables_fit_80_columns(arguments: list[str], names: list[str]) -> None:
    lines = in_columns(shown(*arguments))
    for name in names:
        assert any(f"│ {name} " in line for line in lines), name


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (
            HEADERS,
            ["gatedffn, torch.compile (best peer)", "1234", "0.123 12345", *["12.34"] * 3, "0.12"],
        ),
        (HEADERS, ["OpenVINO", "-", "it has no bfloat16 arithmetic for this processor", *[""] * 4]),
        (
            SUMMARY_HEADERS,
            ["gatedffn", "the best peer", "12", "1.23", "0.98", "training-512x768x2048-bfloat16"],
        ),
        (MEMORY_HEADERS, ["gatedffn, tile 1024, save input", "1234.5", "123.4", "0.12", "123,456"]),
    ],
)
def test_the_tables_of_bench_lose_nothing_in_80_columns(head: list[str], body: list[str]) -> None:
    told = io.StringIO()
    print_table(Console(file=told, width=80), head, [body], "a title")
    lines = in_columns(told.getvalue())
    letters = "".join("".join(line.split()) for line in lines)
    cells = [[line.split("│")[i].strip() for line in lines if "│" in line] for i in range(1, 3)]
    assert "".join("".join(cells[0]).split()) == "".join(body[0].split())
    assert letters


def test_the_result_of_a_comparison_fits_80_columns(tmp_path: pytest.TempPathFactory) -> None:
    told = io.StringIO()
    show_results(Console(file=told, width=80), [made_up()], tmp_path, as_json=False)  # type: ignore[arg-type]
    table = told.getvalue().partition("held out, best first")[2].partition("└")[0]
    lines = in_columns(table)
    assert any("│ SwiGLU " in line for line in lines)
    assert "parameters" not in table


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.0123, -0.0004, " [-0.012, -0.0004]"),
        (0.00004, 0.1, " [+4e-05, +0.100]"),
        (-0.1, 0.0, " [-0.100, 0.000]"),
        (None, None, ""),
    ],
)
def test_an_interval_shows_on_which_side_of_nothing_it_is(
    low: float | None, high: float | None, said: str
) -> None:
    assert interval(low, high) == said
    assert signed(-0.0, "-") == "0.000"


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """A function: how the command ends, its code and what it says of it."""

    def end(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["gatedffn", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, capsys.readouterr().err

    return end


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plot", "--format", "jpg"], "'jpg' is no format: png, svg or both"),
        (["plot", "--frmat", "png"], "No such option: --frmat"),
        (["compare", "--steps", "many"], "'--steps'"),
        (["draw"], "No such command 'draw'; see gatedffn --help"),
        (["compare", "--workers", "0"], "--workers is 0: it must be at least 1"),
        (["compare", "--model=gated-conv", "--multiple-of=1"], "--multiple-of: the gated-conv"),
        (["compare", "--model=gated-conv", "--d-model=8"], "use another --d-model"),
        (["explain", "--tokens=0"], "--tokens is 0"),
    ],
)
def test_a_mistake_ends_in_one_line_with_options_as_they_are_typed(
    arguments: list[str], says: str, ended: object
) -> None:
    code, told = ended(*arguments)  # type: ignore[operator]
    assert code == 2
    assert told.startswith("gatedffn: ")
    assert told.count("\n") == 1
    assert says in told


def test_colours_of_others_are_not_passed_on(
    ended: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: object) -> tuple[str, ...]:
        raise DataError("x: \x1b[1mbold\x1b[0m\nand more")

    monkeypatch.setattr(sys.modules["gatedffn.cli.compare"], "all_named", failing)
    assert ended("compare") == (2, "gatedffn: x: bold and more\n")  # type: ignore[operator]


def test_only_the_beginning_of_a_message_is_an_option() -> None:
    options = {"heads": "--heads", "d_model": "--d-model"}
    assert as_typed("heads and d_model: no", options) == "--heads and --d-model: no"
    assert as_typed("the heads is 3", options) == "the heads is 3"


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == "gatedffn 0.1.0\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("gatedffn compare --variant reg", "reglu"),
        ("gatedffn convert --from gpt-o", "gpt-oss"),
    ],
)
def test_a_shell_completes(typed: str, offered: str) -> None:
    words = typed.split()
    asked = {
        **os.environ,
        "_GATEDFFN_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "import sys; sys.argv = ['gatedffn']; from gatedffn.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True)
    assert offered in done.stdout.split(), done.stderr
