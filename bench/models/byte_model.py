"""The written byte model: what an implementation must move, and what the peers' kernels move.

T is the bytes of x; R and W are one read and one write of T. Per-channel vectors are left out: they
are 1/1000 of T and less wherever speed is of interest.

Compulsory, the least for a tensor that does not stay on chip between two operations:

    forward    1R + 1W = 2T    x; y
    backward   2R + 1W = 3T    x, dy; dx
    both       5T              one after the other, as in training

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


def compulsory_bytes(op: str, nbytes: int) -> int:
    """Of x with `nbytes`."""
    return sum(_COMPULSORY[part] for part in parts(op)) * nbytes


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
