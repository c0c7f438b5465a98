"""CUDA kernels on the CPU: their source compiled by g++, once, and run on NumPy arrays.

    kernel = Kernel(source, "name", with_cupy_headers=True)
    kernel([array_argument(x), scalar_argument(3, np.int64)], grid=2, block=128, order=order)

Objects are kept between runs in a folder: `GPU_BP_TEST_CACHE`, else gpu_bp-tests in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuda_on_cpu import codegen

HEADER = Path(__file__).with_name("cuda_on_cpu.hpp")
# No contraction: a fused multiply-add rounds once where the twin rounds twice. No warnings: CuPy's headers are
# meant for another compiler.
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-w")
# A variable that a kernel forgets to set holds a pattern, not by chance the right value (g++ 12 and later).
PATTERN_FLAG = "-ftrivial-auto-var-init=pattern"

FAILURES = {
    1: "a barrier that not all threads of the block reach",
    2: "a warp operation that not all of its lanes reach",
    3: "a barrier or a warp operation in a kernel that is run without fibers",
}


class CompileError(RuntimeError):
    """g++ refused the source; the message is its own."""


class DivergenceError(RuntimeError):
    """Threads wait at a barrier for others that never come."""


def cache_folder() -> Path:
    """The folder of compiled objects."""
    named = os.environ.get("GPU_BP_TEST_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else base / "gpu_bp-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def compiler() -> tuple[list[str], str]:
    """The command that compiles, and the version of g++.

    Raises:
        pytest.fail: there is none. Never a skip.
    """
    path = shutil.which("g++")
    if path is None:
        pytest.fail("the kernel tests need g++ on the PATH (Debian: apt-get install g++)", pytrace=False)
    version = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    return [path, *FLAGS, *([PATTERN_FLAG] if int(version.split(".")[0]) >= 12 else [])], version


def array_argument(array: np.ndarray) -> np.ndarray:
    """The bytes of CuPy's CArray<T, ndim>: the address, the size, then ndim lengths and ndim strides in bytes."""
    return np.array([array.ctypes.data, array.size, *array.shape, *array.strides], np.int64)


def indexer_argument(shape: Sequence[int]) -> np.ndarray:
    """The bytes of CuPy's CIndexer<ndim>: the size, the lengths, and a place for the index."""
    return np.array([int(np.prod(shape, dtype=np.int64)), *shape, *([0] * len(shape))], np.int64)


def pointer_argument(array: np.ndarray) -> np.ndarray:
    return np.array([array.ctypes.data], np.int64)


def scalar_argument(value: Any, dtype: Any) -> np.ndarray:
    return np.array([value], dtype)


class Parameter(ctypes.Structure):
    """One parameter of a compiled kernel; `cuda_on_cpu::Parameter` in the header."""

    _fields_ = (("bytes", ctypes.c_size_t), ("_type", ctypes.c_char_p), ("is_pointer", ctypes.c_int))

    @property
    def dtype(self) -> str:
        """As NumPy calls it; "class" for an array of CuPy's; of what it points to for a pointer."""
        return str(self._type.decode())


class Kernel:
    """A `__global__` function of that name in a CUDA source, compiled when first called.

    Args:
        source: as it is given to the CUDA compiler.
        with_cupy_headers: whether CuPy includes its own headers, as it does for all but a RawKernel.
        fibers: whether threads may meet at barriers and in shuffles. Slower.
        options: what the CUDA compiler gets besides; nothing to g++.
    """

    def __init__(
        self,
        source: str,
        name: str,
        *,
        with_cupy_headers: bool = False,
        fibers: bool = False,
        options: tuple[str, ...] = (),
    ) -> None:
        headers = "#include <cupy/carray.cuh>\n" if with_cupy_headers else ""
        if "float16.cuh" in source:  # CuPy's own, which then asks for CUDA's: cuda_fp16.h and cuda_bf16.h stand for it
            headers = f"#define __CUDACC_VER_MAJOR__ 13\n{headers}"
        self.name = name
        self.source = source
        self.options = options
        self.with_cupy_headers = with_cupy_headers
        self.text = (
            f'#include "{HEADER.name}"\n{headers}{source}\n'
            f"static void gpu_bp_call(void** args) {{ cuda_on_cpu::call({name}, args); }}\n"
            'extern "C" int gpu_bp_launch(void** args, unsigned grid, unsigned block, const int64_t* order, int fibers)'
            " { return cuda_on_cpu::launch(gpu_bp_call, args, grid, block, order, fibers); }\n"
            'extern "C" cuda_on_cpu::Parameter gpu_bp_parameter(int k)'
            f" {{ return cuda_on_cpu::parameter({name}, k); }}\n"
        )
        self._fibers = fibers

    def compile(self) -> Path:
        """The shared object, from the cache or made now.

        Raises:
            CompileError: g++ refuses the source.
        """
        command, version = compiler()
        texts = [self.text, _header_text(), *([_small_types_text()] if "float16.cuh" in self.text else [])]
        key = hashlib.sha256("\0".join([*texts, *command, version]).encode()).hexdigest()[:32]
        target = cache_folder() / f"{self.name}-{key}.so"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
                source, built = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
                source.write_text(self.text)
                includes = [f"-I{HEADER.parent}", f"-I{codegen.include_folder()}"]
                run = subprocess.run(
                    [*command, *includes, str(source), "-o", str(built)], capture_output=True, text=True
                )
                if run.returncode:
                    raise CompileError(f"{self.name}: {run.stderr[:4000]}")
                os.replace(built, target)  # at once: another process may want it too
        return target

    @functools.cached_property
    def _library(self) -> ctypes.PyDLL:
        return ctypes.PyDLL(str(self.compile()))  # one call at a time: the variables of the header are those of all

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """What the compiled function takes."""
        ask = self._library.gpu_bp_parameter
        ask.restype = Parameter
        found: list[Parameter] = []
        while (parameter := ask(len(found))).bytes:
            found.append(parameter)
        return tuple(found)

    def __call__(self, arguments: Sequence[np.ndarray], grid: int, block: int, order: np.ndarray | None = None) -> None:
        """Runs the kernel.

        Args:
            arguments: one array of bytes each, as the functions above make them; refused where their length is wrong.
            order: the numbers of the threads as they run one after the other: of the whole grid, or of each block
                where there are fibers.

        Raises:
            TypeError: an argument of another length than the kernel's own.
            DivergenceError: a barrier is not reached by all.
        """
        expected = [parameter.bytes for parameter in self.parameters]
        given = [argument.nbytes for argument in arguments]
        if given != expected:
            raise TypeError(f"{self.name} takes arguments of {expected} bytes, not {given}")
        if order is None:
            order = np.arange(block if self._fibers else grid * block)
        order = np.ascontiguousarray(order, np.int64)
        addresses = (ctypes.c_void_p * len(arguments))(*(argument.ctypes.data for argument in arguments))
        code = self._library.gpu_bp_launch(
            addresses, grid, block, ctypes.c_void_p(order.ctypes.data), ctypes.c_int(self._fibers)
        )
        if code:
            raise DivergenceError(f"{self.name}: {FAILURES[code]}")


@functools.cache
def _header_text() -> str:
    return HEADER.read_text() + "\0" + Path(codegen.include_folder(), "cupy", "carray.cuh").read_text()


@functools.cache
def _small_types_text() -> str:
    return "".join(HEADER.with_name(name).read_text() for name in ("cuda_fp16.h", "cuda_bf16.h"))
