"""Counter-based random numbers: Philox's published bits on every backend, whatever range is asked for in whatever
pieces; and that they are random, by tests that see a generator with a fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from gpu_bp.backends import Backend
from gpu_bp.kernels.random import bits
from gpu_bp.registry import CUDA_RANDOM, Purpose, normals, sincospi, uniforms

# Counter, key and result of the authors' own tests of philox4x64-10 (Random123, kat_vectors).
KNOWN = [
    ((0,) * 4, (0,) * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ((2**64 - 1,) * 4, (2**64 - 1,) * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]
# Starts from which a range crosses each carry of the counter, in its first lane and in others.
CARRIES = [0, 1, 2**32 + 3, *(4 * 2**word - k for word in (64, 128, 192) for k in (6, 5, 4, 3))]
SEED = 2**64 - 3
# Box and Muller's log, root, product and sine are off by a unit or less each.
NORMAL_ULPS = 4


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[Any, Any], words: str) -> None:
    """NumPy counts up before it draws, so that block n of a stream is Philox of n + 1."""
    block = sum(word << 64 * k for k, word in enumerate(counter)) - 1
    got = bits(*key, 4 * block, 4)
    assert [f"{word:016x}" for word in got] == words.split()


@pytest.mark.kernels
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_in_cuda(counter: tuple[int, ...], key: tuple[int, ...], words: str) -> None:
    from cuda_on_cpu.fake_cupy import FakeCupy

    cupy = FakeCupy()
    kernel = cupy.ElementwiseKernel(
        "uint64 c0, uint64 c1, uint64 c2, uint64 c3, uint64 k0, uint64 k1",
        "uint64 x, uint64 y, uint64 z, uint64 w",
        "const philox_block b = philox(c0, c1, c2, c3, k0, k1); x = b.x; y = b.y; z = b.z; w = b.w",
        "philox_words",
        preamble=CUDA_RANDOM,
    )
    got = [cupy.empty(1, np.uint64) for _ in range(4)]
    kernel(*map(np.uint64, (*counter, *key)), *got)
    assert [f"{cupy.asnumpy(word)[0]:016x}" for word in got] == words.split()


def numpys(seed: int, purpose: int, start: int, count: int) -> np.ndarray:
    """What NumPy's own generator gives when it is advanced to the block in which a range starts."""
    philox = np.random.Philox(key=np.array([seed, purpose], np.uint64))
    philox.advance(start // 4)
    return np.random.Generator(philox).random(start % 4 + count)[start % 4 :]


@given(st.integers(0, 2**64 - 1), st.sampled_from(Purpose), st.integers(0, 2**130), st.integers(0, 300))
def test_uniforms_are_numpys(seed: int, purpose: Purpose, start: int, count: int) -> None:
    np.testing.assert_array_equal(uniforms(seed, purpose, start, count), numpys(seed, purpose, start, count))


@pytest.mark.parametrize("start", CARRIES)
def test_uniforms_of_a_backend(backend: Backend, start: int) -> None:
    """Bit for bit, over every carry of the counter."""
    for count in (1, 3, 40):
        out = backend.to_device(np.full(count, np.nan))
        backend.uniforms(SEED, Purpose.NOISE, start, out)
        np.testing.assert_array_equal(backend.to_host(out), numpys(SEED, Purpose.NOISE, start, count))


def box_muller(start: int, count: int) -> list[Any]:
    """Normals from the uniforms, in many digits."""
    u = [mpmath.mpf(x) for x in numpys(SEED, Purpose.NOISE, start - start % 2, count + 2)]
    drawn = []
    for k in range(start % 2, start % 2 + count):
        radius = mpmath.sqrt(-2 * mpmath.log(1 - u[k - k % 2]))
        turn = 2 * u[k - k % 2 + 1]
        drawn.append(radius * (mpmath.sinpi(turn) if k % 2 else mpmath.cospi(turn)))
    return drawn


def assert_within(got: np.ndarray, wanted: list[Any], ulps: float) -> None:
    off = [abs(mpmath.mpf(float(g)) - w) / np.spacing(abs(float(w))) for g, w in zip(got, wanted, strict=True)]
    assert max(off) <= ulps


@pytest.mark.parametrize("start", CARRIES)
def test_normals_of_a_backend(backend: Backend, start: int) -> None:
    """Within a few units in the last place of Box and Muller's formula, and of NumPy's."""
    for count in (1, 3, 100):
        out = backend.to_device(np.full(count, np.nan))
        backend.normals(SEED, Purpose.NOISE, start, out)
        got, twin = backend.to_host(out), normals(SEED, Purpose.NOISE, start, count)
        assert_within(got, box_muller(start, count), NORMAL_ULPS)
        assert (np.abs(got - twin) <= NORMAL_ULPS * np.spacing(np.abs(twin))).all()


@pytest.mark.kernels
@pytest.mark.parametrize("draws", [1, 3, 4, 1_000_003, 2**31 - 1])
def test_draws_of_a_row_in_cuda(draws: int) -> None:
    """What a generated row draws is element row * draws + j of the stream, though that needs more than 64 bits."""
    from cuda_on_cpu.fake_cupy import FakeCupy

    last = (2**63 - 1) * draws
    elements = [e for middle in (0, 2**34, 2**64, 2**66, last) for e in range(middle - 9, middle + 9) if 0 <= e <= last]
    rows, j = (np.array(part, np.uint64) for part in zip(*(divmod(e, draws) for e in elements), strict=True))
    cupy = FakeCupy()
    drawn = []
    for function in ("uniform", "normal"):
        text = f"y = {function}(seed, 2, row, draws, j)"
        kernel = cupy.ElementwiseKernel(
            "uint64 seed, uint64 row, uint64 draws, uint64 j", "float64 y", text, f"a_{function}", preamble=CUDA_RANDOM
        )
        y = cupy.empty(len(rows))
        kernel(np.uint64(SEED), cupy.asarray(rows), np.uint64(draws), cupy.asarray(j), y)
        drawn.append(cupy.asnumpy(y))
    np.testing.assert_array_equal(drawn[0], [uniforms(SEED, Purpose.NOISE, e, 1)[0] for e in elements])
    twin = np.array([normals(SEED, Purpose.NOISE, e, 1)[0] for e in elements])
    assert (np.abs(drawn[1] - twin) <= NORMAL_ULPS * np.spacing(np.abs(twin))).all()


@pytest.mark.parametrize("draw", [uniforms, normals])
@given(st.integers(0, 2**70), st.lists(st.integers(0, 9), max_size=6))
def test_pieces_give_the_same_numbers(draw: Callable[..., np.ndarray], start: int, pieces: list[int]) -> None:
    whole = draw(7, Purpose.NOISE, start, sum(pieces))
    ends = np.cumsum([0, *pieces])
    parts = [draw(7, Purpose.NOISE, start + int(a), n) for a, n in zip(ends, pieces, strict=False)]
    np.testing.assert_array_equal(np.concatenate([*parts, []]), whole)


def test_sine_and_cosine_beside_their_zeros() -> None:
    """A relative error of two units, at multiples of a half and next to them; at a zero, zero."""
    steps = np.concatenate([[0.0], 2.0 ** np.arange(-60, 0)])
    x = np.unique([(half / 2 + sign * step) for half in (*range(-9, 10), 203) for step in steps for sign in (-1, 1)])
    for got, function in zip(sincospi(x), (mpmath.sinpi, mpmath.cospi), strict=True):
        wanted = [function(mpmath.mpf(float(number))) for number in x]
        zero = np.array([w == 0 for w in wanted])
        assert (got[zero] == 0).all()
        assert_within(got[~zero], [w for w in wanted if w != 0], 2)
    assert sincospi(np.array([2.0**52 + 1, 2.0**40 + 0.5]))[0].tolist() == [0, 1]


# Whether they are random -------------------------------------------------------------------------------------

LEVEL = 1e-5  # each of a few dozen tests; a fault goes far below it


def unlike_uniform(streams: np.ndarray) -> list[str]:
    """Which tests of streams (streams, n) of independent uniforms fail: empty for good ones."""
    found = []

    def ask(what: str, p: float) -> None:
        if p < LEVEL:
            found.append(f"{what}: p = {p:.1g}")

    for k, u in enumerate(streams):
        ask(f"Kolmogorov-Smirnov of stream {k}", stats.kstest(u, "uniform").pvalue)
        ask(f"chi-square of stream {k}", stats.chisquare(np.bincount((u * 256).astype(int), minlength=256)).pvalue)
        for lag in range(1, 9):  # of neighbours, and of how far they are from the middle
            for part in (u, np.abs(u - 0.5)):
                ask(f"correlation at lag {lag} of stream {k}", stats.pearsonr(part[:-lag], part[lag:]).pvalue)
        pairs = np.bincount((u[::2] * 16).astype(int) * 16 + (u[1::2] * 16).astype(int), minlength=256)
        ask(f"chi-square of the pairs of stream {k}", stats.chisquare(pairs).pvalue)
        for other in range(k):
            ask(f"correlation of streams {other} and {k}", stats.pearsonr(streams[other], u).pvalue)
    return found


N = 24_000


def drawn(draw: Callable[..., np.ndarray], start: int = 0) -> np.ndarray:
    """Streams of neighbouring seeds and purposes."""
    keys = [(seed, purpose) for seed in (0, 1) for purpose in (Purpose.INPUTS, Purpose.NOISE)]
    return np.array([draw(seed, purpose, start, N) for seed, purpose in keys])


@pytest.mark.parametrize("start", [0, 4 * 2**64 - N // 2])
def test_uniforms_are_random(start: int) -> None:
    assert unlike_uniform(drawn(uniforms, start)) == []


@pytest.mark.parametrize("start", [0, 1, 2**40])
def test_normals_are_random(start: int) -> None:
    """Their distribution function makes them uniform; pairs share a radius, and yet are independent."""
    assert unlike_uniform(special.ndtr(drawn(normals, start))) == []


@pytest.mark.parametrize("draws", [1, 2, 3, 5])
def test_draws_of_rows_are_random(draws: int) -> None:
    """Draw j of the rows, for each j: no row resembles the next."""
    u = uniforms(5, Purpose.INPUTS, 0, N * draws).reshape(N, draws)
    assert unlike_uniform(np.ascontiguousarray(u.T)) == []


def reused_block(u: np.ndarray) -> np.ndarray:
    return np.repeat(u.reshape(-1, 8)[:, :4], 2, axis=0).reshape(-1)


FAULTS: dict[str, Callable[[], Any]] = {
    "every block is used twice": lambda: [reused_block(u) for u in drawn(uniforms)],
    "one block of ten is used twice": lambda: [
        np.where(np.arange(N) % 80 < 8, reused_block(u), u) for u in drawn(uniforms)
    ],
    "two neighbouring rows have one counter": lambda: [np.repeat(u[::2], 2) for u in drawn(uniforms)],
    "two purposes have one key": lambda: [uniforms(1, Purpose.NOISE, 0, N)] * 2,
    "uniforms never above 0.99": lambda: drawn(uniforms) * 0.99,
    "few bits": lambda: np.floor(drawn(uniforms) * 200) / 200,
}


def faulty_normals(radius: slice, angle: slice) -> Any:
    """Box and Muller's, of other uniforms than they should be of."""
    u = drawn(uniforms).reshape(4, -1, 2)
    r = np.sqrt(-2 * np.log1p(-u[..., radius]))
    sine, cosine = sincospi(2 * u[..., angle])
    return special.ndtr(np.concatenate([r * cosine, r * sine], axis=2).reshape(4, -1))


FAULTS["radius and angle of one uniform"] = lambda: faulty_normals(slice(0, 1), slice(0, 1))
FAULTS["a quarter of the circle"] = lambda: special.ndtr(np.abs(drawn(normals)))
FAULTS["both normals of a pair are one"] = lambda: [np.repeat(special.ndtr(z[::2]), 2) for z in drawn(normals)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_generator_is_seen(fault: str) -> None:
    assert unlike_uniform(np.array(FAULTS[fault]()))


def repeated(streams: list[np.ndarray]) -> int:
    """How many elements of streams stand elsewhere too."""
    return sum(map(len, streams)) - len(np.unique(np.concatenate(streams)))


def test_no_element_comes_twice() -> None:
    """In the streams of all purposes and neighbouring seeds, wherever it stands; as it would in one that is shifted."""
    streams = [bits(seed, purpose, 0, 5000) for seed in range(8) for purpose in Purpose]
    assert repeated(streams) == 0
    assert repeated([*streams, bits(3, Purpose.NOISE, 5000 - 8, 5000)]) == 8
