"""JAX's step: one compiled function that takes the state over; or several steps in one call, by `lax.scan`."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import cycle
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others need the GPU's memory too

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.cells import BATCHES, BETAS, EPSILON, MOMENTUM, Cell, batches, operands, parameters
from benchmarks.peers.sides import Side

jax.config.update("jax_default_matmul_precision", "highest")  # float32, as in all other libraries here
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "logistic": jax.nn.sigmoid}
MOMENTS = {"sgd": 1, "adam": 2}  # how many an optimizer keeps of each parameter
State = Any


class Jit(Side):
    """A step a call. Weights are kept as (n_in, n_out), which is natural to JAX, and faster."""

    def __init__(self, cell: Cell, device: str) -> None:
        jax.config.update("jax_platforms", device)
        super().__init__(cell, device)
        self.made: Any = ()  # by the products
        self.compiled, self.batches = self.prepare()
        self.begin()

    def begin(self) -> None:
        p = [(jnp.asarray(weights.T.copy()), jnp.asarray(biases)) for weights, biases in parameters(self.cell)]
        moments = [jax.tree.map(jnp.zeros_like, p) for _ in range(MOMENTS[self.cell.optimizer])]
        self.state: State = p, moments, jnp.zeros(()), jnp.zeros(())

    def prepare(self) -> tuple[Callable[..., Any], Any]:
        """The compiled function, and what it is called with, for ever."""
        take = _step_of(self.cell)
        return jax.jit(lambda state, x, t: take(state, (x, t))[0], donate_argnums=0), self.ready(_put)

    def step(self) -> None:
        self.state = self.compiled(self.state, *next(self.batches))

    def wait(self) -> None:
        jax.block_until_ready((self.state, self.made))

    def read_loss(self) -> float:
        """A step's: `losses` reads each."""
        parameters, moments, count, total = self.state
        self.state = parameters, moments, count, jnp.zeros(())
        return float(total)

    def products(self) -> Callable[[], None]:
        inputs, weights, deltas = ([jnp.asarray(x) for x in group] for group in operands(self.cell))
        layers = range(self.cell.layers)

        def all_of_them(last: Any, inputs: Any, weights: Any, deltas: Any) -> Any:
            outputs = [inputs[k] @ weights[k] for k in layers]
            gradients = [inputs[k].T @ deltas[k] for k in layers]
            return outputs, gradients, [deltas[k] @ weights[k].T for k in layers if k]

        compiled = jax.jit(all_of_them, donate_argnums=0, keep_unused=True)  # into the arrays of the last call
        self.made = jax.tree.map(jnp.zeros_like, (inputs, weights, deltas[1:]))

        def make() -> None:
            self.made = compiled(self.made, inputs, weights, deltas)

        return make

    def device_bytes(self) -> int | None:
        if self.device == "cpu":
            return None
        return int(jax.devices()[0].memory_stats()["peak_bytes_in_use"])


class Scan(Jit):
    """Four steps a call, or two, whose batches lie in one array."""

    def prepare(self) -> tuple[Callable[..., Any], Any]:
        take, n = _step_of(self.cell), min(BATCHES, self.cell.n_batches)
        self.steps_a_call = n
        ready = list(batches(self.cell))
        groups = [zip(*ready[k : k + n], strict=True) for k in range(0, len(ready), n)]
        stacked = [tuple(jnp.asarray(_narrow(np.stack(x))) for x in group) for group in groups]
        return jax.jit(lambda state, *rows: jax.lax.scan(take, state, rows), donate_argnums=0), cycle(stacked)

    def step(self) -> None:
        self.state, self.last_losses = self.compiled(self.state, *next(self.batches))

    def losses(self, steps: int) -> list[float]:
        found: list[float] = []
        while len(found) < steps:
            self.step()
            found += map(float, self.last_losses)
        return found


def _put(*batch: np.ndarray) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(_narrow(x)) for x in batch)


def _narrow(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int32) if x.dtype == np.int64 else x  # JAX's integers


def _step_of(cell: Cell) -> Callable[[State, Any], tuple[State, Any]]:
    """A step as `lax.scan` wants it: the next state, and the loss."""
    phi, update = ACTIVATIONS[cell.activation], _sgd if cell.optimizer == "sgd" else _adam

    def loss_of(parameters: Any, x: jax.Array, targets: jax.Array) -> jax.Array:
        for k, (weights, biases) in enumerate(parameters):
            x = x @ weights + biases
            x = phi(x) if k < cell.layers - 1 else x
        if cell.loss == "squared_error":
            return 0.5 / cell.batch * jnp.sum((x - targets) ** 2)
        own = jnp.take_along_axis(x, targets[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(x, axis=1) - own)

    def step(state: State, batch: Any) -> tuple[State, Any]:
        parameters, moments, count, total = state
        loss, gradients = jax.value_and_grad(loss_of)(parameters, *batch)
        parameters, moments = update(cell.rate, parameters, gradients, moments, count + 1)
        return (parameters, moments, count + 1, total + loss), loss

    return step


def _sgd(rate: float, parameters: Any, gradients: Any, moments: Any, count: jax.Array) -> Any:
    changes = jax.tree.map(lambda change, g: MOMENTUM * change + g, moments[0], gradients)
    return jax.tree.map(lambda p, change: p - rate * change, parameters, changes), [changes]


def _adam(rate: float, parameters: Any, gradients: Any, moments: Any, count: jax.Array) -> Any:
    means = jax.tree.map(lambda m, g: BETAS[0] * m + (1 - BETAS[0]) * g, moments[0], gradients)
    squares = jax.tree.map(lambda v, g: BETAS[1] * v + (1 - BETAS[1]) * g * g, moments[1], gradients)
    corrected, root = rate / (1 - BETAS[0] ** count), jnp.sqrt(1 - BETAS[1] ** count)

    def moved(p: Any, mean: Any, square: Any) -> Any:
        return p - corrected * mean / (jnp.sqrt(square) / root + EPSILON)

    return jax.tree.map(moved, parameters, means, squares), [means, squares]
