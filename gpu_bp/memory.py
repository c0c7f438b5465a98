"""What a training will need of the device's memory, worked out before anything is made there.

The parts of the training are made as the trainer makes them, on a backend that has no memory and only counts: what is
counted is then what will be made. One step is taken so, for what is made with it.

A training that does not fit is refused in one line, which says what would. Of several ranks each counts what it makes
itself, and those on one machine share its memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from gpu_bp.average import Average
from gpu_bp.backends import Backend
from gpu_bp.build import build_batches, build_objective, build_sharding, network_of_zeros
from gpu_bp.config import Config
from gpu_bp.counting import Counting, ask, counted, resident
from gpu_bp.data import Dataset
from gpu_bp.data.batches import Batches
from gpu_bp.data.classes import class_names
from gpu_bp.data.source import Batch
from gpu_bp.data.sources import place
from gpu_bp.errors import UserError
from gpu_bp.evaluation import evaluators
from gpu_bp.initial import host_bytes
from gpu_bp.optimizer import Optimizer
from gpu_bp.precision import PRECISIONS
from gpu_bp.ranks import Alone, Ranks
from gpu_bp.schedule import constant
from gpu_bp.selection import Selection
from gpu_bp.sharding import Sharding
from gpu_bp.step import Step

# What is proposed takes so much of the memory at most: how much is free changes, and a device rounds arrays up.
ROOM = 0.95

# what is there only for a while, before the rest, with the first steps, or to be written
INITIAL, SUMMED, SCRATCH, CHECKPOINT = PASSING = ("initial weights", "summed gradients", "scratch", "checkpoint")


@dataclass(frozen=True)
class Need:
    """What a training needs, by its parts, in bytes.

    device: of the device's memory. host: of the host's, where that is another; what files are read into is not in it.
    widths, n_parameters: of the network. steps_per_epoch, steps: of the training. data: a line that says where the
    rows lie.
    """

    device: Mapping[str, int]
    host: Mapping[str, int]
    widths: tuple[int, ...]
    n_parameters: int
    steps_per_epoch: int
    steps: int
    data: str

    @property
    def total(self) -> int:
        """On the device, all together."""
        return sum(self.device.values())


def estimate(config: Config, dataset: Dataset, backend: Backend, ranks: Ranks | None = None) -> Need:
    """What the training of a config on these data will need on a backend; of several ranks, what this one will.

    Raises:
        UserError: the network, the metrics or the classes do not go with the data, or the ranks with the shards.
        MemoryError: more than can be counted.
    """
    counting = Counting(backend)
    on, part, train, loss = cast(Backend, counting), counting.part, config.train, config.loss.record()
    with part("parameters"):
        network = network_of_zeros(config, dataset, on)
    dtype = network.dtype
    kept, where = place(backend, dataset.sources, config.data.residency, dtype)
    with part("rows"):
        sources = {name: counted(source, backend, on) for name, source in dataset.sources.items()}
        if kept:
            sources = {name: resident(source, on, dtype) for name, source in sources.items()}
    sharding = build_sharding(config, network, sources["train"], ranks)
    with part("average"):
        average = Average(network, train.average_decay) if train.average_decay else None
    networks = [network, average.network] if average else [network]
    with part("best parameters"):
        if config.stopping:
            Selection(config.stopping, False, networks)
    with part("evaluation"):
        for each in networks:
            for name, evaluator in evaluators(each, loss, sources, config, ranks).items():
                batch = ask(evaluator.batches, sources[name], on, dtype)
                evaluator.objective.forward(batch.part(0, min(batch.n, evaluator.objective.batch_size)))
    with part("batches"):
        batches = build_batches(config, sources["train"], on, dtype, sharding)
        batch = ask(batches, sources["train"], on, dtype)
    with part("optimizer state"):
        optimizer = Optimizer(config.optimizer.record(), network, constant(config.optimizer.learning_rate))
    with part("signals"):
        weights = np.ones(len(class_names(dataset))) if config.loss.class_weight else None
        objective = build_objective(config, network, batches.part_size, weights)
        asked = config.regularisation
        step = Step(
            objective, optimizer, clip_norm=asked.clip_norm, max_norm=asked.max_norm, average=average, sharding=sharding
        )
    counting.device["signals"] -= objective.gradients.nbytes
    counting.device["gradients"] += objective.gradients.nbytes
    with part(SUMMED):
        for part_of_step in _parts_of_a_step(batches, batch, sharding):
            step(part_of_step)
    device, host = counting.device, counting.host
    device[SCRATCH] = counting.scratch
    here = device if backend.name == "numpy" else host
    written = sum(device[name] for name in ("optimizer state", "average", "best parameters"))
    here[CHECKPOINT] = network.parameters.nbytes + written
    # where drawing the weights takes more than all that is made later: so much more
    first = host_bytes(network) + (device["parameters"] if here is device else 0)
    here[INITIAL] = max(0, first - sum(here.values()))
    return Need(
        {name: n for name, n in device.items() if n},
        {name: n for name, n in host.items() if n},
        tuple(network.widths),
        sum(math.prod(shape) for shape in network.layout.shapes.values()),
        batches.per_epoch,
        train.total_steps(batches.per_epoch),
        where,
    )


def _parts_of_a_step(batches: Batches, batch: Batch, sharding: Sharding | None) -> Iterator[Batch]:
    """What a step asks of a backend, but no more of it than makes arrays; `batch` is its first part."""
    if sharding is not None:
        # all that is here at once, or of parts as many as make two of a shard
        rows = min(batches.size, 2 * sharding.shards * batches.part_size) if batches.in_leaves else batches.size
        here = sharding.rows(rows)
        leaves = [*sharding.leaves(rows)] if batches.in_leaves else []
        for start, end in leaves or [here]:
            yield replace(batch.part(0, end - start), place=start, last=end == here[1], rows_in_step=rows)
    elif batches.part_size == batches.size:
        yield batch
    else:
        yield replace(batch, last=False)
        n = min(batch.n, batches.size - batches.part_size)
        yield replace(batch.part(0, n), place=batches.part_size, rows_in_step=batches.size)  # as if the step ended here


def refuse_too_large(config: Config, dataset: Dataset, backend: Backend, ranks: Ranks | None = None) -> None:
    """Raises UserError where the training of a config does not fit into the memory that is free; it says what would.

    All ranks ask at once, so that none has taken any yet, and go by the machine that has least.
    """
    ranks = ranks or Alone()
    need = estimate(config, dataset, backend, ranks)
    sharing = _sharing(backend, ranks)
    free, sharing = min(ranks.all_gather((backend.free_bytes() // sharing, sharing)))
    if message := too_large(config, dataset, backend, need, free, ranks, sharing):
        raise UserError(message)


def too_large(
    config: Config,
    dataset: Dataset,
    backend: Backend,
    need: Need,
    free: int,
    ranks: Ranks | None = None,
    sharing: int = 1,
) -> str:
    """One line where a training needs more than there is free: how much more, and what would fit. Else "".

    `free` is a rank's part, where so many are `sharing` the memory of a machine.
    """
    if need.total <= free:
        return ""
    who, part = (f"each of the {sharing} ranks on a machine", " for it") if sharing > 1 else ("the training", "")
    return (
        f"{who} needs {size(need.total)} of memory{_on(backend)}, {size(free)} are free{part} and "
        f"{size(need.total - free)} are missing; {_what_fits(config, dataset, backend, free, ranks)}"
    )


def out_of_memory(
    config: Config, dataset: Dataset, backend: Backend, step: int, ranks: Ranks | None = None
) -> UserError:
    """The error where memory ran out at a step although the training should have fitted; it says what would fit.

    To be asked for while the training still holds what it has.
    """
    need = estimate(config, dataset, backend, ranks)
    held = need.total - sum(need.device.get(name, 0) for name in PASSING)
    there = min(need.total, held + backend.free_bytes() // _sharing(backend, ranks or Alone()))
    return UserError(
        f"out of memory at step {step}: the training needs about {size(need.total)}{_on(backend)}, and about "
        f"{size(there)} were there for it; {_what_fits(config, dataset, backend, there, ranks)}"
    )


def _sharing(backend: Backend, ranks: Ranks) -> int:
    """How many ranks take their arrays from the same memory: those of a machine, from the host's."""
    return ranks.local_size if backend.name == "numpy" else 1


