"""`explain`: which kernels run for a tensor, or would run for a shape on some device, and why.

Everything here is read off or worked out from the plan (csrc/plan.h), on the CPU: nothing is
launched, nothing is timed, and no number is a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _extension, devices, ops
from .functional import backend_for

# The operation as the planner calls it, and the kernels of its stages where no team runs.
_OPS = {
    "forward": "forward_training",
    "backward": "backward_training",
    "eval": "forward_eval",
    "eval_backward": "backward_eval",
    "double_backward": "double_backward_training",
    "eval_double_backward": "double_backward_eval",
}
_REDUCE = {"forward": "collect_statistics_kernel"}
_ELEMENTWISE = {"forward": "transform_input_kernel", "eval": "transform_input_kernel"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_PATTERNS = {"along_s": "along S", "along_c": "along C", "along_row": "along a row"}

_WINDOW_BYTES = 16
# csrc/plan.h: kUnroll windows a thread of a stage kernel loads before it uses the first, and
# kStageBlocksPerSm or kElementwiseBlocksPerSm blocks of it that its registers let an SM hold at
# least.
_STAGE_LOADS = 4
_STAGE_BLOCKS_PER_SM, _ELEMENTWISE_BLOCKS_PER_SM = 2, 3
# Those of the double backward: windows of dy, x and the gradient of dx at one position, or at two
# where a thread has one channel (csrc/double_backward_*.cu).
_DOUBLE_BACKWARD_LOADS, _DOUBLE_BACKWARD_LOADS_ALONG_S = 3, 6
# Copies from global to shared memory that no register waits for came with 8.0.
_FIRST_WITH_ASYNC_COPIES = (8, 0)


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
        depth: of the kernel: how much a thread holds (csrc/plan.h).
        two_level: whether each block merges a slice of the channels for the others.
    """

    scope: str
    size: int
    teams: int
    groups: int
    rounds: int
    register_share: float
    shared_share: float
    depth: str
    two_level: bool

    @property
    def on_chip_share(self) -> float:
        """What is kept on chip, in registers and shared memory together, 0 to 1."""
        return self.register_share + self.shared_share


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


def explain(
    input_or_shape: Tensor | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    device: str | Mapping[str, Any] | None = None,
    op: str = "forward",
    strategy: str = "auto",
    scope: str = "auto",
    team_size: int = 0,
) -> Explanation:
    """How `batch_norm` treats a tensor, or would treat a shape on a device that is not here.

    ``print(explain(x))`` shows the kernels that run and why, the bytes they move against the fewest
    possible, and what stays on chip. Nothing is launched or timed. The plan comes from the compiled
    extension if it is loaded, else from the kernels' CPU build, for which a C++ compiler is enough;
    it is compiled at the first use, which takes minutes, once.

    Args:
        input_or_shape: a tensor, or the shape of one. A tensor on the meta device is a shape with
            its dtype and strides.
        dtype: of a shape; the default dtype if None. A tensor has its own.
        memory_format: of a shape, e.g. torch.channels_last. A tensor has its own.
        device: a name out of `batchnorm_cuda.devices.DEVICES` ("t4", "a100", "rtx4090", "l40s",
            "h100", "b200", "rtx5090"), or a dict of its properties, of which those that are left
            out are the H100's. None for the tensor's own device, or the current GPU for a shape.
        op: "forward" (training), "backward" and "double_backward" (of training, all gradients
            wanted), "eval", "eval_backward" or "eval_double_backward". Gradients are taken to be
            aligned to 16 bytes, as new tensors are.
        strategy: "auto", or force "two_pass" or "team".
        scope: of a team: "auto", or force "block", "cluster" or "grid".
        team_size: blocks of a team, 0 for the planner's choice. A team that is forced but
            impossible is answered by two passes, with the reason.

    Returns:
        An `Explanation`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has a wrong value, or the device has no kernels to explain.
        RuntimeError: the kernels cannot be built.

    Messages read "explain: expected <argument> to be <what>, got <what came>".
    """
    if op not in _OPS:
        raise ValueError(f"explain: expected op to be one of {', '.join(_OPS)}, got {op!r}")
    model = _as_meta(input_or_shape, dtype, memory_format)
    module, properties = _planner(input_or_shape, device)
    n, c, s = _geometry(model)
    problem: dict[str, Any] = {"strategy": strategy, "scope": scope, "team_size": team_size}
    problem["input_shift"] = _shift(input_or_shape, model)
    if op.endswith("backward"):
        problem["grad_output_shift"] = 0
    if op.endswith("double_backward"):
        problem |= {"grad_grad_input_shift": 0, "outputs": 2}
    dtype_name = str(model.dtype).removeprefix("torch.")
    described = devices.planner_properties(properties)
    plan = module.make_plan(_OPS[op], n, c, s, dtype_name, described, problem)
    return Explanation(
        device=properties["name"],
        compute_capability=_capability(properties),
        sm_count=properties["sm_count"],
        op=op,
        shape=tuple(model.shape),
        dtype=dtype_name,
        pattern=_PATTERNS[_pattern(plan)],
        vector_elements=plan["vec"],
        strategy=plan["strategy"].replace("_", " "),
        reason=plan["reason"],
        launches=plan["launches"],
        kernels=tuple(_kernels(plan, op, properties)),
        team=_team(plan),
        compulsory_bytes=plan["compulsory_bytes"],
        reread_bytes=plan["reread_bytes"],
        predicted_bytes=plan["predicted_bytes"],
        workspace_bytes=plan["workspace_bytes"],
        latency_bytes=devices.bytes_to_cover_latency(properties),
    )


