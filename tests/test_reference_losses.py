"""Every loss with every parameter against PyTorch, value and gradient, in float64.

PyTorch computes the sum over the rows from the net inputs: its own losses where it has them, with reduction "sum" over
all outputs; else the definition, differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import random_targets
from cuda_on_cpu.samples import other_values

from gpu_bp import NumpyBackend, registry
from gpu_bp.spec import FusedLoss, Loss

torch = pytest.importorskip("torch", reason="PyTorch is the reference of these tests")
pytestmark = pytest.mark.reference

ROWS, TARGETS = 50, 4
_softplus = torch.nn.Softplus(threshold=1000)  # beyond the threshold it would be a straight line


def _cross_entropy(v: Any, d: Any, label_smoothing: float) -> Any:
    return torch.nn.CrossEntropyLoss(reduction="sum", label_smoothing=label_smoothing)(v, d)


def _binary_cross_entropy(v: Any, d: Any, label_smoothing: float) -> Any:
    """PyTorch has no label smoothing here: it is that of two classes whose net inputs are 0 and v."""
    if not label_smoothing:
        return torch.nn.BCEWithLogitsLoss(reduction="sum")(v, d)
    two, of_each = (torch.stack(pair, dim=-1).reshape(-1, 2) for pair in ((torch.zeros_like(v), v), (1 - d, d)))
    return _cross_entropy(two, of_each, label_smoothing)


def _quantile(y: Any, d: Any, levels: tuple[float, ...]) -> Any:
    q = torch.tensor(levels, dtype=y.dtype)[:, None]
    r = d[:, None] - y.reshape(len(y), len(levels), -1)
    return torch.maximum(q * r, (q - 1) * r).sum()


def _gaussian(y: Any, d: Any, eps: float) -> Any:
    mean, raw = y.chunk(2, dim=1)
    loss = torch.nn.GaussianNLLLoss(reduction="sum", full=False, eps=eps / 2)  # below which no variance is here
    return loss(mean, d, _softplus(raw) + eps)


# The loss of all rows in (v, d), v being net inputs where the loss fixes its activation, else outputs.
REFERENCES: dict[str, Callable[..., Any]] = {
    "squared_error": lambda y, d: 0.5 * torch.nn.MSELoss(reduction="sum")(y, d),
    "mean_absolute_error": lambda y, d: torch.nn.L1Loss(reduction="sum")(y, d),
    "huber": lambda y, d, threshold: torch.nn.HuberLoss(reduction="sum", delta=threshold)(y, d),
    "log_cosh": lambda y, d: torch.log(torch.cosh(y - d)).sum(),
    "squared_hinge": lambda y, d: (torch.clamp(1 - d * y, min=0) ** 2).sum(),
    "poisson": lambda v, d: torch.nn.PoissonNLLLoss(log_input=True, full=False, reduction="sum")(v, d),
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "quantile": _quantile,
    "gaussian_nll": _gaussian,
}


def test_every_record_has_a_reference() -> None:
    assert set(REFERENCES) == set(registry.LOSSES)


def records() -> list[Any]:
    """Every loss, and for each of its parameters one that has another value."""
    result = [pytest.param(record, id=name) for name, record in registry.LOSSES.items()]
    for name, record in registry.LOSSES.items():
        for parameter, value in other_values(record).items():
            changed = record.with_parameters(**{parameter: value})
            assert changed.values[parameter] != record.values[parameter]
            result.append(pytest.param(changed, id=f"{name} {parameter}"))
    return result


def check(loss: Loss, d: np.ndarray, phi: str, torch_phi: Callable[[Any], Any]) -> None:
    """With targets d; `torch_phi` makes of net inputs what the reference takes."""
    backend, n = NumpyBackend(), loss.n_outputs(TARGETS)
    v = 3 * np.random.default_rng(6).standard_normal((ROWS, n))
    activation, y, delta = registry.activation(phi), np.empty_like(v), np.empty_like(v)
    losses = np.empty((ROWS, loss.losses_width(n)))
    backend.activate(activation, v, None, y)
    backend.output_delta(loss, activation, v, d, y, losses, delta)
    net_input = torch.tensor(v, requires_grad=True)
    wanted = REFERENCES[loss.name](torch_phi(net_input), torch.tensor(d), **loss.values)
    wanted.backward()
    np.testing.assert_allclose(losses.sum(), wanted.item(), rtol=1e-12)
    np.testing.assert_allclose(delta, net_input.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", records())
def test_value_and_gradient(loss: Loss) -> None:
    d = random_targets(loss, ROWS, TARGETS, np.random.default_rng(5))
    if isinstance(loss, FusedLoss):
        check(loss, d, loss.output_activation, lambda v: v)
        return
    for phi, torch_phi in {"identity": lambda v: v, "tanh": torch.tanh, "softplus": _softplus}.items():
        check(loss, d, phi, torch_phi)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.15])
def test_probabilities_as_targets(label_smoothing: float) -> None:
    d = np.random.default_rng(5).dirichlet(np.ones(TARGETS), ROWS)
    check(registry.loss("cross_entropy", label_smoothing=label_smoothing), d, "softmax", lambda v: v)
