"""Synthetic sets: the same rows on every backend, whatever is asked for in whatever pieces. (That they are what they
are called: test_synthetic_sets.py.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import NAMED, SECTIONS, VARIANTS, choices, program, section, variant

from gpu_bp import config_data, load_data, parse_config
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.data.synthetic import SETS, Set, make_set
from gpu_bp.formula import TERMS, NumpyPlace

variants = pytest.mark.parametrize(("kind", "k"), NAMED)

# Columns that are made of uniforms and of whole numbers by sums, products, quotients and roots, which IEEE fixes to the
# bit, and of nothing else. The rest differ as far as two libraries' functions do.
EXACT_INPUTS = {
    "xor",
    "encoder",
    "parity",
    "symmetry",
    "checkerboard",
    "friedman1",
    "friedman2",
    "friedman3",
    "sine-mixture",
    "heteroscedastic",
}
# Units in the last place of the largest number of a column that two backends may differ by. A normal, a sine or a
# tangent differs by 1 to 4 of its own units; sums of them in another order (dot: terms of both signs) add a few more of
# the largest term. Seen over all sets: 4. (Friedman's third would be off by 26 where products and sums are fused.)
ULPS = 8


def rows_of(b: Backend, made: Set, numbers: Any, first: int = 0, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and target of rows first + numbers, in float64; of classes the labels, (n, 1) int64."""
    rows = np.array(numbers, np.int64)
    inputs = b.to_device(np.full((len(rows), made.inputs.width), np.nan))
    target = b.to_device(np.full((len(rows), made.target.width), -1, np.int64 if made.classes else np.float64))
    b.generate(program(made), seed, first, b.to_device(rows), (inputs, target))
    return b.to_host(inputs), b.to_host(target)


def test_every_set_has_variants() -> None:
    """No kind of data without a set, a set without a test, or a choice of formulas that no variant makes."""
    assert set(SECTIONS.values()) == set(SETS) == set(get_args(config_data.Synthetic))
    assert set(VARIANTS) == set(SECTIONS)
    for kind, made in VARIANTS.items():
        for name, values in choices(kind).items():
            assert {getattr(section(kind, **chosen), name) for chosen in made} == values, (kind, name)
    assert set(SECTIONS) > EXACT_INPUTS
    assert {bool(section("two-spirals", **chosen).noise) for chosen in VARIANTS["two-spirals"]} == {False, True}
    assert {"proportions" in chosen for chosen in VARIANTS["gaussian-blobs"]} == {False, True}


@variants
@pytest.mark.parametrize("first", [0, 2**32 - 150, 3 * 10**15 - 299])
def test_rows_of_a_backend(backend: Backend, kind: str, k: int, first: int) -> None:
    """The first rows, those about row 2^32, and the last test rows that there can be."""
    made = variant(kind, k)
    got, wanted = (rows_of(b, made, range(300), first) for b in (backend, NumpyBackend()))
    assert np.isfinite(wanted[0]).all()
    if kind in EXACT_INPUTS or VARIANTS[kind][k].get("distribution") == "uniform":
        np.testing.assert_array_equal(got[0], wanted[0])
    if made.classes or made.binary:
        np.testing.assert_array_equal(got[1], wanted[1])
    for one, two in zip(got, wanted, strict=True):
        bound = ULPS * np.spacing(np.abs(two).max(axis=0).astype(np.float64))
        assert (np.abs(one - two) <= bound).all(), np.abs(one - two).max(axis=0) / bound * ULPS


@variants
@settings(max_examples=20)
@given(st.integers(0, 10**15), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_any_rows_in_any_order(kind: str, k: int, first: int, pieces: list[int], data: st.DataObject) -> None:
    """The same bits in one range, in pieces of it, and as a list of rows in any order, some of them twice."""
    made, b, n = variant(kind, k), NumpyBackend(), sum(pieces)
    whole = rows_of(b, made, range(n), first)
    ends = np.cumsum([0, *pieces]).tolist()
    parts = [rows_of(b, made, range(size), first + end) for end, size in zip(ends, pieces, strict=False)]
    some = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    for column, joined, listed in zip(whole, zip(*parts, strict=True), rows_of(b, made, some, first), strict=True):
        np.testing.assert_array_equal(np.concatenate(joined), column)
        np.testing.assert_array_equal(listed, column[some])


@pytest.mark.parametrize(("kind", "k"), [("teacher", 1), ("linear", 1), ("two-spirals", 1), ("symmetry", 2)])
def test_any_rows_on_a_backend(backend: Backend, kind: str, k: int) -> None:
    made = variant(kind, k)
    whole, some = rows_of(backend, made, range(200), 2**33), np.random.default_rng(0).permutation(200)
    for part in (some, some[:1], np.arange(50, 51), np.repeat(some[:3], 2)):
        for column, listed in zip(whole, rows_of(backend, made, part, 2**33), strict=True):
            np.testing.assert_array_equal(listed, column[part])


@pytest.mark.parametrize("n_targets", [1, 2])
@pytest.mark.parametrize("n_inputs", [1, 2, 3, 33, TERMS, TERMS + 1, 2 * TERMS + 1])
def test_sums_of_any_rows(n_inputs: int, n_targets: int) -> None:
    """Sums over few or many inputs do not depend on how many rows and targets are asked for at once, down to one."""
    made = make_set(section("linear", n_inputs=n_inputs, n_targets=n_targets), 3)
    _, whole = rows_of(NumpyBackend(), made, range(9))
    for first in range(9):
        for n in (1, 2, 4):
            _, part = rows_of(NumpyBackend(), made, range(min(n, 9 - first)), first)
            np.testing.assert_array_equal(part, whole[first : first + n])


def test_sums_that_depend_on_the_rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix product for all rows rounds a row's sum as it suits the block of rows."""

    def product(place: Any, stage: str, table: str) -> np.ndarray:
        return np.asarray(place._rows.stage(stage) @ place._rows.program.tables[table].T)

    monkeypatch.setattr(NumpyPlace, "dot", product)
    with pytest.raises(AssertionError):
        test_sums_of_any_rows(33, 1)


@variants
def test_seeds_and_what_rows_are_drawn_from(kind: str, k: int) -> None:
    """Another seed makes other rows, where they are drawn; the same one the same."""
    seeds = [rows_of(NumpyBackend(), variant(kind, k, seed), range(40), seed=seed)[0] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(seeds[0], seeds[1])
    chosen = VARIANTS[kind][k]
    fixed = kind in ("xor", "encoder") or (kind in ("parity", "symmetry") and "patterns" not in chosen)
    fixed |= kind == "two-spirals" and not chosen
    assert np.array_equal(seeds[0], seeds[2]) == fixed


@pytest.mark.parametrize(
    "kind", ["double-moon", "checkerboard", "gaussian-blobs", "linear", "friedman2", "sine-mixture"]
)
def test_splits_are_draws_of_their_own(tiny_config: Callable[..., dict[str, Any]], kind: str) -> None:
    """Training, validation and test rows follow each other in one set: none of one comes in another."""
    data = {"kind": kind, "rows": 300, "validation_rows": 200, "test_rows": 100}
    data |= {"scaling": "none"} if "scaling" in SECTIONS[kind].model_fields else {}
    config = parse_config(tiny_config() | {"data": data})
    dataset = load_data(config)
    parts = [dataset.rows(name).inputs for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [300, 200, 100]
    whole, _ = rows_of(NumpyBackend(), make_set(config.data, config.seed), range(600), seed=config.seed)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(np.unique(whole, axis=0)) == 600
