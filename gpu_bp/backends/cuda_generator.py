"""Rows generated on the device: the stages and outputs of a program, a kernel each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_bp.backends import cuda_kernels as kernels
from gpu_bp.backends.cuda_launch import compiled, cupy
from gpu_bp.formula import Program
from gpu_bp.spec import Array


class Generator:
    """A program on the device: its kernels, its tables, and arrays for its stages."""

    AT_ONCE = 2**24  # numbers of a stage: 128 MiB

    def __init__(self, program: Program) -> None:
        named = [*program.stages.items(), *((f"output{k}", columns) for k, columns in enumerate(program.outputs))]
        self._kernels = {name: kernels.generate(program, columns, name) for name, columns in named}
        self._arrays = {name: cupy.asarray(table) for name, table in program.tables.items()}
        self._widths = {name: columns.width for name, columns in program.stages.items()}
        self._rows = 0  # that the stages have room for
        self._rows_at_once = self._at_once(program)

    @classmethod
    def n_bytes(cls, program: Program, n_rows: int) -> int:
        """What it keeps to generate up to so many rows at once."""
        stages = sum(columns.width for columns in program.stages.values())
        return 8 * min(n_rows, cls._at_once(program)) * stages + sum(x.nbytes for x in program.tables.values())

    @classmethod
    def _at_once(cls, program: Program) -> int:
        """Rows."""
        return max(1, cls.AT_ONCE // program.width)

    def __call__(self, seed: int, first: int, rows: Array, outputs: Sequence[Array]) -> None:
        """The outputs for the rows first + `rows`: see `Backend.generate`."""
        for start in range(0, len(rows), self._rows_at_once):
            part = slice(start, start + self._rows_at_once)
            self._generate(seed, first, rows[part], [output[part] for output in outputs])

    def _generate(self, seed: int, first: int, rows: Array, outputs: Sequence[Array]) -> None:
        if len(rows) > self._rows:
            self._rows = len(rows)
            self._arrays |= {name: cupy.empty((self._rows, width)) for name, width in self._widths.items()}
        written = {name: self._arrays[name][: len(rows)] for name in self._widths}
        written |= {f"output{k}": output for k, output in enumerate(outputs)}
        for name, out in written.items():
            read, kernel = self._kernels[name]
            compiled(kernel)(rows, first, np.uint64(seed), *(self._arrays[array] for array in read), out)
