"""`check_record`: every record of the package passes, and each fault planted in a record is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gpu_bp import UserError, cuda_text, registry, testing
from gpu_bp.spec import Activation, Flag, FreeLoss, FusedLoss, Numbers, Parameter, Record, Twin, Update
from gpu_bp.testing import RecordError, check_record, variants

RECORDS: list[Record] = [
    *dict.fromkeys((*registry.ACTIVATIONS.values(), *registry.LOSSES.values(), *registry.UPDATES.values()))
]
named = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)


@named
def test_twins_of_the_package(record: Record) -> None:
    assert "is right" in check_record(record, cuda="skip")


@pytest.mark.kernels
@named
def test_texts_of_the_package(record: Record) -> None:
    assert check_record(record, backend="numpy", cuda="require").endswith("its CUDA text agrees, run by c++")


def test_variants() -> None:
    """Both sides of a default where its interval has them, options on and off, and all at once."""
    record = replace(
        registry.activation("tanh"),
        values={},
        parameters={
            "a": Parameter(1.0),
            "b": Parameter(0.0, "[0, 1)"),
            "c": Flag(),
            "d": Numbers((0.9, 0.999), "[0, 1)", count=2),
            "e": Parameter(1.0, "[1, 1]"),
        },
    )
    default, *others = [dict(variant.values) for variant in variants(record)]
    assert default == {"a": 1.0, "b": 0.0, "c": False, "d": (0.9, 0.999), "e": 1.0}
    changed = [{key: value for key, value in other.items() if value != default[key]} for other in others]
    betas = tuple(0.8 * beta for beta in (0.9, 0.999)), tuple(beta - 0.3 for beta in (0.9, 0.999))
    alone = [{"a": 1.25}, {"a": 0.8}, {"b": 0.3}, {"c": True}, {"d": betas[0]}, {"d": betas[1]}]
    assert changed == [*alone, {"a": 1.25, "b": 0.3, "c": True, "d": betas[0]}]


# A record of each kind, as a user would write it -----------------------------------------------------------------


def _value(v: Any, y: Any, s: Any, slope: float) -> None:
    np.less(v, 0, out=s.mask)
    if y is not v:
        np.copyto(y, v)
    np.multiply(y, slope, out=y, where=s.mask)


def _delta(e: Any, v: Any, delta: Any, s: Any, slope: float) -> None:
    np.less(v, 0, out=s.mask)
    if delta is not e:
        np.copyto(delta, e)
    np.multiply(delta, slope, out=delta, where=s.mask)


leaky = Activation(
    name="leaky",
    source="nobody",
    parameters={"slope": Parameter(1.5, "(0, 2]")},
    value=Twin("y = v < T(0) ? slope * v : v;", _value),
    delta=Twin("delta = v < T(0) ? slope * e : e;", _delta),
    derivative_from="net_input",
    kinks=lambda slope: (0.0,),
)


def _error(y: Any, d: Any, loss: Any, e: Any, s: Any, weight: float) -> None:
    np.subtract(y, d, out=e)
    np.multiply(e, e, out=loss)
    loss *= weight
    e *= 2 * weight


square = FreeLoss(
    name="square",
    source="nobody",
    targets="real",
    parameters={"weight": Parameter(1.0, "(0, inf)")},
    error_signal=Twin("const T r = y - d; loss = weight * r * r; e = T(2) * weight * r;", _error),
)


def _fused(v: Any, d: Any, y: Any, loss: Any, delta: Any, s: Any) -> None:
    np.exp(v, out=y)
    np.multiply(d, v, out=loss)
    np.subtract(y, loss, out=loss)
    np.subtract(y, d, out=delta)


counts = FusedLoss(
    name="counts",
    source="nobody",
    targets="counts",
    output_activation="exponential",
    delta=Twin("y = exp(v); loss = y - d * v; delta = y - d;", _fused),
)


def _update(w: Any, g: Any, mean: Any, s: Any, rate: float, rest: float) -> None:
    np.subtract(g, mean, out=s.b)
    s.b *= rest
    mean += s.b
    np.multiply(mean, rate, out=s.b)
    w -= s.b


averaged = Update(
    name="averaged",
    source="nobody",
    parameters={"beta": Parameter(0.9, "[0, 1)")},
    state=("mean",),
    scalar_names=("rate", "rest"),
    scalars=lambda step, learning_rate, beta: {"rate": learning_rate, "rest": 1 - beta},
    update=Twin("mean += rest * (g - mean); w -= rate * mean;", _update),
)

OWN: list[Any] = [leaky, square, counts, averaged]


@pytest.mark.parametrize("record", OWN, ids=lambda record: record.name)
def test_right_records(record: Record) -> None:
    assert "its CUDA text was not checked: it was left out" in check_record(record, cuda="skip")


@pytest.mark.kernels
@pytest.mark.parametrize("record", OWN, ids=lambda record: record.name)
def test_right_texts(record: Record) -> None:
    check_record(record, backend="numpy", cuda="require")


# Faults in the twins and around them -------------------------------------------------------------------------------


def twin(record: Any, field: str, function: Callable[..., None]) -> Any:
    """The record with another twin."""
    return replace(record, **{field: Twin(getattr(record, field).cuda, function)})


def text(record: Any, field: str, old: str, new: str) -> Any:
    """The record with another CUDA text."""
    formula = getattr(record, field)
    assert old in formula.cuda
    return replace(record, **{field: Twin(formula.cuda.replace(old, new), formula.numpy)})


def steps(*functions: Callable[..., None]) -> Callable[..., None]:
    def run(*arrays: Any, **values: Any) -> None:
        for function in functions:
            function(*arrays, **values)

    return run


def only_the_default(e: Any, v: Any, delta: Any, s: Any, slope: float) -> None:
    _delta(e, v, delta, s, 1.5)


def allocating(v: Any, y: Any, s: Any, slope: float) -> None:
    y[...] = np.where(v < 0, slope * v, v)


def reading_what_it_wrote(e: Any, v: Any, delta: Any, s: Any, slope: float) -> None:
    np.multiply(e, slope, out=delta)
    np.greater_equal(v, 0, out=s.mask)
    np.copyto(delta, e, where=s.mask)


def reading_scratch(v: Any, y: Any, s: Any, slope: float) -> None:
    s.a *= 0
    _value(v, y, s, slope)
    y += s.a


def keeping_outputs(v: Any, y: Any, s: Any, slope: float) -> None:
    np.less(y, 10, out=s.mask)
    before = s.mask.all()
    _value(v, y, s, slope)
    y += before


def hiding_nan(v: Any, y: Any, s: Any, slope: float) -> None:
    np.fmax(v, -1e30, out=y)
    np.less(y, 0, out=s.mask)
    np.multiply(y, slope, out=y, where=s.mask)


def cancelling(v: Any, y: Any, s: Any, slope: float) -> None:
    np.multiply(v, v, out=s.b)
    np.subtract(s.b, s.b, out=s.b)
    _value(v, y, s, slope)
    y += s.b


def overflowing(v: Any, y: Any, s: Any, slope: float) -> None:
    np.multiply(v, v, out=s.a)
    np.exp(s.a, out=y)


def writing_s_a(w: Any, g: Any, mean: Any, s: Any, rate: float, rest: float) -> None:
    np.multiply(mean, -1, out=s.a)
    _update(w, g, mean, s, rate, rest)


def dividing(w: Any, g: Any, mean: Any, s: Any, rate: float, rest: float) -> None:
    _update(w, g, mean, s, rate, rest)
    np.divide(g, mean, out=mean)


def changing_a_number(w: Any, g: Any, mean: Any, s: Any, rate: Any, rest: float) -> None:
    _update(w, g, mean, s, rate, rest)
    rate *= 2


def no_scalars(step: int, learning_rate: float, beta: float) -> dict[str, float]:
    return {"rat": learning_rate, "rest": 1 - beta}


def endless(step: int, learning_rate: float, beta: float) -> dict[str, float]:
    return {"rate": learning_rate, "rest": 1e300 * step * step}


TWINS: dict[str, tuple[Any, str]] = {
    "wrong derivative": (
        twin(leaky, "delta", steps(_delta, lambda e, v, delta, s, slope: np.multiply(delta, 1.001, out=delta))),
        r"leaky\(slope = 1.5\): delta: at v = \S+, e = \S+ it gives \S+, central differences give \S+$",
    ),
    "derivative of the default": (
        twin(leaky, "delta", only_the_default),
        r"leaky\(slope = 1.875\): delta: at v = -|leaky\(slope = 1.2",
    ),
    "allocates": (twin(leaky, "value", allocating), "value: its twin makes arrays, .* write with out="),
    "reads after writing in place": (
        twin(leaky, "delta", reading_what_it_wrote),
        r"delta: at e = \S+, v = \S+ its twin differs where delta stands in the place of e: for delta it gives",
    ),
    "reads scratch": (twin(leaky, "value", reading_scratch), r"value: y is nan at v = \S+ \(float32\), a number is"),
    "reads outputs": (twin(leaky, "value", keeping_outputs), "its twin reads what it has not written: for y it gives"),
    "writes nothing": (twin(leaky, "value", lambda v, y, s, slope: None), "value: y is nan at v = "),
    "changes an input": (
        twin(leaky, "delta", steps(_delta, lambda e, v, delta, s, slope: np.negative(v, out=v))),
        "delta: its twin changes v, an input",
    ),
    "hides NaN": (twin(leaky, "value", hiding_nan), "value: at v = nan y is .*, nan is right"),
    "NaN at the ends": (twin(leaky, "value", cancelling), "value: at v = 1.79769313e.308 or -1.79769313e.308 y is nan"),
    "overflows": (twin(leaky, "value", overflowing), "its twin fails .*FloatingPointError: overflow"),
    "parameter it does not take": (
        twin(leaky, "value", lambda v, y, s: None),
        "value: its twin fails .* unexpected keyword argument 'slope'",
    ),
    "a name that is none": (replace(leaky, name="a b"), "a b: the name must be an identifier"),
    "derivative from nowhere": (
        replace(leaky, derivative_from="input"),
        "derivative_from: must be output or net_input, not 'input'",
    ),
    "no kinks": (
        replace(leaky, kinks=lambda slope: ()),
        r"kinks: the derivative jumps from 1.5 to 1 at \S+, and kinks are \(\)",
    ),
    "wrong kinks": (
        replace(leaky, kinks=lambda slope: (0.01,)),
        r"jumps from 1.5 to 1 at \S+, and kinks are \(0.01,\)",
    ),
    "falling kinks": (replace(leaky, kinks=lambda slope: (0.0, -1.0)), "kinks must be finite numbers that rise"),
    "wrong error signal": (
        twin(square, "error_signal", steps(_error, lambda y, d, loss, e, s, weight: np.multiply(e, 0.5, out=e))),
        r"square\(weight = 1.0\): error_signal: at y = \S+, d = \S+ it gives \S+, central differences give",
    ),
    "classes of a free loss": (replace(square, targets="classes"), "targets: classes are for a FusedLoss with per_row"),
    "wrong output": (
        twin(counts, "delta", steps(_fused, lambda v, d, y, loss, delta, s: np.multiply(y, 2, out=y))),
        r"counts: delta: at v = \S+, d = \S+ y gives \S+, and the output activation, exponential, ",
    ),
    "wrong delta": (
        twin(counts, "delta", steps(_fused, lambda v, d, y, loss, delta, s: np.copyto(delta, y))),
        r"counts: delta: at v = \S+, d = \S+ it gives \S+, central differences give",
    ),
    "loss that hides NaN": (
        twin(square, "error_signal", steps(_error, lambda y, d, loss, e, s, weight: np.fmax(loss, 0, out=loss))),
        "error_signal: at y = nan loss is 0, nan is right",
    ),
    "wrong scalar name": (
        replace(averaged, scalars=no_scalars),
        r"averaged\(beta = 0.9\): scalars: gives rat, rest; scalar_names are rate, rest",
    ),
    "scalar the twin does not take": (
        replace(averaged, scalar_names=("rat", "rest"), scalars=no_scalars),
        "update: its twin fails .* unexpected keyword argument 'rat'",
    ),
    "scalars fail": (replace(averaged, scalars=lambda step, rate: {}), "scalars: fails at step 10: TypeError"),
    "endless scalars": (replace(averaged, scalars=endless), "scalars: rest is inf at step 10000000"),
    "a name twice": (replace(averaged, state=("rate",)), "must be names, none of them twice and none w or g"),
    "writes s.a": (twin(averaged, "update", writing_s_a), "writes s.a, where g lives: for "),
    "changes a number": (twin(averaged, "update", changing_a_number), "update: its twin fails .* read-only"),
    "uphill": (
        twin(averaged, "update", steps(lambda w, g, *_, **__: np.negative(g, out=g), _update)),
        "update: the first step goes uphill: w from",
    ),
    "nothing by nothing": (twin(averaged, "update", dividing), "FloatingPointError: invalid value encountered"),
}


@pytest.mark.parametrize("name", TWINS)
def test_faults_of_twins(name: str) -> None:
    record, message = TWINS[name]
    with pytest.raises(RecordError, match=message) as caught:
        check_record(record, cuda="skip")
    assert "\n" not in str(caught.value)


def test_kinks_of_a_loss() -> None:
    """Huber's second derivative alone jumps; the absolute error's derivative does."""
    with pytest.raises(RecordError, match=r"kinks of y - d, d = \S+: the derivative jumps from (-1|0) to (0|1) at "):
        check_record(replace(registry.loss("mean_absolute_error"), kinks=lambda: ()), cuda="skip")


# Faults in the CUDA text -------------------------------------------------------------------------------------------

cross_entropy: Any = registry.loss("cross_entropy")
TEXTS: dict[str, tuple[Any, str]] = {
    "wrong value": (
        text(leaky, "value", "slope * v", "slope + v"),
        r"leaky\(slope = 1.5\): value: at v = -\S+ y: the CUDA text gives \S+, \(float32\) and the twin -",
    ),
    "wrong delta": (text(leaky, "delta", "slope * e", "e"), r"delta: at e = \S+, v = -\S+ delta: the CUDA text gives"),
    "hides NaN": (
        text(leaky, "value", "slope * v : v", "slope * v : fmax(v, T(0))"),
        "at v = nan y: the CUDA text gives 0,",
    ),
    "a typo": (text(leaky, "value", "slope", "slop"), "value: its CUDA text fails: .*slop"),
    "a double": (text(leaky, "value", "slope * v", "1.5 * v"), "its CUDA text fails: .*double"),
    "reads after writing in place": (
        text(leaky, "delta", "delta = v < T(0) ? slope * e : e;", "delta = T(0); delta = v < T(0) ? slope * e : e;"),
        "delta in the place of e: the CUDA text gives 0,",
    ),
    "wrong error signal": (
        text(square, "error_signal", "T(2) * weight", "weight"),
        r"error_signal: at y = \S+, d = \S+ e: the CUDA text gives",
    ),
    "wrong loss": (text(square, "error_signal", "r * r", "r"), "loss: the CUDA text gives"),
    "wrong fused delta": (text(counts, "delta", "delta = y - d", "delta = d - y"), "delta: the CUDA text gives"),
    "wrong update": (
        text(averaged, "update", "rate * mean", "rate * g"),
        r"update: at w = \S+, g = \S+, mean = \S+ w: the CUDA text gives",
    ),
    "wrong state": (text(averaged, "update", "rest * (g - mean)", "rest * g"), r"mean = \S+ w: the CUDA text gives"),
    "unknown scalar": (text(averaged, "update", "rest", "left_over"), "update: its CUDA text fails: .*left_over"),
    "wrong row": (text(cross_entropy, "delta", "delta[j] = y[j] - d", "delta[j] = y[j]"), "delta: the CUDA text gives"),
    "part of a warp": (
        text(cross_entropy, "delta", "sum = warp_sum(sum);", "if (lane < 16) sum = warp_sum(sum);"),
        "its CUDA text fails: not all 32 lanes come to a shuffle of the warp",
    ),
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", TEXTS)
def test_faults_of_texts(name: str) -> None:
    record, message = TEXTS[name]
    check_record(record, cuda="skip")  # the twins are right
    with pytest.raises(RecordError, match=message) as caught:
        check_record(record, backend="numpy", cuda="require")
    assert "\n" not in str(caught.value)


@pytest.mark.kernels
def test_texts_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, by way of CuPy; here its stand-in."""
    from cuda_on_cpu.backend import cupy_backend_module

    runs = cuda_text.OnDevice(cupy_backend_module())
    monkeypatch.setattr(testing, "runner", lambda backend: (runs, ""))
    for record in (leaky, averaged, cross_entropy):
        assert check_record(record).endswith(f"its CUDA text agrees, run by {runs.where}")
    for name in ("a typo", "reads after writing in place"):
        with pytest.raises(RecordError, match=TEXTS[name][1]):
            check_record(TEXTS[name][0])


# Machines without a compiler ---------------------------------------------------------------------------------------


@pytest.fixture
def asked_anew() -> Any:
    cuda_text.host_runner.cache_clear()
    yield
    cuda_text.host_runner.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    why = r"there is no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\), and no GPU is used"
    with pytest.raises(UserError, match=f"the CUDA text of leaky cannot be checked: {why}"):
        check_record(leaky, backend="numpy", cuda="require")
    summary = check_record(leaky, backend="numpy")
    assert summary.startswith(
        "leaky is right with 3 choices of its parameters; its CUDA text was not checked: there is"
    )


@pytest.mark.usefixtures("asked_anew")
def test_a_compiler_that_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'there are no headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(broken))
    with pytest.raises(UserError, match=r"c\+\+ does not work: there are no headers"):
        check_record(leaky, backend="numpy", cuda="require")


def test_other_kinds() -> None:
    penalty = next(iter(registry.PENALTIES.values()))
    with pytest.raises(
        UserError, match="is a Penalty; known: Activation, RowActivation, FreeLoss, FusedLoss, GroupedLoss, Update"
    ):
        check_record(penalty)
    not_a_record: Any = "relu"
    with pytest.raises(UserError, match="relu is a str; known: Activation"):
        check_record(not_a_record)
