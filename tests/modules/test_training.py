"""What training loops do to a model: everything as with torch.nn's batch norms."""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import Backend
from forked import Forks, Program
from parametrisations import both_modes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval, parametrize
from torch.utils.checkpoint import checkpoint

import batchnorm_cuda
from batchnorm_cuda import convert

pytestmark = pytest.mark.usefixtures("one_thread")

LAZY = [
    (batchnorm_cuda.LazyBatchNorm1d, nn.LazyBatchNorm1d, (4, 3)),
    (batchnorm_cuda.LazyBatchNorm2d, nn.LazyBatchNorm2d, (4, 3, 2, 5)),
    (batchnorm_cuda.LazyBatchNorm3d, nn.LazyBatchNorm3d, (2, 3, 2, 2, 3)),
]
every_lazy = pytest.mark.parametrize(
    ("ours", "theirs", "shape"), LAZY, ids=lambda value: getattr(value, "__module__", "")
)


def make_network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Convolution and linear layers between batch norms; SiLU, which amplifies no rounding."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 6),
        nn.BatchNorm1d(6),
    ).to(dtype)


def twin_networks(backend: Backend, dtype: torch.dtype) -> tuple[nn.Sequential, nn.Sequential]:
    theirs = make_network(dtype).to(backend.device)
    return convert(copy.deepcopy(theirs)), theirs


def batches(count: int, dtype: torch.dtype, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(5, 2, 4, 4, dtype=dtype, generator=generator)


def assert_same_state(ours: nn.Module, theirs: nn.Module, **tolerances: float) -> None:
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **tolerances)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_grad_scaler(backend: Backend, dtype: torch.dtype) -> None:
    """Half activations, float32 parameters; a step with infinite gradients is skipped."""
    nets = twin_networks(backend, torch.float32)
    losses = []
    seen = []
    nets[0][1].register_forward_hook(lambda _, args, out: seen.extend((args[0].dtype, out.dtype)))
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler(backend.device, init_scale=256.0)
        losses.append([])
        for step, x in enumerate(batches(4, torch.float32)):
            with torch.autocast(backend.device, dtype=dtype):
                loss = (net(x.to(backend.device)).float() - 0.3).square().mean()
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            scaler.scale(loss * (torch.inf if step == 2 else 1)).backward()
            before = net[1].weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, net[1].weight) == (step == 2)
        assert scaler.get_scale() == 128.0
        assert net[1].weight.grad.dtype == torch.float32
    assert set(seen) == {dtype}
    # Each of the three activations behind a batch norm is rounded to the dtype, in another way
    # where the sums differ by a bit; a step moves the weights by lr times as much.
    torch.testing.assert_close(*losses, rtol=4 * torch.finfo(dtype).eps, atol=0)


@both_modes
def test_autocast_inserts_no_casts(kernels: Backend, training: bool) -> None:
    module = batchnorm_cuda.BatchNorm2d(3).to(kernels.device).train(training)
    x = torch.randn(2, 3, 4, 4).to(kernels.device, torch.bfloat16).requires_grad_()
    dy = torch.randn_like(x)
    module(x).backward(dy)  # allocates .grad
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.autocast(kernels.device, dtype=torch.bfloat16):
            output = module(x)
        output.backward(dy)
    names = {event.name for event in profile.events()}
    assert any("BatchNormFunction" in name for name in names)
    assert "BatchNormFunction" in names  # the forward by itself
    assert not names & {"aten::to", "aten::_to_copy", "aten::copy_", "aten::clone"}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(backend: Backend, use_reentrant: bool) -> None:
    """The recomputed forward updates the running statistics again, as torch.nn's does."""
    nets = twin_networks(backend, torch.float64)
    grads = []
    for net in nets:
        for x in batches(2, torch.float64):
            x = x.to(backend.device).requires_grad_()
            net.zero_grad()
            output = checkpoint(net[:6], x, use_reentrant=use_reentrant)
            net[6:](output).pow(3).sum().backward()
        grads.append([x.grad, *(p.grad for p in net.parameters())])
        assert int(net[1].num_batches_tracked) == 4
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    assert_same_state(*nets, rtol=1e-10, atol=1e-11)


