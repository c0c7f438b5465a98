"""Kernels compiled by NVRTC for real architectures, without a device; and what can be read off the result."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from cuda_on_cpu import codegen
from cuda_on_cpu.cpu import CompileError, Kernel, cache_folder

# Turing, Ampere (A100, consumer), Ada, Hopper, Blackwell (B200, consumer)
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Compiled:
    """What a kernel became.

    Attributes:
        cubin_bytes: the length of the machine code.
        doubles: PTX instructions on doubles, the first 50.
        local: declarations of local memory in the PTX.
        stack_bytes, spill_bytes, registers: what the assembler reports.
    """

    cubin_bytes: int
    doubles: tuple[str, ...]
    local: tuple[str, ...]
    stack_bytes: int
    spill_bytes: int
    registers: int


def compile_kernel(kernel: Kernel, architecture: int, *extra: str) -> Compiled:
    """The kernel compiled as CuPy would for sm_`architecture`; kept between runs by source, options and version.

    Raises:
        CompileError: NVRTC refuses the source; the message is its own.
        pytest.fail: there is no NVRTC, or it does not know the architecture.
    """
    codegen.require()
    nvrtc = _nvrtc()
    source = (codegen.header_text() if kernel.with_cupy_headers else "") + kernel.source
    options = (
        *codegen.nvrtc_options(architecture),
        "--ptxas-options=-v",
        "--pch",
        *kernel.options,
        *extra,
    )  # headers read once
    what = [source, *options, str(nvrtc.getVersion()), codegen.real_cupy().__version__]
    path = (
        cache_folder() / f"{kernel.name}-sm{architecture}-{hashlib.sha256(repr(what).encode()).hexdigest()[:32]}.json"
    )
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        kept |= {name: tuple(value) for name, value in kept.items() if isinstance(value, list)}
        return Compiled(**kept)
    program = nvrtc.createProgram(source, f"{kernel.name}.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError:
            raise CompileError(f"{kernel.name}, sm_{architecture}: {nvrtc.getProgramLog(program)[:4000]}") from None
        log, cubin, ptx = (ask(program) for ask in (nvrtc.getProgramLog, nvrtc.getCUBIN, nvrtc.getPTX))
    finally:
        nvrtc.destroyProgram(program)
    compiled = _read(kernel.name, cubin, ptx.decode() if isinstance(ptx, bytes) else ptx, log)
    with tempfile.NamedTemporaryFile("w", dir=cache_folder(), delete=False) as file:
        json.dump(asdict(compiled), file)
    os.replace(file.name, path)
    return compiled


def _nvrtc() -> Any:
    try:
        nvrtc = codegen.real_cupy().cuda.nvrtc
        known = nvrtc.getSupportedArchs()
    except Exception as error:
        pytest.fail(f"NVRTC does not load: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime ({error})", pytrace=False)
    if lacking := set(ARCHITECTURES) - set(known):
        pytest.fail(f"this NVRTC {nvrtc.getVersion()} does not know sm_{min(lacking)}", pytrace=False)
    return nvrtc


def _read(name: str, cubin: bytes, ptx: str, log: str) -> Compiled:
    body = re.search(rf"\.entry {name}\(.*?^}}", ptx, re.DOTALL | re.MULTILINE)
    assert body is not None, f"{name} is not in the PTX"
    assert cubin[:4] == b"\x7fELF"
    # what ptxas reports of this function and of those that it calls
    numbers = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    assert numbers, f"ptxas reports nothing:\n{log}"
    assert used is not None
    return Compiled(
        cubin_bytes=len(cubin),
        doubles=tuple(re.findall(r"^\s*(\S*\.f64\S*.*;)", body[0], re.MULTILINE)[:50]),
        local=tuple(re.findall(r"^\s*(\.local .*;)", body[0], re.MULTILINE)),
        stack_bytes=max(int(stack) for stack, _, _ in numbers),
        spill_bytes=max(int(stores) + int(loads) for _, stores, loads in numbers),
        registers=int(used[1]),
    )
