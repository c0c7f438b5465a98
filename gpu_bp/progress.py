"""What a training shows while it runs: a progress bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpu_bp.metrics import DEFAULTS
from gpu_bp.runs import Lines
from gpu_bp.trainer import Trainer

INTERVAL = 0.5  # seconds between two plain lines, and between two looks of the bar at the training


def watch(console: Console) -> Any:
    """A function for `train(watch=...)` that shows the steps on this console."""
    return _bar(console) if console.is_terminal else _plain(console)


def describe(line: dict[str, Any], selected: str = "") -> str:
    """A line of metrics in words: of all its metrics those that every training has, and the one `selected`."""
    usual = ("loss", *itertools.chain(*DEFAULTS.values()))
    keys = {"train_errors": None, **{f"validation_{name}": None for name in usual}, selected: None}
    words = [f"epoch {line['epoch']}", f"step {line['step']}", f"loss {line['train_loss']:.6g}"]
    words += [f"{key.replace('_', ' ')} {line[key]:.6g}" for key in keys if key in line and key != "train_loss"]
    return "  ".join(words)


def _plain(console: Console) -> Any:
    def lines(trainer: Trainer, steps: Lines) -> Iterator[dict[str, Any] | None]:
        begin = time.monotonic()
        shown, last = -INTERVAL, None
        for line in steps:
            if line is not None:
                last, now = line, time.monotonic() - begin
                if now - shown >= INTERVAL:
                    _print(console, trainer, line)
                    shown, last = now, None
            yield line
        if last is not None:
            _print(console, trainer, last)

    return lines


def _print(console: Console, trainer: Trainer, line: dict[str, Any]) -> None:
    speed = line["rows"] / line["seconds"] if line["seconds"] else 0.0
    stopping = trainer.config.stopping
    text = f"{describe(line, stopping.metric if stopping else '')}  {speed:,.0f} rows/s"
    console.print(f"[{line['step'] / trainer.total_steps:4.0%}] {text}", highlight=False, markup=False, soft_wrap=True)


def _bar(console: Console) -> Any:
    def lines(trainer: Trainer, steps: Lines) -> Iterator[dict[str, Any] | None]:
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("steps  loss {task.fields[loss]}  {task.fields[speed]} rows/s "),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=False) as progress:
            bar = progress.add_task("", total=trainer.total_steps, completed=trainer.steps, loss="-", speed="-")
            looked = time.monotonic()
            for line in steps:
                now = time.monotonic()
                if now - looked > INTERVAL or trainer.steps == trainer.total_steps:
                    looked = now
                    loss = line["train_loss"] if line else trainer.running_loss()
                    speed = trainer.rows / trainer.seconds  # both go on where a run is resumed, or goes back
                    progress.update(bar, completed=trainer.steps, loss=f"{loss:.4g}", speed=f"{speed:,.0f}")
                yield line
            progress.update(bar, completed=trainer.steps)

    return lines
