"""The CUDA text of records, run where it can be: on a GPU, or compiled by a C++ compiler for the host.

A few lines stand in for what CUDA has and C++ has not, so that a formula can be tried on any machine with a compiler.
Loops take the place of threads; only where a warp handles a row are there 32 of them, which meet at its shuffles.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpu_bp.backends import cuda_kernels as kernels
from gpu_bp.backends import cuda_rows, select
from gpu_bp.errors import UserError

COMPILERS = ("c++", "g++", "clang++")
# No contraction: a fused multiply-add rounds once where a twin rounds twice. A float that is promoted to double is slow
# on a GPU, and always a T(...) forgotten.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-Werror=double-promotion")

_HEADER = """
#include <cmath>
#define __device__
#define __global__
#define __forceinline__ inline
using std::abs; using std::acos; using std::acosh; using std::asin; using std::asinh; using std::atan;
using std::atan2; using std::atanh; using std::cbrt; using std::ceil; using std::copysign; using std::cos;
using std::cosh; using std::erf; using std::erfc; using std::exp; using std::exp2; using std::expm1;
using std::fabs; using std::floor; using std::fma; using std::fmax; using std::fmin; using std::fmod;
using std::hypot; using std::isfinite; using std::isinf; using std::isnan; using std::lgamma; using std::log;
using std::log10; using std::log1p; using std::log2; using std::pow; using std::rint; using std::round;
using std::signbit; using std::sin; using std::sinh; using std::sqrt; using std::tan; using std::tanh;
using std::tgamma; using std::trunc;
template <typename T> inline T rsqrt(T x) { return T(1) / sqrt(x); }
template <typename T> inline T normcdf(T x) { return T(0.5) * erfc(x * T(-0.70710678118654752440)); }
template <typename T> inline T max(T a, T b) { return fmax(a, b); }
template <typename T> inline T min(T a, T b) { return fmin(a, b); }
"""

# A lane is a thread. Where one ends, or waits elsewhere, while others wait for it, the warp has parted.
_WARP = """
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>
struct gpu_bp_index { int x; };
static thread_local gpu_bp_index threadIdx, blockIdx;
struct gpu_bp_warp {
    std::mutex mutex;
    std::condition_variable moved;
    int lanes = 32, waiting = 0;
    long turn = 0;
    bool parted = false;
    void release() { waiting = 0; ++turn; moved.notify_all(); }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        if (lanes < 32) parted = true;
        if (++waiting == lanes) return release();
        for (const long now = turn; turn == now;) moved.wait(lock);
    }
    void leave() {
        std::unique_lock<std::mutex> lock(mutex);
        if (waiting) parted = true;
        if (waiting == --lanes && waiting) release();
    }
};
static gpu_bp_warp* gpu_bp_here;
template <typename S, typename F> inline S gpu_bp_shuffle(S value, F source) {
    static S sent[32];
    sent[threadIdx.x % 32] = value;
    gpu_bp_here->wait();
    value = sent[source(threadIdx.x % 32) & 31];
    gpu_bp_here->wait();
    return value;
}
template <typename S> inline S __shfl_xor_sync(unsigned, S value, int k) {
    return gpu_bp_shuffle(value, [k](int lane) { return lane ^ k; });
}
template <typename S> inline S __shfl_sync(unsigned, S value, int source) {
    return gpu_bp_shuffle(value, [source](int) { return source; });
}
inline void __syncwarp() { gpu_bp_here->wait(); }
"""

_LAUNCH = """
template <typename A> A gpu_bp_argument(void* place) {{
    if constexpr (std::is_pointer_v<A>) return static_cast<A>(place);
    else return *static_cast<A*>(place);
}}
template <typename... A, std::size_t... K>
void gpu_bp_call(void (*kernel)(int, int, A...), int rows, int n, void** places, std::index_sequence<K...>) {{
    kernel(rows, n, gpu_bp_argument<A>(places[K])...);
}}
template <typename... A> void gpu_bp_call(void (*kernel)(int, int, A...), int rows, int n, void** places) {{
    gpu_bp_call(kernel, rows, n, places, std::index_sequence_for<A...>{{}});
}}
extern "C" int gpu_bp_run(int rows, int n, void** places) {{
    bool parted = false;
    for (int row = 0; row < rows; ++row) {{
        gpu_bp_warp warp;
        gpu_bp_here = &warp;
        std::vector<std::thread> lanes;
        for (int lane = 0; lane < 32; ++lane)
            lanes.emplace_back([&, lane] {{
                blockIdx.x = row / {row_warps};
                threadIdx.x = row % {row_warps} * 32 + lane;
                gpu_bp_call({name}, rows, n, places);
                warp.leave();
            }});
        for (auto& lane : lanes) lane.join();
        parted = parted || warp.parted;
    }}
    return parted;
}}
"""


class Runner(Protocol):
    """Runs CUDA text on NumPy arrays, which are changed. `where` says on what."""

    where: str

    def elements(self, kernel: kernels.Kernel, *arguments: Any) -> None:
        """A kernel that does the same for each element; the arguments are arrays of one dtype, or numbers.

        Raises:
            UserError: the text does not compile.
        """
        ...

    def rows(self, name: str, source: str, *arguments: Any) -> None:
        """A kernel in which one warp handles one row of the first array; the rest: arrays, or numbers of its dtype.

        Raises:
            UserError: likewise, or not all lanes of a warp come to a shuffle.
        """
        ...


def runner(backend: str = "auto") -> tuple[Runner | None, str]:
    """What runs CUDA text here, or None and why: a GPU, unless `backend` is "numpy", or else a C++ compiler.

    Raises:
        UserError: an unknown backend, or `cupy` where no GPU is usable.
    """
    if select(backend)[0].name == "cupy":
        from gpu_bp.backends import cupy_backend

        return OnDevice(cupy_backend), ""
    return host_runner()


@functools.cache
def host_runner() -> tuple[OnHost | None, str]:
    """The C++ compiler that works, or None and why there is none."""
    why = f"there is no C++ compiler ({', '.join(COMPILERS)}), and no GPU is used"
    for name in COMPILERS:
        path = shutil.which(name)
        try:
            if path:
                _library(path, _elements_source(kernels.add_one()))
                return OnHost(path), ""
        except UserError as error:
            why = f"{path} does not work: {error}"
    return None, why


class OnHost:
    """CUDA text compiled by a C++ compiler."""

    def __init__(self, compiler: str) -> None:
        self.where = Path(compiler).name
        self._compiler = compiler

    def elements(self, kernel: kernels.Kernel, *arguments: Any) -> None:
        dtype, parameters = arguments[-1].dtype, _parameters(kernel)
        dtypes = [np.dtype(np.int64) if "int64" in words else dtype for words in parameters]
        arrays = [np.asarray(x, of) for x, of in zip(arguments, dtypes, strict=True)]
        steps = [int(array.ndim > 0) for array in arrays]
        size = max(array.size for array, words in zip(arrays, parameters, strict=True) if "raw" not in words)
        run = _library(self._compiler, _elements_source(kernel))[f"gpu_bp_run_{dtype}"]
        run(ctypes.c_longlong(size), _addresses(arrays), (ctypes.c_longlong * len(steps))(*steps))

    def rows(self, name: str, source: str, *arguments: Any) -> None:
        first: np.ndarray = arguments[0]
        arrays = [x if isinstance(x, np.ndarray) else np.asarray(x, first.dtype) for x in arguments]
        launch = _LAUNCH.format(name=name, row_warps=cuda_rows.ROW_WARPS)
        library = _library(self._compiler, _HEADER + _WARP + source + launch)
        rows, n = first.shape
        if library.gpu_bp_run(ctypes.c_int(rows), ctypes.c_int(n), _addresses(arrays)):
            raise UserError("not all 32 lanes come to a shuffle of the warp")


class OnDevice:
    """CUDA text compiled by CuPy.

    Args:
        module: gpu_bp.backends.cupy_backend.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._backend = module.CupyBackend()
        self.where: str = self._backend.device

    def elements(self, kernel: kernels.Kernel, *arguments: Any) -> None:
        self._run(arguments, lambda *on_device: self._module.compiled(kernel)(*on_device))

    def rows(self, name: str, source: str, *arguments: Any) -> None:
        first: np.ndarray = arguments[0]
        given = [x if isinstance(x, np.ndarray) else first.dtype.type(x) for x in arguments]
        self._run(given, lambda *on_device: self._module.by_rows(name, source, first.shape, *on_device))

    def _run(self, arguments: Sequence[Any], launch: Callable[..., None]) -> None:
        """One array on the host is one on the device: an output may take the place of an input."""
        host = {id(x): x for x in arguments if isinstance(x, np.ndarray)}
        device = {key: self._backend.to_device(array) for key, array in host.items()}
        try:
            launch(*(device.get(id(x), x) for x in arguments))
        except Exception as error:  # CuPy's own, of the compiler
            raise UserError(_first_error(str(error))) from None
        for key, array in host.items():
            array[...] = self._backend.to_host(device[key])


