"""Products with an epilogue: the calls, on a stand-in for cublasLt, and the steps of a table that sends them there."""

from __future__ import annotations

import ctypes
import gc
import inspect
import itertools
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuda_on_cpu.backend import cupy_backend_module
from cuda_on_cpu.fake_cublaslt import FakeCublasLt
from cuda_on_cpu.fake_cupy import FakeCupy
from gpu_bp import Batch, Network, Objective, Optimizer, Step, registry
from gpu_bp.backends import cublaslt
from gpu_bp.backends.cublas import PRODUCTS
from gpu_bp.backends.cublaslt import EPILOGUES, WORKSPACE, Lt
from gpu_bp.backends.epilogues import FASTER, Faster, faster, of_layer
from gpu_bp.noise import Noise
from gpu_bp.schedule import constant
from gpu_bp.spec import Twin

pytestmark = pytest.mark.kernels

# As if everything were faster in one.
ALL = [Faster(epilogue, product, "90", 0, 0, "nowhere") for epilogue in EPILOGUES for product in PRODUCTS]
TOLERANCE = {"tf32": 4e-3, "float32": 1e-6, "float64": 1e-14}
NUMPY_HAS = [product for product in PRODUCTS if "bfloat16" not in product]


def lt_of(cupy: FakeCupy) -> Lt:
    workspace = cupy.empty(WORKSPACE, np.uint8)
    return Lt(workspace, lambda: cupy.cuda.get_current_stream().ptr, cupy.lt_bindings)


def gelu(x: np.ndarray) -> Any:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# The calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of_factors", "of_product", "arithmetic"), NUMPY_HAS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("sizes", [(1, 1, 8), (3, 4, 5), (1, 4, 1), (5, 1, 16), (7, 1, 1), (17, 3, 24)])
def test_products(
    sizes: tuple[int, int, int], epilogue: str, of_factors: str, of_product: str, arithmetic: str
) -> None:
    """Of every row of the table that NumPy has the types of; the factors transposed as a network does, or not."""
    (rows, inner, columns), cupy, rng = sizes, FakeCupy(), np.random.default_rng(0)
    lt, of_gradient = lt_of(cupy), epilogue == "bias_gradient"
    exact = np.float64 if of_factors == "float64" else np.float32
    for ta, tb in [(True, False), (True, True)] if of_gradient else itertools.product((False, True), repeat=2):
        a = rng.standard_normal((inner, rows) if ta else (rows, inner)).astype(of_factors)
        b = rng.standard_normal((columns, inner) if tb else (inner, columns)).astype(of_factors)
        bias = np.full(rows, np.nan) if of_gradient else rng.standard_normal(columns)
        out, on_device = (
            cupy.asarray(np.full((rows, columns), np.nan, of_product)),
            cupy.asarray(bias.astype(of_product)),
        )
        aux = cupy.asarray(np.full((rows, columns), np.nan, of_product)) if epilogue == "gelu_bias" else None
        how = {"transpose_a": ta, "transpose_b": tb, "arithmetic": arithmetic}
        done = lt(epilogue, cupy.asarray(a), cupy.asarray(b), out, on_device, aux, **how)
        if aux is not None and columns % 8:
            assert not done
            assert "matmul_algo_get_heuristic" not in cupy.lt_bindings.calls
            assert np.isnan(out.get()).all()
            continue
        assert done
        least = max(TOLERANCE[arithmetic], 2e-3 if of_product == "float16" else 0)
        net_input = (a.T if ta else a).astype(exact) @ (b.T if tb else b).astype(exact)
        sums, written = a.astype(exact).sum(axis=0), on_device.get()
        if of_gradient:
            np.testing.assert_allclose(written, sums, rtol=max(least, 1e-6 if exact is np.float32 else 0), atol=least)
        else:
            np.testing.assert_array_equal(written, bias.astype(of_product))
            net_input = net_input + written.astype(exact)
        then = {"relu_bias": lambda x: np.maximum(x, 0), "gelu_bias": gelu}.get(epilogue, lambda x: x)
        np.testing.assert_allclose(out.get(), then(net_input), rtol=2 * least, atol=2 * least)
        if aux is not None:
            np.testing.assert_allclose(aux.get(), net_input, rtol=least, atol=least)


