"""Numbers to try a formula on, and arrays of them on both backends."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_bp.spec import Record

DTYPES = ("float32", "float64")
COLUMNS = 16


def numbers(dtype: Any, *, finite: bool = False) -> np.ndarray:
    """(rows, COLUMNS): random numbers of all magnitudes, then what is special about the dtype, of both signs."""
    info = np.finfo(dtype)
    rng = np.random.default_rng(7)
    usual = rng.standard_normal(20 * COLUMNS)
    wide = rng.standard_normal(8 * COLUMNS) * 10.0 ** rng.uniform(-12, 4, 8 * COLUMNS)
    special = [0.0, info.smallest_subnormal, info.tiny / 8, info.tiny, info.eps, 0.5, 1, 3, 10, 30, 88, 104, 300, 709]
    special += [746, 9999, 1e4, 10001, 1e6, 1e30, info.max / 2, info.max]
    special += [] if finite else [np.inf, np.nan]
    values = np.concatenate([usual, wide, special, np.negative(special)])
    padded = np.resize(values, -(-len(values) // COLUMNS) * COLUMNS)
    return padded.reshape(-1, COLUMNS).astype(dtype)


def like(array: np.ndarray, seed: int, scale: float = 1.0) -> np.ndarray:
    """Random numbers of that array's shape and dtype, with a few zeros of both signs."""
    values = scale * np.random.default_rng(seed).standard_normal(array.shape).astype(array.dtype)
    values.reshape(-1)[::17] = 0.0
    values.reshape(-1)[5::17] = -0.0
    return values


# Where a quarter more than the default is no other value.
OTHERS: dict[str, Any] = {"label_smoothing": 0.15, "levels": (0.05, 0.3, 0.5, 0.975)}


def other_values(record: Record) -> dict[str, Any]:
    """Parameter values that are not the defaults."""
    return {name: OTHERS.get(name) or parameter.default * 1.25 for name, parameter in record.parameters.items()}


def rounded(record: Record, dtype: Any) -> dict[str, Any]:
    """The parameter values as the kernel gets them."""
    kind = np.dtype(dtype).type
    return {
        name: tuple(float(kind(x)) for x in value) if isinstance(value, tuple) else float(kind(value))
        for name, value in record.values.items()
    }
