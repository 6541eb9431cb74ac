"""Synchronised batch norm with a residual and ReLU, over real processes, against one process."""

from __future__ import annotations

import fused
import pytest
import reference
import torch
from cases import Parameters
from forked import Forks
from fused import FORMS, every_form
from sync_cases import BACKENDS, CASES, EPS, SyncCase
from sync_worker import fused_data
from test_sync import launch, rows
from tolerances import assert_within

from batchnorm_cuda._ops import layout
from batchnorm_cuda._ops import mask as _mask
from batchnorm_cuda._ops import operators as ops

every_backend = pytest.mark.parametrize("name", BACKENDS)
CASES_OF_TWO = [case for case in CASES if case.ranks == 2]


@pytest.fixture(scope="module")
def two(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict:
    jobs = ("cases", "compiled", "collectives", "recorded", "double_backward")
    groups = {2: [f"fused_{job}" for job in jobs]}
    return launch(forks, tmp_path_factory.mktemp("ranks"), groups)[2]


@every_backend
@every_form
@pytest.mark.parametrize("case", CASES_OF_TWO, ids=lambda case: case.name)
def test_matches_one_process(two: dict, name: str, form: str, case: SyncCase) -> None:
    """Every result of every rank against the float64 reference over the whole batch."""
    results = [of_rank[name, case.name, form] for of_rank in two["fused_cases"]]
    data = [fused_data(case, part, form) for part in range(case.ranks)]
    p = Parameters(*case.parameters())
    if not case.affine:
        p.weight = p.bias = None
    # Without a residual the last is dy, and of no effect.
    x, dy, residual = (torch.cat([rows(part[i]) for part in data]) for i in (0, 1, -1))

    def whole(key: str) -> torch.Tensor:
        return torch.cat([rows(result[key]) for result in results])

    forward = fused.reference_forward(x, p, True, form, residual)
    output = whole("output")
    assert_within("output", output, forward.output, forward.scales["output"], case.dtype)
    for key in ("running_mean", "running_var"):
        for result in results:
            want, scale = getattr(forward, key), forward.scales[key]
            assert_within(key, result[key], want, scale, case.dtype)

    g = fused.through_relu(dy, output, form)
    if FORMS[form][0]:
        assert torch.equal(whole("grad_residual"), g)
    backward = reference.backward(g, x, p, True, EPS)
    scale = backward.scales["grad_input"]
    assert_within("grad_input", whole("grad_input"), backward.grad_input, scale, case.dtype)
    for key in ("grad_weight", "grad_bias") if case.affine else ():
        total = sum(result[key] for result in results)
        assert_within(key, total, getattr(backward, key), backward.scales[key], case.dtype)
    for part, result in zip(data, results, strict=True):
        strides = layout.as_dense(part[0]).stride()
        kept = ["output", "grad_input", *(["grad_residual"] if all(FORMS[form]) else [])]
        assert [result[key].stride() for key in kept] == [strides] * len(kept)


@every_backend
@every_form
def test_compiled_and_without_gradients(two: dict, name: str, form: str) -> None:
    """As one graph, and with no backward to come: the same bits."""
    for results in two["fused_compiled"]:
        eager, compiled, output = results[name, form]
        assert eager.keys() == compiled.keys()
        for key, want in eager.items():
            assert torch.equal(compiled[key], want), key
        assert torch.equal(output, eager["output"])


@every_backend
def test_one_collective_a_pass(two: dict, name: str) -> None:
    """None in a backward whose input needs no gradient."""
    for results in two["fused_collectives"]:
        for of_input in (True, False):
            forward, backward = results[name, of_input]
            assert len(forward) == 1 and "allgather" in forward[0]
            assert len(backward) == of_input


@every_backend
@every_form
def test_recorded_gradients_are_the_same(two: dict, name: str, form: str) -> None:
    """A backward that is recorded goes in parts, and gives what the fused kernels give."""
    for results in two["fused_recorded"]:
        plain, recorded = results[name, form]
        torch.testing.assert_close(recorded, plain, rtol=1e-11, atol=1e-12)


@every_backend
@every_form
def test_double_backward(two: dict, name: str, form: str) -> None:
    for results in two["fused_double_backward"]:
        assert results[name, form]


def test_composite_lays_every_gradient_out_as_the_input() -> None:
    """However grad_output is laid out, which a mask of all ones hands on."""
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    mask = torch.full((_mask.mask_bytes(x.numel(), x.dtype),), 255, dtype=torch.uint8)
    stats, sums, count = torch.ones(5), torch.zeros(2, 5), torch.tensor([24])
    for dy in (torch.randn(2, 5, 4, 3), torch.randn(3, 4, 5, 2).permute(3, 2, 1, 0)):
        grads = ops.sync_fused_backward_elementwise(
            dy, x, None, stats, stats, sums, count, mask, True, True
        )
        assert [grad.stride() for grad in grads] == [x.stride()] * 2
        torch.testing.assert_close(grads[1], dy)
