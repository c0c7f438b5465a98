"""The frozen records that `gpu_bp.kernels` is made of.

A record states one formula twice: as CUDA text, from which the CuPy backend builds a kernel, and as a
NumPy *twin* with the same arithmetic. Both stand side by side in a `Twin`, so that they cannot drift apart.

Names in the formulas, in CUDA and in NumPy (Haykin, *Neural Networks and Learning Machines*, ch. 4):

    v      net input (induced local field)     y      output, y = phi(v)
    d      target (desired response)           e      dE/dy, the error signal that reaches the output
    delta  local gradient, dE/dv               loss   the value of the loss
    T      the floating type of the kernel     s      scratch arrays of the twin (`Scratch`)

(e and delta are derivatives of the loss: Haykin's with the sign turned.)

A twin writes into the arrays it is given and makes none. Its output may be the same array as an input
(`y` as `v`, `delta` as `e`), so it reads an element's inputs before it writes that element's output.
`gpu_bp.testing.check_record` checks all of this.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np

from gpu_bp.errors import short

Array = Any  # numpy.ndarray or cupy.ndarray


class Scratch(Protocol):
    """Scratch arrays that a NumPy twin may use: as wide as the slice it works on, contents arbitrary."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    mask: np.ndarray  # bool
    bits: np.ndarray  # s.a again, as integers of the same size
    zeros: np.ndarray  # all 0, and to stay so: a maximum with an array is faster than with a number
    one: np.ndarray  # (), 1: an array, which NumPy would have to make of a number each time
    half: np.ndarray  # (), 1/2
    uniforms: np.ndarray  # float64
    # For losses that reduce a row: one value a row.
    row_a: np.ndarray  # (rows, 1)
    row_b: np.ndarray  # (rows, 1)
    row_index: np.ndarray  # (rows,) int64
    row_start: np.ndarray  # (rows,) int64: the flat index of each row's first element
    column_ones: np.ndarray  # (columns, 1), for sums of rows: 1, and to stay so


@dataclass(frozen=True)
class Twin:
    """One formula as CUDA text and as a NumPy function."""

    cuda: str
    numpy: Callable[..., None]


Value = float | bool | tuple[float, ...]


@dataclass(frozen=True)
class Parameter:
    """A number that a record takes: its default, and the interval that it must lie in, such as `[0, 1)`."""

    default: float
    interval: str = "(-inf, inf)"

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            return False
        low, high = (float(bound) for bound in self.interval[1:-1].split(","))
        above = value >= low if self.interval[0] == "[" else value > low
        below = value <= high if self.interval[-1] == "]" else value < high
        return above and below

    @property
    def wanted(self) -> str:
        """What a value must be, in words."""
        return f"a number in {self.interval}"

    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""
        return {"type": "number", "description": f"in {self.interval}", "default": self.default}

    def read(self, value: object) -> Value | None:
        """A value as the record keeps it; None where it is not one that is wanted."""
        return float(value) if value in self else None  # type: ignore[arg-type]


@dataclass(frozen=True)
class Flag:
    """An option of a record, on or off."""

    default: bool = False
    wanted: ClassVar[str] = "true or false"

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean", "default": self.default}

    def read(self, value: object) -> Value | None:
        return value if isinstance(value, bool) else None


@dataclass(frozen=True)
class Numbers:
    """Several numbers that a record takes, each in an interval: `count` of them, or as many as one likes.

    `interval`: one for all, or of `count` numbers a tuple of one each. `rising`: each must be larger than the one
    before.
    """

    default: tuple[float, ...]
    interval: str | tuple[str, ...] = "(-inf, inf)"
    count: int | None = None
    rising: bool = False

    @property
    def wanted(self) -> str:
        count = f"{self.count} numbers" if self.count else "a number, or a list of numbers,"
        interval = self.interval if isinstance(self.interval, str) else " and ".join(self.interval)
        return f"{count} in {interval}{', each larger than the one before' if self.rising else ''}"

    def schema(self) -> dict[str, Any]:
        items = {"type": "array", "items": {"type": "number"}, "minItems": self.count or 1}
        both = items | {"maxItems": self.count} if self.count else {"anyOf": [{"type": "number"}, items]}
        return both | {"description": self.wanted, "default": list(self.default)}

    def read(self, value: object) -> Value | None:
        numbers = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not numbers or len(numbers) != (self.count or len(numbers)):
            return None
        intervals = (self.interval,) * len(numbers) if isinstance(self.interval, str) else self.interval
        if not all(number in Parameter(0.0, each) for number, each in zip(numbers, intervals, strict=True)):
            return None
        if self.rising and any(after <= before for before, after in itertools.pairwise(numbers)):
            return None
        return tuple(map(float, numbers))


