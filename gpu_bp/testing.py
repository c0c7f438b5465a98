"""Checks of a record: its derivative against differences, and its NumPy twin against its CUDA text.

    print(check_record(swish))

What the package's own records pass, a record of one's own passes too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from gpu_bp import registry
from gpu_bp.backends import cuda_kernels as kernels
from gpu_bp.backends import cuda_rows
from gpu_bp.backends.host_scratch import Scratch
from gpu_bp.backends.numpy_backend import HostNumbers
from gpu_bp.cuda_text import Runner, runner
from gpu_bp.errors import UserError
from gpu_bp.formula_check import COLUMNS, DTYPES, Arrays, Check, Formula, RecordError, as_dtype, numbers
from gpu_bp.spec import (
    Activation,
    Flag,
    FreeLoss,
    FusedLoss,
    GroupedLoss,
    Loss,
    Numbers,
    Parameter,
    Record,
    RowActivation,
    Update,
)

__all__ = ["RecordError", "check_record", "random_targets", "variants"]


def check_record(record: Record, *, backend: str = "auto", cuda: Literal["auto", "require", "skip"] = "auto") -> str:
    """Checks a record with its defaults and with other values of its parameters.

    Derivatives and deltas are compared with central differences in float64, around the kinks; the NumPy twins must
    write into the arrays that they are given, make none, and allow an output in an input's place. CUDA text is run on a
    GPU where one computes, or else compiled for the host, and compared with the twins in float32 and float64.

    Args:
        record: an activation, a loss or an update rule.
        backend: where the text is run: "cupy", on a GPU; "numpy", on the host; "auto".
        cuda: "require" fails where nothing can run the text, "auto" then only says so, "skip" leaves it out.

    Returns:
        A line that says what was compared.

    Raises:
        RecordError: one line with the record, the check, the point and both numbers.
        UserError: the CUDA text is required and nothing can run it, or a record of another kind.
    """
    if type(record) not in _CHECKS:
        known = ", ".join(kind.__name__ for kind in _CHECKS)
        raise UserError(f"{getattr(record, 'name', record)!s} is a {type(record).__name__}; known: {known}")
    if not (record.name.isascii() and record.name.isidentifier()):
        raise RecordError(f"{record.name}: the name must be an identifier, since kernels are called so")
    runs, why = (None, "it was left out") if cuda == "skip" else runner(backend)
    if cuda == "require" and runs is None:
        raise UserError(f"the CUDA text of {record.name} cannot be checked: {why}")
    chosen = list(variants(record))
    with np.errstate(all="ignore"):  # where numbers are of usual size, `Check.twin` raises
        for variant in chosen:
            _CHECKS[type(record)](Check(variant, runs))
    times = f"with {len(chosen)} choices of its parameters" if record.parameters else "as it stands"
    compared = f"its CUDA text agrees, run by {runs.where}" if runs else f"its CUDA text was not checked: {why}"
    return f"{record.name} is right {times}; {compared}"


def variants(record: Record) -> Iterator[Record]:
    """The record with its defaults, with another value or two of each parameter, and with all of them changed."""
    others = {name: _other_values(parameter) for name, parameter in record.parameters.items()}
    yield record
    for name, values in others.items():
        yield from (record.with_parameters(**{name: value}) for value in values)
    if len(others) > 1:
        yield record.with_parameters(**{name: values[0] for name, values in others.items() if values})


def _other_values(parameter: Parameter | Flag | Numbers) -> list[Any]:
    if isinstance(parameter, Flag):
        return [not parameter.default]
    changes: list[Callable[[float], float]] = [
        lambda x: 1.25 * x,
        lambda x: 0.8 * x,
        lambda x: x + 0.3,
        lambda x: x - 0.3,
    ]
    several = isinstance(parameter, Numbers)
    if isinstance(parameter, Numbers) and parameter.count is None:
        lists = [parameter.default[:1], (0.2, 0.45, 0.9), (1.0, 2.0, 3.5), (-1.5, -0.5, 2.0)]
        return [value for value in lists if value != parameter.default and parameter.read(value) is not None][:2]
    given = [tuple(map(change, parameter.default)) if several else change(parameter.default) for change in changes]  # type: ignore[arg-type]
    return [value for value in given if value != parameter.default and parameter.read(value) is not None][:2]


def random_targets(loss: Loss, rows: int, n_outputs: int, rng: np.random.Generator) -> np.ndarray:
    """Targets that suit a loss."""
    if loss.targets == "classes":
        return rng.integers(0, n_outputs, rows)
    if loss.targets == "unit":
        return rng.uniform(0, 1, (rows, n_outputs))
    if loss.targets == "signs":
        return rng.choice([-1.0, 1.0], (rows, n_outputs))
    if loss.targets == "counts":
        return rng.poisson(2.0, (rows, n_outputs)).astype(float)
    return rng.standard_normal((rows, n_outputs))


# What each kind of record is checked for ------------------------------------------------------------------------


def _activation(check: Check) -> None:
    record: Activation = check.record
    if record.derivative_from not in ("output", "net_input"):
        raise check.error("derivative_from", f"must be output or net_input, not {record.derivative_from!r}")
    names, values = tuple(record.values), tuple(record.values.values())
    x = "y" if record.derivative_from == "output" else "v"
    value_text = kernels.activation(record.name, record.value.cuda, names, False)
    delta_text = kernels.hidden_delta(record.name, record.delta.cuda, x, names)
    value = Formula(
        "value",
        record.value.numpy,
        ("v", "y"),
        ("y",),
        lambda run, a: run.elements(value_text, a["v"], *values, a["v"], a["y"]),
        record.values,
        ("y", "v"),
    )
    delta = Formula(
        "delta",
        record.delta.numpy,
        ("e", x, "delta"),
        ("delta",),
        lambda run, a: run.elements(delta_text, a["e"], a[x], *values, a["delta"]),
        record.values,
        ("delta", "e"),
    )

    def phi(v: np.ndarray) -> np.ndarray:
        return check.run(value, {"v": v})["y"]

    def errors_and_x(e: np.ndarray, v: np.ndarray) -> Arrays:
        return {"e": e, x: phi(v) if x == "y" else v}

    def slope(v: np.ndarray) -> np.ndarray:
        v = v[:, None]
        return check.run(delta, errors_and_x(np.ones_like(v), v))["delta"][:, 0]

    for dtype in DTYPES:
        v, e = (numbers(64, seed).astype(dtype) for seed in (1, 2))
        check.twin(value, {"v": v})
        found = check.twin(delta, errors_and_x(e, v))["delta"]
    check.makes_no_arrays(value, {"v": v})
    check.makes_no_arrays(delta, errors_and_x(e, v))
    kinks = check.kinks("kinks", record.kinks(**record.values), slope)
    check.slopes("delta", {"v": v, "e": e}, "v", lambda a: a["e"] * phi(a["v"]), found, kinks)
    check.keeps_nan(value, {"v": v}, "v", "y")
    info = np.finfo(float)
    special = [0.0, -0.0, *(sign * x for x in (1e-4, 300, 1e4, 1e30, info.max, np.inf, np.nan) for sign in (1, -1))]
    ends = {"v": np.concatenate([v, np.resize(special, (2, COLUMNS))])}
    check.texts(value, ends)
    check.texts(delta, errors_and_x(numbers(66, 3), ends["v"]))
    at_ends = phi(np.full((1, COLUMNS), info.max) * np.resize([1, -1], COLUMNS))
    if np.isnan(at_ends).any():
        raise check.error("value", f"at v = {info.max:.9g} or {-info.max:.9g} y is nan, which no number gives")


def _row_activation(check: Check) -> None:
    record: RowActivation = check.record
    check_rows = _rows_text(record, record.value.cuda, lambda a: (a["v"], a["v"], a["y"], a["y"], a["y"]))
    value = Formula("value", record.value.numpy, ("v", "y"), ("y",), check_rows, record.values)
    given = {"v": numbers(6, 1)}
    check.twin(value, given)
    check.makes_no_arrays(value, given)
    check.keeps_nan(value, given, "v", "y")
    check.texts(value, given)


def _free_loss(check: Check) -> None:
    record: FreeLoss = check.record
    if record.targets == "classes":
        raise check.error("targets", "classes are for a FusedLoss with per_row")
    text = kernels.free_loss(record.name, record.error_signal.cuda, tuple(record.values), "delta = e;", ())
    formula = Formula(
        "error_signal",
        record.error_signal.numpy,
        ("y", "d", "loss", "e"),
        ("loss", "e"),
        lambda run, a: run.elements(text, a["y"], a["y"], a["d"], *record.values.values(), a["loss"], a["e"]),
        record.values,
    )
    given = {"y": numbers(64, 1), "d": random_targets(record, 64, COLUMNS, np.random.default_rng(2))}
    check.twin(formula, as_dtype(given, np.float32))
    found = check.twin(formula, given)["e"]
    check.makes_no_arrays(formula, given)
    for d in given["d"][0, :3]:

        def slope(r: np.ndarray, d: float = d) -> np.ndarray:
            r = r[:, None]
            return check.run(formula, {"y": r + d, "d": np.full_like(r, d)})["e"][:, 0]

        kinks = check.kinks(f"kinks of y - d, d = {d:.6g}", record.kinks(**record.values), slope)
    check.slopes("error_signal", given, "y", lambda a: check.run(formula, a)["loss"], found, kinks, given["d"])
    check.keeps_nan(formula, given, "y", "loss")
    check.texts(formula, given)


def _fused_loss(check: Check) -> None:
    record: FusedLoss = check.record
    names, values = tuple(record.values), tuple(record.values.values())
    outputs = ("y", "loss", "delta")
    if record.per_row:
        text = _rows_text(record, record.delta.cuda, lambda a: tuple(a[name] for name in ("v", "d", *outputs)))
    else:
        kernel = kernels.fused_loss(record.name, record.delta.cuda, names)

        def text(run: Runner, a: Arrays) -> None:
            run.elements(kernel, a["v"], a["d"], *values, *(a[name] for name in outputs))

    formula = Formula("delta", record.delta.numpy, ("v", "d", *outputs), outputs, text, record.values)
    phi = registry.activation(record.output_activation)
    n = 6 if record.per_row else 64  # more rows than a block of threads has warps
    rng, v = np.random.default_rng(2), numbers(n, 1)
    targets = [random_targets(record, n, COLUMNS, rng)]
    if record.targets == "classes":
        targets.append(rng.dirichlet(np.ones(COLUMNS), n))
    for d in targets:
        given = {"v": v, "d": d}
        check.twin(formula, as_dtype(given, np.float32))
        found = check.twin(formula, given)
        check.makes_no_arrays(formula, given)
        check.slopes("delta", given, "v", lambda a: check.run(formula, a)["loss"], found["delta"], np.array([]))
        y = np.empty_like(v)
        phi.value.numpy(v, y, Scratch(v.shape, v.dtype), **phi.values)
        words = ("y", f"and the output activation, {record.output_activation},")
        check.compare("delta", given, found["y"], y, 1e-12 * np.maximum(1, np.abs(y)), words)
        check.keeps_nan(formula, given, "v", "loss")
        check.texts(formula, given)


def _grouped_loss(check: Check) -> None:
    record: GroupedLoss = check.record
    values = tuple(record.values.items())
    text = kernels.grouped_loss(record.name, record.error_signals.cuda, record.groups, values, "delta = e;", ())
    labels, best = record.labels, record.best(**record.values)
    if len(set(labels)) < len(labels) or not set(record.powers) <= set(labels):
        raise check.error("labels", f"must differ, and those of powers be among them: {labels}, {[*record.powers]}")
    if not best or not all(0 <= k < record.groups for k in best):
        raise check.error("best", f"must be places of the {record.groups} outputs, not {best}")
    numbers_of = [value for _, value in values if not isinstance(value, tuple)]

    def run(runs: Runner, a: Arrays) -> None:
        runs.elements(text, a["y"], a["y"], a["d"], a["d"].shape[1], *numbers_of, a["loss"], a["e"])

    def twin(d: np.ndarray, y: np.ndarray, loss: np.ndarray, e: np.ndarray, s: Scratch, **chosen: Any) -> None:
        record.error_signals.numpy(record.grouped(y), d, loss, record.grouped(e), s, **chosen)

    formula = Formula("error_signals", twin, ("d", "y", "loss", "e"), ("loss", "e"), run, record.values)
    y = np.concatenate([numbers(16, 1 + k) for k in range(record.groups)], axis=1)
    given = {"y": y, "d": random_targets(record, 16, COLUMNS, np.random.default_rng(0))}
    check.twin(formula, as_dtype(given, np.float32))
    found = check.twin(formula, given)["e"]
    check.makes_no_arrays(formula, given)
    for k in range(record.groups):

        def slope(r: np.ndarray, k: int = k) -> np.ndarray:
            outputs = np.zeros((len(r), record.groups))
            outputs[:, k] = r
            return check.run(formula, {"y": outputs, "d": np.zeros((len(r), 1))})["e"][:, k]

        kinks = check.kinks(f"kinks of output {k}", record.kinks(**record.values), slope)
    origin = np.tile(given["d"], record.groups)
    check.slopes("error_signals", given, "y", lambda a: check.run(formula, a)["loss"], found, kinks, origin)
    check.keeps_nan(formula, given, "y", "loss")
    check.texts(formula, given)


def _update(check: Check) -> None:
    record: Update = check.record
    names = ("w", "g", *record.state, *record.scalar_names)
    if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        raise check.error("state and scalar_names", f"must be names, none of them twice and none w or g: {names[2:]}")
    parameters = {name: value for name, value in record.values.items() if name != "weight_decay"}  # a penalty's affair

    def scalars_of(step: int, rate: float) -> dict[str, float]:
        try:
            scalars = record.scalars(step, rate, **parameters)
        except Exception as error:
            raise check.error("scalars", f"fails at step {step}: {type(error).__name__}: {error}") from None
        if set(scalars) != set(record.scalar_names):
            raise check.error(
                "scalars", f"gives {', '.join(scalars)}; scalar_names are {', '.join(record.scalar_names)}"
            )
        for name, value in scalars.items():
            if not np.isfinite(value):
                raise check.error("scalars", f"{name} is {value} at step {step}, learning_rate {rate}")
        return {name: float(scalars[name]) for name in record.scalar_names}

    for step in (10, 1000, 10**7):
        scalars_of(step, 0.01)
    kernel = kernels.update(record.name, record.update.cuda, record.state, record.scalar_names)
    n = 64 * COLUMNS
    given = {"w": numbers(64, 1).reshape(n), "g": np.empty(n), **{name: np.zeros(n) for name in record.state}}

    def twin(w: np.ndarray, *arrays: Any, **scalars: float) -> None:
        """As a step calls it: with numbers as arrays () that are not to be written to."""
        held = HostNumbers(len(scalars), w.dtype)
        held.set(tuple(scalars.values()))
        record.update.numpy(w, *arrays, **dict(zip(scalars, held.arrays, strict=True)))

    for step in range(1, 5):
        scalars = scalars_of(step, 0.05 / step)

        def text(run: Runner, a: Arrays, scalars: Mapping[str, float] = scalars) -> None:
            packed = np.array([1.0, *scalars.values()], a["w"].dtype)
            run.elements(kernel, packed, a["g"], n, a["w"], *(a[name] for name in record.state))

        outputs = ("w", *record.state)
        formula = Formula("update", twin, ("w", "g", *record.state), outputs, text, scalars)
        given["g"] = numbers(64, 10 + step).reshape(n)
        given["g"][::7] = 0
        check.twin(formula, as_dtype(given, np.float32))
        found = check.twin(formula, given)
        if step == 1:
            check.makes_no_arrays(formula, given)
            uphill = (found["w"] - given["w"]) * given["g"] > 0
            if uphill.any():
                before, after, g = (float(x[uphill][0]) for x in (given["w"], found["w"], given["g"]))
                raise check.error(
                    "update", f"the first step goes uphill: w from {before:.6g} to {after:.6g} at g = {g:.6g}"
                )
        check.texts(formula, given)
        given |= found


def _rows_text(
    record: Record, text: str, arrays: Callable[[Arrays], tuple[np.ndarray, ...]]
) -> Callable[[Runner, Arrays], None]:
    """Runs the text of a kernel in which a warp handles a row: on v, d, y, loss and delta."""

    def run(runs: Runner, given: Arrays) -> None:
        called, (v, d, *rest) = f"gpu_bp_{record.name}", arrays(given)
        types = (cuda_rows.CUDA_NAMES[v.dtype], cuda_rows.CUDA_NAMES[d.dtype])
        source = cuda_rows.row_kernel_source(called, text, *types, tuple(record.values))
        runs.rows(called, source, v, d, *rest, *record.values.values())

    return run


_CHECKS: dict[type[Any], Callable[[Check], None]] = {
    Activation: _activation,
    RowActivation: _row_activation,
    FreeLoss: _free_loss,
    FusedLoss: _fused_loss,
    GroupedLoss: _grouped_loss,
    Update: _update,
}
