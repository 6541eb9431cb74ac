"""`explain`: which kernels run for a tensor, or would run for a shape on some device, and why.

Everything here is read off or worked out from the plan (csrc/plan/plan.h), on the CPU: nothing is
launched, nothing is timed, and no number is a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import devices
from .._build import extension
from .._ops.layout import as_dense
from ..functional import backend_for
from .explanation import Cost, Explanation
from .plan_kernels import WINDOW_BYTES, capability, kernels_of, pattern_of, team_of

# The operation as the planner calls it.
OPS = {
    "forward": "forward_training",
    "backward": "backward_training",
    "eval": "forward_eval",
    "eval_backward": "backward_eval",
    "double_backward": "double_backward_training",
    "eval_double_backward": "double_backward_eval",
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_PATTERNS = {"along_s": "along S", "along_c": "along C", "along_row": "along a row"}


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
    residual: bool = False,
    activation: str | None = None,
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
        residual: is a residual fused, like the input? In a backward pass, is its gradient wanted?
        activation: what is fused behind: None or "relu". "forward" is taken to keep what its
            backward pass needs, "eval" is not.

    Returns:
        An `Explanation`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has a wrong value, or the device has no kernels to explain.
        RuntimeError: the kernels cannot be built.

    Messages read "explain: expected <argument> to be <what>, got <what came>".
    """
    options = {"strategy": strategy, "scope": scope, "team_size": team_size}
    return explain_forced(
        input_or_shape,
        options,
        dtype=dtype,
        memory_format=memory_format,
        device=device,
        op=op,
        residual=residual,
        activation=activation,
    )


def explain_forced(
    input_or_shape: Tensor | Sequence[int],
    options: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    device: str | Mapping[str, Any] | None = None,
    op: str = "forward",
    residual: bool = False,
    activation: str | None = None,
) -> Explanation:
    """`explain`, of a plan that any options of the planner may force."""
    if op not in OPS:
        raise ValueError(f"explain: expected op to be one of {', '.join(OPS)}, got {op!r}")
    if activation not in (None, "relu"):
        raise ValueError(f"explain: expected activation to be None or 'relu', got {activation!r}")
    model = _as_meta(input_or_shape, dtype, memory_format)
    module, properties = _planner(input_or_shape, device)
    n, c, s = _geometry(model)
    problem = {**options, "input_shift": _shift(input_or_shape, model)}
    if op.endswith("backward"):
        problem["grad_output_shift"] = 0
    if op.endswith("double_backward"):
        problem |= {"grad_grad_input_shift": 0, "outputs": 2}
    problem |= _fused(op, residual, activation == "relu")
    dtype_name = str(model.dtype).removeprefix("torch.")
    described = devices.planner_properties(properties)
    plan = module.make_plan(OPS[op], n, c, s, dtype_name, described, problem)
    return Explanation(
        device=properties["name"],
        compute_capability=capability(properties),
        sm_count=properties["sm_count"],
        op=op,
        shape=tuple(model.shape),
        dtype=dtype_name,
        pattern=_PATTERNS[pattern_of(plan)],
        vector_elements=plan["vec"],
        strategy=plan["strategy"].replace("_", " "),
        reason=plan["reason"],
        launches=plan["launches"],
        kernels=tuple(kernels_of(plan, op, properties)),
        team=team_of(plan),
        compulsory_bytes=plan["compulsory_bytes"],
        reread_bytes=plan["reread_bytes"],
        predicted_bytes=plan["predicted_bytes"],
        workspace_bytes=plan["workspace_bytes"],
        cost=Cost(**plan["cost"]),
        latency_bytes=devices.bytes_to_cover_latency(properties),
    )


def _fused(op: str, residual: bool, relu: bool) -> dict[str, Any]:
    """What the planner is told of a residual and a ReLU."""
    if op.endswith("double_backward") and (residual or relu):
        raise ValueError(
            f"explain: expected op to be without residual and activation for {op!r}, got "
            f"residual={residual}, activation={'relu' if relu else None!r}"
        )
    if op.endswith("backward"):  # without a ReLU the residual's gradient is the output's
        if not relu:
            return {}
        # A misaligned input is copied.
        return {"fused": True, "mask": True, "outputs": 1 + residual, "input_shift": 0}
    shift = 0 if residual else -1
    return {"fused": residual or relu, "mask": relu and op == "forward", "residual_shift": shift}


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
    return as_dense(model)


def _planner(
    value: object, device: str | Mapping[str, Any] | None
) -> tuple[ModuleType, dict[str, Any]]:
    """A module that plans, and the properties of the device to plan for."""
    if device is not None:
        module = extension._cuda or extension.load_emulated()
        return module, devices.describe(device)
    if isinstance(value, Tensor):
        backend = backend_for(value)
        if backend == "emulated":
            module = extension.load_emulated()
            return module, module.device_info()
        if backend == "cuda":
            module = extension.load_cuda()
            return module, module.device_info(value.get_device())
    elif torch.cuda.is_available():
        module = extension.load_cuda()
        return module, module.device_info(torch.cuda.current_device())
    what = f"a tensor on {value.device}" if isinstance(value, Tensor) else "a shape"
    raise ValueError(
        f"explain: expected device to be one of {', '.join(sorted(devices.DEVICES))} or a dict of "
        f"properties for {what}, got None: without one there are no kernels to explain"
    )


def _geometry(model: Tensor) -> tuple[int, int, int]:
    """[N, C, S] of a dense tensor, as csrc/torch/tensors.cpp finds it."""
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
    return 0 if copied else value.data_ptr() % WINDOW_BYTES // value.element_size()
