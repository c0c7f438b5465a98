"""How one formula of a record is checked, whatever the record is: what `gpu_bp.testing` is made of.

A `Formula` names the arrays of a twin; a `Check` runs twin and CUDA text on them and compares numbers.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_bp.backends.host_scratch import Scratch
from gpu_bp.cuda_text import Runner
from gpu_bp.errors import UserError
from gpu_bp.gradcheck import ROUNDING, TOLERANCE
from gpu_bp.spec import Record

Arrays = dict[str, np.ndarray]

COLUMNS = 8
USUAL = 30.0  # up to here no formula overflows, in float32 either
TEXT_ULPS = 64  # two maths libraries, and a formula's few operations after them
DTYPES = (np.float32, np.float64)


class RecordError(UserError):
    """What is wrong with a record: which check, at which point, and the two numbers that differ."""


@dataclass(frozen=True)
class Formula:
    """One twin of a record.

    `arguments`: the twin's arrays by name, in order; `outputs` those that it writes. `text` runs the CUDA text on
    arrays of these names. `in_place`: an output, and the input whose place it may take.
    """

    name: str
    twin: Callable[..., None]
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    text: Callable[[Runner, Arrays], None]
    values: Mapping[str, Any]
    in_place: tuple[str, str] | None = None


class Check:
    """The checks of one record with its values, on whatever formulas it has."""

    def __init__(self, record: Record, runs: Runner | None) -> None:
        self.record: Any = record
        self._runs = runs
        values = ", ".join(f"{name} = {value}" for name, value in record.values.items())
        self._name = f"{record.name}({values})" if values else record.name

    def error(self, formula: str, fault: str) -> RecordError:
        """The error, with the record and its values named."""
        return RecordError(f"{self._name}: {formula}: {fault}")

    def run(
        self, formula: Formula, given: Arrays, *, fill: float = np.nan, in_place: bool = False, text: bool = False
    ) -> Arrays:
        """The formula's outputs for arrays given, which are left alone; outputs and scratch arrays begin as `fill`."""
        arrays = self._arrays(formula, given, fill)
        if in_place and formula.in_place:
            output, place = formula.in_place
            arrays[output] = arrays[place]
        if text:
            assert self._runs is not None
            try:
                formula.text(self._runs, arrays)
            except UserError as error:
                raise self.error(formula.name, f"its CUDA text fails: {error}") from None
        else:
            self._call(formula, arrays, fill)
        read = set(given) - set(formula.outputs) - {"g"}
        for name in read - (set(formula.in_place or ()) if in_place else set()):
            if not np.array_equal(arrays[name], given[name], equal_nan=True):
                raise self.error(formula.name, f"{'its CUDA text' if text else 'its twin'} changes {name}, an input")
        return {name: arrays[name] for name in formula.outputs}

    def twin(self, formula: Formula, usual: Arrays) -> Arrays:
        """What the twin gives for numbers of usual size, where all is finite; checks how it goes about it."""
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            found = self.run(formula, usual)
        for name, array in found.items():
            if not np.isfinite(array).all():
                place = np.unravel_index(int((~np.isfinite(array)).argmax()), array.shape)
                at = point(usual, place, array.shape)
                raise self.error(formula.name, f"{name} is {array[place]} at {at} ({array.dtype}), a number is right")
        lives = ", or writes s.a, where g lives" if "g" in usual else ""
        faults = [(self.run(formula, usual, fill=7.0), f"reads what it has not written{lives}")]
        if formula.in_place:
            fault = "differs where {} stands in the place of {}".format(*formula.in_place)
            faults.append((self.run(formula, usual, in_place=True), fault))
        for again, fault in faults:
            for name in formula.outputs:
                words = (f"its twin {fault}: for {name} it", "else")
                self.compare(formula.name, usual, again[name], found[name], 0.0, words)
        return found

    def texts(self, formula: Formula, given: Arrays) -> None:
        """Compares the CUDA text with the twin, apart and in place."""
        if self._runs is None:
            return
        for dtype in DTYPES:
            cast_to = as_dtype(given, dtype)
            twin = self.run(formula, cast_to)
            sizes = [np.abs(x) for x in cast_to.values() if x.dtype == dtype]
            for in_place in (False, True) if formula.in_place else (False,):
                text = self.run(formula, cast_to, in_place=in_place, text=True)
                for name in formula.outputs:
                    output = twin[name]
                    size = np.abs(output) + sum(x if x.shape == output.shape else x.max() for x in sizes)
                    bound = TEXT_ULPS * np.finfo(dtype).eps * size + np.finfo(dtype).tiny
                    where = f"{name} in the place of {formula.in_place[1]}" if in_place and formula.in_place else name
                    words = (f"{where}: the CUDA text", f"({np.dtype(dtype)}) and the twin")
                    self.compare(formula.name, cast_to, text[name], output, bound, words)

    def compare(self, formula: str, given: Arrays, found: Any, wanted: Any, bound: Any, words: tuple[str, str]) -> None:
        """Raises where numbers differ by more than the bound, or where one is NaN or infinite and not the other."""
        gap = np.abs(found - wanted)
        same = (found == wanted) | (np.isnan(found) & np.isnan(wanted)) | (np.isfinite(gap) & (gap <= bound))
        if same.all():
            return
        gap = np.where(same, -1.0, np.where(np.isfinite(gap), gap, np.inf))
        place = np.unravel_index(int(gap.argmax()), gap.shape)
        numbers = f"{words[0]} gives {found[place]:.9g}, {words[1]} {wanted[place]:.9g}"
        raise self.error(formula, f"at {point(given, place, gap.shape)} {numbers}")

    def kinks(self, formula: str, kinks: tuple[float, ...], slope: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The kinks; raises where the derivative jumps elsewhere, found by halving the intervals of a grid."""
        found = np.array(kinks, float)
        if not np.isfinite(found).all() or (np.diff(found) <= 0).any():
            raise self.error(formula, f"kinks must be finite numbers that rise, not {kinks}")
        near = [kink + side * 1e-3 * max(1.0, abs(kink)) for kink in found for side in (-1, 1)]
        grid = np.unique(np.concatenate([np.linspace(-8, 8, 130), *np.outer((-1, 1), np.geomspace(9, 100, 20)), near]))
        low, high = grid[:-1], grid[1:]
        apart = sides(low, found) == sides(high, found)
        low, high = low[apart], high[apart]
        before, after = slope(low), slope(high)
        for _ in range(50):
            middle = (low + high) / 2
            between = slope(middle)
            left = np.abs(between - before) > np.abs(after - between)
            low, high = np.where(left, low, middle), np.where(left, middle, high)
            before, after = np.where(left, before, between), np.where(left, between, after)
        jump = np.abs(after - before) / np.maximum(1, np.abs(before) + np.abs(after))
        if jump.max() > 1e-4:
            k = int(jump.argmax())
            where = f"the derivative jumps from {before[k]:.6g} to {after[k]:.6g} at {low[k]:.6g}"
            raise self.error(formula, f"{where}, and kinks are {tuple(map(float, kinks))}")
        return found

    def slopes(
        self,
        formula: str,
        given: Arrays,
        x: str,
        value: Callable[[Arrays], np.ndarray],
        found: np.ndarray,
        kinks: np.ndarray,
        origin: Any = 0.0,
    ) -> None:
        """Compares derivatives of `value` by x with central differences, except across a kink (of x - origin)."""
        h = 1e-5 * np.maximum(1, np.abs(given[x]))
        above, below = given[x] + h, given[x] - h
        numeric, rounding = np.empty_like(found), np.empty_like(found)
        reduced = value(given).shape != found.shape  # several columns in one number: these one after the other
        for column in range(found.shape[1]) if reduced else (slice(None),):
            ends = []
            for side in (above, below):
                moved = given[x].copy()
                moved[:, column] = side[:, column]
                ends.append(value({**given, x: moved}))
            ends = [end[:, column % end.shape[1]] if reduced else end for end in ends]
            numeric[:, column] = (ends[0] - ends[1]) / (above - below)[:, column]
            rounding[:, column] = ROUNDING * np.maximum(*np.abs(ends)) / h[:, column]
        crossing = sides(above - origin, kinks) != sides(below - origin, kinks)
        numeric = np.where(crossing, found, numeric)
        bound = TOLERANCE * np.maximum(np.abs(found), np.abs(numeric)) + 4 * rounding + 1e-12
        self.compare(formula, given, found, numeric, bound, ("it", "central differences give"))

    def keeps_nan(self, formula: Formula, given: Arrays, x: str, output: str) -> None:
        """A NaN must not be hidden: else nobody sees that a training diverged."""
        found = self.run(formula, {**given, x: np.full_like(given[x], np.nan)})[output]
        if not np.isnan(found).all():
            raise self.error(formula.name, f"at {x} = nan {output} is {found[~np.isnan(found)][0]:.9g}, nan is right")

    def _arrays(self, formula: Formula, given: Arrays, fill: float) -> Arrays:
        like = next(given[name] for name in ("v", "y", "w", *formula.arguments) if name in given)
        shapes = {"loss": (len(like), self.record.losses_width(like.shape[-1]))} if "loss" in formula.outputs else {}
        made = {name: np.full(shapes.get(name, like.shape), fill, like.dtype) for name in formula.outputs}
        return {**made, **{name: array.copy() for name, array in given.items()}}

    def _call(self, formula: Formula, arrays: Arrays, fill: float) -> None:
        first = arrays[formula.arguments[0]]
        scratch = Scratch(first.shape, first.dtype)
        for name in "abc":
            getattr(scratch, name).fill(fill)
        if "g" in arrays and np.isnan(fill):
            scratch.a[...] = arrays["g"]  # where g lives
            arrays["g"] = scratch.a
        try:
            formula.twin(*(arrays[name] for name in formula.arguments), scratch, **formula.values)
        except Exception as error:
            raise self.error(formula.name, f"its twin fails ({first.dtype}): {type(error).__name__}: {error}") from None

    def makes_no_arrays(self, formula: Formula, usual: Arrays) -> None:
        """A training step must not ask for memory: the twin is run on large arrays, and its memory traced."""
        repeats = -(-(2**18) // usual[formula.arguments[0]].size)
        arrays = self._arrays(formula, {name: np.concatenate([x] * repeats) for name, x in usual.items()}, 0.0)
        first = arrays[formula.arguments[0]]
        scratch = Scratch(first.shape, first.dtype)
        peaks = []
        tracing = tracemalloc.is_tracing()
        if not tracing:
            tracemalloc.start()
        try:
            for _ in range(2):  # scratch arrays are made when first used
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                formula.twin(*(arrays[name] for name in formula.arguments), scratch, **formula.values)
                peaks.append(tracemalloc.get_traced_memory()[1] - before)
        finally:
            if not tracing:
                tracemalloc.stop()
        if peaks[-1] >= first.size // 2:  # NumPy's own buffers are smaller, and do not grow
            what = f"its twin makes arrays, {peaks[-1]} bytes for {first.size} numbers"
            raise self.error(formula.name, f"{what}: write with out= into s.a, s.b, s.c and s.mask")


def point(given: Arrays, place: tuple[Any, ...], shape: tuple[int, ...]) -> str:
    """The inputs at a place, in words; of a row where it is the row that counts."""
    words = []
    for name, array in given.items():
        if array.ndim < 2 or array.shape == shape:
            words.append(f"{name} = {array[place[: array.ndim]]:.9g}")
        else:
            words.append(f"{name} = {[float(f'{x:.6g}') for x in array[place[0]]]}")
    return ", ".join(words)


def sides(x: np.ndarray, kinks: np.ndarray) -> np.ndarray:
    """On which side of each kink a number lies, or on the kink itself."""
    passed: np.ndarray = np.digitize(x, kinks) + np.digitize(x, kinks, right=True)
    return passed


def numbers(rows: int, seed: int, usual: float = 3.0) -> np.ndarray:
    """(rows, COLUMNS) of all magnitudes up to `USUAL`, of both signs."""
    rng = np.random.default_rng(seed)
    wide = 10.0 ** rng.uniform(-3, np.log10(USUAL), (rows, COLUMNS)) * rng.choice((-1, 1), (rows, COLUMNS))
    return np.where(rng.random((rows, COLUMNS)) < 0.5, usual * rng.standard_normal((rows, COLUMNS)), wide)


def as_dtype(given: Arrays, dtype: Any) -> Arrays:
    """The arrays in that precision; class indices stay."""
    return {name: array.astype(dtype) if array.dtype.kind == "f" else array for name, array in given.items()}
