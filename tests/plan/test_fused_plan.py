"""What the plan says of fused kernels, and the bytes that they are counted to move."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from cases import Case, odd_offset
from fused_problem import Fused
from strategies import launched

from batchnorm_cuda import explain
from bench.models.traffic_model import Case as TrafficCase
from bench.models.traffic_model import count, scaled_device

# ------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("s", [64, 1])
def test_a_misaligned_residual_is_masked(extension: ModuleType, s: int) -> None:
    for shift, exact in ((-1, True), (0, True), (1, False)):
        options = {"fused": True, "residual_shift": shift}
        plan = extension.make_plan("forward_eval", 64, 32, s, "float16", {}, options)
        assert plan["elementwise"]["exact"] is exact
        plan = extension.make_plan("forward_training", 64, 32, s, "float16", {}, options)
        walk = plan["team"]["traversal"] if "team" in plan else plan["elementwise"]
        assert walk["exact"] is exact


def test_a_fused_backward_is_planned_for_the_copy_of_a_misaligned_input(
    extension: ModuleType,
) -> None:
    fused = Fused(extension, Case((4, 10, 8, 8), "misaligned", odd_offset), torch.float16)
    names = launched(extension, fused.check)
    kinds = ["team" if "team_kernel" in name else "stage" for name in names if "Backward" in name]
    assert explain(fused.x, op="backward").strategy == "two pass"
    assert explain(fused.x, op="backward", activation="relu").strategy == "team"
    assert kinds == ["team"]


@pytest.mark.parametrize("s", [64, 1])
@pytest.mark.parametrize("op", ["forward_training", "backward_training"])
def test_64_bit_indices_only_in_masked_kernels(extension: ModuleType, op: str, s: int) -> None:
    """The plan must not ask for an exact one: none is compiled."""
    shape = (2**31 // 64 // s, 64, s)
    for fused in (False, True):
        options = {"fused": fused, "strategy": "two_pass"}
        plan = extension.make_plan(op, *shape, "float16", {}, options)
        for stage in ("reduce", "elementwise"):
            exact = s > 1 and not fused
            assert plan[stage]["index_bits"] == 64 and plan[stage]["exact"] is exact


# ------------------------------------------------------------------------------- bytes

EXACT = [
    TrafficCase((8, 32, 32, 32)),
    TrafficCase((8, 32, 28, 28), dtype="fp32"),
    TrafficCase((4, 64, 28, 28), "nhwc", "bf16"),
    TrafficCase((8, 32, 16, 16), dtype="fp64"),
]


@pytest.mark.parametrize("case", EXACT, ids=lambda c: f"{c.layout}-{c.dtype}")
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("op", ["forward", "backward", "eval", "eval_backward"])
def test_bytes(case: TrafficCase, residual: bool, relu: bool, op: str) -> None:
    """Every tensor once, and a byte of the mask for each 16 bytes of one tensor."""
    values = vars(case) | {"residual": residual, "relu": relu, "op": op}
    result = count(TrafficCase(**values), scaled_device("a100", 4), "team")
    mask = case.nbytes // 16 if relu and op != "eval" else 0
    tensors = 3 + (residual and relu) if op.endswith("backward") else 2 + residual
    assert result.compulsory_bytes == tensors * case.nbytes + mask
    assert result.strategy == ("two_pass" if op == "eval" else "team")
    assert result.predicted_bytes == result.compulsory_bytes
    assert result.counted_bytes == pytest.approx(result.compulsory_bytes, rel=0.02)


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("l2_share", [0.1, 0.4, 8])
def test_bytes_of_two_passes(op: str, l2_share: float) -> None:
    """The mask is read by both backward kernels, the residual by the second of the forward."""
    case = TrafficCase((8, 32, 32, 32), op=op, residual=True, relu=True)
    size = int(max(l2_share * case.nbytes, 65536))
    result = count(case, scaled_device("t4", 1) | {"l2_bytes": size}, "two_pass")
    assert result.strategy == "two_pass"
    mask = case.nbytes // 16
    assert result.compulsory_bytes == (4 if op == "backward" else 3) * case.nbytes + mask
    reread = 2 * case.nbytes + mask if op == "backward" else case.nbytes
    assert result.predicted_bytes <= result.compulsory_bytes + reread
    assert (result.predicted_bytes == result.compulsory_bytes) == (l2_share == 8)
    assert result.counted_bytes == pytest.approx(result.predicted_bytes, rel=0.03)
