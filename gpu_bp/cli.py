"""The command line, `gpu-bp`.

Exit status: 0; 1 where gradients do not agree; 2 with one line `error: ...` for what the user can mend; 130
after Ctrl-C and 143 after SIGTERM, with everything written.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import typer
from rich.console import Console

from gpu_bp import gradcheck, memory
from gpu_bp.backends import select
from gpu_bp.build import build_network
from gpu_bp.cli_measuring import bench, scaling
from gpu_bp.cli_options import (
    BackendOption,
    ChangeOption,
    ConfigArgument,
    JsonOption,
    ModelOption,
    OverridesArgument,
    QuietOption,
    RunArgument,
    TrustOption,
    print_json,
)
from gpu_bp.config import Config
from gpu_bp.config_file import load_config
from gpu_bp.data import load_data
from gpu_bp.environment import cupy_version
from gpu_bp.errors import UserError, harmless, in_words, one_line
from gpu_bp.generate import generate as generate_shards
from gpu_bp.gradcheck import TOLERANCE, check_gradients
from gpu_bp.interruption import Signals
from gpu_bp.model import Model
from gpu_bp.progress import watch
from gpu_bp.ranks import join
from gpu_bp.run_folder import RunFolder
from gpu_bp.runs import Lines, Result
from gpu_bp.runs import evaluate as evaluate_run
from gpu_bp.runs import resume as resume_run
from gpu_bp.runs import train as train_run
from gpu_bp.trainer import Trainer
from gpu_bp.whole_file import PartFile, write_whole

app = typer.Typer(
    help="Backpropagation for dense networks, on CuPy or NumPy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> None:
    """The entry point: runs a command, and turns what it raises into an exit status."""
    try:
        status = app((sys.argv[1:] if arguments is None else arguments) or ["--help"], standalone_mode=False)
        if sys.stdout:  # None where it was closed, `>&-`
            sys.stdout.flush()
    except typer.TyperException as error:
        _fail(one_line(error.format_message()))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone, such as `head`
        _drop_output()
        sys.exit(141)
    except Exception as error:
        line = in_words(error)
        if not line:
            raise
        _fail(line)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(line: str) -> NoReturn:
    print("error: " + line, file=sys.stderr)
    sys.exit(2)


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Console(Console):
    """Where a training says what it does. Where nobody reads any more, it goes on silently."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _drop_output()


@app.command()
def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    backend: BackendOption = "auto",
    run: Annotated[Path | None, typer.Option(help="The run folder; by default runs/NAME-TIME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in that folder, if there is one.")
    ] = False,
    allow_change: ChangeOption = None,
    quiet: QuietOption = False,
) -> int:
    """Train a network and leave a run folder."""
    return _train(
        quiet,
        lambda **shown: train_run(
            load_config(config, overrides or []),
            backend=backend,
            run=run,
            resume=resume,
            allow_change=allow_change or (),
            **shown,
        ),
    )


@app.command()
def resume(
    run: RunArgument,
    overrides: OverridesArgument = None,
    backend: BackendOption = "auto",
    allow_change: ChangeOption = None,
    quiet: QuietOption = False,
    trust_code: TrustOption = False,
) -> int:
    """Go on with a run that was stopped, from its newest whole checkpoint."""
    return _train(
        quiet,
        lambda **shown: resume_run(
            run, overrides or (), backend=backend, allow_change=allow_change or (), trust_code=trust_code, **shown
        ),
    )


def _train(quiet: bool, train: Callable[..., Result]) -> int:
    """Shows a training, and says how it ended; of several ranks the first does."""
    ranks = join()
    # a launcher's pipes are taken for a terminal, or the other way round: in lines, where there are several ranks
    console = _Console(quiet=quiet or ranks.rank > 0, highlight=False, force_terminal=False if ranks.size > 1 else None)

    def say(sentence: str) -> None:
        console.print(harmless(sentence), markup=False, soft_wrap=True)

    signals, show = Signals(), watch(console)

    def steps_of(trainer: Trainer, steps: Lines) -> Lines:
        yield from show(trainer, steps)
        signals.stepping = False

    with signals, _log_to(say), ranks:
        result = train(watch=steps_of, interrupted=signals.interrupted, ranks=ranks)
        number = max(ranks.all_gather(signals.number))
    for sentence in _sentences(result.summary):
        say(sentence)
    stopped = result.summary["stopped"]
    if stopped in ("interrupted", "max_minutes"):
        why = "interrupted" if stopped == "interrupted" else "train.max_minutes are over"
        say(
            f"{why} at step {result.summary['steps']}; what was trained is saved: gpu-bp resume {result.folder} goes on"
        )
    if result.pictures:
        say("pictures: " + ", ".join(str(path) for path in result.pictures))
    say(f"run folder: {result.folder}")
    return 128 + number if stopped == "interrupted" else 0


@contextmanager
def _log_to(say: Callable[[str], None]) -> Iterator[None]:
    """What the package logs is said."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    log, handler = logging.getLogger("gpu_bp"), Handler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@app.command()
def evaluate(
    run: RunArgument,
    model: ModelOption = "model",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
    trust_code: TrustOption = False,
) -> None:
    """Compute a run's metrics on its splits again."""
    result = evaluate_run(run, model=model, backend=backend, trust_code=trust_code)
    if as_json:
        print_json(result)
    else:
        print("\n".join(_sentences(result)))


