"""CUDA text from a formula: it is called with symbols, and every ufunc that meets one writes a line down.

Operators on a `Symbol` are NumPy's ufuncs, which ask the symbol what to do (`__array_ufunc__`); so does `np.where`.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from gpu_bp.formula import Columns, Draws, Program

Kind = Literal["double", "long long", "bool"]

# NumPy's name -> CUDA text; the kinds are those of the operands together, or what is named here.
ARITHMETIC = {"add": "{} + {}", "subtract": "{} - {}", "multiply": "{} * {}", "negative": "-{}"}
REAL = {
    "divide": "{} / {}",
    "sqrt": "sqrt({})",
    "tanh": "tanh({})",
    "arctan": "atan({})",
    "exp": "exp({})",
    "log": "log({})",
    "floor": "floor({})",
    "absolute": "fabs({})",
    "maximum": "fmax({}, {})",
}
# of numbers that are not negative, where C's rounding is NumPy's
WHOLE = {"floor_divide": "{} / {}", "remainder": "{} % {}", "right_shift": "{} >> {}"}
LOGICAL = {
    "less": "{} < {}",
    "less_equal": "{} <= {}",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "equal": "{} == {}",
    "not_equal": "{} != {}",
    "bitwise_and": "{} && {}",
    "bitwise_or": "{} || {}",
}


class Symbol(NDArrayOperatorsMixin):
    """A value in the CUDA text: the name of a constant."""

    def __init__(self, trace: Trace, name: str, kind: Kind) -> None:
        self.trace = trace
        self.name = name
        self.kind = kind

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *operands: Any, **keywords: Any) -> Symbol:
        if method != "__call__" or keywords:
            raise TypeError(f"a formula cannot use {ufunc.__name__}.{method} with {list(keywords)}")
        return self.trace.apply(ufunc.__name__, operands)

    def __array_function__(self, function: Any, types: Any, arguments: Any, keywords: Any) -> Symbol:
        if function is not np.where or keywords:
            raise TypeError(f"a formula cannot use {function.__name__}")
        return self.trace.where(*arguments)


class Trace:
    """The place of one thread, and the lines that compute its value. See `gpu_bp.formula.Place`."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.lines: list[str] = []
        self.arrays: list[str] = []  # stages and tables that are read, as parameters of the kernel
        self.row = Symbol(self, "row", "long long")
        self.column = Symbol(self, "column", "long long")

    def _define(self, kind: Kind, text: str) -> Symbol:
        name = f"t{len(self.lines)}"
        self.lines.append(f"const {kind} {name} = {text};")
        return Symbol(self, name, kind)

    def _operand(self, value: Any) -> tuple[str, Kind]:
        if isinstance(value, Symbol):
            return value.name, value.kind
        if isinstance(value, bool | np.bool_):
            return str(value).lower(), "bool"
        if isinstance(value, int | np.integer):
            return (f"{value}ll" if value >= 0 else f"({value}ll)"), "long long"
        return (f"{float(value)!r}" if value >= 0 else f"({float(value)!r})"), "double"

    def apply(self, name: str, operands: tuple[Any, ...]) -> Symbol:
        """What a ufunc gives."""
        if name == "power" and operands[1] == 2:
            name, operands = "multiply", (operands[0], operands[0])
        texts, kinds = zip(*map(self._operand, operands), strict=True)
        if name in ARITHMETIC:
            kind: Kind = "double" if "double" in kinds else "long long"
            return self._define(kind, ARITHMETIC[name].format(*texts))
        if name in REAL:
            return self._define("double", REAL[name].format(*(f"double({text})" for text in texts)))
        if name in WHOLE and "double" not in kinds:
            return self._define("long long", WHOLE[name].format(*texts))
        if name in LOGICAL and (name[:7] != "bitwise" or set(kinds) == {"bool"}):
            return self._define("bool", LOGICAL[name].format(*texts))
        raise TypeError(f"a formula cannot use {name} of {', '.join(kinds)}")

    def where(self, condition: Any, yes: Any, no: Any) -> Symbol:
        """What `np.where` gives."""
        (yes_text, yes_kind), (no_text, no_kind) = self._operand(yes), self._operand(no)
        kind: Kind = "double" if "double" in (yes_kind, no_kind) else "long long"
        return self._define(kind, f"{self._operand(condition)[0]} ? {kind}({yes_text}) : {kind}({no_text})")

    def uniform(self, draws: Draws, j: Any) -> Symbol:
        return self._draw("uniform", draws, j)

    def normal(self, draws: Draws, j: Any) -> Symbol:
        return self._draw("normal", draws, j)

    def _draw(self, function: str, draws: Draws, j: Any) -> Symbol:
        arguments = f"seed, {int(draws.purpose)}, row, {draws.per_row}, {self._operand(j)[0]}"
        return self._define("double", f"{function}({arguments})")

    def stage(self, name: str, j: Any) -> Symbol:
        width = self._program.stages[name].width
        return self._define("double", f"{self._array(name)}[r * {width} + {self._operand(j)[0]}]")

    def table(self, name: str, j: Any) -> Symbol:
        return self._define("double", f"{self._array(name)}[{self._operand(j)[0]}]")

    def dot(self, stage: str, table: str) -> Symbol:
        n, x, w = self._program.stages[stage].width, self._array(stage), self._array(table)
        total = f"sum{len(self.lines)}"
        self.lines.append(
            f"double {total} = 0; "
            f"for (long long j = 0; j < {n}; ++j) {total} += {x}[r * {n} + j] * {w}[column * {n} + j];"
        )
        return Symbol(self, total, "double")

    def sinpi(self, x: Any) -> Symbol:
        return self._define("double", f"sinpi({self._operand(x)[0]})")

    def cospi(self, x: Any) -> Symbol:
        return self._define("double", f"cospi({self._operand(x)[0]})")

    def _array(self, name: str) -> str:
        if name not in self.arrays:
            self.arrays.append(name)
        return f"array_{name}"


def trace(program: Program, columns: Columns) -> tuple[tuple[str, ...], str]:
    """Which stages and tables a formula reads, and the body of the kernel that computes `y`, its value at element i.

    The body reads `rows` and `first`, which make the row numbers, `seed`, and each array under its name with `array_`
    before it.
    """
    place = Trace(program)
    value, _ = place._operand(columns.formula(place))
    head = f"const long long r = i / {columns.width}, column = i % {columns.width}, row = rows[r] + first;"
    return tuple(place.arrays), "\n".join((head, *place.lines, f"y = {value};"))
