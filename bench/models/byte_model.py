"""The written byte model: what an implementation must move, and what the peers' kernels move.

T is the bytes of x; R and W are one read and one write of T. Per-channel vectors are left out: they
are 1/1000 of T and less wherever speed is of interest.

Compulsory, the least for a tensor that does not stay on chip between two operations:

    forward    1R + 1W = 2T    x; y
    backward   2R + 1W = 3T    x, dy; dx
    both       5T              one after the other, as in training

What stands behind a batch norm adds to that, fused with it, what cannot be left out:

    an add          forward +1R, the residual; backward +1W, its gradient, if an activation follows
    an activation   nothing: of our mask, a byte for every 16, nothing is counted here

As operators of their own, ATen's elementwise kernels read each operand once and write the result
once, in place or not:

    an add          forward 2R + 1W = 3T    y, residual; sum
                    backward 0              the sum's gradient is that of both
    an activation   forward 1R + 1W = 2T    y; z
                    backward 2R + 1W = 3T   dz, z; dy

As with "both", each operator finds the cache cold. For tensors that fit it, this is more than
operators one after the other really move.

A rate in GB/s is always compulsory bytes over time, the same bytes for every provider, so that
rates compare as times do. The floor is a copy that moves as many bytes, half read and half written.

A second read of a tensor need not reach DRAM if the L2 cache still holds it. Peers read in the same
order again and write on the way. With a cache of L bytes whose least recently used lines leave
first, a second read of k tensors finds what lies before the point where the writes have used up the
L - kT bytes that were free: from there on each write evicts what is read next. So it finds
min(T, L - kT) of each of the k, and nothing if kT is L or more. Of what is written more than once,
the same part is still in the cache when it is written again.
"""

from __future__ import annotations

from dataclasses import dataclass

OPS = ("forward", "backward", "both")

_COMPULSORY = {"forward": 2, "backward": 3}
_SEPARATE_ADD = {"forward": 3, "backward": 0}
_SEPARATE_ACTIVATION = {"forward": 2, "backward": 3}


@dataclass(frozen=True)
class Peer:
    """How often a peer's training kernels read and write T, and where that is known from."""

    name: str
    forward: tuple[int, int]  # reads, writes
    backward: tuple[int, int]
    source: str


# Not among them: cuDNN, whose source is closed and whose traffic is not published; torch.compile,
# whose kernels differ from shape to shape; apex's groupbn, which reads once where a slice fits.
PEERS = {
    peer.name: peer
    for peer in (
        Peer("native", (2, 1), (4, 1), "PyTorch's source, aten/native/cuda/Normalization.cuh"),
        Peer("inplace_abn", (2, 1), (4, 3), "InPlace-ABN's source, src/inplace_abn_cuda.cu"),
    )
}


def parts(op: str) -> tuple[str, ...]:
    return ("forward", "backward") if op == "both" else (op,)


def compulsory_bytes(op: str, nbytes: int, add: bool = False, activation: bool = False) -> int:
    """Of x with `nbytes`, and of what is fused with its batch norm."""
    passes = sum(_COMPULSORY[part] for part in parts(op))
    if add:
        passes += sum(part == "forward" or activation for part in parts(op))
    return passes * nbytes


def separate_bytes(op: str, nbytes: int, add: bool, activation: bool) -> int:
    """Of torch's operators behind a batch norm."""
    passes = 0
    for part in parts(op):
        passes += add * _SEPARATE_ADD[part] + activation * _SEPARATE_ACTIVATION[part]
    return passes * nbytes


def peer_bytes(peer: str, op: str, nbytes: int, l2_bytes: int) -> int:
    """DRAM bytes by the peer's model, behind a cache of `l2_bytes` that is cold at the start."""
    total = 0
    for part in parts(op):
        reads, writes = getattr(PEERS[peer], part)
        tensors = 1 if part == "forward" else 2  # read together: x, or x and dy
        found = min(nbytes, max(0, l2_bytes - tensors * nbytes))
        total += (reads + writes) * nbytes - (tensors + writes - 1) * found
    return total


def gb_per_s(nbytes: int, ms: float) -> float:
    return nbytes / ms * 1e-6