def _elements_source(kernel: kernels.Kernel) -> str:
    """A loop in place of the threads. Arguments are references, as CuPy has them: one may be another's."""
    declared = []
    for k, (*raw, kind, name) in enumerate(_parameters(kernel)):
        constant = "const " if k <= kernel.in_params.count(",") else ""
        kind = {"T": "T", "int64": "long long"}[kind]
        place = f"static_cast<{kind}*>(gpu_bp_arrays[{k}])"
        declared.append(
            f"{constant}{kind}* {name} = {place};"
            if raw
            else f"{constant}{kind}& {name} = {place}[i * gpu_bp_steps[{k}]];"
        )
    lines = "\n        ".join(declared)
    given = "long long gpu_bp_size, void** gpu_bp_arrays, const long long* gpu_bp_steps"
    passed = "gpu_bp_size, gpu_bp_arrays, gpu_bp_steps"
    return f"""{_HEADER}{kernel.preamble}
template <typename T> static void gpu_bp_run({given}) {{
    for (long long i = 0; i < gpu_bp_size; ++i) {{
        {lines}
        {kernel.operation};
    }}
}}
extern "C" void gpu_bp_run_float32({given}) {{ gpu_bp_run<float>({passed}); }}
extern "C" void gpu_bp_run_float64({given}) {{ gpu_bp_run<double>({passed}); }}
"""


def _parameters(kernel: kernels.Kernel) -> list[list[str]]:
    """The words of each parameter: perhaps raw, its type, its name."""
    return [parameter.split() for parameter in f"{kernel.in_params}, {kernel.out_params}".split(", ")]


@functools.cache
def _library(compiler: str, source: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        text, built = Path(folder, "text.cpp"), Path(folder, "text.so")
        text.write_text(source, encoding="utf-8")
        done = subprocess.run(
            [compiler, *FLAGS, str(text), "-o", str(built)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(_first_error(done.stderr))
        return ctypes.CDLL(str(built))


def _first_error(message: str) -> str:
    """What a compiler says first, without the place in a file that nobody has."""
    lines = message.strip().splitlines() or ["it failed without a word"]
    first = next((line for line in lines if "error" in line), lines[0])
    return first.partition("error: ")[2] or first


def _addresses(arrays: Sequence[np.ndarray]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
