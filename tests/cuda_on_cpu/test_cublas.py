"""Products by NVIDIA's bindings: the calls, on a stand-in that finds matrices by address and leading dimension alone,
and their names, signatures and numbers, against the bindings themselves where these are installed."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import numpy as np
import pytest

from cuda_on_cpu.fake_cublas import CublasError, FakeCublas
from cuda_on_cpu.fake_cupy import FakeCupy
from gpu_bp.backends import cublas
from gpu_bp.backends.cublas import ARITHMETIC, PRODUCTS, TYPES, WORKSPACE, Gemm

pytestmark = pytest.mark.kernels

# What the stand-in computes with: NumPy has no bfloat16.
COMPUTED = [product for product in PRODUCTS if "bfloat16" not in product]


def gemm_of(cupy: FakeCupy) -> Gemm:
    return Gemm(cupy.empty(WORKSPACE, np.uint8), lambda: cupy.cuda.get_current_stream().ptr, cupy.bindings)


@pytest.mark.parametrize(("of_factors", "of_product", "arithmetic"), COMPUTED)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 4, 5), (1, 4, 1), (5, 1, 3), (1, 1, 7), (7, 1, 1)])
def test_products(sizes: tuple[int, int, int], add: bool, of_factors: str, of_product: str, arithmetic: str) -> None:
    """Of every row of the table that NumPy has the types of, transposed or not, added or not."""
    (m, k, n), cupy = sizes, FakeCupy()
    gemm, rng = gemm_of(cupy), np.random.default_rng(0)
    exact = np.float64 if of_factors == "float64" else np.float32
    for ta, tb in itertools.product((False, True), repeat=2):
        a = rng.standard_normal((k, m) if ta else (m, k)).astype(of_factors)
        b = rng.standard_normal((n, k) if tb else (k, n)).astype(of_factors)
        before = rng.standard_normal((m, n)).astype(of_product) if add else np.full((m, n), np.nan, of_product)
        out = cupy.asarray(before)
        gemm(cupy.asarray(a), cupy.asarray(b), out, transpose_a=ta, transpose_b=tb, add=add, arithmetic=arithmetic)
        wanted = (a.T if ta else a).astype(exact) @ (b.T if tb else b).astype(exact) + (before if add else 0)
        least = {"tf32": 4e-3, "float32": 1e-6, "float64": 1e-14}[arithmetic]
        tolerance = max(least, 2e-3 if of_product == "float16" else 0)
        np.testing.assert_allclose(out.get(), wanted, rtol=tolerance, atol=tolerance)


def test_float32_is_float32() -> None:
    """Unasked, no bit of a factor is dropped: TF32 is another arithmetic, and seen to be."""
    cupy = FakeCupy()
    gemm, one = gemm_of(cupy), cupy.asarray(np.ones((1, 1), np.float32))
    x, out = cupy.asarray(np.full((1, 1), 1 + 2**-20, np.float32)), cupy.empty((1, 1), np.float32)
    gemm(x, one, out)
    assert out.get()[0, 0] == np.float32(1 + 2**-20)
    gemm(x, one, out, arithmetic="tf32")
    assert out.get()[0, 0] == 1


@pytest.mark.parametrize(
    ("shapes", "dtypes", "arithmetic", "words"),
    [
        (((2, 3), (3, 4), (2, 5)), "fff", "", r"\(2, 3\) @ \(3, 4\) is no product of shape \(2, 5\)"),
        (((2, 3), (4, 4), (2, 4)), "fff", "", r"\(2, 3\) @ \(4, 4\)"),
        (((2, 3), (3, 4), (2, 4)), "fdf", "", "no product of float32 and float64 into float32"),
        (((2, 3), (3, 4), (2, 4)), "ffd", "", "no product of float32 and float32 into float64"),
        (((2, 3), (3, 4), (2, 4)), "ddd", "tf32", "by tf32 arithmetic"),
        (((2, 3), (3, 4), (2, 4)), "ddd", "float32", "by float32 arithmetic"),
    ],
)
def test_what_is_refused(shapes: tuple[Any, ...], dtypes: str, arithmetic: str, words: str) -> None:
    cupy = FakeCupy()
    arrays = [cupy.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(ValueError, match=words):
        gemm_of(cupy)(*arrays, arithmetic=arithmetic)


def test_views_that_are_not_contiguous_are_refused() -> None:
    cupy = FakeCupy()
    wide = cupy.zeros((3, 8), np.float32)
    with pytest.raises(ValueError, match="C-contiguous"):
        gemm_of(cupy)(wide[:, :3], wide, cupy.zeros((3, 8), np.float32))


def test_it_follows_the_current_stream() -> None:
    """With its workspace, which cuBLAS forgets where the stream changes; where it does not, neither is set again."""
    cupy = FakeCupy()
    gemm, (a, b, out) = gemm_of(cupy), (cupy.zeros((2, 2), np.float32) for _ in range(3))
    gemm(a, b, out)
    cupy.bindings.calls.clear()
    gemm(a, b, out)
    with cupy.cuda.Stream():
        gemm(a, b, out)
    gemm(a, b, out)
    follows = ["set_stream", "set_workspace", "gemm_ex"]
    assert cupy.bindings.calls == ["gemm_ex", *follows, *follows]


def test_the_stand_in_is_strict() -> None:
    """A leading dimension too small, memory that is nobody's, and a stream that was left are errors."""
    cupy = FakeCupy()
    gemm, a = gemm_of(cupy), cupy.zeros((2, 3), np.float32)
    out = cupy.zeros((2, 2), np.float32)
    gemm(a, a, out, transpose_b=True)
    handle, alpha = 4096, np.ones(1, np.float32)
    one = alpha.ctypes.data

    def call(lda: int, address: int) -> None:
        cupy.bindings.gemm_ex(
            handle, 1, 0, 2, 2, 3, one, address, 0, lda, a.data.ptr, 0, 3, one, out.data.ptr, 0, 2, 68, -1
        )

    call(3, a.data.ptr)
    for lda, address, words in ((2, a.data.ptr, "leading dimension"), (9, a.data.ptr, "bytes"), (3, one, "bytes")):
        with pytest.raises(CublasError, match=words):
            call(lda, address)
    with cupy.cuda.Stream(), pytest.raises(CublasError, match="another stream"):
        call(3, a.data.ptr)


