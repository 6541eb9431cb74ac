"""Train on several ranks as if on one: DistributedDataParallel with SyncBatchNorm.

Each rank has a part of every batch. Their gradients are averaged by DistributedDataParallel; their
batch norms share statistics by batchnorm_cuda's SyncBatchNorm. Together the ranks must then do what
one process does with the whole batch and torch.nn's batch norms: each rank runs that beside, and
the script fails if the two part.

    torchrun --nproc-per-node=2 examples/train_ddp.py --toy
    torchrun --nproc-per-node=2 examples/train_ddp.py --toy --unshared    # fails, as it should

Over NCCL with a GPU for each rank, else over gloo.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import choose_device, parse_arguments
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from train_digits import evaluate, load_data, make_network

import batchnorm_cuda

MIN_ACCURACY = 0.8  # chance is 0.1
TOY = {"epochs": 1}

# Both add the same float32 numbers in different orders, and training amplifies what one step
# differs by (train_digits.py). With statistics that are not shared it was 8e-2 after an epoch.
MAX_LOSS_DIFFERENCE = 1e-4


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16, help="of each rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unshared", action="store_true", help="leave statistics to each rank")
    args = parse_arguments(parser, TOY)
    if args.epochs < 1 or args.batch_size < 1:
        parser.error("--epochs and --batch-size must be at least 1")
    return args


def start(choice):
    """Join the group that torchrun has described in the environment. Returns this rank's device."""
    if "RANK" not in os.environ:
        sys.exit("error: no RANK: launch me by `torchrun --nproc-per-node=2 examples/train_ddp.py`")
    device = choose_device(choice)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def finish(status):
    """Leave the group, and then at once.

    gloo's threads may still run; ending the interpreter around them aborts at times.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def make_distributed(network, device, sync):
    """The wrapper first, then the exchange.

    DistributedDataParallel refuses to wrap a SyncBatchNorm that is on the CPU, on the ground that
    torch's own takes GPU tensors only. `convert` keeps every parameter the object that it is, so
    that the wrapper does not notice, and this order is right for GPUs, too.
    """
    wrapped = DistributedDataParallel(network, [device] if device.type == "cuda" else None)
    return batchnorm_cuda.convert(wrapped, sync=sync)


def step(network, optimizer, images, labels):
    """The mean loss over this process's images."""
    loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(networks, data, args):
    """Trains both networks on the same batches. Returns their losses, [steps, 2]."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.02, momentum=0.9) for n in networks]
    order = torch.Generator().manual_seed(args.seed)  # the same on all ranks
    losses = []
    for _ in range(args.epochs):
        for batch in torch.randperm(len(data[0]), generator=order).split(ranks * args.batch_size):
            if len(batch) % ranks:
                continue  # the mean of the ranks' means is that of the batch for equal parts only
            part = batch[rank::ranks]
            ours = step(networks[0], optimizers[0], data[0][part], data[1][part])
            dist.all_reduce(ours)
            theirs = step(networks[1], optimizers[1], data[0][batch], data[1][batch])
            losses.append(torch.stack([ours / ranks, theirs]))
    return torch.stack(losses)


def main():
    args = parse_args()
    torch.set_num_threads(1)  # layers this small only wait for each other's threads
    device = start(args.device)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    say = print if dist.get_rank() == 0 else lambda *_: None

    train_x, train_y, test_x, test_y = load_data(device)
    networks = []
    for _ in range(2):
        torch.manual_seed(args.seed)  # the same weights on all ranks and in both networks
        networks.append(make_network(nn.BatchNorm2d, nn.BatchNorm1d).to(device))
    networks[0] = make_distributed(networks[0], device, sync=not args.unshared)
    kinds = {type(m).__name__ for m in networks[0].modules() if "BatchNorm" in type(m).__name__}
    say(f"{dist.get_world_size()} ranks over {dist.get_backend()}, {', '.join(sorted(kinds))}")

    losses = train(networks, (train_x, train_y), args)
    say(f"\n step  loss of {dist.get_world_size()} ranks  loss of one process")
    for index in range(0, len(losses), max(1, len(losses) // 8)):
        say(f"{index:5}  {losses[index, 0]:15.5f}  {losses[index, 1]:19.5f}")
    _, accuracy = evaluate(networks[0], test_x, test_y)
    difference = (losses[:, 0] - losses[:, 1]).abs().max().item()
    say(f"\nlargest difference of the losses: {difference:.1e}; test accuracy {accuracy:.1%}")
    # Negated, so that a NaN fails too. All ranks see the same numbers and fail together.
    if not difference <= MAX_LOSS_DIFFERENCE:
        say(f"FAILED: the losses part by {difference:.1e}, bound {MAX_LOSS_DIFFERENCE:.0e}")
        finish(1)
    if not accuracy >= MIN_ACCURACY:
        say(f"FAILED: test accuracy {accuracy:.1%}, expected {MIN_ACCURACY:.0%}")
        finish(1)
    say(f"OK: {dist.get_world_size()} ranks train as one process does")
    finish(0)


if __name__ == "__main__":
    main()
