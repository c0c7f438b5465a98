"""A backend that books what each operation of another takes: seconds, and what it computes and moves.

It is booked to one of the phases of a training step, with what the host did since the one before. What an operation
moves is what it must at least: each array that it reads or writes, once. What it computes is counted of the products
alone: 2 m n k for (m, k) times (k, n).

A step is recorded here as elsewhere, but operation by operation; and it is not cut into parts, for several workers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from gpu_bp.backends import Backend
from gpu_bp.backends.base import Action, Division

PHASES = ("data", "forward", "delta", "backward", "update")

# The operations that are timed: the phase of each (see `_phase`), the arrays that it reads, and those that it writes.
OPERATIONS = {
    "gather": ("data", "rows out", "out"),  # of the table as much as comes out
    "copy": ("data", "array", "out"),
    "generate": ("data", "rows", "outputs"),
    "uniforms": ("data", "", "out"),
    "normals": ("data", "", "out"),
    "count": ("data", "", "out"),
    "permute": ("data", "", "out"),
    "matmul": ("forward", "a b", "out"),
    "dense": ("forward", "inputs weights biases", "net_input output"),
    "activate": ("forward", "net_input biases", "net_input output"),
    "normalise": ("forward", "product gains biases", "product scale net_input"),
    "dropout": ("forward", "x", "out"),
    "input_noise": ("forward", "x", "out"),
    "add": ("forward", "a b", "out"),
    "output_delta": ("delta", "net_input target", "output losses delta"),
    "class_weights": ("delta", "targets weights", "out"),
    "multiply": ("delta", "x factor", "x"),
    "weigh": ("delta", "weights losses delta", "losses delta"),
    "accumulate": ("delta", "x", ""),
    "hidden_delta": ("delta", "error output", "delta"),  # or the net input, which is as large
    "normalise_delta": ("delta", "delta normalised scale gains", "delta"),
    "dense_gradients": ("backward", "delta inputs", "weights biases"),
    "column_sums": ("backward", "x", "out"),
    "column_dots": ("backward", "x y", "out"),
    "fill": ("update", "", "array"),
    "step_factor": ("update", "weight squares", "out"),
    "watch": ("update", "gradients", ""),
    "update": ("update", "parameters gradients state", "parameters state"),
    "limit_norms": ("update", "weights", ""),  # and writes the rows that are too long
    "average": ("update", "parameters average", "average"),
    "adjust_scale": ("update", "scale", "scale good"),
    "advance": ("update", "", "counter"),
}
# Those that are not: they ask, they make something, they run others, or they wait.
UNTIMED = (
    "libraries", "refuses", "zeros", "to_device", "to_host", "synchronize", "record", "together", "division", "numbers",
    "free_bytes", "scratch_bytes", "generator_bytes", "staging", "upload", "await_uploads", "finish_uploads",
    "mark", "seconds", "span", "exchange",
)  # fmt: skip


@dataclass
class Spent:
    """What a phase has taken: seconds, floating-point operations of products, and bytes read and written."""

    seconds: float = 0.0
    flop: float = 0
    n_bytes: float = 0


class _Call(NamedTuple):
    """What an operation is booked as."""

    name: str
    phase: str
    flop: int
    n_bytes: int


class Timing:
    """A backend that does what another does, and books the operations within `part` to phases.

    Args:
        spans: whether parts and operations have names in a profiler's picture.

    Attributes:
        spent: by phase; the seconds are those of the last `settle`.
    """

    def __init__(self, backend: Backend, *, spans: bool = False) -> None:
        self._backend = backend
        self._spans = spans
        self._part = ""
        self._back = False  # whether the output layer's delta is there
        self._recorded: list[tuple[Action, _Call]] | None = None
        self._begin: Any = None  # of what is not booked yet, and where that belongs
        self._phase = ""
        self._marks: list[tuple[str, Any, Any]] = []
        self.spent: dict[str, Spent] = {}
        self.reset()
        for name in OPERATIONS:
            setattr(self, name, self._timed(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def reset(self) -> None:
        """What was booked so far is forgotten."""
        self._marks.clear()
        self.spent = {phase: Spent() for phase in PHASES}

    def settle(self) -> None:
        """Books the seconds of what was done so far. Waits for the device; nothing else does."""
        for phase, begin, end in self._marks:
            self.spent[phase].seconds += self._backend.seconds(begin, end)
        self._marks.clear()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it runs one part of a training: "data", all of which is that phase, or "computation"."""
        self._part, self._phase = name, "data" if name == "data" else "forward"
        with self._backend.span(name) if self._spans else nullcontext():
            self._begin = self._backend.mark()
            yield
            self._marks.append((self._phase, self._begin, self._backend.mark()))
        self._part = ""

    def record(self, run: Action, worker: int = 0) -> Action:
        recorded: list[tuple[Action, _Call]] = []
        outer, self._recorded, self._back = self._recorded, recorded, False
        try:
            run()
        finally:
            self._recorded = outer

        def play() -> None:
            if self._recorded is not None:  # within another recording, of which it becomes a part
                self._recorded.extend(recorded)
                return
            for action, call in recorded:
                self._book(call, self._ended(action, call.name))

        return play

    def together(self, actions: Sequence[Action], *, alike: bool = False) -> None:
        for action in actions:
            action()

    def division(self, widths: Sequence[int], rows: int, workers: int | None = None) -> Division:
        return Division(rows, 1)

    def _timed(self, name: str) -> Callable[..., None]:
        operation = getattr(self._backend, name)
        parameters = list(inspect.signature(operation).parameters)

        def timed(*arguments: Any, **keywords: Any) -> None:
            action = partial(operation, *arguments, **keywords)
            given = dict(zip(parameters, arguments, strict=False)) | keywords
            if self._recorded is not None:
                self._recorded.append((self._backend.record(action), self._call(name, given)))
            elif self._part:
                end = self._ended(action, name)
                self._book(self._call(name, given), end)
            else:
                action()

        return timed

    def _call(self, name: str, given: Mapping[str, Any]) -> _Call:
        phase = "data" if self._part == "data" else _phase(name, given, self._back)
        self._back = self._back or name == "output_delta"
        return _Call(name, phase, _flop(name, given), _moved(name, given))

    def _ended(self, action: Action, name: str) -> Any:
        """Does something, and marks its end."""
        if self._spans:
            with self._backend.span(name):
                action()
        else:
            action()
        return self._backend.mark()

    def _book(self, call: _Call, end: Any) -> None:
        self._marks.append((call.phase, self._begin, end))
        self._phase, spent = call.phase, self.spent[call.phase]
        spent.flop += call.flop
        spent.n_bytes += call.n_bytes
        self._begin = self._backend.mark()  # so that the booking is not counted


