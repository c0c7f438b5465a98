"""The tables of `gpu_bp.kernels` by name. The only module that imports them.

activation("leaky_relu", slope=0.1)  ->  an Activation record with its parameters chosen
"""

from __future__ import annotations

from typing import Any, TypeVar

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
    "dropout",
    "element_of_step",
    "limit_norm",
    "loss",
    "normalise",
    "normalise_delta",
    "normals",
    "sincospi",
    "uniforms",
    "update",
]


R = TypeVar("R", bound=Record)


def _table(records: tuple[Any, ...], aliases: dict[str, str]) -> dict[str, Any]:
    table = {record.name: record for record in records}
    return table | {alias: table[name] for alias, name in aliases.items()}


ACTIVATIONS: dict[str, Activation | RowActivation] = _table(
    activations.ACTIVATIONS + activations.ROW_ACTIVATIONS, activations.ALIASES
)
LOSSES: dict[str, Loss] = _table(losses.LOSSES, losses.ALIASES)
PENALTIES = {penalty.name: penalty for penalty in penalties.PENALTIES}  # in the order in which they act
UPDATES: dict[str, Update] = _table(updates.UPDATES, updates.ALIASES)


def _find(what: str, table: dict[str, R], name: str, parameters: dict[str, Any]) -> R:
    if name not in table:
        raise unknown(what, name, table)
    try:
        return table[name].with_parameters(**parameters)
    except ValueError as error:
        raise UserError(str(error)) from None


def activation(name: str, /, **parameters: Any) -> Activation | RowActivation:
    """The activation of that name, or alias, with parameters such as `slope` chosen.

    Raises:
        UserError: no such activation, no such parameter, or a value out of range.
    """
    return _find("activation", ACTIVATIONS, name, parameters)


def loss(name: str, /, **parameters: Any) -> Loss:
    """The loss of that name, with parameters such as `threshold` chosen. Raises UserError as `activation`."""
    if "label_smoothing" in parameters and name in LOSSES and "label_smoothing" not in LOSSES[name].parameters:
        raise UserError(
            f"{name} takes no label_smoothing, which is for classifications: cross_entropy and binary_cross_entropy"
        )
    return _find("loss", LOSSES, name, parameters)


def update(name: str, /, **parameters: Any) -> Update:
    """The update rule of that name, with parameters such as `momentum` chosen. Raises UserError likewise."""
    return _find("optimizer", UPDATES, name, parameters)