def test_the_handle_goes_with_its_owner() -> None:
    cupy = FakeCupy()
    gemm = gemm_of(cupy)
    del gemm
    assert cupy.bindings.calls[-1] == "destroy"


def test_the_bindings_themselves() -> None:
    """Names, signatures and numbers of the installed nvmath-python, of which no call can be made here."""
    nvmath = pytest.importorskip("nvmath", reason="nvmath-python is not installed")
    real = cublas.bindings()
    public = {name for name in vars(FakeCublas) if not name.startswith("_")}
    assert {"create", "destroy", "gemm_ex", "set_stream", "set_workspace"} <= public
    for name in public:
        own = list(inspect.signature(getattr(FakeCublas, name)).parameters)[1:]
        assert list(inspect.signature(getattr(real, name)).parameters) == own, name
    assert [ARITHMETIC[name].number for name in ("float32", "tf32", "float64")] == [
        real.ComputeType.COMPUTE_32F,
        real.ComputeType.COMPUTE_32F_FAST_TF32,
        real.ComputeType.COMPUTE_64F,
    ]
    assert (real.GemmAlgo.DFALT, real.PointerMode.HOST) == (cublas.ALGORITHM, cublas.HOST)
    assert real.Math.DEFAULT_MATH | real.Math.DISALLOW_REDUCED_PRECISION_REDUCTION == cublas.MATH
    assert (real.Operation.N, real.Operation.T) == (0, 1)
    names = {"float32": "CUDA_R_32F", "float64": "CUDA_R_64F", "float16": "CUDA_R_16F", "bfloat16": "CUDA_R_16BF"}
    assert {name: int(nvmath.CudaDataType[cuda]) for name, cuda in names.items()} == TYPES
