"""The published experiments, each a config: what they must reach, over seeds 0 to N - 1.

`pytest -m slow -s tests/test_experiments.py` prints the figures of docs/experiments.md.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, bike_sharing

import gpu_bp
from gpu_bp.backends import Backend

pytestmark = pytest.mark.slow


def runs(backend: Backend, folder: Path, name: str, seeds: int, *overrides: str) -> list[dict[str, Any]]:
    """The summaries of a config's trainings with seeds 0 to seeds - 1."""
    summaries = []
    for seed in range(seeds):
        config = gpu_bp.load_config(ROOT / f"configs/{name}.toml", [*overrides, f"seed={seed}"])
        result = gpu_bp.train(config, backend=backend, run=folder / str(seed), pictures=False)
        summaries.append(result.summary)
    return summaries


@pytest.mark.parametrize(("distance", "most"), [(-4, 2), (-5, 6)])
def test_double_moon(backend: Backend, tmp_path: Path, distance: int, most: int) -> None:
    """Haykin's double moon: median test errors of 2000."""
    summaries = runs(backend, tmp_path, "double-moon", 10, f"data.distance={distance}")
    errors = [summary["test"]["errors"] for summary in summaries]
    print(f"\ndouble-moon, distance {distance}: test errors {errors}, median {median(errors):g}")
    assert median(errors) <= most


def test_xor(backend: Backend, tmp_path: Path) -> None:
    """Every error below 0.5 within 5000 sweeps for 90 of 100 seeds, the median seed in fewer than 700."""
    summaries = runs(backend, tmp_path, "xor", 100)
    solved = [summary["steps"] for summary in summaries if summary["train"]["errors"] == 0]
    sweeps = sorted(summary["steps"] for summary in summaries)
    print(
        f"\nxor: {len(solved)} of 100 solved, sweeps {min(solved)} to {max(solved)}, median of all {median(sweeps):g}"
    )
    assert len(solved) >= 90
    assert median(sweeps) < 700


def test_encoder(backend: Backend, tmp_path: Path) -> None:
    """Every output within 0.5 of its target for 19 of 20 seeds."""
    summaries = runs(backend, tmp_path, "encoder", 20)
    solved = sum(summary["train"]["errors"] == 0 for summary in summaries)
    losses = [summary["train"]["loss"] for summary in summaries]
    print(f"\nencoder: {solved} of 20 solved, mean loss {min(losses):.4f} to {max(losses):.4f}")
    assert solved >= 19


def test_two_spirals(backend: Backend, tmp_path: Path) -> None:
    """All 194 points within 0.5 of their targets in at most 5000 steps, for 8 of 8 seeds."""
    summaries = runs(backend, tmp_path, "two-spirals", 8)
    steps = [summary["steps"] for summary in summaries]
    print(f"\ntwo-spirals: steps {steps}")
    assert [summary["train"]["errors"] for summary in summaries] == [0] * 8
    assert max(steps) <= 5000


def test_friedman1(backend: Backend, tmp_path: Path) -> None:
    """Test mse below 1.15, of which 1 is noise."""
    summaries = runs(backend, tmp_path, "friedman1", 4)
    errors = [summary["test"]["mse"] for summary in summaries]
    print(f"\nfriedman1: test mse {[round(mse, 3) for mse in errors]}")
    assert max(errors) < 1.15


def test_rare_class(backend: Backend, tmp_path: Path) -> None:
    """The rare class's recall on the test rows: balanced as the Bayes rule's, 0.84, else next to nothing."""
    for setting, low, high in (('"balanced"', 0.79, 0.89), ("{}", 0.0, 0.25)):
        summaries = runs(backend, tmp_path / str(low), "rare-class", 5, f"loss.class_weight={setting}")
        recalls = [summary["test"]["recall_1"] for summary in summaries]
        print(f"\nrare-class, {setting}: recall {[round(recall, 3) for recall in recalls]}")
        assert all(low <= recall <= high for recall in recalls)


def test_quantiles(backend: Backend, tmp_path: Path) -> None:
    """Between the 5 % and the 95 % quantile lie 90 % of the test rows, to 2 %."""
    summaries = runs(backend, tmp_path, "quantiles", 5)
    coverages = [summary["test"]["coverage"] for summary in summaries]
    print(f"\nquantiles: coverage {[round(coverage, 4) for coverage in coverages]}")
    assert all(0.88 <= coverage <= 0.92 for coverage in coverages)


def test_bike_sharing(backend: Backend, tmp_path: Path) -> None:
    """mse in standardised units: training below 0.09 and validation below 0.19 for 7 of 8 seeds."""
    summaries = runs(backend, tmp_path, "bike-sharing", 8, f"data.path={bike_sharing()}")
    train, validation, test = ([s[name]["mse"] for s in summaries] for name in ("train", "validation", "test"))
    for name, values in (("training", train), ("validation", validation), ("test", test)):
        print(f"\nbike-sharing: {name} mse {min(values):.4f} to {max(values):.4f}", end="")
    assert sum(a < 0.09 and b < 0.19 for a, b in zip(train, validation, strict=True)) >= 7


def test_bike_sharing_is_predicted_from_raw_rows(backend: Backend, tmp_path: Path) -> None:
    """56 inputs; `predict` on the raw test rows gives rides an hour, and the summary's mse to 1e-6."""
    csv = bike_sharing()
    config = gpu_bp.load_config(ROOT / "configs/bike-sharing.toml", [f"data.path={csv}"])
    result = gpu_bp.train(config, backend=backend, run=tmp_path / "run")
    assert result.model.network.widths == [56, 14, 1]
    header, *rows = csv.read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([header, *rows[-504:]]) + "\n")
    names, (predicted,) = result.model.predict(tmp_path / "test.csv")
    assert names == ["cnt"]
    rides = np.array([float(row.split(",")[header.split(",").index("cnt")]) for row in rows])
    sd = rides[: -504 - 1440].std()
    assert (((predicted - rides[-504:]) / sd) ** 2).mean() == pytest.approx(result.summary["test"]["mse"], abs=1e-6)
