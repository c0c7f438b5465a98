"""Kernels that are not one formula an element: rows (one warp each), sums, updates; and arrays of other layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from update_rules import RULES, VARIANTS, numbers

from cuda_on_cpu import samples
from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.fake_cupy import FakeCupy
from cuda_on_cpu.references import assert_near, assert_same_kind
from cuda_on_cpu.test_kernels_on_cpu import ACTIVATIONS, FREE_LOSSES, backend, dtypes, orders
from gpu_bp import registry
from gpu_bp.backends import NumpyBackend
from gpu_bp.backends import cuda_kernels as texts
from gpu_bp.spec import FreeLoss, FusedLoss, Update

pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

Long = np.longdouble


# Rows ------------------------------------------------------------------------------------------------------


def row_results(b: Any, v: np.ndarray, target: np.ndarray, label_smoothing: float = 0.0) -> tuple[np.ndarray, ...]:
    """losses, delta and y of cross_entropy."""
    losses, delta, y = (b.to_device(np.full(s, np.nan, v.dtype)) for s in ((len(v), 1), v.shape, v.shape))
    loss, phi = registry.loss("cross_entropy", label_smoothing=label_smoothing), registry.activation("softmax")
    b.output_delta(loss, phi, b.to_device(v), b.to_device(target), y, losses, delta)
    return b.to_host(losses), b.to_host(delta), b.to_host(y)


def softmax_reference(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y and log y, in long doubles."""
    exact = v.astype(Long)
    shifted = exact - exact.max(axis=1, keepdims=True)
    log_y = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.exp(log_y), log_y


def logits(rows: int, n: int, dtype: str) -> np.ndarray:
    """Random rows, of small and of large numbers, one of equal ones, one with a far larger one."""
    v = np.random.default_rng(n).standard_normal((rows, n)) * np.resize([1, 30, 0, 1, 5], rows)[:, None]
    v[3 % rows, n // 2] += 60
    result: np.ndarray = v.astype(dtype)
    return result


@dtypes
@pytest.mark.parametrize("label_smoothing", [0.0, 0.25])
@pytest.mark.parametrize("n", range(1, 71))
def test_softmax_and_cross_entropy(n: int, label_smoothing: float, dtype: str) -> None:
    """Every width from one column to more than two warps; five rows, so that the second block is not full."""
    v = logits(5, n, dtype)
    y, log_y = softmax_reference(v)
    # top - v is rounded before exp is taken of it
    spread = 2 + np.abs(v.astype(Long) - v.max(axis=1, keepdims=True)) + np.log2(n)
    rng = np.random.default_rng(n + 100)
    classes = rng.integers(0, n, len(v))
    probabilities = rng.dirichlet(np.ones(n), len(v)).astype(dtype)
    for b in (backend(), NumpyBackend()):
        output = b.to_device(np.full_like(v, np.nan))
        b.activate(registry.activation("softmax"), b.to_device(v), None, output)
        assert_near(b.to_host(output), y, y * spread)
        for target, d in ((classes, np.eye(n)[classes]), (probabilities, probabilities.astype(Long))):
            d = d * (1 - label_smoothing) + label_smoothing / Long(n)
            losses, delta, output = row_results(b, v, target, label_smoothing)
            assert_near(output, y, y * spread)
            assert_near(delta, y - d, y * spread + d)
            size = (d * (np.abs(log_y) + spread)).sum(axis=1, keepdims=True) * (1 + np.log2(n))
            assert_near(losses, -(d * log_y).sum(axis=1, keepdims=True), size)


@dtypes
def test_softmax_in_place_and_with_biases(dtype: str) -> None:
    v, biases = logits(6, 9, dtype), samples.like(np.empty(9, dtype), 1)
    for b in (backend(), NumpyBackend()):
        net_input = b.to_device(v)
        b.activate(registry.activation("softmax"), net_input, b.to_device(biases), net_input)
        assert_near(b.to_host(net_input), softmax_reference(v + biases)[0], 100)


@dtypes
@pytest.mark.parametrize("n", [2, 31, 33, 70])
def test_cross_entropy_of_special_rows(n: int, dtype: str) -> None:
    """The kernel does what the twin does with infinities, NaN and the largest numbers.

    A row with plus infinity or NaN has no softmax. A logit of minus infinity is a y of 0: with d = 0 it adds
    nothing to the loss.
    """
    largest = np.finfo(dtype).max
    v = np.random.default_rng(0).standard_normal((10, n)).astype(dtype)
    for row, value in enumerate([-np.inf, np.inf, np.nan, largest, -largest]):
        v[row, n - 1] = value
        v[row + 5, 0] = value
    v[4, 0] = v[9, n - 1] = largest
    classes = np.arange(10) % 2 * (n - 1)
    halves = np.full(v.shape, 0, dtype)
    halves[:, 0] = halves[:, 1] = 0.5
    for target in (classes, halves, np.eye(n, dtype=dtype)[classes]):
        got, twin = row_results(backend(), v, target), row_results(NumpyBackend(), v, target)
        for kernel, numpy in zip(got, twin, strict=True):
            assert_same_kind(kernel, numpy)
    losses = row_results(backend(), v, classes)[0][:, 0]
    assert np.isfinite(losses[[0, 3]]).all() or n == 2
    assert np.isnan(losses[[1, 2, 6, 7]]).all()


@orders
def test_row_kernels_in_any_order_of_threads(order: Any) -> None:
    v = logits(5, 40, "float64")
    classes = np.arange(5)
    for one, two in zip(row_results(backend(), v, classes), row_results(backend(order), v, classes), strict=True):
        np.testing.assert_array_equal(one, two)


# Sums ------------------------------------------------------------------------------------------------------


@orders
@dtypes
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (2, 3), (16, 5), (17, 33), (100, 1), (1000, 4)])
def test_sums(rows: int, columns: int, dtype: str, order: Any) -> None:
    """Column sums, and the total of losses added to what is there, in double."""
    x = samples.like(np.empty((rows, columns), dtype), rows, 10)
    b = backend(order)
    sums, total = b.to_device(np.full(columns, np.nan, dtype)), b.to_device(np.array([3.5]))
    b.column_sums(b.to_device(x), sums)
    assert_near(b.to_host(sums), x.astype(Long).sum(axis=0), np.abs(x.astype(Long)).sum(axis=0))
    b.accumulate(b.to_device(x), total)
    error = abs(float(b.to_host(total)[0]) - (3.5 + x.astype(Long).sum()))
    assert error <= 4 * np.finfo(dtype).eps * np.abs(x).sum() + 1e-14


