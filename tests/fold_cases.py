"""Small models to fold, and what is asked of each."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm_cuda import fold, fold_report

IN, OUT = 4, 6
both = pytest.mark.parametrize("converted", [False, True], ids=["torch.nn", "converted"])


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation, with statistics and parameters as after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, low, high in (
                ("running_mean", -1.0, 1.0),
                ("running_var", 0.3, 3.0),
                ("weight", -1.5, 1.5),
                ("bias", -1.0, 1.0),
            ):
                tensor = getattr(module, name)
                if tensor is not None:
                    drawn = torch.rand(tensor.shape, generator=generator) * (high - low) + low
                    tensor.data.copy_(drawn)
    return model.eval()


def folds(model: nn.Module) -> list[str]:
    """The names of the batch norms that were folded."""
    report = fold_report(model)
    assert all(text.startswith(("folded into ", "stays: ")) for text in report.values())
    return [name for name, text in report.items() if text.startswith("folded")]


def assert_folds(model: nn.Module, *inputs: Any, names: list[str]) -> nn.Module:
    """These and no others; the outputs are those from before, in float64 to some roundings."""
    filled(model).double()
    twin = copy.deepcopy(model)
    assert fold(model) is model
    assert folds(model) == names, fold_report(model)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), twin(*inputs), rtol=1e-12, atol=1e-12)
    return model


def image(channels: int = IN) -> Tensor:
    return torch.randn(2, channels, 6, 5, dtype=torch.float64)


def pair(**settings: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(IN, OUT, 3, **settings), nn.BatchNorm2d(OUT))


def assert_stays(model: nn.Module, x: Tensor, reason: str, name: str = "norm") -> None:
    """The reason, and that nothing has changed, to the bit."""
    filled(model).double()
    expected = pickle.loads(pickle.dumps(model(x)))
    state = {key: (value, value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    attributes = {module: dict(vars(module)) for module in model.modules()}
    fold(model)
    report = fold_report(model)[name]
    assert report.startswith("stays: ") and reason in report
    for module, before in attributes.items():
        after = dict(vars(module))
        after.pop("_fold_note", None)
        assert after == before
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is old and torch.equal(old, copy) for key, (old, copy) in state.items())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def square() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(IN, IN, 1), nn.BatchNorm2d(IN))
