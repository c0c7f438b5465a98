"""What the ranks do that have no run folder: they train beside rank 0, and go on from where it goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from gpu_bp.config import Config
from gpu_bp.errors import Diverged, UserError
from gpu_bp.ranks import Ranks
from gpu_bp.resuming import plain
from gpu_bp.tables import differing
from gpu_bp.trainer import Trainer
from gpu_bp.training_state import restore, take

log = logging.getLogger("gpu_bp")


def refuse_unlike(config: Config, environment: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises UserError, on all ranks, where one has another config than rank 0, another backend or another gpu_bp.

    Where it has other libraries or another processor, rank 0 warns of it. To be asked before anything else, since what
    ranks say to each other is another matter on another backend.

    Args:
        environment: as of `gpu_bp.environment`.
    """
    for rank, how in _unlike(plain(config), ranks):
        raise UserError(f"rank {rank} has another config: {how}; give all ranks the same one")
    for rank, how in _unlike({name: environment[name] for name in ("gpu_bp", "backend")}, ranks):
        raise UserError(f"rank {rank} does not train on the same: {how}")
    for rank, how in _unlike({name: fact for name, fact in environment.items() if name != "threads"}, ranks):
        if ranks.rank == 0:
            log.warning(f"the last bits of rank {rank} may be others than those of rank 0: {how}")


def refuse_other_data(data: Mapping[str, Any], ranks: Ranks) -> None:
    """Raises UserError, on all ranks, where one has other data than rank 0, by what `identity` says they are."""
    for rank, how in _unlike(data, ranks):
        raise UserError(f"rank {rank} does not train on the same: {how}")


def _unlike(facts: Mapping[str, Any], ranks: Ranks) -> list[tuple[int, str]]:
    """The ranks of which something is not as it is of rank 0, and what, in words; a fact each."""
    first, *others = ranks.all_gather(facts)
    return [
        (rank, f"{key} is {there} there, and {was} on rank 0")
        for rank, other in enumerate(others, 1)
        for key, (was, there) in differing(first, other).items()
    ]


def told(ranks: Ranks) -> Any:
    """What rank 0 broadcasts."""
    nothing: Any = None
    return ranks.broadcast(nothing)


def tell_state(trainer: Trainer, ranks: Ranks) -> None:
    """Rank 0 tells the others the state that all go on from, its arrays one by one.

    Where they begin too: weights that are read from a file, or computed by another library, need not be the same.
    """
    if ranks.size == 1:
        return
    state, tensors = take(trainer)
    ranks.broadcast((state, list(tensors)))
    for tensor in tensors.values():
        ranks.broadcast(tensor)


def _go_on_as_told(trainer: Trainer, ranks: Ranks) -> None:
    """Takes on what `tell_state` tells."""
    state, names = told(ranks)
    restore(trainer, state, {name: told(ranks) for name in names})


def may_go_back(trainer: Trainer) -> bool:
    """Whether a training that has diverged may go back to its last checkpoint."""
    train = trainer.config.train
    return train.on_divergence == "rewind" and trainer.rewinds < train.max_rewinds


def follow(trainer: Trainer, stop: Callable[[], str], ranks: Ranks) -> None:
    """Trains beside rank 0 to the end, and takes its part in what is evaluated there."""
    _go_on_as_told(trainer, ranks)
    while True:
        try:
            for _ in trainer.run(stop, together=True):
                pass
            break
        except Diverged:
            if not may_go_back(trainer):
                raise
            _go_on_as_told(trainer, ranks)
    if trainer.selection:
        trainer.selection.restore()
    trainer.evaluate()
    if trainer.average:
        trainer.evaluate_average()
