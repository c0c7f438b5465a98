"""Steps that go wrong: they are flagged, nothing changes from there on, and the first array at fault is named. (The
look at a step by itself: test_watch.py.)"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from gpu_bp import Batch, Network, Objective, Optimizer, Step, registry
from gpu_bp.average import Average
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.divergence import Diagnosis, diagnose
from gpu_bp.noise import Noise

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

MAX = float(np.finfo(np.float32).max)
ROOT = MAX**0.5
ROWS = 8
BAD = 4  # the number of the step that goes wrong


@dataclass
class Planned:
    """A step as host arrays, harmless at first: positive weights, small outputs, no weights of rows."""

    loss: str = "mean_absolute_error"
    hidden: str = "identity"
    n_targets: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    noise: Noise | None = None
    rows: int = ROWS

    def __post_init__(self) -> None:
        rng, record = np.random.default_rng(3), registry.loss(self.loss)
        self.widths = [3, 4, 4, record.n_outputs(self.n_targets)]
        self.activations = [self.hidden, self.hidden, "identity"]
        network = Network(self.widths, self.activations, **self.options)
        self.tensors = {name: np.full(shape, 0.1) for name, shape in network.layout.shapes.items()}
        self.x = rng.uniform(0.5, 1, (self.rows, 3))
        self.d = rng.uniform(-1, 0, (self.rows, self.n_targets))
        self.weights = np.ones(self.rows)
        self.numbers = 100 + 3 * np.arange(self.rows)
        self.output = f"layers.2 (output, {self.widths[-1]} unit{'s' * (self.widths[-1] > 1)})"

    def step(self, b: Backend, **options: Any) -> Step:
        """A step of a network with harmless weights."""
        network = Network(self.widths, self.activations, backend=b, **self.options)
        network.load({name: np.full(shape, 0.1) for name, shape in network.layout.shapes.items()})
        objective = Objective(network, registry.loss(self.loss), self.rows, noise=self.noise)
        return Step(objective, Optimizer(registry.update("adam"), network, lambda step: 0.001), **options)

    def plant(self, network: Network) -> None:
        views = network.layout.views(network.parameters)
        for name, tensor in self.tensors.items():
            views[name][...] = network.backend.to_device(tensor.astype(np.float32))

    def batches(self, b: Backend, part: int = 100) -> Iterator[Batch]:
        for start in range(0, self.rows, part):
            end = min(start + part, self.rows)
            x, d, weights = (a[start:end].astype(np.float32) for a in (self.x, self.d, self.weights))
            numbers = b.to_device(self.numbers[start:end])
            arrays = b.to_device(x), b.to_device(d), numbers, b.to_device(weights)
            yield Batch(*arrays, place=start, last=end == self.rows)


# A fault by its name: what is changed in a harmless step, what is then not finite first, and in which places.
Fault = tuple[Planned, str, list[int]]
ALL = list(range(ROWS))


def no_input() -> Fault:
    plan = Planned()
    plan.x[2, 1] = np.nan
    return plan, "an input", [2]


def no_target() -> Fault:
    plan = Planned()
    plan.d[5, 0] = -np.inf
    return plan, "a target", [5]


def no_weight() -> Fault:
    plan = Planned()
    plan.weights[[1, 7]] = np.nan
    return plan, "the weight", [1, 7]


def infinite_parameter() -> Fault:
    plan = Planned(hidden="tanh")
    plan.tensors["layers.1.weights"][0, 0] = np.inf
    return plan, "an element of layers.1.weights", []


def overflow_in_forward(hidden: str = "identity") -> Fault:
    """v of the first layer is 0.03 MAX for two rows, and 400 times that in the next."""
    plan = Planned(hidden=hidden)
    plan.x[[3, 6]] = ROOT
    plan.tensors["layers.0.weights"][...] = 0.01 * ROOT
    plan.tensors["layers.1.weights"][...] = 100
    return plan, f"the {'output' if hidden == 'identity' else 'net input'} of layers.1 (hidden, 4 units)", [3, 6]


def overflow_in_loss() -> Fault:
    """The square of an error of 10 ROOT; its gradient is finite."""
    plan = Planned(loss="squared_error")
    plan.d[4, 0] = -10 * ROOT
    return plan, f"the loss at {plan.output}", [4]


def overflow_in_sum() -> Fault:
    """16 values of 0.4 MAX each."""
    plan = Planned(loss="squared_error")
    plan.d[...] = -((0.8 * MAX) ** 0.5)
    return plan, f"the sum of the losses at {plan.output}", []


def overflow_in_backward(residual: bool = False) -> Fault:
    """Two outputs with an error signal of 1 and weights of 0.9 MAX; in the other rows the two cancel."""
    plan = Planned(options={"residual": residual})
    for name in ("layers.0.weights", "layers.1.weights", "layers.0.biases", "layers.1.biases"):
        plan.tensors[name][...] = 1e-25
    plan.tensors["layers.2.weights"][...] = 0.9 * MAX
    plan.d[...] = [1e16, -1]
    plan.d[[1, 7]] = -1
    name = "error signal" if residual else "local gradient"
    return plan, f"the {name} of layers.1 (hidden, 4 units)", [1, 7]


def overflow_in_gradient() -> Fault:
    """Losses are tiny, their derivatives are 1, times weights whose sum over the rows is too large."""
    plan = Planned()
    for tensor in plan.tensors.values():
        tensor[...] = 0
    plan.d[...] = -1e-30
    plan.weights[...] = 0.3 * MAX
    return plan, "the gradient of layers.2.biases", []


def overflow_of_normalised() -> Fault:
    plan = Planned(hidden="tanh", options={"normalise": True})
    plan.x[[0, 5]] = 0.1 * MAX
    plan.tensors["layers.0.weights"][...] = np.arange(1, 5)[:, None] * 1e3
    return plan, "the normalised product of layers.0 (hidden, 4 units)", [0, 5]


def overflow_of_shortcut() -> Fault:
    """0.6 MAX + 0.6 MAX."""
    plan = Planned(options={"residual": True})
    plan.x[6] = 0.2 * MAX
    plan.tensors["layers.0.weights"][...] = 1
    plan.tensors["layers.1.weights"][...] = 0.25
    return plan, "the output of layers.1 (hidden, 4 units)", [6]


def overflow_before_shortcut() -> Fault:
    plan = overflow_in_forward()[0]
    plan.options["residual"] = True
    return plan, "the activation's value of layers.1 (hidden, 4 units)", [3, 6]


def overflow_in_quantiles() -> Fault:
    """MAX times the level, which is 0.5, times a weight of 3."""
    plan = Planned(loss="quantile")
    plan.d[4] = -MAX
    plan.weights[4] = 3
    return plan, f"the loss at {plan.output}", [4]


def overflow_in_gaussian() -> Fault:
    plan = Planned(loss="gaussian_nll", n_targets=1)
    plan.d[[2, 3]] = 100 * ROOT
    return plan, f"the loss at {plan.output}", [2, 3]


def overflow_of_output() -> Fault:
    plan = Planned(loss="squared_error", n_targets=1)
    plan.tensors["layers.1.biases"][...] = 1
    plan.tensors["layers.2.weights"][...] = MAX
    return plan, "the output of layers.2 (output, 1 unit)", ALL


FAULTS: dict[str, Callable[[], Fault]] = {
    make.__name__: make
    for make in (
        no_input,
        no_target,
        no_weight,
        infinite_parameter,
        overflow_in_forward,
        overflow_in_loss,
        overflow_in_sum,
        overflow_in_backward,
        overflow_in_gradient,
        overflow_of_normalised,
        overflow_of_shortcut,
        overflow_before_shortcut,
        overflow_in_quantiles,
        overflow_in_gaussian,
        overflow_of_output,
    )
}
FAULTS["overflow_of_net_input"] = lambda: overflow_in_forward("silu")
FAULTS["overflow_of_error_signal"] = lambda: overflow_in_backward(residual=True)


def bits(step: Step) -> list[bytes]:
    """All that a step changes."""
    assert step.average is not None
    network = step.objective.network
    arrays = (network.parameters, *step.optimizer.state, step.average.network.parameters)
    return [network.backend.to_host(array).tobytes() for array in arrays]


def go_wrong(b: Backend, plan: Planned, part: int = 100, **options: Any) -> tuple[Step, list[bytes]]:
    """A training whose step BAD is the plan's, and what was before it; three harmless ones before and after."""
    harmless = Planned(plan.loss, plan.hidden, plan.n_targets, plan.options, plan.noise, plan.rows)
    step = plan.step(b, **options)
    step.average = Average(step.objective.network, 0.9)
    for _ in range(BAD - 1):
        for batch in harmless.batches(b, part):
            step(batch)
    assert step.diverged() is None
    plan.plant(step.objective.network)
    before = bits(step)
    for batch in itertools.chain(plan.batches(b, part), *(harmless.batches(b, part) for _ in range(3))):
        step(batch)
    return step, before


