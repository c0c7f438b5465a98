"""Choosing a backend: `numpy`, `cupy`, or `auto` (cupy where a GPU really computes, numpy elsewhere)."""

from __future__ import annotations

import os

from gpu_bp.backends.base import Backend
from gpu_bp.backends.numpy_backend import NumpyBackend
from gpu_bp.errors import UserError, unknown

__all__ = ["BACKENDS", "Backend", "NumpyBackend", "select"]

BACKENDS = ("auto", "numpy", "cupy")


def select(name: str = "auto", local_rank: int = 0) -> tuple[Backend, str]:
    """The backend of that name, and one line that says which was taken and why.

    Each rank on a machine has a device of its own, as long as there are some.

    Raises:
        UserError: an unknown name, or `cupy` where no GPU is usable (what was tried and why it failed).
    """
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    if name == "numpy":
        return NumpyBackend(), "numpy backend, as asked"
    backend, reason = _cupy(local_rank)
    if backend is not None:
        return backend, f"cupy backend on {backend.device}"
    if name == "cupy":
        raise UserError(f"backend cupy cannot be used: {reason}; use --backend numpy, or auto")
    return NumpyBackend(), f"numpy backend, because cupy cannot be used: {reason}"


def _cupy(local_rank: int) -> tuple[Backend | None, str]:
    try:
        from gpu_bp.backends import cupy_backend
    except Exception as error:  # not installed, or its libraries do not load: any failure means no GPU
        text = str(error).strip() or type(error).__name__
        return None, "import cupy failed: " + text.splitlines()[0]
    reason = cupy_backend.why_unusable(local_rank)
    if reason:
        return None, reason
    return cupy_backend.CupyBackend(graphs=os.environ.get("GPU_BP_GRAPHS") != "0"), ""
