"""`BatchNorm1d`, `2d` and `3d`, also lazy: torch.nn's classes, computed by `batchnorm_cuda`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Proxy

from .functional import normalize


class _KernelForward:
    """The forward of `torch.nn.modules.batchnorm._BatchNorm`; everything else stays torch's.

    It differs in two ways that show. num_batches_tracked is counted by the kernel that updates the
    running statistics, without a launch of its own; momentum=None divides by it there, and the host
    does not wait for it. And an input that is refused leaves every buffer as it was.
    """

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and isinstance(input, Proxy):  # a look at the type is cheaper
            return self._as_leaf(input)
        self._check_input_dim(input)
        training = self.training
        weight, bias, running_mean, running_var = self._tensors()
        counter, momentum = None, self.momentum
        if not training:
            training = running_mean is None and running_var is None
        elif self.track_running_stats:
            counter = self.num_batches_tracked
        else:
            running_mean = running_var = None
        if training and self.eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {self.eps}")
        if momentum is None and counter is None:
            momentum = 0.0  # as in torch: nothing to average over
        return self._normalize(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            counter,
            training,
            momentum,
            self.eps,
        )

    _normalize = staticmethod(normalize)

    def _as_leaf(self, input: Proxy) -> Proxy:
        """A call of this module in the graph that torch.fx traces, as of any module of torch.nn.

        torch.fx takes for leaves only what is defined in torch.nn; a module of ours has to say it.
        """
        name = input.tracer.path_of_module(self)
        return input.tracer.create_proxy("call_module", name, (input,), {})

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """weight, bias, running_mean, running_var: half a microsecond each by attribute look-up."""
        parameters, buffers = self._parameters, self._buffers
        try:
            return (
                parameters["weight"],
                parameters["bias"],
                buffers["running_mean"],
                buffers["running_var"],
            )
        except KeyError:  # something has taken the place of one, such as a parametrization
            return self.weight, self.bias, self.running_mean, self.running_var


class BatchNorm1d(_KernelForward, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` for (N, C) and (N, C, L) inputs: same arguments, state and errors."""


class BatchNorm2d(_KernelForward, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for (N, C, H, W) inputs: same arguments, state and errors."""


class BatchNorm3d(_KernelForward, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` for (N, C, D, H, W) inputs: same arguments, state and errors."""


class LazyBatchNorm1d(_KernelForward, torch.nn.LazyBatchNorm1d):
    """`torch.nn.LazyBatchNorm1d`: takes C from its first input, and then is a `BatchNorm1d`."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_KernelForward, torch.nn.LazyBatchNorm2d):
    """`torch.nn.LazyBatchNorm2d`: takes C from its first input, and then is a `BatchNorm2d`."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_KernelForward, torch.nn.LazyBatchNorm3d):
    """`torch.nn.LazyBatchNorm3d`: takes C from its first input, and then is a `BatchNorm3d`."""

    cls_to_become = BatchNorm3d