def test_channels_last_conversion(backend: Backend) -> None:
    nets = [
        net.to(memory_format=torch.channels_last) for net in twin_networks(backend, torch.float32)
    ]
    x = next(batches(1, torch.float32)).to(backend.device, memory_format=torch.channels_last)
    results = []
    for net in nets:
        layouts = []
        leaf = x.clone().requires_grad_()
        hidden = net[:6](leaf)
        for tensor in (net[1](net[0](leaf)), hidden):
            layouts.append(tensor.is_contiguous(memory_format=torch.channels_last))
        hidden.pow(2).sum().backward()
        layouts.append(leaf.grad.is_contiguous(memory_format=torch.channels_last))
        assert all(layouts)
        results.append([hidden, leaf.grad])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_to(backend: Backend) -> None:
    """Devices and dtypes by the usual ways; from meta by to_empty and load_state_dict."""
    net = convert(make_network()).to(backend.device)
    net(next(batches(1, torch.float64)).to(backend.device))
    with torch.device("meta"):
        empty = convert(make_network())
    empty.to_empty(device=backend.device).load_state_dict(net.state_dict())
    assert_same_state(empty, net, rtol=0, atol=0)
    assigned = convert(make_network().to("meta"))
    assigned.load_state_dict(net.state_dict(), assign=True)
    x = next(batches(1, torch.float64, seed=1)).to(backend.device)
    assert torch.equal(assigned(x), empty(x))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        half = copy.deepcopy(net).to(dtype)
        assert half[1].running_var.dtype == dtype
        assert half[1].num_batches_tracked.dtype == torch.int64
        assert half(x.to(dtype)).dtype == dtype


def test_share_memory(aten: Backend) -> None:
    """The statistics are updated in the shared memory, not in a copy."""
    module = batchnorm_cuda.BatchNorm1d(3)
    module.share_memory()
    others = torch.tensor([]).set_(module.running_mean.untyped_storage())
    module(torch.ones(4, 3))
    assert module.running_mean.is_shared() and module.num_batches_tracked.is_shared()
    torch.testing.assert_close(others, torch.full((3,), 0.1))


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def test_parametrisation(backend: Backend) -> None:
    nets = twin_networks(backend, torch.float64)
    grads = []
    for net in nets:
        parametrize.register_parametrization(net[1], "weight", Exponential())
        parametrize.register_parametrization(net[4], "bias", Exponential())
        x = next(batches(1, torch.float64)).to(backend.device)
        net(x).pow(3).sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert isinstance(nets[0][1], batchnorm_cuda.BatchNorm2d)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    assert_same_state(*nets, rtol=1e-10, atol=1e-11)


