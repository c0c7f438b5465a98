"""Faults on purpose, each caught on a machine without a GPU. What is planted here must fail here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.cpu import CompileError, DivergenceError
from cuda_on_cpu.device import CaptureError, OutOfBoundsError
from cuda_on_cpu.fake_cublas import CublasError
from cuda_on_cpu.fake_cupy import FakeCupy
from cuda_on_cpu.nvrtc import compile_kernel
from cuda_on_cpu.steps import make_batch, make_step
from cuda_on_cpu.test_kernels_compile import faults
from cuda_on_cpu.test_kernels_on_cpu import (
    ACTIVATIONS,
    check_binary_cross_entropy,
    check_hidden_delta,
    check_value,
    dtypes,
    lacking,
)
from gpu_bp import Step, registry
from gpu_bp.average import Average
from gpu_bp.spec import Activation, FusedLoss, Twin

pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]


def with_text(name: str, **texts: str) -> Activation:
    """An activation record whose CUDA text of `value` or `delta` is another."""
    record = ACTIVATIONS[name]
    return replace(record, **{field: Twin(text, getattr(record, field).numpy) for field, text in texts.items()})


def arrays(cupy: FakeCupy, count: int, dtype: Any = np.float32, shape: tuple[int, ...] = (3, 4)) -> list[Any]:
    return [cupy.asarray(np.ones(shape, dtype)) for _ in range(count)]


# In the text of a kernel -----------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("name", ["tanh", "silu"])
def test_a_sign_error_in_a_delta(name: str, dtype: str) -> None:
    wrong = with_text(name, delta=ACTIVATIONS[name].delta.cuda.replace("T(1) - ", "T(1) + "))
    with pytest.raises(AssertionError, match="wrong"):
        check_hidden_delta(wrong, dtype)


def test_a_double_literal() -> None:
    """Right to a few units on the CPU; only the compiled code shows that it computes in double."""
    cupy = FakeCupy(dry=True)
    b = cupy_backend_module(cupy).CupyBackend()
    v, y = arrays(cupy, 2)
    b.activate(with_text("hard_sigmoid", value="y = v * 0.1;"), v, None, y)
    b.activate(with_text("hard_sigmoid", value="y = v * T(0.1);"), v, None, y)
    wrong, right = (faults(k.name, compile_kernel(k, 90), "float32") for k in cupy.device.kernels)
    assert "in double" in wrong[0]
    assert not right


def test_a_typo() -> None:
    """Both compilers say where."""
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend()
    with pytest.raises(CompileError, match="tahn"):
        b.activate(with_text("tanh", value="y = tahn(v);"), *arrays(cupy, 1), None, *arrays(cupy, 1))
    with pytest.raises(CompileError, match="tahn"):
        compile_kernel(cupy.device.kernels[0], 120)


def test_a_variable_that_is_not_set() -> None:
    """y of the kernel is a local variable: g++ gives it a pattern, and no NaN is needed to see it."""
    with pytest.raises(AssertionError, match="wrong"):
        check_value(with_text("relu", value="if (v > T(0)) y = v;"), "float32")


def test_an_output_left_unwritten() -> None:
    """The outputs of a kernel hold NaN before it runs, whatever stood there."""
    loss = registry.loss("binary_cross_entropy")
    assert isinstance(loss, FusedLoss)
    text = loss.delta.cuda.replace("delta = y - t;", "")
    with pytest.raises(AssertionError, match="wrong"):
        check_binary_cross_entropy(replace(loss, delta=Twin(text, loss.delta.numpy)), "float64")
    cupy = FakeCupy()
    kernel = cupy.ElementwiseKernel("T x", "T y, T z", "y = x; if (x > T(1)) z = x", "half_written")
    x, y, z = arrays(cupy, 3)
    kernel(x, y, z)
    assert np.isnan(cupy.asnumpy(z)).all()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("!isfinite(gradient)", "isnan(gradient)"),  # an infinity is let through
        ("i == 0 && ", "i == 1 && "),  # a single parameter: nobody looks at the total
        ("flag[0] < 0", "flag[0] < 100"),  # a later step takes the place of the first
        ("= steps[0] + 1", "= steps[0]"),
    ],
)
def test_a_watch_that_sees_too_little(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = cupy_backend_module(FakeCupy())
    kernel = module.kernels.watch()
    check_watch(module)
    assert right in kernel.operation
    planted = kernel._replace(operation=kernel.operation.replace(right, wrong))
    monkeypatch.setattr(module.kernels, "watch", lambda: planted)
    with pytest.raises(AssertionError):
        check_watch(module)


def check_watch(module: Any) -> None:
    """The first step with an infinity, or without a finite total, is the flag's."""
    b = module.CupyBackend()
    for gradient, total in ((np.inf, 0.0), (0.0, np.nan)):
        flag = b.to_device(np.array([-1]))
        for step, (g, t) in enumerate([(0.0, 0.0), (gradient, total), (np.inf, np.inf)], start=7):
            steps = b.to_device(np.array([step - 1]))
            b.watch(b.to_device(np.array([g])), b.to_device(np.array([t])), steps, flag)
        assert b.to_host(flag)[0] == 8