def test_total_is_kept_in_double() -> None:
    """A million losses of 1e-3 added to 1e5 would be lost in single precision."""
    b = backend()
    losses, total = b.to_device(np.full((4, 1), 1e-3, np.float32)), b.to_device(np.array([1e5]))
    for _ in range(100):
        b.accumulate(losses, total)
    assert float(b.to_host(total)[0]) == pytest.approx(1e5 + 0.4, rel=1e-9)


# Updates ---------------------------------------------------------------------------------------------------


def update_arrays(record: Update, dtype: str) -> list[np.ndarray]:
    """Parameters, gradient and state."""
    like = np.empty(1000, dtype)
    state = {name: np.abs(samples.like(like, 12 + k)) for k, name in enumerate(record.state)}
    if record.name == "rmsprop" and "mean" in state:
        state["square"] = 1 + state["mean"] ** 2  # there is a variance
    return [samples.like(like, 10), samples.like(like, 11, 5), *state.values()]


def run_update(b: Any, record: Any, arrays: list[np.ndarray], step: int, scale: float, n: int) -> list[np.ndarray]:
    w, g, *state = (b.to_device(x) for x in arrays)
    parameters = dict(record.values)
    decay = parameters.pop("weight_decay", None)
    scalars = record.scalars(step, 0.05, **parameters)
    penalties = [] if decay is None else [registry.PENALTIES["weight_decay"]]
    scalars |= {"weight_decay": 0.05 * (decay or 0.0)}
    b.update(record, penalties, w, g, state, numbers(b, record, penalties, scale, scalars, w.dtype), n)
    if b.name == "cupy":
        np.testing.assert_array_equal(b.to_host(g), arrays[1])
    return [b.to_host(x) for x in (w, *state)]


@dtypes
@pytest.mark.parametrize("name", VARIANTS)
def test_update(name: str, dtype: str) -> None:
    """Each rule by its paper, in long doubles: early and late steps, weight decay on none, some and all."""
    record = VARIANTS[name]
    arrays = update_arrays(record, dtype)
    exact = [x.astype(Long) for x in arrays]
    for step, scale, n in ((1, 1.0, 0), (2, 1 / 128, 500), (1000, 0.5, 1000)):
        p = {**record.values, "decay": record.values.get("weight_decay", 0.0) * (np.arange(1000) < n)}
        wanted = RULES[record.name](exact[0], exact[1] * Long(scale), *exact[2:], step, 0.05, p)
        for b in (backend(), NumpyBackend()):
            for got, value in zip(run_update(b, record, arrays, step, scale, n), wanted, strict=True):
                assert_near(got, value, sum(np.abs(x) for x in (*exact, value, np.ones(1))))


