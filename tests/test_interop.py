"""Exchange of parameters, as far as it needs neither scikit-learn nor PyTorch: state_dicts, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from gpu_bp import Model, Network, Task, UserError
from gpu_bp.backends import Backend
from gpu_bp.data.preparation import Preparation
from gpu_bp.interop import from_sklearn, load_state_dict, save_state_dict, to_sklearn
from gpu_bp.tensor_file import write_tensors


def model_of(widths: list[int], phis: list[Any], task: Task | None = None, **options: Any) -> Model:
    """A model with random parameters that takes its inputs as they are."""
    network = Network(widths, phis, **{"dtype": "float64", **options})
    rng = np.random.default_rng(2)
    network.load({name: rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    return Model(network, Preparation(task or Task("none"), shift=(0.0,) * widths[0], scale=(1.0,) * widths[0]))


# By what the network has: its options, and the modules that its tensors belong to.
NETWORKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain": ({}, ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    "no biases": ({"biases": False}, ["0.weight", "2.weight", "4.weight"]),
    "normalised": (
        {"normalise": True},
        ["0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias", "6.weight", "6.bias"],
    ),
    "normalised, no biases": (
        {"normalise": True, "biases": False},
        ["0.weight", "1.weight", "3.weight", "4.weight", "6.weight"],
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("what", NETWORKS)
def test_a_state_dict_there_and_back(backend: Backend, what: str, dtype: str, tmp_path: Path) -> None:
    options, names = NETWORKS[what]
    model = model_of([3, 5, 4, 2], ["relu", "tanh", "softmax"], backend=backend, dtype=dtype, **options)
    path = tmp_path / "model.safetensors"
    save_state_dict(model, path)
    assert set(load_file(path)) == set(names)
    again = load_state_dict(path, ["relu", "tanh", "softmax"], task=Task("argmax"), backend=backend)
    assert again.preparation == Preparation(Task("argmax"), shift=(0.0,) * 3, scale=(1.0,) * 3)
    assert again.network.dtype == dtype
    for name, tensor in model.network.tensors().items():
        np.testing.assert_array_equal(again.network.tensors()[name], tensor)
    inputs = np.random.default_rng(0).standard_normal((7, 3))
    np.testing.assert_array_equal(again.network.predict(inputs), model.network.predict(inputs))


def test_shortcuts_have_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no shortcuts"):
        save_state_dict(model_of([3, 3, 1], ["tanh", "identity"], residual=True), tmp_path / "t.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere/t.safetensors"):
        save_state_dict(model_of([3, 1], ["identity"]), tmp_path / "nowhere" / "t.safetensors")


def test_tensors_are_written_as_safetensors_does(tmp_path: Path) -> None:
    """To the byte, whatever the names, types and strides; readable as any other file, and known by its digest."""
    tensors = {"b": np.arange(3.0), 'é"\n': np.ones((2, 3), np.float32), "c": np.arange(4.0).reshape(2, 2).T}
    for metadata in (None, {"x": '{"é": 1}'}):
        digest = write_tensors(tmp_path / "t", tensors, metadata)
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}  # it takes no others
        assert (tmp_path / "t").read_bytes() == save(contiguous, metadata)
        assert digest == hashlib.sha256((tmp_path / "t").read_bytes()).hexdigest()
    (tmp_path / "other").touch()
    assert (tmp_path / "t").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_tensors_are_not_copied_to_be_written(tmp_path: Path) -> None:
    tensors = {name: np.zeros(2**20) for name in "ab"}
    tracemalloc.start()
    try:
        write_tensors(tmp_path / "t", tensors)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


FIT = {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (2, 5), "2.bias": (2,)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"2.weight": (2, 4)}, "tensor 2.weight has shape (2, 4), layers.1.weights needs (2, 5)"),
        ({"2.bias": None}, "is layers.1.biases (2,)"),
        ({"0.bias": None}, "tensor 2.bias would be layers.1.biases, which is not one of this network's"),
        (
            {"1.weight": (5,)},
            "tensor 1.weight (5,) is no LayerNorm right behind a Linear(bias=False)",
        ),  # PReLU, RMSNorm
        (
            {"0.bias": None, "2.weight": (5,), "2.bias": (5,), "3.weight": (2, 5), "3.bias": (2,)},
            "tensor 2.weight (5,) is no LayerNorm right behind a Linear(bias=False)",  # but behind the activation
        ),
        ({"1.running_var": (5,)}, "tensor 1.running_var (5,) is not the weight or bias of a layer"),
        ({"0.weight": (5, 3, 1, 1)}, "tensor 0.weight (5, 3, 1, 1) is not the weight or bias of a layer"),
        ({"4.weight": (1, 2), "4.bias": (1,)}, "3 layers need as many activations, not 2"),
        (dict.fromkeys(FIT), "there are no tensors"),
    ],
)
def test_state_dicts_that_are_no_network(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in (FIT | changed).items() if shape}, path)
    with pytest.raises(UserError) as caught:
        load_state_dict(path, ["tanh", "identity"])
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_no_such_state_dict(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        load_state_dict(tmp_path / "t.safetensors", ["tanh"])
    header = b'{"0.weight":{"dtype":"BF16","shape":[1,1],"data_offsets":[0,2]}}'
    (tmp_path / "t.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UserError, match="0.weight is of BF16; a type that NumPy has is needed, such as F32"):
        load_state_dict(tmp_path / "t.safetensors", ["tanh"])


def test_peers_are_imported_late() -> None:
    """Neither the package nor this module of it imports them; the package does not import this module."""
    code = "import json, sys, gpu_bp; print(json.dumps(list(sys.modules)))"
    for imports, wanted in ((code, {"gpu_bp.interop"}), (code.replace("gpu_bp;", "gpu_bp.interop;"), set())):
        done = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, check=True)
        assert not ({"sklearn", "torch"} | wanted) & set(json.loads(done.stdout))


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.neural_network", raising=False)
    for call in (lambda: from_sklearn(None), lambda: to_sklearn(model_of([3, 1], ["identity"]))):
        with pytest.raises(UserError, match="this needs scikit-learn: pip install scikit-learn"):
            call()
