"""Small models that write the operations behind a batch norm in many ways.

`FUSED` are ways that must be fused: what `fusion_report` says of the model's one batch norm `bn`.
`AWKWARD` are models where fusing without a second look gives wrong numbers: what is asked of them
is that they compute what they did before. All take one input, (N, 4, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

C = 4


class Model(nn.Module):
    """A convolution, a batch norm, and what `behind(model, y, x)` makes of its output."""

    def __init__(self, behind: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(C)
        self.relu = nn.ReLU()
        self.relu_ = nn.ReLU(inplace=True)
        self.calls = 0
        self.behind = behind
        with torch.no_grad():
            self.bn.weight.uniform_(0.5, 1.5)
            self.bn.bias.uniform_(-0.5, 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.behind(self, self.bn(self.conv(x)), x)


# --- ways to write what is fused ----------------------------------------------------------------


def module(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y)


def module_in_place(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu_(y)


def functional(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y)


def functional_in_place(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y, inplace=True)


def function_of_torch(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return torch.relu(y)


def method(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return y.relu()


def statement(m: Model, y: Tensor, x: Tensor) -> Tensor:
    y.relu_()
    return y


def statement_by_module(m: Model, y: Tensor, x: Tensor) -> Tensor:
    m.relu_(y)
    return y * y


def added(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y + x)


def added_to_the_input(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu_(x + y)


def added_in_place(m: Model, y: Tensor, x: Tensor) -> Tensor:
    y += x
    return m.relu_(y)


def added_by_torch(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return torch.add(x, y).relu()


def added_by_method(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y.add(x))


def added_by_statements(m: Model, y: Tensor, x: Tensor) -> Tensor:
    y.add_(x)
    y.relu_()
    return y


def added_later(m: Model, y: Tensor, x: Tensor) -> Tensor:
    residual = m.conv(x).sigmoid()
    return m.relu_(y + residual) * residual


def only_added(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return (y + x) * 2


def only_added_in_place(m: Model, y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y.sigmoid()


def only_added_used_twice(m: Model, y: Tensor, x: Tensor) -> Tensor:
    y = y + x
    return y.sigmoid() * y


def used_on(m: Model, y: Tensor, x: Tensor) -> Tensor:
    """The activation in place: what uses y afterwards uses its result."""
    z = m.relu_(y)
    return y * 2 + z


def training_mode_only(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y) if m.training else y * 2


RELU, ADD, BOTH = "relu", "add", "add, relu"
FUSED = {
    module: RELU,
    module_in_place: RELU,
    functional: RELU,
    functional_in_place: RELU,
    function_of_torch: RELU,
    method: RELU,
    statement: RELU,
    statement_by_module: RELU,
    added: BOTH,
    added_to_the_input: BOTH,
    added_in_place: BOTH,
    added_by_torch: BOTH,
    added_by_method: BOTH,
    added_by_statements: BOTH,
    added_later: BOTH,
    only_added: ADD,
    only_added_in_place: ADD,
    only_added_used_twice: ADD,
    used_on: RELU,
}


# --- what has to stay right ---------------------------------------------------------------------


class Halved(torch.autograd.Function):
    """Takes tensors as they are, past everything that could intercept it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


