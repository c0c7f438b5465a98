"""Counter-based random numbers: NumPy's own Philox bits, whatever range is asked for in whatever pieces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gpu_bp.registry import Purpose, normals, uniforms


@given(st.integers(0, 2**63 - 1), st.sampled_from(Purpose), st.integers(0, 300), st.integers(0, 300))
def test_uniforms_are_numpys(seed: int, purpose: Purpose, start: int, count: int) -> None:
    philox = np.random.Philox(key=np.array([seed, purpose], np.uint64))
    expected = np.random.Generator(philox).random(start + count)[start:]
    np.testing.assert_array_equal(uniforms(seed, purpose, start, count), expected)


@pytest.mark.parametrize("draw", [uniforms, normals])
@given(st.integers(0, 2**40), st.lists(st.integers(0, 9), max_size=6))
def test_pieces_give_the_same_numbers(draw: object, start: int, pieces: list[int]) -> None:
    whole = draw(7, Purpose.NOISE, start, sum(pieces))  # type: ignore[operator]
    ends = np.cumsum([0, *pieces])
    parts = [draw(7, Purpose.NOISE, start + int(a), n) for a, n in zip(ends, pieces, strict=False)]  # type: ignore[operator]
    np.testing.assert_array_equal(np.concatenate([*parts, []]), whole)


def test_far_ranges_carry_into_the_next_word() -> None:
    """Element 4 * 2^64 lies in block 2^64: the counter's second word is 1."""
    key = np.array([3, Purpose.INPUTS], np.uint64)
    far = np.random.Philox(key=key, counter=np.array([0, 1, 0, 0], np.uint64))
    np.testing.assert_array_equal(uniforms(3, Purpose.INPUTS, 4 * 2**64, 5), np.random.Generator(far).random(5))


def test_streams_differ_by_seed_and_purpose() -> None:
    streams = [uniforms(seed, purpose, 0, 1000) for seed in (0, 1) for purpose in Purpose]
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlation).max() < 0.15


@pytest.mark.parametrize("start", [0, 1])
def test_normals_are_normal(start: int) -> None:
    z = normals(1, Purpose.NOISE, start, 200_001)
    assert stats.kstest(z, "norm").pvalue > 0.01
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 0.01
