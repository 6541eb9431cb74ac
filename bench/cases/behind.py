"""A batch norm in training with what stands behind it in a network, which may be fused with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchnorm_cuda._fusion.activations import in_words
from batchnorm_cuda._ops.activations import Activation

from ..models import byte_model
from ..rows.fused import FusedRow
from .case import BenchCase


@dataclass(frozen=True)
class Behind:
    """An add, an activation, or the two in this order."""

    add: bool = False
    activation: Activation | None = None

    def __str__(self) -> str:
        words = ["add"] * self.add
        words += [] if self.activation is None else [in_words(self.activation)]
        return ", ".join(words) or "nothing"


@dataclass(frozen=True)
class FusedCase:
    bench: BenchCase
    behind: Behind

    @property
    def title(self) -> str:
        return f"{self.bench.title}, {self.behind} behind"

    @property
    def compulsory_bytes(self) -> int:
        """Of one pass that does it all."""
        kinds = self.behind.add, self.behind.activation is not None
        return byte_model.compulsory_bytes(self.bench.op, self.bench.nbytes, *kinds)

    def row(self, provider: str, device: str, **values: Any) -> FusedRow:
        own = {"behind": str(self.behind), "compulsory_bytes": self.compulsory_bytes}
        return FusedRow(**{**self.bench.facts(provider, device), **own, **values})
