"""The part of the CuPy backend that runs the formulas of the records, of which each has a kernel of its own."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_bp.backends import cuda_kernels as kernels
from gpu_bp.backends import cuda_rows
from gpu_bp.backends.base import Numbers
from gpu_bp.backends.cuda_launch import by_rows, compiled, given, launch
from gpu_bp.backends.cuda_rows import CUDA_NAMES
from gpu_bp.backends.cuda_scalars import Scalars
from gpu_bp.spec import Activation, Array, FreeLoss, FusedLoss, GroupedLoss, Loss, Penalty, RowActivation, Update


class RecordKernels:
    """Activations, losses and updates of `Backend`."""

    def activate(
        self, activation: Activation | RowActivation, net_input: Array, biases: Array | None, output: Array
    ) -> None:
        if isinstance(activation, RowActivation):
            if biases is not None:
                net_input += biases
            self._rows(activation, activation.value.cuda, net_input, None, output, output, output)
            return
        kernel = kernels.activation(
            activation.name, activation.value.cuda, tuple(activation.values), biases is not None
        )
        inputs = (net_input,) if biases is None else (net_input, biases)
        launch(kernel, *inputs, *activation.values.values(), net_input, output)

    def hidden_delta(self, activation: Activation, error: Array, net_input: Array, output: Array, delta: Array) -> None:
        x, array = ("y", output) if activation.derivative_from == "output" else ("v", net_input)
        kernel = kernels.hidden_delta(activation.name, activation.delta.cuda, x, tuple(activation.values))
        launch(kernel, error, array, *activation.values.values(), delta)

    def output_delta(
        self,
        loss: Loss,
        activation: Activation | RowActivation,
        net_input: Array,
        target: Array,
        output: Array,
        losses: Array,
        delta: Array,
    ) -> None:
        if isinstance(loss, FusedLoss):
            if loss.per_row:
                self._rows(loss, loss.delta.cuda, net_input, target, output, losses, delta)
            else:
                kernel = compiled(kernels.fused_loss(loss.name, loss.delta.cuda, tuple(loss.values)))
                kernel(net_input, target, *loss.values.values(), output, losses, delta)
            return
        assert isinstance(activation, Activation)
        if isinstance(loss, GroupedLoss):
            text = kernels.grouped_loss(
                f"{loss.name}_{activation.name}",
                loss.error_signals.cuda,
                loss.groups,
                tuple(loss.values.items()),
                activation.delta.cuda,
                tuple(activation.values),
            )
            numbers = (*(x for x in loss.values.values() if not isinstance(x, tuple)), *activation.values.values())
            compiled(text)(net_input, output, target, target.shape[1], *numbers, losses, delta)
            return
        assert isinstance(loss, FreeLoss)
        text = kernels.free_loss(
            f"{loss.name}_{activation.name}",
            loss.error_signal.cuda,
            tuple(loss.values),
            activation.delta.cuda,
            tuple(activation.values),
        )
        kernel = compiled(text)
        kernel(net_input, output, target, *loss.values.values(), *activation.values.values(), losses, delta)

    def update(
        self,
        record: Update,
        penalties: Sequence[Penalty],
        parameters: Array,
        gradients: Array,
        state: Sequence[Array],
        numbers: Numbers,
        n_weights: int,
        factor: Array | None = None,
        flag: Array | None = None,
        step: int = 0,
    ) -> None:
        assert isinstance(numbers, Scalars)
        before = tuple((penalty.name, penalty.apply.cuda, penalty.weights_only) for penalty in penalties)
        text = kernels.update(
            record.name,
            record.update.cuda,
            record.state,
            record.scalar_names,
            before,
            with_factor=factor is not None,
            with_flag=flag is not None,
        )
        optional = (*given(flag), *given(factor))
        compiled(text)(*optional, numbers.steps[step], gradients, n_weights, parameters, *state)

    def _rows(
        self,
        record: RowActivation | FusedLoss,
        text: str,
        net_input: Array,
        target: Array | None,
        output: Array,
        losses: Array,
        delta: Array,
    ) -> None:
        target = net_input if target is None else target  # softmax alone reads none
        name, types = f"gpu_bp_{record.name}", (CUDA_NAMES[net_input.dtype], CUDA_NAMES[target.dtype])
        source = cuda_rows.row_kernel_source(name, text, *types, tuple(record.values))
        parameters = (net_input.dtype.type(value) for value in record.values.values())
        by_rows(name, source, net_input.shape, net_input, target, output, losses, delta, *parameters)
