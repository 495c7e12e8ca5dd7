"""Variants of one's own: functions of tensors that stand beside those of the table.

PyTorch's operators compute them, and autograd their derivatives; no kernel has them.
"""

import hashlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from gatedffn.activations.reference import Scalar, hold
from gatedffn.errors import ParameterError, SettingError, UnknownVariant
from gatedffn.variants import VARIANTS, Parameter, Table, Variant, get_variant
from gatedffn.variants import hold as hold_row

Formula = Callable[..., Tensor]
# Arguments of layers and functions that take the parameters of a variant beside them.
TAKEN = frozenset({
    "x", "gate", "up", "variant", "dim", "order", "bias", "dropout", "device", "dtype", "learnable",
    "save", "tile", "backend", "weigh", "index", "weights", "d_model", "d_hidden", "d_out",
    "num_experts", "in_channels", "out_channels", "kernel_size", "self", "gate_proj", "up_proj",
    "down_proj",
})  # fmt: skip
STEP = 1e-5  # of central differences in float64
CLOSE = 1e-6  # what they are off by, beside slopes of size 1


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """A function as a user wrote it, with its derivative if that came too.

    Those of one code are equal: a cell of a notebook that is run again makes no other variant.
    """

    function: Formula
    derivative: Formula | None = None

    def __eq__(self, other: object) -> bool:
        try:
            return isinstance(other, Given) and self._parts() == other._parts()
        except (RuntimeError, ValueError):  # tensors in closures, which have no one truth
            return False

    def __hash__(self) -> int:
        return hash(self.function.__class__)

    def _parts(self) -> list[object]:
        return [_identity(function) for function in (self.function, self.derivative)]


def _identity(function: Formula | None) -> object:
    if not isinstance(function, FunctionType):
        return function
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    defaults = function.__defaults__, function.__kwdefaults__
    return function.__code__, id(function.__globals__), cells, defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnVariant(Variant):
    """A row with functions that a user wrote: `given` has them by the names that the row uses.

    `file` is where it is read from, if it was named so: `PATH.py:NAME`.
    """

    given: tuple[tuple[str, Given], ...] = field(default=(), repr=False)
    file: str | None = field(default=None, compare=False)

    def _reduced(self) -> tuple[Any, ...]:
        if self.file is not None:
            return variant_in_file, (self.file,)
        return _restored, ({f.name: getattr(self, f.name) for f in fields(self)},)

    @property
    def digest(self) -> str | None:
        """Of the file that has the functions, or of their code: what a name alone does not say."""
        if self.file is not None:
            code = Path(_split(self.file)[0]).read_bytes()
        else:
            functions = [f for _, of in self.given for f in (of.function, of.derivative)]
            code = b"".join(_bytes(getattr(f, "__code__", None)) for f in functions)
        return hashlib.sha256(code).hexdigest()[:16]


