"""Runs one operation on the CPU model of CUDA and sums up what its memory traffic comes to.

The engine (tests/simt/README.md, "What is counted") reports DRAM bytes of every buffer and sectors
of every source line. Here they are set against the plan's figures, which are about activations
alone. So activations are summed apart from per-channel vectors (parameters and statistics) and from
workspace (partial results, flags): those two are shown beside, for on a tensor of a few kilobytes
they would drown what the plan is about.

Nothing here is measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from batchnorm_cuda import devices
from batchnorm_cuda._build.extension import load_emulated
from batchnorm_cuda._explain.explain import explain_forced

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
LAYOUTS = ("nchw", "nhwc")
OPS = ("forward", "backward", "eval", "eval_backward")
STRATEGIES = ("auto", "two_pass", "team")

WINDOW_BYTES = 16
_MOMENTUM, _EPS = 0.1, 1e-5

# Every buffer that a kernel declares (visit_buffers in csrc/*params.h). A name that is missing here
# is an error: a new activation must not pass for a parameter.
_KINDS = {
    "activation": {
        *("input", "output", "grad_output", "grad_input", "grad_grad_output", "grad_grad_input"),
        *("residual", "mask", "grad_residual"),
    },
    "parameter": {
        *("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
        *("mean", "invstd", "save_mean", "save_invstd", "grad_weight", "grad_bias"),
        *("grad_grad_weight", "grad_grad_bias", "count", "total_count"),
    },
    "workspace": {
        *("partials", "sum_dy", "sum_dy_xhat", "sums", "moments", "gathered", "slots", "sync"),
    },
}


@dataclass(frozen=True)
class Case:
    """One operation on one tensor. `shift`: elements past a 16-byte boundary where it starts.

    With `residual` and `relu` it is the fused one: a training forward then leaves the ReLU's mask.
    """

    shape: tuple[int, ...]  # (N, C, ...)
    layout: str = "nchw"  # or nhwc: channels last, whatever the rank
    dtype: str = "fp16"
    op: str = "forward"
    shift: int = 0
    residual: bool = False
    relu: bool = False

    @property
    def activation(self) -> str | None:
        return "relu" if self.relu else None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    def tensor(self) -> Tensor:
        """Zeros of the case's shape and memory order: traffic does not depend on values."""
        n, c, *spatial = self.shape
        sizes = self.shape if self.layout == "nchw" else (n, *spatial, c)
        dtype = DTYPES[self.dtype]
        flat = torch.zeros(self.numel + WINDOW_BYTES // dtype.itemsize, dtype=dtype)
        dense = flat[self.shift : self.shift + self.numel].view(sizes)
        return dense if self.layout == "nchw" else dense.movedim(-1, 1)


@dataclass(frozen=True)
class Buffer:
    name: str
    kind: str  # activation, parameter or workspace
    bytes: int
    dram_read: int
    dram_written: int

    @property
    def dram_bytes(self) -> int:
        return self.dram_read + self.dram_written


@dataclass(frozen=True)
class Site:
    """The warp accesses of one source line to one buffer."""

    kernel: str
    site: str
    buffer: str
    kind: str
    write: bool
    accesses: int
    sectors: int  # touched
    fewest: int  # that the same bytes could lie in

    @property
    def efficiency(self) -> float:
        return self.fewest / self.sectors


@dataclass(frozen=True)
class Traffic:
    """Counts of one operation under one strategy, beside the plan's figures for it."""

    strategy: str  # team or two_pass
    reason: str
    launches: tuple[str, ...]
    compulsory_bytes: int
    predicted_bytes: int
    buffers: tuple[Buffer, ...]
    sites: tuple[Site, ...]

    def dram_bytes(self, kind: str) -> int:
        return sum(buffer.dram_bytes for buffer in self.buffers if buffer.kind == kind)

    @property
    def counted_bytes(self) -> int:
        """DRAM bytes of activations, what the plan's figures are about."""
        return self.dram_bytes("activation")

    @property
    def total_bytes(self) -> int:
        return sum(buffer.dram_bytes for buffer in self.buffers)

    @property
    def sector_efficiency(self) -> float:
        """Fewest sectors over touched ones, of all accesses to activations."""
        sites = [site for site in self.sites if site.kind == "activation"]
        touched = sum(site.sectors for site in sites)
        return sum(site.fewest for site in sites) / touched if touched else 1.0


def scaled_device(name: str, sms: int | None = None) -> dict[str, Any]:
    """The described device, or what is left of it with `sms` SMs.

    L2 cache and bandwidth shrink in proportion; what is counted per SM stays. A tensor whose batch
    shrinks with it keeps each SM's share of work, and of L2 cache.
    Clusters are those of whole GPCs.
    """
    device = devices.describe(name)
    if sms is not None and sms != device["sm_count"]:
        full = device["sm_count"]
        device["name"] += f" cut to {sms} of {full} SMs"
        device["sm_count"] = sms
        device["l2_bytes"] = device["l2_bytes"] * sms // full
        device["bandwidth_gb_s"] = device["bandwidth_gb_s"] * sms / full
        for size in (2, 4, 8):
            device[f"clusters_of_{size}"] = min(device[f"clusters_of_{size}"], sms // size)
    return device


def count(case: Case, device: dict[str, Any], strategy: str = "auto", **forced: Any) -> Traffic:
    """Runs the case's kernels on the model of `device`, behind a cold L2 cache, and counts.

    Args:
        case: what to run. All parameters are there and all gradients wanted; parameters are
            float32, or float64 for fp64.
        device: properties as `batchnorm_cuda.devices` describes them.
        strategy: "auto", "two_pass" or "team"; a team that is impossible becomes two passes.
        forced: further options of the planner, such as pattern="along_row".
    """
    module = load_emulated()
    model = module._host_model
    x = case.tensor()
    call = operation(case, module, x)
    options = {"strategy": strategy, **forced}
    fused = {"residual": case.residual, "activation": case.activation}
    plan = explain_forced(x, options, device=device, op=case.op, **fused)
    model.set_device(devices.planner_properties(device))
    module.set_plan_options(options)
    model.start_traffic()
    try:
        call()
    finally:
        report = model.stop_traffic()
        module.set_plan_options({})
        model.set_device({})
    return Traffic(
        strategy=plan.strategy.replace(" ", "_"),
        reason=plan.reason,
        launches=tuple(report["launches"]),
        compulsory_bytes=plan.compulsory_bytes,
        predicted_bytes=plan.predicted_bytes,
        buffers=tuple(Buffer(kind=_kind(b["name"]), **b) for b in report["buffers"]),
        sites=tuple(Site(kind=_kind(s["buffer"]), **s) for s in report["sites"]),
    )


def operation(case: Case, module: ModuleType, x: Tensor) -> Callable[[], object]:
    """The call that is counted. Its other tensors are made on torch's default device."""
    c = case.shape[1]
    dtype = torch.float64 if case.dtype == "fp64" else torch.float32
    weight, bias, mean, var = (torch.ones(c, dtype=dtype) for _ in range(4))
    training = not case.op.startswith("eval")
    if case.op.endswith("backward"):
        dy = torch.zeros_like(x)
        saved = (x, weight, bias, mean, var)
        if not case.relu:
            return lambda: module.backward(dy, *saved, training, True, True, True)
        lanes = WINDOW_BYTES // x.element_size()
        mask = torch.zeros(math.ceil(x.numel() / lanes / 4) * 4, dtype=torch.uint8)
        wanted = (True, True, True, case.residual)
        return lambda: module.fused_backward(dy, *saved, mask, training, *wanted)
    parameters = (x, weight, bias, mean, var, None)
    if not (case.residual or case.relu):
        return lambda: module.forward(*parameters, training, _MOMENTUM, _EPS)
    fused = (torch.zeros_like(x) if case.residual else None, case.relu, training)
    return lambda: module.fused_forward(*parameters, *fused, training, _MOMENTUM, _EPS)


def _kind(name: str) -> str:
    for kind, names in _KINDS.items():
        if name in names:
            return kind
    raise KeyError(f"{__name__} does not know the buffer {name!r} of csrc/*params.h")
