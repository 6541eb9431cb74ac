"""What can be said of a case without a GPU: bytes, by models. No time and no rate.

Three models, none of which is a measurement: the plan's prediction for a described device at full
size; DRAM bytes counted while the kernels' own source runs on the CPU model of CUDA, for a problem
cut to what a CPU can run; and the byte models of the peers (byte_model.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from batchnorm_cuda import devices, explain

from .cases.behind import FusedCase
from .cases.case import BenchCase
from .cases.shapes import cut
from .models import byte_model
from .models.traffic_model import Case, count, scaled_device
from .rows.fused import FusedRow
from .rows.results import MODEL, OK, UNSUPPORTED, Row
from .timing.fused import FUSED, PROVIDERS, TORCH
from .timing.providers import COPY, OURS

NO_MODEL = {
    "cudnn": "closed source: its traffic is not published",
    "apex": "groupbn reads once where a slice of channels fits on chip, else twice",
    "compile": "the traffic depends on the kernels that Inductor generates",
}


@dataclass(frozen=True)
class ModelSettings:
    device: str = "h100"  # of batchnorm_cuda.devices.DEVICES
    count_elements: int = 2**19  # of the cut problem; 0 counts nothing

    @property
    def name(self) -> str:
        return devices.describe(self.device)["name"]


def rows(case: BenchCase, providers: list[str], settings: ModelSettings) -> Iterator[Row]:
    """A row for each of the providers that there is a model for or that it can name a reason."""
    for provider in providers:
        if provider in OURS:
            yield _ours(case, provider, settings)
        else:
            yield _row(case, provider, settings, **_peer(case, provider, settings))


def _row(case: BenchCase, provider: str, settings: ModelSettings, **values: Any) -> Row:
    return case.row(provider, settings.name, kind=MODEL, **values)


def _peer(case: BenchCase, provider: str, settings: ModelSettings) -> dict[str, Any]:
    if provider == COPY:
        return {"model_bytes": case.compulsory_bytes, "note": "the floor: every byte once"}
    if provider in NO_MODEL:
        return {"status": UNSUPPORTED, "note": f"no model: {NO_MODEL[provider]}"}
    l2 = devices.describe(settings.device)["l2_bytes"]
    moved = byte_model.peer_bytes(provider, case.op, case.nbytes, l2)
    return {"model_bytes": moved, "note": f"byte model after {byte_model.PEERS[provider].source}"}


def _ours(case: BenchCase, provider: str, settings: ModelSettings) -> Row:
    strategy = OURS[provider]
    x = case.empty("meta")
    plans = [
        explain(x, device=settings.device, op=part, strategy=strategy)
        for part in byte_model.parts(case.op)
    ]
    took = [plan.strategy.replace(" ", "_") for plan in plans]
    if strategy == "team" and "two_pass" in took:
        reason = plans[took.index("two_pass")].reason
        return _row(case, provider, settings, status=UNSUPPORTED, note=f"no team: {reason}")
    values: dict[str, Any] = {
        "status": OK,
        "backend": " + ".join(dict.fromkeys(took)),
        "model_bytes": sum(plan.predicted_bytes for plan in plans),
        "note": f"plan: {plans[0].reason}",
    }
    if settings.count_elements and provider == "ours":  # of what runs; forced ones take as long
        values |= _count(case, strategy, settings)
    return _row(case, provider, settings, **values)


def _count(case: BenchCase, strategy: str, settings: ModelSettings) -> dict[str, Any]:
    full = devices.describe(settings.device)["sm_count"]
    sizes, sms = cut(case.shape.sizes, full, settings.count_elements)
    counted = compulsory = 0
    for part in byte_model.parts(case.op):
        cut_case = Case(sizes, case.layout, case.dtype, part)
        bytes_counted, bytes_compulsory = _count_once(cut_case, settings.device, sms, strategy)
        counted += bytes_counted
        compulsory += bytes_compulsory
    return {
        "model_counted_ratio": counted / compulsory,
        "model_counted_shape": "x".join(map(str, sizes)),
        "model_counted_sms": sms,
    }


@cache  # "both" is the sum of what forward and backward have counted
def _count_once(case: Case, device: str, sms: int, strategy: str) -> tuple[int, int]:
    traffic = count(case, scaled_device(device, sms), strategy)
    return traffic.counted_bytes, traffic.compulsory_bytes


def fused_rows(case: FusedCase, settings: ModelSettings) -> Iterator[FusedRow]:
    """The same with what stands behind: nothing is counted."""
    for provider in PROVIDERS:
        moved, backend, note = _moved(case, provider, settings)
        values = {"backend": backend, "model_bytes": moved, "note": note}
        yield case.row(provider, settings.name, kind=MODEL, **values)


def _moved(case: FusedCase, provider: str, settings: ModelSettings) -> tuple[int, str, str]:
    """Bytes, what runs, and where that is from."""
    bench, behind = case.bench, case.behind
    kinds = behind.add, behind.activation is not None
    separate = byte_model.separate_bytes(bench.op, bench.nbytes, *kinds)
    if provider == TORCH:
        l2 = devices.describe(settings.device)["l2_bytes"]
        batch_norm = byte_model.peer_bytes("native", bench.op, bench.nbytes, l2)
        return batch_norm + separate, "native", "byte models"
    fused = {}
    if provider == FUSED:
        separate = 0
        # Every activation costs what a ReLU does: the mask.
        fused = {"residual": behind.add, "activation": "relu" if kinds[1] else None}
    x = bench.empty("meta")
    plans = [
        explain(x, device=settings.device, op=part, **fused) for part in byte_model.parts(bench.op)
    ]
    took = dict.fromkeys(plan.strategy.replace(" ", "_") for plan in plans)
    note = "plan" + (", byte models behind it" if separate else "")
    return sum(p.predicted_bytes for p in plans) + separate, " + ".join(took), note
