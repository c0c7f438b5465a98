"""A training step of this project against the same step of its peers, on the CPU or a GPU.

    python -m benchmarks.peers [--device cpu|cuda] [--grid quick|full] [--cell WORDS] [--json FILE] [--plot FILE]
                               [--markdown FILE]

A step is forward, loss, backward and update, of fresh rows each time. Every side has a process of its own; rounds go
through all of them in turn, and medians are taken. In the same rounds each library makes the bare matrix products of
the step. A peer counts only where its losses are ours. Ratios are its time over ours: above 1 we are faster.

`--cell "3x64 adam"` takes the cells that have all these words: a shape 3x64 (layers x width), a batch, an activation,
an optimizer, a loss. Files are written anew after each cell, so that nothing is lost where it is stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import at_least
from benchmarks.peers import report
from benchmarks.peers.cells import Cell, chosen, grid
from benchmarks.peers.measure import ROUNDS, SECONDS, Bench, Result, bench
from benchmarks.peers.process import LeftOut
from benchmarks.peers.sides import PEERS

MEMORY = 0.8  # the part of what is free that all sides of a cell may take together


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--grid", choices=("quick", "full"), default="quick")
    parser.add_argument("--cell", default="", metavar="WORDS", help="only cells that have all these words")
    parser.add_argument("--rounds", type=at_least(2), default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a round, for each side")
    parser.add_argument("--without", nargs="*", default=[], metavar="PEER", help="peers that are not to be measured")
    parser.add_argument("--also", nargs="*", default=[], metavar="PEER", help="peers that are not measured unasked")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--markdown", type=Path, help="the table, as it is printed")
    options = parser.parse_args(arguments)
    cells = chosen(grid(options.grid, options.device), options.cell)
    if not cells:
        print(f"error: no cell of the {options.grid} grid has all of: {options.cell}", file=sys.stderr)
        return 2
    asked = [peer for peer in PEERS if options.device not in peer.on_request or peer.name in options.also]
    peers = [peer for peer in asked if peer.name not in options.without]
    results: list[Result] = []
    try:
        with bench(options.device, peers) as made:
            for number, cell in enumerate(cells, 1):
                if too_large(cell, made):
                    continue
                results.append(made.measure(cell, options.rounds, options.seconds))
                print(f"{number}/{len(cells)} {line(results[-1])}", file=sys.stderr, flush=True)
                write(results, options.json, options.markdown)
    except LeftOut as reason:
        print(f"error: our own step cannot be measured: {reason}", file=sys.stderr)
        return 2
    finally:
        if results:
            print("", page(results), sep="\n")
            if options.plot:
                report.plot(results, options.plot)
    return 0


def too_large(cell: Cell, made: Bench) -> bool:
    """Whether the sides of a cell do not fit into memory together, which is then said."""
    wanted, free = len(made.sides) * cell.bytes, made.machine["free_bytes"]
    if wanted > MEMORY * free:
        print(f"{cell}: left out, would take {wanted / 1e9:.0f} GB of {free / 1e9:.0f} GB", file=sys.stderr)
    return bool(wanted > MEMORY * free)


def line(result: Result) -> str:
    """A cell in one line."""
    times = {"ours": result.seconds} | result.peers
    return f"{result.cell}: " + ", ".join(f"{name} {report.milliseconds(x)} ms" for name, x in times.items())


def page(results: Sequence[Result]) -> str:
    """The table and all that is to be said of it."""
    return "\n\n".join((report.table(results), report.headline(results), report.notes(results)))


def write(results: Sequence[Result], json_file: Path | None, markdown: Path | None) -> None:
    """The files, whole at any time: a new one takes the place of the old."""
    texts = {
        json_file: json.dumps([result.report() for result in results], indent=2, allow_nan=False),
        markdown: page(results),
    }
    for path, text in texts.items():
        if path is not None:
            new = path.with_name(path.name + ".new")
            new.write_text(text + "\n")
            os.replace(new, path)


if __name__ == "__main__":
    sys.exit(main())