@pytest.mark.parametrize("what", ["update", "average", "limit_norm"])
def test_what_does_not_read_the_flag(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that goes wrong must change nothing; each of the three is left without its condition once."""
    module = cupy_backend_module(FakeCupy())
    assert unchanged(module)
    if what == "limit_norm":
        source = module.cuda_rows.limit_norm_source
        monkeypatch.setattr(
            module.cuda_rows, "limit_norm_source", lambda *a: source(*a).replace("if (*flag >= 0) return;", "")
        )
    else:
        made = getattr(module.kernels, what)

        def without(*arguments: Any, **named: Any) -> Any:
            kernel = made(*arguments, **named)
            return kernel._replace(operation=kernel.operation.replace("if (flag[0] < 0)", ""))

        monkeypatch.setattr(module.kernels, what, without)
    assert not unchanged(module)


def unchanged(module: Any) -> bool:
    """Whether a step whose inputs hold an infinity leaves parameters and average as they were."""
    b = module.CupyBackend()
    step, batch = make_step(b, "squared_error", "sgd"), make_batch(b, "squared_error", 8)
    network = step.objective.network
    step = Step(step.objective, step.optimizer, max_norm=0.1, average=Average(network, 0.5))
    batch.inputs[...] = np.inf
    before = b.to_host(network.parameters).tobytes()
    step(batch)
    assert step.diverged() == 1
    average = b.to_host(step.average.network.parameters)
    return before == b.to_host(network.parameters).tobytes() and not average.any()


def test_a_divergent_barrier() -> None:
    """Half of the lanes stay away: from a shuffle of a row kernel, and from a barrier of the block."""
    cupy = FakeCupy()
    module = cupy_backend_module(cupy)
    softmax = registry.activation("softmax")
    text = softmax.value.cuda.replace("sum = warp_sum(sum);", "if (lane < 16) sum = warp_sum(sum);")
    v, y = arrays(cupy, 2)
    with pytest.raises(DivergenceError, match="warp"):
        module.CupyBackend().activate(replace(softmax, value=Twin(text, softmax.value.numpy)), v, None, y)
    source = 'extern "C" __global__ void f(float* x) { if (threadIdx.x % 2) __syncthreads(); x[threadIdx.x] = 1; }'
    with pytest.raises(DivergenceError, match="barrier"):
        cupy.RawKernel(source, "f")((1,), (32,), (cupy.zeros(32, np.float32),))


def test_threads_that_read_what_others_write() -> None:
    """The result changes with the order of the threads."""
    results = []
    for order in ("forward", "reverse", "random"):
        cupy = FakeCupy(order)
        x, y = cupy.asarray(np.arange(8.0)), cupy.zeros(8)
        kernel = cupy.ElementwiseKernel("int64 n", "T y, raw T x", "x[i] += x[(i + 1) % n]; y = x[i]", "race")
        kernel(8, y, x)
        results.append(cupy.asnumpy(y))
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_a_write_beside_an_array() -> None:
    cupy = FakeCupy()
    kernel = cupy.ElementwiseKernel("T x", "T y, raw T z", "y = x; z[i + 1] = x", "beside")
    x, y, z = arrays(cupy, 3, np.float32, (5,))
    with pytest.raises(OutOfBoundsError, match="beside"):
        kernel(x, y, z)


# In the Python of the backend ------------------------------------------------------------------------------


def test_mixed_dtypes() -> None:
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend()
    single, double = arrays(cupy, 1)[0], arrays(cupy, 1, np.float64)[0]
    rows = cupy.asarray(np.arange(3))
    loss, softmax, tanh = registry.loss("cross_entropy"), registry.activation("softmax"), ACTIVATIONS["tanh"]
    with pytest.raises(TypeError, match="Type is mismatched"):
        b.activate(tanh, single, None, double)
    with pytest.raises(TypeError, match="Type is mismatched"):
        b.activate(tanh, single, cupy.asarray(np.ones(4)), single)
    with pytest.raises(ValueError, match="no product of float32 and float64"):
        b.matmul(single, double, cupy.zeros((3, 3), np.float32), transpose_b=True)
    with pytest.raises(TypeError, match="dtype"):
        b.gather(double, rows, single)
    with pytest.raises(TypeError, match="is float32, not float64"):  # CuPy would read the bytes of the one as the other
        b.output_delta(loss, softmax, single, rows, single, single, double)
    with pytest.raises(TypeError, match="float64 meets float32"):
        single[...] = double
    with pytest.raises(TypeError, match="cannot be set"):
        single.set(np.ones((3, 4)))


def test_host_arrays() -> None:
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend()
    host, (device,) = np.ones((3, 4), np.float32), arrays(cupy, 1)
    tanh = ACTIVATIONS["tanh"]
    calls: list[Callable[[], Any]] = [
        lambda: b.activate(tanh, host, None, device),
        lambda: b.activate(tanh, device, None, host),
        lambda: b.activate(registry.activation("softmax"), device, None, host),
        lambda: b.hidden_delta(tanh, device, device, host, device),
        lambda: b.gather(device, np.arange(3), device),
        lambda: device.__setitem__(..., host),
        lambda: np.asarray(device),
        lambda: np.add(device, 1),
        lambda: host + device,
        lambda: device[np.arange(2)],
    ]
    for call in calls:
        with pytest.raises((TypeError, KeyError)):
            call()
    with pytest.raises(AttributeError, match="ptr"):  # an array of the host has no address on the device
        b.matmul(host, device, cupy.zeros((3, 3), np.float32), transpose_b=True)


def test_an_output_of_another_shape_or_order() -> None:
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend()
    a, wide = arrays(cupy, 1)[0], cupy.zeros((3, 8), np.float32)
    small = cupy.zeros((3, 1), np.float32)
    with pytest.raises(ValueError, match="shape"):
        b.activate(ACTIVATIONS["tanh"], a, None, small)
    with pytest.raises(ValueError, match="is no product of shape"):
        b.matmul(a, a, small, transpose_b=True)
    with pytest.raises(ValueError, match="shape"):
        b.gather(a, cupy.asarray(np.arange(2)), a)
    with pytest.raises(ValueError, match="contiguous"):
        b.activate(registry.activation("softmax"), a, None, wide[:, ::2])
    with pytest.raises(ValueError, match="contiguous"):
        b.matmul(a, a, wide[:, :3], transpose_b=True)
    with pytest.raises(CublasError, match="cuBLAS reads"):
        b.matmul(a, cupy.zeros((4, 4), np.float32), a)


def test_products_that_cupy_refuses() -> None:
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend(bindings=False)
    a, wide = arrays(cupy, 1)[0], cupy.zeros((3, 8), np.float32)
    b.matmul(a, a, wide[:, :3], transpose_b=True)  # CuPy multiplies into a copy
    assert cupy.device.counts["device copies"] == 1
    with pytest.raises(ValueError, match="cuBLAS reads"):
        b.matmul(a, cupy.zeros((4, 4), np.float32), a)


def test_what_a_capture_cannot_hold() -> None:
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend()
    a = arrays(cupy, 1)[0]
    calls = [
        lambda: b.zeros((2,), np.float32),
        lambda: b.to_device(np.ones(3)),
        lambda: b.to_host(a),
        lambda: a.set(np.ones((3, 4), np.float32)),
        lambda: a.copy(),
        cupy.cuda.Device().synchronize,
        cupy.cuda.runtime.deviceSynchronize,
        lambda: b.column_sums(a, a[0]),  # its array of partial sums is made by the first call
    ]
    for call in calls:
        with cupy.cuda.Stream() as stream:
            stream.begin_capture()
            with pytest.raises(CaptureError, match="during a capture"):
                call()
            stream.end_capture()
    left_to_cupy, square = cupy_backend_module(cupy).CupyBackend(bindings=False), cupy.zeros((3, 3), np.float32)
    with cupy.cuda.Stream() as stream:
        stream.begin_capture()
        with pytest.raises(NotImplementedError, match="cuBLAS"):  # as CuPy does
            left_to_cupy.matmul(a, a, square, transpose_b=True)
        with pytest.raises(CaptureError, match="another stream"):
            cupy.device.launch(print, cupy.cuda.Stream().queue)
    with pytest.raises(CaptureError, match="default stream"):
        cupy.cuda.get_current_stream().begin_capture()


def test_a_step_that_sends_new_scalars_cannot_be_captured() -> None:
    """adam's corrections change with every step, and are sent from memory that will be written again."""
    cupy = FakeCupy()
    b = cupy_backend_module(cupy).CupyBackend(graphs=False)
    step, batch = make_step(b, "squared_error", "adam"), make_batch(b, "squared_error", 8)
    step(batch)
    with cupy.cuda.Stream() as stream:
        stream.begin_capture()
        with pytest.raises(CaptureError, match="asynchronous copies"):
            step(batch)


def test_a_record_without_a_twin() -> None:
    tanh = ACTIVATIONS["tanh"]
    nothing: Any = None
    formulas: tuple[Any, ...] = ("y = v;", nothing)
    with pytest.raises(TypeError, match="numpy"):
        Twin(*formulas[:1])
    assert lacking(replace(tanh, value=Twin(*formulas))) == ["value"]
    assert lacking(replace(tanh, delta=Twin("", tanh.delta.numpy))) == ["delta"]
