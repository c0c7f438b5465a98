"""Update records against the papers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from update_rules import PARAMETERS, RULES, VARIANTS

from gpu_bp import Network, Optimizer, registry
from gpu_bp.backends import Backend
from gpu_bp.spec import Update

RATE, STEPS = 0.05, 25


def rate_at(step: int) -> float:
    return RATE / (1 + step)


def record_of(variant: str) -> Update:
    record = VARIANTS[variant]
    return record.with_parameters(**PARAMETERS[record.name])


def reference(record: Update, w: np.ndarray, gradients: np.ndarray, decayed: bool) -> Iterator[np.ndarray]:
    """The weights after each step, as the papers have it."""
    p = {**record.values, "decay": record.values.get("weight_decay", 0.0) * decayed}
    state = [np.zeros_like(w) for _ in record.state]
    for step, g in enumerate(gradients, start=1):
        w, *state = RULES[record.name](w, g, *state, step, rate_at(step - 1), p)
        yield w


def test_every_record_has_parameters_to_test() -> None:
    assert set(PARAMETERS) == set(registry.UPDATES)
    assert set(RULES) == set(registry.UPDATES)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_update(backend: Backend, variant: str, dtype: str) -> None:
    """Weights and biases of a layer over some steps of a falling rate, the gradient scaled by 1 / 4."""
    rng, record = np.random.default_rng(0), record_of(variant)
    network = Network([3, 2], ["identity"], backend=backend, dtype=dtype)
    start = {key: rng.standard_normal(shape) for key, shape in network.layout.shapes.items()}
    network.load(start)
    optimizer = Optimizer(record, network, rate_at)
    summed = {key: rng.standard_normal((STEPS, *shape)) for key, shape in network.layout.shapes.items()}
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == "float64" else {"rtol": 2e-5, "atol": 5e-6}
    expected = {key: list(reference(record, start[key], summed[key] / 4, key.endswith("weights"))) for key in start}
    for step in range(STEPS):
        flat = np.zeros(network.layout.size, dtype)
        for key, view in network.layout.views(flat).items():
            view[...] = summed[key][step]
        optimizer.step(backend.to_device(flat), 1 / 4)
        for key, tensor in network.tensors().items():
            np.testing.assert_allclose(tensor, expected[key][step], **tolerance)
    flat = backend.to_host(network.parameters).copy()
    for view in network.layout.views(flat).values():
        view[...] = 0
    assert not flat.any(), "the padding must stay zero"


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_buffers_are_updated_in_slices(backend: Backend, variant: str) -> None:
    """Every element of a large buffer gets what a small one gets; the boundary of the decay is exact."""
    record = record_of(variant)
    network = Network([300, 200], ["identity"], backend=backend, dtype="float64")
    network.load({key: np.ones(shape) for key, shape in network.layout.shapes.items()})
    optimizer = Optimizer(record, network, rate_at)
    for _ in range(3):
        optimizer.step(backend.to_device(np.full(network.layout.size, 2.0)), 0.5)
    for key, tensor in network.tensors().items():
        *_, last = reference(record, np.ones(1), np.ones((3, 1)), key.endswith("weights"))
        np.testing.assert_allclose(tensor, last[0], rtol=1e-12)


def test_an_option_that_is_off_keeps_no_array() -> None:
    states = {variant: len(record.state) for variant, record in VARIANTS.items() if record.variant}
    assert states == {
        "rmsprop": 1,
        "rmsprop momentum": 2,
        "rmsprop centered": 2,
        "rmsprop momentum centered": 3,
        "adam": 2,
        "adam amsgrad": 3,
        "adamw": 2,
        "adamw amsgrad": 3,
    }


def test_nadam_scalars_do_not_depend_on_the_steps_before() -> None:
    record = registry.update("nadam", momentum_decay=3.0)
    late = record.scalars(3, 0.1, **record.values)
    record.scalars(200, 0.1, **record.values)
    assert record.scalars(3, 0.1, **record.values) == late
    momenta = [0.9 * (1 - 0.5 * 0.96 ** (3 * k)) for k in range(1, 5)]
    assert late["own"] == pytest.approx(0.1 * (1 - momenta[2]) / (1 - math.prod(momenta[:3])), rel=1e-14)


def test_nadams_products_in_any_order_of_steps() -> None:
    """One training after another, resumed, and two at once: always the product of all momenta so far."""

    def momentum(step: int, decay: float) -> float:
        return 0.9 * (1 - 0.5 * 0.96 ** (decay * step))

    def product(step: int, decay: float = 0.5) -> float:
        record = registry.update("nadam", momentum_decay=decay)
        own = record.scalars(step, 1.0, **record.values)["own"]  # (1 - momentum) / (1 - product)
        return 1 - (1 - momentum(step, decay)) / own

    momenta = [momentum(step, 0.5) for step in range(1, 2001)]
    for step in (1, 2, 3, 40, 41, 7, 8, 2000, 1, 300):
        assert product(step) == pytest.approx(math.prod(momenta[:step]), rel=1e-9, abs=1e-12)
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for decay in np.linspace(0.1, 1, 50):
                for products in pool.map(lambda _, d=decay: [product(k, d) for k in range(1, 60)], range(4)):
                    exact = np.cumprod([momentum(step, decay) for step in range(1, 60)])
                    np.testing.assert_allclose(products, exact, rtol=1e-9, atol=1e-12)
    finally:
        sys.setswitchinterval(switching)


@pytest.mark.parametrize(
    ("penalties", "message"),
    [
        ({"L2": 0.1}, "unknown penalty 'L2'"),
        ({"l1": -0.1}, "l1 must be a number of 0 or more, not -0.1"),
        ({"weight_decay": 0.1}, "adamw has a weight_decay of its own"),
    ],
)
def test_penalties_that_are_refused(penalties: dict[str, float], message: str) -> None:
    network = Network([2, 1], ["identity"])
    with pytest.raises(registry.UserError, match=message):
        Optimizer(registry.update("adamw"), network, rate_at, penalties=penalties)


@pytest.mark.parametrize("etas", [(0.5, 0.9), (1.1, 1.2), (1.0, 1.2), (0.5,), 0.5])
def test_rprop_slows_down_and_speeds_up(etas: object) -> None:
    with pytest.raises(registry.UserError, match=r"etas of rprop must be 2 numbers in \(0, 1\) and \(1, inf\)"):
        registry.update("rprop", etas=etas)


def test_momentum_without_momentum_is_sgd(backend: Backend) -> None:
    weights = []
    for record in (registry.update("sgd"), registry.update("momentum", momentum=0.0)):
        network = Network([4, 3], ["identity"], backend=backend, dtype="float64")
        optimizer = Optimizer(record, network, rate_at)
        for k in range(5):
            optimizer.step(backend.to_device(np.sin(np.arange(network.layout.size) + k)), 1.0)
        weights.append(backend.to_host(network.parameters))
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize(("name", "bad"), [("momentum", {"momentum": 1.0}), ("adam", {"eps": 0.0})])
def test_parameters_out_of_range(name: str, bad: dict[str, float]) -> None:
    with pytest.raises(registry.UserError, match="must be a number in"):
        registry.update(name, **bad)
