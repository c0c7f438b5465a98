"""Records of one's own: named `module:object` or passed from Python, and never run from a run folder unasked."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gpu_bp
from gpu_bp import Config, Model, NumpyBackend, UserError, dump_config, load_config, own, parse_config, registry
from gpu_bp.cli import main
from gpu_bp.run_folder import RunFolder
from gpu_bp.spec import Activation, FreeLoss, Parameter, Twin, Update

Tiny = Callable[..., dict[str, Any]]

# An activation, a loss and an update as a user would write them; the module notes each time that it is run.
MINE = """
from pathlib import Path
import numpy as np
from gpu_bp import registry
from gpu_bp.spec import Activation, FreeLoss, Parameter, Twin, Update

with open("ran.txt", "a") as file:
    file.write("x")

def _value(v, y, s, slope):
    np.multiply(v, slope, out=y)

def _delta(e, y, delta, s, slope):
    np.multiply(e, slope, out=delta)

swish = Activation(
    name="swish", source="nobody", parameters={"slope": Parameter(0.5)},
    value=Twin("y = slope * v;", _value), delta=Twin("delta = slope * e;", _delta), derivative_from="output",
)
steep = swish.with_parameters(slope=3.0)
tanh = Activation(name="tanh", source="nobody", value=Twin("y = v;", lambda v, y, s: np.copyto(y, v)),
                  delta=Twin("delta = e;", lambda e, y, delta, s: np.copyto(delta, e)), derivative_from="output")
logistic = Activation(name="logistic", source="nobody", value=tanh.value, delta=tanh.delta, derivative_from="output")
bad_name = Activation(name="a b", source="", value=swish.value, delta=swish.delta, derivative_from="output")

def _error(y, d, loss, e, s):
    np.subtract(y, d, out=e)
    np.multiply(e, e, out=loss)
    np.multiply(e, 2, out=e)

square = FreeLoss(name="square", source="nobody", targets="real",
                  error_signal=Twin("const T r = y - d; loss = r * r; e = T(2) * r;", _error))

def _by_sign(w, g, s, rate):
    np.sign(g, out=g)
    g *= rate
    w -= g

class Rules:
    sign = Update(name="sign", source="nobody", scalar_names=("rate",),
                  scalars=lambda step, learning_rate: {"rate": learning_rate},
                  update=Twin("w -= g > T(0) ? rate : (g < T(0) ? -rate : T(0));", _by_sign))

def function():
    pass
