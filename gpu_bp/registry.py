"""The tables of `gpu_bp.kernels` by name. The only module that imports them.

activation("leaky_relu", slope=0.1)  ->  an Activation record with its parameters chosen
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from gpu_bp import own
from gpu_bp.errors import UserError, unknown
from gpu_bp.spec import Activation, Loss, Record, RowActivation, Update

try:
    from gpu_bp.kernels import activations, losses, penalties, updates
    from gpu_bp.kernels.functions import CUDA_FUNCTIONS, sincospi
    from gpu_bp.kernels.normalise import limit_norm, normalise, normalise_delta
    from gpu_bp.kernels.random import (
        CUDA_DROPOUT,
        CUDA_FILL_NORMALS,
        CUDA_FILL_UNIFORMS,
        CUDA_INPUT_NOISE,
        CUDA_RANDOM,
        Purpose,
        dropout,
        element_of_step,
        normals,
        uniforms,
    )
    from gpu_bp.kernels.shuffle import CUDA_SHUFFLE, Permutations
except ModuleNotFoundError as error:  # kernels/ becomes gpu_bp.kernels on installation
    if not (error.name or "").startswith("gpu_bp.kernels"):
        raise
    raise ModuleNotFoundError(
        "gpu_bp is not installed, only its source folder was found: run `pip install -e .` in it", name=error.name
    ) from None

__all__ = [
    "ACTIVATIONS",
    "CUDA_DROPOUT",
    "CUDA_FILL_NORMALS",
    "CUDA_FILL_UNIFORMS",
    "CUDA_FUNCTIONS",
    "CUDA_INPUT_NOISE",
    "CUDA_RANDOM",
    "CUDA_SHUFFLE",
    "LOSSES",
    "PENALTIES",
    "UPDATES",
    "Permutations",
    "Purpose",
    "activation",
    "choose",
    "dropout",
    "element_of_step",
    "find",
    "limit_norm",
    "loss",
    "name_of",
    "normalise",
    "normalise_delta",
    "normals",
    "sincospi",
    "uniforms",
    "update",
]


def _table(records: tuple[Any, ...], aliases: dict[str, str]) -> dict[str, Any]:
    table = {record.name: record for record in records}
    return table | {alias: table[name] for alias, name in aliases.items()}


ACTIVATIONS: dict[str, Activation | RowActivation] = _table(
    activations.ACTIVATIONS + activations.ROW_ACTIVATIONS, activations.ALIASES
)
LOSSES: dict[str, Loss] = _table(losses.LOSSES, losses.ALIASES)
PENALTIES = {penalty.name: penalty for penalty in penalties.PENALTIES}  # in the order in which they act
UPDATES: dict[str, Update] = _table(updates.UPDATES, updates.ALIASES)


TABLES: dict[str, tuple[dict[str, Any], tuple[type[Record], ...]]] = {
    "activation": (ACTIVATIONS, (Activation, RowActivation)),
    "loss": (LOSSES, (Loss,)),
    "optimizer": (UPDATES, (Update,)),
}


def find(what: str, name: str, passed: Sequence[own.Piece] = ()) -> Record:
    """The record of that name: an activation, a loss or an optimizer, of the package or of one's own.

    Args:
        what: a key of `TABLES`. name: one of its names, or `module:object`, see `own.py`.
        passed: pieces of one's own that were passed from Python.

    Raises:
        UserError: no such record, or it is of another kind.
    """
    table, kinds = TABLES[what]
    if ":" in name:
        return own.find(name, kinds, passed)
    if name not in table:
        raise unknown(what, name, table)
    return cast(Record, table[name])


def choose(record: Record, name: str, parameters: dict[str, Any]) -> Record:
    """The record found under that name, with parameters chosen. Raises UserError where it does not take them."""
    if "label_smoothing" in parameters and "label_smoothing" not in record.parameters:
        raise UserError(
            f"{name} takes no label_smoothing, which is for classifications: cross_entropy and binary_cross_entropy"
        )
    try:
        chosen = record.with_parameters(**parameters)
    except ValueError as error:
        raise UserError(str(error)) from None
    return replace(chosen, origin=name) if ":" in name else chosen


def name_of(record: Record) -> tuple[str, dict[str, Any]]:
    """What a record is called in a config or a model file, and the values to be written beside that name."""
    for table, _ in TABLES.values():
        if own.same_formula(table.get(record.name), record):
            return record.name, dict(record.values)
    return (record.origin, dict(record.values)) if record.origin else own.name_of(record)


def activation(name: str, /, **parameters: Any) -> Activation | RowActivation:
    """The activation of that name, or alias, with parameters such as `slope` chosen; `module:object` is one's own.

    Raises:
        UserError: no such activation, no such parameter, or a value out of range.
    """
    return cast(Activation | RowActivation, choose(find("activation", name), name, parameters))


def loss(name: str, /, **parameters: Any) -> Loss:
    """The loss of that name, with parameters such as `threshold` chosen. Raises UserError as `activation`."""
    return cast(Loss, choose(find("loss", name), name, parameters))


def update(name: str, /, **parameters: Any) -> Update:
    """The update rule of that name, with parameters such as `momentum` chosen. Raises UserError likewise."""
    return cast(Update, choose(find("optimizer", name), name, parameters))
