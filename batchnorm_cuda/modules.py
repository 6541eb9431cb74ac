"""`BatchNorm1d`, `2d` and `3d`, also lazy: torch.nn's classes, computed by `batchnorm_cuda`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Proxy

from ._fusion.pending import defer, settled
from ._models.torch_tools import RunningMean, refuse_fusing_by_class, refuse_script
from ._ops.activations import Activation, parse, with_activation
from ._ops.calls import Forward
from .functional import normalize

if TYPE_CHECKING:
    from ._fusion.forecast import Fusion


def _constructor(theirs: type[torch.nn.Module]) -> Callable:
    """The constructor of torch's class and the keyword `activation`; its signature says so.

    Made from the class because torch's arguments depend on its version.
    """

    def __init__(
        self: Any, *arguments: Any, activation: Activation | None = None, **settings: Any
    ) -> None:
        parse(activation)
        theirs.__init__(self, *arguments, **settings)
        self.activation = activation

    signature = inspect.signature(theirs.__init__)
    added = inspect.signature(__init__).parameters["activation"]
    parameters = [*signature.parameters.values(), added]
    __init__.__signature__ = signature.replace(parameters=parameters)
    return __init__


class _KernelForward:
    """The forward of `torch.nn.modules.batchnorm._BatchNorm`; everything else stays torch's.

    It differs in two ways that show. num_batches_tracked is counted by the kernel that updates the
    running statistics, without a launch of its own; momentum=None divides by it there, and the host
    does not wait for it. And an input that is refused leaves every buffer as it was.
    """

    activation: Activation | None = None  # also of a module that `convert` has made
    running_mean = RunningMean()
    _fusion: Fusion | None = None  # what `convert(fuse=True)` found behind it

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if type(input) is not Tensor or residual is not None:  # a look at the type is cheaper
            for value in (input, residual):
                if isinstance(value, Proxy):
                    return self._as_leaf(value.tracer, input, residual)
            input, residual = settled(input), settled(residual)
        self._check_input_dim(input)
        training = self.training
        # By attribute look-up, half a microsecond each.
        parameters, buffers = self._parameters, self._buffers
        try:
            weight, bias = parameters["weight"], parameters["bias"]
            running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        except KeyError:  # something has taken the place of one, such as a parametrization
            weight, bias = self.weight, self.bias
            running_mean, running_var = self.running_mean, self.running_var
        counter, momentum = None, self.momentum
        if not training:
            training = running_mean is None and running_var is None
        elif self.track_running_stats:
            counter = buffers.get("num_batches_tracked")
            if counter is None:
                counter = self.num_batches_tracked
        else:
            running_mean = running_var = None
        if training and self.eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {self.eps}")
        if momentum is None and counter is None:
            momentum = 0.0  # as in torch: nothing to average over
        call = Forward(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            counter,
            training,
            momentum,
            self.eps,
            residual,
        )
        if self.activation is not None:
            call = with_activation(call, self.activation)
        elif self._fusion is not None and residual is None:
            pending = defer(self, call)
            if pending is not None:
                return pending
        return self._normalize(call)

    _normalize = staticmethod(normalize)

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + activation

    def _as_leaf(self, tracer: torch.fx.Tracer, *inputs: Tensor | Proxy | None) -> Proxy:
        """A call of this module in the graph that torch.fx traces, as of any module of torch.nn.

        torch.fx takes for leaves only what is defined in torch.nn; a module of ours has to say it.
        """
        given = tuple(value for value in inputs if value is not None)
        call_leaf = getattr(tracer, "call_leaf", None)  # of ours, in _models/traced_calls.py
        if call_leaf is not None:
            return call_leaf(self, given, {})
        refuse_fusing_by_class(tracer, inputs[0])
        name = tracer.path_of_module(self)
        return tracer.create_proxy("call_module", name, given, {})

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


class _LazyForward(_KernelForward):
    """Of modules that look at their first input before they have parameters."""

    def initialize_parameters(self, input: Tensor, residual: Tensor | None = None) -> None:
        super().initialize_parameters(input)


class BatchNorm1d(_KernelForward, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, computed by `batch_norm`: same arguments, state and errors.

    Arguments, state, dtypes and errors as for `BatchNorm2d`.

    Shape:
        Input and output: (N, C) or (N, C, L).

    Raises:
        ValueError: as `BatchNorm2d`; the input has neither two nor three dimensions.
    """

    __init__ = _constructor(torch.nn.BatchNorm1d)


