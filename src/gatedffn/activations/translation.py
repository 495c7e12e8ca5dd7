"""`gpu.py` in C++ and in JavaScript.

Its functions are arithmetic and calls, which read nearly the same in each language. What they call
of `elementary.py` and of Triton is spelled in each by hand, under the same name: in simd.h and
cpu.h, in plots/assets/elementary.js. A statement that means something else there is refused.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gatedffn.activations import reference
from gatedffn.activations.reference import SCALARS
from gatedffn.errors import BuildError

SOURCE = Path(__file__).with_name("gpu.py")
HEADER = SOURCE.with_name("scalars.h")

_SAME = (
    *(ast.Name, ast.Load, ast.Store, ast.Tuple, ast.Compare, ast.BinOp, ast.UnaryOp),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.USub),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)
_ROUGH = "ROUGH"  # what only Triton is told


@dataclass(frozen=True, slots=True)
class Language:
    """How a number, a constant, a function and the statements of its body are written."""

    number: str
    block: str
    constant: str
    function: str
    parameter: str
    local: str
    several: str
    group: str


CPP = Language(
    number="{}f",
    block="set({})",
    constant="constexpr float {} = {};",
    function="GATEDFFN_INLINE {kind} {name}({parameters}) {{",
    parameter="V {}",
    local="V {} = {};",
    several="auto [{}] = {};",
    group="{{{}}}",
)
JAVASCRIPT = Language(
    number="{}",
    block="{}",
    constant="const {} = {};",
    function="function {name}({parameters}) {{",
    parameter="{}",
    local="const {} = {};",
    several="const [{}] = {};",
    group="[{}]",
)


def header(source: str | None = None) -> str:
    """The functions in C++, and the table of their loops: what scalars.h has to be."""
    every = [name for scalar in SCALARS for name in (scalar, *filter(None, _by(scalar)))]
    rows = []
    for name, scalar in SCALARS.items():
        by = ", ".join(f"by_parameter<{f}>" if f else "nullptr" for f in _by(name))
        loops = f"value_of<{name}>, both_of<{name}>, {{{by}}}"
        rows.append(f'    {{"{name}", {len(scalar.parameters)}, {loops}}},')
    return "\n".join(
        [
            "// Generated from gpu.py, which has the comments, by python -m gatedffn.docs.",
            "#pragma once\n\nnamespace gatedffn {\n\nnamespace {\n",
            *_translated(every, CPP, source),
            "}  // namespace\n\nstatic const Function FUNCTIONS[] = {",
            *rows,
            "};\n\n}  // namespace gatedffn\n",
        ]
    )


def javascript(source: str | None = None) -> str:
    """The functions in JavaScript, and `SCALARS`: by name a value, a derivative and parameters."""
    rows = []
    for name, scalar in SCALARS.items():
        rows.append(f"  {name}: scalar({', '.join([name, *map(repr, scalar.parameters)])}),")
    return "\n".join(
        [*_translated(SCALARS, JAVASCRIPT, source), "const SCALARS = {", *rows, "};\n"]
    )


def _by(name: str) -> list[str | None]:
    """For each parameter of a function, the name of its derivative by it, or None."""
    scalar = SCALARS[name]
    return [f"{name}_by_{p}" if p in scalar.by_parameter else None for p in scalar.parameters]


def _translated(names: Iterable[str], language: Language, source: str | None) -> Iterator[str]:
    """The constants of reference.py, and the functions of these names with all that they call."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8") if source is None else source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    constants = {n: v for n, v in vars(reference).items() if n.isupper() and isinstance(v, float)}
    for name, value in constants.items():
        yield language.constant.format(name, language.number.format(value))
    yield ""
    for name in _with_what_they_call(names, functions):
        expression = _Expression(language, set(functions), set(constants))
        yield from _function(functions[name], expression)


def _with_what_they_call(
    names: Iterable[str], functions: Mapping[str, ast.FunctionDef]
) -> Iterable[str]:
    """Each once, and what it calls before it."""
    found: dict[str, None] = {}
    for name in names:
        if name not in functions:
            raise BuildError(f"{SOURCE.name} lacks the function {name}")
        calls = [node.func for node in ast.walk(functions[name]) if isinstance(node, ast.Call)]
        called = [f.id for f in calls if isinstance(f, ast.Name) and f.id != name]
        found |= dict.fromkeys([*_with_what_they_call(called, functions), name])
    return found


def _function(node: ast.FunctionDef, translate: "_Expression") -> Iterator[str]:
    language = translate.language
    names = [argument.arg for argument in node.args.args if argument.arg != _ROUGH]
    several = any(isinstance(n, ast.Return) and isinstance(n.value, ast.Tuple) for n in node.body)
    parameters = ", ".join(map(language.parameter.format, names))
    kind = "Both" if several else "V"
    yield language.function.format(kind=kind, name=node.name, parameters=parameters)
    for statement in node.body:
        match statement:
            case ast.Expr(ast.Constant(str())):  # the docstring
                pass
            case ast.Assign([ast.Name(name)], value):
                yield "  " + language.local.format(name, translate(value))
            case ast.Assign([ast.Tuple(elements)], value):
                # A name that is not used may be there once.
                names = [ast.unparse(e) for e in elements]
                names = [f"_{i}" if name == "_" else name for i, name in enumerate(names)]
                yield "  " + language.several.format(", ".join(names), translate(value))
            case ast.Return(ast.Tuple(elements)):
                yield f"  return {language.group.format(', '.join(map(translate, elements)))};"
            case ast.Return(ast.expr() as value):
                yield f"  return {translate(value)};"
            case _:
                refuse(statement)
    yield "}\n"


class _Expression(ast.NodeTransformer):
    """Writes an expression, whose operators and their order Python shares with the others."""

    def __init__(self, language: Language, functions: set[str], constants: set[str]) -> None:
        self.language, self.functions, self.constants = language, functions, constants

    def __call__(self, node: ast.expr) -> str:
        return ast.unparse(self.visit(node))

    def generic_visit(self, node: ast.AST) -> ast.AST:
        operators = getattr(node, "ops", [getattr(node, "op", node)])
        if len(operators) > 1 or not all(isinstance(part, _SAME) for part in (node, *operators)):
            refuse(node)
        return super().generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if not isinstance(node.value, float):
            refuse(node)
        return ast.Name(self.language.number.format(node.value))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.Name(node.attr)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id.isupper() and node.id not in self.constants:
            refuse(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        arguments = [a for a in node.args if not (isinstance(a, ast.Name) and a.id == _ROUGH)]
        written = [self(argument) for argument in arguments]
        name = self(node.func)
        if name in self.functions:  # which take blocks
            for i, argument in enumerate(arguments):
                if isinstance(argument, ast.Constant) or written[i].isupper():
                    written[i] = self.language.block.format(written[i])
        return ast.Name(f"{name}({', '.join(written)})")


def refuse(node: ast.AST) -> NoReturn:
    line, code = getattr(node, "lineno", 0), ast.unparse(node).splitlines()[0]
    raise BuildError(
        f"{SOURCE.name}, line {line}: {code!r} has no translation to C++ and "
        "JavaScript; use names, floats, + - * /, one comparison, tl.where and calls"
    )