def _no_kinks(**_: float) -> tuple[float, ...]:
    return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """What all records share: a name, the parameters taken, and the values chosen for them.

    `origin` is the name, such as `module:object`, under which a record that is not the package's was chosen.
    """

    name: str
    source: str  # where the formula comes from
    parameters: Mapping[str, Parameter | Flag | Numbers] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)  # numbers, flags and tuples of numbers
    origin: str = ""

    def __post_init__(self) -> None:
        chosen = {name: parameter.default for name, parameter in self.parameters.items()} | dict(self.values)
        object.__setattr__(self, "values", MappingProxyType(chosen))

    def __deepcopy__(self, memo: object) -> Self:
        return self  # nothing in it changes

    def with_parameters(self, **values: object) -> Self:
        """This record with other parameter values.

        Raises:
            ValueError: a parameter that the record does not take, or a value that it cannot have.
        """
        chosen = {}
        for name, value in values.items():
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise ValueError(f"{self.name} has no parameter {name!r}; known: {known}")
            chosen[name] = self.parameters[name].read(value)
            if chosen[name] is None:
                raise ValueError(f"{name} of {self.name} must be {self.parameters[name].wanted}, not {short(value)}")
        return replace(self, values={**self.values, **chosen})


@dataclass(frozen=True, kw_only=True, eq=False)
class Activation(Record):
    """An activation function phi, element by element.

    `value` computes y from v: CUDA `y = ...`; twin `(v, y, s, **parameters)`.
    `delta` computes e * phi'(v): CUDA `delta = ...`; twin `(e, x, delta, s, **parameters)`, where x is y or v
    as `derivative_from` says. Where it is the output, the net input need not be kept.
    `kinks` are the net inputs at which a derivative of phi jumps; a gradient check steps around them.
    """

    value: Twin
    delta: Twin
    derivative_from: Literal["output", "net_input"]
    kinks: Callable[..., tuple[float, ...]] = _no_kinks


@dataclass(frozen=True, kw_only=True, eq=False)
class RowActivation(Record):
    """An output activation that mixes the elements of a row (softmax). Only a fused loss trains it.

    CUDA: the body of a kernel in which one warp handles one `row` of `n` columns, `lane` by `lane`.
    Twin: `(v, y, s)`.
    """

    value: Twin


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss(Record):
    """What all losses share.

    `targets` says what a target is: "real" numbers, "counts" (numbers that are not negative), numbers in the "unit"
    interval, "signs" (-1 or 1), or "classes" (integers (batch,), or rows of probabilities (batch, n)).
    `kinks` are the values of y - d at which a derivative jumps; a gradient check steps around them.
    """

    targets: Literal["real", "counts", "unit", "signs", "classes"]
    least_outputs: int = 1
    kinks: Callable[..., tuple[float, ...]] = _no_kinks
    starts_from_net_input: ClassVar[bool] = False  # the loss computes y itself, so v must be kept

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """A name for each output that a target has; "" is the target's own."""
        return ("",)

    @property
    def groups(self) -> int:
        """How many outputs a target has."""
        return len(self.labels)

    def n_outputs(self, n_targets: int) -> int:
        """The width of the output layer for targets of that width (for "classes": that many classes).

        Raises:
            ValueError: fewer than the loss can work with.
        """
        if n_targets < self.least_outputs:
            raise ValueError(
                f"{self.name} needs at least {self.least_outputs} outputs, the targets give {n_targets}; "
                "for a single output use binary_cross_entropy"
            )
        return self.groups * n_targets

    def losses_width(self, n_outputs: int) -> int:
        """How many loss values a row has: one a target, or one in all where the loss reduces the row."""
        return n_outputs // self.groups

    @property
    def gives_interval(self) -> bool:
        """Whether a target's first and last output are the ends of an interval that it is to lie in."""
        return False

    @property
    def best_label(self) -> str:
        """The label of the output that is the best single guess at a target, or of those whose mean is."""
        return ""

    def point_prediction(self, outputs: Array) -> Array:
        """Of outputs (rows, n_outputs) those that are the best single guess at each target: (rows, n_targets)."""
        return outputs


