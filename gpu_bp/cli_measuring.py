"""The commands that measure a config's steps: `gpu-bp bench` and `gpu-bp scaling`."""

from __future__ import annotations

from typing import Annotated

import typer

from gpu_bp import scaling_here
from gpu_bp.backends import select
from gpu_bp.bench import SECONDS
from gpu_bp.bench import bench as measure
from gpu_bp.cli_options import BackendOption, ConfigArgument, JsonOption, OverridesArgument, print_json
from gpu_bp.config_file import load_config
from gpu_bp.scaling import LINKS

LINK = f"{', '.join(LINKS)}, or MICROSECONDS:GBYTES, a message and a second."


def bench(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    backend: BackendOption = "auto",
    seconds: Annotated[float, typer.Option(min=0, help="How long steps are timed.")] = SECONDS,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write NVTX ranges: nsys profile gpu-bp bench ... --profile.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say how long a config's steps take, where the time goes, and how much of the machine is used; writes nothing."""
    parsed = load_config(config, overrides or [])
    chosen, why = select(backend)
    measured = measure(parsed, chosen, seconds=seconds, profile=profile)
    if as_json:
        print_json(measured.to_json())
    else:
        print("\n".join([why, *measured.lines()]))


def scaling(
    config: ConfigArgument,
    ranks: Annotated[int, typer.Option(min=1, help="So many at most, a power of two.")],
    overrides: OverridesArgument = None,
    backend: BackendOption = "auto",
    inside: Annotated[str, typer.Option(help=f"Between ranks of a machine: {LINK}")] = "memory",
    across: Annotated[str | None, typer.Option(help=f"Between machines: {LINK}")] = None,
    per_machine: Annotated[int | None, typer.Option(min=1, help="Ranks a machine; by default all.")] = None,
    overlap: Annotated[
        bool | None,
        typer.Option("--overlap/--no-overlap", help="Sums travel during the way back; by default between GPUs."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long steps are timed.")] = SECONDS,
    as_json: JsonOption = False,
) -> None:
    """Predict how a config's steps scale over ranks, of which one is measured here; docs/scaling.md has the model."""
    parsed = load_config(config, overrides or [])
    chosen, why = select(backend)
    predicted = scaling_here.predict(
        parsed,
        chosen,
        ranks,
        inside=inside,
        across=across,
        per_machine=per_machine,
        overlap=overlap,
        seconds=seconds,
    )
    if as_json:
        machine = {"backend": chosen.name, "device": chosen.device, "libraries": dict(chosen.libraries())}
        print_json({**machine, **scaling_here.to_json(predicted)})
    else:
        print("\n".join([why, *scaling_here.lines(predicted)]))