"""


@pytest.fixture
def mine(in_tmp: Path) -> Iterator[Path]:
    """A working folder with mine.py in it; what was imported from it is forgotten afterwards."""
    (in_tmp / "mine.py").write_text(MINE)
    before = set(sys.modules)
    yield in_tmp
    for name in set(sys.modules) - before:
        if name == "mine" or name.startswith(("broken", str(in_tmp))):
            del sys.modules[name]


def forget(folder: Path) -> None:
    """As in a new process: nothing is imported, and nothing has run."""
    sys.modules.pop("mine", None)
    (folder / "ran.txt").unlink(missing_ok=True)


def ran(folder: Path) -> bool:
    return (folder / "ran.txt").exists()


def test_load(mine: Path) -> None:
    """One name is one object; the working folder does not stay on the path; the module runs once."""
    before = list(sys.path)
    swish = own.load("mine:swish")
    assert isinstance(swish, Activation)
    assert own.load("mine:swish") is swish
    assert own.load("mine:Rules.sign").name == "sign"  # type: ignore[attr-defined]
    assert own.load("math:pi") == np.pi
    assert (mine / "ran.txt").read_text() == "x"
    by_path = own.load("mine.py:swish")
    assert by_path is own.load(f"{mine}/mine.py:swish") is not swish
    assert (mine / "ran.txt").read_text() == "xx"
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "'mine' is not of the form module:object or path/to/file.py:object"),
        ("mine:", "'mine:' is not of the form"),
        ("nowhere:x", "there is no module 'nowhere', neither installed nor in "),
        ("mine.deeper:x", "there is no module 'mine.deeper'"),
        ("nowhere.py:x", "there is no file "),
        ("mine:swsh", "mine has no object 'swsh'; did you mean swish? known: "),
        ("mine:Rules.sgn", "mine has no object 'Rules.sgn'; did you mean sign? known: sign"),
        ("own:swish", "'own:swish' is a piece that was passed from Python: pass it again, own=[swish]"),
        ("broken:x", "broken could not be imported: ZeroDivisionError: division by zero"),
        ("broken.py:x", "broken.py could not be imported: ZeroDivisionError: division by zero"),
        ("broken_import:x", "broken_import could not be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("broken_exit:x", "broken_exit could not be imported: SystemExit: two lines"),
    ],
)
def test_names_that_cannot_be_loaded(mine: Path, name: str, message: str) -> None:
    (mine / "broken.py").write_text("1 / 0")
    (mine / "broken_import.py").write_text("import nowhere")
    (mine / "broken_exit.py").write_text("import sys; sys.exit('two\\nlines')")
    for _ in range(2):  # a module that failed is not kept
        with pytest.raises(UserError) as caught:
            own.load(name)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert str(mine) not in sys.path


PIECES: dict[str, Any] = {
    "network": {"hidden": [4, 3], "activation": [{"kind": "mine:swish", "slope": 0.2}, "relu"]},
    "loss": {"kind": "mine:square"},
    "optimizer": {"kind": "mine:Rules.sign", "learning_rate": 0.01},
}


def test_names_in_a_config(mine: Path, tiny_config: Tiny) -> None:
    """They choose the records, with parameters, and the resolved file and the schema know them."""
    raw = tiny_config(**PIECES)
    config = parse_config(raw)
    first, second = config.network.hidden_activations()
    assert (first.name, first.values["slope"], first.origin) == ("swish", 0.2, "mine:swish")
    assert (second.name, second.origin) == ("relu", "")
    assert (config.loss.record().name, config.optimizer.record().name) == ("square", "sign")
    (mine / "again.toml").write_text(dump_config(config))
    assert load_config("again.toml") == config
    jsonschema.validate(raw, Config.model_json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tiny_config(loss={"kind": "squared"}), Config.model_json_schema())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"network": {"activation": "mine:function"}},
            "config: network.activation: mine:function is a function, an Activation",
        ),
        (
            {"network": {"output_activation": "mine:square"}},
            "network.output_activation: mine:square is a FreeLoss, an Activ",
        ),
        ({"loss": {"kind": "mine:swish"}}, "config: loss: mine:swish is an Activation, a Loss is needed"),
        ({"optimizer": {"kind": "mine:swish"}}, "config: optimizer: mine:swish is an Activation, an Update is needed"),
        ({"network": {"activation": {"kind": "mine:swish", "slop": 1}}}, "swish has no parameter 'slop'; known: slope"),
        ({"network": {"activation": "mine:bad_name"}}, "the record's name 'a b' must be an identifier"),
        ({"network": {"activation": "nowhere:swish"}}, "network.activation: there is no module 'nowhere'"),
        (
            {"loss": {"kind": "cross_entropy"}, "network": {"output_activation": "mine:tanh"}},
            "cross_entropy goes with softmax alone, not mine:tanh",
        ),
        (
            {"loss": {"kind": "binary_cross_entropy"}, "network": {"output_activation": "mine:logistic"}},
            "binary_cross_entropy goes with logistic alone, not mine:logistic",
        ),
    ],
)
def test_pieces_that_are_refused(mine: Path, tiny_config: Tiny, section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(tiny_config(**section))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_of_files_become_absolute(mine: Path, tiny_config: Tiny) -> None:
    made = parse_config(tiny_config(network={"activation": ["mine.py:swish"]}, loss={"kind": "mine.py:square"}))
    assert made.network.activation[0].kind == f"{mine}/mine.py:swish"
    assert made.loss.kind == f"{mine}/mine.py:square"
    metrics = own.change_names({"train": {"metrics": ["mine.py:f", "mse"]}}, own.absolute)
    assert metrics == {"train": {"metrics": [f"{mine}/mine.py:f", "mse"]}}


def test_names_are_found_wherever_a_piece_may_stand() -> None:
    config = {
        "name": "not:this",
        "network": {"activation": ["a:a", {"kind": "b:b", "slope": 1}], "output_activation": "c:c"},
        "loss": {"kind": "d:d"},
        "optimizer": {"kind": "e:e", "learning_rate": 1},
        "data": {
            "kind": "own",
            "path": "C:not",
            "sources": {"train": "f:f", "test": {"kind": "g:g", "label": "not:this"}},
        },
        "train": {"metrics": ["h:h", "mse"]},
    }
    assert own.names(config) == [f"{name}:{name}" for name in "abcdefgh"]
    assert own.names({"network": 3, "loss": "x:y", "data": None}) == ["x:y"]


def test_a_config_that_an_own_name_is_equal_to_one_of_the_package(mine: Path, tiny_config: Tiny) -> None:
    config = parse_config(tiny_config(network={"activation": ["mine:tanh"]}))
    assert config.network.hidden_activations()[0].value.cuda == "y = v;"


def test_a_run_is_read_only_with_trust(mine: Path, tiny_config: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing that a run folder names is imported unless it is trusted: neither by evaluate nor by predict."""
    raw = tiny_config(**PIECES)
    summary = gpu_bp.train(raw, backend="numpy", run="run", pictures=False).summary
    np.save("x.npy", np.zeros((2, 2)))
    forget(mine)
    for command in (["evaluate", "run"], ["predict", "run", "x.npy"]):
        with pytest.raises(SystemExit) as exited:
            main([*command, "--backend", "numpy"])
        assert exited.value.code == 2
        message = capsys.readouterr().err
        assert "names code, mine:swish, which runs when it is read: where you trust it, say --trust-code" in message
    backend, folder = NumpyBackend(), RunFolder.open(Path("run"))
    for read in (
        lambda: gpu_bp.evaluate("run", backend="numpy"),
        lambda: Model.load(folder.model_file, backend),
        folder.config,
    ):
        with pytest.raises(UserError, match="from Python trust_code=True"):
            read()
    assert not ran(mine)
    evaluated = gpu_bp.evaluate("run", backend="numpy", trust_code=True)
    assert evaluated == {name: summary[name] for name in evaluated}
    assert ran(mine)
    main_output = []
    for command in (["evaluate", "run"], ["predict", "run", "x.npy"]):
        with pytest.raises(SystemExit) as exited:
            main([*command, "--backend", "numpy", "--trust-code"])
        assert exited.value.code == 0
        main_output.append(capsys.readouterr().out)
    assert all(main_output)


