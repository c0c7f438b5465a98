"""A trained network and what belongs to it, in one safetensors file: architecture, preparation, parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from gpu_bp import registry
from gpu_bp.backends import Backend
from gpu_bp.data.preparation import Preparation
from gpu_bp.data.sources import put
from gpu_bp.errors import UserError
from gpu_bp.model_description import FORMAT, Description, NamedRecord
from gpu_bp.network import Network, layout_of
from gpu_bp.own import Piece, refuse_untrusted
from gpu_bp.spec import Activation, GroupedLoss, Loss, Record, RowActivation
from gpu_bp.tensor_file import read_metadata, read_shapes, read_tensors, write_tensors

KEY = "gpu_bp"  # of the one entry of the file's metadata: with more, their order and so the bytes would vary
PLAIN = registry.loss("squared_error")  # whose outputs are what is predicted


@dataclass(frozen=True)
class Model:
    """A network, the preparation of its inputs and targets, and what its outputs are.

    `loss`: one of several outputs a target, or `PLAIN` in the place of any other.
    """

    network: Network
    preparation: Preparation
    loss: Loss = PLAIN

    def __post_init__(self) -> None:
        if not isinstance(self.loss, GroupedLoss):
            object.__setattr__(self, "loss", PLAIN)

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        network = self.network
        description = {
            "format": FORMAT,
            "widths": network.widths,
            "activations": [_named_record(layer.activation) for layer in network.layers],
            "biases": network.biases,
            "normalise": network.normalise,
            "residual": network.residual,
            "dtype": network.dtype.name,
            "preparation": self.preparation.to_json(),
        }
        if isinstance(self.loss, GroupedLoss):  # else the outputs are what is predicted
            description["loss"] = _named_record(self.loss)
        write_tensors(path, network.tensors(), metadata={KEY: json.dumps(description)})

    @classmethod
    def load(cls, path: Path, backend: Backend, *, own: Sequence[Piece] = (), trust_code: bool = False) -> Model:
        """Reads the file.

        Args:
            own: pieces of one's own that it names, passed again.
            trust_code: whether what it names as `module:object` may be imported.

        Raises:
            UserError: it is missing, not a model that `save` wrote, or names code that is not trusted.
        """
        metadata = read_metadata(path)
        if KEY not in metadata:
            raise UserError(f"{path} is not a model of gpu_bp: its metadata have no key {KEY!r}")
        try:
            said = Description.read(metadata[KEY])
            choices = said.activations
            named = [choice.kind for choice in (*choices, said.loss) if choice and ":" in choice.kind]
            refuse_untrusted(named, str(path), own, trust_code)
            # what the file has bears out the widths, before a network of these is made
            layout_of(said.widths, biases=said.biases, normalise=said.normalise).refuse_other(read_shapes(path))
            loss = cast(Loss, _record("loss", own, said.loss)) if said.loss else PLAIN
            said.preparation.refuse_other(said.widths[0], said.widths[-1], loss.groups)
            network = Network(
                said.widths,
                [cast(Activation | RowActivation, _record("activation", own, choice)) for choice in choices],
                biases=said.biases,
                normalise=said.normalise,
                residual=said.residual,
                backend=backend,
                dtype=said.dtype,
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except ValueError as error:
            raise UserError(f"{path} is not a model of gpu_bp: {error}") from None
        network.load(read_tensors(path, network.layout.shapes))
        return cls(network, Preparation.from_json(said.preparation.model_dump()), loss)

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
        if task.kind == "regression":
            said = self.raw_predictions(outputs)
            columns = [column for values in said.values() for column in values.T]
            return [f"{name}_{label}" if label else name for label in said for name in names], columns
        values = list(outputs.astype(np.float64).T)
        decided = task.decide(outputs)
        if decided.ndim == 1:
            softmax = isinstance(self.network.layers[-1].activation, RowActivation)
            return ["class", *(f"{'p' if softmax else 'y'}_{name}" for name in names)], [decided, *values]
        if len(names) == 1:
            return ["class", *names], [_named(decided[:, 0], task.classes), *values]
        return [*(f"class_{name}" for name in names), *names], [*decided.T, *values]

    def raw_predictions(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """What outputs of a regression say of the targets, in raw units: (rows, n_targets) each, by label.

        The label is "" for the target itself; of a loss of several outputs a target, "variance", "q05", ...
        """
        if not isinstance(self.loss, GroupedLoss):
            return {"": self.preparation.raw_outputs(outputs)}
        predicted = self.loss.predictions(self.loss.grouped(outputs), **self.loss.values)
        said: dict[str, np.ndarray] = {}
        for k, label in enumerate(self.loss.labels):
            power = self.loss.powers.get(label)
            values = predicted[:, k]
            said[label] = self.preparation.raw_spread(values, power) if power else self.preparation.raw_outputs(values)
        return said


def _named_record(record: Record) -> dict[str, Any]:
    kind, values = registry.name_of(record)
    return {"kind": kind, **values}


def _record(what: str, own: Sequence[Piece], named: NamedRecord) -> Record:
    return registry.choose(registry.find(what, named.kind, own), named.kind, named.parameters)


def _named(decided: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """Decisions of one output, -1/1 or 0/1, by the name of the class where it has one."""
    return np.array(classes)[(decided > 0).astype(int)] if classes else decided
