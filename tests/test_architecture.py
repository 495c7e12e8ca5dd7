"""The arrows of the house: what may import what, and what `import gatedffn` must not do."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import gatedffn

ROOT = Path(gatedffn.__file__).parent
MODULES = {
    ".".join(("gatedffn", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}
# variants -> activations -> ops -> layers: each imports what stands before it, or its own. What
# is not named here stands outside and is imported by none of these.
ALLOWED = {
    "errors": set[str](),
    "variants": {"errors"},
    "activations": {"errors", "variants"},
    "files": {"errors"},
    "native": {"errors", "files"},
    "ops": {"errors", "variants", "activations", "files", "native"},
    "functional": {"errors", "variants", "activations", "ops"},
    "sizing": {"errors", "variants"},
    "paper": set[str](),
    "roles": {"variants", "activations", "ops", "functional"},
    "layers": {"errors", "variants", "activations", "ops", "functional", "roles", "sizing"},
    "interop": {
        *("errors", "variants", "activations", "ops", "functional", "roles", "layers"),
        *("files", "storage", "experts", "explanation", "gain", "sizing"),
    },
    "gain": {"variants", "ops", "roles", "layers"},
    "explanation": {
        *("errors", "variants", "activations", "native", "ops", "roles", "layers", "sizing"),
        "gain",
    },
    "storage": {"errors"},
    "layouts": {"storage", "interop"},  # the names that users import, and nothing else
    "experts": {"variants", "ops", "functional", "layers", "sizing"},
    "mixture": {"errors", "variants", "ops", "functional", "layers", "experts", "sizing"},
    "convolution": {"errors", "variants", "activations", "functional", "sizing", "layers"},
}
OPTIONAL = ("triton", "matplotlib", "transformers", "safetensors", "typer", "rich", "scipy")


def part(module: str) -> str:
    """The part of the house that a module is in: `gatedffn.ops.gating.op` is in `ops`."""
    return module.split(".")[1] if "." in module else "gatedffn"


def imported(module: str) -> set[str]:
    """The modules of the package that a module imports anywhere in its file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            source = node.module or ""
            found |= {
                name if (name := f"{source}.{alias.name}") in MODULES else source
                for alias in node.names
            }
    return found & set(MODULES)


@pytest.mark.parametrize("name", list(ALLOWED))
def test_a_part_imports_only_what_stands_before_it(name: str) -> None:
    modules = [module for module in MODULES if part(module) == name]
    assert modules, f"there is no part {name}"
    for module in modules:
        parts = {part(other) for other in imported(module)}
        assert parts <= ALLOWED[name] | {name}, module


def test_the_imports_have_no_cycle() -> None:
    graph = {module: imported(module) - {module} for module in MODULES}
    while graph:
        leaves = {module for module, others in graph.items() if not others & set(graph)}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {module: others for module, others in graph.items() if module not in leaves}


@pytest.fixture(scope="module")
def loaded() -> dict[str, object]:
    """What `import gatedffn` adds to a fresh interpreter that has imported torch."""
    code = f"""
import json, sys, torch
before = set(sys.modules)
import gatedffn
print(json.dumps({{
    "added": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
    "optional": [name for name in {OPTIONAL!r} if name in set(sys.modules) - before],
}}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_importing_loads_no_optional_dependency(loaded: dict[str, object]) -> None:
    assert loaded["optional"] == []


def test_importing_does_not_initialise_cuda(loaded: dict[str, object]) -> None:
    assert loaded["cuda"] is False


def test_importing_loads_nothing_that_stands_outside(loaded: dict[str, object]) -> None:
    added = loaded["added"]
    assert isinstance(added, list)
    own = {part(name) for name in added if name.split(".")[0] == "gatedffn"}
    assert own - {"gatedffn"} == set(ALLOWED)
