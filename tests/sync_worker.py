"""One rank of a test of synchronised batch norm: runs a list of jobs over gloo, saves the results.

python tests/sync_worker.py RANK RANKS FOLDER JOB...
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no name server, no network

import torch
import torch.distributed as dist
from fused import FORMS
from sync_cases import BACKENDS, CASES, EPS, MOMENTUM, SyncCase
from torch import Tensor, nn
from torch.autograd import Function

from batchnorm_cuda import SyncBatchNorm

TIMEOUT = timedelta(seconds=30)
SHORT_TIMEOUT = timedelta(seconds=2)


def backends() -> Iterator[str]:
    for backend in BACKENDS:
        os.environ["BATCHNORM_CUDA_EMULATE"] = "1" if backend == "emulated" else "0"
        yield backend


def module_for(case: SyncCase, **arguments: Any) -> SyncBatchNorm:
    weight, bias, mean, var = case.parameters()
    module = SyncBatchNorm(len(weight), EPS, MOMENTUM, case.affine, dtype=weight.dtype, **arguments)
    with torch.no_grad():
        module.running_mean.copy_(mean)
        module.running_var.copy_(var)
        if case.affine:
            module.weight.copy_(weight)
            module.bias.copy_(bias)
    return module


def step(
    module: nn.Module, x: Tensor, dy: Tensor, residual: Tensor | None = None
) -> dict[str, Tensor]:
    """Output, gradients and running statistics after a forward and a backward."""
    wanted = {"grad_input": x.detach().requires_grad_()}
    if residual is not None:
        wanted["grad_residual"] = residual.detach().requires_grad_()
    output = module(*wanted.values())
    wanted |= {f"grad_{name}": parameter for name, parameter in module.named_parameters()}
    gradients = torch.autograd.grad(output, wanted.values(), dy)
    results = {"output": output.detach()} | dict(zip(wanted, gradients, strict=True))
    return results | dict(module.named_buffers())


def cases(rank: int, ranks: int) -> dict:
    """Every case for this number of ranks, in every order: results of this rank's part."""
    results = {}
    for backend in backends():
        for case in (case for case in CASES if case.ranks == ranks):
            for order in case.orders():
                x, dy = case.parts()[order[rank]]
                results[backend, case.name, order] = step(module_for(case), x, dy)
    return results


