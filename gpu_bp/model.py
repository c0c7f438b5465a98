"""A trained network and what belongs to it, in one safetensors file: architecture, preparation, parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpu_bp import registry
from gpu_bp.backends import Backend
from gpu_bp.data.preparation import Preparation
from gpu_bp.data.sources import put
from gpu_bp.errors import UserError
from gpu_bp.initial import read_tensors
from gpu_bp.network import Network
from gpu_bp.spec import Activation, GroupedLoss, Loss, RowActivation

KEY = "gpu_bp"  # of the one entry of the file's metadata: with more, their order and so the bytes would vary
FORMAT = 1
PLAIN = registry.loss("squared_error")  # whose outputs are the predictions; older files do not say their loss


@dataclass(frozen=True)
class Model:
    """A network, the preparation of its inputs and targets, and the loss, which says what its outputs are."""

    network: Network
    preparation: Preparation
    loss: Loss = PLAIN

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        network = self.network
        description = {
            "format": FORMAT,
            "widths": network.widths,
            "activations": [{"kind": layer.activation.name, **layer.activation.values} for layer in network.layers],
            "biases": network.biases,
            "normalise": network.normalise,
            "residual": network.residual,
            "dtype": network.dtype.name,
            "loss": {"kind": self.loss.name, **self.loss.values},
            "preparation": self.preparation.to_json(),
        }
        part = path.with_name(path.name + ".part")
        save_file(network.tensors(), part, metadata={KEY: json.dumps(description)})
        part.replace(path)

    @classmethod
    def load(cls, path: Path, backend: Backend) -> Model:
        """Reads the file.

        Raises:
            UserError: it is missing, or not a model that `save` wrote.
        """
        tensors = read_tensors(path)
        try:
            with safe_open(path, framework="numpy") as file:
                metadata: dict[str, str] = file.metadata() or {}
            description: dict[str, Any] = json.loads(metadata[KEY])
            if description["format"] != FORMAT:
                raise UserError(f"{path} has model format {description['format']}, this version reads {FORMAT}")
            network = Network(
                description["widths"],
                [_activation(**choice) for choice in description["activations"]],
                biases=description["biases"],
                normalise=description.get("normalise", False),  # older files have neither
                residual=description.get("residual", False),
                backend=backend,
                dtype=description["dtype"],
            )
            preparation = Preparation.from_json(description["preparation"])
            loss = _loss(**description["loss"]) if "loss" in description else PLAIN
        except UserError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is not a model of gpu_bp: {error or type(error).__name__}") from None
        network.load(tensors)
        return cls(network, preparation, loss)

    def predict(self, path: Path) -> tuple[list[str], list[np.ndarray]]:
        """Predictions for the raw rows of a .csv, .parquet or .npy file: names and columns.

        Regression: the outputs in raw units; of a loss of several outputs a target, with a label behind the target's
        name. Classification: `class`, then an output or probability a class.
        """
        raw = self.preparation.read(path)
        inputs = np.empty(raw.shape, self.network.dtype)
        put(raw, inputs, str(path))
        outputs = self.network.predict(inputs)
        task = self.preparation.task
        names = self.preparation.output_names(outputs.shape[1] // self.loss.groups)
        if isinstance(self.loss, GroupedLoss):
            return self._labelled(self.loss, names, outputs)
        if task.kind == "regression":
            return names, list(self.preparation.raw_outputs(outputs).T)
        values = list(outputs.astype(np.float64).T)
        decided = task.decide(outputs)
        if decided.ndim == 1:
            softmax = isinstance(self.network.layers[-1].activation, RowActivation)
            return ["class", *(f"{'p' if softmax else 'y'}_{name}" for name in names)], [decided, *values]
        if len(names) == 1:
            return ["class", *names], [_named(decided[:, 0], task.classes), *values]
        return [*(f"class_{name}" for name in names), *names], [*decided.T, *values]

    def _labelled(
        self, loss: GroupedLoss, targets: list[str], outputs: np.ndarray
    ) -> tuple[list[str], list[np.ndarray]]:
        predicted = loss.predictions(loss.grouped(outputs), **loss.values)
        names: list[str] = []
        columns: list[np.ndarray] = []
        for k, label in enumerate(loss.labels):
            variances = label == "variance"
            raw = self.preparation.raw_variances if variances else self.preparation.raw_outputs
            names += [f"{target}_{label}" if label else target for target in targets]
            columns += list(raw(predicted[:, k]).T)
        return names, columns


def _activation(kind: str, **parameters: float) -> Activation | RowActivation:
    return registry.activation(kind, **parameters)


def _loss(kind: str, **parameters: Any) -> Loss:
    return registry.loss(kind, **parameters)


def _named(decided: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """Decisions of one output, -1/1 or 0/1, by the name of the class where it has one."""
    return np.array(classes)[(decided > 0).astype(int)] if classes else decided
