"""What was measured, as a Markdown table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.peers.measure import Result, summary
from benchmarks.peers.sides import COLUMN, COMPILED, EAGER, FUNCTION, GRAPH, JAX, SKLEARN

COLUMNS = (EAGER, COMPILED, FUNCTION, GRAPH, SKLEARN, JAX)
QUIET = 0.1  # cores that other work may keep busy
RIVALS = {
    "the fastest PyTorch": "torch",
    "PyTorch as one function": "one function",
    "scikit-learn": "scikit-learn",
    "the fastest JAX": "jax",
}


def milliseconds(seconds: float | None) -> str:
    """With three digits."""
    return "" if seconds is None or math.isnan(seconds) else f"{float(f'{1e3 * seconds:.3g}'):g}"


def megabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.0f}"


def _column(result: Result, column: str) -> float | None:
    return min((t for name, t in result.peers.items() if COLUMN.get(name) == column), default=None)


def table(results: Sequence[Result]) -> str:
    """A line a cell: milliseconds a step, ratios above 1 where we are faster, and megabytes."""
    columns = [column for column in COLUMNS if any(_column(result, column) for result in results)]
    heads = [
        *("shape", "activation", "optimizer", "loss", "ours, ms", *columns),
        *("best PyTorch / ours", "scikit-learn / ours", "products, ours", "products, PyTorch", "products / step"),
        "MB, ours / PyTorch",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in results:
        cell = r.cell
        ratios = [f"{ratio:.2f}" if (ratio := r.ratio(name)) else "" for name in ("torch", "scikit-learn")]
        theirs = [size for name, size in r.memory_bytes.items() if name.startswith("torch") and size is not None]
        fields = [
            *(cell.shape.replace(" batch", ", batch"), cell.activation, cell.optimizer, cell.loss.replace("_", " ")),
            milliseconds(r.seconds),
            *(milliseconds(_column(r, column)) for column in columns),
            *ratios,
            milliseconds(r.gemm_seconds),
            milliseconds(r.peer_gemm_seconds.get("torch")),
            f"{r.gemm_seconds / r.seconds:.2f}",
            f"{megabytes(r.memory_bytes.get('ours'))} / {megabytes(min(theirs, default=None))}",
        ]
        lines.append("| " + " | ".join(fields) + " |")
    return "\n".join(lines)


def headline(results: Sequence[Result]) -> str:
    """The smallest ratio to each rival, and the geometric mean; never the largest."""
    lines = []
    for rival, prefix in RIVALS.items():
        found = summary(results, prefix)
        if found:
            worst, where, mean = found
            counted = sum(result.ratio(prefix) is not None for result in results)
            lines.append(
                f"time of {rival} over ours: smallest {worst:.2f} ({where.cell}), geometric mean {mean:.2f}, "
                f"of {counted} cells"
            )
    return "\n".join(lines)


def notes(results: Sequence[Result]) -> str:
    """On what it was measured, how long was compiled, and who was left out."""
    first = results[0]
    machine, versions = first.machine, first.machine["versions"]
    lines = [
        f"- {machine['device']}, {machine['date']}: " + ", ".join(f"{name} {x}" for name, x in versions.items()),
        f"- copies {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"multiplies {machine['matrix_flops_per_second'] / 1e9:.0f} GFLOP/s (float32)",
        _busy(results),
        "- threads: " + ", ".join(f"{name} {n}" for name, n in first.threads.items()),
    ]
    for name in first.compile_seconds:
        taken = sorted(result.compile_seconds[name] for result in results if name in result.compile_seconds)
        if taken[-1] >= 0.1:
            lines.append(f"- {name} compiles for {taken[len(taken) // 2]:.1f} s a cell, at most {taken[-1]:.1f} s")
    reasons: dict[str, list[Result]] = {}
    for result in results:
        for name, reason in result.left_out.items():
            reasons.setdefault(f"{name}: {reason}", []).append(result)
    for reason, cells in reasons.items():
        where = "" if len(cells) == len(results) else f" ({'; '.join(str(result.cell) for result in cells)})"
        lines.append(f"- left out, {reason}{where}")
    return "\n".join(lines)


def _busy(results: Sequence[Result]) -> str:
    others = [result.other_cores for result in results if result.other_cores is not None]
    if not others:
        return "- whether the machine had other work is not known"
    usual, cores = median(others), results[0].machine["cores"]
    warning = ": TOO MUCH for these times to be trusted" if usual > QUIET else ""
    return f"- other work kept {usual:.2f} of {cores} cores busy, in some cell {max(others):.2f}{warning}"


def plot(results: Sequence[Result], path: Path) -> None:
    """The time of each peer over ours, by shape; a dot a cell."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(result.cell.shape for result in results))
    figure = Figure(figsize=(8, 1.6 + 0.32 * len(shapes)), layout="constrained")
    axes = figure.subplots()
    columns = [column for column in COLUMNS if any(_column(result, column) for result in results)]
    markers = dict(zip(COLUMNS, "osP^Dv", strict=True))
    for k, column in enumerate(columns):
        offset = 0.5 * (k / max(1, len(columns) - 1) - 0.5)
        points = [
            (taken / result.seconds, shapes.index(result.cell.shape) + offset)
            for result in results
            if (taken := _column(result, column)) is not None
        ]
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=22, marker=markers[column], color=f"C{k}", alpha=0.8, label=column, linewidths=0)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shapes)), shapes)
    axes.set_ylim(len(shapes) - 0.5, -0.5)
    for k in range(1, len(shapes)):
        axes.axhline(k - 0.5, color="0.9", linewidth=0.6, zorder=0)
    axes.grid(axis="x", which="both", color="0.92", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("time a step over ours; right of the line we are faster")
    axes.set_title(f"{results[0].machine['device']}, {results[0].machine['date']}", fontsize=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.legend(loc="outside lower center", ncols=len(columns), frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
