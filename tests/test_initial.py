"""Initial parameters: what each kind draws, how it is spread, what a file or an array gives, and what is refused."""

from __future__ import annotations

import math
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import gpu_bp
from gpu_bp import Config, Network, UserError, dump_config, load_config, parse_config
from gpu_bp.backends import Backend, NumpyBackend
from gpu_bp.config_network import AnyWeights
from gpu_bp.initial import initialise
from gpu_bp.registry import Purpose, normals, uniforms

Tiny = Callable[..., dict[str, Any]]

WIDTHS = [5, 40, 3]
SEED = 7
RAW: dict[str, Any] = {"data": {"kind": "xor"}, "optimizer": {"learning_rate": 1.0}, "train": {"epochs": 1}}


def u(n: int) -> np.ndarray:
    return uniforms(SEED, Purpose.WEIGHTS, 0, n)


def z(n: int) -> np.ndarray:
    return normals(SEED, Purpose.WEIGHTS, 0, n)


# By kind: a choice, and what it makes of the draws of the first layer, which has 5 inputs and 40 units.
DRAWN: dict[str, tuple[Any, Any]] = {
    "uniform": ({"kind": "uniform", "low": -2.0, "high": 1.0}, lambda: 3 * u(200) - 2),
    "normal": ({"kind": "normal", "sd": 0.5}, lambda: 0.5 * z(200)),
    "glorot": ("glorot", lambda: math.sqrt(2 / 45) * z(200)),
    "he": ({"kind": "he", "distribution": "uniform"}, lambda: math.sqrt(6 / 5) * (2 * u(200) - 1)),
    "lecun": ("lecun", lambda: math.sqrt(1 / 5) * z(200)),
    "orthogonal": ({"kind": "orthogonal", "gain": 2.0}, lambda: 2 * gram_schmidt(z(200).reshape(40, 5))),
    "sparse": ({"kind": "sparse", "sd": 3.0, "connections": 2}, lambda: 3 * z(200) * connections()),
}
GIVEN = {"array", "file"}


def gram_schmidt(columns: np.ndarray) -> np.ndarray:
    basis: list[np.ndarray] = []
    for column in columns.T:
        for other in basis:
            column = column - (column @ other) * other
        basis.append(column / np.linalg.norm(column))
    return np.array(basis).T


def connections() -> np.ndarray:
    """1 at the two inputs of each of 40 units that drew the smallest of 5 lots."""
    lots = uniforms(SEED, Purpose.CONNECTIONS, 0, 200).reshape(40, 5)
    return np.array([[lot in sorted(row)[:2] for lot in row] for row in lots]).reshape(-1)


def started(
    weights: Any, widths: list[int] = WIDTHS, *, backend: Backend | None = None, seed: int = SEED, biases: bool = True
) -> dict[str, np.ndarray]:
    """The tensors that a network of these widths starts from."""
    config = parse_config({**RAW, "network": {"hidden": widths[1:-1], "weights": weights}})
    phis = ["identity"] * (len(widths) - 1)
    network = Network(widths, phis, backend=backend or NumpyBackend(), biases=biases, dtype="float64")
    initialise(network, config.network.weights, seed)
    return network.tensors()


def test_every_kind_has_a_test() -> None:
    kinds = {kind for model in get_args(AnyWeights) for kind in get_args(model.model_fields["kind"].annotation)}
    assert kinds == {*DRAWN, *GIVEN}


@pytest.mark.parametrize("kind", DRAWN)
def test_draws(kind: str, backend: Backend) -> None:
    """From the beginning of the stream, the same bits on every backend; biases are 0."""
    weights, draws = DRAWN[kind]
    tensors = started(weights, backend=backend)
    np.testing.assert_allclose(tensors["layers.0.weights"], np.asarray(draws()).reshape(40, 5), rtol=1e-12, atol=1e-14)
    assert not tensors["layers.0.biases"].any()
    for name, array in started(weights).items():
        np.testing.assert_array_equal(tensors[name], array)