def groups(rank: int, ranks: int) -> dict:
    """Two groups of two ranks, each with its own statistics."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    case = next(case for case in CASES if case.name == "four halves")
    results = {}
    for backend in backends():
        module = module_for(case, process_group=pairs[rank // 2])
        results[backend] = step(module, *case.parts()[rank])
    return results


VARIANTS = [
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"bias": None},
]


def without_bias(kind: type, arguments: dict[str, Any]) -> nn.Module:
    """The module; its bias removed by hand, for versions of torch that have no such argument."""
    module = kind(4, **{k: v for k, v in arguments.items() if k != "bias"}).double()
    if "bias" in arguments:
        module.register_parameter("bias", None)
    return module


def variants(rank: int, ranks: int) -> dict:
    """Training, training, evaluation and a module without peers, for every kind of module."""
    results = {}
    for backend in backends():
        for index, arguments in enumerate(VARIANTS):
            module = SyncBatchNorm(
                4, **{k: v for k, v in arguments.items() if k != "bias"}
            ).double()
            if "bias" in arguments:
                module.register_parameter("bias", None)
            steps = []
            for training in (True, True, False):
                module.train(training)
                x, dy = variant_data(len(steps))[rank]
                steps.append(copy.deepcopy(step(module, x, dy)))
            results[backend, index] = steps
    return results


def variant_data(step: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [
        tuple(torch.randn(n, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
        for n in (5, 3)
    ]


def without_gradients(rank: int, ranks: int) -> dict:
    """Output and state of training mode under no_grad, and those with gradients."""
    results = {}
    for backend in backends():
        x, dy = CASES[0].parts()[rank]
        module = module_for(CASES[0])
        with torch.no_grad():
            output = module(x)
        got = {"output": output, **dict(module.named_buffers())}
        results[backend] = step(module_for(CASES[0]), x, dy), got
    return results


def compiled(rank: int, ranks: int) -> dict:
    """Eager and compiled, of the same module and input, which must agree to the bit."""
    results = {}
    for backend in backends():
        case = CASES[0]
        eager = module_for(case)
        graph = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
        x, dy = case.parts()[rank]
        got = {k.replace("_orig_mod.", ""): v for k, v in step(graph, x, dy).items()}
        results[backend] = step(eager, x, dy), got
        torch.compiler.reset()
    return results


def collectives(rank: int, ranks: int) -> dict:
    """What runs in a forward and in a backward of a channels-last input, and on which shapes."""
    results = {}
    settings = {"activities": [torch.profiler.ProfilerActivity.CPU], "record_shapes": True}
    for backend in backends():
        module = SyncBatchNorm(16, momentum=None)
        x = torch.randn(3, 16, 4, 3).to(memory_format=torch.channels_last).requires_grad_()
        dy = torch.randn(3, 16, 4, 3).to(memory_format=torch.channels_last)
        module(x).backward(dy)  # the first call loads
        with torch.profiler.profile(**settings) as forward:
            output = module(x)
        with torch.profiler.profile(**settings) as backward:
            (grad,) = torch.autograd.grad(output, x, dy)
        strides = [t.stride() for t in (x, output, grad)]
        events = [[(e.name, e.input_shapes) for e in p.events()] for p in (forward, backward)]
        results[backend] = {"forward": events[0], "backward": events[1], "strides": strides}
    return results


def network(rank: int, ranks: int) -> dict:
    """Gradients of a converted network, summed over the ranks as data-parallel training does."""
    results = {}
    for backend in backends():
        converted = SyncBatchNorm.convert_sync_batchnorm(seeded_network())
        x, _ = variant_data(0)[rank]
        converted(x).square().sum().backward()
        for parameter in converted.parameters():
            dist.all_reduce(parameter.grad)
        results[backend] = {name: p.grad for name, p in converted.named_parameters()}
    return results


def seeded_network() -> nn.Module:
    layers = nn.Conv1d(4, 6, 2), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 2, 2)
    network = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.3)
    return network


Sizes = tuple[int, ...]  # rows of each rank


class Local(Function):
    """This rank's rows of tensors that all ranks have; without sizes all of one, as a parameter.

    The gradients are gathered in one go: a collective costs more than all else here.
    """

    @staticmethod
    def forward(ctx: Any, sizes: list[Sizes | None], *wholes: Tensor) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        rank = dist.get_rank()
        parts = [
            (whole.split(rows)[rank] if rows else whole).clone()
            for rows, whole in zip(sizes, wholes, strict=True)
        ]
        needed = zip(parts, ctx.needs_input_grad[1:], strict=True)
        ctx.mark_non_differentiable(*(part for part, needs in needed if not needs))
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *Summed.apply(ctx.sizes, *grads)


class Summed(Function):
    """The transpose of Local: all ranks' rows, on all ranks, and sums where there are no sizes."""

    @staticmethod
    def forward(ctx: Any, sizes: list[Sizes | None], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        wholes = []
        for rows, part in zip(sizes, parts, strict=True):
            whole = part.new_zeros(sum(rows), *part.shape[1:]) if rows else part
            if rows:
                whole.split(rows)[dist.get_rank()].copy_(part)
            wholes.append(whole)
        own = torch.cat([whole.flatten() for whole in wholes])
        # Gathered and then added, in a fifth of the time of gloo's all_reduce.
        terms = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(terms, own)
        total = torch.stack(terms).sum(0).split([whole.numel() for whole in wholes])
        return tuple(t.view(whole.shape) for t, whole in zip(total, wholes, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *Local.apply(ctx.sizes, *grads)


def double_backward(rank: int, ranks: int) -> dict:
    """gradcheck and gradgradcheck of the whole batch through the ranks, which stay in step."""
    generator = torch.Generator().manual_seed(0)
    results = {}
    for backend in backends():
        for sizes, affine, of_input in (
            ((2, 1), True, True),
            ((2, 1), True, False),
            ((2, 1), False, True),
            ((3, 0), True, True),
        ):
            shapes = [(sum(sizes), 2, 2), *([(2,), (2,)] if affine else [])]
            inputs = [torch.rand(s, generator=generator, dtype=torch.float64) for s in shapes]
            for tensor in inputs if of_input else inputs[1:]:
                tensor.requires_grad_()
            function = whole_batch_norm(sizes)
            torch.manual_seed(0)  # of the gradients that gradgradcheck draws
            # A failure is told apart from those of the other jobs.
            results[backend, sizes, affine, of_input] = all(
                check(function, inputs, raise_exception=False)
                for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck)
            )
    return results


def whole_batch_norm(sizes: Sizes, activation: str | None = None) -> Callable[..., Tensor]:
    """Synchronised batch norm as a function of tensors that all ranks have."""

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        of_parameters = len(rest[:2])
        module = SyncBatchNorm(
            2, 0.1, affine=bool(of_parameters), track_running_stats=False, activation=activation
        )
        rows = [sizes, *[None] * of_parameters, *[sizes] * len(rest[2:])]
        x, *rest = Local.apply(rows, x, *rest)
        state = dict(zip(("weight", "bias"), rest, strict=False))
        output = torch.func.functional_call(module, state, (x, *rest[2:]))
        return Summed.apply([sizes], output)[0]

    return function


def fused_module(case: SyncCase, form: str) -> SyncBatchNorm:
    return module_for(case, activation="relu" if FORMS[form][1] else None)


def fused_data(case: SyncCase, part: int, form: str) -> tuple[Tensor, ...]:
    """x, dy and where there is one the residual, of other strides than x in most cases."""
    x, dy = case.parts()[part]
    return (x, dy, x.flip(0).contiguous()) if FORMS[form][0] else (x, dy)


def fused_cases(rank: int, ranks: int) -> dict:
    """Every case for this number of ranks in every form."""
    results = {}
    for backend in backends():
        for case in (case for case in CASES if case.ranks == ranks):
            for form in FORMS:
                module = fused_module(case, form)
                results[backend, case.name, form] = step(module, *fused_data(case, rank, form))
    return results


def fused_compiled(rank: int, ranks: int) -> dict:
    """Eager and compiled, and under no_grad; they must agree to the bit."""
    results = {}
    for backend in backends():
        for form in FORMS:
            data = fused_data(CASES[0], rank, form)
            eager = fused_module(CASES[0], form)
            graph = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
            got = {k.replace("_orig_mod.", ""): v for k, v in step(graph, *data).items()}
            with torch.no_grad():
                output = fused_module(CASES[0], form)(data[0], *data[2:])
            results[backend, form] = step(eager, *data), got, output
            torch.compiler.reset()
    return results


def fused_collectives(rank: int, ranks: int) -> dict:
    """What of torch.distributed runs in a forward and in a backward, for each set of gradients."""
    results = {}
    settings = {"activities": [torch.profiler.ProfilerActivity.CPU]}
    for backend in backends():
        for of_input in (True, False):
            module = SyncBatchNorm(16, activation="relu")
            x = torch.randn(3, 16, 4, 3).requires_grad_(of_input)
            residual = torch.randn(3, 16, 4, 3).requires_grad_()
            with torch.profiler.profile(**settings) as forward:
                output = module(x, residual)
            with torch.profiler.profile(**settings) as backward:
                output.sum().backward()
            results[backend, of_input] = [
                [event.name for event in p.events() if event.name.startswith("c10d::")]
                for p in (forward, backward)
            ]
    return results


def fused_recorded(rank: int, ranks: int) -> dict:
    """The gradients of a backward that is recorded, and of one that is not."""
    results = {}
    case = next(case for case in CASES if case.name == "double")
    for backend in backends():
        for form in FORMS:
            x, dy, *residual = fused_data(case, rank, form)
            module = fused_module(case, form)
            inputs = [t.requires_grad_() for t in (x, *residual)]
            wanted = [*inputs, *module.parameters()]
            output = module(*inputs)
            results[backend, form] = [
                torch.autograd.grad(output, wanted, dy, create_graph=recorded, retain_graph=True)
                for recorded in (False, True)
            ]
    return results


def fused_double_backward(rank: int, ranks: int) -> dict:
    """gradcheck and gradgradcheck of the whole batch through the ranks, as in `double_backward`."""
    results = {}
    sizes = (3, 1)
    for backend in backends():
        for form, (added, relu) in FORMS.items():
            generator = torch.Generator().manual_seed(0)
            shapes = [(4, 2), (2,), (2,), *([(4, 2)] if added else [])]
            inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
            function = whole_batch_norm(sizes, "relu" if relu else None)
            torch.manual_seed(0)
            results[backend, form] = all(
                check(function, [t.requires_grad_() for t in inputs], raise_exception=False)
                for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck)
            )
    return results


def batched_gradients(rank: int, ranks: int) -> dict:
    """What is_grads_batched says, of a gradient and of a gradient's gradient."""
    results = {}
    for backend in backends():
        x = torch.randn(3, 4, 2, requires_grad=True)
        output = SyncBatchNorm(4)(x)
        (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        several = torch.ones(2, 3, 4, 2)
        results[backend] = [refusal(of, x, several) for of in (output, grad)]
    return results


def refusal(of: Tensor, x: Tensor, several: Tensor) -> str | None:
    try:
        torch.autograd.grad(of, x, several, is_grads_batched=True, retain_graph=True)
    except RuntimeError as raised:
        return str(raised)
    return None


def failures(rank: int, ranks: int) -> dict:
    """The last rank once does not come, then dies: what the others get, after how long."""
    short = dist.new_group(list(range(ranks)), timeout=SHORT_TIMEOUT)
    x = torch.ones(3, 4) * torch.arange(3.0).view(3, 1)
    last = rank == ranks - 1
    results = {}
    if not last:
        results["absent"] = failure(SyncBatchNorm(4, process_group=short), x)
    SyncBatchNorm(4)(x)  # the world is whole
    if last:
        os._exit(0)
    results["dead"] = failure(SyncBatchNorm(4), x)
    return results


def failure(module: SyncBatchNorm, x: Tensor) -> dict:
    before = copy.deepcopy(module.state_dict())
    start = time.monotonic()
    try:
        module(x)
        error = None
    except RuntimeError as raised:
        error = str(raised)
    seconds = time.monotonic() - start
    after = module.state_dict()
    unchanged = all(torch.equal(after[name], value) for name, value in before.items())
    return {"error": error, "seconds": seconds, "unchanged": unchanged}


def main() -> None:
    rank, ranks, folder, *jobs = sys.argv[1:]
    rank, ranks, folder = int(rank), int(ranks), Path(folder)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=TIMEOUT,
    )
    for job in jobs:
        torch.save(globals()[job](rank, ranks), folder / f"{job}-{rank}.pt")
    os._exit(0)  # the group may have lost a rank, for whom its destructor would wait


if __name__ == "__main__":
    main()