def variant(
    name: str,
    *,
    phi: str | Formula,
    psi: str | Formula | None = "identity",
    parameters: Mapping[str, float | Parameter] | None = None,
    d_phi: Formula | None = None,
    d_psi: Formula | None = None,
    label: str | None = None,
    formula: str | None = None,
    source: str = "one's own",
) -> Variant:
    """A variant of one's own: `phi(gate) * psi(up)`, or `phi(up)` where psi is None.

    It can be given wherever a variant is named, and is found by its name from then on in this
    process. PyTorch's operators compute functions that are written here, and autograd their
    derivatives; matrix products stay the library's. Kernels compute a variant whose functions are
    all of the table.

    Args:
        name: small letters, digits and underscores.
        phi, psi: the name of a function of the table, or a function of a tensor and of parameters
            by their names, that works on each number by itself.
        parameters: the formula's, with their defaults: a number, which can be learned where phi
            alone takes it, or a `gatedffn.variants.Parameter` with bounds.
        d_phi, d_psi: derivatives by the tensor, with the same parameters; None is autograd's. What
            is given is held to the function's differences once, here.
        label, formula, source: for people.

    Returns: the row. The same definition again gives the same row.

    Raises:
        UnknownVariant: a name that another variant has, or no function of the table.
        ParameterError: a function that does not fit, or a derivative that is not its own.

    >>> sine = variant("sine_glu", phi=torch.sin, formula="sin(g) * u")
    >>> from gatedffn import functional
    >>> functional.gating(torch.tensor([0.0]), torch.tensor([3.0]), sine)
    tensor([0.])
    """
    functions = {"phi": (phi, d_phi), "psi": (psi, d_psi)}
    known = dict(parameters or {})
    names: dict[str, str | None] = {}
    given = []
    of_psi: Sequence[str] = ()
    plain = torch.nn.Module()
    for one in known:
        if not one.isidentifier() or one.startswith("_") or one in TAKEN or hasattr(plain, one):
            raise ParameterError(
                f"{one!r} cannot name a parameter of {name!r}: layers and functions have an "
                "argument or an attribute of that name"
            )
    for place, (function, derivative) in functions.items():
        if function is None or isinstance(function, str):
            if derivative is not None:
                raise ParameterError(
                    f"d_{place} is given and {place} is {function!r}: leave it out"
                )
            names[place] = function
            continue
        if not callable(function):
            raise ParameterError(
                f"{place} of {name!r} is {function!r}: give a function of the table by name, or "
                "one of a tensor"
            )
        names[place] = f"{name}.{place}"
        given.append((f"{name}.{place}", Given(function, derivative)))
        if place == "psi":
            of_psi = _parameters(function, known)
    facts: dict[str, Any] = {
        **{"name": name, "label": label or name, "phi": names["phi"], "psi": names["psi"]},
        "formula": formula or _words(phi, psi),
        "source": source,
        "parameters": tuple(
            value
            if isinstance(value, Parameter)
            else Parameter(
                name=each, default=value, meaning="one's own", learnable=each not in of_psi
            )
            for each, value in known.items()
        ),
    }
    return _restored({**facts, "given": tuple(given)}) if given else get_variant(Variant(**facts))


def _restored(facts: dict[str, Any]) -> Variant:
    """A row by its facts, its functions held and checked where they are new."""
    row = OwnVariant(**facts)
    before = VARIANTS.get(row.name)
    if before is None:
        numbers = {p.name: p.default for p in row.parameters}
        for parameter in row.parameters:
            parameter.check(row.name, parameter.default)
        for name, of in row.given:
            parameters = _parameters(of.function, numbers)
            function = _scalar(of, parameters)
            _check(name, of, [numbers[each] for each in parameters], function)
            hold(name, function)
    return get_variant(row)


def _words(phi: str | Formula, psi: str | Formula | None) -> str:
    first, second = (
        f if isinstance(f, str) else getattr(f, "__name__", type(f).__name__) for f in (phi, psi)
    )
    if psi is None:
        return f"{first}(u)"
    return f"{first}(g) * " + ("u" if psi == "identity" else f"{second}(u)")


def _parameters(function: Formula, known: Mapping[str, object]) -> tuple[str, ...]:
    """The parameters that a function takes behind its tensor, of those that are known."""
    try:
        behind = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):  # PyTorch's own have no signature
        return ()
    for one in behind:
        fixed = one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        if fixed and one.name not in known:
            raise ParameterError(
                f"{_words(function, None)} takes {one.name}: give its default, "
                f"parameters={{{one.name!r}: NUMBER}}"
            )
    return tuple(one.name for one in behind if one.name in known)


def _scalar(of: Given, parameters: tuple[str, ...]) -> Scalar:
    """The function as those of the table are."""

    def value(x: Tensor, *values: Any) -> Tensor:
        return of.function(x, **dict(zip(parameters, values, strict=True)))

    def derivative(x: Tensor, *values: Any) -> Tensor:
        if of.derivative is not None:
            return of.derivative(x, **dict(zip(parameters, values, strict=True)))
        return _slope(value, [x, *values], 0)

    def by(place: int) -> Formula:
        return lambda x, *values: _slope(value, [x, *values], place)

    by_parameter = {name: by(place) for place, name in enumerate(parameters, 1)}
    return Scalar(value, derivative, parameters, Table(by_parameter))


def _slope(function: Formula, arguments: list[Any], place: int) -> Tensor:
    """The derivative of each number by one of the arguments, which can be differentiated again."""
    create_graph = torch.is_grad_enabled() and any(
        isinstance(each, Tensor) and each.requires_grad for each in arguments
    )
    with torch.enable_grad():
        x, source = arguments[0], torch.as_tensor(arguments[place])
        source = source.to(device=x.device).expand(x.shape)
        # A view, so that what else was made of the source is no way to it.
        followed = create_graph and source.requires_grad
        source = source.view_as(source) if followed else source.detach().requires_grad_()
        y = function(*arguments[:place], source, *arguments[place + 1 :])
        if not y.requires_grad:
            return torch.zeros_like(y)
        (found,) = torch.autograd.grad(
            y, source, torch.ones_like(y), create_graph=create_graph, materialize_grads=True,
            allow_unused=True,
        )  # fmt: skip
    return found


