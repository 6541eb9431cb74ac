"""Training loops over a fused model give the losses of the model as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import Backend
from forked import Forks, Program
from torch import nn
from torch.optim.swa_utils import AveragedModel

from batchnorm_cuda import convert, fusion_report
from bench import fused_training
from bench.fused_training import batches, losses, small

TIGHT = {"rtol": 1e-8, "atol": 1e-10}  # of float64, over a few steps
ROOT = Path(__file__).parents[2]


def pair() -> tuple[nn.Module, nn.Module]:
    theirs = small()
    ours = convert(copy.deepcopy(theirs), fuse=True)
    assert len(fusion_report(ours).fused) == theirs.fused
    return theirs, ours


def assert_same_states(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **TIGHT)


def test_plain(backend: Backend) -> None:
    theirs, ours = pair()
    torch.testing.assert_close(losses(ours, batches()), losses(theirs, batches()), **TIGHT)
    assert_same_states(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints(aten: Backend, reentrant: bool, when: str) -> None:
    """Turned on before the conversion or after it."""
    theirs = small()
    ours = copy.deepcopy(theirs)
    theirs.reentrant = reentrant
    if when == "before":
        ours.reentrant = reentrant
    convert(ours, fuse=True)
    ours.reentrant = reentrant
    fused = len(fusion_report(ours).fused)
    assert fused == theirs.fused if when == "after" else fused > 0
    torch.testing.assert_close(losses(ours, batches()), losses(theirs, batches()), **TIGHT)
    assert_same_states(ours, theirs)


def test_mixed_precision(backend: Backend) -> None:
    """In bfloat16, where the fused one rounds once instead of three times."""
    theirs, ours = (model.float() for model in pair())
    data = [(x.float(), target) for x, target in batches()]
    autocast = lambda: torch.autocast(backend.device, torch.bfloat16)  # noqa: E731
    torch.testing.assert_close(
        losses(ours, data, autocast), losses(theirs, data, autocast), rtol=0.03, atol=0.03
    )


def test_moving_average(aten: Backend) -> None:
    averages = []
    for model in pair():
        average = AveragedModel(model, use_buffers=True)
        losses(model, batches(), after=lambda a=average, m=model: a.update_parameters(m))
        averages.append(average.eval())
    x, _ = next(batches())
    torch.testing.assert_close(averages[1](x), averages[0](x), **TIGHT)
    assert len(fusion_report(averages[1]).fused) == small().fused


def test_compiled(aten: Backend) -> None:
    torch._dynamo.reset()
    theirs, ours = pair()
    for model in (theirs, ours):
        model.blocks = model.blocks[1:2]  # compiling takes seconds
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(losses(compiled, batches()), losses(theirs, batches()), **TIGHT)
    assert_same_states(ours, theirs)


@pytest.mark.parametrize("way", ["plain", "together", "synchronised"])
def test_data_parallel_over_two_processes(forks: Forks, tmp_path: Path, way: str) -> None:
    """Fused before it is wrapped, and after."""
    commands = [
        fused_training.rank_command(rank, tmp_path, "small", [way])
        for rank in range(fused_training.RANKS)
    ]
    done = forks.run_together([Program(command, folder=str(ROOT)) for command in commands])
    assert not any(r.returncode for r in done), "".join(r.stdout + r.stderr for r in done)
    rows = list(fused_training.compare(tmp_path, way))
    assert len(rows) == fused_training.RANKS * len(fused_training.ORDERS)
    assert [wrong for *_, wrong in rows if wrong] == []