@every_lazy
@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"track_running_stats": False}])
def test_lazy(backend: Backend, ours: type, theirs: type, shape, arguments: dict) -> None:
    module, expected = ours(momentum=0.3, **arguments), theirs(momentum=0.3, **arguments)
    assert isinstance(module, theirs)
    assert module.has_uninitialized_params() == expected.has_uninitialized_params()
    assert list(module.state_dict()) == list(expected.state_dict())
    module.to(backend.device, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    leaf = x.to(backend.device).requires_grad_()
    module(leaf).pow(3).sum().backward()
    expected = expected.double()
    wanted = expected(x)
    assert type(module) is getattr(batchnorm_cuda, theirs.__name__.removeprefix("Lazy"))
    assert repr(module) == repr(expected)
    torch.testing.assert_close(module(leaf).cpu(), wanted)
    expected(x)
    assert_same_state(module.cpu(), expected)


@every_lazy
def test_lazy_state(backend: Backend, ours: type, theirs: type, shape) -> None:
    """Uninitialised and initialised states load into each other, ours and torch's."""
    ready = ours().to(backend.device)
    ready(torch.randn(shape).to(backend.device))
    for fresh in (ours(), theirs()):
        fresh.load_state_dict(ready.state_dict())
        assert_same_state(fresh.to(backend.device), ready, rtol=0, atol=0)
    lazy = ours()
    lazy.load_state_dict(theirs().state_dict())
    assert lazy.has_uninitialized_params()


def test_lazy_module_refuses_a_wrong_rank(backend: Backend) -> None:
    module = batchnorm_cuda.LazyBatchNorm2d().to(backend.device)
    with pytest.raises(ValueError, match="expected 4D input"):
        module(torch.randn(4, 3).to(backend.device))


def test_fusion_helpers(backend: Backend) -> None:
    """torch.nn.utils folds ours into the layer before, as it does with torch.nn's."""
    net = twin_networks(backend, torch.float64)[0]
    for x in batches(2, torch.float64):
        net(x.to(backend.device))
    net.eval()
    x = x.to(backend.device)
    fused = fuse_conv_bn_eval(net[0], net[1])
    torch.testing.assert_close(fused(x), net[:2](x))
    flat = net[:7](x)
    torch.testing.assert_close(fuse_linear_bn_eval(net[7], net[8])(flat), net[7:](flat))


def test_replacing_batch_norms_for_functorch(backend: Backend) -> None:
    net = twin_networks(backend, torch.float64)[0]
    torch.func.replace_all_batch_norm_modules_(net)
    assert net[1].running_mean is None and not net[1].track_running_stats
    x = next(batches(1, torch.float64)).to(backend.device)
    net.eval()
    torch.testing.assert_close(net[:2](x).mean((0, 2, 3)), torch.zeros(8).to(x), atol=1e-12, rtol=0)


# --- Threads and processes ----------------------------------------------------------------------


def thread_of_steps(index: int, backend: Backend) -> list[Tensor]:
    """A few training steps on a shape of this thread's own."""
    generator = torch.Generator().manual_seed(index)
    module = batchnorm_cuda.BatchNorm2d(4 + index).to(backend.device)
    for _ in range(5):
        x = torch.randn(3, 4 + index, 6, 5, generator=generator).to(backend.device).requires_grad_()
        output = module(x)
        output.backward(torch.randn(x.shape, generator=generator).to(backend.device))
    return [output.detach(), x.grad, module.weight.grad, module.bias.grad, module.running_var]


def test_threads(backend: Backend) -> None:
    """Forwards and backwards of several Python threads at once give what each gives alone."""
    results: dict[int, list[Tensor]] = {}
    start = threading.Barrier(6)

    def work(index: int) -> None:
        start.wait()
        results[index] = thread_of_steps(index, backend)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(6))
    for index, got in results.items():
        expected = thread_of_steps(index, backend)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_threads_share_a_module_in_eval(backend: Backend) -> None:
    module = batchnorm_cuda.BatchNorm2d(5).to(backend.device).eval()
    inputs = [torch.randn(2, 5, 3, 3).to(backend.device) for _ in range(8)]
    expected = [module(x) for x in inputs]
    results = [None] * len(inputs)

    def work(index: int) -> None:
        results[index] = module(inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def replicated(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


def sharded(net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(net[1], mesh=mesh)  # by itself: torch derives a class from ours
    fully_shard([net[3], net[4]], mesh=mesh)
    return fully_shard(net, mesh=mesh)


def sharded_half(net: nn.Module) -> nn.Module:
    """bfloat16 parameters and activations beside float32 statistics."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fully_shard(net, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)


# How ours and torch's network are wrapped, their dtype, and how far they may part. torch's layers
# take no bfloat16 parameters beside float32 statistics on the CPU: they train in float32 there, and
# ours differs by the roundings of activations and gradients to bfloat16.
WRAPPERS = [
    (replicated, replicated, torch.float64, 1e-9),
    (sharded, sharded, torch.float64, 1e-9),
    (sharded_half, sharded, torch.float32, 4 * torch.finfo(torch.bfloat16).eps),
]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train_synchronised(rank: int) -> None:
    """Each rank has a part of the batch, of another size; torch's local layers have all of it.

    DistributedDataParallel wraps no synchronised batch norm on the CPU, but trains what becomes one
    after it was wrapped.
    """
    torch.manual_seed(0)
    theirs = make_network()
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        DistributedDataParallel(convert(copy.deepcopy(theirs), sync=True))
    ours = convert(DistributedDataParallel(copy.deepcopy(theirs)), sync=True)
    nets = (ours, theirs)
    shares = (dist.get_world_size(), 1)  # the wrapper averages the gradients over the ranks
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    for x in batches(3, torch.float64):
        parts = (x[rank::2], x)
        for net, part, share, optimizer in zip(nets, parts, shares, optimizers, strict=True):
            optimizer.zero_grad()
            ((net(part) - 0.3).square().sum() * (share / len(x))).backward()
            optimizer.step()
    assert sum(isinstance(m, batchnorm_cuda.SyncBatchNorm) for m in ours.modules()) == 3
    assert_same_state(ours.module, theirs, rtol=1e-9, atol=1e-9)


def worker(rendezvous: str, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for wrap_ours, wrap_theirs, dtype, tolerance in WRAPPERS:
        states = []
        for change, wrap in ((convert, wrap_ours), (lambda net: net, wrap_theirs)):
            torch.manual_seed(0)
            net = wrap(change(make_network(dtype)))
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
            for x in batches(3, dtype, seed=rank):
                loss = (net(x).float() - 0.3).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            states.append({k: whole(v).detach() for k, v in net.state_dict().items()})
        torch.testing.assert_close(*states, rtol=tolerance, atol=tolerance)
    train_synchronised(rank)
    dist.barrier()  # no rank closes its connections while the other still uses them
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still run: ending the interpreter around them aborts at times


def test_two_processes(forks: Forks, kernels: Backend, tmp_path: Path) -> None:
    """DistributedDataParallel, FSDP2 and synchronised batch norm over gloo, against torch.nn's."""
    emulated = {"BATCHNORM_CUDA_EMULATE": "1"} if kernels.name == "emulated" else {}
    command = (__file__, str(tmp_path / "rendezvous"))
    done = forks.run_together([Program((*command, rank), emulated) for rank in ("0", "1")])
    assert not any(r.returncode for r in done), "".join(r.stderr for r in done)


if __name__ == "__main__":  # a rank of test_two_processes
    worker(sys.argv[1], int(sys.argv[2]))