@pytest.mark.parametrize("part", [100, 5])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_flagged_frozen_and_named(backend: Backend, name: str, part: int) -> None:
    """At its step, whole or in parts; what was before it stays, bit by bit; and the first array at fault is found."""
    plan, what, places = FAULTS[name]()
    step, before = go_wrong(backend, plan, part, max_norm=0.15)
    assert step.diverged() == BAD
    assert bits(step) == before
    found = diagnose(step.objective, plan.batches(backend, part), BAD)
    assert (found.step, found.what, len(found.batch)) == (BAD, what, ROWS)
    assert list(found.rows) == plan.numbers[places].tolist()
    assert bits(step) == before


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_clipping_does_not_hide_a_fault(backend: Backend, clip_norm: float) -> None:
    plan, *_ = overflow_in_gradient()
    step, before = go_wrong(backend, plan, clip_norm=clip_norm)
    assert step.diverged() == BAD
    assert bits(step) == before


@pytest.mark.parametrize("part", [100, 7])
def test_noise_is_drawn_as_it_was(backend: Backend, part: int) -> None:
    """v of the second layer overflows where dropout has left three outputs or four of the first: 0.4 MAX each."""
    plan = Planned(hidden="silu", noise=Noise(seed=1, dropout=(0.5, 0.0)), rows=40)
    plan.x[...] = 1e10
    plan.tensors["layers.0.weights"][...] = 1
    plan.tensors["layers.1.weights"][...] = 0.4 * MAX / (2 * 3e10)
    plan.tensors["layers.2.weights"][...] = 1e-20
    step, _ = go_wrong(backend, plan, part)
    assert step.diverged() == BAD
    mask = np.ones((plan.rows, 4))
    NumpyBackend().dropout(1, np.array([BAD - 1]), registry.element_of_step(0, 1, 0), 0.5, mask, mask)
    overflows = (mask > 0).sum(axis=1) >= 3
    assert 0 < overflows.sum() < plan.rows
    found = diagnose(step.objective, plan.batches(backend, part), BAD)
    assert found.what == "the net input of layers.1 (hidden, 4 units)"
    assert list(found.rows) == plan.numbers[overflows].tolist()


