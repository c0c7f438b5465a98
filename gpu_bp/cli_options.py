"""Options and arguments that commands share, and how they print JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gpu_bp.run_folder import finite

BackendOption = Annotated[str, typer.Option(help="auto, numpy or cupy; auto takes a GPU where one computes.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TrustOption = Annotated[bool, typer.Option("--trust-code", help="Run the code that the run names as MODULE:OBJECT.")]
ChangeOption = Annotated[
    list[str] | None, typer.Option(metavar="KEY", help="A key or table of the config, or data, that may have changed.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
ModelOption = Annotated[str, typer.Option(help="model; or last, or average, where the run has them.")]
RunArgument = Annotated[Path, typer.Argument(help="A run folder.")]
ConfigArgument = Annotated[Path, typer.Argument(help="A config file (TOML).")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Keys to change: train.epochs=5 network.hidden=[64,64]"),
]


def print_json(value: Any) -> None:
    print(json.dumps(finite(value), indent=2, allow_nan=False))
