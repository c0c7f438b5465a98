"""The CUDA kernels of the CuPy backend, as text: from the formulas of the records, and those beside them.

A `Kernel` is what cupy.ElementwiseKernel is made of. In its operation `i` is the number of the thread's element. The
texts are kept, since a step asks for them again and again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from gpu_bp.backends.trace import trace
from gpu_bp.formula import Columns, Program
from gpu_bp.registry import (
    CUDA_DROPOUT,
    CUDA_FILL_NORMALS,
    CUDA_FILL_UNIFORMS,
    CUDA_FUNCTIONS,
    CUDA_INPUT_NOISE,
    CUDA_RANDOM,
    CUDA_SHUFFLE,
)


class Kernel(NamedTuple):
    """The arguments of cupy.ElementwiseKernel."""

    in_params: str
    out_params: str
    operation: str
    name: str
    preamble: str = ""
    options: tuple[str, ...] = ()


@functools.cache
def add_one() -> Kernel:
    """y = x + 1, to see whether a device computes."""
    return Kernel("T x", "T y", "y = x + T(1)", "gpu_bp_add_one")


def _scope(text: str, names: Sequence[str], prefix: str) -> str:
    """A formula in a scope of its own, so that two of them may share names in one kernel."""
    values = "".join(f"const T {name} = {prefix}_{name}; " for name in names)
    return f"{{ {values}{text} }}"


def _arguments(names: Sequence[str], prefix: str) -> str:
    return "".join(f", T {prefix}_{name}" for name in names)


@functools.cache
def activation(name: str, text: str, parameters: tuple[str, ...], biased: bool) -> Kernel:
    """v = product + bias (broadcast over the rows); y = phi(v)."""
    return Kernel(
        "T product" + (", T bias" if biased else "") + _arguments(parameters, "phi"),
        "T net_input, T output",
        f"const T v = product{' + bias' if biased else ''}; T y; {_scope(text, parameters, 'phi')}"
        " net_input = v; output = y;",  # in this order: the two may be one array
        f"gpu_bp_{name}_value",
        CUDA_FUNCTIONS,
    )


@functools.cache
def hidden_delta(name: str, text: str, x: str, parameters: tuple[str, ...]) -> Kernel:
    """delta = e * phi'."""
    return Kernel(
        f"T e, T {x}{_arguments(parameters, 'phi')}",
        "T delta",
        _scope(text, parameters, "phi"),
        f"gpu_bp_{name}_delta",
        CUDA_FUNCTIONS,
    )


@functools.cache
def free_loss(
    name: str,
    loss_text: str,
    loss_parameters: tuple[str, ...],
    delta_text: str,
    delta_parameters: tuple[str, ...],
) -> Kernel:
    """loss and e = dE/dy from y and d, then delta = e * phi'."""
    return Kernel(
        "T v, T y, T d" + _arguments(loss_parameters, "loss") + _arguments(delta_parameters, "phi"),
        "T loss, T delta",
        f"T e; {_scope(loss_text, loss_parameters, 'loss')} {_scope(delta_text, delta_parameters, 'phi')}",
        f"gpu_bp_{name}",
        CUDA_FUNCTIONS,
    )


@functools.cache
def fused_loss(name: str, text: str, parameters: tuple[str, ...]) -> Kernel:
    """y, loss and delta from v and d."""
    return Kernel(
        "T v, T d" + _arguments(parameters, "loss"),
        "T y, T loss, T delta",
        _scope(text, parameters, "loss"),
        f"gpu_bp_{name}",
        CUDA_FUNCTIONS,
    )


_OF_TARGET = """
#define PLACE(k) (first + (k) * n_targets)
#define Y(k) outputs[PLACE(k)]
#define E(k) deltas[PLACE(k)]
"""


@functools.cache
def grouped_loss(
    name: str,
    loss_text: str,
    groups: int,
    loss_values: tuple[tuple[str, float | tuple[float, ...]], ...],
    delta_text: str,
    delta_parameters: tuple[str, ...],
) -> Kernel:
    """loss and e = dE/dy of the outputs of one target, then delta = e * phi' of each.

    `i` is the number of the target among all rows; its output k is Y(k). Several numbers by one name stand in the
    text, static so that no thread keeps them in memory of its own.
    """
    arrays = "".join(
        f"static const T {parameter}[] = {{{', '.join(f'T({value!r})' for value in values)}}}; "
        for parameter, values in loss_values
        if isinstance(values, tuple)
    )
    scalars = [parameter for parameter, value in loss_values if not isinstance(value, tuple)]
    return Kernel(
        "raw T net_inputs, raw T outputs, T d, int64 n_targets"
        + _arguments(scalars, "loss")
        + _arguments(delta_parameters, "phi"),
        "T loss, raw T deltas",
        f"""
        const int groups = {groups};
        const long long first = i / n_targets * groups * n_targets + i % n_targets;
        {arrays}{_scope(loss_text, scalars, "loss")}
        for (int k = 0; k < groups; ++k) {{
            const T v = net_inputs[PLACE(k)], y = Y(k), e = E(k);
            T delta;
            {_scope(delta_text, delta_parameters, "phi")}
            deltas[PLACE(k)] = delta;
        }}
        """,
        f"gpu_bp_{name}",
        CUDA_FUNCTIONS + _OF_TARGET,
    )


