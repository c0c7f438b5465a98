"""`CupyBackend` on a machine without a GPU: the package's own module, run a second time with `FakeCupy` as its cupy."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

from cuda_on_cpu import codegen
from cuda_on_cpu.fake_cupy import FakeCupy
from gpu_bp.backends import Backend

MODULE = "gpu_bp.backends.cupy_backend"


def cupy_backend_module(cupy: FakeCupy | None = None) -> Any:
    """A fresh copy of gpu_bp.backends.cupy_backend whose `cupy`, and NVIDIA's bindings, are the stand-in; the real ones
    are left alone."""
    codegen.real_cupy()  # the module imports it, and where it is missing the test says so
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stand_in = cupy or FakeCupy()
    module.__dict__["cupy"] = stand_in
    module.__dict__["cublas"] = lambda: stand_in.cublas
    module.__dict__["bindings"] = lambda: stand_in.bindings
    return module


def cupy_on_cpu() -> Backend:
    """A CupyBackend whose arrays lie on the host and whose kernels g++ compiles."""
    backend: Backend = cupy_backend_module().CupyBackend()
    return backend
