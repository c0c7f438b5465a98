"""What the ranks do that have no run folder: they train beside rank 0, and go on from where it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpu_bp.config import Config
from gpu_bp.errors import Diverged, UserError, short
from gpu_bp.ranks import Ranks
from gpu_bp.resuming import plain
from gpu_bp.tables import differing
from gpu_bp.trainer import Trainer
from gpu_bp.training_state import restore


def refuse_another_config(config: Config, ranks: Ranks) -> None:
    """Raises UserError, on all ranks, where one has another config than rank 0."""
    first, *others = ranks.all_gather(plain(config))
    for rank, other in enumerate(others, 1):
        for key, (was, there) in differing(first, other).items():
            raise UserError(
                f"rank {rank} has another config: {key} is {there} there, and {was} on rank 0; "
                "give all ranks the same one"
            )


def refuse_other_data(trainer: Trainer, data: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises UserError, on all ranks, where one has other data than rank 0, by their `identity`, or another backend."""
    first, *others = ranks.all_gather({"backend": trainer.model.network.backend.name, "data": data})
    for rank, other in enumerate(others, 1):
        for key, (was, there) in differing(first, other).items():
            raise UserError(
                f"rank {rank} does not train on the same: {key} is {short(there)} there, and {short(was)} on rank 0"
            )


def told(ranks: Ranks) -> Any:
    """What rank 0 broadcasts."""
    nothing: Any = None
    return ranks.broadcast(nothing)


def may_go_back(trainer: Trainer) -> bool:
    """Whether a training that has diverged may go back to its last checkpoint."""
    train = trainer.config.train
    return train.on_divergence == "rewind" and trainer.rewinds < train.max_rewinds


def follow(trainer: Trainer, stop: Callable[[], str], ranks: Ranks) -> None:
    """Trains beside rank 0 to the end, and takes its part in what is evaluated there."""
    state = told(ranks)
    if state is not None:
        restore(trainer, *state)
    while True:
        try:
            for _ in trainer.run(stop, together=True):
                pass
            break
        except Diverged:
            if not may_go_back(trainer):
                raise
            restore(trainer, *told(ranks))
    if trainer.selection:
        trainer.selection.restore()
    trainer.evaluate()
    if trainer.average:
        trainer.evaluate_average()
