"""What `explain` answers: the plan of a call as values, and as a report to read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Kernel:
    """One launch. `waves` and `tail_idle` only where the plan fixes how many blocks an SM holds.

    Attributes:
        name: of the kernel in csrc/.
        grid: blocks.
        block: threads, (x, y).
        shared_bytes: dynamic shared memory of a block.
        index_bits: 32 or 64, the width of offsets; None where that is no choice.
        blocks_per_sm: blocks that an SM holds at once.
        waves: times that the places of the device's resident blocks are filled.
        tail_idle: share of these places that is idle in the last wave, 0 to 1.
        in_flight_bytes: bytes that the threads of one SM have asked for before the first is used.
    """

    name: str
    grid: int
    block: tuple[int, int]
    shared_bytes: int
    index_bits: int | None = None
    blocks_per_sm: int | None = None
    waves: int | None = None
    tail_idle: float | None = None
    in_flight_bytes: int | None = None


@dataclass(frozen=True)
class TeamSummary:
    """`size` blocks hold a group of channels together; `teams` take the `groups` in rounds.

    Attributes:
        scope: "block", "cluster" or "grid": what the blocks of a team exchange through.
        size: blocks of a team.
        teams: teams at work at once.
        groups: channel groups, each of which is one team's work.
        rounds: how many groups the busiest team takes.
        register_share: of the bytes that must be held between reduction and output, the share kept
            in registers, 0 to 1.
        shared_share: the share kept in shared memory.
        two_level: whether each block merges a slice of the channels for the others.
        in_warp: whether a channel's threads are of one warp, which merges by shuffles and waits for
            no barrier: the smallest team.
    """

    scope: str
    size: int
    teams: int
    groups: int
    rounds: int
    register_share: float
    shared_share: float
    two_level: bool
    in_warp: bool

    @property
    def on_chip_share(self) -> float:
        """What is kept on chip, in registers and shared memory together, 0 to 1."""
        return self.register_share + self.shared_share


@dataclass(frozen=True)
class Cost:
    """What the planner expects a plan to take, by cause: a model, fitted on an NVIDIA H200.

    The unit is a move, 8 KB at an SM's share of the device's bandwidth. Of all plans the one with
    the least total is chosen, if none is forced (csrc/plan/plan_costs.h).

    Attributes:
        launches: of the kernels.
        transfers: every activation once, shared evenly by all SMs.
        rereads: what is read twice, where the L2 cache serves most of it.
        idle: what the busiest SM has beyond an even share.
        code: of a team's rounds, what each takes whatever it holds.
        waits: for the exchanges of a team, or the merge of partial results.
    """

    launches: float
    transfers: float
    rereads: float
    idle: float
    code: float
    waits: float

    @property
    def total(self) -> float:
        """The sum of all causes, in moves."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Explanation:
    """The plan of one call in words and numbers; str() is the report. See `explain`.

    Nothing in it is measured: bytes are those that the plan accounts for.

    Attributes:
        device: name of the device planned for.
        compute_capability: (major, minor).
        sm_count: streaming multiprocessors of the device.
        op: as given to `explain`.
        shape: of the input.
        dtype: of the input, such as "float16".
        pattern: "along S", "along C" or "along a row": how threads walk the tensor.
        vector_elements: elements of a window, the 16 bytes that a thread moves at once.
        strategy: "team" or "two pass".
        reason: why, in words.
        launches: kernels launched.
        kernels: a `Kernel` for each of them.
        team: the `TeamSummary`, None for two passes.
        compulsory_bytes: the fewest that any implementation moves to and from DRAM.
        reread_bytes: what is read a second time, from the L2 cache at best.
        predicted_bytes: to and from DRAM, by the plan's account.
        workspace_bytes: scratch memory on the device.
        cost: the `Cost` by which the plan was chosen.
        latency_bytes: what one SM should have in flight, latency times bandwidth; a model. None
            where the description of the device lacks bandwidth or clock.
    """

    device: str
    compute_capability: tuple[int, int]
    sm_count: int
    op: str
    shape: tuple[int, ...]
    dtype: str
    pattern: str
    vector_elements: int
    strategy: str
    reason: str
    launches: int
    kernels: tuple[Kernel, ...]
    team: TeamSummary | None
    compulsory_bytes: int
    reread_bytes: int
    predicted_bytes: int
    workspace_bytes: int
    cost: Cost
    latency_bytes: int | None

    @property
    def bytes_over_compulsory(self) -> float:
        """Predicted over compulsory bytes; 1.0 is the least, and what an empty tensor has."""
        return self.predicted_bytes / self.compulsory_bytes if self.compulsory_bytes else 1.0

    def as_dict(self) -> dict[str, Any]:
        """All fields, nested ones as dictionaries, with the derived ones."""
        result = asdict(self)
        result["bytes_over_compulsory"] = self.bytes_over_compulsory
        if self.team is not None:
            result["team"]["on_chip_share"] = self.team.on_chip_share
        result["cost"]["total"] = self.cost.total
        return result

    def __str__(self) -> str:
        major, minor = self.compute_capability
        shape = " x ".join(map(str, self.shape))
        rows = [("plan", f"{self.strategy}: {self.reason}")]
        rows += [("team", _describe_team(self.team))] if self.team else []
        rows += [("kernel", _describe_kernel(kernel)) for kernel in self.kernels]
        rows += [
            ("launches", str(self.launches)),
            (
                "bytes",
                f"{_size(self.predicted_bytes)}, {self.bytes_over_compulsory:.2f} x compulsory; "
                f"{_size(self.reread_bytes)} read twice",
            ),
        ]
        if self.team:
            rows.append(
                (
                    "on chip",
                    f"{self.team.on_chip_share:.1%}: {self.team.register_share:.1%} in registers, "
                    f"{self.team.shared_share:.1%} in shared memory",
                )
            )
        rows += [("in flight", text) for text in self._describe_flight()]
        rows.append(("workspace", _size(self.workspace_bytes)))
        rows.append(("cost", _describe_cost(self.cost)))
        return "\n".join(
            [
                f"batch norm {self.op}, {self.dtype} {shape}, {self.pattern}, "
                f"{self.vector_elements} elements a window",
                f"on {self.device}: compute capability {major}.{minor}, {self.sm_count} SMs",
                *(f"  {name:<10} {text}" for name, text in rows),
            ]
        )

    def _describe_flight(self) -> list[str]:
        flights = [k.in_flight_bytes for k in self.kernels if k.in_flight_bytes is not None]
        if not flights:
            return []
        text = f"{_size(min(flights))} an SM before the first use"
        if self.latency_bytes is not None:
            text += f"; latency x bandwidth (a model) asks for {_size(self.latency_bytes)}"
        return [text]


