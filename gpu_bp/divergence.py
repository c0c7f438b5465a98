"""Why a training diverged: the step that went wrong is run again, and all its arrays are looked at in their order.

batch -> parameters -> forward, layer by layer -> loss -> backward, from the output layer down

The first array that is not finite is the answer. It is there to be found because `Step` changes nothing from that
step on: the parameters are those from which it went wrong, and noise and batches are functions of its number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from gpu_bp.data.source import Batch
from gpu_bp.objective import Objective
from gpu_bp.spec import Array

NAMED_ROWS = 5  # in a message
SMALLER = "try a smaller optimizer.learning_rate, a regularisation.clip_norm, or smaller network.weights"
FINITE = "the data must be finite numbers"
SCALED = "scale the data, or use train.precision = bfloat16 or float32"
AGAIN = "the same numbers should come again: mistrust the device, or a source that changes its rows"


@dataclass(frozen=True)
class Diagnosis:
    """What went wrong at a step; as text, one line for the user.

    Attributes:
        step: its number, the first step being 1.
        what: the first array that is not finite, such as "the net input of layers.1 (hidden, 256 units)"; "" where all
            are finite.
        rows: for which rows it is not, by their numbers in the source; () where the array is none of rows.
        batch: the rows of the step.
        advice: what may help.
        place: of the array, in the order of the step.
    """

    step: int
    what: str
    rows: tuple[int, ...]
    batch: tuple[int, ...]
    advice: str
    place: int = 0

    def __str__(self) -> str:
        again = "the loss or a gradient was not finite, and all is where the step is run again"
        what = f"{self.what} is not finite" if self.what else again
        if self.rows:
            what += f" for {len(self.rows)} of the step's {len(self.batch)} rows ({_named(self.rows)})"
        else:
            what += f", in a step of {_named(self.batch)}"
        return f"the training diverged at step {self.step}: {what}; {self.advice}"


def _named(rows: tuple[int, ...]) -> str:
    named, more = ", ".join(map(str, rows[:NAMED_ROWS])), len(rows) - NAMED_ROWS
    return f"row{'s' * (len(rows) > 1)} {named}{f' and {more} more' if more > 0 else ''}"


def diagnose(objective: Objective, batches: Iterable[Batch], step: int) -> Diagnosis:
    """What was not finite at a step, which is run again with the parameters as they are. Waits for the device.

    Args:
        objective: the training's own. Its gradients, signals and losses become those of the step.
        batches: those of the step, in their order; none is asked for after the step's last.
        step: its number, as `Step.diverged` gives it.
    """
    to_host = objective.network.backend.to_host
    of_step: list[int] = []
    looks: list[_Look] = []
    wrong: dict[int, list[int]] = {}  # rows for which an array is not finite, by its place among the looks
    objective.forget_loss()
    objective.network.backend.fill(objective.gradients, 0)  # to which are added those of rows that are not the first
    with np.errstate(all="ignore"):
        for batch in batches:
            if not batch.n:  # of the step's rows this process has none
                break
            objective.forward(batch, step - 1)
            objective.backward(batch, step - 1)
            numbers = to_host(batch.rows)
            of_step += numbers.tolist()
            looks = list(_looks(objective, batch))
            for place, look in enumerate(looks):
                finite = np.isfinite(to_host(look.array))
                if not finite.all():
                    rows = wrong.setdefault(place, [])
                    if look.of_rows:
                        rows += numbers[~finite.reshape(batch.n, -1).all(axis=1)].tolist()
            if batch.last:
                break
    if not wrong:
        return Diagnosis(step, "", (), tuple(of_step), AGAIN)
    first = min(wrong)
    return Diagnosis(step, looks[first].what, tuple(wrong[first]), tuple(of_step), looks[first].advice, first)


def joined(found: Sequence[Diagnosis]) -> Diagnosis:
    """What went wrong at a step, where each of these is of some of its rows."""
    batch = tuple(chain.from_iterable(each.batch for each in found))
    wrong = [each for each in found if each.what] or [found[0]]
    first = min(wrong, key=lambda each: each.place)
    rows = tuple(chain.from_iterable(each.rows for each in wrong if each.place == first.place))
    return replace(first, rows=rows, batch=batch)


@dataclass(frozen=True)
class _Look:
    """An array to be looked at, and its name. `of_rows`: its rows are those of the batch."""

    what: str
    array: Array
    of_rows: bool = True
    advice: str = SMALLER


def _looks(objective: Objective, batch: Batch) -> Iterator[_Look]:
    """The arrays of a batch that was run, in the order of the step: as many for each batch of it."""
    yield _Look("an input", batch.inputs, advice=FINITE)
    yield _Look("a target", batch.targets, advice=FINITE)
    if batch.weights is not None:
        yield _Look("the weight", batch.weights, advice=FINITE)
    network = objective.network
    for name, array in network.layout.views(network.parameters).items():
        yield _Look(f"an element of {name}", array, of_rows=False)
    gradients = network.layout.views(objective.gradients)
    last = len(network.layers) - 1
    named = [
        f"layers.{k} ({'output' if k == last else 'hidden'}, {n} unit{'s' * (n > 1)})"
        for k, n in enumerate(network.widths[1:])
    ]
    signals = [signal.rows(batch.n) for signal in objective.signals]
    if signals[0].rounded_inputs is not None:
        yield _Look(f"an input in {network.factors}", signals[0].rounded_inputs, advice=SCALED)
    for name, signal in zip(named, signals, strict=True):
        if signal.normalised is not None:
            yield _Look(f"the normalised product of {name}", signal.normalised)
        if signal.net_input is not signal.value:
            yield _Look(f"the net input of {name}", signal.net_input)
        if signal.value is not signal.output:
            yield _Look(f"the activation's value of {name}", signal.value)
        yield _Look(f"the output of {name}", signal.output)
    yield _Look(f"the loss at {named[-1]}", objective.losses[: batch.n])
    yield _Look(f"the sum of the losses at {named[-1]}", objective.total, of_rows=False)
    for k in reversed(range(len(signals))):
        signal = signals[k]
        if signal.error is not None:
            yield _Look(f"the error signal of {named[k]}", signal.error)
        yield _Look(f"the local gradient of {named[k]}", signal.delta)
        if signal.rounded_delta is not None:
            yield _Look(f"the local gradient of {named[k]} in {network.factors}", signal.rounded_delta)
        for kind in ("biases", "gains", "weights"):
            if (name := f"layers.{k}.{kind}") in gradients:
                yield _Look(f"the gradient of {name}", gradients[name], of_rows=False)
