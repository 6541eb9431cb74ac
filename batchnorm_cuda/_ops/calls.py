"""What a pass of batch norm takes and gives: the one place where its arguments are listed.

A record goes from the public functions through autograd to the operators, and nothing in between
names its fields again. The fields that a plain call needs stand first, so that it can pass these
alone. `operators` derives schemas from the annotations; csrc/torch/calls.h is the C++ of it, and
tests/operators/test_calls.py holds the two together.

Shapes: tensors like the input are (N, C, *), vectors (C,). "acc" is the dtype of statistics and
sums: float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Group(NamedTuple):
    """A process group of more than one rank, as collectives take it."""

    ranks: int
    name: str


class Forward(NamedTuple):
    """Normalise, and in training update the running statistics in place and count the batch."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None  # int64, one element
    training: bool
    momentum: float | None  # None: 1 / the number of this batch, which the kernel counts
    eps: float
    residual: Tensor | None = None  # like input; added to the result
    relu: bool = False  # whether an activation is applied, as the last; which: below
    need_mask: bool = False  # of the activation, for the backward
    group: Group | None = None  # over whose ranks the statistics are taken, in training
    gathered: Tensor | None = None  # [ranks, row]: what `statistics` gave each of them
    activation: str = "relu"  # a name of activations.KINDS
    parameter: float = 0.0  # of the activation


class Normalized(NamedTuple):
    """The results of `Forward`; a plain call has the first three alone."""

    output: Tensor
    mean: Tensor  # [C], acc: what was used to normalise, in either mode
    invstd: Tensor
    count: Tensor | None = None  # [1], int64: values per channel of all ranks, if gathered
    mask: Tensor | None = None  # uint8, a bit an element (mask.py)


class Backward(NamedTuple):
    """The gradients of a `Forward`, those that are needed."""

    grad_output: Tensor
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None  # lends its dtype to its gradient
    save_mean: Tensor
    save_invstd: Tensor
    training: bool
    need_input: bool
    need_weight: bool
    need_bias: bool
    mask: Tensor | None = None  # of the activation, if there was one
    need_residual: bool = False
    group: Group | None = None
    count: Tensor | None = None  # over several ranks
    sums: Tensor | None = None  # [2, C], acc: of dy and of dy * xhat, over all ranks
    activation: str = "relu"
    parameter: float = 0.0


class Gradients(NamedTuple):
    """The results of `Backward`, None where not needed."""

    grad_input: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    grad_residual: Tensor | None = None


class DoubleBackward(NamedTuple):
    """The gradients of a plain `Backward`, from those of its results, which are zero where None.

    grad_grad_output does not depend on grad_output, which may then be None.
    """

    grad_grad_input: Tensor | None
    grad_grad_weight: Tensor | None
    grad_grad_bias: Tensor | None
    grad_output: Tensor | None
    input: Tensor
    weight: Tensor | None
    save_mean: Tensor
    save_invstd: Tensor
    training: bool
    need_grad_output: bool
    need_input: bool
    need_weight: bool
    group: Group | None = None
    count: Tensor | None = None


class DoubleGradients(NamedTuple):
    """The results of `DoubleBackward`, None where not needed."""

    grad_grad_output: Tensor | None
    grad_input: Tensor | None
    grad_weight: Tensor | None


class Statistics(NamedTuple):
    """What the other ranks must know of this rank's part: count, mean and M2, packed in one row.

    The row has the acc dtype. It begins with the bits of the count, one int64; mean [C] and
    M2 [C], the sum of squared deviations from that mean, follow. An empty part gives zeros.
    """

    input: Tensor


class SumRanks(NamedTuple):
    """The sum over the first dimension, the ranks; their order does not change a bit of it."""

    gathered: Tensor
