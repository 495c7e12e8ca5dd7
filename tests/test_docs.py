"""README, docs and examples: current, runnable, and naming only what exists."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import gatedffn
from gatedffn import docs
from gatedffn.cli.app import app
from gatedffn.errors import GatedFFNError
from gatedffn.interop.checkpoints.opening import ORDER

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
HEADER = "src/gatedffn/activations/scalars.h"
PAGES = docs.pages(ROOT)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Options in the pages that belong to other commands than gatedffn.
FOREIGN_OPTIONS = {"--nproc-per-node", "--array", "--wrap"}
# Files that commands read or write elsewhere; all others that a page in docs/ names must be there.
WRITTEN = {
    "report.md",
    "report.html",
    "summary.json",
    "runs/",
    "claims/",
    "unfinished/",
    "workers.json",
    "differences.png",
    "curves.png",
}
WRITTEN |= {"rates.png", "scales.md", "scales.png", "config.json", "config.original.json"}
WRITTEN |= {"gpu.json", "summary.md"}
WRITTEN |= {*ORDER, "model.safetensors.index.fp16.json"}

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
each_example = pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])


def code(text: str) -> list[str]:
    """Code spans, and the lines of blocks that are not Python."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    lines = [line for kind, block in blocks if kind != "python" for line in block.splitlines()]
    return [*re.findall(r"`([^`\n]+)`", prose), *lines]


def free_python(text: str) -> list[str]:
    """Python blocks that are not the inclusion of an example."""
    blocks = re.finditer(r"(?:^<!-- (\S+) -->\n)?^ *[`~]{3,} *[Pp]y\w*.*$", text, re.M)
    return [block[0] for block in blocks if not (block[1] or "").startswith("examples/")]


def included(text: str) -> list[str]:
    return re.findall(r"^<!-- (examples/\S+) -->\n```python\n", text, re.M)


def make_targets(text: str) -> set[str]:
    return {t for line in code(text) for t in re.findall(r"\bmake ([a-z]+)", line.split("#")[0])}


def commands(text: str) -> set[str]:
    """`gatedffn NAME`, at the start of a line of code or after -m."""
    found = (re.match(r"(?:torchrun .*-m )?gatedffn ([a-z]+)", line) for line in code(text))
    return {match[1] for match in found if match}


def options(text: str) -> set[str]:
    """Long options of gatedffn's commands; those of pip and of docs.py are not written so."""
    lines = (line for line in code(text) if "gatedffn.docs" not in line)
    return {option for line in lines for option in re.findall(r"(?<!\S)--[a-z][a-z-]+", line)}


def missing_files(text: str) -> set[str]:
    """Files and folders in code spans that are neither in the checkout nor in the package."""
    pattern = r"[\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|md|toml|txt|js|png|jsonl?))"
    named = {span for span in code(text) if re.fullmatch(pattern, span)}
    places = (ROOT, ROOT / "src" / "gatedffn")
    return {name for name in named if not any((place / name).exists() for place in places)}


def dead_links(text: str, folder: Path) -> set[str]:
    """Relative links to files or headings that do not exist."""
    dead = set()
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = folder / path
        if not file.exists() or (heading and heading not in headings(file)):
            dead.add(target)
    return dead


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def unknown_names(text: str) -> set[str]:
    """Names such as `gatedffn.hidden_size` or `torch.nn.GLU` in code that do not exist."""
    unknown = set()
    for name in {m for line in code(text) for m in re.findall(r"\bgatedffn(?:\.\w+)+", line)}:
        module, _, attribute = name.rpartition(".")
        try:
            found = hasattr(__import__(module, fromlist=[attribute]), attribute)
        except ImportError:
            found = False
        if not found and name != "gatedffn.docs":
            unknown.add(name)
    return unknown


def cli() -> dict[str, set[str]]:
    """Every sub-command with its long options."""
    group = get_command(app)
    subcommands = getattr(group, "commands", {})
    return {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in subcommands.items()
    }


# The pages as they are.


def test_everything_generated_is_current() -> None:
    assert docs.update(ROOT, check=True) == []


def test_the_readme_has_the_table_and_the_picture() -> None:
    text = README.read_text(encoding="utf-8")
    assert docs.table() in text
    assert all(f"| `{name}` |" in text for name in gatedffn.VARIANTS)
    assert f"]({docs.PICTURES['family'].as_posix()})" in text


@pytest.mark.parametrize("picture", docs.PICTURES.values(), ids=list(docs.PICTURES))
def test_every_drawn_picture_is_shown_and_small(picture: Path) -> None:
    assert any(f"pictures/{picture.name})" in page.read_text(encoding="utf-8") for page in PAGES)
    assert (ROOT / picture).stat().st_size < 300_000