def test_noise_is_drawn_as_it_was_on_the_way_back(backend: Backend) -> None:
    """An error signal of 0.3 MAX overflows where dropout has scaled it by 5: in rows that keep any output."""
    plan = Planned(noise=Noise(seed=1, dropout=(0.0, 0.8)), rows=40)
    for name in ("layers.0.weights", "layers.1.weights", "layers.0.biases", "layers.1.biases"):
        plan.tensors[name][...] = 1e-25
    plan.tensors["layers.2.weights"][...] = 0.15 * MAX
    plan.d[...] = -1
    step, _ = go_wrong(backend, plan)
    mask = np.ones((plan.rows, 4))
    NumpyBackend().dropout(1, np.array([BAD - 1]), registry.element_of_step(0, 2, 0), 0.8, mask, mask)
    kept = (mask > 0).any(axis=1)
    assert 0 < kept.sum() < plan.rows
    found = diagnose(step.objective, plan.batches(backend), BAD)
    assert found.what == "the local gradient of layers.1 (hidden, 4 units)"
    assert list(found.rows) == plan.numbers[kept].tolist()


def test_only_the_step_is_asked_for(backend: Backend) -> None:
    """An epoch's batches may be given from the step on: the next step's are left. What was before has no part in it."""
    plan, what, _ = overflow_in_backward()
    step, _ = go_wrong(backend, plan)
    batches = itertools.chain(plan.batches(backend), no_input()[0].batches(backend))
    assert diagnose(step.objective, batches, BAD).what == what
    assert diagnose(step.objective, batches, BAD).what == "an input"
    assert diagnose(step.objective, plan.batches(backend), BAD).what == what


def test_a_step_that_is_well_is_said_to_be(backend: Backend) -> None:
    plan = Planned()
    found = diagnose(plan.step(backend).objective, plan.batches(backend), 9)
    assert (found.what, found.rows, len(found.batch)) == ("", (), ROWS)
    assert "at step 9: the loss or a gradient was not finite, and all is where the step is run again" in str(found)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ((), "the loss is not finite, in a step of rows 0, 1, 2, 3, 4 and 1019 more; help"),
        ((17,), "the loss is not finite for 1 of the step's 1024 rows (row 17); help"),
        ((5, 3), "the loss is not finite for 2 of the step's 1024 rows (rows 5, 3); help"),
        (tuple(range(5)), "the loss is not finite for 5 of the step's 1024 rows (rows 0, 1, 2, 3, 4); help"),
        (
            tuple(range(90)),
            "the loss is not finite for 90 of the step's 1024 rows (rows 0, 1, 2, 3, 4 and 85 more); help",
        ),
    ],
)
def test_a_diagnosis_in_words(rows: tuple[int, ...], text: str) -> None:
    assert (
        str(Diagnosis(12, "the loss", rows, tuple(range(1024)), "help")) == f"the training diverged at step 12: {text}"
    )


def test_a_training_can_be_set_back(backend: Backend) -> None:
    """Once what was before is there again and the flag is reset, a step does what it does in another training."""
    plan, *_ = overflow_in_loss()
    step, before = go_wrong(backend, plan)
    harmless = Planned(plan.loss)
    step.reset_flag()
    assert step.diverged() is None
    step.optimizer.steps = BAD - 1
    for batch in harmless.batches(backend):
        step(batch)
    assert step.diverged() is None
    assert bits(step) != before
    assert np.isfinite(step.objective.mean_loss())


def test_without_watch_nothing_is_flagged(backend: Backend) -> None:
    plan, *_ = overflow_in_backward()
    step, before = go_wrong(backend, plan, watch=False)
    assert step.flag is None
    assert step.diverged() is None
    assert bits(step) != before
