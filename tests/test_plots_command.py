"""The theme of the figures, how they are written, and `gatedffn plot`."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from typer.testing import CliRunner

from gatedffn.cli.app import app, main
from gatedffn.errors import MissingExtra, SettingError, StorageError, UnknownVariant
from gatedffn.files import written_aside
from gatedffn.plots import theme
from gatedffn.plots.catalogue import FIGURES, choose
from gatedffn.variants import VARIANTS

Array = NDArray[np.float64]

ROWS = list(VARIANTS.values())


# the theme


@pytest.mark.parametrize("look", [theme.style, theme.page_style])
def test_every_row_has_a_look_of_its_own(look: Any) -> None:
    looks = [str(look(row)) for row in ROWS]
    assert len(set(looks)) == len(ROWS)


def test_page_and_figures_agree_on_the_look() -> None:
    for row in ROWS:
        style, on_page = theme.style(row), theme.page_style(row)
        assert on_page["light"] == style["color"]
        assert (style["linestyle"] == "-") == (on_page["dashes"] == "")


# Machado, Oliveira and Fernandes 2009, severity 1.
VISIONS = {
    "full": np.eye(3),
    "protan": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deutan": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritan": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
XYZ = np.array(
    [[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07218], [0.01933, 0.11919, 0.95030]]
)


def linear_light(color: str) -> Array:
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(light: Array) -> Array:
    xyz = XYZ @ light.clip(0.0, 1.0) / XYZ.sum(axis=1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0)
    return np.array([116.0 * f[1] - 16.0, 500.0 * (f[0] - f[1]), 200.0 * (f[1] - f[2])])


def closest(colors: tuple[str, ...], vision: str) -> float:
    seen = [lab(VISIONS[vision] @ linear_light(color)) for color in colors]
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))


def contrast(color: str, paper: str) -> float:
    low, high = sorted(float(XYZ[1] @ linear_light(each)) for each in (color, paper))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize(
    ("colors", "paper"), [(theme.COLORS, "#ffffff"), (theme.DARK_COLORS, "#15181c")]
)
def test_colours_stay_apart_for_everyone(colors: tuple[str, ...], paper: str, vision: str) -> None:
    assert closest(colors, vision) > 10.0
    assert min(contrast(color, paper) for color in colors) > 2.7


def test_the_judge_of_colours_rejects_red_beside_green() -> None:
    pair = ("#d73027", "#7a7a00")
    assert closest(pair, "deutan") < 10.0 < closest(pair, "full")


# saving


def test_two_drawings_have_the_same_bytes(tmp_path: Path) -> None:
    first, second = (theme.save(FIGURES["swish"](), tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == ["a.png", "a.svg"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert b"dc:date" not in first[1].read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_text("before")

    def killed() -> None:
        with written_aside(path) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"swish\.png cannot be written: .*another folder"):
        theme.save(Figure(), tmp_path / "file" / "a" / "swish")


# the choice of figures and the command


def test_choices() -> None:
    assert list(choose()) == list(FIGURES)
    assert list(choose(["surface"], ["SwiGLU", "gated-gelu"])) == [
        "surface:swiglu",
        "surface:geglu_tanh",
    ]
    assert list(choose(["surface:silu_glu", "zeros", "zeros"])) == ["surface:swiglu", "zeros"]
    figures = ["swish", "swiglu", "activations", "family", "zeros", "surface:glu"]
    assert list(choose([], ["glu"])) == figures


@pytest.mark.parametrize(
    ("names", "variants", "error", "message"),
    [
        (["famly"], [], SettingError, r"'famly'; did you mean family\? there are swish, "),
        (["surface:relu"], [], SettingError, "'relu' has no gate, so no surface"),
        (["surface"], ["swiglo"], UnknownVariant, "did you mean swiglu"),
        (["swish"], ["glu"], SettingError, "only narrow the figure 'surface'"),
    ],
)
def test_choices_that_cannot_be(
    names: list[str], variants: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        choose(names, variants)


def test_betas_that_no_figure_takes() -> None:
    with pytest.raises(SettingError, match="those of swish and swiglu, which are not among family"):
        choose(["family"], betas=[1.0])


def test_plot_writes_and_prints_paths(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = CliRunner().invoke(app, ["plot", "swish", "--out", str(out), "--html"])
    assert result.exit_code == 0, result.output
    files = [out / "swish.png", out / "swish.svg", out / "gatedffn.html"]
    assert result.output.split() == [str(path) for path in files]
    assert sorted(out.iterdir()) == sorted(files)
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert b"</svg>" in files[1].read_bytes()


def test_plain_plot_writes_every_figure_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatedffn.plots.theme.save", lambda *_: [])
    monkeypatch.setattr("gatedffn.plots.catalogue.FIGURES", dict.fromkeys(FIGURES, Figure))
    command = ["plot", "--json", "--out", str(tmp_path)]
    for options, written in ([], True), (["--no-html"], False), (["zeros"], False):
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 0, result.output
        told = json.loads(result.output)
        assert list(told["figures"]) == (list(FIGURES) if "zeros" not in options else ["zeros"])
        assert (told["page"] is not None) is written
        assert (tmp_path / "gatedffn.html").exists() is written
        (tmp_path / "gatedffn.html").unlink(missing_ok=True)


def test_beta_and_range_of_the_command(tmp_path: Path) -> None:
    options = ["--beta", "0.5", "--beta", "-1", "--range", "-6", "2", "--format", "svg"]
    result = CliRunner().invoke(app, ["plot", "swiglu", *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "swiglu.svg").read_text(encoding="utf-8")
    # Text is text, and what the picture shows is said.
    assert text.count(">beta = 0.5<") == 2
    assert text.count("<desc>") == 1
    assert "beta = -1 goes from 35.911 at −6 to " in text


def test_plot_as_json(tmp_path: Path) -> None:
    command = ["plot", "surface:swiglu", "--format", "png", "--json", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = str(tmp_path / "surface-swiglu.png")
    assert json.loads(result.output) == {"figures": {"surface:swiglu": [written]}, "page": None}
    assert Path(written).exists()


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(app, ["plot", "--help"])
    assert result.exit_code == 0
    assert "gatedffn plot family surface:swiglu" in result.output


def test_a_mistake_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gatedffn", "plot", "swihs"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("gatedffn: no figure is called 'swihs'; did you mean swish or")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("gatedffn.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["plot", "swish", "--out", str(tmp_path)])
    assert isinstance(result.exception, MissingExtra)
    assert "pip install 'gatedffn[plots]'" in str(result.exception)
    assert not list(tmp_path.iterdir())
