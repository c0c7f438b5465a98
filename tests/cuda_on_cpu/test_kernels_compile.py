"""Every kernel compiles to machine code for every architecture, and is what a kernel here must be: no arithmetic in
double where the data are single, nothing spilled, no local memory, generated rows rounded as on every other backend.
Each of these is shown to fail on a fault."""

from __future__ import annotations

from typing import Any

import pytest

from cuda_on_cpu.cpu import CompileError, Kernel
from cuda_on_cpu.every_kernel import KINDS, RECORDS, every_kernel, stored_kernels
from cuda_on_cpu.nvrtc import ARCHITECTURES, Compiled, compile_kernel
from cuda_on_cpu.test_kernels_on_cpu import dtypes
from cuda_on_cpu.test_precisions import SMALL

pytestmark = pytest.mark.kernels

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)

# Kernels, by the beginning of their names, that may compute in double on single data.
DOUBLES_ON_PURPOSE = {
    "gpu_bp_add_to_total": "an epoch adds up more losses than a float can tell apart; it is one thread",
    "gpu_bp_uniforms": "random numbers are float64, whatever the precision of the training",
    "gpu_bp_normals": "random numbers are float64, whatever the precision of the training",
    "gpu_bp_dropout": "which outputs go is the same for every precision",
    "gpu_bp_input_noise": "random numbers are float64, whatever the precision of the training",
    "gpu_bp_step_factor": "one thread, on totals that are float64",
    "gpu_bp_watch": "one thread looks at the total loss, which is float64",
    "gpu_bp_generate_": "generated rows are float64, the same for every precision; into a float32 batch they are cast",
}
# In PTX these, unlike mul.rn.f64, say that the assembler may make one fused operation of two.
UNROUNDED = ("mul.f64", "add.f64", "sub.f64")


def faults(name: str, compiled: Compiled, dtype: str) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    found = []
    if dtype == "float32" and compiled.doubles and not name.startswith(tuple(DOUBLES_ON_PURPOSE)):
        found.append(f"{name} computes in double: {compiled.doubles[:3]}")
    if name.startswith("gpu_bp_generate_") and any(line.startswith(UNROUNDED) for line in compiled.doubles):
        found.append(f"{name} may fuse products with sums, where NumPy rounds both")
    if compiled.spill_bytes:
        found.append(f"{name} spills {compiled.spill_bytes} bytes of registers")
    if compiled.stack_bytes or compiled.local:
        found.append(f"{name} has local memory: {compiled.stack_bytes} bytes of stack, {compiled.local}")
    return found


@architectures
@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_compiles(kind: str, dtype: str, architecture: int) -> None:
    found = []
    for kernel in every_kernel(kind, dtype):
        compiled = compile_kernel(kernel, architecture)
        assert compiled.cubin_bytes
        found += faults(kernel.name, compiled, dtype)
    assert not found, "\n".join(found)


@architectures
@pytest.mark.parametrize("dtype", SMALL.values(), ids=SMALL)
def test_every_stored_kernel_compiles(dtype: Any, architecture: int) -> None:
    """CUDA's own headers convert where the hardware has no instruction for it."""
    kernels = stored_kernels(dtype)
    assert len(kernels) > 50
    found = []
    for kernel in kernels:
        found += faults(kernel.name, compile_kernel(kernel, architecture), "float32")
    assert not found, "\n".join(found)


def test_kinds_cover_the_backend() -> None:
    """No kernel of the records is of two kinds, and the exemptions are of kernels that exist and need them.

    (Sets share kernels, such as two of Friedman's their inputs, and some sets compute with whole numbers alone.)
    """
    kernels = [kernel for kind in RECORDS for kernel in every_kernel(kind, "float32")]
    assert len({kernel.text for kernel in kernels}) == len(kernels)
    kernels += every_kernel("friedman1", "float32")
    for name in DOUBLES_ON_PURPOSE:
        exempt = [kernel for kernel in kernels if kernel.name.startswith(name)]
        assert exempt
        assert all(compile_kernel(kernel, 90).doubles for kernel in exempt)


def planted(body: str) -> Kernel:
    return Kernel(f'extern "C" __global__ void planted(float* x, int n) {{ {body} }}', "planted")


@architectures
def test_a_double_literal_is_seen(architecture: int) -> None:
    right = compile_kernel(planted("x[threadIdx.x] *= 0.1f;"), architecture)
    wrong = compile_kernel(planted("x[threadIdx.x] *= 0.1;"), architecture)
    assert not faults("planted", right, "float32")
    assert "in double" in faults("planted", wrong, "float32")[0]
    assert not faults("planted", wrong, "float64")


def test_generated_rows_are_rounded_as_numpy_rounds() -> None:
    """b - (b - a) u, an input of Friedman's: a product and a difference, which the compiler would make one of."""
    kernel = next(k for k in every_kernel("friedman2", "float64") if k.name == "gpu_bp_generate_output0")
    fused = Kernel(kernel.source, kernel.name, with_cupy_headers=True)
    assert any("may fuse" in fault for fault in faults(kernel.name, compile_kernel(fused, 90), "float64"))
    assert not faults(kernel.name, compile_kernel(kernel, 90), "float64")


@architectures
def test_local_memory_is_seen(architecture: int) -> None:
    """The float32 sine keeps a table on the stack, and computes in double; sinpi does neither."""
    wrong = faults("planted", compile_kernel(planted("x[threadIdx.x] = sin(x[threadIdx.x]);"), architecture), "float32")
    assert any("local memory" in fault for fault in wrong)
    assert not faults("planted", compile_kernel(planted("x[threadIdx.x] = sinpif(x[0]);"), architecture), "float32")


@architectures
def test_spilled_registers_are_seen(architecture: int) -> None:
    body = """
    float v[64];
    #pragma unroll
    for (int k = 0; k < 64; ++k) v[k] = x[k * n + threadIdx.x];
    for (int j = 0; j < n; ++j) {
        #pragma unroll
        for (int k = 0; k < 64; ++k) v[k] = v[k] * v[(k + 1) % 64] + x[j];
    }
    #pragma unroll
    for (int k = 0; k < 64; ++k) x[k * n + threadIdx.x] = v[k];
    """
    wrong = faults("planted", compile_kernel(planted(body), architecture, "--maxrregcount=32"), "float32")
    assert any("spills" in fault for fault in wrong)


def test_a_typo_is_seen() -> None:
    with pytest.raises(CompileError, match="tahn"):
        compile_kernel(planted("x[threadIdx.x] = tahn(x[threadIdx.x]);"), 90)
