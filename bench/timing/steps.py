"""One operation of one provider on one set of inputs, as a call without arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..cases.case import BenchCase
from .providers import Provider, Run, Tensors

_GRADIENTS = ("grad_input", "grad_weight", "grad_bias")


def make_tensors(case: BenchCase, device: str, seed: int) -> Tensors:
    """Channels differ in mean and deviation; the gradient correlates with x: no term is small."""
    generator = torch.Generator(device).manual_seed(seed)
    c = case.shape.sizes[1]
    per_channel = (1, c) + (1,) * (len(case.shape.sizes) - 2)
    channel = torch.arange(c, device=device).view(per_channel)
    x, dy = case.empty(device), case.empty(device)
    x.normal_(generator=generator)
    dy.normal_(generator=generator).add_(x, alpha=0.3).add_(0.25)
    x.mul_(0.5 + channel % 4).add_(0.7 * (channel % 3) - 0.4)
    vector = {"device": device, "generator": generator}
    weight, bias = torch.rand(c, **vector) + 0.5, torch.randn(c, **vector)
    mean, var = torch.randn(c, **vector) * 0.5, torch.rand(c, **vector) + 0.5
    return Tensors(x, dy, weight, bias, mean, var)


def copy_of(t: Tensors) -> Tensors:
    return Tensors(*(tensor.detach().clone() for tensor in vars(t).values()))


def own_statistics(t: Tensors) -> Tensors:
    """The same with running statistics apart: a call updates them, and the next provider's check
    starts from what they were.
    """
    return replace(t, running_mean=t.running_mean.clone(), running_var=t.running_var.clone())


def make_call(
    case: BenchCase, provider: Provider, run: Run, t: Tensors
) -> Callable[[], dict[str, Tensor]]:
    """Gives the results by name. `run` is the provider's `call` of the case, made once for all sets
    of inputs: it may compile. For the backward alone, the forward runs here, once.
    """
    if case.op == "forward":

        def forward() -> dict[str, Tensor]:
            with provider.context(case), torch.no_grad():
                return {"output": run(t)}

        return forward

    leaves = [tensor.detach().requires_grad_() for tensor in (t.x, t.weight, t.bias)]
    t = replace(t, x=leaves[0], weight=leaves[1], bias=leaves[2])
    if case.op == "backward":
        with provider.context(case):
            output = run(t)

        def backward() -> dict[str, Tensor]:
            with provider.context(case):
                grads = torch.autograd.grad(output, leaves, t.dy, retain_graph=True)
                return dict(zip(_GRADIENTS, grads, strict=True))

        return backward

    def both() -> dict[str, Tensor]:
        with provider.context(case):
            output = run(t)
            grads = torch.autograd.grad(output, leaves, t.dy)
            return dict(zip(_GRADIENTS, grads, strict=True)) | {"output": output.detach()}

    return both


def run_once(case: BenchCase, provider: Provider, run: Run, t: Tensors) -> dict[str, Tensor]:
    """On a copy: all results, the running statistics that it leaves among them."""
    own = copy_of(t)
    results = make_call(case, provider, run, own)()
    if case.op != "backward":
        results |= {"running_mean": own.running_mean, "running_var": own.running_var}
    return results


def make_copy(case: BenchCase, device: str) -> Callable[[], dict[str, Tensor]]:
    """A copy that moves as many bytes as the operation must: half of them read, half written."""
    source = torch.empty(case.compulsory_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    source.zero_()
    return lambda: {"copy": target.copy_(source)}
