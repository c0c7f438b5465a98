"""What the bits of a result depend on beside the config and the data: the device, libraries, and their threads.

Where two environments are the same, the same training gives the same bits; where they differ, it may not.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

from gpu_bp.backends.base import Backend, or_unknown


def environment(backend: Backend) -> dict[str, Any]:
    """What a training on this backend depends on: names and plain values, in a fixed order.

    What cannot be found out is "unknown"; nothing is raised for it. A thread count is that of now.
    """
    return {
        "gpu_bp": _version("gpu_bp"),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "scipy": _version("scipy"),
        "system": platform.system() or "unknown",
        "machine": platform.machine() or "unknown",
        "libc": or_unknown(lambda: " ".join(platform.libc_ver()).strip()),
        "backend": backend.name,
        "device": backend.device,
        **backend.libraries(),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], besides: Collection[str] = ()) -> list[str]:
    """What differs between two environments, in words such as `numpy 2.1.0, was 2.0.0`; empty where nothing does.

    `besides`: what may differ.
    """
    found = []
    for name in {**now, **before}:
        if name in besides:
            continue
        if name not in before:
            found.append(f"{name} {now[name]}, was not recorded")
        elif name not in now:
            found.append(f"{name} not known now, was {before[name]}")
        elif now[name] != before[name]:
            found.append(f"{name} {now[name]}, was {before[name]}")
    return found


def cupy_version() -> str | None:
    """Of CuPy and the package it came in; None where there is none."""
    for name in (f"cupy-cuda{major}x" for major in (13, 12)):
        try:
            return f"{metadata.version(name)} ({name})"
        except metadata.PackageNotFoundError:
            pass
    return None


def _version(package: str) -> Any:
    return or_unknown(lambda: metadata.version(package))