def arrays(cupy: FakeCupy, rows: int = 4) -> tuple[Any, ...]:
    """x, w, y and b of a layer with 3 inputs and 8 units."""
    return tuple(cupy.asarray(np.ones(shape, np.float32)) for shape in ((rows, 3), (8, 3), (rows, 8), (8,)))


def test_cublaslt_is_asked_once_for_a_shape() -> None:
    """Then a product is what says where its bias is, and the product; nothing is made, nobody waits."""
    cupy = FakeCupy()
    lt, layer = lt_of(cupy), arrays(cupy)
    assert lt("bias", *layer, transpose_b=True)
    cupy.lt_bindings.calls.clear()
    cupy.device.counts.clear()
    for _ in range(3):
        assert lt("bias", *layer, transpose_b=True)
    assert cupy.lt_bindings.calls == 3 * ["matmul_desc_set_attribute", "matmul"]
    assert cupy.device.counts == {"launches": 3}
    x, w, y, b = layer
    for rows in (3, 4, 3):
        assert lt("bias", x[:rows], w, y[:rows], b, transpose_b=True)
    assert cupy.lt_bindings.calls.count("matmul_algo_get_heuristic") == 1
    assert lt("relu_bias", *layer, transpose_b=True)
    assert cupy.lt_bindings.calls.count("matmul_algo_get_heuristic") == 2


def test_memory_that_is_aligned_less() -> None:
    """It is said as it is, since an algorithm may count on what it was told."""
    cupy = FakeCupy()
    lt, (x, w, y, b) = lt_of(cupy), arrays(cupy)
    at = next(k for k in range(64) if (b.data.ptr + 4 * k) % 256 == 0)
    assert lt("bias", x, w, y, b, transpose_b=True)
    wide = cupy.asarray(np.ones(256, np.float32))
    for start in (at, at + 1, at + 2, at + 4):
        assert lt("bias", x, w, y, wide[start : start + 8], transpose_b=True)
    assert y.get().tolist() == [[4.0] * 8] * 4


