"""Libraries of C++: what is built when, where it is kept, and what is said when it fails."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import (
    ANSWER,
    COMPILER,
    Bench,
    needs_compiler,
    needs_threads,
    run_python,
    with_unknown,
)

from gatedffn import native
from gatedffn.errors import BuildError
from gatedffn.native import cache, compiler, cpu, library


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


ONCE = ["compile", "link"]

# building


@needs_compiler
def test_built_once_and_kept(bench: Bench) -> None:
    assert bench.load() == 42
    assert bench.load() == 42
    assert bench.steps() == ONCE
    assert len(bench.libraries()) == 1
    left = {path.suffix for path in bench.cache.iterdir()}
    assert left == {".so", ".lock"}  # nothing half made is left


@needs_compiler
@pytest.mark.parametrize("level", native.levels())
def test_each_level_is_a_library_of_its_own(level: str, bench: Bench) -> None:
    assert bench.load(level) == 42
    (name,) = bench.libraries()
    assert name.startswith(f"tiny-{level}-")


@needs_compiler
def test_without_a_level_the_best_one_is_built(bench: Bench) -> None:
    bench.load()
    assert bench.load(native.levels()[0]) == 42
    assert bench.steps() == ONCE


def test_the_last_level_asks_nothing_of_the_machine() -> None:
    assert native.levels()[-1] == "portable"
    assert native.LEVELS["portable"] == native.Level((), ())


@needs_compiler
def test_the_library_changes_with_all_that_it_depends_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.load()
    built = 1
    changes: dict[str, tuple[object, str, object]] = {
        "flags": (compiler, "FLAGS", [*compiler.FLAGS, "-DANOTHER"]),
        "compiler version": (library, "version", lambda _: "another"),
        "compiler": (library, "find_compiler", lambda: [COMPILER]),
        "its options": (library, "find_compiler", lambda: [COMPILER, "-DAN_OPTION"]),
        "processor": (library, "processor", lambda: "another"),
        "headers": (compiler, "source_version", lambda: "another"),
        "threads": (library, "openmp", lambda: None),
    }
    for what, (owner, name, value) in changes.items():
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, value)
            assert bench.load() == 42
        built += 1
        assert len(bench.libraries()) == built, what
    bench.write(bench.source, ANSWER % 43)
    assert bench.load() == 43
    assert len(bench.libraries()) == built + 1
    before = bench.steps()
    bench.write(bench.source, ANSWER % 42)
    assert bench.load() == 42
    assert bench.steps() == before, "what was built before is found again"


def test_every_source_and_header_counts_towards_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ops").mkdir()
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "native" / "compiler.py"))
    seen = set()
    for name, text in (("a.cpp", "1"), ("ops/b.h", "1"), ("ops/b.h", "2"), ("ops/b.py", "1")):
        Bench.write(tmp_path / name, text)
        seen.add(compiler.source_version.__wrapped__())
    assert len(seen) == 3  # Python files do not count


# failing


def no_compiler(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("CXX", wish)
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize(("wish", "tried"), [("/nonexistent -O1", "/nonexistent"), ("", "g++")])
def test_without_a_compiler_the_error_says_what_to_do(
    wish: str, tried: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_compiler(monkeypatch, wish)
    with pytest.raises(BuildError, match="install g\\+\\+ or clang, or set CXX") as raised:
        bench.load()
    assert tried in str(raised.value)
    assert not bench.cache.exists()


WITHOUT_COMPILER = """
import torch
from gatedffn.functional import gating
from gatedffn.ops import kernels
gate, up = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
hidden = gating(gate, up, "swiglu")
hidden.sum().backward()
torch.testing.assert_close(hidden, torch.nn.functional.silu(gate) * up)
assert gate.grad is not None
print(kernels.missing())
"""


@pytest.mark.usefixtures("bench")
def test_without_a_compiler_everything_runs_on_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiler(monkeypatch, "/nonexistent")
    done = run_python(WITHOUT_COMPILER)
    assert "no C++ compiler is found (/nonexistent)" in done.stdout, done.stderr
    assert "warn" not in done.stderr.lower()


@needs_compiler
@pytest.mark.parametrize("failing", ["compile", "link"])
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(failing: str, bench: Bench) -> None:
    path = bench.use_compiler(f'[ $step = {failing} ] && {{ echo "no space left" >&2; exit 3; }}')
    with pytest.raises(BuildError, match=r"failed with 3: no space left") as raised:
        bench.load()
    assert str(path) in str(raised.value)
    assert {each.suffix for each in bench.cache.iterdir()} == {".lock"}
    bench.use_compiler()
    assert bench.load() == 42


@needs_compiler
def test_a_level_that_the_compiler_does_not_know_gives_way_to_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_unknown(monkeypatch)
    assert bench.load() == 42
    assert native.state(bench.source) == (
        "compiled here for portable; a newer compiler may know newest"
    )
    with pytest.raises(BuildError, match="-mno-such-instructions"):
        bench.load("newest")


@needs_compiler
def test_a_compiler_that_is_killed_says_nothing_of_a_level(bench: Bench) -> None:
    bench.use_compiler("[ $step = compile ] && kill -9 $$")
    with pytest.raises(BuildError, match="failed with -9") as raised:
        bench.load()
    assert not isinstance(raised.value, native.Refused)


@needs_compiler
def test_a_source_that_does_not_compile(bench: Bench) -> None:
    bench.write(bench.source, "int answer() { return nothing; }")
    with pytest.raises(BuildError, match="nothing"):
        bench.load()
    assert bench.libraries() == set()


@needs_compiler
def test_a_compiler_that_prints_much_is_cut(bench: Bench) -> None:
    bench.use_compiler("[ $step = compile ] && { yes | head -c 100000 >&2; exit 1; }")
    with pytest.raises(BuildError) as raised:
        bench.load()
    assert len(str(raised.value)) < 5000


@pytest.mark.parametrize("word", ["off", "OFF", "0", "no", "false"])
def test_switched_off(word: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEDFFN_NATIVE", word)
    assert not native.enabled()
    with pytest.raises(BuildError, match="GATEDFFN_NATIVE"):
        bench.load()
    assert bench.steps() == []


def test_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("", "on", "1"):
        monkeypatch.setenv("GATEDFFN_NATIVE", word)
        assert native.enabled()


def test_a_level_that_does_not_run_here(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "levels", lambda: ("avx2", "portable"))
    for level in ("avx512", "neon"):
        with pytest.raises(BuildError, match=f"'{level}' does not run here.*avx2, portable"):
            bench.load(level)
    assert bench.steps() == []


def test_a_level_whose_check_fails_or_is_unknown_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.delattr(torch.cpu, "_init_amx")
    found = cpu.levels.__wrapped__()
    assert "avx512" not in found
    assert "amx" not in found
    assert found[-1] == "portable"


# the cache folder


def test_the_folder_is_made_for_the_user_alone(bench: Bench) -> None:
    assert native.cache_folder() == bench.cache
    assert stat.S_IMODE(bench.cache.stat().st_mode) == 0o700


def test_without_a_wish_it_is_under_the_cache_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GATEDFFN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native.cache_folder() == tmp_path / "xdg" / "gatedffn"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # ignored, as its specification has it
    assert native.cache_folder() == tmp_path / "home" / ".cache" / "gatedffn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native.cache_folder() == tmp_path / "home" / ".cache" / "gatedffn"


@pytest.mark.parametrize("mode", [0o770, 0o757, 0o720, 0o702, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(mode: int, bench: Bench) -> None:
    bench.cache.mkdir()
    bench.cache.chmod(mode)
    with pytest.raises(BuildError, match=r"not private: others .*chmod go-w it; or set GATEDFFN"):
        bench.load()
    assert list(bench.cache.iterdir()) == []


def test_a_folder_that_others_may_read_is_fine(bench: Bench) -> None:
    bench.cache.mkdir()
    bench.cache.chmod(0o755)
    assert native.cache_folder() == bench.cache


def test_the_folder_of_another_user_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.cache.mkdir()
    me = os.getuid()
    monkeypatch.setattr(cache, "ROOT", me + 2)
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(BuildError, match=f"belongs to user {me}.*chown it; or set GATEDFFN_CACHE"):
        native.cache_folder()


@needs_compiler
def test_what_root_made_is_run_by_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.load()
    bench.cache.chmod(0o755)
    (path,) = bench.cache.glob("*.so")
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    me = os.getuid()
    monkeypatch.setattr(cache, "ROOT", me)
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert bench.load() == 42
    assert bench.steps() == ONCE


@pytest.fixture
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home in which nothing can be made; the folder for temporary files."""
    (tmp_path / "home").write_text("a file is in the way")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for name in ("GATEDFFN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    cache._temporary.cache_clear()
    yield temporary
    cache._temporary.cache_clear()


def test_without_a_home_it_is_private_among_temporary_files_and_said_once(
    no_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = native.cache_folder()
    assert folder == no_home / f"gatedffn-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert native.cache_folder() == folder
    (said,) = caplog.messages
    assert f"are kept in {folder}, for as long as that lasts: " in said


@pytest.mark.parametrize("how", ["link", "readable", "owner", "file"])
def test_what_another_put_in_its_place_is_not_taken(
    how: str, no_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = os.getuid()
    folder = no_home / f"gatedffn-{me}"
    if how == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "theirs")
    elif how == "file":
        folder.touch(0o700)
    elif how == "readable":
        folder.mkdir()
        folder.chmod(0o755)
    else:
        folder.mkdir(0o700)
        folder.rename(no_home / f"gatedffn-{me + 1}")
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(BuildError, match="is not a folder that you alone may enter"):
        native.cache_folder()


def test_a_folder_that_cannot_be_made(bench: Bench) -> None:
    bench.write(bench.cache, "a file is in the way")
    with pytest.raises(BuildError, match=r"no cache folder: .*; set GATEDFFN_CACHE"):
        native.cache_folder()


# several processes

# What is tested needs nothing of PyTorch and of the package, whose imports take a second each.
LOAD = f"""
import os, sys, time
from pathlib import Path
from types import ModuleType
torch, package = ModuleType("torch"), ModuleType("gatedffn")
torch.cpu, package.__path__ = ModuleType("torch.cpu"), [{str(Path(native.__file__).parents[1])!r}]
sys.modules |= {{"torch": torch, "gatedffn": package}}
from gatedffn import native
source, ready, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
(ready / str(os.getpid())).touch()
while len(list(ready.iterdir())) < count:
    time.sleep(0.001)
print(native.load(source).answer())
"""


@needs_compiler
def test_four_processes_at_once_build_once(bench: Bench) -> None:
    ready = bench.folder / "ready"
    ready.mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(bench.source), str(ready), "4"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    answers = [process.communicate() for process in started]
    assert [answer.strip() for answer, _ in answers] == ["42"] * 4, answers
    assert bench.steps() == ONCE


@needs_compiler
def test_a_build_that_was_killed_leaves_no_library_and_no_lock(bench: Bench) -> None:
    # The linker has written a part when the process that waits for it dies.
    write_some = 'for last in "$@"; do :; done; echo broken > "$last"; kill -9 $PPID; exit 1'
    path = bench.use_compiler(f"[ $step = link ] && {{ {write_some}; }}")
    ready = bench.folder / "ready"
    ready.mkdir()
    killed = run_python(LOAD, str(bench.source), str(ready), "1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert bench.steps() == ONCE
    assert bench.libraries() == set()
    assert bench.use_compiler() == path  # the same key: it would be found if it were there
    again = run_python(LOAD, str(bench.source), str(ready), "1")
    assert again.stdout.strip() == "42", again.stderr
    assert bench.steps() == ONCE * 2


# threads

THREADS = """
import os, torch
from pathlib import Path
from gatedffn.ops import kernels
from gatedffn.functional import gating
def threads():
    return len(os.listdir("/proc/self/task"))
kernels.library()
torch.set_num_threads(3)
gate, up = torch.randn(300, 1024), torch.randn(300, 1024)
alone = threads()
gating(gate, up, "swiglu")
print(threads() - alone)
gate @ up.T, gate.exp_()
print(threads() - alone)
paths = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
print(*(path for path in paths if "omp" in Path(path).name), sep="\\n")
"""


@needs_compiler
@needs_threads
def test_the_kernels_run_on_the_threads_of_pytorch() -> None:
    done = run_python(THREADS)
    # Two helpers are begun by the kernel, and PyTorch's own operators take the same two.
    assert done.stdout.split() == ["2", "2", native.openmp()], done.stderr


TEAM = """
extern "C" int omp_get_num_threads(void);
extern "C" __attribute__((visibility("default"))) int answer() {
  int found = 0;
#pragma omp parallel num_threads(3)
#pragma omp single
  found = omp_get_num_threads();
  return found;
}
"""


@needs_compiler
@needs_threads
def test_threads_that_only_pytorch_sees_are_found(bench: Bench) -> None:
    # Without PyTorch, whose own libraries the whole process sees: its OpenMP library alone.
    private = f"import ctypes; ctypes.CDLL({native.openmp()!r}, ctypes.RTLD_LOCAL)\n{LOAD}"
    done = run_python(private, str(bench.write(bench.source, TEAM)), str(bench.folder), "1")
    assert done.stdout.split() == ["3"], done.stderr


Finder = Callable[[], str | None]


def test_the_library_of_threads_is_the_one_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Finder = library.openmp.__wrapped__
    maps = "7f00-7f01 r-xp 00000000 00:01 12   /lib/libc.so.6\n7f00-7f01 rw-p 0 00:00 0\n%s"
    for line, found in (
        ("7f-7f r-xp 0 00:01 1 /with space/libgomp.so.1", "/with space/libgomp.so.1"),
        ("7f-7f r-xp 0 00:01 1 /lib/libiomp5.so", "/lib/libiomp5.so"),
        ("7f-7f r-xp 0 00:01 1 /lib/libomp.so", "/lib/libomp.so"),
        ("7f-7f r-xp 0 00:01 1 /lib/libcomposed.so", None),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(Path, "read_text", lambda *_, line=line, **__: maps % line)
            assert find() == found, line


@needs_compiler
def test_without_threads_the_library_is_built_without(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "openmp", lambda: None)
    bench.write(bench.source, ANSWER % 1 + "\n#ifdef _OPENMP\n#error threads\n#endif\n")
    assert bench.load() == 1


# what is damaged, what hangs


@needs_compiler
@pytest.mark.parametrize(
    "damage",
    [
        lambda path, _: os.mkfifo(path),
        *(lambda path, whole, n=n: path.write_bytes(whole[:n]) for n in (0, 64, 5000)),
        lambda path, whole: path.write_bytes(os.urandom(len(whole))),
    ],
    ids=["a pipe", "empty", "the head", "cut", "noise"],
)
def test_a_damaged_library_is_compiled_again(
    damage: Any, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.load()
    (path,) = bench.cache.glob("*.so")
    whole = path.read_bytes()
    path.unlink()  # this process runs it
    damage(path, whole)
    assert bench.load() == 42
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"{path} is damaged: it is compiled again"
    ]
    assert bench.load() == 42
    assert bench.steps() == ONCE * 2
    assert len(bench.libraries()) == 1


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@needs_compiler
@pytest.mark.parametrize("step", ["version", "compile", "link"])
def test_a_compiler_that_hangs_is_ended_and_remembered(
    step: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "PATIENCE", 2.0)
    pid, hang = bench.folder / "pid", f"[ $step = {step} ]"
    path = bench.use_compiler(f"{hang} && {{ sleep 600 & echo $! > {bench.folder}/pid; wait; }}")
    with pytest.raises(BuildError, match="did not end within 2 s"):
        bench.load()
    assert not is_running(int(pid.read_text()))
    before = bench.steps()
    compiler.version.cache_clear()
    with pytest.raises(BuildError, match=r"did not end .* ago: it is tried again after 3600 s"):
        bench.load()
    assert bench.steps() == before
    assert bench.use_compiler() == path  # the same command
    (note,) = bench.cache.glob("hanging-*")
    os.utime(note, (1, 1))
    assert bench.load() == 42


@needs_compiler
def test_the_wait_for_another_builder_has_an_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.load()
    (lock,) = bench.cache.glob("*.lock")
    (path,) = bench.cache.glob("*.so")
    path.unlink()
    monkeypatch.setattr(compiler, "PATIENCE", 0.1)
    monkeypatch.setattr(library, "MARGIN", 0.0)
    said = pytest.raises(BuildError, match=f"another process has held {lock} for 0.1 s")
    with native.alone(lock, 1.0), said:  # another opening of the file is as another process
        bench.load()


# the processor


@pytest.mark.parametrize(
    ("cpuinfo", "name", "halves"),
    [
        ("model name\t: A chip\nflags\t: sse2 avx512_bf16\n", "A chip", [True, False]),
        ("model name\t: A chip\nflags\t: sse2\n", "A chip", [False, False]),
        ("Features\t: asimdhp\n", "by its system", [False, True]),
        ("", "by its system", [True, True]),
    ],
)
def test_what_the_system_says_of_the_processor(
    cpuinfo: str, name: str, halves: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: cpuinfo)
    monkeypatch.setattr("platform.processor", lambda: "by its system")
    monkeypatch.setattr(cpu, "processor", cpu.processor.__wrapped__)
    assert native.processor_name() == name
    multiplies = cpu.multiplies.__wrapped__
    assert [multiplies("torch.bfloat16"), multiplies("torch.float16")] == halves
    assert multiplies("torch.float32")


# Known faults: see the reasons.


@needs_compiler
def test_a_compiler_that_is_no_program(bench: Bench) -> None:
    path = bench.write(bench.folder / "broken", "\0no program")
    path.chmod(0o755)
    os.environ["CXX"] = str(path)
    with pytest.raises(BuildError, match="cannot be run"):
        bench.load()


def test_a_user_without_a_home(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert native.cache_folder() == bench.cache
    monkeypatch.delenv("GATEDFFN_CACHE")
    reasons: list[str] = []

    def temporary(reason: str) -> Path:
        reasons.append(reason)
        return bench.cache

    monkeypatch.setattr(cache, "_temporary", temporary)
    assert native.cache_folder() == bench.cache
    assert reasons == ["Could not determine home directory."]


@needs_compiler
def test_the_current_folder_as_the_cache(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.cache.mkdir(0o700)
    monkeypatch.chdir(bench.cache)
    monkeypatch.setenv("GATEDFFN_CACHE", ".")
    assert bench.load() == 42


@needs_compiler
def test_a_library_that_cannot_be_loaded(bench: Bench) -> None:
    bench.write(bench.source, 'extern "C" int nowhere(); int answer() { return nowhere(); }')
    advice = r"delete it .*CXX set to a compiler of C\+\+, such as g\+\+"
    with pytest.raises(BuildError, match=rf"cannot be loaded: .*nowhere; {advice}"):
        bench.load()


@needs_compiler
def test_a_folder_that_cannot_be_written(bench: Bench) -> None:
    # As on a file system that is full, or mounted for reading only.
    bench.load()
    for path in [*bench.cache.glob("*.so"), *bench.cache.glob("*.lock")]:
        path.unlink()
        path.with_suffix(".lock").mkdir(exist_ok=True)
    for path in bench.cache.glob("*-*-*-*.lock"):
        path.rmdir()
    with pytest.raises(BuildError, match=r"cannot be built: .*; set GATEDFFN_CACHE"):
        bench.load()