def _phase(name: str, given: Mapping[str, Any], back: bool) -> str:
    """The phase of an operation of a step, before or after the output layer's delta, from which on it goes back."""
    if name == "accumulate" and given.get("squares"):
        return "update"
    if name == "add" and given["out"].ndim == 1:  # gradients of a step in several parts, in the flat buffer
        return "backward"
    if back and name in ("matmul", "dropout", "add"):
        return "delta"
    return OPERATIONS[name][0]


def _flop(name: str, given: Mapping[str, Any]) -> int:
    """Floating-point operations of the product in an operation."""
    if name == "matmul":
        inner: int = given["a"].shape[0 if given.get("transpose_a") else 1]
        return 2 * inner * int(given["out"].size)
    if name in ("dense", "dense_gradients"):
        return 2 * len(given["inputs"]) * int(given["weights"].size)
    return 0


def _moved(name: str, given: Mapping[str, Any]) -> int:
    """Bytes that an operation reads and writes."""
    _, reads, writes = OPERATIONS[name]
    if name == "dense" and given["activation"] is None:
        writes = "net_input"
    if name == "activate" and given["biases"] is None:
        writes = "output"
    if name == "output_delta" and not given["loss"].starts_from_net_input:
        reads, writes = "output target", "losses delta"
    return _bytes(given, reads) + _bytes(given, writes)


def _bytes(given: Mapping[str, Any], names: str) -> int:
    """Of the arguments of these names, an array that comes twice once."""
    values = [given.get(name) for name in names.split()]
    arrays = [array for x in values if x is not None for array in (x if isinstance(x, list | tuple) else (x,))]
    return sum({id(array): array.nbytes for array in arrays}.values())