@pytest.mark.parametrize("kind", DRAWN)
def test_layers_and_seeds_differ(kind: str) -> None:
    """The draws of a layer begin where those of the layer before end, whatever that made of them."""
    weights, _ = DRAWN[kind]
    both, other = started(weights, [6, 6, 6]), started(weights, [6, 6, 6], seed=SEED + 1)
    assert (both["layers.0.weights"] != both["layers.1.weights"]).any()
    assert (both["layers.0.weights"] != other["layers.0.weights"]).any()
    second = started([weights, {"kind": "normal", "sd": 1.0}])["layers.1.weights"]
    np.testing.assert_array_equal(second.reshape(-1), normals(SEED, Purpose.WEIGHTS, 200, 120))


@pytest.mark.parametrize(
    ("weights", "low", "high", "sd"),
    [
        ({"kind": "uniform", "low": -0.2, "high": 0.6}, -0.2, 0.6, 0.8 / math.sqrt(12)),
        ({"kind": "normal", "sd": 0.3}, -3, 3, 0.3),
        ("glorot", -3, 3, math.sqrt(2 / 500)),
        ({"kind": "he", "distribution": "uniform"}, -math.sqrt(6 / 200), math.sqrt(6 / 200), math.sqrt(2 / 200)),
        ("lecun", -3, 3, math.sqrt(1 / 200)),
        ("orthogonal", -1, 1, math.sqrt(1 / 300)),  # a column's squares sum to 1
        ({"kind": "sparse", "connections": 50, "sd": 0.6}, -3, 3, 0.3),  # a quarter of them have it
    ],
)
def test_spread(weights: Any, low: float, high: float, sd: float) -> None:
    tensors = started(weights, [2, 200, 300, 1])
    drawn = tensors["layers.1.weights"]  # 300 x 200
    assert drawn.std() == pytest.approx(sd, rel=0.02)
    assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.01)
    assert low <= drawn.min() < drawn.max() <= high
    assert abs(np.corrcoef(drawn.reshape(-1)[:400], tensors["layers.0.weights"].reshape(-1))[0, 1]) < 0.2


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 10), st.integers(0, 2**63 - 1))
def test_orthogonal(n_out: int, n_in: int, gain: float, seed: int) -> None:
    """W W^T = gain^2 I, or W^T W where there are more units than inputs."""
    w = started({"kind": "orthogonal", "gain": gain}, [n_in, n_out], seed=seed)["layers.0.weights"] / gain
    w = w if n_out <= n_in else w.T
    np.testing.assert_allclose(w @ w.T, np.eye(len(w)), rtol=0, atol=1e-12)


def test_orthogonal_is_of_no_preferred_side() -> None:
    """The sign of a weight is as often one as the other: a plain QR of LAPACK fails here."""
    drawn = np.array([started("orthogonal", [3, 3], seed=seed)["layers.0.weights"] for seed in range(300)])
    assert (np.abs(drawn.mean(axis=0)) < 5 * math.sqrt(1 / 3 / 300)).all()
    assert 110 < (np.linalg.det(drawn) > 0).sum() < 190


def test_sparse() -> None:
    """So many inputs of every unit, each as likely as another."""
    drawn = started({"kind": "sparse", "sd": 3.0}, [100, 4000])["layers.0.weights"]
    assert ((drawn != 0).sum(axis=1) == 15).all()
    assert drawn[drawn != 0].std() == pytest.approx(3.0, rel=0.02)
    often = (drawn != 0).sum(axis=0)
    assert ((often - 600) ** 2 / 510).sum() < 160, "chi-square of 100 inputs, 4000 * 0.15 each"
    assert started("sparse", [4, 2])["layers.0.weights"].all(), "a unit of fewer inputs has them all"


FIRST, SECOND = np.arange(6.0).reshape(3, 2) / 7, np.array([[1.5, -2.0, 1 / 3]])
BIASES = np.array([0.5, -0.5, 1 / 3])


