"""Every optimizer with every option against PyTorch: fifty steps on a network with a real loss, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from update_rules import PARAMETERS, VARIANTS

from gpu_bp import Network, Optimizer, registry
from gpu_bp.backends import NumpyBackend
from gpu_bp.data.source import Batch
from gpu_bp.objective import Objective
from gpu_bp.schedule import constant
from gpu_bp.step import Step

torch = pytest.importorskip("torch", reason="PyTorch is the reference of these tests")
pytestmark = pytest.mark.reference

STEPS, RATE, WIDTHS = 50, 0.01, [4, 6, 5, 2]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """PyTorch keeps NAdam's product of momenta in its default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


class Lion(torch.optim.Optimizer):  # type: ignore[misc, name-defined]
    """Algorithm 2 of Chen et al. (2023), which PyTorch has not."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for theta in group["params"]:
                m = self.state[theta].setdefault("m", torch.zeros_like(theta))
                c = beta1 * m + (1 - beta1) * theta.grad
                self.state[theta]["m"] = beta2 * m + (1 - beta2) * theta.grad
                theta -= group["lr"] * (torch.sign(c) + group["weight_decay"] * theta)


CLASSES: dict[str, Callable[..., Any]] = {
    "sgd": torch.optim.SGD,
    "momentum": torch.optim.SGD,
    "nesterov": lambda params, **keywords: torch.optim.SGD(params, nesterov=True, **keywords),
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "lion": Lion,
    "rprop": torch.optim.Rprop,
}


def test_every_record_has_a_reference() -> None:
    assert set(CLASSES) == set(registry.UPDATES)


@pytest.mark.parametrize("l2", [0.0, 0.03])
@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "changed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fifty_steps(variant: str, changed: bool, l2: float) -> None:
    record = VARIANTS[variant]
    if changed:
        record = record.with_parameters(**PARAMETERS.get(record.name, {}))
    if l2 and ("weight_decay" in record.values or record.name == "rprop"):
        pytest.skip("PyTorch has no l2 penalty beside it")
    rng, backend = np.random.default_rng(3), NumpyBackend()
    network = Network(WIDTHS, ["tanh", "tanh", "identity"], backend=backend, dtype="float64")
    network.load({key: rng.standard_normal(shape) for key, shape in network.layout.shapes.items()})
    inputs, targets = rng.standard_normal((STEPS, 8, 4)), rng.standard_normal((STEPS, 8, 2))
    tensors = {key: torch.tensor(np.array(value), requires_grad=True) for key, value in network.tensors().items()}
    decay = {"weight_decay": l2} if l2 else {}
    keywords = dict(record.values)
    theirs = CLASSES[record.name]
    weights, biases = (
        [value for key, value in tensors.items() if key.endswith("weights") == wanted] for wanted in (True, False)
    )
    free = {"weight_decay": 0.0} if "weight_decay" in record.values or decay else {}
    reference = theirs([{"params": weights, **decay}, {"params": biases, **free}], lr=RATE, **keywords)
    optimizer = Optimizer(record, network, constant(RATE), penalties={"l2": l2})
    step = Step(Objective(network, registry.loss("squared_error"), 8), optimizer)
    for x, d in zip(inputs, targets, strict=True):
        step(Batch(x, d, np.arange(len(x))))
        reference.zero_grad()
        y = torch.tensor(x)
        for layer in range(3):
            w, b = tensors[f"layers.{layer}.weights"], tensors[f"layers.{layer}.biases"]
            y = y @ w.T + b
            y = torch.tanh(y) if layer < 2 else y
        (0.5 * ((y - torch.tensor(d)) ** 2).sum() / len(x)).backward()
        reference.step()
    for key, value in network.tensors().items():
        np.testing.assert_allclose(value, tensors[key].detach().numpy(), rtol=1e-10, atol=1e-10)
