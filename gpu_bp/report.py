"""Pictures of a run. matplotlib is imported here alone, and only when something is drawn.

Legends have a fixed place: to look for the best one can be slow, and matplotlib warns when it is.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_bp.data import Dataset
from gpu_bp.model import Model
from gpu_bp.run_folder import RunFolder
from gpu_bp.spec import GroupedLoss
from gpu_bp.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Rows that a picture shows at most: enough to see, few enough to draw quickly.
POINTS = 2000
SERIES = 504


def draw(folder: RunFolder, model: Model, dataset: Dataset) -> list[Path]:
    """Draws what suits the run into its folder, and returns the paths of the pictures."""
    lines = folder.metrics()
    pictures = [_curves(folder, lines)] if lines else []  # none where it was stopped before its first
    if dataset.n_inputs == 2:
        pictures.append(_boundary(folder, model, dataset))
    if dataset.task.kind == "regression":
        if dataset.n_inputs == 1:
            pictures.append(_fit(folder, model, dataset))
        pictures.append(_predictions(folder, model, dataset))
    return pictures


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **keywords: Any) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    axes = figure.subplots(rows, columns, squeeze=False, **keywords)
    return figure, list(axes.flat)


def _save(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture)
    write_whole(path, picture.getvalue())
    return path


def _curves(folder: RunFolder, lines: list[dict[str, Any]]) -> Path:
    """The losses over the steps, and below them the learning rate where it changes."""
    steps, rates = [line["step"] for line in lines], [line["learning_rate"] for line in lines]
    if len(set(rates)) > 1:
        figure, axes = _figure(7, 5.5, rows=2, sharex=True, height_ratios=[2.5, 1])
    else:
        figure, axes = _figure(7, 4)
    top, bottom = axes[0], axes[-1]
    marker = "o" if len(lines) < 3 else ""
    for key, label in (("train_loss", "training"), ("validation_loss", "validation")):
        values = [line.get(key) for line in lines]
        if any(value is not None for value in values):
            numbers = np.array([np.nan if value is None else value for value in values], float)
            top.plot(steps, numbers, label=label, marker=marker, linewidth=1.2)
    losses = [line[key] for line in lines for key in ("train_loss", "validation_loss") if line.get(key) is not None]
    if losses and min(losses) > 0:
        _decades(top, losses)
    top.set_ylabel("mean loss of a row")
    top.grid(alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2)  # where it covers no curve
    if bottom is not top:
        bottom.plot(steps, rates, color="tab:gray", marker=marker, linewidth=1.2)
        bottom.set_ylabel("learning rate")
        bottom.grid(alpha=0.3)
        if max(rates) > 10 * min(rates) > 0:
            _decades(bottom, rates)
        else:
            bottom.set_ylim(bottom=0)
    bottom.set_xlabel("step")
    figure.align_ylabels()
    return _save(figure, folder.path / "curves.png")


def _decades(axis: Axes, values: list[float]) -> None:
    """A logarithmic axis for such values."""
    from matplotlib.ticker import NullFormatter

    axis.set_yscale("log")
    if max(values) > 10 * min(values):
        axis.yaxis.set_minor_formatter(NullFormatter())  # the decades are labels enough


def _boundary(folder: RunFolder, model: Model, dataset: Dataset) -> Path:
    """The network's output over the plane of its two inputs, with the decision boundary and the points."""
    from matplotlib.lines import Line2D

    name = "test" if "test" in dataset.sources else "train"
    split = dataset.rows(name, 0, POINTS)
    preparation, targets = dataset.preparation, split.targets
    low, high = split.inputs.min(axis=0), split.inputs.max(axis=0)
    margin = np.where(high > low, 0.1 * (high - low), 1.0)
    x, y = (np.linspace(a, b, 300) for a, b in zip(low - margin, high + margin, strict=True))
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    outputs = model.loss.point_prediction(model.network.predict(grid))
    points = preparation.raw_inputs(split.inputs)
    x, y = preparation.raw_inputs(np.stack([x, y], axis=1)).T
    figure, (axis,) = _figure(6.5, 5.5)
    task = dataset.task
    if task.decision == "argmax":
        shown, colours = outputs.argmax(axis=1).astype(float), {"cmap": "tab10", "vmin": 0, "vmax": 9}
        axis.pcolormesh(x, y, shown.reshape(300, 300), alpha=0.3, rasterized=True, **colours)  # type: ignore[arg-type]
        label = targets if targets.ndim == 1 else targets.argmax(axis=1)
        edges = np.arange(outputs.shape[1] - 1) + 0.5
        axis.contour(x, y, shown.reshape(300, 300), levels=edges, colors="black", linewidths=1)
        dots = axis.scatter(points[:, 0], points[:, 1], c=label, s=8, edgecolors="none", **colours)  # type: ignore[arg-type]
        classes = np.unique(label)
        names = [task.classes[k] if task.classes else str(k) for k in classes]
        handles = [Line2D([], [], marker="o", linestyle="", color=dots.cmap(float(k) / 9)) for k in classes]
        axis.legend(handles, names, loc="upper right")
    else:
        level = {"sign": 0.0, "half": 0.5}.get(task.decision)
        field = outputs[:, 0].reshape(300, 300)
        middle = level if level is not None else float(field.mean())
        reach = max(abs(field - middle).max(), 1e-6)
        colours = {"cmap": "coolwarm", "vmin": middle - reach, "vmax": middle + reach}
        mesh = axis.pcolormesh(x, y, field, alpha=0.6, rasterized=True, **colours)  # type: ignore[arg-type]
        figure.colorbar(mesh, label="output" if outputs.shape[1] == 1 else "first output")
        if level is not None and field.min() < level < field.max():
            axis.contour(x, y, field, levels=[level], colors="black", linewidths=1.2)
        small = len(points) < 50
        axis.scatter(
            points[:, 0],
            points[:, 1],
            c=targets[:, 0],
            s=60 if small else 8,
            edgecolors="black" if small else "none",
            linewidths=0.8,
            **colours,  # type: ignore[arg-type]
        )
    wrong = ""
    if task.kind == "classification":
        errors = int(task.wrong(model.network.predict(split.inputs), targets).sum())
        wrong = f": {errors} of {len(points)} wrong"
    axis.set_title(f"{name} rows{wrong}")
    axis.set_xlabel(preparation.input_names()[0])
    axis.set_ylabel(preparation.input_names()[1])
    return _save(figure, folder.path / "boundary.png")