def _as_meta(
    value: object, dtype: torch.dtype | None, memory_format: torch.memory_format | None
) -> Tensor:
    """A tensor without data that has the shape, dtype and strides of the one the kernels see."""
    if isinstance(value, Tensor):
        for name, given in (("dtype", dtype), ("memory_format", memory_format)):
            if given is not None:
                raise ValueError(f"explain: expected {name} to be None for a tensor, got {given}")
        model = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    else:
        try:
            shape = torch.Size(value)  # type: ignore[call-overload]
        except TypeError:
            raise TypeError(
                "explain: expected input_or_shape to be a tensor or a sequence of sizes, "
                f"got {type(value).__name__}"
            ) from None
        if min(shape, default=0) < 0:
            raise ValueError(f"explain: expected sizes >= 0, got {tuple(shape)}")
        model = torch.empty(shape, dtype=dtype, device="meta")
        if memory_format is not None:
            model = model.contiguous(memory_format=memory_format)
    if model.dim() < 2:
        raise ValueError(
            f"explain: expected 2 or more dimensions (N, C, ...), got {tuple(model.shape)}"
        )
    if model.dtype not in _DTYPES:
        names = ", ".join(str(known) for known in _DTYPES)
        raise TypeError(f"explain: expected dtype to be one of {names}, got {model.dtype}")
    return ops.as_dense(model)


def _planner(
    value: object, device: str | Mapping[str, Any] | None
) -> tuple[ModuleType, dict[str, Any]]:
    """A module that plans, and the properties of the device to plan for."""
    if device is not None:
        module = _extension._cuda or _extension.load_emulated()
        return module, devices.describe(device)
    if isinstance(value, Tensor):
        backend = backend_for(value)
        if backend == "emulated":
            module = _extension.load_emulated()
            return module, module.device_info()
        if backend == "cuda":
            module = _extension.load_cuda()
            return module, module.device_info(value.get_device())
    elif torch.cuda.is_available():
        module = _extension.load_cuda()
        return module, module.device_info(torch.cuda.current_device())
    what = f"a tensor on {value.device}" if isinstance(value, Tensor) else "a shape"
    raise ValueError(
        f"explain: expected device to be one of {', '.join(sorted(devices.DEVICES))} or a dict of "
        f"properties for {what}, got None: without one there are no kernels to explain"
    )


def _geometry(model: Tensor) -> tuple[int, int, int]:
    """[N, C, S] of a dense tensor, as csrc/tensors.cpp finds it."""
    c = model.shape[1]
    if model.numel() == 0:
        return 0, c, 1
    s = model.numel() if c == 1 else model.stride(1)
    return model.numel() // (c * s), c, s


def _shift(value: object, model: Tensor) -> int:
    """Elements of the input past a 16-byte boundary; a copy that makes it dense has none."""
    if not isinstance(value, Tensor) or value.device.type == "meta":
        return 0
    copied = value.stride() != model.stride()
    return 0 if copied else value.data_ptr() % _WINDOW_BYTES // value.element_size()


def _capability(properties: Mapping[str, Any]) -> tuple[int, int]:
    return properties["compute_major"], properties["compute_minor"]


def _kernels(plan: Mapping[str, Any], op: str, properties: Mapping[str, Any]) -> list[Kernel]:
    if "team" in plan:
        return [_team_kernel(plan, properties)]
    if op.endswith("double_backward"):
        return _double_backward_kernels(plan, properties)
    kernels = []
    if "reduce" in plan:
        kernels = [
            _stage(plan["reduce"], _REDUCE.get(op, "backward_reduce_kernel"), properties),
            _merge(plan["merge"]),
        ]
    if "elementwise" in plan:
        name = _ELEMENTWISE.get(op, "backward_elementwise_kernel")
        kernels.append(_stage(plan["elementwise"], name, properties, _ELEMENTWISE_BLOCKS_PER_SM))
    return kernels


def _merge(geometry: Mapping[str, Any]) -> Kernel:
    block = (geometry["threads_x"], geometry["threads_y"])
    return Kernel("merge_kernel", geometry["grid"], block, geometry["shared_bytes"])


