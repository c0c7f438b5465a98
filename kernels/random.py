"""Counter-based random numbers: element e of a stream is a pure function of (seed, purpose, e).

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), in NumPy's layout:
element e of a stream is lane e % 4 of block e // 4, so that any range can be drawn at any time, in any
pieces, with the same bits. All draws are float64; whoever needs less casts them.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for; with the seed it is the key, so that streams never overlap."""

    WEIGHTS = 0
    INPUTS = 1
    NOISE = 2
    ORDER = 3
    DROPOUT = 4
    TEACHER = 5  # the true coefficients of synthetic data
    CHECK = 6  # which gradients are checked


def uniforms(seed: int, purpose: Purpose, start: int, count: int) -> np.ndarray:
    """Elements start to start + count of a stream, uniform on [0, 1): (count,) float64."""
    philox = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64))
    philox.advance(start // 4)
    lane = start % 4
    return np.random.Generator(philox).random(lane + count)[lane:]


def normals(seed: int, purpose: Purpose, start: int, count: int) -> np.ndarray:
    """Elements start to start + count of a stream of standard normals: (count,) float64.

    By Box and Muller (1958): uniforms 2p and 2p + 1 give the normals 2p and 2p + 1.
    """
    first = start // 2 * 2
    pairs = -(-(start + count - first) // 2)
    u = uniforms(seed, purpose, first, 2 * pairs).reshape(pairs, 2)
    radius = np.sqrt(-2 * np.log1p(-u[:, 0]))  # log(1 - u), because u may be 0 and is never 1
    angle = 2 * np.pi * u[:, 1]
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return z[start - first :][:count]


def permutation(seed: int, purpose: Purpose, index: int, n: int) -> np.ndarray:
    """The index-th random permutation of n rows: (n,) int64. Elements index*n to (index+1)*n, ranked."""
    return np.argsort(uniforms(seed, purpose, index * n, n), kind="stable")
