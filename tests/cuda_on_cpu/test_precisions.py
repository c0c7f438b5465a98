"""Precisions below float32 on the stand-in: what is rounded and where, and whole trainings."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cuda_on_cpu import samples
from cuda_on_cpu.backend import cupy_backend_module, cupy_on_cpu
from cuda_on_cpu.emulation import gradient, tf32
from cuda_on_cpu.fake_cupy import FakeCupy
from cuda_on_cpu.test_kernels_on_cpu import ACTIVATIONS
from gpu_bp import Network, Objective, Trainer, UserError, bench, registry
from gpu_bp.config_file import parse_config
from gpu_bp.data.source import Batch
from gpu_bp.errors import Diverged
from gpu_bp.precision import PRECISIONS
from gpu_bp.training_state import TrainingState, restore, take

pytestmark = [pytest.mark.kernels, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

SMALL: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
small = pytest.mark.parametrize("dtype", SMALL.values(), ids=SMALL)
low = pytest.mark.parametrize("precision", [name for name, p in PRECISIONS.items() if p.products])


# Kernels: what is stored in fewer bits is widened, computed with as float32 is, and rounded ------------------


def both(call: Callable[..., None], arrays: dict[str, np.ndarray], stored: set[str], dtype: Any) -> None:
    """A call on arrays of which some are stored in that dtype gives, to the bit, what it gives on float32, rounded."""
    backend = cupy_on_cpu()
    whole = {name: backend.to_device(x) for name, x in arrays.items()}
    part = {name: backend.to_device(x.astype(dtype) if name in stored else x) for name, x in arrays.items()}
    call(backend, **whole)
    call(backend, **part)
    for name in arrays:
        wanted, got = backend.to_host(whole[name]), backend.to_host(part[name])
        if name in stored:
            wanted = wanted.astype(dtype)
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32), err_msg=name)


def numbers(dtype: Any) -> np.ndarray:
    """float32 numbers that the dtype has, the special ones among them."""
    return samples.numbers("float32").astype(dtype).astype(np.float32)


@small
def test_rounding(dtype: Any) -> None:
    """To the nearest, halves to even, too large to infinity; as NumPy and ml_dtypes round, and back without loss."""
    x = samples.numbers("float32")
    step = float(ml_dtypes.finfo(dtype).eps)
    x = np.concatenate([x.reshape(-1), 1 + step * np.arange(-4, 4.1, 0.25)]).astype(np.float32)
    backend = cupy_on_cpu()
    out, back = backend.zeros(x.shape, dtype), backend.zeros(x.shape, np.float32)
    backend.copy(backend.to_device(x), out)
    backend.copy(out, back)
    np.testing.assert_array_equal(backend.to_host(back), x.astype(dtype).astype(np.float32))


# All of one, and of the two sorts of derivative (from the output, from the net input) in the other.
@pytest.mark.parametrize(("name", "precision"), [*((n, "bfloat16") for n in ACTIVATIONS), ("tanh", "float16")])
def test_activations(name: str, precision: str) -> None:
    phi, v = ACTIVATIONS[name], numbers(SMALL[precision])
    biases, e = samples.like(v[0], 1), samples.like(v, 2).astype(SMALL[precision]).astype(np.float32)
    every = name in ("tanh", "silu") and precision == "bfloat16"  # way of storing

    def value(b: Any, v: Any, a: Any, y: Any) -> None:
        b.activate(phi, v, a, y)

    def delta(b: Any, e: Any, v: Any, y: Any, d: Any) -> None:
        b.hidden_delta(phi, e, v, y, d)

    arrays = {"v": v, "a": biases, "y": np.full_like(v, np.nan)}
    for stored in ({"v", "y"}, {"y"})[: 2 if every else 1]:
        both(value, arrays, stored, SMALL[precision])
    if every:
        both(lambda b, v, a: b.activate(phi, v, a, v), {"v": v, "a": biases}, {"v"}, SMALL[precision])
        both(lambda b, v, y: b.activate(phi, v, None, y), {"v": v, "y": v}, {"v", "y"}, SMALL[precision])
    arrays = {"e": e, "v": v, "y": v, "d": np.full_like(v, np.nan)}
    for stored in ({"e", "v", "y", "d"}, {"e", "y"}, {"y"})[: 3 if every else 1]:
        both(delta, arrays, stored, SMALL[precision])


@small
def test_sums_and_dropout(dtype: Any) -> None:
    """Sums of columns are summed in float32, and stay so."""
    x = samples.like(np.empty((50, 7), np.float32), 3).astype(dtype).astype(np.float32)
    both(lambda b, x, s: b.column_sums(x, s), {"x": x, "s": np.empty(7, np.float32)}, {"x"}, dtype)
    for stored in itertools.chain.from_iterable(itertools.combinations("ac", n) for n in (1, 2)):
        both(lambda b, a, c: b.add(a, c, a), {"a": x, "c": x[::-1].copy()}, set(stored), dtype)

    def dropout(b: Any, x: Any, out: Any) -> None:
        b.dropout(3, b.zeros((1,), np.int64), 5, 0.3, x, out)

    for stored in ({"x", "out"}, {"x"}, {"out"}):
        both(dropout, {"x": x, "out": np.zeros_like(x)}, set(stored), dtype)


# Networks --------------------------------------------------------------------------------------------------

NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {"widths": [6, 9, 5, 3], "activations": ["tanh", "silu", "identity"]},
    "a single layer": {"widths": [6, 3], "activations": ["tanh"]},
    "residual": {"widths": [6, 6, 6, 2], "activations": ["silu", "tanh", "identity"], "residual": True},
    "normalise": {"widths": [6, 8, 7, 2], "activations": ["tanh", "silu", "tanh"], "normalise": True},
    "both": {
        "widths": [6, 6, 6, 6, 2],
        "activations": ["silu", "tanh", "silu", "identity"],
        "residual": True,
        "normalise": True,
    },
}
# How far a gradient may be from that of float64, in its own length; twice what is seen here.
BOUNDS = {"float32": 5e-7, "tf32": 2.5e-3, "bfloat16": 2.6e-2, "float16": 2.5e-3}


def made(name: str, precision: str, backend: Any, loss: str = "squared_error") -> tuple[Objective, Batch]:
    given = dict(NETWORKS[name])
    products = PRECISIONS[precision].products
    network = Network(given.pop("widths"), given.pop("activations"), **given, backend=backend, products=products)
    rng = np.random.default_rng(5)
    shapes = network.layout.shapes.items()
    network.load({key: rng.standard_normal(s).astype(np.float32) / np.sqrt(s[-1]) for key, s in shapes})
    x, d = (rng.standard_normal((20, n)).astype(np.float32) for n in (network.widths[0], network.widths[-1]))
    batch = Batch(backend.to_device(x), backend.to_device(d), backend.to_device(np.arange(20)))
    return Objective(network, registry.loss(loss), 20), batch


def far(one: np.ndarray, two: np.ndarray) -> float:
    """How far two vectors are apart, in the length of the second."""
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name: str, precision: str) -> None:
    """They are those of a network that rounds in the same places, and near those of one that does not round."""
    backend = cupy_on_cpu()
    objective, batch = made(name, precision, backend)
    network = objective.network
    scale = 256.0 if precision == "float16" else 1.0
    if precision == "float16":
        objective.loss_scale = backend.to_device(np.full(1, scale, np.float32))
    outputs = backend.to_host(objective.forward(batch))
    objective.backward(batch)
    got = network.tensors(objective.gradients)
    assert {array.dtype for array in got.values()} | {outputs.dtype} == {np.dtype(np.float32)}
    given = {key: value for key, value in NETWORKS[name].items() if key != "widths"}
    x, d = backend.to_host(batch.inputs).astype(float), backend.to_host(batch.targets).astype(float)
    rounded, exact = (
        gradient(
            kind,
            network.tensors(),
            given["activations"],
            x,
            d,
            scale=scale,
            **{key: value for key, value in given.items() if key != "activations"},
        )
        for kind in (precision, "float64")
    )
    for key in got:
        apart = far(got[key] / scale, exact[1][key])
        assert apart <= BOUNDS[precision], key
        if precision != "float32" and not (key.endswith("biases") and len(network.layers) == 1):
            assert far(rounded[1][key], exact[1][key]) > 1e-5, "it rounds"
            # a sum of float32 may now and then be rounded to another neighbour than one of float64
            assert far(got[key] / scale, rounded[1][key]) <= 0.1 * apart + 1e-6, key
    assert far(outputs, rounded[0]) <= 0.1 * far(outputs, exact[0]) + 1e-6


def test_the_choice_is_the_network_s() -> None:
    """Two networks on one backend, one of them in TF32: neither changes the other."""
    backend = cupy_on_cpu()
    x = backend.to_device(np.full((1, 1), 1 + 2**-12, np.float32))
    networks = [Network([1, 1], ["identity"], backend=backend, products=products) for products in ("", "tf32", "")]
    for network in networks:
        network.load({"layers.0.weights": np.ones((1, 1)), "layers.0.biases": np.zeros(1)})
    outputs = [float(backend.to_host(n.forward(x, n.signals(1, backward=False)))[0, 0]) for n in networks]
    assert outputs == [1 + 2**-12, 1.0, 1 + 2**-12]
    assert tf32(np.array(1 + 2**-12)) == 1


@small
def test_no_stale_weights(dtype: Any) -> None:
    """What products take of the weights is made of the parameters as they are: loaded, averaged or written into."""
    backend = cupy_on_cpu()
    products = np.dtype(dtype).name
    network = Network([2, 3, 1], ["tanh", "identity"], biases=False, backend=backend, products=products)
    x = np.ones((4, 2), np.float32)
    assert not network.predict(x).any()
    ones = {name: np.ones(shape) for name, shape in network.layout.shapes.items()}
    network.load(ones)
    first = network.predict(x)
    assert first.all()
    other = network.over(backend.to_device(2 * backend.to_host(network.parameters)))
    assert (other.predict(x) != first).all()
    assert (network.predict(x) == first).all()
    network.parameters[...] = other.parameters
    assert (network.predict(x) == other.predict(x)).all()


# Trainings -------------------------------------------------------------------------------------------------


def config(precision: str, **sections: Any) -> dict[str, Any]:
    tables: dict[str, Any] = {
        "name": "low",
        "seed": 3,
        "data": {"kind": "double-moon", "rows": 120, "validation_rows": 40},
        "network": {"hidden": [8, 8], "activation": ["tanh", "relu"]},
        "loss": {"kind": "cross_entropy"},
        "optimizer": {"kind": "adam", "learning_rate": 0.02},
        "train": {"epochs": 4, "batch_size": 20, "precision": precision},
    }
    return {**tables, **{name: {**tables.get(name, {}), **section} for name, section in sections.items()}}


EVERYTHING: dict[str, Any] = {
    "network": {"normalise": True, "residual": True},
    "regularisation": {"dropout": 0.1, "input_noise": 0.05, "clip_norm": 1.0, "max_norm": 3.0, "l2": 1e-4},
    "train": {"average_decay": 0.8, "part_rows": 7},
    "stopping": {"metric": "average_validation_loss"},
}


def losses(precision: str, **sections: Any) -> list[float]:
    trainer = Trainer(parse_config(config(precision, **sections)), cupy_on_cpu())
    lines = [line for line in trainer.run() if line]
    assert {x.dtype for x in trainer.model.network.tensors().values()} == {np.dtype(np.float32)}
    keys = ("validation_loss", "average_validation_loss")
    return [line[key] for line in lines for key in keys if key in line]


@low
@pytest.mark.parametrize("sections", [{}, EVERYTHING], ids=["plain", "everything"])
def test_losses_are_near_those_of_float32(precision: str, sections: dict[str, Any]) -> None:
    """At the end; on the way float16 leaves out the steps in which it finds its scale."""
    one, two = losses(precision, **sections), losses("float32", **sections)
    assert one != two
    tolerance = {"tf32": 2e-3, "bfloat16": 2e-2, "float16": 0.1}[precision]
    assert one[-2:] == pytest.approx(two[-2:], rel=tolerance)


@low
def test_a_training_goes_on_to_the_same_bits(precision: str) -> None:
    """Stopped while float16 still looks for its scale, and later."""
    made_of = parse_config(config(precision, **EVERYTHING))
    outcomes = []
    for stop in (None, 2, 9):
        trainer = Trainer(made_of, cupy_on_cpu())
        for n, _ in enumerate(trainer.run(), 1):
            if n == stop:
                break
        state, tensors = take(trainer)
        if stop:
            trainer = Trainer(made_of, cupy_on_cpu())
            restore(trainer, TrainingState.model_validate_json(state.model_dump_json()), tensors)
            for _ in trainer.run():
                pass
            state, tensors = take(trainer)
        outcomes.append((state.model_dump(exclude={"seconds"}), {k: x.tobytes() for k, x in tensors.items()}))
    assert outcomes[1:] == [outcomes[0]] * 2
    assert (outcomes[0][0]["scaling"] is not None) == (precision == "float16")


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (
            [7e4, 1],
            [0, 1],
            r"at step 17: an input in float16 is not finite for 1 of the step's 2 rows \(row 0\); scale",
        ),
        (
            [2, 1],
            [9e8, 1],
            r"at step 17: the local gradient of layers.1 \(output, 1 unit\) in float16 is not finite for 1",
        ),
    ],
)
def test_what_float16_has_not_is_named(inputs: list[float], targets: list[float], message: str, tmp_path: Path) -> None:
    """An input, not the layer that it goes into; and the delta for which the scale came to its end."""
    paths = {name: tmp_path / f"{name}.npy" for name in ("inputs", "targets")}
    for path, column in zip(paths.values(), (inputs, targets), strict=True):
        np.save(path, np.array(column, np.float64)[:, None])
    data = {"kind": "arrays", **{name: str(path) for name, path in paths.items()}}
    tables = {**config("float16", loss={"kind": "squared_error"}), "data": {**data, "scaling": "none"}}
    tables["network"] = {"hidden": [4]}
    tables["train"] = {"epochs": 30, "batch_size": 2, "precision": "float16"}
    trainer = Trainer(parse_config(tables), cupy_on_cpu())
    with pytest.raises(Diverged, match=message):
        for _ in trainer.run():
            pass


def test_without_bindings_they_are_refused() -> None:
    backend = cupy_backend_module(FakeCupy()).CupyBackend(bindings=False)
    with pytest.raises(UserError, match=r"^train.precision = tf32: CuPy has no such products, and NVIDIA's bindings"):
        Network([2, 1], ["identity"], backend=backend, products="tf32")


@low
def test_the_peak_is_of_the_precision_s_products(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `gpu-bp bench` measures its steps against."""
    cupy = FakeCupy()
    backend, asked = cupy_backend_module(cupy).CupyBackend(), set()
    monkeypatch.setattr(bench, "MATRICES", (8,))
    monkeypatch.setattr(bench, "SUMMED", 2**12)
    plain = backend.matmul

    def noted(a: Any, b: Any, out: Any, **keywords: Any) -> None:
        asked.add((str(a.dtype), str(out.dtype), keywords["arithmetic"]))
        plain(a, b, out, **keywords)

    monkeypatch.setattr(backend, "matmul", noted)
    bench.measure_peak(backend, precision)
    assert asked == {("float32", "float32", "tf32") if precision == "tf32" else (precision, precision, "")}