def _fit(folder: RunFolder, model: Model, dataset: Dataset) -> Path:
    """The prediction of the first target over the only input, with the rows."""
    name = "test" if "test" in dataset.sources else "train"
    split, preparation = dataset.rows(name, 0, POINTS), dataset.preparation
    order = split.inputs[:, 0].argsort()
    inputs, targets = split.inputs[order], split.targets[order]
    x = preparation.raw_inputs(inputs)[:, 0]
    outputs = model.network.predict(inputs)
    figure, (axis,) = _figure(7, 4.5)
    axis.scatter(x, preparation.raw_outputs(targets)[:, 0], s=6, color="tab:gray", alpha=0.5, edgecolors="none")
    _draw_band(axis, x, model, outputs)
    axis.plot(x, _predicted(model, outputs), color="tab:blue", linewidth=1.5, label=_called(model))
    axis.set_title(f"{name} rows")
    axis.set_xlabel(preparation.input_names()[0])
    axis.set_ylabel(preparation.output_names(targets.shape[1])[0])
    axis.grid(alpha=0.3)
    axis.legend(loc="upper right")
    return _save(figure, folder.path / "fit.png")


def _predicted(model: Model, outputs: np.ndarray) -> np.ndarray:
    """The best single guess at the first target, in raw units."""
    return model.preparation.raw_outputs(model.loss.point_prediction(outputs))[:, 0]


def _called(model: Model) -> str:
    """What that is, for a legend."""
    label = model.loss.best_label
    return f"predicted ({label})" if label else "predicted"


def _draw_band(axis: Axes, x: np.ndarray, model: Model, outputs: np.ndarray) -> None:
    """Where the first target is to lie, if the outputs say so."""
    said = {label: values[:, 0] for label, values in model.raw_predictions(outputs).items()}
    if isinstance(model.loss, GroupedLoss) and model.loss.powers:
        (spread, power), *_ = model.loss.powers.items()
        middle, reach = _predicted(model, outputs), 2 * said[spread] ** (1 / power)
        low, high, label = middle - reach, middle + reach, "± 2 standard deviations"
    elif model.loss.gives_interval:
        first, *_, last = said
        low, high, label = said[first], said[last], f"{first} to {last}"
    else:
        return
    axis.fill_between(x, low, high, color="tab:blue", alpha=0.2, linewidth=0, label=label)


def _predictions(folder: RunFolder, model: Model, dataset: Dataset) -> Path:
    """Targets and predictions in raw units: the last rows in their order, and all against each other."""
    name = next(name for name in ("test", "validation", "train") if name in dataset.sources)
    n_rows, preparation = dataset.sources[name].n_rows, dataset.preparation
    split = dataset.rows(name, max(0, n_rows - POINTS))
    inputs, targets = split.inputs, split.targets
    outputs = model.network.predict(inputs)
    predicted = _predicted(model, outputs)
    wanted = preparation.raw_outputs(targets)[:, 0]
    label = preparation.output_names(targets.shape[1])[0]
    figure, (series, cross) = _figure(13, 4.5, columns=2, width_ratios=[2.2, 1])
    last = min(SERIES, len(wanted))
    marker = "o" if last < 3 else ""
    _draw_band(series, np.arange(last), model, outputs[-last:])
    for values, what, colour in ((wanted, "target", "tab:gray"), (predicted, _called(model), "tab:blue")):
        series.plot(np.arange(last), values[-last:], label=what, color=colour, linewidth=1.2, marker=marker)
    series.set_xlabel(f"the {'last ' if last < n_rows else ''}{last} {name} rows")
    series.set_ylabel(label)
    if targets.shape[1] > 1:
        series.set_title(f"the first of {targets.shape[1]} targets")
    series.grid(alpha=0.3)
    series.legend(loc="upper right")
    ends = [min(wanted.min(), predicted.min()), max(wanted.max(), predicted.max())]
    cross.plot(ends, ends, color="black", linewidth=0.8)
    cross.scatter(wanted, predicted, s=6, alpha=0.5, edgecolors="none")
    cross.set_xlabel(f"{label}, target")
    cross.set_ylabel(f"{label}, predicted")
    cross.grid(alpha=0.3)
    return _save(figure, folder.path / "predictions.png")
