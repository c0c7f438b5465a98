"""CuPy, and how the text of a kernel becomes a call. The only importer of cupy.

    launch(kernels.add(), a, b, out)                    # an ElementwiseKernel: one thread an element
    by_rows(name, source, x.shape, x, out)              # a RawKernel: one warp a row

A kernel is compiled when it is first used, and kept by its text.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np

from gpu_bp.backends import cuda_low
from gpu_bp.backends.cuda_kernels import Kernel
from gpu_bp.backends.cuda_rows import ROW_WARPS
from gpu_bp.spec import Array

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # such as: several CuPy packages, or no CUDA toolkit path
    import cupy

__all__ = ["by_rows", "compiled", "cublas", "cupy", "given", "launch", "nccl"]


@functools.cache
def cublas() -> Any:
    """The module cupy.cublas, which cupy itself does not import. Late, because to import it loads the library."""
    import cupy.cublas

    return cupy.cublas


@functools.cache
def nccl() -> Any:
    """The module cupy.cuda.nccl. Late too, and it warns where there is no library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl

    return nccl


@functools.cache
def compiled(kernel: Kernel) -> Any:
    """The kernel, which CuPy compiles for each combination of dtypes when it is first called with them."""
    return cupy.ElementwiseKernel(*kernel[:4], preamble=kernel.preamble, options=kernel.options)


def launch(kernel: Kernel, *arguments: Any, **keywords: Any) -> None:
    """Calls a kernel; arrays of fewer bits than float32 are stored so, and computed with in float32."""
    named = zip(cuda_low.names(kernel), arguments, strict=True)
    small = frozenset(name for name, x in named if hasattr(x, "dtype") and x.dtype.itemsize == 2)
    compiled(cuda_low.stored(kernel, small) if small else kernel)(*arguments, **keywords)


@functools.cache
def raw_kernel(name: str, source: str) -> Any:
    """The kernel of that name in a source."""
    return cupy.RawKernel(source, name)


def given(array: Array | None) -> tuple[Array, ...]:
    """An array that a kernel takes only where there is one."""
    return () if array is None else (array,)


def by_rows(name: str, source: str, shape: tuple[int, ...], *arguments: Any) -> None:
    """Calls the kernel of that name in a source, in which one warp handles one row of this shape."""
    rows, n = shape
    blocks = -(-rows // ROW_WARPS)
    raw_kernel(name, source)((blocks,), (32 * ROW_WARPS,), (np.int32(rows), np.int32(n), *arguments))