# Elements of a stream: where they begin, and how many.
_FILL = "uint64 c0, uint64 c1, uint64 c2, uint64 c3, uint64 seed, uint64 purpose, int32 lane, int64 count"
# Likewise of a step, whose number stands on the device.
_FILL_OF_STEP = _FILL.replace("uint64 c3", "raw int64 step")
_OF_STEP = "const unsigned long long c3 = step[0];"


@functools.cache
def chunk_sums(of: str = "x[k]") -> Kernel:
    """Chunk c of column j: the sum over the rows r = c, c + chunks, c + 2 chunks, ... of x[r, j], or another term."""
    names = {"x[k]": "sums", "x[k] * x[k]": "squares", "x[k] * y[k]": "dots"}
    return Kernel(
        f"raw T x, {'raw T y, ' if 'y' in of else ''}int64 rows, int64 columns, int64 chunks",
        "T sum",
        f"""
        const long long column = i % columns;
        T running = T(0);
        for (long long row = i / columns; row < rows; row += chunks) {{
            const long long k = row * columns + column;
            running += {of};
        }}
        sum = running;
        """,
        f"gpu_bp_chunk_{names[of]}",
    )


@functools.cache
def copy() -> Kernel:
    """out = x."""
    return Kernel("T x", "T out", "out = x", "gpu_bp_copy")


@functools.cache
def advance() -> Kernel:
    """One more."""
    return Kernel("", "int64 counter", "counter += 1", "gpu_bp_advance")


@functools.cache
def add() -> Kernel:
    """out = a + b."""
    return Kernel("T a, T b", "T out", "out = a + b", "gpu_bp_add")


@functools.cache
def weigh() -> Kernel:
    """Rows times their weights; a weight of 0 gives 0, whatever x is."""
    return Kernel("T weight, T x", "T out", "out = weight == T(0) ? T(0) : weight * x", "gpu_bp_weigh")


@functools.cache
def class_weights(indexed: bool, weighted: bool) -> Kernel:
    """The weight of a row's class, and its own."""
    own = " * weight" if weighted else ""
    find = (
        "const long long c = targets[i];"
        if indexed
        else """
        const S* d = &targets[i * n];
        long long c = n == 1 && d[0] >= S(0.5);
        for (long long j = 1; j < n; ++j) if (d[j] > d[c]) c = j;
        """
    )
    return Kernel(
        f"raw {'int64' if indexed else 'S'} targets, raw T table, int64 n{', T weight' if weighted else ''}",
        "T out",
        f"{find} out = table[c]{own};",
        f"gpu_bp_class_weights{'_weighted' if weighted else ''}",
    )


@functools.cache
def step_factor(with_loss_scale: bool = False) -> Kernel:
    """What gives the mean gradient, clipped where its length is more than `most`."""
    return Kernel(
        f"float64 scale, float64 weight, float64 squares, float64 most{', T loss_scale' if with_loss_scale else ''}",
        "T factor",
        f"""
        const double mean = (weight > 0 ? 1 / weight : 0){" / loss_scale" if with_loss_scale else ""};
        const double clip = most / (sqrt(squares) * scale * mean + 1e-6);
        factor = T(mean * (clip < 1 ? clip : 1));
        """,
        "gpu_bp_step_factor",
    )


# Kernels that change what a training leaves take its flag first, and do nothing once it is set: `Backend.watch`.
_FLAG = "raw int64 flag, "


def _unless_set(text: str) -> str:
    return f"if (flag[0] < 0) {{ {text} }}"


@functools.cache
def watch() -> Kernel:
    """The flag becomes the step's number where something is not finite: all threads that write it write the same."""
    return Kernel(
        "T gradient, raw float64 total, raw int64 steps",
        "raw int64 flag",
        _unless_set("if (!isfinite(gradient) || (i == 0 && !isfinite(total[0]))) flag[0] = steps[0] + 1;"),
        "gpu_bp_watch",
    )