def test_each_place_needs_trust(mine: Path, tiny_config: Tiny) -> None:
    """A config that names code in one place alone."""
    sections: list[dict[str, Any]] = [
        {"network": {"activation": "mine:swish"}},
        {"network": {"output_activation": {"kind": "mine:swish"}}},
        {"loss": {"kind": "mine:square"}},
        {"optimizer": {"kind": "mine:Rules.sign"}},
        {"train": {"metrics": ["mine:metric"]}},
        {"data": {"kind": "own", "sources": {"train": "mine:Rows"}}},
    ]
    for section in sections:
        with pytest.raises(UserError, match="config names code, mine:"):
            parse_config(tiny_config(**section), trust_code=False)
    assert not ran(mine)


def test_the_package_itself_needs_no_trust(in_tmp: Path, tiny_config: Tiny) -> None:
    gpu_bp.train(tiny_config(), backend="numpy", run="run", pictures=False)
    gpu_bp.evaluate("run", backend="numpy")


# records that are passed from Python ----------------------------------------------------------------------------


def doubled(factor: float = 2.0) -> Activation:
    """A record that no module holds."""

    def value(v: Any, y: Any, s: Any, factor: float) -> None:
        np.multiply(v, factor, out=y)

    def delta(e: Any, y: Any, delta: Any, s: Any, factor: float) -> None:
        np.multiply(e, factor, out=delta)

    return Activation(
        name="doubled",
        source="nobody",
        parameters={"factor": Parameter(2.0)},
        values={"factor": factor},
        value=Twin("y = factor * v;", value),
        delta=Twin("delta = factor * e;", delta),
        derivative_from="output",
    )


def test_records_that_a_module_holds(mine: Path, tiny_config: Tiny) -> None:
    """Passed as they are, they are named by their module, and read again with trust or when they are passed."""
    swish, steep, square, sign = (own.load(f"mine:{name}") for name in ("swish", "steep", "square", "Rules.sign"))
    assert isinstance(swish, Activation)
    assert isinstance(steep, Activation)
    assert isinstance(square, FreeLoss)
    assert isinstance(sign, Update)
    raw = tiny_config(
        network={"activation": steep, "output_activation": {"kind": swish, "slope": 0.25}}, loss={"kind": square}
    )
    config = parse_config(raw)
    assert config.network.activation[0].model_dump() == {"kind": "mine:swish", "slope": 3.0}
    assert config.network.output_activation.model_dump() == {"kind": "mine:swish", "slope": 0.25}  # type: ignore[union-attr]
    assert config.loss.kind == "mine:square"
    gpu_bp.train(raw, backend="numpy", run="run", pictures=False)
    trusted = gpu_bp.evaluate("run", backend="numpy", trust_code=True)
    assert gpu_bp.evaluate("run", backend="numpy", own=[swish, square]) == trusted
    with pytest.raises(UserError, match="names code, mine:square"):
        gpu_bp.evaluate("run", backend="numpy", own=[swish])


