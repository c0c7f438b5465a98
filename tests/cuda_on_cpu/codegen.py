"""The very source that CuPy generates for a kernel, without a device. The only file that touches CuPy's insides.

CuPy writes the text of a kernel from its parameters and from what it is called with: the dtype, the number of
dimensions and the contiguity of each array. The functions that do so are private; they were seen in the versions
of `SEEN_IN`. Where a version lacks them the tests are skipped with that reason, and `test_codegen.py` fails if
that happens with the pinned version.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SEEN_IN = ("14.2.0",)
PINNED = "14.2."

# enum _ArgKind of cupy/_core/_kernel.pxd
_NDARRAY, _INDEXER, _SCALAR = 1, 2, 3


@dataclass(frozen=True)
class Argument:
    """What a kernel is called with for one parameter: an array, or a scalar (`ndim` is None)."""

    dtype: np.dtype[Any] | None
    ndim: int | None = None
    c_contiguous: bool = True


@functools.cache
def real_cupy() -> ModuleType:
    """The installed CuPy. Importing it needs no driver.

    Raises:
        pytest.fail: it is not installed. Never a skip: what is proven here would go unproven in silence.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as: no CUDA toolkit path
            return importlib.import_module("cupy")
    except ImportError as error:
        pytest.fail(f"the kernel tests need CuPy: pip install 'cupy-cuda13x==14.2.*' ({error})", pytrace=False)


@functools.cache
def missing() -> str:
    """Which private function this CuPy lacks, in words; "" where it has them all."""
    version = real_cupy().__version__
    try:
        from cupy._core import _carray, _kernel, _reduction, _scalar, core

        for module, names in (
            (_kernel, ("_ArgInfo", "_TypeMap", "_get_elementwise_kernel_code")),
            (_reduction, ("_ReductionKernel_get_cached_function_code",)),
            (_scalar, ("CScalar",)),
            (_carray, ("Indexer",)),
            (core, ("_cupy_header_list", "_get_header_dir_path", "assemble_cupy_compiler_options")),
        ):
            for name in names:
                getattr(module, name)
        _kernel._ArgInfo(_NDARRAY, real_cupy().ndarray, np.dtype("f4"), 1, True, True)
        _kernel._TypeMap((("T", np.dtype("f4")),))
    except Exception as error:  # a name is gone, or takes other arguments
        return f"CuPy {version} lacks what was seen in {', '.join(SEEN_IN)}: {type(error).__name__}: {error}"
    return ""


def require() -> None:
    """Skips the test where this CuPy lacks the private functions; fails it where there is no CuPy."""
    if reason := missing():
        pytest.skip(reason)


def elementwise_types(kernel: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The dtypes that CuPy gives to inputs and outputs, and its map of letters. None is a scalar.

    Raises:
        TypeError: from CuPy itself, such as for two dtypes under one letter.
    """
    types: tuple[Any, Any, Any] = kernel._decide_params_type(tuple(inputs), tuple(outputs))
    return types


def elementwise_source(kernel: Any, arguments: Sequence[Argument], ndim: int, type_map: Any) -> str:
    """The text that CuPy compiles for a cupy.ElementwiseKernel called with these arguments, over `ndim` dimensions."""
    from cupy._core import _kernel

    infos = (*(_info(argument) for argument in arguments), _indexer(ndim))
    code: str = _kernel._get_elementwise_kernel_code(
        infos, type_map, kernel.params, kernel.operation, kernel.name, kernel.preamble, **kernel.kwargs
    )
    return code


def reduction_source(kernel: Any, dtypes: dict[str, str], block: int) -> str:
    """The text for a cupy.ReductionKernel over the first axis of a two-dimensional array, CUB being off."""
    from cupy._core import _kernel, _reduction

    def dtype(parameter: Any) -> np.dtype[Any]:
        return np.dtype(parameter.dtype or dtypes[parameter.ctype])

    letters = {p.ctype: dtype(p) for p in kernel.in_params + kernel.out_params if p.dtype is None}
    type_map = _kernel._TypeMap((*sorted(letters.items()), ("IndexT", "int32")))
    infos = (
        *(_info(Argument(dtype(p), 2)) for p in kernel.in_params),
        *(_info(Argument(dtype(p), 1)) for p in kernel.out_params),
        _indexer(2),
        _indexer(1),
        _info(Argument(np.dtype("int32"))),
    )
    code: str = _reduction._ReductionKernel_get_cached_function_code(
        kernel.nin,
        kernel.nout,
        kernel._params,
        infos,
        type_map,
        kernel.name,
        block,
        kernel.reduce_type,
        kernel.identity,
        kernel.map_expr,
        kernel.reduce_expr,
        kernel.post_map_expr,
        kernel.preamble,
        kernel.options,
    )
    return code


def _info(argument: Argument) -> Any:
    from cupy._core import _kernel, _scalar

    if argument.ndim is None:
        return _kernel._ArgInfo(_SCALAR, _scalar.CScalar, argument.dtype, 0, True, True)
    array = real_cupy().ndarray
    return _kernel._ArgInfo(_NDARRAY, array, argument.dtype, argument.ndim, argument.c_contiguous, True)


def _indexer(ndim: int) -> Any:
    from cupy._core import _carray, _kernel

    return _kernel._ArgInfo(_INDEXER, _carray.Indexer, None, ndim, True, True)


def include_folder() -> str:
    """Where CuPy's own headers lie, such as cupy/carray.cuh."""
    from cupy._core import core

    folder: str = core._get_header_dir_path()
    return folder


def header_text() -> str:
    """What CuPy puts before the text of an ElementwiseKernel or a ReductionKernel (not of a RawKernel)."""
    from cupy._core import core

    return "".join(f"#include <{header}>\n" for header in core._cupy_header_list)


def nvrtc_options(architecture: int) -> tuple[str, ...]:
    """The options that CuPy compiles with, for sm_`architecture`."""
    from cupy._core import core

    return (
        *core.assemble_cupy_compiler_options(()),
        "-ftz=true",
        f"-arch=sm_{architecture}",
        "--device-as-default-execution-space",
    )
