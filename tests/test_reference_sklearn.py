"""scikit-learn and PyTorch: the same training, loss by loss, and the same predictions of exchanged networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_interop import NETWORKS, model_of

from gpu_bp import Batch, Model, Objective, Optimizer, Step, Task, UserError, registry
from gpu_bp.backends import Backend
from gpu_bp.data.preparation import Preparation
from gpu_bp.interop import OUTPUT, from_sklearn, load_state_dict, save_state_dict, to_sklearn
from gpu_bp.schedule import constant

torch = pytest.importorskip("torch", reason="PyTorch is the reference of these tests")
neural_network = pytest.importorskip("sklearn.neural_network", reason="scikit-learn is the reference of these tests")
pytestmark = pytest.mark.reference

MLPClassifier, MLPRegressor = neural_network.MLPClassifier, neural_network.MLPRegressor
ConvergenceWarning = pytest.importorskip("sklearn.exceptions").ConvergenceWarning
safetensors = pytest.importorskip("safetensors.torch")

EPOCHS, ROWS, BATCH = 20, 60, 12
RNG = np.random.default_rng(5)
INPUTS = RNG.standard_normal((ROWS, 3))
SCORE = np.sin(INPUTS).sum(axis=1)
ONE_HOT = np.eye(4)[RNG.integers(0, 4, ROWS)]

# By name: the record's parameters, and scikit-learn's settings. It adds eps to the root of the moment before that is
# corrected, and we after, as in PyTorch: so eps is made too small to matter.
OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd": ({}, {"solver": "sgd", "momentum": 0.0, "nesterovs_momentum": False}),
    "momentum": ({"momentum": 0.8}, {"solver": "sgd", "momentum": 0.8, "nesterovs_momentum": False}),
    "nesterov": ({"momentum": 0.8}, {"solver": "sgd", "momentum": 0.8, "nesterovs_momentum": True}),
    "adam": ({"betas": [0.8, 0.99], "eps": 1e-20}, {"solver": "adam", "beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-20}),
}


def fitted(kind: Callable[..., Any], targets: np.ndarray, **settings: Any) -> Any:
    """An estimator that was fitted in so many epochs, the rows in their order."""
    common = {"shuffle": False, "batch_size": BATCH, "tol": 0.0, "n_iter_no_change": 10**6, "random_state": 1}
    estimator = kind(**{**common, "hidden_layer_sizes": (6, 5), "max_iter": EPOCHS, **settings})
    with pytest.warns(ConvergenceWarning):
        return estimator.fit(INPUTS, targets)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("kind", "loss", "targets"),
    [(MLPClassifier, "binary_cross_entropy", (SCORE > 0).astype(float)), (MLPRegressor, "squared_error", SCORE)],
    ids=["classifier", "regressor"],
)
def test_loss_curve(
    backend: Backend, kind: Callable[..., Any], loss: str, targets: np.ndarray, optimizer: str, alpha: float
) -> None:
    """The loss of each of twenty epochs. alpha / 2 |W|^2 is shared by the rows of a batch, the biases are exempt."""
    parameters, settings = OPTIMIZERS[optimizer]
    settings = {"activation": "tanh", "learning_rate_init": 0.02, "alpha": alpha, **settings}
    theirs = fitted(kind, targets, **settings)
    still = {**settings, "solver": "sgd", "momentum": 0.0, "learning_rate_init": 1e-300, "max_iter": 1}
    network = from_sklearn(fitted(kind, targets, **still), backend).network
    assert network.dtype == np.float64
    l2 = alpha / BATCH
    objective = Objective(network, registry.loss(loss), BATCH)
    record = registry.update(optimizer, **parameters)
    step = Step(objective, Optimizer(record, network, constant(0.02), penalties={"l2": l2}))
    curve = []
    for _ in range(EPOCHS):
        penalty = 0.0
        for start in range(0, ROWS, BATCH):
            weights = backend.to_host(network.parameters)[: network.layout.n_weights]
            penalty += 0.5 * l2 * float(weights @ weights) * BATCH / ROWS
            arrays = INPUTS[start : start + BATCH], targets[start : start + BATCH, None], np.arange(BATCH)
            step(Batch(*map(backend.to_device, arrays)))
        curve.append(objective.mean_loss() + penalty)
    np.testing.assert_allclose(curve, theirs.loss_curve_, rtol=0, atol=1e-8)
    for k, coefs in enumerate(theirs.coefs_):
        np.testing.assert_allclose(network.tensors()[f"layers.{k}.weights"], coefs.T, rtol=0, atol=1e-8)


LETTERS = np.array(["b", "a", "d", "c"])[ONE_HOT.argmax(axis=1)]
ESTIMATORS: dict[str, Callable[[], Any]] = {
    "regressor": lambda: fitted(MLPRegressor, SCORE),
    "several targets": lambda: fitted(MLPRegressor, np.stack([SCORE, INPUTS[:, 0]], axis=1), activation="logistic"),
    "two classes": lambda: fitted(MLPClassifier, SCORE > 0, activation="identity"),
    "two numbers": lambda: fitted(MLPClassifier, np.where(SCORE > 0, 1, -1), activation="tanh"),
    "several classes": lambda: fitted(MLPClassifier, LETTERS, activation="logistic"),
    "numbers": lambda: fitted(MLPClassifier, 8 + ONE_HOT.argmax(axis=1)),
    "several labels": lambda: fitted(MLPClassifier, np.stack([SCORE > 0, INPUTS[:, 0] > 0], axis=1).astype(int)),
    "no hidden layer": lambda: fitted(MLPRegressor, SCORE, hidden_layer_sizes=()),
}


def assert_same(ours: np.ndarray, estimator: Any, inputs: np.ndarray = INPUTS) -> None:
    """Our outputs are the predictions of an estimator, or its probabilities."""
    if isinstance(estimator, MLPRegressor):
        theirs = estimator.predict(inputs)
    else:
        theirs = estimator.predict_proba(inputs)
        if estimator.n_outputs_ == 1:
            theirs = theirs[:, 1]
    np.testing.assert_allclose(ours, theirs.reshape(ours.shape), rtol=0, atol=1e-12)


@pytest.mark.parametrize("what", ESTIMATORS)
def test_from_sklearn_and_back(backend: Backend, what: str, tmp_path: Path) -> None:
    theirs = ESTIMATORS[what]()
    model = from_sklearn(theirs, backend)
    outputs = model.network.predict(INPUTS)
    assert_same(outputs, theirs)
    model.save(tmp_path / "model.safetensors")
    back = to_sklearn(Model.load(tmp_path / "model.safetensors", backend))
    assert type(back) is type(theirs)
    for mine, its in zip(back.coefs_ + back.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        np.testing.assert_array_equal(mine, its)
        assert mine.dtype == its.dtype
    predicted = theirs.predict(INPUTS)
    np.testing.assert_array_equal(back.predict(INPUTS), predicted.astype(str) if what == "two classes" else predicted)
    if predicted.dtype != np.float64 and what != "several labels":  # what the model itself decides
        np.save(tmp_path / "x.npy", INPUTS)
        names, columns = model.predict(tmp_path / "x.npy")
        assert names[0] == "class"
        np.testing.assert_array_equal(columns[0], predicted.astype(str))


def test_float32(backend: Backend) -> None:
    theirs = MLPRegressor(hidden_layer_sizes=(4,), max_iter=1, random_state=0)
    with pytest.warns(ConvergenceWarning):
        theirs.fit(INPUTS.astype(np.float32), SCORE.astype(np.float32))
    model = from_sklearn(theirs, backend)
    assert model.network.dtype == np.float32
    np.testing.assert_array_equal(to_sklearn(model).coefs_[0], theirs.coefs_[0])


MODELS: dict[str, tuple[list[int], list[str], Task]] = {
    "none": ([3, 6, 5, 2], ["relu", "relu", "identity"], Task("none")),
    "half": ([3, 6, 1], ["tanh", "logistic"], Task("half", ("no", "yes"))),
    "argmax": ([3, 6, 4], ["logistic", "softmax"], Task("argmax")),
    "half of several": ([3, 6, 2], ["identity", "logistic"], Task("half")),
    "argmax of two": ([3, 6, 2], ["tanh", "softmax"], Task("argmax", ("0", "1"))),
    "no hidden layer": ([3, 2], ["identity"], Task("none")),
}


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("what", MODELS)
def test_to_sklearn_and_back(backend: Backend, what: str, biases: bool) -> None:
    widths, phis, task = MODELS[what]
    model = model_of(widths, phis, task, backend=backend, biases=biases)
    theirs = to_sklearn(model)
    outputs = model.network.predict(INPUTS)
    assert_same(outputs, theirs)
    if isinstance(theirs, MLPClassifier):
        decided = task.decide(outputs).reshape(theirs.predict(INPUTS).shape)
        named = np.array(["no", "yes"])[decided] if what == "half" else decided.astype(int)
        np.testing.assert_array_equal(theirs.predict(INPUTS), named)
    again = from_sklearn(theirs, backend).network
    for name, tensor in model.network.tensors().items():
        np.testing.assert_array_equal(again.tensors()[name], tensor)
    if what != "argmax of two":  # scikit-learn would train a single output
        theirs.partial_fit(INPUTS, theirs.predict(INPUTS))
        assert theirs.n_iter_ == 1


def test_every_decision_is_exchanged() -> None:
    assert set(OUTPUT) <= set(MODELS)


def test_classes_by_other_names() -> None:
    model = model_of([3, 2], ["softmax"], Task("argmax", ("big", "small")))
    assert set(to_sklearn(model, classes=[False, True]).predict(INPUTS)) == {False, True}
    swapped = model_of([3, 2], ["softmax"], Task("argmax", ("small", "big")))
    with pytest.raises(UserError, match=r"needs 2 classes in ascending order, not \['small', 'big'\]"):
        to_sklearn(swapped)
    with pytest.raises(UserError, match=r"needs 2 classes in ascending order, not \[1\]"):
        to_sklearn(model, classes=[1])


def prepared(**changed: Any) -> Model:
    model = model_of([3, 1], ["identity"])
    return Model(model.network, Preparation(Task("none"), **{"shift": (0.0,) * 3, "scale": (1.0,) * 3, **changed}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: prepared(scale=(1.0, 2.0, 1.0)), 'take them as they are; train on arrays with scaling "none"'),
        (lambda: model_of([3, 4, 1], ["gelu", "identity"]), "no hidden layers of gelu; known: identity, logistic, "),
        (lambda: model_of([3, 4, 4, 1], ["tanh", "relu", "identity"]), "for all hidden layers, not tanh, relu"),
        (lambda: model_of([3, 4, 1], ["tanh", "identity"], normalise=True), "neither layer normalisation nor"),
        (lambda: model_of([3, 3, 1], ["tanh", "identity"], residual=True), "neither layer normalisation nor"),
        (lambda: model_of([3, 1], ["tanh"]), "no outputs of tanh for a regression decided by 'none'"),
        (lambda: model_of([3, 1], ["tanh"], Task("sign")), "no outputs of tanh for a classification decided by 'sign'"),
        (lambda: model_of([3, 2], ["logistic"], Task("argmax")), "no outputs of logistic for a classification"),
    ],
)
def test_what_scikit_learn_has_not(make: Callable[[], Model], message: str) -> None:
    with pytest.raises(UserError) as caught:
        to_sklearn(make())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_from_scikit_learn() -> None:
    with pytest.raises(UserError, match="a fitted MLPClassifier or MLPRegressor is needed, not a BernoulliRBM"):
        from_sklearn(neural_network.BernoulliRBM())
    with pytest.raises(UserError, match="this MLPRegressor is not fitted; call its fit first"):
        from_sklearn(MLPRegressor())
    poisson = fitted(MLPRegressor, np.abs(SCORE), loss="poisson", max_iter=1)
    with pytest.raises(UserError, match="the outputs of this MLPRegressor are exp; known: identity, logistic, softmax"):
        from_sklearn(poisson)


def sequential(normalise: bool, biases: bool) -> Any:
    """PyTorch's counterpart of `model_of([3, 5, 4, 2], ["relu", "tanh", "softmax"])`."""
    nn, modules = torch.nn, []
    for n_in, n_out, phi in ((3, 5, nn.ReLU()), (5, 4, nn.Tanh())):
        linear = nn.Linear(n_in, n_out, bias=biases and not normalise)
        modules += [linear, *([nn.LayerNorm(n_out, bias=biases)] if normalise else []), phi]
    return nn.Sequential(*modules, nn.Linear(4, 2, bias=biases), nn.Softmax(dim=1)).double()


@pytest.mark.parametrize("what", NETWORKS)
def test_pytorch(backend: Backend, what: str, tmp_path: Path) -> None:
    """The same outputs in PyTorch of what was written here, and here of what PyTorch wrote."""
    options, _ = NETWORKS[what]
    module = sequential(options.get("normalise", False), options.get("biases", True))
    fresh = tmp_path / "theirs.safetensors"
    safetensors.save_file(module.state_dict(), fresh)
    inputs = torch.tensor(INPUTS)
    theirs = load_state_dict(fresh, ["relu", "tanh", "softmax"], backend=backend)
    np.testing.assert_allclose(theirs.network.predict(INPUTS), module(inputs).detach().numpy(), rtol=0, atol=1e-12)
    model = model_of([3, 5, 4, 2], ["relu", "tanh", "softmax"], backend=backend, **options)
    save_state_dict(model, tmp_path / "ours.safetensors")
    module.load_state_dict(safetensors.load_file(tmp_path / "ours.safetensors"))
    np.testing.assert_allclose(model.network.predict(INPUTS), module(inputs).detach().numpy(), rtol=0, atol=1e-12)
