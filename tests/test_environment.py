"""What results depend on beside config and data is known, quickly, and differences are said in words."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.fake_cupy import FakeCupy
from threadpoolctl import threadpool_limits

from gpu_bp import NumpyBackend
from gpu_bp.backends import Backend, host_libraries
from gpu_bp.environment import differences, environment

SHOW = """
import json, gpu_bp
from gpu_bp.environment import environment
print(json.dumps(environment(gpu_bp.NumpyBackend())))
"""


def of_new_process(**variables: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_is_plain_and_stays_the_same(backend: Backend) -> None:
    found = environment(backend)
    assert json.loads(json.dumps(found)) == found
    assert list(environment(backend).items()) == list(found.items())
    assert all(value and isinstance(value, str | int) for value in found.values())
    assert (found["backend"], found["device"]) == (backend.name, backend.device)
    assert (found["numpy"], found["scipy"]) == (np.__version__, scipy.__version__)
    assert found["python"] == sys.version.split()[0]
    assert list(found)[:4] == ["gpu_bp", "python", "numpy", "scipy"]
    assert ("threads" in found) == (backend.name == "numpy")


def test_threads_and_chosen_instructions_are_seen() -> None:
    """In processes of their own, since both are settled when NumPy is imported."""
    one, two = (of_new_process(OPENBLAS_NUM_THREADS=n, MKL_NUM_THREADS=n, OMP_NUM_THREADS=n) for n in "12")
    assert (one["threads"], two["threads"]) == (1, min(2, os.cpu_count() or 1))
    optional = [name for name in one["simd"].split() if "baseline" not in name]
    if not optional:
        pytest.skip("NumPy has no loops here but those of its baseline")
    less = of_new_process(NPY_DISABLE_CPU_FEATURES=" ".join(optional))
    assert not set(optional) & set(less["simd"].split())
    (said,) = [words for words in differences(one, less) if words.startswith("simd ")]
    assert said == f"simd {less['simd']}, was {one['simd']}"


def test_the_blas_is_numpy_s() -> None:
    """SciPy's wheels load an OpenBLAS of their own, of another version. NumPy's is asked itself."""
    libraries = list(Path(np.__file__).parents[1].glob("numpy.libs/libscipy_openblas64_*.so"))
    if not libraries:
        pytest.skip("NumPy's BLAS is not the OpenBLAS of its wheel")
    library = ctypes.CDLL(str(libraries[0]))
    library.scipy_openblas_get_config64_.restype = ctypes.c_char_p
    _, version, *words = library.scipy_openblas_get_config64_().decode().split()
    found = environment(NumpyBackend())
    kind, found_version, core = found["blas"].split()
    assert (kind, found_version) == ("openblas", version)
    assert core in words
    assert found["threads"] == library.scipy_openblas_get_num_threads64_()
    with threadpool_limits(1):
        assert environment(NumpyBackend())["threads"] == 1


@pytest.mark.kernels
def test_the_libraries_of_cuda() -> None:
    found = environment(cupy_backend_module().CupyBackend())
    assert (found["cuda runtime"], found["cuda driver"], found["nvrtc"]) == ("12.8", "13.1", "12.8")
    assert (found["cublas"], found["compute capability"]) == (120804, "90")


def nothing(*_: Any) -> Any:
    raise OSError("no such library")


@pytest.mark.kernels
def test_what_cuda_does_not_tell_is_unknown() -> None:
    cupy = FakeCupy()
    backend = cupy_backend_module(cupy).CupyBackend()
    cupy.cuda.cublas.getVersion = cupy.cuda.runtime.driverGetVersion = nothing
    found = environment(backend)
    assert (found["cublas"], found["cuda driver"], found["cuda runtime"]) == ("unknown", "unknown", "12.8")


def test_what_cannot_be_found_out_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_libraries, "ThreadpoolController", nothing)
    monkeypatch.setattr(host_libraries, "blas_library", host_libraries.blas_library.__wrapped__)
    monkeypatch.setattr(np.lib.introspect, "opt_func_info", nothing)
    monkeypatch.setattr("gpu_bp.environment.metadata.version", nothing)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "")
    monkeypatch.setattr("builtins.open", nothing)
    found = environment(NumpyBackend())
    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    assert found["blas"] == f"{built['name']} {built['version']}"
    for name in ("gpu_bp", "numpy", "scipy", "machine", "device", "simd", "threads"):
        assert found[name] == "unknown", name
    monkeypatch.setattr(np, "show_config", nothing)
    assert environment(NumpyBackend())["blas"] == "unknown"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e, []),
        (lambda e: dict(reversed(e.items())), []),
        (lambda e: e | {"numpy": "2.1.0"}, ["numpy 2.1.0, was 2.0.0"]),
        (lambda e: e | {"threads": "unknown"}, ["threads unknown, was 2"]),
        (lambda e: {"numpy": "2.0.0", "cublas": 7}, ["cublas 7, was not recorded", "threads not known now, was 2"]),
    ],
)
def test_differences(change: Callable[[dict[str, Any]], dict[str, Any]], words: list[str]) -> None:
    before = {"numpy": "2.0.0", "threads": 2}
    assert differences(before, change(before)) == words