class BatchNorm2d(_KernelForward, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, computed by `batch_norm`: same arguments, state and errors.

    Training mode normalises by the statistics of the batch (Ioffe and Szegedy, arXiv:1502.03167,
    algorithm 1) and updates the running ones, evaluation mode normalises by the running ones.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance; positive in training mode.
        momentum: weight of the new batch in the running statistics. None takes their plain average
            over all batches so far, which are counted on the device: the host does not wait.
        affine: whether there are `weight` and `bias`, (C,), at first ones and zeros.
        track_running_stats: whether there are `running_mean` and `running_var`, (C,), at first
            zeros and ones, and `num_batches_tracked`, an int64 scalar. Without them evaluation
            mode takes the statistics of its batch, too.
        device: of parameters and buffers.
        dtype: of parameters and running statistics. float32, the default, is right for float16 and
            bfloat16 inputs as well; otherwise it has to be that of the input.
        bias: False leaves out `bias` alone; where torch.nn has it, from torch 2.13 on.
        activation: as for `batch_norm`; applied to the result, and no part of the state.

    Shape:
        Input and output: (N, C, H, W), contiguous or channels-last; the output has the input's
        dtype and memory format. A second argument of the call, `residual`, of the input's shape and
        dtype, is added before the activation.

    Raises:
        ValueError: the input does not have four dimensions or C channels, residual not the shape of
            the input, eps is not positive, training mode meets one value per channel, or activation
            is none that there is.
        TypeError: a dtype is wrong, as for `batch_norm`.
        RuntimeError: input and parameters are on different devices, or the kernels cannot be built.

    What shows beside torch.nn's: an input that is refused leaves every buffer as it was,
    `num_batches_tracked` included.
    """

    __init__ = _constructor(torch.nn.BatchNorm2d)


class BatchNorm3d(_KernelForward, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, computed by `batch_norm`: same arguments, state and errors.

    Arguments, state, dtypes and errors as for `BatchNorm2d`.

    Shape:
        Input and output: (N, C, D, H, W), contiguous or channels_last_3d.

    Raises:
        ValueError: as `BatchNorm2d`; the input does not have five dimensions.
    """

    __init__ = _constructor(torch.nn.BatchNorm3d)


class LazyBatchNorm1d(_LazyForward, torch.nn.LazyBatchNorm1d):
    """`torch.nn.LazyBatchNorm1d`: takes C from its first input, and then is a `BatchNorm1d`.

    Arguments as `BatchNorm1d`, without `num_features`. Shape, dtypes and errors are its own, too.
    """

    cls_to_become = BatchNorm1d
    __init__ = _constructor(torch.nn.LazyBatchNorm1d)


class LazyBatchNorm2d(_LazyForward, torch.nn.LazyBatchNorm2d):
    """`torch.nn.LazyBatchNorm2d`: takes C from its first input, and then is a `BatchNorm2d`.

    Arguments as `BatchNorm2d`, without `num_features`. Shape, dtypes and errors are its own, too.
    """

    cls_to_become = BatchNorm2d
    __init__ = _constructor(torch.nn.LazyBatchNorm2d)


class LazyBatchNorm3d(_LazyForward, torch.nn.LazyBatchNorm3d):
    """`torch.nn.LazyBatchNorm3d`: takes C from its first input, and then is a `BatchNorm3d`.

    Arguments as `BatchNorm3d`, without `num_features`. Shape, dtypes and errors are its own, too.
    """

    cls_to_become = BatchNorm3d
    __init__ = _constructor(torch.nn.LazyBatchNorm3d)


class Folded(torch.nn.Module):
    """What `fold` leaves of a batch norm that has more to do than its activation.

    It adds a residual. And one that takes inputs of several numbers of dimensions makes sure that
    it gets that for which the layer before has the channels where a batch norm expects them: a
    linear layer has them last, and a convolution of an input without a batch dimension first.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        torch._assert(
            input.dim() == self.dimensions,
            "batchnorm_cuda.fold: expected the layer before the batch norm to give as many "
            "dimensions as a batch has; the model from before fold takes this input",
        )
        if residual is not None:
            input = input + residual
        return self.last(input)

    def extra_repr(self) -> str:
        return f"dimensions={self.dimensions}"
