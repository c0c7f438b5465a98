"""What a step may do beside the update against PyTorch, in float64, ten steps each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_bp import Batch, Network, Objective, Optimizer, Step, registry
from gpu_bp.average import Average
from gpu_bp.backends import Backend

torch = pytest.importorskip("torch", reason="PyTorch is the reference of these tests")
pytestmark = pytest.mark.reference

WIDTHS, ROWS, STEPS, RATE = [5, 6, 6, 3], 9, 10, 0.1
LAYERS = len(WIDTHS) - 1
CLASS_WEIGHTS = np.array([0.5, 2.0, 1.25])
rng = np.random.default_rng(5)
INPUTS = rng.standard_normal((STEPS, ROWS, WIDTHS[0]))
TARGETS = rng.standard_normal((STEPS, ROWS, WIDTHS[-1]))
LABELS = rng.integers(0, WIDTHS[-1], (STEPS, ROWS))
WEIGHTS = rng.uniform(0, 3, (STEPS, ROWS))
WEIGHTS[:, 2] = 0


class Reference(torch.nn.Module):  # type: ignore[misc, name-defined]
    """The same network of PyTorch's modules: LayerNorm stands between a hidden layer's product and its tanh."""

    def __init__(self, tensors: dict[str, np.ndarray], normalise: bool, residual: bool) -> None:
        super().__init__()
        self.normalise, self.residual = normalise, residual
        self.weights = torch.nn.ParameterList(
            torch.tensor(tensors[f"layers.{k}.weights"].copy()) for k in range(LAYERS)
        )
        self.biases = torch.nn.ParameterList(torch.tensor(tensors[f"layers.{k}.biases"].copy()) for k in range(LAYERS))
        self.gains = torch.nn.ParameterList(
            torch.tensor(tensors[f"layers.{k}.gains"].copy()) for k in range(LAYERS - 1) if normalise
        )

    def forward(self, y: Any) -> Any:
        functional = torch.nn.functional
        for k, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            if k == LAYERS - 1:
                return functional.linear(y, w, b)
            if self.normalise:
                v = functional.layer_norm(functional.linear(y, w), (len(b),), self.gains[k], b)
            else:
                v = functional.linear(y, w, b)
            shortcut = y if self.residual and y.shape == v.shape else 0.0
            y = torch.tanh(v) + shortcut
        raise AssertionError


def squared(outputs: Any, step: int, weighted: bool) -> Any:
    losses = 0.5 * ((outputs - torch.tensor(TARGETS[step])) ** 2).sum(axis=1)
    if not weighted:
        return losses.mean()
    weights = torch.tensor(WEIGHTS[step])
    return (weights * losses).sum() / weights.sum()


def cross_entropy(outputs: Any, step: int, weighted: bool) -> Any:
    return torch.nn.functional.cross_entropy(outputs, torch.tensor(LABELS[step]), torch.tensor(CLASS_WEIGHTS))


def nothing(model: Reference) -> None:
    """What is done to the gradients before PyTorch's optimizer takes them."""


def clip_norm(model: Reference) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.4)


def clip_value(model: Reference) -> None:
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)


def clip_both(model: Reference) -> None:
    clip_norm(model)
    clip_value(model)


def penalty(l1: float = 0.0, l2: float = 0.0, everything: bool = False) -> Callable[[Reference], None]:
    """The gradients of l1 |w| + l2/2 w^2, by PyTorch."""

    def add(model: Reference) -> None:
        parameters = [*model.weights, *(model.biases if everything else []), *(model.gains if everything else [])]
        sum(l1 * w.abs().sum() + 0.5 * l2 * (w**2).sum() for w in parameters).backward()

    return add


Case = tuple[dict[str, Any], dict[str, Any], Callable[[Any], None], bool]
CASES: dict[
    str, Case
] = {  # options of the network, of the optimizer and the step, PyTorch's counterpart, weighted rows
    "plain": ({}, {}, nothing, False),
    "normalise": ({"normalise": True}, {}, nothing, False),
    "residual": ({"residual": True}, {}, nothing, False),
    "both": ({"normalise": True, "residual": True}, {}, nothing, True),
    "weights": ({}, {}, nothing, True),
    "clip_norm": ({}, {"clip_norm": 0.4}, clip_norm, False),
    "clip_norm, weights": ({}, {"clip_norm": 0.4}, clip_norm, True),
    "clip_value": ({}, {"clip_value": 0.05}, clip_value, False),
    "clip_both": ({"normalise": True}, {"clip_norm": 0.4, "clip_value": 0.05}, clip_both, False),
    "l1": ({}, {"l1": 0.01}, penalty(l1=0.01), False),
    "l2": ({}, {"l2": 0.1}, penalty(l2=0.1), True),
    "all parameters": ({"normalise": True}, {"l1": 0.01, "l2": 0.1, "biases": True}, penalty(0.01, 0.1, True), False),
}


@pytest.mark.parametrize("loss_name", ["squared_error", "cross_entropy"])
@pytest.mark.parametrize("case", CASES)
def test_ten_steps(backend: Backend, case: str, loss_name: str) -> None:
    """Momentum, so that every step's gradient counts; cross entropy with the weights of classes."""
    of_network, options, change, weighted = CASES[case]
    indexed = loss_name == "cross_entropy"
    output = "softmax" if indexed else "identity"
    network = Network(WIDTHS, ["tanh", "tanh", output], backend=backend, dtype="float64", **of_network)
    values = np.random.default_rng(1)
    network.load({name: 0.7 * values.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    model = Reference(network.tensors(), network.normalise, network.residual)
    theirs = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))

    penalties = {key: value for key, value in options.items() if key in registry.PENALTIES}
    optimizer = Optimizer(
        registry.update("momentum"),
        network,
        lambda step: RATE,
        penalties=penalties,
        biases=options.get("biases", False),
    )
    objective = Objective(network, registry.loss(loss_name), ROWS, class_weights=CLASS_WEIGHTS if indexed else None)
    average = Average(network, 0.8)
    step = Step(objective, optimizer, clip_norm=options.get("clip_norm", 0.0), average=average)
    for k in range(STEPS):
        weights = backend.to_device(WEIGHTS[k]) if weighted and not indexed else None
        targets = backend.to_device(LABELS[k] if indexed else TARGETS[k])
        step(Batch(backend.to_device(INPUTS[k]), targets, backend.to_device(np.arange(ROWS)), weights))
        theirs.zero_grad()
        loss = (cross_entropy if indexed else squared)(model(torch.tensor(INPUTS[k])), k, weighted)
        loss.backward()
        change(model)
        theirs.step()
        mean.update_parameters(model)
        assert objective.mean_loss() == pytest.approx(loss.item(), rel=1e-12)
    for ours, reference in ((network, model), (average.network, mean.module)):
        tensors = ours.tensors()
        for key in ("weights", "biases", "gains"):
            for k, wanted in enumerate(getattr(reference, key)):
                np.testing.assert_allclose(
                    tensors[f"layers.{k}.{key}"], wanted.detach().numpy(), rtol=1e-12, atol=1e-12
                )
