"""Config files: what is read, what is refused and in which words, and that a resolved file means the same."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from conftest import ROOT

from gpu_bp import Config, UserError, dump_config, load_config, parse_config
from gpu_bp.spec import Activation

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
MINIMAL = """
[data]
kind = "xor"
[optimizer]
learning_rate = 0.5
[train]
epochs = 3
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_resolved_config_means_the_same(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = tmp_path / "again.toml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert config.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_admits_the_configs(path: Path) -> None:
    """Both as they are written and as they are resolved."""
    schema = Config.model_json_schema()
    jsonschema.validate(tomllib.loads(path.read_text()), schema)
    jsonschema.validate(tomllib.loads(dump_config(load_config(path))), schema)


def test_the_schema_refuses_what_the_config_refuses() -> None:
    schema = Config.model_json_schema()
    for fault in ({"network": {"hiden": [3]}}, {"train": {"epochs": 0}}, {"data": {"kind": "moon"}}):
        raw = tomllib.loads(MINIMAL)
        for name, section in fault.items():
            raw[name] = {**raw.get(name, {}), **section}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(raw, schema)


def test_defaults(minimal: Path) -> None:
    config = load_config(minimal)
    assert (config.seed, config.loss.kind, config.optimizer.kind) == (0, "squared_error", "sgd")
    assert config.output_activation().name == "identity"
    assert load_config(minimal, ["loss.kind=binary_cross_entropy"]).output_activation().name == "logistic"
    assert json.loads(json.dumps(config.model_dump()))["train"]["precision"] == "float32"


def test_overrides(minimal: Path) -> None:
    """VALUE is TOML; what is not is a string."""
    config = load_config(
        minimal,
        [
            "network.hidden=[64,64]",
            "network.activation=relu",
            'network.output_activation={kind="leaky_relu", slope=0.2}',
            "seed=7",
            'loss.kind="huber"',
            "loss.threshold=2",
            "optimizer={kind='adam', learning_rate=1e-3, betas=[0.8,0.99]}",
            "network.biases=false",
        ],
    )
    assert config.network.hidden == [64, 64]
    assert [record.name for record in config.network.hidden_activations()] == ["relu", "relu"]
    output = config.output_activation()
    assert isinstance(output, Activation)
    assert (output.name, dict(output.values)) == ("leaky_relu", {"slope": 0.2})
    assert dict(config.loss.record().values) == {"threshold": 2.0}
    assert config.optimizer.record().values["betas"] == (0.8, 0.99)
    assert config.seed == 7
    assert not config.network.biases


def test_one_activation_a_layer(minimal: Path) -> None:
    config = load_config(minimal, ["network.hidden=[3,2]", 'network.activation=["relu", {kind="elu", alpha=0.5}]'])
    assert [record.name for record in config.network.hidden_activations()] == ["relu", "elu"]


def test_paths_become_absolute(in_tmp: Path) -> None:
    raw = tomllib.loads(MINIMAL) | {"data": {"kind": "table", "path": "d/t.csv", "target_columns": ["y"]}}
    raw["network"] = {"weights": {"kind": "file", "path": "w.safetensors"}}
    config = parse_config(raw).model_dump()
    assert config["data"]["path"] == str(in_tmp / "d/t.csv")
    assert config["network"]["weights"][0]["path"] == str(in_tmp / "w.safetensors")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network.hiden=[3]", "unknown key network.hiden; did you mean network.hidden? known: "),
        ("trian.epochs=3", "unknown key trian; did you mean train? known: "),
        ("data.row=3", "unknown key data.row; did you mean data.rows? known: "),
        (
            "network.weights={kind='normal', sdd=1, sd=1}",
            "unknown key network.weights.sdd; did you mean network.weights.sd?",
        ),
        ("data.kind=xr", "data.kind: unknown 'xr'; did you mean xor? known: double-moon, xor, "),
        ("network.weights=glorott", "network.weights.kind: unknown 'glorott'; did you mean glorot? known: uniform, "),
        ("train.sampling=shufled", "train.sampling: unknown 'shufled'; did you mean shuffled? known: "),
        ("train.precision=float8", "train.precision: unknown 'float8'; did you mean float"),
        ("network.activation=tan", "unknown activation 'tan'; did you mean tanh? known: "),
        ("loss.kind=square_error", "loss: unknown loss 'square_error'; did you mean squared_error? known: "),
        ("optimizer.kind=adamm", "optimizer: unknown optimizer 'adamm'; did you mean adam"),
        ("optimizer.momentum=0.5", "optimizer: sgd has no parameter 'momentum'; known: none"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: input should be greater than 0, not 0"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: input should be"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: input should be a valid number, not 'fast'"),
        ("network.hidden=[3,0]", "network.hidden.1: input should be greater than or equal to 1, not 0"),
        ("network.hidden=3", "network.hidden: input should be a valid list, not 3"),
        ("network.biases=1", "network.biases: input should be a valid boolean, not 1"),
        ("network.activation=softmax", "softmax can only be the output_activation"),
        ("network.activation=['relu','relu','relu']", "network: 3 activations are listed for 0 hidden layers"),
        ("network.output_activation=softmax", "network.output_activation: softmax needs loss.kind = 'cross_entropy'"),
        ("network.weights={kind='uniform', low=1, high=1}", "network.weights: low must be less than high"),
        ("network.weights.kind=normal", "network.weights.sd is missing"),
        ("network.weights=['he','he']", "network: 2 weights are listed for 1 layers, the output's included"),
        ("network.weights=['sprase']", "network.weights.0.kind: unknown 'sprase'; did you mean sparse?"),
        ("network.weights=[[[1,nan]]]", "network.weights.0.0.1: input should be a finite number, not nan"),
        (
            "network.weights=[[[1,2],[3]]]",
            "network.weights.0: the rows of weights must be of one length, not of 1 and 2",
        ),
        ("network.weights={kind='sparse',connections=0}", "network.weights.connections: input should be greater than"),
        ("train.steps=3", "train: give either epochs or steps"),
        ("train.epochs=1.5", "train.epochs: input should be a valid integer, not 1.5"),
        ("schedule.kind=step", "schedule.factor is missing"),
        ("schedule=linaer", "schedule.kind: unknown 'linaer'; did you mean linear?"),
        ("train=3", "train must be a table, not 3"),
        ("data=3", "data"),
        ("name='a/b'", "name: string should match pattern"),
        ("seed=-1", "seed: input should be greater than or equal to 0, not -1"),
        ("optimizer.name=x", "optimizer: sgd has no parameter 'name'; known: none"),
        (
            "loss={kind='huber', threshold=1" + "0" * 400 + "}",
            "threshold of huber must be a number in (0, inf), not 1000",
        ),
        ("seed=" + "1" * 5000, "override"),
        ("seed=" + "[" * 5000, "override"),
        ("data.rows=" + "9" * 30, "data.rows: input should be"),
        ("network.hidden.0=3", "so it is set as a whole: network.hidden=..."),
        ("epochs", "override 'epochs' is not of the form KEY.PATH=VALUE"),
        ("=3", "override '=3' is not of the form KEY.PATH=VALUE"),
        ("seed.x=3", "override 'seed.x=3': seed is not a table"),
    ],
)
def test_refusals(minimal: Path, override: str, message: str) -> None:
    overrides = ["seed=0", override] if override.startswith("seed.") else [override]
    if override.startswith("network.hidden."):
        overrides.insert(0, "network.hidden=[2]")
    with pytest.raises(UserError) as caught:
        load_config(minimal, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_fused_loss_excludes_other_output_activations(minimal: Path) -> None:
    with pytest.raises(UserError, match="cross_entropy goes with softmax alone, not tanh"):
        load_config(minimal, ["loss.kind=cross_entropy", "network.output_activation=tanh"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "is empty"),
        ("[data\n", "is not TOML"),
        ("a = 1\na = 2\n", r"line 2"),
        (b"\xff\xfe", "is not text in UTF-8: invalid start byte at byte 0"),
        ("x = 3", "unknown key x|is missing"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_the_tiny_config_is_valid(tiny_config: Callable[..., dict[str, Any]]) -> None:
    assert parse_config(tiny_config()).name == "tiny"
