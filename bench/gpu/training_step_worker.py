"""Times training steps of one model in a process of its own: `bench.training_step` starts it.

    python3 -m bench.gpu.training_step_worker bf16 nhwc torch ours fused

Variants of one process take turns, a step each, so that a clock that drifts drifts for all. Each
answers with a row (bench/gpu/worker.py) as soon as all of its own is known.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import batchnorm_cuda

from ..timing.samples import spread
from .worker import say

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
VARIANTS = ("torch", "ours", "fused", "torch+compile", "ours+compile")
WARM_UP, STEPS, PROFILED = 5, 15, 2
LEARNING_RATE, MOMENTUM = 0.002, 0.9  # slow, so that losses of equal models stay close
LOSS_SCALE = 1024.0  # of fp16, whose small gradients would vanish; fixed, so that no step waits
MIB = 2**20

# cuDNN's, PyTorch's own, Inductor's and ours, these two with whatever is fused to them.
BATCH_NORM = re.compile(r"batch_?norm|\bbn_(fw|bw|inf|add)|nhwc_?bn", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    dtype: str
    layout: str
    device: str  # "cpu": the host model, a step of a small model to prove the logic

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def batch(self) -> int:
        # Of two images the last batch norms have two values a channel, and rounding moves the loss
        # by percents.
        return 128 if self.gpu else 8

    @property
    def size(self) -> int:
        return 224 if self.gpu else 32

    @property
    def steps(self) -> tuple[int, int]:
        """Before the timed ones, and these."""
        return (WARM_UP, STEPS) if self.gpu else (1, 0)

    @property
    def classes(self) -> int:
        return 1000 if self.gpu else 10

    @property
    def model_name(self) -> str:
        return "resnet50" if self.gpu else "resnet10"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        resnet = torchvision.models.resnet
        if self.gpu:
            return resnet.resnet50(num_classes=self.classes)
        return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=self.classes)

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        placed = images.to(self.device, memory_format=LAYOUTS[self.layout])
        return placed, labels.to(self.device)


class Variant:
    """A model, its optimizer, and a step of it."""

    def __init__(self, name: str, model: nn.Module, setting: Setting) -> None:
        self.name, self.setting = name, setting
        model = copy.deepcopy(model).to(setting.device, memory_format=LAYOUTS[setting.layout])
        if not name.startswith("torch"):
            model = batchnorm_cuda.convert(model, fuse=name == "fused")
        self.model = model.train()
        self.run = torch.compile(model) if name.endswith("compile") else model
        parameters = list(model.parameters())
        self.optimizer = torch.optim.SGD(parameters, LEARNING_RATE, MOMENTUM, foreach=True)
        self.losses: list[Tensor] = []
        self.times: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.setting.device, DTYPES[self.setting.dtype]):
            loss = F.cross_entropy(self.run(images), labels)
        scale = LOSS_SCALE if self.setting.dtype == "fp16" else 1.0
        (loss * scale).backward()
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.model.parameters()], 1 / scale)
        self.optimizer.step()
        self.losses.append(loss.detach())

    def timed_step(self, images: Tensor, labels: Tensor) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.step(images, labels)
        end.record()
        self.times.append((start, end))

    def held_bytes(self) -> int:
        """Between steps."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        for state in self.optimizer.state.values():
            tensors += [t for t in state.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in tensors)

    def row(self) -> dict[str, Any]:
        setting = self.setting
        row = {"model": setting.model_name, "batch": setting.batch, "layout": setting.layout}
        row |= {"dtype": setting.dtype, "variant": self.name, "status": "ok"}
        warm_up = setting.steps[0]
        first, later = self.losses[0].item(), self.losses[warm_up - 1].item()
        return row | {"loss_first": f"{first:.5f}", "loss": f"{later:.5f}"}


def batch_norm_ms(events: list[Any], steps: int) -> float:
    """A step's share of the time in kernels of batch norm, of a profile's averages."""
    names = [event for event in events if BATCH_NORM.search(event.key)]
    return sum(event.self_device_time_total for event in names) / 1e3 / steps


def measure(variants: list[Variant], images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Rows of what has been warmed up."""
    for _ in range(STEPS):
        for variant in variants:
            variant.timed_step(images, labels)
    torch.cuda.synchronize()
    rows = []
    for variant in variants:
        others = sum(other.held_bytes() for other in variants if other is not variant)
        torch.cuda.reset_peak_memory_stats()
        variant.step(images, labels)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - others
        times = spread([start.elapsed_time(end) for start, end in variant.times])
        row = variant.row() | {"samples": times.samples, "peak_mib": round(peak / MIB)}
        for column, ms in (("ms", times.median), ("p20", times.low), ("p80", times.high)):
            row[column] = f"{ms:.3f}"
        rows.append(row | profiled(lambda v=variant: v.step(images, labels), times.median))
    return rows


def profiled(step: Callable[[], None], step_ms: float) -> dict[str, Any]:
    """The part of batch norm; a profiler that does not work leaves the times as they are."""
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            for _ in range(PROFILED):
                step()
            torch.cuda.synchronize()
        ms = batch_norm_ms(list(record.key_averages()), PROFILED)
    except RuntimeError as error:
        return {"note": f"no profile: {error}"[:200]}
    return {"bn_ms": f"{ms:.3f}", "bn_share": f"{ms / step_ms:.4f}"}


def run(setting: Setting, names: list[str], tell: Callable[[dict[str, Any]], None]) -> None:
    model = setting.model()
    variants = [Variant(name, model, setting) for name in names]
    images, labels = setting.data()
    for _ in range(setting.steps[0]):
        for variant in variants:
            variant.step(images, labels)
    device = torch.cuda.get_device_name() if setting.gpu else "the host model"
    known = {"kind": "measured" if setting.gpu else "host", "device": device}
    for variant in variants:  # a time may come late or never; that it trains is worth a row
        tell({"trained": known | variant.row()})
    rows = measure(variants, images, labels) if setting.gpu else [v.row() for v in variants]
    for row in rows:
        tell({"row": known | row})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu.training_step_worker")
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("layout", choices=LAYOUTS)
    parser.add_argument("variants", nargs="+", choices=VARIANTS)
    options = parser.parse_args(arguments)
    torch.backends.cudnn.benchmark = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run(Setting(options.dtype, options.layout, device), options.variants, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