@functools.cache
def average(with_flag: bool = False) -> Kernel:
    """A moving average of the parameters."""
    text = "mean += rest * (w - mean);"
    return Kernel(
        f"{_FLAG if with_flag else ''}T w, T rest",
        "T mean",
        _unless_set(text) if with_flag else text,
        "gpu_bp_average",
    )


@functools.cache
def dropout() -> Kernel:
    """Four elements a thread, as in `fill`."""
    return Kernel(
        f"{_FILL_OF_STEP}, raw T values, float64 rate, T keep",
        "raw T out",
        _OF_STEP + CUDA_DROPOUT,
        "gpu_bp_dropout",
        CUDA_RANDOM,
    )


@functools.cache
def input_noise() -> Kernel:
    """Four elements a thread, as in `fill`."""
    return Kernel(
        f"{_FILL_OF_STEP}, raw T values, float64 sd",
        "raw T out",
        _OF_STEP + CUDA_INPUT_NOISE,
        "gpu_bp_input_noise",
        CUDA_RANDOM,
    )


@functools.cache
def add_to_total() -> Kernel:
    """total += the sum of a few values, in double: an epoch adds up more losses than a float can tell apart."""
    return Kernel(
        "raw T x, int64 n",
        "float64 total",
        "double sum = 0; for (long long k = 0; k < n; ++k) sum += x[k]; total += sum;",
        "gpu_bp_add_to_total",
    )


@functools.cache
def update(
    name: str,
    text: str,
    state: tuple[str, ...],
    scalars: tuple[str, ...],
    penalties: tuple[tuple[str, str, bool], ...] = (),
    with_factor: bool = False,
    with_flag: bool = False,
) -> Kernel:
    """One step of an update rule; the scalars stand in an array, so that no kernel has one baked in.

    `penalties`: the name of each, its text, and whether it acts on weights alone.
    """
    names = ("scale", *(penalty for penalty, _, _ in penalties), *scalars)
    read = "".join(f"const T {scalar} = scalars[{k}]; " for k, scalar in enumerate(names))
    before = "".join(
        f"if (i < n_weights) {{ {apply} }} " if weights_only else f"{{ {apply} }} "
        for _, apply, weights_only in penalties
    )
    mean = "scale * factor[0] * gradient" if with_factor else "scale * gradient"
    step = f"{read} {'' if penalties else 'const '}T g = {mean}; {before}{text}"
    optional = (_FLAG if with_flag else "") + ("raw T factor, " if with_factor else "")
    return Kernel(
        f"{optional}raw T scalars, T gradient, int64 n_weights",
        "T w" + "".join(f", T {array}" for array in state),
        _unless_set(step) if with_flag else step,
        f"gpu_bp_{name}",
        CUDA_FUNCTIONS,
    )


# Random numbers and generated rows --------------------------------------------------------------------------


@functools.cache
def fill(normal: bool) -> Kernel:
    """Elements of a stream, four a thread: `count` of them from lane `lane` of the block with counter c0 .. c3 on."""
    return Kernel(
        _FILL,
        "raw float64 out",
        CUDA_FILL_NORMALS if normal else CUDA_FILL_UNIFORMS,
        f"gpu_bp_{'normals' if normal else 'uniforms'}",
        CUDA_RANDOM,
    )


def generate(program: Program, columns: Columns, name: str) -> tuple[tuple[str, ...], Kernel]:
    """A formula at every row and column, and which stages and tables it reads, in the order of its arguments."""
    arrays, body = trace(program, columns)
    parameters = "".join(f", raw float64 array_{array}" for array in arrays)
    return arrays, Kernel(
        f"raw int64 rows, int64 first, uint64 seed{parameters}",
        "Y y",
        body,
        f"gpu_bp_generate_{name}",
        CUDA_RANDOM,
        ("--fmad=false",),  # products and sums are rounded as NumPy rounds them
    )


@functools.cache
def count() -> Kernel:
    """first, first + 1, ..."""
    return Kernel("int64 first", "int64 y", "y = first + i", "gpu_bp_count")


@functools.cache
def permute(rounds: int) -> Kernel:
    """The images of first, first + 1, ... under a permutation."""
    keys = [f"k{k}" for k in range(rounds)]
    return Kernel(
        "uint64 first, uint64 n, uint64 a, uint64 b, " + ", ".join(f"uint64 {key}" for key in keys),
        "int64 y",
        f"const unsigned long long keys[{rounds}] = {{{', '.join(keys)}}}; y = permuted(first + i, n, a, b, keys);",
        "gpu_bp_permute",
        CUDA_SHUFFLE,
    )