def test_the_notebook_is_the_lesson_and_runs() -> None:
    """Its cells follow each other in one space of names, as they do where it is opened."""
    cells = json.loads((ROOT / docs.NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code == [
        (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
        for path in included((ROOT / docs.LESSON).read_text(encoding="utf-8"))
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named = re.findall(r"\]\((\.\./[^)#]+)", "".join(s for c in cells for s in c["source"]))
    assert len(named) > 5
    missing = [n for n in named if not (ROOT / docs.NOTEBOOK.parent / n).exists()]
    assert not missing


def test_the_first_example_is_the_llama_layer() -> None:
    assert included(README.read_text(encoding="utf-8"))[0] == "examples/llama_mlp.py"


def test_every_example_is_on_a_page_or_linked() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [path.name for path in EXAMPLES if f"examples/{path.name}" not in text] == []


@each_page
def test_python_on_a_page_is_an_example(page: Path) -> None:
    assert free_python(page.read_text(encoding="utf-8")) == []


@each_page
def test_a_page_names_only_what_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = {option for options in cli().values() for option in options}
    assert missing_files(text) <= (WRITTEN if page != README else set())
    assert dead_links(text, page.parent) == set()
    assert make_targets(text) <= set(re.findall(r"^([a-z]+):", makefile, re.M))
    assert commands(text) <= set(cli())
    assert options(text) <= known | FOREIGN_OPTIONS
    assert unknown_names(text) == set()


def test_the_readme_names_the_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert {"compare", "test"} <= make_targets(text)
    assert commands(text) == set(cli())


@each_example
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr()
    assert said.err == ""
    table = "".join(line for line in said.out.splitlines(keepends=True) if line.startswith("|"))
    assert any(table in page.read_text(encoding="utf-8") for page in PAGES)


@each_example
def test_an_example_says_what_it_shows_and_checks_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert "assert" in text
    assert "```" not in text


# The checks themselves: each must find what it is there for.


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("README.md", "docs", "examples"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / HEADER).parent.mkdir(parents=True)
    shutil.copy(ROOT / HEADER, tmp_path / HEADER)
    return tmp_path


def damage(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the picture that is there for the new one, since drawing takes seconds."""
    monkeypatch.setattr(
        docs, "draw", lambda name, path: shutil.copy(ROOT / docs.PICTURES[name], path)
    )


DAMAGED = [
    pytest.param("README.md", "README.md", "`g * u`", "`u * g`", id="table"),
    pytest.param("README.md", "README.md", "strict=True", "strict=False", id="block"),
    pytest.param("examples/widths.py", "docs/maths.md", "11008", "11009", id="example"),
    pytest.param(HEADER, HEADER, "x <= 0.0f", "x < 0.0f", id="scalars"),
]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("file", "page", "old", "new"), DAMAGED)
def test_what_is_not_current_is_named_and_rewritten(
    checkout: Path, file: str, page: str, old: str, new: str
) -> None:
    assert docs.update(checkout) == []
    damage(checkout / file, old, new)
    with pytest.raises(GatedFFNError, match=rf"^{page} is not current: run python -m gatedffn"):
        docs.update(checkout, check=True)
    assert docs.update(checkout) == [checkout / page]
    assert docs.update(checkout, check=True) == []


@pytest.mark.usefixtures("undrawn")
def test_an_example_that_is_only_named_is_filled_in(checkout: Path) -> None:
    page = checkout / "docs" / "new.md"
    page.write_text("# New\n\n<!-- examples/widths.py -->\n\nText.\n", encoding="utf-8")
    docs.update(checkout)
    source = (checkout / "examples" / "widths.py").read_text(encoding="utf-8")
    block = f"<!-- examples/widths.py -->\n```python\n{source}```\n"
    assert page.read_text(encoding="utf-8") == f"# New\n\n{block}\nText.\n"


@pytest.mark.parametrize("name", ["README.md", "examples/llama_mlp.py"])
def test_a_missing_file_is_named(checkout: Path, name: str) -> None:
    (checkout / name).unlink()
    with pytest.raises(GatedFFNError, match=re.escape(name)):
        docs.update(checkout, check=True)


def test_another_picture_is_another(checkout: Path, tmp_path: Path) -> None:
    from gatedffn.plots.theme import figure

    with figure() as drawn:
        axes = drawn.subplots()
        axes.plot([0, 1], [0, 1])
        drawn.savefig(tmp_path / "one.png")
        axes.plot([0, 1], [1, 0])
        drawn.savefig(tmp_path / "two.png")
    assert docs.same_picture(tmp_path / "one.png", tmp_path / "one.png")
    assert not docs.same_picture(tmp_path / "one.png", tmp_path / "two.png")
    assert not docs.same_picture(tmp_path / "one.png", checkout / docs.PICTURES["family"])
    assert not docs.same_picture(tmp_path / "one.png", tmp_path / "none.png")


def test_the_command_ends_with_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gatedffn.docs", "--chek"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "gatedffn.docs: --chek: the only option is --check\n"


@pytest.mark.parametrize(
    "text",
    [
        "```python\nx = 1\n```\n",
        "```py\nx = 1\n```\n",
        "<!-- other.py -->\n```python\nx = 1\n```\n",
        "<!-- examples/widths.py -->\n\n```python\nx = 1\n```\n",
        "~~~python\nx = 1\n~~~\n",
    ],
)
def test_free_python_is_found(text: str) -> None:
    assert free_python(text) != []
    assert free_python("<!-- examples/widths.py -->\n```python\nx = 1\n```\n") == []


def test_names_of_nothing_are_found() -> None:
    text = (
        "[a](none.md) [b](README.md#no-such-heading) [c](https://example.org) `docs/none.md` "
        "`none/` `gatedffn.nothing`\n```sh\nmake nothing\ngatedffn bench\ngatedffn plot --no\n```\n"
    )
    assert dead_links(text, ROOT) == {"none.md", "README.md#no-such-heading"}
    assert missing_files(text) == {"docs/none.md", "none/"}
    assert unknown_names(text) == {"gatedffn.nothing"}
    assert make_targets(text) == {"nothing"}
    assert commands(text) == {"bench", "plot"}
    assert options(text) == {"--no"}