@pytest.mark.parametrize(
    "weights",
    [
        [FIRST, SECOND],
        [FIRST.tolist(), SECOND.tolist()],
        [{"kind": "array", "weights": FIRST, "biases": BIASES}, {"kind": "array", "weights": SECOND.tolist()}],
        [{"kind": "file", "path": "first.npy"}, SECOND],
    ],
    ids=["arrays", "lists", "biases", "npy"],
)
def test_arrays(weights: Any, in_tmp: Path) -> None:
    """The numbers themselves; the config of the run folder holds them to the last bit."""
    np.save("first.npy", FIRST)
    tensors = started(weights, [2, 3, 1])
    np.testing.assert_array_equal(tensors["layers.0.weights"], FIRST)
    np.testing.assert_array_equal(tensors["layers.1.weights"], SECOND)
    np.testing.assert_array_equal(tensors["layers.0.biases"], BIASES if "biases" in weights[0] else 0)
    assert not tensors["layers.1.biases"].any()
    config = parse_config({**RAW, "network": {"hidden": [3], "weights": weights}})
    Path("config.toml").write_text(dump_config(config))
    jsonschema.validate(tomllib.loads(dump_config(config)), Config.model_json_schema())
    assert load_config("config.toml") == config


@pytest.mark.parametrize("weights", ["he", [FIRST.tolist(), "sparse"], {"kind": "orthogonal", "gain": 2}])
def test_the_schema_admits(weights: Any) -> None:
    jsonschema.validate({**RAW, "network": {"hidden": [3], "weights": weights}}, Config.model_json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**RAW, "network": {"weights": FIRST.tolist()}}, Config.model_json_schema())


def test_a_single_layer_takes_one_npy_file(in_tmp: Path) -> None:
    np.save("w.npy", SECOND.astype(np.float32))
    got = started({"kind": "file", "path": "w.npy"}, [3, 1])["layers.0.weights"]
    np.testing.assert_array_equal(got, SECOND.astype(np.float32))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("prefix", ["", "net.", "body.net1.fc"])
def test_state_dict(prefix: str, suffix: str, tmp_path: Path) -> None:
    """PyTorch's names, in natural order: module 2 before module 10."""
    rng = np.random.default_rng(0)
    shapes = {"10.weight": (1, 3), "10.bias": (1,), "2.weight": (3, 2), "2.bias": (3,)}
    tensors = {prefix + name: rng.standard_normal(shape) for name, shape in shapes.items()}
    path = tmp_path / f"t{suffix}"
    (save_file if suffix == ".safetensors" else lambda t, p: np.savez(p, **t))(tensors, path)
    got = started({"kind": "file", "path": str(path)}, [2, 3, 1])
    for k, module in enumerate([2, 10]):
        np.testing.assert_array_equal(got[f"layers.{k}.weights"], tensors[f"{prefix}{module}.weight"])
        np.testing.assert_array_equal(got[f"layers.{k}.biases"], tensors[f"{prefix}{module}.bias"])


def test_the_state_dict_of_one_linear(tmp_path: Path) -> None:
    save_file({"weight": SECOND, "bias": np.ones(1)}, tmp_path / "t.safetensors")
    got = started({"kind": "file", "path": str(tmp_path / "t.safetensors")}, [3, 1])
    np.testing.assert_array_equal(got["layers.0.weights"], SECOND)
    np.testing.assert_array_equal(got["layers.0.biases"], 1)