@app.command()
def predict(
    run: RunArgument,
    file: Annotated[Path, typer.Argument(help="Raw rows: .csv with a header, .parquet or .npy.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A .csv or .npy file; by default csv, printed.")
    ] = None,
    model: ModelOption = "model",
    backend: BackendOption = "auto",
    trust_code: TrustOption = False,
) -> None:
    """Predict from raw rows, in raw units: values, or class and probabilities."""
    if out is not None and out.suffix not in (".csv", ".npy"):
        raise UserError(f"{out}: the output must be a .csv or .npy file")
    folder = RunFolder.open(run)
    names, columns = Model.load(folder.model(model), select(backend)[0], trust_code=trust_code).predict(file)
    if out is None:
        print(_csv(names, columns), end="")
        return
    if out.suffix == ".csv":
        write_whole(out, _csv(names, columns))
        return
    values = [column for name, column in zip(names, columns, strict=True) if not name.startswith("class")]
    with PartFile(out) as part:
        np.lib.format.write_array(part, np.stack(values, axis=1).astype(np.float64), allow_pickle=False)
        part.finish()


@app.command()
def generate(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder: a new one, or one to go on with.")],
    overrides: OverridesArgument = None,
    rows: Annotated[int | None, typer.Option(min=1, help="By default all rows of the config.")] = None,
    file_format: Annotated[str, typer.Option("--format", help="npy or parquet.")] = "npy",
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    shard_rows: Annotated[int | None, typer.Option(min=1, help="Rows a file; by default about 64 MiB.")] = None,
    backend: BackendOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Write a config's synthetic rows into a folder of shards; run again, it goes on where it was stopped."""
    console = _Console(quiet=quiet, highlight=False)
    parsed = load_config(config, overrides or [])
    with Signals():
        generate_shards(
            parsed,
            out,
            backend=select(backend)[0],
            rows=rows,
            file_format=file_format,
            dtype=dtype,
            shard_rows=shard_rows,
            console=console,
        )


@app.command("check-gradients")
def check(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
    rows: Annotated[int, typer.Option(min=1, help="Training rows to take.")] = 16,
) -> int:
    """Compare backpropagation with central differences at a config's initial parameters, with the noise of one step."""
    parsed = load_config(config, overrides or [])
    dataset = load_data(parsed)
    backend, _ = select("numpy")
    network = build_network(parsed, dataset, backend, precision="float64")
    split = dataset.rows("train", 0, rows)
    loss, noise = parsed.loss.record(), parsed.noise()
    results = check_gradients(network, loss, split.inputs, split.targets, split.weights, noise=noise)
    passed = all(worst.passed for worst in results)
    if as_json:
        print_json({"passed": passed, "tolerance": TOLERANCE, "arrays": [worst.to_json() for worst in results]})
    else:
        print("\n".join(gradcheck.table(results)))
        print("the gradients agree" if passed else f"the gradients do not agree to {TOLERANCE:g}")
    return 0 if passed else 1


for command in (bench, scaling):
    app.command()(command)


@app.command()
def info(
    config: Annotated[Path | None, typer.Argument(help="A config file (TOML): what its training will need.")] = None,
    overrides: OverridesArgument = None,
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Say which versions are here and which backend would be taken; of a config, what its training needs of the memory.

    Exit status 2 where it does not fit, with a line that says what would.
    """
    chosen, why = select(backend)
    message = ""
    if config is None:
        facts = {
            "gpu_bp": metadata.version("gpu_bp"),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": metadata.version("scipy"),
            "cupy": cupy_version(),
            "cpus": os.cpu_count(),
            "backend": chosen.name,
            "device": chosen.device,
            "why": why,
        }
        lines = [f"{key:<8} {value if value is not None else 'not installed'}" for key, value in facts.items()]
    else:
        parsed = load_config(config, overrides or [])
        dataset, free = load_data(parsed, backend=chosen), chosen.free_bytes()
        need = memory.estimate(parsed, dataset, chosen)
        message = memory.too_large(parsed, dataset, chosen, need, free)
        facts = {**asdict(need), "total": need.total, "free": free, "fits": not message}
        lines = [why, *memory.table(need, free)]
    if as_json:
        print_json(facts)
    else:
        print("\n".join(lines))
    if message:
        raise UserError(message)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config file."""
    print_json(Config.model_json_schema())


def _sentences(summary: dict[str, Any]) -> list[str]:
    """The metrics of each split, a line each; and those of the average."""
    names: tuple[str, ...] = ("train", "validation", "test")
    splits = [(name, summary[name]) for name in names if name in summary]
    splits += [(f"average {name}", metrics) for name, metrics in summary.get("average", {}).items()]
    width = max(10, *(len(name) for name, _ in splits))
    return [
        f"{name:<{width}}  " + "  ".join(f"{key} {value:.6g}" for key, value in metrics.items())
        for name, metrics in splits
    ]


def _csv(names: list[str], columns: list[np.ndarray]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*(column.tolist() for column in columns), strict=True))
    return text.getvalue()
