"""Sources of one's own, given from Python, `gpu_bp.train(config, sources=...)`, or named in data.sources."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import gpu_bp
from gpu_bp import Batch, NumpyBackend, Source, Task, Trainer, UserError, registry
from gpu_bp.backends import Backend
from gpu_bp.cli import main
from gpu_bp.data import load_data, own_data
from gpu_bp.spec import Loss

Tiny = Callable[..., dict[str, Any]]


class Waves(Source):
    """A sine of two inputs, or with `classes` its sign as a class."""

    def __init__(self, n_rows: int, first: int = 0, *, classes: bool = False, n_inputs: int = 2) -> None:
        task = Task("argmax", ("low", "high")) if classes else Task("none")
        super().__init__(n_rows, n_inputs, 2 if classes else 1, task, indexed=classes, block_rows=8)
        self.first = first

    def fill(self, rows: Any, batch: Batch) -> None:
        numbers = np.sin(np.multiply.outer(rows + self.first, np.arange(1.0, self.n_inputs + 1)))
        wanted = np.sin(3 * numbers[:, :1])
        batch.inputs[:] = numbers
        batch.targets[:] = wanted[:, 0] > 0 if self.indexed else wanted


class Broken(Waves):
    """Fails at row 100."""

    def __init__(self, error: Exception) -> None:
        super().__init__(200)
        self.error = error

    def fill(self, rows: Any, batch: Batch) -> None:
        if 100 in rows:
            raise self.error
        super().fill(rows, batch)


def splits(**keywords: Any) -> dict[str, Source]:
    return {
        "train": Waves(200, **keywords),
        "validation": Waves(50, 200, **keywords),
        "test": Waves(60, 250, **keywords),
    }


@pytest.fixture
def own(tiny_config: Tiny) -> Tiny:
    """A config of data of one's own, with sections changed."""

    def make(classes: bool = False, **sections: Any) -> dict[str, Any]:
        made = tiny_config(loss={"kind": "cross_entropy" if classes else "squared_error"}, **sections)
        return {**made, "data": {"kind": "own", **sections.get("data", {})}}

    return make


@pytest.mark.parametrize("classes", [False, True])
def test_own_sources(
    backend: Backend, own: Tiny, in_tmp: Path, capsys: pytest.CaptureFixture[str], classes: bool
) -> None:
    """Trained in windows or resident, evaluated again, drawn, and asked for predictions."""
    for residency in ("host", "device"):
        small = {"residency": residency, "block_rows": 8, "window_blocks": 5}
        sources, run = splits(classes=classes), in_tmp / residency
        result = gpu_bp.train(own(classes, data=small), sources=sources, backend=backend, run=run)
        assert {name: result.summary[name]["rows"] for name in sources} == {"train": 200, "validation": 50, "test": 60}
        assert {path.name for path in result.pictures} >= {"curves.png", "boundary.png"}
        again = gpu_bp.evaluate(run, sources=sources, backend=backend)
        assert again == {name: result.summary[name] for name in sources}
        inputs = np.random.default_rng(0).standard_normal((5, 2))
        np.save("x.npy", inputs)
        names, columns = result.model.predict(Path("x.npy"))
        assert names == (["class", "p_low", "p_high"] if classes else ["y"])
        assert len(columns[0]) == 5
    with pytest.raises(SystemExit) as exited:
        main(["evaluate", "host", "--backend", "numpy"])
    assert exited.value.code == 2
    assert capsys.readouterr().err == (
        'error: data.kind is own: sources are needed: name them, data.sources.train = "module:object", or give them '
        "from Python, gpu_bp.train(config, sources=...), gpu_bp.evaluate(run, sources=...)\n"
    )