def table(need: Need, free: int) -> list[str]:
    """What is needed, in lines to be read: the network, the length, the data, and each part of the memory."""
    rows = [*need.device.items(), ("in all", need.total), ("free", free)]
    rows += [(f"{name} (on the host)", n) for name, n in need.host.items()]
    width = max(len(name) for name, _ in rows)
    return [
        f"network: {' - '.join(map(str, need.widths))}, {need.n_parameters:,} parameters",
        f"steps: {need.steps:,}, {need.steps_per_epoch:,} an epoch",
        need.data,
        *(f"{name:<{width}}  {size(n):>12}" for name, n in rows),
    ]


def size(n_bytes: int) -> str:
    """A number of bytes to be read: 1.50 GiB, 12.0 MiB, 3.2 KiB."""
    for unit, name, digits in ((2**40, "TiB", 2), (2**30, "GiB", 2), (2**20, "MiB", 1)):
        if n_bytes >= unit:
            return f"{n_bytes / unit:,.{digits}f} {name}"
    return f"{n_bytes / 2**10:.1f} KiB"


# what would fit ------------------------------------------------------------------------------------------------------


def _what_fits(config: Config, dataset: Dataset, backend: Backend, free: int, ranks: Ranks | None) -> str:
    """What to change so that a training fits into so much memory, what changes least named first."""

    def fits(residency: str, **changes: int) -> bool:
        return estimate(_changed(config, residency, **changes), dataset, backend, ranks).total <= ROOM * free

    def largest(residency: str, key: str, most: int) -> int:
        return _largest(lambda n: fits(residency, **{key: n}), most)

    train, full_batch = config.train, config.optimizer.record().full_batch
    rows = min(train.batch_size, dataset.sources["train"].n_rows)

    def fewer_rows(residency: str) -> list[str]:
        part = largest(residency, "part_rows", min(rows, train.part_rows or rows))
        batch = 0 if full_batch else largest(residency, "batch_size", rows)
        numbers = {"part_rows": (part, " (the same but for rounding)"), "batch_size": (batch, "")}
        return [f"train.{key} = {n}{remark}" for key, (n, remark) in numbers.items() if n]

    found, host = fewer_rows(config.data.residency), 'data.residency = "host"'
    if place(backend, dataset.sources, config.data.residency, PRECISIONS[train.precision].dtype)[0]:
        if fits("host"):
            found.append(host)
        elif not found:
            found = [f"{host} with {change}" for change in fewer_rows("host")]
    if found:
        return f"{' or '.join(found)} would fit"
    single = {"part_rows": 1} | ({} if full_batch else {"batch_size": 1})
    least = estimate(_changed(config, "host", **single), dataset, backend, ranks)
    own = sum(least.device.get(name, 0) for name in ("parameters", "gradients", SUMMED, "optimizer state"))
    return (
        f"no batch is small enough: a single row needs {size(least.total)}, {size(own)} of it for parameters, "
        "gradients and optimizer state; only a smaller network would fit"
    )


def _changed(config: Config, residency: str, **train: int) -> Config:
    """A config with other keys of [train], and data that lie elsewhere."""
    data = config.data.model_copy(update={"residency": residency})
    return config.model_copy(update={"data": data, "train": config.train.model_copy(update=train)})


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, where all smaller ones do; 0 where none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _on(backend: Backend) -> str:
    return "" if backend.name == "numpy" else " on the device"
