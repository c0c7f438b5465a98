"""Exchange with scikit-learn and PyTorch: the one's multilayer perceptrons, the other's state_dicts.

Both keep the same numbers in other places: `coefs_` of scikit-learn are our weights transposed, the weight of a
`torch.nn.Linear` is ours as it is. Neither is imported before it is needed, and a state_dict needs no PyTorch.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpu_bp import registry
from gpu_bp.backends import Backend
from gpu_bp.data.preparation import Preparation
from gpu_bp.data.task import Decision, Task
from gpu_bp.errors import UserError
from gpu_bp.model import Model
from gpu_bp.network import Network, layout_of
from gpu_bp.spec import Activation, RowActivation
from gpu_bp.state_dict import by_layer, our_names, their_names
from gpu_bp.tensor_file import read_shapes, read_tensors, write_tensors

# What scikit-learn has, under the same names: of hidden layers, and of outputs by how they are decided.
HIDDEN = ("identity", "logistic", "tanh", "relu")
OUTPUT: dict[Decision, str] = {"none": "identity", "half": "logistic", "argmax": "softmax"}


def from_sklearn(estimator: Any, backend: Backend | None = None) -> Model:
    """A fitted MLPClassifier or MLPRegressor as a model with the same parameters, to the bit.

    The names of classes become strings, as those of a table are. The precision is that of `coefs_`; the backend is
    NumPy by default.

    Raises:
        UserError: scikit-learn is missing; or the estimator is another, is not fitted, or ends in another activation.
    """
    perceptrons = _sklearn("neural_network")
    name = type(estimator).__name__
    if not isinstance(estimator, perceptrons.MLPClassifier | perceptrons.MLPRegressor):
        raise UserError(f"a fitted MLPClassifier or MLPRegressor is needed, not a {name}")
    if not hasattr(estimator, "coefs_"):
        raise UserError(f"this {name} is not fitted; call its fit first")
    output = estimator.out_activation_
    decisions = {activation: decision for decision, activation in OUTPUT.items()}
    if output not in decisions:
        raise UserError(f"the outputs of this {name} are {output}; known: {', '.join(decisions)}")
    labels = output == "logistic" and estimator.n_outputs_ > 1  # several a row, which have no names
    classes = () if output == "identity" or labels else tuple(map(str, estimator.classes_))
    tensors = {f"layers.{k}.weights": coefs.T for k, coefs in enumerate(estimator.coefs_)}
    tensors |= {f"layers.{k}.biases": intercepts for k, intercepts in enumerate(estimator.intercepts_)}
    network = _network(tensors, [*[estimator.activation] * (len(estimator.coefs_) - 1), output], backend)
    network.load(tensors)
    return _raw(network, Task(decisions[output], classes))


def to_sklearn(model: Model, *, classes: Sequence[Any] | None = None) -> Any:
    """A model as a fitted MLPRegressor or MLPClassifier with the same parameters, which predicts at once.

    Args:
        classes: in the order of the outputs; by default the task's names, as integers where all of them are, or else
            0, 1, ...

    Raises:
        UserError: scikit-learn is missing, or has no estimator that gives the same outputs (why).
    """
    perceptrons = _sklearn("neural_network")
    network, preparation = model.network, model.preparation
    *hidden, output = (registry.name_of(layer.activation)[0] for layer in network.layers)
    decision = preparation.task.decision
    if preparation.columns is not None or preparation.scales or preparation.target_shift:
        raise UserError(
            "the model prepares its data (a table's, or as data.scaling and target_scaling say), and scikit-learn's "
            'perceptrons take them as they are; train on arrays with scaling "none", and prepare them before'
        )
    if model.loss.groups > 1:
        raise UserError(f"scikit-learn's perceptrons have one output a target, and loss {model.loss.name} several")
    if network.normalise or network.residual:
        raise UserError("scikit-learn's perceptrons have neither layer normalisation nor shortcuts")
    if unknown := set(hidden) - set(HIDDEN):
        raise UserError(f"scikit-learn has no hidden layers of {sorted(unknown)[0]}; known: {', '.join(HIDDEN)}")
    if len(set(hidden)) > 1:
        raise UserError(f"scikit-learn has one activation for all hidden layers, not {', '.join(hidden)}")
    if OUTPUT.get(decision) != output:
        raise UserError(
            f"scikit-learn has no outputs of {output} for a {preparation.task.kind} decided by {decision!r}; it has "
            "identity for a regression, logistic for two classes or several labels, softmax for classes"
        )
    chosen = {"hidden_layer_sizes": tuple(network.widths[1:-1]), "activation": hidden[0] if hidden else "identity"}
    if decision == "none":
        estimator = perceptrons.MLPRegressor(**chosen)
    else:
        estimator = perceptrons.MLPClassifier(**chosen)
        binarizer = estimator._label_binarizer = _binarizer(preparation.task, network.widths[-1], classes)
        estimator.classes_ = binarizer.classes_
    tensors, n_layers = network.tensors(), len(network.layers)
    estimator.coefs_ = [np.ascontiguousarray(tensors[f"layers.{k}.weights"].T) for k in range(n_layers)]
    zeros = [np.zeros(width, network.dtype) for width in network.widths[1:]]
    estimator.intercepts_ = [tensors.get(f"layers.{k}.biases", zeros[k]) for k in range(n_layers)]
    estimator.n_features_in_, estimator.n_outputs_ = network.widths[0], network.widths[-1]
    estimator.n_layers_, estimator.out_activation_ = n_layers + 1, output
    # of a training that has not begun, so that one may go on with partial_fit
    estimator.n_iter_ = estimator.t_ = estimator._no_improvement_count = 0
    estimator.loss_curve_, estimator.best_loss_ = [], np.inf
    return estimator


def save_state_dict(model: Model, path: str | Path) -> None:
    """Writes the parameters as a state_dict of a `torch.nn.Sequential`, in safetensors.

    Its modules are Linear, phi, Linear, phi, ...; where layers are normalised Linear(bias=False), LayerNorm, phi.

    Raises:
        UserError: shortcuts, which a Sequential has not.
        OSError: the file cannot be written (which).
    """
    network = model.network
    if network.residual:
        raise UserError("a torch.nn.Sequential has no shortcuts; this network has (residual)")
    tensors = network.tensors()
    write_tensors(Path(path), {theirs: tensors[ours] for ours, theirs in their_names(network).items()})


def load_state_dict(
    path: str | Path,
    activations: Sequence[str | Activation | RowActivation],
    *,
    task: Task | None = None,
    backend: Backend | None = None,
) -> Model:
    """The model of a state_dict in a safetensors or .npz file, whose tensors say how wide the layers are.

    Args:
        activations: one a layer, the output's last; a state_dict does not name them.
        task: how outputs are decided; by default it is a regression.
        backend: NumPy by default.

    Raises:
        UserError: no such file, or tensors that are not the layers of a network (which, and what would be right).
    """
    shapes = read_shapes(Path(path))
    try:
        names = our_names(shapes)
        layout = layout_of(**_architecture({ours: shapes[name] for ours, name in names.items()}))
        by_layer(layout, shapes)  # before anything is read or made
        read = read_tensors(Path(path), names.values())
        tensors = {ours: read[name] for ours, name in names.items()}
        network = _network(tensors, activations, backend)
        network.load(tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return _raw(network, task or Task("none"))


def _network(
    tensors: dict[str, np.ndarray], activations: Sequence[str | Activation | RowActivation], backend: Backend | None
) -> Network:
    """A network as wide as these tensors, and of the widest of their precisions."""
    dtype = "float64" if any(tensor.dtype == np.float64 for tensor in tensors.values()) else "float32"
    architecture = _architecture({name: tensor.shape for name, tensor in tensors.items()})
    return Network(activations=activations, backend=backend, dtype=dtype, **architecture)


def _architecture(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The widths of a network with tensors of these shapes, and whether it has biases and is normalised."""
    weights = [shape for name, shape in shapes.items() if name.endswith(".weights")]
    if not weights:
        raise UserError("there are no tensors")
    return {
        "widths": [weights[0][1], *(shape[0] for shape in weights)],
        "biases": "layers.0.biases" in shapes,
        "normalise": "layers.0.gains" in shapes,
    }


def _raw(network: Network, task: Task) -> Model:
    """The model of a network that takes its inputs as they are."""
    n_inputs = network.widths[0]
    return Model(network, Preparation(task, shift=(0.0,) * n_inputs, scale=(1.0,) * n_inputs))


def _binarizer(task: Task, n_outputs: int, classes: Iterable[Any] | None) -> Any:
    """scikit-learn's LabelBinarizer for the classes of a task, or for several labels a row."""
    binarizer = _sklearn("preprocessing").LabelBinarizer()
    if task.decision == "half" and n_outputs > 1:
        return binarizer.fit(np.eye(n_outputs, dtype=int))
    n = max(2, n_outputs)
    names = list(task.classes or range(n) if classes is None else classes)
    if classes is None and all(re.fullmatch("0|-?[1-9][0-9]*", str(name)) for name in names):
        names = [int(name) for name in names]
    binarizer.fit(names)
    if len(names) != n or binarizer.classes_.tolist() != np.array(names).tolist():
        raise UserError(f"scikit-learn needs {n} classes in ascending order, not {names}; name them in `classes`")
    return binarizer


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ModuleNotFoundError as error:
        raise UserError(f"this needs scikit-learn: pip install scikit-learn ({error})") from None
