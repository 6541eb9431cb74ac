"""What conversion leaves with a batch norm: what it expects to happen to its output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .._ops.activations import Activation
from . import pending
from .activations import in_words


@dataclass
class Found:
    """What a batch norm takes over: an add, an activation, or the two in this order.

    Attributes:
        add: whether there is an add.
        activation: as batch_norm's, or None.
        summed: whether the sum is overwritten by another one, which another batch norm takes over.
        waits: whether there is something to wait for behind an add.
    """

    add: bool
    activation: Activation | None = None
    summed: bool = False
    waits: bool = field(init=False)

    def __post_init__(self) -> None:
        self.waits = self.activation is not None or self.summed

    def __str__(self) -> str:
        taken = ["add"] if self.add else []
        return ", ".join(taken if self.activation is None else [*taken, in_words(self.activation)])


@dataclass
class Fusion:
    """The forecasts for the model's two modes: what was found, or in words why nothing was."""

    training: Found | str
    evaluation: Found | str

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        pending.tell_dynamo()  # a model that comes from another process, without `convert`
