"""What the ranks of a process group know of each other: gathered, merged, summed (docs/sync.md)."""

from __future__ import annotations

import torch
from torch import Tensor

_SUM_BITS = 62  # of a term and of the sum; as in csrc/kernels/merge_ranks.cuh
_LEAST_EXPONENT = -900


def gather(values: Tensor, ranks: int, group_name: str) -> Tensor:
    """`values` of all ranks of the group, [ranks, *values.shape], in the order of the ranks.

    The one collective of a pass, in the functional form that torch.compile traces. On a GPU the
    host does not wait for it. Raises a RuntimeError where the process group does: a rank has died,
    or did not come within the group's timeout.
    """
    collectives = torch.ops._c10d_functional
    gathered = collectives.all_gather_into_tensor(values, ranks, group_name)
    return collectives.wait_tensor(gathered).view(ranks, *values.shape)


def merge_ranks(gathered: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count [1], mean [C] and biased variance [C] of all ranks, the latter two in float64."""
    moments = gathered[:, -2 * channels :].double()
    counts = gathered[:, : -2 * channels].contiguous().view(torch.int64)
    means, m2s = moments.split(channels, 1)
    count = counts.sum(0)
    divisor = count.clamp_min(1)
    mean = sum_over_ranks(counts * means) / divisor
    between = torch.where(counts > 0, counts * (means - mean).square(), 0.0)
    return count, mean, sum_over_ranks(m2s + between) / divisor


def sum_over_ranks(terms: Tensor) -> Tensor:
    """Sum over the first dimension in fixed point, which no order of the terms can change.

    The unit is a power of two that only the largest magnitude decides; the terms, rounded to whole
    units, then add up as integers. Of terms that are not finite only those count.
    """
    finite = terms.isfinite()
    special = torch.where(finite, 0.0, terms).sum(0)
    special = torch.where(special.isnan(), torch.nan, special)  # one NaN for all
    terms = torch.where(finite, terms, 0.0)
    exponent = torch.frexp(terms.abs().amax(0)).exponent.clamp_min(_LEAST_EXPONENT)
    unit = _SUM_BITS - len(terms).bit_length() - exponent
    one = torch.ones_like(special)
    total = (terms * torch.ldexp(one, unit)).round().to(torch.int64).sum(0)
    return torch.where(special == 0, total * torch.ldexp(one, -unit), special)
