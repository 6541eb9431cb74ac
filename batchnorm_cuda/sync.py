"""`SyncBatchNorm`: torch.nn's module, computed by `batchnorm_cuda`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._ops.calls import Forward, Group
from .functional import normalize
from .modules import _constructor, _KernelForward


class SyncBatchNorm(_KernelForward, torch.nn.SyncBatchNorm):
    r"""`torch.nn.SyncBatchNorm`: batch norm over the batches of all ranks of a process group.

    Constructor, state and errors are torch's. In training mode, where torch.distributed is
    initialised and the group has more than one rank, the statistics are those of all ranks' values:

    .. math::
        \mu = \frac{\sum_r n_r \mu_r}{\sum_r n_r}, \qquad
        \sigma^2 = \frac{\sum_r M_r + n_r (\mu_r - \mu)^2}{\sum_r n_r}

    with count, mean and sum of squared deviations of rank r (Chan, Golub and LeVeque 1983; see
    docs/sync.md). Otherwise, evaluation included, it is plain batch norm.

    What is different from torch's:

    - CPU tensors are taken, too: through gloo, by the same code.
    - The results do not depend on which rank has which part of the batch, to the bit.
    - The host never waits for the device, and momentum=None is no exception.
    - It is differentiable twice, and torch.compile takes it as a whole.
    - Parts may have any size, 0 and 1 included. Where all ranks together have fewer than two values
      per channel, the running statistics stay as they are. That is no error: no rank's host knows.

    Args:
        num_features: C, the number of channels; the same on all ranks.
        eps: added to the variance; positive in training mode.
        momentum: weight of the new batch in the running statistics; None for their plain average.
        affine: whether there are `weight` and `bias`, (C,).
        track_running_stats: whether there are running statistics, (C,), and their counter.
        process_group: the ranks that share statistics; None for the default group.
        device: of parameters and buffers.
        dtype: of parameters and running statistics.
        bias: False leaves out `bias` alone; where torch.nn has it, from torch 2.13 on.
        activation: as for `BatchNorm2d`.

    Shape:
        Input and output: (N, C) or (N, C, \*), on each rank with any N and \*. What is gathered is
        2 C + 2 numbers a rank in the forward pass and 2 C in the backward, float32 (float64 for
        float64 inputs, and then 2 C + 1). `residual`, the second argument of the call, has the
        input's shape and dtype and stays on its rank.

    Raises:
        TypeError: as `batch_norm`.
        ValueError: as `batch_norm`; the input has fewer than two dimensions or no channels; or it
            has one value per channel and nobody to share statistics with.
        RuntimeError: as `batch_norm`; from the process group, where a rank has died or does not
            come in time.

    All ranks must call it the same number of times, and agree on whether the input requires a
    gradient. Gradients of weight and bias are this rank's own sums, which DistributedDataParallel
    averages. Of its own accord that refuses to wrap any SyncBatchNorm on the CPU: wrap first, and
    ``convert(model, sync=True)`` then.
    """

    __init__ = _constructor(torch.nn.SyncBatchNorm)

    def _normalize(self, call: Forward) -> Tensor:
        self._check_non_zero_input_channels(call.input)
        if self.training and dist.is_available() and dist.is_initialized():
            group = self.process_group or dist.group.WORLD
            ranks = dist.get_world_size(group)
            if ranks > 1:
                call = call._replace(group=Group(ranks, group.group_name))
        return normalize(call)

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: Any = None
    ) -> torch.nn.Module:
        """`module` with every batch norm in it, torch's or ours, replaced by this class.

        As torch's method of this name: parameters and buffers are taken over, not copied, and a
        module that is itself a batch norm comes back as a new one. `convert` with sync=True keeps
        the module objects.

        Args:
            module: any module.
            process_group: the ranks that share statistics; None for the default group.

        Returns:
            `module`, or what took its place.
        """
        converted = module
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            converted = cls(
                module.num_features,
                module.eps,
                module.momentum,
                affine=False,
                track_running_stats=module.track_running_stats,
                process_group=process_group,
            )
            converted.affine = module.affine
            converted.activation = getattr(module, "activation", None)
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(converted, name, getattr(module, name))
            converted.train(module.training)
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted
