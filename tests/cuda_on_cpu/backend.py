"""`CupyBackend` on a machine without a GPU: the package's own modules, run again with `FakeCupy` as their cupy."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

from cuda_on_cpu.fake_cupy import FakeCupy
from gpu_bp.backends import Backend

# Those that have CuPy, in the order in which they import each other.
NAMES = (
    "cuda_launch",
    "cuda_scalars",
    "cuda_generator",
    "cuda_sums",
    "cuda_records",
    "cuda_products",
    "nccl",
    "cupy_backend",
)
MODULES = tuple(f"gpu_bp.backends.{name}" for name in NAMES)
PRODUCTS, NCCL = "gpu_bp.backends.cuda_products", "gpu_bp.backends.nccl"


def cupy_backend_module(
    cupy: FakeCupy | None = None, bindings: Callable[[], Any] | None = None, nccl: Callable[[], Any] | None = None
) -> Any:
    """A fresh copy of gpu_bp.backends.cupy_backend whose `cupy`, and NVIDIA's bindings, are the stand-in; the real ones
    are left alone. Or those to cuBLAS are what `bindings` gives, and NCCL, else not there, is what `nccl` does."""
    stand_in = cupy or FakeCupy()
    fresh = {}
    before = {name: sys.modules.get(name) for name in ("cupy", *MODULES)}
    sys.modules["cupy"] = cast(ModuleType, stand_in)
    try:
        for name in MODULES:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            assert spec.loader is not None
            fresh[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(fresh[name])
    finally:
        for name, old in before.items():
            if old is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = old
    fresh[PRODUCTS].__dict__.update(
        cublas=lambda: stand_in.cublas,
        bindings=bindings or (lambda: stand_in.bindings),
        lt_bindings=lambda: stand_in.lt_bindings,
    )
    fresh[NCCL].__dict__.update(nccl=nccl or (lambda: SimpleNamespace(available=False)))
    return fresh[MODULES[-1]]


def cupy_on_cpu() -> Backend:
    """A CupyBackend whose arrays lie on the host and whose kernels g++ compiles."""
    backend: Backend = cupy_backend_module().CupyBackend()
    return backend