def test_records_that_no_module_holds(in_tmp: Path, tiny_config: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """The run names them own:NAME with their values, and wants them again."""
    record = doubled(1.5)
    made = gpu_bp.train(tiny_config(network={"activation": [record]}), backend="numpy", run="run", pictures=False)
    written = tomllib.loads(Path("run/config.toml").read_text())
    assert written["network"]["activation"] == [{"kind": "own:doubled", "factor": 1.5}]
    for trust in (False, True):
        with pytest.raises(UserError, match=r"'own:doubled' is a piece .* pass it again, own=\[doubled\]"):
            gpu_bp.evaluate("run", backend="numpy", trust_code=trust)
    evaluated = gpu_bp.evaluate("run", backend="numpy", own=[doubled()])  # with its default: the run has the values
    assert evaluated == {name: made.summary[name] for name in evaluated}
    model = Model.load(Path("run/model.safetensors"), NumpyBackend(), own=[doubled()])
    assert model.network.layers[0].activation.values["factor"] == 1.5
    with pytest.raises(UserError, match="own:doubled is an Activation, a Loss is needed"):
        parse_config(tiny_config(loss={"kind": "own:doubled"}), own=[record])


def test_records_of_the_package_keep_their_names(tiny_config: Tiny) -> None:
    chosen = registry.activation("leaky_relu", slope=0.3)
    config = parse_config(tiny_config(network={"activation": [chosen]}, loss={"kind": registry.loss("huber")}))
    assert config.network.activation[0].model_dump() == {"kind": "leaky_relu", "slope": 0.3}
    assert config.loss.model_dump(exclude_none=True) == {"kind": "huber", "threshold": 1.0}


def test_records_of_a_script(mine: Path) -> None:
    """What __main__ holds cannot be imported under that name."""
    script = "import mine; from gpu_bp import own; twin = mine.swish; print(own.name_of(twin)[0])"
    held = MINE + "\nfrom gpu_bp import own; print(own.name_of(swish)[0])"
    for text, wanted in ((script, "mine:swish"), (held, "own:swish")):
        (mine / "script.py").write_text(text)
        for how in (["script.py"], ["-m", "script"]):
            done = subprocess.run([sys.executable, *how], capture_output=True, text=True, check=True)
            assert done.stdout == f"{wanted}\n"


@pytest.mark.parametrize("name", ["own:mine:swish", "own:mine.py:swish", "own:x/mine.py:swish", "own:a:own:mine:swish"])
def test_no_name_is_taken_for_a_piece_that_was_passed(mine: Path, tiny_config: Tiny, name: str) -> None:
    """`own:NAME` is that alone: whatever else begins so is a module's, or a file's, and needs trust."""
    for section in (
        {"network": {"activation": name}},
        {"train": {"metrics": [name]}},
        {"data": {"kind": "own", "sources": {"train": name}}},
    ):
        with pytest.raises(UserError, match="names code, .*say --trust-code"):
            parse_config(tiny_config(**section), trust_code=False)
    gpu_bp.train(tiny_config(), backend="numpy", run="run", pictures=False)
    path = Path("run/model.safetensors")
    with safe_open(path, framework="numpy") as file:
        description = json.loads(file.metadata()["gpu_bp"])
    description["activations"][0] = {"kind": name}
    save_file(load_file(path), path, metadata={"gpu_bp": json.dumps(description)})
    with pytest.raises(UserError, match="names code, .*say --trust-code"):
        Model.load(path, NumpyBackend())
    assert not ran(mine)


def test_a_changed_record_of_the_package_is_one_of_ones_own(tiny_config: Tiny, in_tmp: Path) -> None:
    """Whatever its name: the model of it wants it passed again."""
    changed = replace(
        registry.activation("leaky_relu"),
        value=Twin("y = slope * v;", lambda v, y, s, slope: np.multiply(v, slope, out=y)),
    )
    assert registry.name_of(changed)[0] == "own:leaky_relu"
    config = tiny_config(network={"activation": changed})
    made = gpu_bp.train(config, backend="numpy", run="run", pictures=False).model
    path, inputs = Path("run/model.safetensors"), np.ones((3, 2))
    with pytest.raises(UserError, match=r"pass it again, own=\[leaky_relu\]"):
        Model.load(path, NumpyBackend())
    again = Model.load(path, NumpyBackend(), own=[changed])
    np.testing.assert_array_equal(again.network.predict(inputs), made.network.predict(inputs))


def test_two_pieces_of_one_name(tiny_config: Tiny) -> None:
    """They cannot be told apart, unless they are one formula."""
    one, two = doubled(1.5), doubled(1.5)  # each with functions of its own
    assert parse_config(tiny_config(network={"activation": "own:doubled"}), own=[one, one.with_parameters(factor=2)])
    with pytest.raises(UserError, match="two pieces that were passed are called own:doubled; give one of them another"):
        parse_config(tiny_config(network={"activation": "own:doubled"}), own=[one, two])


def test_a_piece_passed_stands_for_each_of_its_names(mine: Path, tiny_config: Tiny) -> None:
    """Of the module, of the file, and by another path to it; where it is not passed, nothing is imported for it."""
    swish, square = own.load("mine:swish"), own.load("mine:square")
    for name in ("mine:swish", f"{mine / 'mine.py'}:swish", "x/../mine.py:swish"):
        raw = tiny_config(network={"activation": name})
        assert parse_config(raw, own=[swish], trust_code=False).network.activation[0].record() is not None
        with pytest.raises(UserError, match="names code"):
            parse_config(raw, own=[square], trust_code=False)