def _check(name: str, of: Given, values: list[float], function: Scalar) -> None:
    """Raises unless a function works on each number by itself, and a derivative is its own."""
    x = torch.linspace(-6.07, 5.93, 61, dtype=torch.float64)  # none of them where functions bend
    both = function.value, *([] if of.derivative is None else [function.derivative])
    for given, made in itertools.product((x, x.float()), both):
        before = given.clone()
        with torch.no_grad():
            y: Any = made(given, *values)
        what = name if made is function.value else f"the derivative of {name}"
        if not torch.equal(given, before):
            raise ParameterError(f"{what} changes what it is given: return a new tensor")
        if not isinstance(y, Tensor) or y.shape != given.shape or y.dtype != given.dtype:
            got = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ParameterError(
                f"{what} makes {got} of {tuple(given.shape)} {given.dtype}: it must return a "
                "tensor of the same shape and dtype"
            )
    with torch.no_grad():
        y = function.value(x, *values)
        alone = torch.cat([function.value(x[i : i + 1], *values) for i in range(len(x))])
        if not torch.allclose(y, alone, rtol=1e-9, atol=1e-12, equal_nan=True):
            raise ParameterError(
                f"{name} gives a number something else beside others: it must work on each number "
                "by itself, and always alike"
            )
        if not y.isfinite().all():
            where = float(x[~y.isfinite()][0])
            raise ParameterError(f"{name} is {float(y[~y.isfinite()][0])} at {where:g}: it must be "
                                 "a number everywhere")  # fmt: skip
        if of.derivative is None:
            return
        slope = function.derivative(x, *values)
        ahead, back = (function.value(x + step, *values) for step in (STEP, -STEP))
        numeric = (ahead - back) / (2 * STEP)
        off = (slope - numeric).abs() / (1.0 + numeric.abs())
    if not bool((off <= CLOSE).all()):
        at = int(off.nan_to_num(torch.inf).argmax())
        raise ParameterError(
            f"the derivative of {name} is {float(slope[at]):g} at {float(x[at]):g}, and the "
            f"function's differences say {float(numeric[at]):g}: leave it out for autograd's"
        )


# Of a file

_modules: dict[Path, ModuleType] = {}


def _split(text: str) -> tuple[str, str]:
    path, _, name = text.partition(".py:")
    return f"{path}.py", name


def variant_named(text: str) -> Variant:
    """The row that somebody who uses a command names: as `get_variant`, or `PATH.py:NAME`.

    It runs that file, so names from elsewhere than a command line do not go through it.

    Raises:
        UnknownVariant, ParameterError: as `get_variant`.
        SettingError: a file that cannot be run, or has no such row.

    >>> variant_named("SwiGLU").name
    'swiglu'
    """
    return variant_in_file(text) if ".py:" in text else get_variant(text)


def variant_in_file(text: str) -> Variant:
    """The row `PATH.py:NAME`, with other defaults where `:PARAMETER=NUMBER` follows.

    Raises: as `variant_named`.
    """
    path, name = _split(text)
    name, _, values = name.partition(":")
    row = getattr(_module(Path(path).expanduser().resolve()), name, None)
    if not isinstance(row, Variant):
        raise SettingError(f"{path} has no variant called {name!r}: make one by gatedffn.variant")
    row = get_variant(row)
    if isinstance(row, OwnVariant) and row.file is None:
        row = hold_row(replace(row, file=f"{Path(path).expanduser().resolve()}:{name}"))
    return get_variant(f"{row.name}:{values}") if values else row


def _module(path: Path) -> ModuleType:
    if path not in _modules:
        name = f"gatedffn_of_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise SettingError(f"there is no file {path}: name a variant, or PATH.py:NAME")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except (UnknownVariant, ParameterError):
            raise
        except Exception as error:  # whatever a user's file raises
            raise SettingError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
        _modules[path] = module
    return _modules[path]


def _bytes(code: CodeType | None) -> bytes:
    if code is None:
        return b""
    consts = [_bytes(c) if isinstance(c, CodeType) else repr(c).encode() for c in code.co_consts]
    return b"".join([code.co_code, repr(code.co_names).encode(), *consts])