@pytest.mark.parametrize("how", ["an error", "no result"])
def test_where_there_is_no_algorithm(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done, nothing is kept, and it is not asked again."""
    cupy = FakeCupy()
    lt, layer = lt_of(cupy), arrays(cupy)
    before = layer[2].get()
    if how == "an error":
        cupy.lt_bindings.without.add(EPILOGUES["bias"])
    else:
        monkeypatch.setattr(
            cupy.lt_bindings, "matmul_algo_get_heuristic", lambda *_: cupy.lt_bindings.calls.append("asked")
        )
    for _ in range(3):
        assert not lt("bias", *layer, transpose_b=True)
    np.testing.assert_array_equal(layer[2].get(), before)
    calls = cupy.lt_bindings.calls
    assert calls.count("matmul_algo_get_heuristic") + calls.count("asked") == 1
    assert cupy.lt_bindings.alive == 1  # cublasLt's own handle


def test_what_was_made_goes_with_its_owner() -> None:
    cupy = FakeCupy()
    lt = lt_of(cupy)
    assert lt("bias", *arrays(cupy), transpose_b=True)
    assert cupy.lt_bindings.alive == 1 + 4  # what is to be done, and three matrices
    del lt
    gc.collect()
    assert cupy.lt_bindings.alive == 0


def test_it_follows_the_current_stream() -> None:
    cupy = FakeCupy()
    lt, layer = lt_of(cupy), arrays(cupy)
    assert lt("bias", *layer, transpose_b=True)
    with cupy.cuda.Stream():  # the stand-in compares
        assert lt("bias", *layer, transpose_b=True)


def test_what_is_refused() -> None:
    cupy = FakeCupy()
    lt, (x, w, y, b) = lt_of(cupy), arrays(cupy)
    other = cupy.zeros((4, 8), np.float64)
    for words, call in {
        r"no product of shape": lambda: lt("bias", x, w, y, b),
        r"bias of shape \(3,\)": lambda: lt("bias", x, w, y, x[0], transpose_b=True),
        r"bias_gradient of a product": lambda: lt("bias_gradient", x, w, y, cupy.zeros(4, "f"), transpose_b=True),
        "gelu_bias leaves its net input": lambda: lt("gelu_bias", x, w, y, b, transpose_b=True),
        "relu_bias leaves no": lambda: lt("relu_bias", x, w, y, b, y, transpose_b=True),
        "gelu_bias leaves its": lambda: lt("gelu_bias", x, w, y, b, other, transpose_b=True),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()


def test_the_bindings_themselves() -> None:
    """Names, signatures, numbers and sizes of the installed nvmath-python, of which no call can be made here."""
    pytest.importorskip("nvmath", reason="nvmath-python is not installed")
    real = cublaslt.bindings()
    public = {name for name, x in vars(FakeCublasLt).items() if name[0] != "_" and inspect.isfunction(x)}
    assert {"create", "matmul", "matmul_algo_get_heuristic", "matmul_desc_set_attribute"} <= public
    for name in public:
        own = list(inspect.signature(getattr(FakeCublasLt, name)).parameters)[1:]
        assert list(inspect.signature(getattr(real, name)).parameters) == own, name
    assert FakeCublasLt.matmul_heuristic_result_dtype == real.matmul_heuristic_result_dtype
    assert issubclass(real.cuBLASLtError, Exception)
    numbers = {"bias": "BIAS", "relu_bias": "RELU_BIAS", "gelu_bias": "GELU_AUX_BIAS", "bias_gradient": "BGRADB"}
    assert {name: int(real.Epilogue[theirs]) for name, theirs in numbers.items()} == EPILOGUES
    for (number, kind), name in {
        cublaslt.TRANSA: "TRANSA",
        cublaslt.TRANSB: "TRANSB",
        cublaslt.EPILOGUE: "EPILOGUE",
        cublaslt.BIAS_POINTER: "BIAS_POINTER",
        cublaslt.BIAS_TYPE: "BIAS_DATA_TYPE",
        cublaslt.AUX_POINTER: "EPILOGUE_AUX_POINTER",
        cublaslt.AUX_LD: "EPILOGUE_AUX_LD",
    }.items():
        assert number == real.MatmulDescAttribute[name]
        assert np.dtype(kind) == real.get_matmul_desc_attribute_dtype(number)
    preferences = [(cublaslt.MAX_WORKSPACE, "MAX_WORKSPACE_BYTES"), (cublaslt.REDUCTION, "REDUCTION_SCHEME_MASK")]
    preferences += [(x, f"MIN_ALIGNMENT_{name}_BYTES") for x, name in zip(cublaslt.ALIGNMENTS, "ABCD", strict=True)]
    for (number, kind), name in preferences:
        assert number == real.MatmulPreferenceAttribute[name]
        assert np.dtype(kind) == real.get_matmul_preference_attribute_dtype(number)
    assert cublaslt.IN_ARITHMETIC == real.ReductionScheme.COMPUTE_TYPE
    assert ctypes.sizeof(ctypes.c_int) == 4


# Where a layer goes there ----------------------------------------------------------------------------------


def test_the_table() -> None:
    """It answers for the shapes, dtypes and devices of its rows alone; the committed one is well-formed."""
    product, other = ("float32", "float32", "tf32"), ("float32", "float32", "float32")
    table = [
        Faster("relu_bias", product, "90", 1024, 256, "a device, today"),
        Faster("relu_bias", product, "90", 65536, 64, "a device, today"),
    ]

    def asked(epilogue: str, of: tuple[str, str, str], capability: str, rows: int, *widths: int) -> bool:
        return faster(table, epilogue, of, capability, rows, (widths[0], widths[1]))

    assert asked("relu_bias", product, "90", 1024, 256, 256)
    assert asked("relu_bias", product, "90", 2**20, 4096, 256)
    assert asked("relu_bias", product, "90", 65536, 64, 100)
    assert not asked("relu_bias", product, "90", 1023, 256, 256)
    assert not asked("relu_bias", product, "90", 1024, 255, 256)
    assert not asked("relu_bias", product, "90", 1024, 256, 255)
    assert not asked("relu_bias", product, "90", 65536, 63, 4096)
    assert not asked("bias", product, "90", 2**20, 4096, 4096)
    assert not asked("relu_bias", other, "90", 2**20, 4096, 4096)
    assert not asked("relu_bias", product, "80", 2**20, 4096, 4096)
    assert not faster((), "relu_bias", product, "90", 2**20, (4096, 4096))
    for row in (*table, *FASTER):
        assert row.epilogue in EPILOGUES
        assert row.product in PRODUCTS
        assert row.capability.isdigit()
        assert row.measured


def test_of_layer() -> None:
    """By the formula, not by the name; and only where both arrays get what they must."""
    v, y = np.zeros((2, 2)), np.zeros((2, 2))
    found = {
        name: (of_layer(phi, v, v), of_layer(phi, v, y))
        for name, phi in registry.ACTIVATIONS.items()
        if name == phi.name
    }
    assert {name: pair for name, pair in found.items() if any(pair)} == {
        "identity": ("bias", ""),
        "relu": ("relu_bias", ""),
        "gelu_tanh": ("", "gelu_bias"),
    }
    assert (of_layer(None, v, v), of_layer(None, v, y)) == ("bias", "bias")
    relu = registry.activation("relu")
    assert of_layer(replace(relu, value=Twin("y = v < T(1) ? T(1) : v;", relu.value.numpy)), v, v) == ""


def backend(table: Any = (), **options: Any) -> tuple[Any, FakeCupy]:
    cupy = FakeCupy()
    return cupy_backend_module(cupy).CupyBackend(epilogues=table, **options), cupy


def step_of(b: Any, activation: str, widths: list[int], **options: Any) -> Step:
    """A step of a network with that activation in its hidden layers, and the same parameters each time."""
    loss = registry.loss(options.pop("loss", "squared_error"))
    noise = options.pop("noise", None)
    last = options.pop("last", "identity")
    network = Network(widths, [*[activation] * (len(widths) - 2), last], backend=b, **options)
    rng = np.random.default_rng(1)
    network.load({name: 0.5 * rng.standard_normal(shape) for name, shape in network.layout.shapes.items()})
    objective = Objective(network, loss, 9, **({"noise": noise} if noise else {}))
    return Step(objective, Optimizer(registry.update("momentum"), network, constant(0.1)))


def batch_of(b: Any, widths: list[int], loss: str = "squared_error", dtype: str = "float32") -> Batch:
    rng = np.random.default_rng(2)
    x, d = rng.standard_normal((9, widths[0])).astype(dtype), rng.uniform(0, 1, (9, widths[-1])).astype(dtype)
    targets = np.arange(9) % 2 if registry.loss(loss).targets == "classes" else d
    return Batch(b.to_device(x), b.to_device(targets), b.to_device(np.arange(9)))


def both(activation: str, widths: list[int], **options: Any) -> tuple[list[np.ndarray], FakeCupy]:
    """The parameters after a step, apart and in one where that can be, and the stand-in for the latter."""
    found = []
    for table in ((), ALL):
        b, cupy = backend(table)
        step = step_of(b, activation, widths, **options)
        step(batch_of(b, widths, **{name: x for name, x in options.items() if name in ("loss", "dtype")}))
        found.append(b.to_host(step.objective.network.parameters))
    return found, cupy


IN_ONE = {"identity": "bias", "relu": "relu_bias", "gelu_tanh": "gelu_bias"}
HIDDEN = [name for name, phi in registry.ACTIVATIONS.items() if name == phi.name != "softmax"]


@pytest.mark.parametrize("widths", [[3, 8, 1], [1, 1, 1], [5, 7, 16, 3]], ids=str)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("activation", HIDDEN)
def test_a_step_of_every_activation(activation: str, biases: bool, widths: list[int]) -> None:
    """To 1e-5, as issue 7 asks; a layer without biases has nothing to be done in one."""
    found, cupy = both(activation, widths, biases=biases)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-7)
    layers, hidden = len(widths) - 1, widths[1:-1]
    if activation == "gelu_tanh":
        hidden = [width for width in hidden if width % 8 == 0]
    # of each layer the gradients; of the output layer, and of hidden ones with some activations, the outputs
    wanted = layers + 1 + (len(hidden) if activation in IN_ONE else 0)
    assert cupy.lt_bindings.calls.count("matmul") == (wanted if biases else 0)


@pytest.mark.parametrize(
    ("options", "in_one"),
    [
        ({"loss": "binary_cross_entropy", "last": "logistic"}, 4 + 4),  # which starts from the net input
        ({"loss": "cross_entropy", "last": "softmax"}, 4 + 4),
        ({"normalise": True}, 1 + 1),  # the output layer alone
        ({"residual": True}, 4 + 4),  # what is added comes after a layer
        ({"noise": Noise(seed=3, dropout=(0.4, 0.2, 0.1))}, 4 + 4),  # so does dropout
        ({"dtype": "float64"}, 4 + 4),
        ({"products": "tf32"}, 4 + 4),
        # biases are float32, and so is the output layer's delta before it is rounded for the products
        ({"products": "float16"}, 1 + 3),
        ({"products": "bfloat16"}, 1 + 3),
    ],
    ids=str,
)
def test_networks_with_more(options: dict[str, Any], in_one: int) -> None:
    found, cupy = both("relu", [3, 8, 8, 8, 2], **options)
    least = 1e-12 if options.get("dtype") == "float64" else 1e-5
    np.testing.assert_allclose(found[1], found[0], rtol=least, atol=least / 100)
    assert cupy.lt_bindings.calls.count("matmul") == in_one


# A whole training -------------------------------------------------------------------------------------------


def test_in_a_graph() -> None:
    """The same bits as one by one; a replay asks nothing of the bindings, and launches less than one without."""
    widths, states, launches = [3, 8, 8, 1], [], []
    for table, graphs in ((ALL, True), (ALL, False), ((), True)):
        b, cupy = backend(table, graphs=graphs)
        step, batch = step_of(b, "relu", widths), batch_of(b, widths)
        for _ in range(4):
            step(batch)
        assert (cupy.device.counts["graphs"] == 3) == graphs
        assert not b.captures.refused
        for calls in (cupy.bindings.calls, cupy.lt_bindings.calls):
            calls.clear()
        cupy.device.counts.clear()
        step(batch)
        if graphs:
            assert cupy.bindings.calls == cupy.lt_bindings.calls == []
        launches.append(cupy.device.counts["launches"])
        states.append(b.to_host(step.objective.network.parameters))
    assert states[0].tobytes() == states[1].tobytes()
    layers = len(widths) - 1
    assert launches[2] - launches[0] == layers * (1 + 2)  # a kernel for biases and activation; two for column sums
    np.testing.assert_allclose(states[0], states[2], rtol=1e-4, atol=1e-6)


def test_the_loss_after_many_steps() -> None:
    """To 1e-3 after 1,000, as issue 7 asks; here it falls to a tenth meanwhile."""
    widths, losses = [3, 8, 1], []
    for table in ((), ALL):
        b, _ = backend(table)
        step, batch = step_of(b, "gelu_tanh", widths), batch_of(b, widths)
        step(batch)
        first = step.objective.mean_loss()
        for _ in range(999):
            step(batch)
        step.objective.mean_loss()
        step(batch)
        losses.append(step.objective.mean_loss())
    assert losses[0] < first / 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_without_a_row_nothing_is_made() -> None:
    """Of a table with none, or of other devices, or where the products are CuPy's: no handle, no workspace."""
    other = [row._replace(capability="80") for row in ALL]
    for options in ({"table": ()}, {"table": other}, {"table": ALL, "bindings": False}):
        b, cupy = backend(**options)
        step_of(b, "relu", [3, 8, 1])(batch_of(b, [3, 8, 1]))
        assert cupy.lt_bindings.calls == []
    plain, b = (backend(table)[0] for table in ((), ALL))
    assert plain.free_bytes() - b.free_bytes() >= WORKSPACE


def test_results_depend_on_the_table() -> None:
    """So what a checkpoint knows of the libraries is another where its rows are others, and only then."""
    other = [row._replace(capability="80") for row in ALL]
    found = [backend(table)[0].libraries()["products"] for table in ((), other, ALL, ALL[1:], ALL)]
    assert found[0] == found[1]
    assert found[2] == found[4]
    assert len(set(found)) == 3


def test_a_cublaslt_that_does_not_load(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, and everything is done apart."""
    b, cupy = backend(ALL)

    def create() -> int:
        raise RuntimeError("no libcublasLt\nsecond line")

    monkeypatch.setattr(cupy.lt_bindings, "create", create)
    with caplog.at_level(logging.WARNING, "gpu_bp"):
        step = step_of(b, "relu", [3, 8, 1])
        for _ in range(3):
            step(batch_of(b, [3, 8, 1]))
    assert [record.message for record in caplog.records] == [
        "epilogues of cublasLt are not used, which would be faster: no libcublasLt"
    ]