@dataclass(frozen=True, kw_only=True, eq=False)
class FreeLoss(Loss):
    """A loss of (y, d), element by element, that goes with any output activation.

    `error_signal` computes the value and dE/dy together. CUDA: sets `loss` and `e`; twin `(y, d, loss, e, s,
    **parameters)`. The output delta is `e * phi'(v)`, by the activation's own `delta`.
    """

    error_signal: Twin


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedLoss(Loss):
    """A loss that fixes its output activation and gives the delta of the net input itself, y - d.

    `delta` computes y, loss and delta from v and d together. Element by element it is CUDA text that sets
    `y`, `loss` and `delta`; with `per_row`, the body of a kernel as in `RowActivation`, one loss value a row.
    Twin: `(v, d, y, loss, delta, s, **parameters)`.
    """

    output_activation: str
    delta: Twin
    per_row: bool = False
    starts_from_net_input: ClassVar[bool] = True

    def losses_width(self, n_outputs: int) -> int:
        return 1 if self.per_row else n_outputs


def _as_they_are(outputs: Array, **_: Any) -> Array:
    return outputs


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupedLoss(Loss):
    """A loss of several outputs a target, for regressions: such as quantiles, or a mean and a variance.

    Output k of target t stands in column k * n_targets + t: all targets' first outputs come first.
    `labelled` names the outputs of a target, from the parameters: there are as many as `groups`. `best` says which of
    them, or the mean of which, is the best single guess. Where they are an `interval`, they rise, and the first and the
    last are its ends. `powers`: the labels of those that are no value of the target but its deviation (1) or its
    variance (2), and in what power of the target's unit they are.
    `predictions` makes of outputs (rows, groups, n_targets), on the host, what they predict: `(outputs,
    **parameters)`.
    `error_signals` computes the value and dE/dy of all outputs of a target together. CUDA, for one target of one row:
    reads `Y(k)` and `d`, sets `E(k)` for each k < `groups`, and `loss`; a parameter of several numbers is an array.
    Twin: `(y, d, loss, e, s, **parameters)`, y and e being (rows, groups, n_targets), d and loss (rows, n_targets). The
    output delta is `e * phi'(v)`, by the activation's own `delta`.
    """

    labelled: Callable[..., tuple[str, ...]]
    best: Callable[..., tuple[int, ...]]
    interval: bool = False
    powers: Mapping[str, int] = field(default_factory=dict)
    predictions: Callable[..., Array] = _as_they_are
    error_signals: Twin

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return self.labelled(**self.values)

    @property
    def gives_interval(self) -> bool:
        return self.interval and self.groups > 1

    @property
    def best_label(self) -> str:
        return " and ".join(self.labels[k] for k in self.best(**self.values))

    def grouped(self, outputs: Array) -> Array:
        """Outputs (rows, n_outputs) as (rows, groups, n_targets)."""
        return outputs.reshape(len(outputs), self.groups, outputs.shape[1] // self.groups)

    def point_prediction(self, outputs: Array) -> Array:
        return self.grouped(outputs)[:, self.best(**self.values)].mean(axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Update(Record):
    """How a parameter w changes, given its mean gradient g.

    `state` names the arrays kept beside the parameters, which start at zero. `scalars` computes, in float64 on the
    host, the numbers that one step needs: `(step, learning_rate, **parameters) -> {name: number}`, step counting from
    1; its keys are `scalar_names`. `update`: CUDA text that changes `w` and the state, reading `g` and the scalars by
    name; twin `(w, g, *state, s, **scalars)`, which may overwrite g but not s.a (g lives there); each scalar
    is an array () of the parameters' dtype.
    `variant`: where parameters change what is kept and computed, the state and the formula for their values.
    `full_batch`: it is meant for gradients of all rows alone.

    A parameter called `weight_decay` is no affair of the record: the weights are shrunk by learning_rate *
    weight_decay before its formula (see `kernels/penalties.py`).
    """

    state: tuple[str, ...] = ()
    scalar_names: tuple[str, ...]
    scalars: Callable[..., dict[str, float]]
    update: Twin
    variant: Callable[..., tuple[tuple[str, ...], Twin]] | None = None
    full_batch: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant is not None:
            state, update = self.variant(**self.values)
            object.__setattr__(self, "state", state)
            object.__setattr__(self, "update", update)


@dataclass(frozen=True, kw_only=True, eq=False)
class Penalty(Record):
    """What is done to the mean gradient g, or to w itself, before an update rule sees them.

    `apply`: CUDA text that changes `g` or `w`, reading the number called as the record; twin `(w, g, s, number)`,
    which may use s.b and s.mask. With `weights_only` it does not act on biases and gains.
    """

    apply: Twin
    weights_only: bool
