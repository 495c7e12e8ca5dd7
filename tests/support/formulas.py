"""The formulas of the table's rows, read as text and computed.

    "a tanh(g/a) sigmoid(g) * u, a = gate_cap = 4"

Names beside each other are multiplied, `^` is a power, and behind the formula come defaults, with
a short name first where the formula has one. A function may be a row that has no gate.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping

from gatedffn.variants import VARIANTS

_TOKEN = re.compile(r"\d+\.?\d*|[A-Za-z]\w*|\S")
_FUNCTIONS: Mapping[str, Callable[..., float]] = {
    "max": max,
    "min": min,
    "clip": lambda x, low, high: max(low, min(x, high)),
    "sqrt": math.sqrt,
    "log": math.log,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1.0 / (1.0 + math.exp(-x)),
    "Phi": lambda x: 0.5 * math.erfc(-x / math.sqrt(2.0)),
}
_OTHER = {"+": "-", "-": "+", "/": "*", "g": "u", "u": "g", "max": "min", "min": "max"}


class Formula:
    def __init__(self, text: str) -> None:
        expression, *notes = re.split(r",(?![^(]*\)) ", text)
        self.defaults: dict[str, float] = {}
        self._short: dict[str, str] = {}
        for note in notes:
            if not note.endswith(" learned"):
                *short, name, value = note.split(" = ")
                self.defaults[name] = float(value)
                self._short |= dict.fromkeys(short, name)
        self._code = compile(_python(expression), text, "eval")

    def value(self, branches: Mapping[str, float], parameters: Mapping[str, float]) -> float:
        """What the formula gives; NaN where it is not a number, or names what nothing is called."""
        names = {"e": math.e, "pi": math.pi, **_FUNCTIONS, **branches, **parameters}
        names |= {short: parameters[name] for short, name in self._short.items()}
        rows = set(self._code.co_names) & set(VARIANTS)
        names |= {name: _row(name) for name in rows - set(names)}
        try:
            return float(eval(self._code, {"__builtins__": {}}, names))
        except (ValueError, ArithmeticError, NameError, TypeError):
            return math.nan


def _row(name: str) -> Callable[[float], float]:
    formula = Formula(VARIANTS[name].formula)
    return lambda u: formula.value({"u": u}, VARIANTS[name].defaults)


def _python(expression: str) -> str:
    words: list[str] = []
    for token in _TOKEN.findall(expression):
        before = words[-1] if words else "("
        called = before in _FUNCTIONS or before in VARIANTS
        if _is_factor(token, "(") and _is_factor(before, ")") and not (called and token == "("):
            words.append("*")
        words.append("**" if token == "^" else token)
    return " ".join(words)


def _is_factor(token: str, parenthesis: str) -> bool:
    return token == parenthesis or (token not in ("if", "else") and token[0].isalnum())


def with_one_fault(text: str) -> Iterator[str]:
    """The formula with one number, sign, branch or function changed, each in turn."""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token[0].isdigit():
            token = str(float(token) * 1.0001) if float(token) else "1"
        else:
            token = _OTHER.get(token, token)
        if token != match[0]:
            yield text[: match.start()] + token + text[match.end() :]
