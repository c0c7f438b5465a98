"""What precisions below float32 ask of the CUDA kernels: arrays stored in fewer bits, and the scale of the loss.

All kernels compute in one type, T. `stored` is where the type of what they compute with and that of what they read and
write part: no formula knows of it.
"""

from __future__ import annotations

import functools

from gpu_bp.backends.cuda_kernels import Kernel


def _parameters(text: str) -> list[list[str]]:
    """The words of each parameter of a kernel: perhaps raw, its type, its name."""
    return [parameter.split() for parameter in text.split(",") if parameter.strip()]


@functools.cache
def names(kernel: Kernel) -> tuple[str, ...]:
    """Of its parameters."""
    return tuple(words[-1] for text in (kernel.in_params, kernel.out_params) for words in _parameters(text))


@functools.cache
def stored(kernel: Kernel, small: frozenset[str]) -> Kernel:
    """A kernel whose arrays of these names are stored in a small type S, and all others of type T in float32.

    It computes in float32: an element is widened when it is read, and rounded when it is written.
    """
    read, written = "", ""
    changed: list[list[str]] = []
    for text in (kernel.in_params, kernel.out_params):
        changed.append([])
        for *raw, kind, name in _parameters(text):
            is_small, place = name in small, name
            if is_small and not raw:  # elements of raw arrays are converted where the text reads and writes them
                place = f"stored_{name}"
                if text is kernel.in_params:
                    read += f"const T {name} = {place}; "
                else:
                    read += f"T {name}; "
                    written += f" {place} = S({name});"
            changed[-1].append(" ".join([*raw, "S" if is_small else kind.replace("T", "float32"), place]))
    return kernel._replace(
        in_params=", ".join(changed[0]),
        out_params=", ".join(changed[1]),
        operation=f"{read}{kernel.operation};{written}",
        name=f"{kernel.name}_stored",
        preamble=f"typedef float T;\n{kernel.preamble}",
    )


# the scale of the loss: see gpu_bp/loss_scaling.py


@functools.cache
def multiply() -> Kernel:
    """x times a number on the device."""
    return Kernel("raw T factor", "T x", "x *= factor[0]", "gpu_bp_multiply")


@functools.cache
def adjust_scale() -> Kernel:
    """The scale after a step: see `Backend.adjust_scale`."""
    return Kernel(
        "raw int64 skip, raw int64 steps, int64 every, T least, T most",
        "T scale, int64 good, int64 flag",
        """
        if (flag < 0) {
            const bool skipped = skip[0] >= 0;
            const long long run = skipped ? 0 : good + 1;
            if (skipped && scale > least) scale *= T(0.5);
            else if (skipped) flag = steps[0] + 1;
            else if (run == every && scale < most) scale *= T(2);
            good = run % every;
        }
        """,
        "gpu_bp_adjust_scale",
    )
