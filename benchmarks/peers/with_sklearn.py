"""scikit-learn's step: the body of the loop over batches in `fit` of its multi-layer perceptrons.

`partial_fit` of one batch checks its arguments and codes its targets anew each time; `fit` does so once for all its
epochs. So the body of the loop is timed without what comes before, the targets of cross-entropy coded too. No public
call takes a step for less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, SGDOptimizer
from threadpoolctl import threadpool_info

from benchmarks.peers.cells import BETAS, EPSILON, MOMENTUM, Cell, parameters
from benchmarks.peers.sides import Side


class Perceptron(Side):
    """MLPRegressor, or MLPClassifier for cross-entropy, without L2 penalty and Nesterov's momentum."""

    def __init__(self, cell: Cell, device: str) -> None:
        super().__init__(cell, device)
        self.threads = max((pool["num_threads"] for pool in threadpool_info()), default=1)
        row = np.zeros((1, cell.width), np.float32)
        options: Any = {
            "hidden_layer_sizes": [cell.width] * (cell.layers - 1),
            "activation": cell.activation,
            "alpha": 0,
        }
        if cell.loss == "cross_entropy":
            model: Any = MLPClassifier(**options)
            model.partial_fit(row, [0], classes=np.arange(cell.width))  # makes its arrays
            self.scale = 1
            self.batches = self.ready(lambda x, classes: (x, classes[:, None] == np.arange(cell.width)))
        else:
            model = MLPRegressor(**options)
            model.partial_fit(row, row)
            self.scale = cell.width  # its loss is the mean over outputs, its gradient that of their sum
            self.batches = self.ready(lambda x, targets: (x, targets))
        self.model, self.parameters, self.loss = model, model.coefs_ + model.intercepts_, 0.0
        self.signals, self.deltas = [None] * (cell.layers + 1), [None] * cell.layers
        self.gradients = [np.empty_like(x) for x in model.coefs_], [np.empty_like(x) for x in model.intercepts_]

        self.begin()

    def begin(self) -> None:
        cell, model = self.cell, self.model
        for k, (weights, biases) in enumerate(parameters(cell)):
            model.coefs_[k][...] = weights.T
            model.intercepts_[k][...] = biases
        if cell.optimizer == "sgd":
            model._optimizer = SGDOptimizer(self.parameters, cell.rate, momentum=MOMENTUM, nesterov=False)
        else:
            model._optimizer = AdamOptimizer(self.parameters, cell.rate, *BETAS, EPSILON)

    def step(self) -> None:
        model, (inputs, targets) = self.model, next(self.batches)
        self.signals[0] = inputs
        loss, weights, biases = model._backprop(inputs, targets, None, self.signals, self.deltas, *self.gradients)
        self.loss += loss
        model._optimizer.update_params(self.parameters, weights + biases)

    def wait(self) -> None:
        pass  # NumPy has done everything when it returns

    def read_loss(self) -> float:
        """A step's: `losses` reads each."""
        loss, self.loss = self.scale * float(self.loss), 0.0
        return loss

    def products(self) -> Callable[[], None]:
        raise NotImplementedError("NumPy's, as ours")