@dtypes
@pytest.mark.parametrize("name", VARIANTS)
def test_update_with_special_numbers(name: str, dtype: str) -> None:
    """Padding of zeros stays zero; infinities, NaN and the largest gradients go where they go in the twin."""
    record = VARIANTS[name]
    arrays = [np.zeros(1000, dtype) for _ in update_arrays(record, dtype)]
    np.testing.assert_array_equal(run_update(backend(), record, arrays, 1, 1.0, 500)[0], 0)
    info = np.finfo(dtype)
    arrays = update_arrays(record, dtype)
    arrays[1] = np.resize(np.array([np.inf, -np.inf, np.nan, info.max, -info.max, info.tiny, 0], dtype), 1000)
    got, twin = (run_update(b, record, arrays, 3, 0.5, 500) for b in (backend(), NumpyBackend()))
    for kernel, numpy in zip(got, twin, strict=True):
        assert_same_kind(kernel, numpy)


# Layouts ---------------------------------------------------------------------------------------------------


def _strided(b: Any, host: np.ndarray) -> Any:
    """A device array with the same values that skips elements in both directions."""
    wide = b.zeros((2 * host.shape[0], host.shape[1] + 3), host.dtype)
    view = wide[::2, 1:-2]
    view[...] = b.to_device(host)
    assert not view.flags.c_contiguous
    return view


def element_kernels(module: Any) -> dict[str, tuple[Any, tuple[float, ...]]]:
    """Every kernel over v-like arrays alone, with its parameters: (arrays in, parameters, arrays out)."""
    kernels: dict[str, tuple[Any, tuple[float, ...]]] = {}
    for name, phi in ACTIVATIONS.items():
        names, values = tuple(phi.values), tuple(phi.values.values())
        x = "y" if phi.derivative_from == "output" else "v"
        kernels[f"{name} value"] = module.compiled(texts.activation(name, phi.value.cuda, names, True)), values
        kernels[f"{name} delta"] = module.compiled(texts.hidden_delta(name, phi.delta.cuda, x, names)), values
    for loss in registry.LOSSES.values():
        values = tuple(loss.values.values())
        if isinstance(loss, FusedLoss):
            if not loss.per_row:
                fused = texts.fused_loss(loss.name, loss.delta.cuda, tuple(loss.values))
                kernels[loss.name] = module.compiled(fused), values
        elif isinstance(loss, FreeLoss):
            gradient = loss.error_signal.cuda
            text = ACTIVATIONS["tanh"].delta.cuda
            free = texts.free_loss(f"{loss.name}_tanh", gradient, tuple(loss.values), text, ())
            kernels[loss.name] = module.compiled(free), values
    return kernels


FUSED = [r.name for r in registry.LOSSES.values() if isinstance(r, FusedLoss) and not r.per_row]
ELEMENT_KERNELS = [f"{n} {w}" for n in ACTIVATIONS for w in ("value", "delta")] + list(FREE_LOSSES) + FUSED


@dtypes
@pytest.mark.parametrize("name", ELEMENT_KERNELS)
def test_strided_and_broadcast_arrays(name: str, dtype: str) -> None:
    """The same bits whether the arrays are contiguous, strided, or a row for all rows."""
    module = cupy_backend_module(FakeCupy())
    b = module.CupyBackend()
    kernel, parameters = element_kernels(module)[name]
    n_in = kernel.real.nin - len(parameters)
    shape = (5, 6)
    hosts = [samples.like(np.empty(shape, dtype), 20 + k) for k in range(n_in)]
    hosts[-1][...] = hosts[-1][0]  # a row for all
    contiguous = [b.to_device(np.full(shape, np.nan, dtype)) for _ in range(kernel.real.nout)]
    kernel(*(b.to_device(h) for h in hosts), *parameters, *contiguous)
    strided = [_strided(b, np.full(shape, np.nan, dtype)) for _ in range(kernel.real.nout)]
    kernel(*(_strided(b, h) for h in hosts[:-1]), b.to_device(hosts[-1][0]), *parameters, *strided)
    for one, two in zip(contiguous, strided, strict=True):
        assert not np.isnan(b.to_host(one)).any()
        np.testing.assert_array_equal(b.to_host(one), b.to_host(two))
