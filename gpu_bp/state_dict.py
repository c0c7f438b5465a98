"""The names of a PyTorch state_dict, and ours.

A state_dict names the tensors of a module `MODULE.weight` and `MODULE.bias`. In the natural order of the modules' names
(2 before 10), those with a matrix are the layers, `torch.nn.Linear`, whose weight is (n_out, n_in) as ours; one with a
vector for its weight is the `torch.nn.LayerNorm` of the layer before it, and the vector our gains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from gpu_bp.errors import UserError
from gpu_bp.network import Layout, Network

# The last part of our names, by the last part of theirs and whether the weight beside it is a matrix.
PARTS = {("weight", True): "weights", ("weight", False): "gains", ("bias", True): "biases", ("bias", False): "biases"}


def our_names(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """`layers.K.weights`, ... and the name of each in a state_dict, of which names and shapes are given.

    Raises:
        UserError: a tensor that is not the weight or bias of a layer, or the second to be that.
    """
    names: dict[str, str] = {}
    layer, linear = -1, ""
    for module in sorted({name.rpartition(".")[0] for name in tensors}, key=_natural):
        weight = tensors.get(f"{module}.weight" if module else "weight")
        matrix = weight is not None and len(weight) == 2
        layer, linear = (layer + 1, module) if matrix else (layer, linear)
        for name in sorted((name for name in tensors if name.rpartition(".")[0] == module), reverse=True):
            part = PARTS.get((name.rpartition(".")[2], matrix))
            if part is None or weight is None or len(weight) not in (1, 2) or layer < 0:
                raise UserError(f"tensor {name} {tensors[name]} is not the weight or bias of a layer")
            ours = f"layers.{layer}.{part}"
            if part == "gains" and (f"layers.{layer}.biases" in names or not _follows(linear, module)):
                raise UserError(
                    f"tensor {name} {tensors[name]} is no LayerNorm right behind a Linear(bias=False), the one "
                    "normalisation that is known"
                )
            if ours in names:
                raise UserError(f"tensors {names[ours]} and {name} would both be {ours}")
            names[ours] = name
    return names


def by_layer(layout: Layout, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The names in a state_dict, of which names and shapes are given, by ours; tensors that have these already keep
    them.

    Raises:
        UserError: tensors that do not fit the network: their names and shapes, and those that would be right.
    """
    if not any(name.rpartition(".")[2] == "weight" for name in tensors):
        layout.refuse_other(tensors)
        return {name: name for name in tensors}
    names, shapes = our_names(tensors), layout.shapes
    wanted = ", ".join(f"{ours} {shape}" for ours, shape in shapes.items())
    for ours, name in names.items():
        if ours not in shapes:
            raise UserError(f"tensor {name} would be {ours}, which is not one of this network's: {wanted}")
        if tensors[name] != shapes[ours]:
            raise UserError(f"tensor {name} has shape {tensors[name]}, {ours} needs {shapes[ours]}")
    if missing := [ours for ours in shapes if ours not in names]:
        raise UserError(f"none of the tensors {', '.join(tensors)} is {missing[0]} {shapes[missing[0]]}")
    return names


def their_names(network: Network) -> dict[str, str]:
    """By our names, those of the state_dict of a Sequential(Linear, phi, Linear, phi, ...).

    A layer that is normalised is Linear(bias=False), LayerNorm, phi.
    """
    names: dict[str, str] = {}
    module = 0
    for k, layer in enumerate(network.layers):
        names[f"layers.{k}.weights"] = f"{module}.weight"
        if layer.gains is not None:
            module += 1
            names[f"layers.{k}.gains"] = f"{module}.weight"
        names[f"layers.{k}.biases"] = f"{module}.bias"
        module += 2
    return {ours: name for ours, name in names.items() if ours in network.layout.shapes}


def _follows(first: str, second: str) -> bool:
    """Whether a module comes right behind another, as far as their names say: where both end in a number, the next."""
    (prefix, a), (other, b) = (re.fullmatch(r"(.*?)(\d*)", name).groups() for name in (first, second))  # type: ignore[union-attr]
    return not (a and b and prefix == other) or int(b[-9:]) == int(a[-9:]) + 1


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts numbers by their value: 2 before 10."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdecimal(), len(part.lstrip("0")) if part.isdecimal() else 0, part.lstrip("0")) for part in parts]
