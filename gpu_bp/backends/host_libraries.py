"""What the NumPy backend computes with: the processor, NumPy's own loops, and its BLAS."""

from __future__ import annotations

import platform
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import LibController, ThreadpoolController

from gpu_bp.backends.base import or_unknown


def processor() -> str:
    """What the processor calls itself. BLAS chooses its kernels by it, and the blocks that they work on."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:  # another system than Linux
        names = []
    return next(filter(None, names), platform.processor() or platform.machine())


def simd() -> str:
    """The sets of instructions that NumPy's own loops were chosen for, here and now."""
    from numpy.lib import introspect  # late: the first NumPy 2 has none

    functions = introspect.opt_func_info().values()
    return " ".join(sorted({chosen["current"] for signatures in functions for chosen in signatures.values()}))


@cache
def blas_library() -> LibController | None:
    """NumPy's BLAS as a library that can be asked and told; None where it cannot, as Apple's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as: two OpenMP libraries are loaded, which is no affair of ours
        loaded = or_unknown(lambda: ThreadpoolController().lib_controllers)
    found = [library for library in loaded if library.user_api == "blas"] if loaded != "unknown" else []
    # wheels bring one each, NumPy's in numpy/ or numpy.libs/, and SciPy's is not the one wanted
    own = str(Path(np.__file__).resolve().parent)
    found.sort(key=lambda library: (not library.filepath.startswith(own), library.filepath))
    return found[0] if found else None


def blas() -> dict[str, Any]:
    """NumPy's BLAS: what it is called, with its version and the processor it takes this one for; and its threads."""
    library = blas_library()
    if library is None:  # what NumPy was built with
        built = or_unknown(lambda: np.show_config(mode="dicts")["Build Dependencies"]["blas"])
        words = [built.get(key) for key in ("name", "version")] if built != "unknown" else []
        return {"blas": " ".join(filter(None, words)) or "unknown", "threads": "unknown"}
    words = [library.internal_api, library.version, getattr(library, "architecture", None)]
    return {"blas": " ".join(filter(None, words)), "threads": library.num_threads}
