"""Shuffling without an index array: pseudo-random permutations of 0 .. n-1, computed place by place.

A Feistel network on pairs (left, right) of Z_a x Z_b, with a * b little more than n: in turns, a hash of one half is
added to the other, which can be undone and so is a bijection. Whoever lands beyond n walks on along the cycle until
inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The keys of the rounds come from Philox.
With 12 rounds every permutation of up to 7 numbers occurs, and each about as often as any other.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gpu_bp.kernels.random import Purpose, bits

ROUNDS = 12

CUDA_SHUFFLE = r"""
// A number below `modulus` (at most 2^32) from x and a key.
__device__ inline unsigned long long shuffle_hash(unsigned long long x, unsigned long long key,
                                                  unsigned long long modulus) {
    unsigned long long h = (x ^ key) * 0x9E3779B97F4A7C15ull;
    h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93ull;
    return ((h >> 32) * modulus) >> 32;
}

// The image of x under the permutation of n numbers with these keys (12 of them).
template <typename Keys> __device__ inline unsigned long long permuted(
        unsigned long long x, unsigned long long n, unsigned long long a, unsigned long long b, const Keys& keys) {
    do {
        unsigned long long left = x / b, right = x % b;
        for (int round = 0; round < 12; round += 2) {
            left = (left + shuffle_hash(right, keys[round], a)) % a;
            right = (right + shuffle_hash(left, keys[round + 1], b)) % b;
        }
        x = left * b + right;
    } while (x >= n);
    return x;
}
"""
_FIRST, _SECOND, _32 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93), np.uint64(32)


def _hash(x: np.ndarray, key: np.ndarray, modulus: np.uint64) -> np.ndarray:
    """The twin of `shuffle_hash`."""
    h: np.ndarray = x ^ key
    h *= _FIRST
    h ^= h >> _32
    h *= _SECOND
    h >>= _32
    h *= modulus
    h >>= _32
    return h


@dataclass(frozen=True, eq=False)
class Permutations:
    """Permutations of 0 .. n-1, n at most 2^62: `keys` is (ROUNDS, count, 1) uint64, one set for each of them."""

    n: int
    keys: np.ndarray

    @classmethod
    def of(cls, seed: int, purpose: Purpose, n: int, first: int, count: int = 1) -> "Permutations":
        """The permutations of n numbers with the numbers first to first + count."""
        keys = bits(seed, purpose, first * ROUNDS, count * ROUNDS)
        return cls(n, np.ascontiguousarray(keys.reshape(count, ROUNDS).T)[:, :, None])

    @property
    def a(self) -> int:
        """How many values the left half has. Even, since sums modulo odd numbers make even permutations alone."""
        root = math.isqrt(self.n - 1) + 1 if self.n > 1 else 1
        return root + root % 2

    @property
    def b(self) -> int:
        """How many values the right half has."""
        return -(-self.n // self.a)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The images of numbers (k,) below n, one row a permutation: (count, k) int64."""
        return self._walk(x, range(ROUNDS), forward=True)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """The numbers of which these are the images: (count, k) int64."""
        return self._walk(y, reversed(range(ROUNDS)), forward=False)

    def _walk(self, x: np.ndarray, rounds: Iterable[int], forward: bool) -> np.ndarray:
        rounds, n = list(rounds), np.uint64(self.n)
        shape = (self.keys.shape[1], len(x))
        y = self._network(np.broadcast_to(x.astype(np.uint64), shape), rounds, forward)
        while (outside := y >= n).any():
            y = np.where(outside, self._network(y, rounds, forward), y)
        return y.view(np.int64)

    def _network(self, x: np.ndarray, rounds: list[int], forward: bool) -> np.ndarray:
        sizes = (np.uint64(self.a), np.uint64(self.b))
        halves = [*np.divmod(x, sizes[1])]
        for k in rounds:
            half, size = halves[k % 2], sizes[k % 2]
            added = _hash(halves[1 - k % 2], self.keys[k], size)
            half += added if forward else size - added
            np.minimum(half, half - size, out=half)  # modulo size: what is below 0 wraps around to far above
        return np.asarray(halves[0] * sizes[1] + halves[1])