ZERO = {"0.weight": (3, 2), "0.bias": (3,), "2.weight": (1, 3), "2.bias": (1,)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"0.weight": (2, 3)}, "tensor 0.weight has shape (2, 3), layers.0.weights needs (3, 2)"),
        ({"2.bias": (3,)}, "tensor 2.bias has shape (3,), layers.1.biases needs (1,)"),
        ({"2.bias": None}, "is layers.1.biases (1,)"),
        ({"4.weight": (1, 1)}, "tensor 4.weight would be layers.2.weights, which is not one of this network's: layers"),
        (
            {"0.bias": None, "1.weight": (3,)},
            "tensor 1.weight would be layers.0.gains, which is not one of this network",
        ),
        ({"1.weight": (3,), "1.bias": (3,)}, "tensor 1.weight (3,) is no LayerNorm right behind a Linear(bias=False)"),
        ({"1.running_mean": (3,)}, "tensor 1.running_mean (3,) is not the weight or bias of a layer"),
        ({"0.bias": None, "3.bias": (3,)}, "tensor 3.bias (3,) is not the weight or bias of a layer"),
        ({"0.weight": (3, 2, 1, 1)}, "tensor 0.weight (3, 2, 1, 1) is not the weight or bias of a layer"),
        ({"weight": (3,)}, "tensor weight (3,) is not the weight or bias of a layer"),
    ],
)
def test_state_dicts_that_do_not_fit(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in (ZERO | changed).items() if shape}, path)
    with pytest.raises(UserError) as caught:
        started({"kind": "file", "path": str(path)}, [2, 3, 1])
    assert str(caught.value).startswith(f"network.weights, {path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["he", "he", "he"], "network: 3 weights are listed for 2 layers, the output's included"),
        ([np.ones((40, 5))], "network: 1 weights are listed for 2 layers"),
        ({"kind": "file", "path": "w.npy"}, "network: 1 weights are listed for 2 layers"),
        (["he", {"kind": "file", "path": "x.npz"}], "x.npz holds the weights of all layers; in a list, a .npy file"),
        (["he", {"kind": "file", "path": "no.npy"}], "network.weights.1: no file"),
        (["he", {"kind": "file", "path": "w.npy"}], "w.npy: the shape is (40, 3), layers.1.weights needs (3, 40)"),
        (["he", {"kind": "file", "path": "nan.npy"}], "has a NaN or infinity in row 1"),
        ({"kind": "file", "path": "bad.npz"}, "bad.npz is not an .npz file"),
        (["he", np.ones((40, 3))], "network.weights.1: the shape is (40, 3), layers.1.weights needs (3, 40)"),
        (
            ["he", {"kind": "array", "weights": np.ones((3, 40)), "biases": [1.0]}],
            "network.weights: tensor layers.1.biases has shape (1,), this network needs (3,)",
        ),
        (["he", np.full((3, 40), np.inf)], "network.weights.1.0.0: input should be a finite number, not inf"),
        (["he", np.ones(3)], "network.weights.1.0: input should be a valid list, not 1.0"),
        (["he", {"kind": "array", "weights": [[1.0, "a"]]}], "network.weights.1.weights.0.1: input should be a valid"),
        (["he", {"kind": "array", "weights": []}], "network.weights.1.weights: list should have at least 1 item"),
    ],
)
def test_refusals(weights: Any, message: str, in_tmp: Path) -> None:
    np.save("w.npy", np.ones((40, 3)))
    np.save("nan.npy", np.where(np.arange(3)[:, None] == 1, np.nan, np.ones((3, 40))))
    Path("bad.npz").write_bytes(b"no archive")
    with pytest.raises(UserError) as caught:
        started(weights)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_biases_of_a_network_without() -> None:
    with pytest.raises(UserError, match=r"tensor layers.0.biases is not one of this network's"):
        started([{"kind": "array", "weights": [[1.0]], "biases": [1.0]}], [1, 1], biases=False)


def test_gains_start_at_1() -> None:
    network = Network([2, 3, 1], ["tanh", "identity"], normalise=True)
    initialise(network, parse_config({**RAW, "network": {"hidden": [3]}}).network.weights, 0)
    np.testing.assert_array_equal(network.tensors()["layers.0.gains"], 1)


@pytest.mark.parametrize("damage", ["deflate", "method", "encrypted", "member", "npy"])
def test_broken_npz_files(tiny_config: Tiny, in_tmp: Path, damage: str) -> None:
    """Each in its own way."""
    path = Path("broken.npz")
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.ones((2, 2)))
    elif damage == "member":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("notes.txt", "no array")
    else:
        np.savez_compressed(path, **{"layers.0.weights": np.random.default_rng(0).standard_normal((5, 2))})
        content = bytearray(path.read_bytes())
        entry = content.index(b"PK\x01\x02")
        if damage == "deflate":
            content[60:90] = b"\xff" * 30
        for place in (0, entry) if damage != "deflate" else ():
            offset = place + (6 if place == 0 else 8) + (0 if damage == "encrypted" else 2)
            content[offset] = 1 if damage == "encrypted" else 77
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken.npz is not an .npz file"):
        gpu_bp.train(tiny_config(network={"weights": {"kind": "file", "path": str(path)}}), backend="numpy")
