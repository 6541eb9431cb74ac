"""`SyncBatchNorm`: torch.nn's module, computed by `batchnorm_cuda`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parametrize

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
        """`module` with its batch norms, torch.nn's and ours, synchronised over `process_group`.

        For what calls torch's method of this name. It is `convert` with ``sync=True``, and unlike
        torch's keeps the module objects, and leaves a subclass that a user wrote as it is, with a
        warning. `revert` takes it back. Modules that were synchronised already, also over another
        process group, are so over this one afterwards.

        Args:
            module: any module, also a batch norm itself.
            process_group: the ranks that share statistics; None for the default group.

        Returns:
            `module` itself.

        Raises:
            TypeError: `module` is not a module.
            ValueError: `module` has lazy batch norms, which do not know their size.

        In both cases nothing has been changed.
        """
        from .convert import exchange  # which stands on this class

        exchange("convert_sync_batchnorm", module, sync=True)
        for found in module.modules():
            if parametrize.type_before_parametrizations(found) is SyncBatchNorm:
                found.process_group = process_group
        return module
