"""What is measured: a step of a network of so many layers of one width, and the numbers that all sides begin with.

A step is forward, loss, backward and update, each time of another of several batches that lie ready in memory. Every
side makes the same batches and initial weights for itself, from the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

MOMENTUM, BETAS, EPSILON = 0.9, (0.9, 0.999), 1e-8  # of sgd, and of Adam
# How many batches lie ready; fewer where they took more than so much, more where they had fewer rows than so many in
# all: a network that knows its few rows by heart has units that are dead and numbers that are denormal.
BATCHES, FEW_BATCHES, BATCH_BYTES, LEAST_ROWS = 4, 2, 2**28, 256
ACTIVATIONS, OPTIMIZERS, LOSSES = ("relu", "tanh", "logistic"), ("sgd", "adam"), ("squared_error", "cross_entropy")


@dataclass(frozen=True)
class Cell:
    """A network of `layers` weight layers, inputs and outputs as wide as the rest, and how it is trained.

    `activation` is that of the hidden layers; the outputs are the identity for squared_error, and softmax for
    cross_entropy, whose targets are class indices. sgd has momentum 0.9.
    """

    layers: int
    width: int
    batch: int
    activation: str
    optimizer: str
    loss: str

    @property
    def shape(self) -> str:
        return f"{self.layers}x{self.width} batch {self.batch}"

    def __str__(self) -> str:
        return f"{self.shape} {self.activation} {self.optimizer} {self.loss}"

    @property
    def products(self) -> int:
        """Matrix products a step: Y W.T and Delta.T Y of each layer, and Delta W of each but the first."""
        return 3 * self.layers - 1

    @property
    def flops(self) -> float:
        """Of the matrix products of a step."""
        return 2.0 * self.products * self.batch * self.width**2

    @property
    def rate(self) -> float:
        """The learning rate: as large as is stable, so that 20 steps show whether a side learns as ours does."""
        return 0.1 if (self.optimizer, self.loss) == ("sgd", "cross_entropy") else 1e-3

    @property
    def n_batches(self) -> int:
        if BATCHES * 8 * self.batch * self.width > BATCH_BYTES:
            return FEW_BATCHES
        return max(BATCHES, LEAST_ROWS // self.batch)

    @property
    def bytes(self) -> int:
        """About as much memory as a side takes: batches, signals, operands of the products; parameters and state."""
        return 4 * (
            self.batch * self.width * (2 * self.n_batches + 8 * self.layers + 6) + 6 * self.layers * self.width**2
        )


def parameters(cell: Cell) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The initial weights (n_out, n_in) and biases (n_out,) of each layer."""
    rng, n = np.random.default_rng(0), cell.width
    gain = np.float32(n**-0.5)
    for _ in range(cell.layers):
        yield gain * rng.standard_normal((n, n), np.float32), gain * rng.standard_normal(n, np.float32)


def batches(cell: Cell) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs (batch, width) and targets: (batch, width), or (batch,) int64 for classes."""
    rng, shape = np.random.default_rng(1), (cell.batch, cell.width)
    for _ in range(cell.n_batches):
        inputs = rng.standard_normal(shape, np.float32)
        classes = cell.loss == "cross_entropy"
        yield inputs, rng.integers(0, cell.width, cell.batch) if classes else rng.standard_normal(shape, np.float32)


def operands(cell: Cell) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """What the matrix products of a step are made of: of each layer the inputs Y, the weights W, and the Delta."""
    rng, shape = np.random.default_rng(2), (cell.batch, cell.width)
    signals = [[rng.standard_normal(shape, np.float32) for _ in range(cell.layers)] for _ in range(2)]
    return signals[0], [weights for weights, _ in parameters(cell)], signals[1]


QUICK = (
    Cell(3, 16, 1, "tanh", "sgd", "squared_error"),
    Cell(3, 16, 64, "relu", "adam", "cross_entropy"),
    Cell(3, 64, 64, "logistic", "adam", "squared_error"),
    Cell(5, 64, 1, "relu", "adam", "squared_error"),
    Cell(5, 64, 1024, "tanh", "sgd", "cross_entropy"),
    Cell(3, 128, 64, "relu", "adam", "squared_error"),
    Cell(3, 128, 1024, "tanh", "sgd", "cross_entropy"),
    Cell(5, 256, 64, "logistic", "sgd", "squared_error"),
    Cell(3, 256, 1024, "relu", "adam", "cross_entropy"),
    Cell(3, 256, 16384, "tanh", "adam", "squared_error"),
    Cell(3, 1024, 1024, "relu", "sgd", "squared_error"),
    Cell(3, 1024, 1024, "tanh", "adam", "cross_entropy"),
)
QUICK_ON_A_GPU = (
    Cell(3, 64, 2**20, "relu", "adam", "squared_error"),
    Cell(3, 4096, 1024, "relu", "adam", "squared_error"),
    Cell(3, 4096, 16384, "tanh", "sgd", "cross_entropy"),
)

# Of steps that are almost all matrix products, by their number of operations, two kinds tell as much as all.
MOSTLY_PRODUCTS = {"cpu": 1e11, "cuda": 1e13}
FEW = (("relu", "sgd", "squared_error"), ("tanh", "adam", "cross_entropy"))


def grid(name: str, device: str) -> list[Cell]:
    """The cells of a grid, "quick" or "full"; the smallest steps first."""
    gpu = device == "cuda"
    if name == "quick":
        return [*QUICK, *(QUICK_ON_A_GPU if gpu else ())]
    widths, rows = (16, 64, 128, 256, 1024, *((4096,) if gpu else ())), (1, 64, 1024, 16384, *((2**20,) if gpu else ()))
    kinds = list(product(ACTIVATIONS, OPTIMIZERS, LOSSES))
    cells = [Cell(*shape, *kind) for shape in product((3, 5), widths, rows) for kind in kinds]
    few = [c for c in cells if c.flops <= MOSTLY_PRODUCTS[device] or (c.activation, c.optimizer, c.loss) in FEW]
    return sorted(few, key=lambda cell: cell.flops)


def chosen(cells: list[Cell], words: str) -> list[Cell]:
    """Those whose names have all these words: "3x64 adam"."""
    return [cell for cell in cells if set(words.split()) <= set(str(cell).split())]
