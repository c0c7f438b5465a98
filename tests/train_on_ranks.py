"""What test_distributed.py starts on several ranks: `python tests/train_on_ranks.py FOLDER NAME[:STEPS]...`

Trains those of trainings.py, in shards, whose data are in that folder, each into a folder of its name; with STEPS until
so many are taken, and where it was begun, it goes on. With WATCHED=STEPS in the environment who watches rank 0 wants
no more than so many; with UNLIKE=WHAT the other ranks are unlike it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from trainings import LARGE, REWINDS, after, tables, train

import gpu_bp.build
from gpu_bp import NumpyBackend
from gpu_bp.backends.base import Action
from gpu_bp.data.sources import ResidentSource
from gpu_bp.errors import Diverged
from gpu_bp.exchange import Exchange
from gpu_bp.ranks import Ranks, join

SHARDS = 8
OTHERS = {
    "rewinds": REWINDS,
    "large": LARGE,
}


def config_of(name: str, folder: Path) -> dict[str, Any]:
    """The config of a training, or of the one that takes longer, in shards."""
    if name == "long":
        return tables("noise", folder, train={"shards": SHARDS, "epochs": 30, "log_every": 50})
    if name in OTHERS:
        return {**OTHERS[name], "train": {**OTHERS[name]["train"], "shards": SHARDS}}
    return tables(name, folder, train={"shards": SHARDS})


def watch_workers() -> list[int]:
    """How many worked at once, whenever any did."""
    workers: list[int] = [0]
    together = NumpyBackend.together

    def look(self: NumpyBackend, actions: Sequence[Action], *, alike: bool = False) -> None:
        workers.append(len(actions))
        together(self, actions, alike=alike)

    NumpyBackend.together = look  # type: ignore[method-assign]
    return workers


class Another(NumpyBackend):
    """A backend by another name, whose ranks say more to each other."""

    name = "another"

    def exchange(self, ranks: Ranks) -> Exchange:
        ranks.all_gather(("a device", ""))
        return super().exchange(ranks)


def full(*_: Any) -> NoReturn:
    raise MemoryError


def unlike(what: str) -> str | NumpyBackend:
    """Makes this rank unlike the others; its backend."""
    if what == "memory":
        NumpyBackend.resident_bytes = 0
    elif what == "full":
        ResidentSource.__init__ = full  # type: ignore[method-assign]
    elif what == "weights":
        initialised = gpu_bp.build.initialise
        gpu_bp.build.initialise = lambda network, *rest: (initialised(network, *rest), network.parameters.fill(0.1))
    return Another() if what == "backend" else "numpy"


def main() -> None:
    workers = watch_workers()
    warnings.simplefilter("error")
    (folder, *names), watched = sys.argv[1:], os.environ.get("WATCHED", "")
    with join() as ranks:
        backend = unlike(os.environ.get("UNLIKE", "")) if ranks.rank else "numpy"
        for each in names:
            name, _, steps = each.partition(":")
            interrupted = after(int(steps or -1))
            run = Path(folder) / name
            watch = (lambda _, steps: islice(steps, int(watched))) if watched else None
            try:
                train(
                    config_of(name, Path(folder)),
                    backend=backend,
                    run=run,
                    resume=True,
                    interrupted=interrupted,
                    watch=watch,
                    ranks=ranks,
                )
            except Diverged as error:
                (run / f"diverged on {ranks.rank}").write_text(str(error))
        (Path(folder) / f"workers of {ranks.rank}").write_text(str(max(workers)))


if __name__ == "__main__":
    main()