def _describe_team(team: TeamSummary) -> str:
    exchange = {
        "block": "without exchange",
        "cluster": "of a cluster, through its shared memory",
        "grid": "of a cooperative grid, through global memory",
    }
    blocks = "1 block" if team.size == 1 else f"{team.size} blocks"
    levels = " in two levels" if team.two_level else ""
    levels += ", each channel within a warp" if team.in_warp else ""
    return (
        f"{blocks} {exchange[team.scope]}{levels} ({team.scope} scope); "
        f"{team.groups} channel groups, {team.teams} teams, rounds: {team.rounds}"
    )


def _describe_cost(cost: Cost) -> str:
    causes = {field.name: getattr(cost, field.name) for field in fields(cost)}
    said = ", ".join(f"{name} {moves:.0f}" for name, moves in causes.items() if moves >= 0.5)
    return f"{cost.total:.0f} moves, by the planner's constants{': ' if said else ''}{said}"


def _describe_kernel(kernel: Kernel) -> str:
    x, y = kernel.block
    text = (
        f"{kernel.name}: grid {kernel.grid}, block {x} x {y}, {_size(kernel.shared_bytes)} shared"
    )
    if kernel.index_bits is not None:
        text += f", {kernel.index_bits}-bit indices"
    if kernel.waves is not None:
        text += (
            f"; {kernel.blocks_per_sm} blocks an SM, waves: {kernel.waves}, "
            f"{kernel.tail_idle:.1%} of the last idle"
        )
    return text


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