def test_own_sources_in_order_do_not_depend_on_the_residency(own: Tiny, tmp_path: Path) -> None:
    outcomes = []
    for data in ({"residency": "device"}, {"residency": "host", "block_rows": 8, "window_blocks": 3}):
        made = own(data=data, train={"sampling": "ordered"})
        run = tmp_path / data["residency"]  # type: ignore[operator]
        outcomes.append(gpu_bp.train(made, sources=splits(), backend="numpy", run=run, pictures=False))
    for name, tensor in outcomes[0].model.network.tensors().items():
        np.testing.assert_array_equal(tensor, outcomes[1].model.network.tensors()[name])


def test_a_training_reads_each_row_once_an_epoch(own: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead into the next epoch, but not beyond the last."""
    asked: list[int] = []
    fill = Waves.fill
    monkeypatch.setattr(
        Waves, "fill", lambda self, rows, batch: [asked.append(int(rows[0])), fill(self, rows, batch)][1]
    )
    data = {"residency": "host", "block_rows": 8, "window_blocks": 5}
    config = gpu_bp.parse_config(own(data=data, train={"sampling": "ordered"}))
    backend = NumpyBackend()
    trainer = Trainer(config, backend, own_data({"train": Waves(200)}, config.loss.record(), backend))
    list(trainer.run())
    assert asked == [*range(0, 200, 40)] * 2


def of_another_backend() -> Source:
    source = Waves(9)
    source.backend = NumpyBackend()
    return source


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (None, "data.kind is own: sources are needed: name them, data.sources.train = "),
        ({}, "sources must be named train, and perhaps validation and test, not none at all"),
        ({"training": Waves(9)}, "must be named train, and perhaps validation and test, not training"),
        ({"train": Waves(9), "tset": Waves(9)}, "and perhaps validation and test, not train, tset"),
        ({"train": Waves(1.5)}, "the train source must have a row or more, not n_rows = 1.5"),  # type: ignore[arg-type]
        ({"train": np.ones((9, 2))}, "the train source must be a gpu_bp.Source, not ndarray"),
        ({"train": Waves(0)}, "the train source must have a row or more, not n_rows = 0"),
        ({"train": Waves(9), "test": Waves(0)}, "the test source must have a row or more, not n_rows = 0"),
        (
            {"train": Waves(9), "test": Waves(9, n_inputs=3)},
            "the test source has 3 inputs and 1 targets a row, task none, and the train source 2 inputs and 1 targets",
        ),
        ({"train": Waves(9, classes=True)}, "targets are class indices, which loss squared_error does not take"),
        ({"train": of_another_backend()}, "the train source is of another backend than the network's"),
    ],
)
def test_sources_that_are_refused(own: Tiny, in_tmp: Path, sources: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        gpu_bp.train(own(), sources=sources, backend="numpy")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(in_tmp.iterdir()), "a training that never began leaves no folder"


@pytest.mark.parametrize(
    ("decision", "loss", "message"),
    [
        ("sign", registry.loss("quantile"), "task is a classification, and loss quantile is for regressions"),
        ("none", registry.loss("cross_entropy", label_smoothing=0.1), "a regression, and label_smoothing is for class"),
    ],
)
def test_losses_that_do_not_go_with_the_task(decision: Any, loss: Loss, message: str) -> None:
    source = Waves(9)
    source.task = Task(decision)
    with pytest.raises(UserError, match=message):
        own_data({"train": source}, loss, NumpyBackend())


def test_sources_for_other_data(own: Tiny, tiny_config: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sources are given, so data.kind must be own, not double-moon"):
        gpu_bp.train(tiny_config(), sources=splits(), backend="numpy")
    with pytest.raises(UserError, match="validation and test rows are sources of their own, not numbers of rows"):
        gpu_bp.train(own(data={"test_rows": 5}), sources=splits(), backend="numpy")
    gpu_bp.train(tiny_config(), backend="numpy", run=tmp_path / "moon", pictures=False)
    with pytest.raises(UserError, match="sources are given, so data.kind must be own, not double-moon"):
        gpu_bp.evaluate(tmp_path / "moon", sources=splits(), backend="numpy")
    gpu_bp.train(own(), sources=splits(), backend="numpy", run=tmp_path / "own", pictures=False)
    with pytest.raises(UserError, match="takes 2 inputs and gives 1 outputs; .* need 3 inputs and 1 outputs"):
        gpu_bp.evaluate(tmp_path / "own", sources={"train": Waves(9, n_inputs=3)}, backend="numpy")


class Wrong(Waves):
    """Row 100 is not as it promises: in one of the arrays it has that value."""

    def __init__(self, array: str, value: float, *, classes: bool = False) -> None:
        super().__init__(200, classes=classes)
        self.weighted = array == "weights"
        self.array, self.value = array, value

    def fill(self, rows: Any, batch: Batch) -> None:
        super().fill(rows, batch)
        if batch.weights is not None:
            batch.weights[:] = 1
        getattr(batch, self.array)[rows == 100] = self.value


@pytest.mark.parametrize("residency", ["host", "device"])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Wrong("inputs", np.nan), "row 100 of the train source has inputs that are not finite"),
        (Wrong("targets", np.inf), "row 100 of the train source has targets that are not finite"),
        (Wrong("targets", 2, classes=True), "row 100 of the train source has a class that is none of 0 to 1"),
        (Wrong("targets", -1, classes=True), "row 100 of the train source has a class that is none of 0 to 1"),
        (Wrong("weights", -1.0), "row 100 of the train source has a weight that is negative or not finite"),
        (Wrong("weights", np.nan), "row 100 of the train source has a weight that is negative or not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_that_are_not_as_promised(own: Tiny, in_tmp: Path, source: Wrong, message: str, residency: str) -> None:
    config = own(source.indexed, data={"residency": residency})
    with pytest.raises(UserError, match=message):
        gpu_bp.train(config, sources={"train": source}, backend="numpy", run="run")


@pytest.mark.parametrize("residency", ["host", "device"])
def test_errors_of_a_source_are_its_own(own: Tiny, tmp_path: Path, residency: str) -> None:
    """What is for the user to mend stays so; a fault in the source's code is not hidden. Metrics are kept."""
    made = own(
        data={"residency": residency, "block_rows": 8, "window_blocks": 3},
        train={"sampling": "ordered", "log_every": 1},
    )
    for error in (UserError("the tape at row 100 is torn"), ZeroDivisionError("row 100")):
        run = tmp_path / type(error).__name__
        with pytest.raises(type(error), match="row 100") as caught:
            gpu_bp.train(made, sources={"train": Broken(error)}, backend="numpy", run=run)
        if residency == "host":
            assert len((run / "metrics.jsonl").read_text().splitlines()) == 12  # rows 96 to 119 are the fifth window
            assert isinstance(error, ZeroDivisionError) or "its metrics are in" in str(caught.value)


# named in the config -----------------------------------------------------------------------------------------------

WAVES = """
from test_own_sources import Waves

with open("ran.txt", "a") as file:
    file.write("x")

train = Waves(200)
number = 3

def later(seed, n_rows=50):
    return Waves(n_rows, 200 + seed)

def on(backend):
    source = Waves(9)
    source.backend = backend
    return source

def fails():
    raise ZeroDivisionError("in the function")
"""

CONFIG = """
seed = 7
network.hidden = [5]
optimizer.learning_rate = 0.1
train.epochs = 2
[data]
kind = "own"
[data.sources]
train = "waves:train"
validation = "waves:later"
test = {kind = "waves.py:later", n_rows = 60, seed = 50}
"""


@pytest.fixture
def waves(in_tmp: Path) -> Iterator[Path]:
    """A working folder with waves.py and a config in it; what was imported from it is forgotten afterwards."""
    (in_tmp / "waves.py").write_text(WAVES)
    (in_tmp / "waves.toml").write_text(CONFIG)
    yield in_tmp
    for name in ("waves", str(in_tmp / "waves.py")):
        sys.modules.pop(name, None)


def run_main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main([*arguments, "--backend", "numpy"])
    return int(str(exited.value.code))


def test_named_sources(waves: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They train as those given from Python do; functions are given the seed, and arguments from beside their name."""
    assert run_main("train", "waves.toml", "--run", "named") == 0
    sources = {"train": Waves(200), "validation": Waves(50, 207), "test": Waves(60, 250)}
    config = gpu_bp.load_config("waves.toml", ['data={kind="own"}'])
    given = gpu_bp.train(config, sources=sources, backend="numpy", run="given", pictures=False)
    tensors = gpu_bp.Model.load(waves / "named/model.safetensors", NumpyBackend()).network.tensors()
    for name, tensor in given.model.network.tensors().items():
        np.testing.assert_array_equal(tensors[name], tensor)
    assert f'kind = "{waves}/waves.py:later"' in (waves / "named/config.toml").read_text()
    capsys.readouterr()
    sys.modules.pop("waves")
    (waves / "ran.txt").unlink()
    assert run_main("evaluate", "named") == 2
    assert "names code, waves:train, which runs when it is read: " in capsys.readouterr().err
    np.save("x.npy", np.zeros((2, 2)))
    assert run_main("predict", "named", "x.npy") == 0  # which needs no data
    assert not (waves / "ran.txt").exists()
    assert run_main("evaluate", "named", "--trust-code") == 0
    evaluated = gpu_bp.evaluate("named", trust_code=True, backend="numpy")
    assert evaluated == {name: given.summary[name] for name in evaluated}
    assert evaluated["test"]["rows"] == 60


def test_a_function_that_takes_the_backend(waves: Path, own: Tiny) -> None:
    raw = own(data={"sources": {"train": "waves:on"}})
    jsonschema.validate(raw, gpu_bp.Config.model_json_schema())
    config = gpu_bp.parse_config(raw)
    backend = NumpyBackend()
    assert load_data(config, backend=backend).sources["train"].backend is backend


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"train": "waves"}, "data.sources.train.kind: must be of the form module:object or path/to/file.py:object"),
        ({"test": "waves:train"}, "data.sources.train is missing"),
        (
            {"train": "waves:train", "tset": "waves:train"},
            "unknown key data.sources.tset; did you mean data.sources.test",
        ),
        ("waves:train", "data.sources must be a table, not 'waves:train'"),
        ({"train": "waves:trian"}, "data.sources.train: waves has no object 'trian'; did you mean train?"),
        ({"train": "nowhere:train"}, "data.sources.train: there is no module 'nowhere'"),
        ({"train": "waves:number"}, "the train source must be a gpu_bp.Source, not int"),
        (
            {"train": {"kind": "waves:train", "n_rows": 3}},
            "train: waves:train is no class or function, so it takes no n_rows",
        ),
        (
            {"train": {"kind": "waves:later", "rows": 3}},
            "train: waves:later takes (seed, n_rows=50): got an unexpected key",
        ),
        ({"train": "waves:Waves"}, "data.sources.train: waves:Waves takes ("),
    ],
)
def test_names_that_are_refused(waves: Path, own: Tiny, sources: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        gpu_bp.train(own(data={"sources": sources}), backend="numpy", run="run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (waves / "run").exists()


def test_sources_given_twice(waves: Path, own: Tiny) -> None:
    with pytest.raises(UserError, match="sources are given twice: leave out data.sources, or those given from Python"):
        gpu_bp.train(own(data={"sources": {"train": "waves:train"}}), sources=splits(), backend="numpy")


def test_an_error_in_a_function_is_its_own(waves: Path, own: Tiny) -> None:
    with pytest.raises(ZeroDivisionError, match="in the function"):
        gpu_bp.train(own(data={"sources": {"train": "waves:fails"}}), backend="numpy")
