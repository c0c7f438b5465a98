"""When a training's checkpoints are due, and the thread that writes them.

A step does not wait for the disk: the state is copied to the host, and a thread writes the copy. One that falls due
while the one before is being written waits for a later step; but where a training may go back to it, the step waits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from gpu_bp.checkpoint import CheckpointFolder, Facts, MetricsMark
from gpu_bp.divergence import SMALLER
from gpu_bp.errors import Diverged
from gpu_bp.run_folder import RunFolder
from gpu_bp.trainer import Trainer
from gpu_bp.training_state import Tensors, take


class Saving:
    """The checkpoints of one training, as its config asks for them.

    Args:
        folder: of the run. checkpoints: where they go.
        described: `config`, `environment` and `data` of a checkpoint's facts.
    """

    def __init__(
        self, trainer: Trainer, folder: RunFolder, checkpoints: CheckpointFolder, described: Mapping[str, Any]
    ) -> None:
        self._trainer = trainer
        self._folder = folder
        self._checkpoints = checkpoints
        self._described = described
        self._thread = ThreadPoolExecutor(1, "gpu_bp-checkpoint")
        self._writing: Future[None] | None = None
        self._always = trainer.config.train.on_divergence == "rewind"  # where it goes back to is no matter of speed
        self.begin()

    def begin(self) -> None:
        """From the training's step on it is counted when the next one is due."""
        self._last = self._trainer.steps, self._trainer.epoch, time.monotonic()

    def after_step(self) -> None:
        """To be called after every step and the metrics it gave: writes a checkpoint where one is due.

        Raises:
            OSError: the last one could not be written (which file).
        """
        if self._writing is not None and self._writing.done():
            self.wait()
        if self._is_due() and (self._writing is None or self._always):
            self.save()

    def save(self) -> None:
        """Begins to write a checkpoint of the last step. Raises as `after_step`."""
        self.wait()
        if self._trainer.step.diverged() is not None:
            return  # it is about to be told
        state, tensors = take(self._trainer)
        mark = MetricsMark(bytes=self._folder.metrics_bytes, crc32=self._folder.metrics_crc32)
        facts = Facts(training=state, metrics=mark, **self._described)
        self.begin()
        self._writing = self._thread.submit(self._write, facts, tensors)

    def finish(self) -> None:
        """To be called where the training ends or pauses: its last step has a checkpoint, which is on the disk.

        Raises as `after_step`.
        """
        if self._last[0] != self._trainer.steps:
            self.save()
        self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk. Raises as `after_step`."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Waits for the last checkpoint, and for the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _is_due(self) -> bool:
        section, trainer = self._trainer.config.checkpoint, self._trainer
        step, epoch, moment = self._last
        return (
            _has_passed(section.every_steps, step, trainer.steps)
            or _has_passed(section.every_epochs, epoch, trainer.epoch)
            or bool(section.minutes and time.monotonic() - moment >= 60 * section.minutes)
        )

    def _write(self, facts: Facts, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():  # the next step would be the first to show it
                raise Diverged(
                    f"the training diverged at step {facts.training.step}: {name} is not finite after it; {SMALLER}"
                )
        self._folder.flush_metrics()  # what is said to be there is there, after a power cut too
        self._checkpoints.write(facts, tensors)


def _has_passed(every: int | None, before: int, now: int) -> bool:
    """Whether a count has passed a multiple of `every`: the same ones, however often a run is stopped."""
    return every is not None and now // every > before // every
