"""Every kind of synthetic data, in every variant that has formulas of its own: what tests of synthetic data walk."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from gpu_bp.config_data import Synthetic
from gpu_bp.data.synthetic import Set, make_set
from gpu_bp.formula import Program

# By kind: what is chosen in its section. A kind that is missing here fails test_synthetic.py.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "double-moon": [{}, {"radius": 3.0, "width": 1.0, "distance": 0.5}],
    "xor": [{}],
    "encoder": [{}, {"size": 3, "rows": 100}],
    "parity": [{}, {"n_inputs": 48, "rows": 100}, {"patterns": "random", "n_inputs": 5, "rows": 100}],
    "symmetry": [{}, {"n_inputs": 47, "rows": 100}]
    + [{"patterns": "random", "n_inputs": n, "rows": 100} for n in (6, 7)],
    "checkerboard": [{}, {"n_inputs": 3, "cells": 5}],
    "two-spirals": [{}, {"noise": 0.2, "rows": 1000}],
    "gaussian-blobs": [
        {},
        {"n_inputs": 5, "n_classes": 3, "bayes_error": 0.2},
        {"n_inputs": 12, "n_classes": 10},
        {"proportions": [50, 1], "distance": 2.0},
        {"n_inputs": 6, "n_classes": 4, "proportions": [0.5, 3, 1, 0.25]},
    ],
    "linear": [{}, {"n_targets": 3, "distribution": "uniform"}, {"n_inputs": 1, "noise": 0.0}],
    "teacher": [{}, {"n_inputs": 6, "hidden": [7, 1, 5], "n_targets": 2, "distribution": "uniform"}],
    "friedman1": [{}, {"n_inputs": 5, "noise": 0.0}],
    "friedman2": [{}],
    "friedman3": [{}],
    "sine-mixture": [{}, {"components": 9, "noise": 0.0}],
    "heteroscedastic": [{}, {"noise": 0.0}],
}
SECTIONS = {section.model_fields["kind"].annotation.__args__[0]: section for section in get_args(Synthetic)}
NAMED = [(kind, k) for kind, variants in VARIANTS.items() for k in range(len(variants))]


def section(kind: str, **chosen: Any) -> Any:
    """The section of the config for a kind of synthetic data."""
    return SECTIONS[kind](kind=kind, **chosen)


def variant(kind: str, k: int, seed: int = 3) -> Set:
    """The set of variant k of a kind."""
    return make_set(section(kind, **VARIANTS[kind][k]), seed)


def program(made: Set) -> Program:
    """What makes the inputs and the target of a set."""
    return Program((made.inputs, made.target), made.stages, made.tables)


def choices(kind: str) -> dict[str, set[Any]]:
    """The fields by which a set chooses its formulas, and what they can be: those that are not of all kinds of data."""
    common = {"kind", "residency", "scaling", "target_scaling"}
    fields = SECTIONS[kind].model_fields.items()
    return {
        n: set(get_args(f.annotation)) for n, f in fields if get_origin(f.annotation) is Literal and n not in common
    }
