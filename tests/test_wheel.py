"""What a wheel brings: the libraries in it, and the kernels where there is no compiler."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from support.levels import needs_kernels
from support.tiny import ANSWER, Bench, needs_compiler, needs_threads, with_unknown

from gatedffn import native
from gatedffn.errors import BuildError
from gatedffn.native import compiler, library, wheel

ROOT = Path(__file__).parents[1]

# the libraries


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


@pytest.fixture
def brought(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries of the tiny source, as a wheel brings them; then the compiler is gone."""
    monkeypatch.setattr(wheel, "FOLDER", bench.folder / "built")
    wheel.FOLDER.mkdir()
    found = wheel.prebuild(bench.source, wheel.FOLDER)
    monkeypatch.setenv("CXX", "/nonexistent")
    return found


@needs_compiler
@needs_threads
def test_what_is_prebuilt_needs_no_compiler_and_no_cache(bench: Bench, brought: list[Path]) -> None:
    for level in native.levels():
        assert bench.load(level) == 42
        assert native.prebuilt(bench.source, level) in brought
    assert native.state(bench.source) == f"prebuilt for {native.levels()[0]}"
    assert not bench.cache.exists()


@needs_compiler
@needs_threads
@pytest.mark.usefixtures("brought")
def test_what_is_prebuilt_is_off_where_compiled_code_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEDFFN_NATIVE", "off")
    with pytest.raises(BuildError, match="switched off"):
        bench.load()


@needs_compiler
@needs_threads
@pytest.mark.usefixtures("brought")
def test_a_level_that_the_wheel_lacks_gives_way_to_one_that_it_has(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_unknown(monkeypatch)
    assert bench.load() == 42
    assert native.state(bench.source) == "prebuilt for portable; a newer compiler may know newest"


@needs_compiler
@needs_threads
@pytest.mark.usefixtures("brought")
@pytest.mark.parametrize("stale", ["source", "header", "flags", "no threads"])
def test_what_is_stale_or_of_no_use_is_compiled_as_before(
    stale: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    match stale:
        case "source":
            bench.write(bench.source, ANSWER % 42 + "// another")
        case "header":
            monkeypatch.setattr(compiler, "source_version", lambda: "another")
        case "flags":
            monkeypatch.setattr(compiler, "FLAGS", [*compiler.FLAGS, "-DANOTHER"])
        case _:
            monkeypatch.setattr(library, "openmp", lambda: None)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        bench.load("portable")
    bench.use_compiler()
    assert bench.load("portable") == 42
    assert len(bench.libraries()) == 1


@needs_compiler
@needs_threads
@pytest.mark.usefixtures("brought")
@pytest.mark.parametrize("damage", [b"", b"no library", None])
def test_what_is_damaged_is_not_loaded(damage: bytes | None, bench: Bench) -> None:
    path = native.prebuilt(bench.source, "portable")
    assert path is not None
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?" if damage is None else damage)
    with pytest.raises(BuildError, match=r"is damaged: install gatedffn again, or delete it"):
        bench.load("portable")


@needs_compiler
def test_no_library_is_brought_that_the_compiler_refuses_for_every_level(bench: Bench) -> None:
    bench.write(bench.source, "int answer() { return nothing; }")
    with pytest.raises(BuildError, match="nothing"):
        wheel.prebuild(bench.source, bench.folder)


# the wheel


def build(target: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


HERE = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is prebuilt")


@pytest.mark.parametrize(
    ("target", "environment"),
    [
        ("wheel:editable", {"CXX": "/nonexistent"}),
        ("sdist", {"CXX": "/nonexistent"}),
        ("wheel", {"CXX": "/nonexistent", "GATEDFFN_NATIVE": "off"}),
    ],
)
def test_what_is_built_without_a_compiler(
    target: str, environment: dict[str, str], tmp_path: Path
) -> None:
    done = build(target, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.iterdir()
    assert made.name.endswith(".tar.gz" if target == "sdist" else "-py3-none-any.whl")


@on_linux
def test_a_wheel_with_kernels_needs_one(tmp_path: Path) -> None:
    done = build("wheel", tmp_path, CXX="/nonexistent", GATEDFFN_NATIVE="on")
    assert done.returncode != 0
    assert "no C++ compiler is found (/nonexistent)" in done.stderr
    assert "GATEDFFN_NATIVE=off builds a wheel without kernels" in done.stderr
    assert not list(tmp_path.iterdir())


INSTALLED = """
import os, sys, torch, gatedffn as gf
from gatedffn.ops import kernels
assert gf.__file__.startswith(sys.prefix), gf.__file__
assert kernels.missing() is None, kernels.missing()
def threads():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
few = gf.FeedForward(512, 2048, backend="few")
definition = gf.FeedForward(512, 2048, backend="definition")
x = torch.randn(1, 512)
alone = threads()
with torch.no_grad():
    found = few(x)
    print(threads() - alone)
    definition.load_state_dict(few.state_dict())
    torch.testing.assert_close(found, definition(x))
    print(threads() - alone)
(explained,) = gf.explain(few)
print(explained.plans["inference"].chosen)
print(explained.kernels)
"""


@pytest.mark.slow
@on_linux
@needs_kernels
@needs_threads
def test_an_installed_wheel_needs_no_compiler(tmp_path: Path) -> None:
    done = build("wheel", tmp_path, GATEDFFN_NATIVE="on")
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.iterdir()
    assert made.name.endswith(f"-{HERE}.whl")
    # A fresh environment, to which the packages of this one, but for ours, are added afterwards.
    fresh = tmp_path / "fresh"
    python = fresh / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
    subprocess.run(
        [*pip, "install", "--quiet", "--no-compile", "--no-deps", "--no-index", str(made)],
        check=True,
    )
    (site,) = fresh.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(str(Path(torch.__file__).parents[1]), encoding="utf-8")
    cache = tmp_path / "cache"
    done = subprocess.run(
        [str(python), "-I", "-c", INSTALLED],
        env={"PATH": "", "GATEDFFN_CACHE": str(cache), "GATEDFFN_TUNE": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = ["2", "2", "few", f"prebuilt for {native.levels()[0]}"]
    assert done.stdout.splitlines() == said, done.stderr
    assert not cache.exists()
