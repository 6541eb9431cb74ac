"""What `bench.smoke` runs: small problems by kernel family, with what the plan must make of them.

A case names what it is for, and the planner is asked for each of its shapes in turn until one leads
there on the device at hand. So the same list serves every GPU, and a family that a device cannot
reach is said to be unreached instead of being passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from types import ModuleType
from typing import Any

import torch

from batchnorm_cuda._explain.explain import OPS as PLANNED

from ..loading import load
from ..models.traffic_model import DTYPES

cases = load("tests", "cases")

OPS = {**PLANNED, "sync": "forward_training"}
# What is fused: whether a residual, which activation and its parameter. What is multiplied by
# 0.25 is exact, so that a gradient can be compared to the bit; 0.3 is not.
FORMS: dict[str, tuple[bool, tuple[str, float] | None]] = {
    "": (False, None),
    "residual+relu": (True, ("relu", 0.0)),
    "relu": (False, ("relu", 0.0)),
    "residual": (True, None),
    "residual+leaky_relu": (True, ("leaky_relu", 0.25)),
    "leaky_relu": (False, ("leaky_relu", 0.3)),
    "residual+relu6": (True, ("relu6", 0.0)),
}
OUT_OF_LINE = ("residual+leaky_relu", "leaky_relu", "residual+relu6")  # in the forward kernels
MOST_BYTES = 96 * 2**20  # of x: a channel group that a large GPU does not hold

Layout = Callable[[torch.Tensor], torch.Tensor]

# Of two passes: the first shape of a name is tried alone, since any plan of it is welcome.
STAGES: dict[str, tuple[tuple[int, ...], Layout]] = {
    "along S": ((4, 10, 8, 8), cases.contiguous),
    "along S, split": ((8, 3, 56, 56), cases.contiguous),
    "along C, split": ((3000, 24), cases.contiguous),
    "runs, masked": ((1, 2, 131, 77), cases.contiguous),
    "off boundaries": ((3, 10, 8, 8), cases.odd_offset),
    "along C": ((300, 64), cases.contiguous),
    "along C, masked": ((33, 11), cases.contiguous),
    "along a row": ((16, 24, 7, 7), cases.contiguous),
    "along a row, masked": ((19, 11, 7, 7), cases.contiguous),
    "channels along a row": ((2, 18, 16, 15), cases.channels_last),
}
# Of teams: pattern and exactness of the plan, and the least shape, whose batch grows.
TEAMS: dict[str, tuple[str, bool, tuple[int, ...], Layout]] = {
    "along S": ("along_s", True, (8, 2, 20, 28), cases.contiguous),
    "runs, masked": ("along_s", False, (8, 2, 21, 27), cases.contiguous),
    "along C": ("along_c", True, (300, 64), cases.contiguous),
    "along a row": ("along_row", True, (18, 24, 7, 7), cases.contiguous),
    "along a row, masked": ("along_row", False, (8, 17, 7, 7), cases.contiguous),
}
SPLITS = {"along S, split": 176, "along C, split": 200}  # rows of partial results a channel
HOLDS, STREAMS = "holds", "streams"  # a team its channel groups, or reads a part of them twice


@dataclass(frozen=True)
class Case:
    dtype: str
    op: str
    pattern: str
    shape: tuple[int, ...]
    layout: Layout
    form: str = ""  # what is fused
    scope: str = ""  # of a team; two passes without one
    size: int = 0
    keeps: str = ""  # HOLDS or STREAMS
    rounds: int = 1  # of a team, at least
    index_bits: int = 0

    @property
    def id(self) -> str:
        team = f"team {self.scope} {self.size} {self.keeps}" if self.scope else "two passes"
        team += ", in rounds" if self.rounds > 1 else ""
        wide = ", 64-bit indices" if self.index_bits else ""
        fused = f", {self.form}" if self.form else ""
        return f"{self.dtype} {self.op}{fused}, {self.pattern}, {team}{wide}"

    @property
    def family(self) -> tuple[object, ...]:
        """What a cut run takes one case of."""
        team = self.scope, self.keeps, self.rounds
        return (self.op, self.pattern, bool(self.form), *team, self.index_bits)

    @property
    def geometry(self) -> tuple[int, int, int]:
        """[N, C, S] in memory."""
        numel, c = torch.Size(self.shape).numel(), self.shape[1]
        along_c = self.layout is cases.channels_last or len(self.shape) == 2
        s = 1 if along_c else numel // (self.shape[0] * c)
        return numel // (c * s), c, s

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    def row(self) -> dict[str, Any]:
        """Its columns of the CSV file."""
        fields = asdict(self) | {"case": self.id, "shape": "x".join(map(str, self.shape))}
        return fields | {"layout": self.layout.__name__}

    def of(self, shape: tuple[int, ...]) -> Case:
        return replace(self, shape=shape)


class Planner:
    """Asks the extension for plans on its own device."""

    def __init__(self, extension: ModuleType) -> None:
        self.extension = extension
        self.device: Mapping[str, Any] = extension.device_info()

    def options(self, case: Case) -> dict[str, Any]:
        """What is forced for a case."""
        if not case.scope:
            splits = SPLITS.get(case.pattern, 0)
            return {"strategy": "two_pass", "index_bits": case.index_bits, "splits": splits}
        options = {"strategy": "team", "scope": case.scope, "team_size": case.size}
        return options | {"pattern": TEAMS[case.pattern][0]}

    def plan(self, case: Case) -> dict[str, Any]:
        residual, activation = FORMS[case.form]
        relu = activation is not None
        backward = case.op.endswith("backward")
        problem: dict[str, Any] = self.options(case)
        if backward:
            problem["grad_output_shift"] = 0
            if relu:
                problem |= {"fused": True, "mask": True, "outputs": 1 + residual}
        elif case.form:
            problem |= {"fused": True, "mask": relu, "residual_shift": 0 if residual else -1}
        name = str(DTYPES[case.dtype]).removeprefix("torch.")
        return self.extension.make_plan(
            OPS[case.op], *case.geometry, name, dict(self.device), problem
        )

    def leads_there(self, case: Case) -> bool:
        plan = self.plan(case)
        if plan["strategy"] != "team":
            return False
        team = plan["team"]
        pattern, exact = TEAMS[case.pattern][:2]
        found = (team["pattern"], team["traversal"]["exact"], team["scope"], team["size"])
        if found != (pattern, exact, case.scope, case.size):
            return False
        if team["rounds"] < case.rounds:
            return False
        return (team["streamed_bytes"] > 0) == (case.keeps == STREAMS)

    def reach(self, case: Case) -> Case | None:
        """The case with the first batch and channels that lead to what it is for; None: none do."""
        if not case.scope:
            return case
        start, c, *spatial = case.shape
        for channels in (c, 4 * c, 16 * c, 64 * c):
            n = start
            while (tried := case.of((n, channels, *spatial))).nbytes <= MOST_BYTES:
                if self.leads_there(tried):
                    return tried
                n += n // 2  # rows stay whole windows, if they were
        return None


def all_cases(dtype: str, planner: Planner) -> list[Case]:
    """Of one dtype, stages first: they share no state that a fault could leave behind."""
    return [
        *_stages(dtype),
        *_sync(dtype),
        *_teams(dtype, planner.device),
        *_in_rounds(dtype, planner),
    ]


def cut(found: list[Case], dtype: str) -> list[Case]:
    """One case of each family, in one of the dtypes in turn: what the host model has time for."""
    turn = list(DTYPES).index(dtype)
    families = list({case.family: case for case in reversed(found)}.values())[::-1]
    return families[turn :: len(DTYPES)]


def _stages(dtype: str) -> Iterator[Case]:
    for (pattern, (shape, layout)), bits in product(STAGES.items(), (0, 64)):
        for op in OPS:
            if op == "sync":
                continue
            yield Case(dtype, op, pattern, shape, layout, index_bits=bits)
            if op.endswith("double_backward"):
                continue
            for form in ("residual+relu", "relu", "residual"):
                if op.endswith("backward") and form == "residual":
                    continue  # batch norm's own
                yield Case(dtype, op, pattern, shape, layout, form, index_bits=bits)
            if op in ("forward", "backward") and not bits:
                for form in OUT_OF_LINE:
                    yield Case(dtype, op, pattern, shape, layout, form)


def _sync(dtype: str) -> Iterator[Case]:
    for pattern in ("along S", "runs, masked", "along C", "along a row"):
        shape, layout = STAGES[pattern]
        for form in ("", "residual+relu"):
            yield Case(dtype, "sync", pattern, (max(shape[0], 3), *shape[1:]), layout, form)


def _teams(dtype: str, device: Mapping[str, Any]) -> Iterator[Case]:
    sms = device["sm_count"]
    scopes = [("block", 1), ("grid", 3)]
    if device["max_cluster"] >= 2:
        scopes += [("cluster", 2)]
    for keeps, (pattern, target), (scope, size) in product((HOLDS, STREAMS), TEAMS.items(), scopes):
        forms = ("", "residual+relu", "relu", *OUT_OF_LINE[:2])
        for op, form in product(("forward", "backward"), forms):
            if form in ("", "residual+relu") or keeps == HOLDS:
                yield Case(dtype, op, pattern, *target[2:], form, scope, size, keeps)
    # Every SM in one team, and the largest cluster.
    widest = [("grid", sms), ("cluster", device["max_cluster"])]
    for (scope, size), (pattern, target) in product(widest, TEAMS.items()):
        if "row" not in pattern and size > 2:
            for op in ("forward", "backward"):
                yield Case(dtype, op, pattern, *target[2:], "", scope, size, HOLDS)
    for pattern in ("along S", "along C"):  # constant statistics
        for form in ("", "residual+relu"):
            target = TEAMS[pattern][2:]
            yield Case(dtype, "eval_backward", pattern, *target, form, "grid", 3, HOLDS)


def _in_rounds(dtype: str, planner: Planner) -> Iterator[Case]:
    """Teams of as many blocks as there are SMs, which take one channel group after another."""
    for pattern, many in (("along S", 5), ("runs, masked", 5), ("along C", 64 * 5)):
        _, _, (n, _, *spatial), layout = TEAMS[pattern]
        for op in ("forward", "backward"):
            shape, size = (n, many, *spatial), planner.device["sm_count"]
            yield Case(dtype, op, pattern, shape, layout, "", "grid", size, HOLDS, rounds=2)