def _double_backward_kernels(
    plan: Mapping[str, Any], properties: Mapping[str, Any]
) -> list[Kernel]:
    kernels = []
    for stage in ("reduce", "elementwise"):
        if stage not in plan:
            continue
        kernel = _stage(plan[stage], f"double_backward_{stage}_kernel", properties)
        along_s = plan[stage]["pattern"] == "along_s"
        loads = _DOUBLE_BACKWARD_LOADS_ALONG_S if along_s else _DOUBLE_BACKWARD_LOADS
        in_flight = kernel.in_flight_bytes // _STAGE_LOADS * loads
        kernels.append(replace(kernel, in_flight_bytes=in_flight))
        if stage == "reduce":
            kernels.append(_merge(plan["merge"]))
    return kernels


def _stage(
    traversal: Mapping[str, Any],
    name: str,
    properties: Mapping[str, Any],
    blocks_per_sm: int = _STAGE_BLOCKS_PER_SM,
) -> Kernel:
    block = (traversal["threads_x"], traversal["threads_y"])
    blocks = min(blocks_per_sm, math.ceil(traversal["grid"] / properties["sm_count"]))
    return Kernel(
        name=name,
        grid=traversal["grid"],
        block=block,
        shared_bytes=traversal["shared_bytes"],
        index_bits=traversal["index_bits"],
        in_flight_bytes=_WINDOW_BYTES * _STAGE_LOADS * math.prod(block) * blocks,
    )


def _team_kernel(plan: Mapping[str, Any], properties: Mapping[str, Any]) -> Kernel:
    team = plan["team"]
    traversal = team["traversal"]
    places = team["blocks_per_sm"] * properties["sm_count"]
    # Teams of several blocks, and deep ones, stay and take the next group; other single blocks
    # leave for the next one.
    at_a_time = places if team["scope"] == "block" else team["grid"]
    waves = math.ceil(traversal["tasks"] / at_a_time)
    busy_at_last = traversal["tasks"] - (waves - 1) * at_a_time
    block = (traversal["threads_x"], traversal["threads_y"])
    blocks = min(team["blocks_per_sm"], math.ceil(team["grid"] / properties["sm_count"]))
    loads = min(team["register_windows"], _windows_per_thread(plan))
    if traversal["exact"] and _capability(properties) >= _FIRST_WITH_ASYNC_COPIES:
        loads = min(loads + team["shared_windows"], _windows_per_thread(plan))
    return Kernel(
        name="team_kernel",
        grid=team["grid"],
        block=block,
        shared_bytes=team["shared_bytes"],
        index_bits=traversal["index_bits"],
        blocks_per_sm=team["blocks_per_sm"],
        waves=waves,
        tail_idle=1 - busy_at_last / places,
        in_flight_bytes=_WINDOW_BYTES * loads * team["tensors"] * math.prod(block) * blocks,
    )


def _pattern(plan: Mapping[str, Any]) -> str:
    """A team may walk another way than the stage kernels."""
    return plan.get("team", plan)["pattern"]


def _members(plan: Mapping[str, Any]) -> int:
    """Threads of a block that share a channel (along S) or a column of windows (along C)."""
    traversal = plan["team"]["traversal"]
    if _pattern(plan) == "along_s":
        return traversal["threads_x"]
    # Masked rows: samples that start at different places in a window have threads of their own.
    starts = traversal["row_repeat"] if not traversal["exact"] else 1
    return traversal["threads_y"] // starts


def _windows_per_thread(plan: Mapping[str, Any]) -> int:
    return math.ceil(plan["team"]["traversal"]["per_split"] / _members(plan))


def _team(plan: Mapping[str, Any]) -> TeamSummary | None:
    if "team" not in plan:
        return None
    team = plan["team"]
    part = team["traversal"]["per_split"]  # windows of a block, shared by its members
    in_registers = min(part, _members(plan) * team["register_windows"])
    in_shared = min(part - in_registers, _members(plan) * team["shared_windows"])
    return TeamSummary(
        scope=team["scope"],
        size=team["size"],
        teams=team["teams"],
        groups=team["traversal"]["channel_blocks"],
        rounds=team["rounds"],
        register_share=in_registers / part,
        shared_share=in_shared / part,
        depth=team["depth"],
        two_level=team["two_level"],
    )


def _describe_team(team: TeamSummary) -> str:
    exchange = {
        "block": "without exchange",
        "cluster": "of a cluster, through its shared memory",
        "grid": "of a cooperative grid, through global memory",
    }
    blocks = "1 block" if team.size == 1 else f"{team.size} blocks"
    levels = " in two levels" if team.two_level else ""
    return (
        f"{blocks} {exchange[team.scope]}{levels} ({team.scope} scope, {team.depth} kernel); "
        f"{team.groups} channel groups, {team.teams} teams, rounds: {team.rounds}"
    )


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
