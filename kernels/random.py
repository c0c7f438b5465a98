"""Counter-based random numbers: element e of a stream is a pure function of (seed, purpose, e).

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), in NumPy's layout:
element e of a stream is lane e % 4 of block e // 4, so that any range can be drawn at any time, in any
pieces, with the same bits. All draws are float64; whoever needs less casts them.

In NumPy it is NumPy's own Philox with its counter set; in CUDA the same bits from `CUDA_RANDOM`. Uniforms are equal
bit for bit; normals agree to a few units in the last place, as far as two libraries' log and sine do.
"""

from enum import IntEnum

import numpy as np

from gpu_bp.kernels.functions import sincospi, zero_where
from gpu_bp.spec import Scratch


class Purpose(IntEnum):
    """What a stream is for; with the seed it is the key, so that streams never overlap."""

    WEIGHTS = 0
    INPUTS = 1
    NOISE = 2
    ORDER = 3
    DROPOUT = 4
    TEACHER = 5  # the true coefficients of synthetic data
    CHECK = 6  # which gradients are checked
    LABELS = 7
    WINDOWS = 8  # the order of the rows within a window
    INPUT_NOISE = 9  # added to the inputs of a training step
    CONNECTIONS = 10  # which inputs a unit of sparse weights has


# uniform(seed, purpose, row, draws, j) is element row * draws + j of a stream, in 128 bits, so that it never overflows.
CUDA_RANDOM = r"""
struct philox_block { unsigned long long x, y, z, w; };

// The block function: a counter of four words, a key of two.
__device__ inline philox_block philox(unsigned long long c0, unsigned long long c1, unsigned long long c2,
                                      unsigned long long c3, unsigned long long k0, unsigned long long k1) {
    #pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned long long h0 = __umul64hi(0xD2E7470EE14C6C93ull, c0), l0 = 0xD2E7470EE14C6C93ull * c0;
        const unsigned long long h1 = __umul64hi(0xCA5A826395121157ull, c2), l1 = 0xCA5A826395121157ull * c2;
        c0 = h1 ^ c1 ^ k0; c1 = l1; c2 = h0 ^ c3 ^ k1; c3 = l0;
        k0 += 0x9E3779B97F4A7C15ull; k1 += 0xBB67AE8584CAA73Bull;
    }
    philox_block block = {c0, c1, c2, c3};
    return block;
}

// 53 bits, as NumPy makes a double of 64.
__device__ inline double unit(unsigned long long bits) { return (bits >> 11) * (1.0 / 9007199254740992.0); }

// Box and Muller's pair. log(1 - u), because u may be 0 and is never 1.
__device__ inline double radius_of(double u) { return sqrt(-2.0 * log1p(-u)); }
__device__ inline double first_normal(double u, double v) { return radius_of(u) * cospi(2.0 * v); }
__device__ inline double second_normal(double u, double v) { return radius_of(u) * sinpi(2.0 * v); }

// The block of element row * draws + j, and its lane. NumPy counts a counter up before it uses it, hence + 1.
__device__ inline philox_block block_of(unsigned long long seed, unsigned long long purpose, unsigned long long row,
                                        unsigned long long draws, unsigned long long j, int& lane) {
    const unsigned long long low = row * draws + j;
    const unsigned long long high = __umul64hi(row, draws) + (low < j);
    lane = (int)(low & 3);
    const unsigned long long c0 = ((low >> 2) | (high << 62)) + 1;
    return philox(c0, (high >> 2) + (c0 == 0), 0, 0, seed, purpose);
}

__device__ inline double uniform(unsigned long long seed, unsigned long long purpose, unsigned long long row,
                                 unsigned long long draws, unsigned long long j) {
    int lane;
    const philox_block b = block_of(seed, purpose, row, draws, j, lane);
    return unit(lane & 2 ? (lane & 1 ? b.w : b.z) : (lane & 1 ? b.y : b.x));
}

__device__ inline double normal(unsigned long long seed, unsigned long long purpose, unsigned long long row,
                                unsigned long long draws, unsigned long long j) {
    int lane;
    const philox_block b = block_of(seed, purpose, row, draws, j, lane);
    const double u = unit(lane & 2 ? b.z : b.x), v = unit(lane & 2 ? b.w : b.y);
    return radius_of(u) * (lane & 1 ? sinpi(2.0 * v) : cospi(2.0 * v));
}
"""