class AsItIs(torch.autograd.Function):
    """Gives its input back without a look at it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def statement_by_function(m: Model, y: Tensor, x: Tensor) -> Tensor:
    torch.relu_(y)
    return y + 1


def used_twice(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y) + y


def used_twice_the_other_way(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return y * m.relu(y)


def used_before(m: Model, y: Tensor, x: Tensor) -> Tensor:
    z = y.exp()
    return m.relu_(y) + z


def returned(m: Model, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return y, m.relu(y)


def returned_alone(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return y


def sum_returned(m: Model, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    y = y + x
    return y, m.relu(y)


def modified_later(m: Model, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    z = m.relu(y)
    y.add_(1)
    return z, y


def modified_before(m: Model, y: Tensor, x: Tensor) -> Tensor:
    y.mul_(2)
    return m.relu(y)


def part_modified(m: Model, y: Tensor, x: Tensor) -> Tensor:
    y[:, 1] = 1
    return m.relu_(y)


def alias_modified(m: Model, y: Tensor, x: Tensor) -> Tensor:
    flat = y.flatten(1)
    m.relu_(y)
    return flat


def alias(m: Model, y: Tensor, x: Tensor) -> Tensor:
    z = y
    y += x
    return m.relu(z)


def residual_modified(m: Model, y: Tensor, x: Tensor) -> Tensor:
    residual = x * 3
    y = y + residual
    residual.mul_(2)
    return m.relu(y) + residual


def added_in_place_to_the_other(m: Model, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    residual = x * 3
    same = residual
    residual += y
    return m.relu(residual), same


def added_to_itself(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y + y)


def added_number(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y + 1)


def added_broadcast(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y + x.mean((2, 3), keepdim=True))


def added_to_a_larger_one(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y + x.expand(2, *x.shape))


def added_scaled(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(torch.add(y, x, alpha=2))


def added_by_keywords(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(torch.add(input=y, other=x).add_(other=x))


def activated_by_keywords(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return torch.relu(input=y) + F.relu(input=y)


def added_into(m: Model, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = torch.empty_like(x)
        torch.add(y, x, out=out)
    return m.relu(out) + y.sin()


def added_twice(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y + x + x.sin())


def added_in_another_dtype(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y + x.float())


def shared(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y) + m.bn(x) * m.bn(m.relu(x + 1))


def shared_alike(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y) + m.relu(m.bn(x))


def both_sides(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y + m.bn(x))


def twice_in_a_row(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(m.bn(y))


def branch_on_data(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y) if y.mean() > 0.1 else y.sigmoid()


def branch_on_the_input(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y) if x.sum() > 0 else y


def every_second_call(m: Model, y: Tensor, x: Tensor) -> Tensor:
    m.calls += 1
    return m.relu(y) if m.calls % 2 else y


def evaluation_only(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return y if m.training else m.relu(y)


def looked_at(m: Model, y: Tensor, x: Tensor) -> Tensor:
    assert y.requires_grad == torch.is_grad_enabled() and y.shape == x.shape
    return m.relu(y)


def without_gradient(m: Model, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = m.bn(m.conv(x))
    return m.relu(z) * y


def detached(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(y.detach()) + y.sin()


def activation_without_gradient(m: Model, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = m.relu(y)
    return z * y


def hook_on_the_output(m: Model, y: Tensor, x: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda grad: 2 * grad)
    return m.relu(y)


def other_activation(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return F.softplus(y)


def own_function(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(Halved.apply(y))


def own_function_that_does_not_look(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(AsItIs.apply(y))


def unused(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return x.sin()


def in_containers(m: Model, y: Tensor, x: Tensor) -> Tensor:
    found = {"a": [y, (x,)]}
    return torch.cat([found["a"][0], found["a"][1][0]], dim=1)


def from_a_list(m: Model, y: Tensor, x: Tensor) -> Tensor:
    features = [y]
    features.append(m.relu(features[-1]))
    return torch.cat(features, dim=1)


def checkpointed(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return checkpoint(lambda x: m.relu(m.bn(m.conv(x))), x, use_reentrant=False) + y.sin()


def checkpoint_ends_between(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(checkpoint(lambda x: m.bn(m.conv(x)), x, use_reentrant=False)) + y.sin()


def reentrant_checkpoint_ends_between(m: Model, y: Tensor, x: Tensor) -> Tensor:
    return m.relu(checkpoint(lambda x: m.bn(m.conv(x)), x, use_reentrant=True)) + y.sin()


AWKWARD = [
    *FUSED,
    training_mode_only,
    statement_by_function,
    used_twice,
    used_twice_the_other_way,
    used_before,
    returned,
    returned_alone,
    sum_returned,
    modified_later,
    modified_before,
    part_modified,
    alias_modified,
    alias,
    residual_modified,
    added_in_place_to_the_other,
    added_to_itself,
    added_number,
    added_broadcast,
    added_to_a_larger_one,
    added_scaled,
    added_by_keywords,
    activated_by_keywords,
    added_into,
    added_twice,
    added_in_another_dtype,
    shared,
    shared_alike,
    both_sides,
    twice_in_a_row,
    branch_on_data,
    branch_on_the_input,
    every_second_call,
    evaluation_only,
    looked_at,
    without_gradient,
    detached,
    activation_without_gradient,
    hook_on_the_output,
    other_activation,
    own_function,
    own_function_that_does_not_look,
    unused,
    in_containers,
    from_a_list,
    checkpointed,
    checkpoint_ends_between,
    reentrant_checkpoint_ends_between,
]
