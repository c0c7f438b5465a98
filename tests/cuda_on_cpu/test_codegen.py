"""The tools of this folder themselves: CuPy's private functions, g++ and its cache, fibers, and what is missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuda_on_cpu import codegen, cpu, nvrtc
from cuda_on_cpu.cpu import Kernel, array_argument, indexer_argument, pointer_argument, scalar_argument
from cuda_on_cpu.fake_cupy import FakeCupy, written_before_read

pytestmark = pytest.mark.kernels


def test_the_pinned_cupy_has_what_is_needed() -> None:
    """With the pinned version nothing may be skipped; another version may, and says why."""
    assert any(version.startswith(codegen.PINNED) for version in codegen.SEEN_IN)
    if codegen.real_cupy().__version__.startswith(codegen.PINNED):
        assert codegen.missing() == ""


def test_a_version_that_lacks_them_skips_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module("cupy._core._kernel")
    monkeypatch.delattr(kernel, "_get_elementwise_kernel_code")
    reason = codegen.missing.__wrapped__()
    assert "_get_elementwise_kernel_code" in reason
    monkeypatch.setattr(codegen, "missing", lambda: reason)
    with pytest.raises(pytest.skip.Exception, match=r"lacks what was seen in 14\.2\.0"):
        FakeCupy()


def test_no_cupy_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(pytest.fail.Exception, match="cupy-cuda13x"):
        codegen.real_cupy.__wrapped__()


def test_no_compiler_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.fail.Exception, match="need g\\+\\+"):
        cpu.compiler.__wrapped__()


def test_an_old_nvrtc_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "ARCHITECTURES", (75, 999))
    with pytest.raises(pytest.fail.Exception, match="does not know sm_999"):
        nvrtc._nvrtc()


def test_objects_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second time nothing is compiled; another source is another object."""
    monkeypatch.setenv("GPU_BP_TEST_CACHE", str(tmp_path / "new"))
    source = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
    first = Kernel(source, "twice").compile()
    made = first.stat().st_mtime_ns
    assert Kernel(source, "twice").compile() == first
    assert first.stat().st_mtime_ns == made
    assert Kernel(source.replace("2", "3"), "twice").compile() != first
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".so"}


def test_an_argument_of_another_length_is_refused() -> None:
    kernel = Kernel('extern "C" __global__ void twice(float* x, int n) { x[n] *= 2; }', "twice")
    x = np.ones(3, np.float32)
    with pytest.raises(TypeError, match=r"\[8, 4\] bytes, not \[8, 8\]"):
        kernel([pointer_argument(x), scalar_argument(1, np.int64)], 1, 1)
    kernel([pointer_argument(x), scalar_argument(1, np.int32)], 1, 1)
    assert x.tolist() == [1, 2, 1]


def test_raw_strided_and_scalar_arguments() -> None:
    """One kernel with all sorts of arguments, as CuPy itself would write it."""
    cupy = FakeCupy()
    operation = "y = x * table[i % n] + shift"
    kernel = cupy.ElementwiseKernel("T x, raw T table, T shift, int64 n", "T y", operation, "mixed")
    x = np.arange(24.0).reshape(4, 6)
    table = np.array([1.0, 10.0, 100.0])
    for view, host in ((cupy.asarray(x), x), (cupy.asarray(x)[:, ::2], x[:, ::2])):
        y = cupy.empty(view.shape)
        kernel(view, cupy.asarray(table), 2.5, 3, y)
        np.testing.assert_array_equal(cupy.asnumpy(y), host * np.resize(table, host.shape) + 2.5)


def test_a_reduction_kernel_runs_on_fibers() -> None:
    """CuPy's own template for a cupy.ReductionKernel: 512 threads that meet at barriers."""
    codegen.require()
    reduction = codegen.real_cupy().ReductionKernel("T x", "T y", "x * x", "a + b", "y = a", "0", "sum_of_squares")
    source = codegen.reduction_source(reduction, {"T": "float32"}, 512)
    x = np.random.default_rng(0).standard_normal((1000, 7)).astype(np.float32)
    y = np.full(7, np.nan, np.float32)
    kernel = Kernel(source, "sum_of_squares", with_cupy_headers=True, fibers=True)
    arguments = [array_argument(x), array_argument(y), indexer_argument(x.shape), indexer_argument(y.shape)]
    kernel([*arguments, scalar_argument(1, np.int32)], 7, 512)
    np.testing.assert_allclose(y, (x.astype(np.float64) ** 2).sum(axis=0), rtol=1e-6)


SHUFFLES = """
extern "C" __global__ void shuffles(const int* x, int* y) {
    __shared__ int last[4];
    const int lane = threadIdx.x % 32, mine = x[threadIdx.x];
    int sum = __shfl_sync(0xffffffffu, mine, 5) + 10 * __shfl_up_sync(0xffffffffu, mine, 1);
    sum += 100 * __shfl_down_sync(0xffffffffu, mine, 2) + 1000 * __shfl_xor_sync(0xffffffffu, mine, 3);
    if (lane == 31) last[threadIdx.x / 32] = mine;
    __syncthreads();
    y[threadIdx.x] = sum + 10000 * last[(threadIdx.x / 32 + 1) % 2];
}
"""


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_shuffles_and_shared_memory(order: Any) -> None:
    x = np.arange(64, dtype=np.int32)
    y = np.full(64, -1, np.int32)
    device = FakeCupy(order).device
    kernel = Kernel(SHUFFLES, "shuffles", fibers=True)
    kernel([pointer_argument(x), pointer_argument(y)], 1, 64, device.thread_order(64))
    first, lane = x // 32 * 32, x % 32
    up, down = np.where(lane >= 1, x - 1, x), np.where(lane < 30, x + 2, x)
    wanted = (first + 5) + 10 * up + 100 * down + 1000 * (first + (lane ^ 3)) + 10000 * ((first + 32) % 64 + 31)
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize(
    ("operation", "before"),
    [
        ("y = x;", True),
        ("if (x > 0) y = x;", True),
        ("z = x;", True),
        ("y += x;", False),
        ("y = y + x;", False),
        ("z = y; y = x;", False),
        ("if (y == x) z = 1;", False),
    ],
)
def test_written_before_read(operation: str, before: bool) -> None:
    assert written_before_read(operation, "y") is before