# The body of a kernel in which thread i fills the elements of one block: `out` holds `count` elements from
# lane `lane` of block (c0, c1, c2, c3) on.
CUDA_FILL = r"""
const unsigned long long b0 = c0 + (unsigned long long)i;
const unsigned long long b1 = c1 + (b0 < c0), b2 = c2 + (b1 < c1), b3 = c3 + (b2 < c2);
const philox_block block = philox(b0, b1, b2, b3, seed, purpose);
const double x = unit(block.x), y = unit(block.y), z = unit(block.z), w = unit(block.w);
const long long first = 4 * (long long)i - lane;
if (first >= 0 && first < count) out[first] = %s;
if (first + 1 >= 0 && first + 1 < count) out[first + 1] = %s;
if (first + 2 >= 0 && first + 2 < count) out[first + 2] = %s;
if (first + 3 < count) out[first + 3] = %s;
"""
CUDA_FILL_UNIFORMS = CUDA_FILL % ("x", "y", "z", "w")
CUDA_FILL_NORMALS = CUDA_FILL % (
    "first_normal(x, y)",
    "second_normal(x, y)",
    "first_normal(z, w)",
    "second_normal(z, w)",
)


# Dropout and input noise, likewise; `values` are what goes in, `rate` the share that is left out.
CUDA_DROPOUT = CUDA_FILL % tuple(f"{u} < rate ? T(0) : T(values[first + {k}] * keep)" for k, u in enumerate("xyzw"))
CUDA_INPUT_NOISE = CUDA_FILL % tuple(
    f"values[first + {k}] + T(sd * {normal})"
    for k, normal in enumerate(
        ("first_normal(x, y)", "second_normal(x, y)", "first_normal(z, w)", "second_normal(z, w)")
    )
)


def element_of_step(step: int, layer: int, place: int) -> int:
    """The element of a stream that is for a place in the output of a layer, counting row by row, at a step.

    Each step and layer has 2^128 blocks of its own, so that no two ever meet.
    """
    return 4 * ((step << 64 | layer) << 128) + place


def _philox(seed: int, purpose: Purpose, block: int) -> np.random.Philox:
    """NumPy's generator, the next number of which is lane 0 of that block."""
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([block >> shift & 0xFFFFFFFFFFFFFFFF for shift in (0, 64, 128, 192)], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def bits(seed: int, purpose: Purpose, start: int, count: int) -> np.ndarray:
    """Elements start to start + count of a stream, 64 random bits each: (count,) uint64."""
    lane = start % 4
    return np.asarray(_philox(seed, purpose, start // 4).random_raw(lane + count)[lane:])


def dropout(seed: int, start: int, rate: float, values: np.ndarray, out: np.ndarray, s: Scratch) -> None:
    """`out` = values / (1 - rate), but 0 where the stream's uniform, from element `start` on, is less than the rate.

    Srivastava et al. (2014), scaled in training, so that nothing is to be scaled later. The arrays are flat.
    """
    generator = np.random.Generator(_philox(seed, Purpose.DROPOUT, start // 4))
    generator.bit_generator.random_raw(start % 4)
    generator.random(out=s.uniforms)
    np.less(s.uniforms, rate, out=s.mask)
    np.multiply(values, 1 / (1 - rate), out=out)
    zero_where(s.mask, out, out, s)


def uniforms(seed: int, purpose: Purpose, start: int, count: int) -> np.ndarray:
    """Elements start to start + count of a stream, uniform on [0, 1): (count,) float64."""
    lane = start % 4
    return np.random.Generator(_philox(seed, purpose, start // 4)).random(lane + count)[lane:]


def normals(seed: int, purpose: Purpose, start: int, count: int) -> np.ndarray:
    """Elements start to start + count of a stream of standard normals: (count,) float64.

    By Box and Muller (1958): uniforms 2p and 2p + 1 give the normals 2p and 2p + 1.
    """
    first = start // 2 * 2
    pairs = -(-(start + count - first) // 2)
    u = uniforms(seed, purpose, first, 2 * pairs).reshape(pairs, 2)
    radius = np.sqrt(-2 * np.log1p(-u[:, 0]))  # log(1 - u), because u may be 0 and is never 1
    sine, cosine = sincospi(2 * u[:, 1])
    z = np.empty((pairs, 2))
    np.multiply(radius, cosine, out=z[:, 0])
    np.multiply(radius, sine, out=z[:, 1])
    return z.reshape(-1)[start - first :][:count]
