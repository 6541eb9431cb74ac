"""Tools of torch that know only torch.nn's batch norms: each works with ours, or says what to do.

What a tool makes is compared with the module that it was given, in evaluation; `refuses` has the
words in which one declines, which name the function to call instead.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Backend
from fold_cases import IN, OUT, filled, image
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules, fuse_modules_qat, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import fuse_fx, prepare_fx
from torch.fx.experimental.optimization import fuse, remove_dropout
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import batchnorm_cuda
from batchnorm_cuda import SyncBatchNorm, fold, fold_report, revert

BY_CLASS = r"call batchnorm_cuda\.fold\(model\) in its place, or batchnorm_cuda\.revert\(model\)"


@pytest.fixture(autouse=True)
def _torchs_own_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def network(activation: str | None = None) -> nn.Sequential:
    norm = batchnorm_cuda.BatchNorm2d(OUT, activation=activation)
    return filled(nn.Sequential(nn.Conv2d(IN, OUT, 3), norm)).double()


def assert_same(got: nn.Module, expected: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(got(x), expected(x), rtol=1e-12, atol=1e-12)


# --- torch.nn.SyncBatchNorm.convert_sync_batchnorm ----------------------------------------------


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"])
@pytest.mark.parametrize("settings", [{}, {"affine": False, "track_running_stats": False}], ids=str)
def test_torchs_conversion_keeps_the_activation(kind: str, settings: dict) -> None:
    module = getattr(batchnorm_cuda, kind)(3, activation="relu", eps=0.25, **settings).eval()
    net = nn.Sequential(nn.Sequential(module), getattr(batchnorm_cuda, kind)(3, **settings))
    group = object()
    for converted in (
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net), group)[0][0],
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module), group),
    ):
        assert type(converted) is SyncBatchNorm and converted.activation == "relu"
        assert converted.process_group is group and converted.eps == 0.25
        assert not converted.training
        assert list(converted.state_dict()) == list(module.state_dict())
    assert converted.running_mean is None or torch.equal(
        converted.running_mean, module.running_mean
    )
    # What has no activation becomes torch's, as before.
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(net)[1]) is nn.SyncBatchNorm


def test_a_conversion_that_cannot_keep_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should torch call its new module something else."""
    code = nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__
    names = tuple("made" if name == "module_output" else name for name in code.co_varnames)
    renamed = code.replace(co_varnames=names)
    monkeypatch.setattr(batchnorm_cuda._models.torch_tools, "_CONVERTS", renamed)
    function = nn.SyncBatchNorm.convert_sync_batchnorm.__func__
    monkeypatch.setattr(function, "__code__", renamed)
    with pytest.raises(RuntimeError, match=r"call batchnorm_cuda\.convert\(model, sync=True\)"):
        nn.SyncBatchNorm.convert_sync_batchnorm(network("relu"))


# --- running_mean, which is looked at ----------------------------------------------------------


def test_running_mean_is_the_buffer() -> None:
    """By every way of reading and writing it."""
    module = batchnorm_cuda.BatchNorm2d(3, activation="relu")
    buffer = module._buffers["running_mean"]
    assert module.running_mean is buffer is dict(module.named_buffers())["running_mean"]
    module.running_mean = other = torch.ones(3)
    assert module.running_mean is other is module.state_dict(keep_vars=True)["running_mean"]
    module.running_mean = None
    assert module.running_mean is None
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.running_mean is None
    del module.running_mean
    with pytest.raises(AttributeError, match="'BatchNorm2d' object has no attribute 'running_m"):
        _ = module.running_mean
    module.register_buffer("running_mean", buffer)
    assert module.running_mean is buffer
    del module.running_mean
    module.running_mean = 1
    assert module.running_mean == 1
    module = nn.BatchNorm2d.__new__(batchnorm_cuda.BatchNorm2d)
    assert not hasattr(module, "running_mean")


def test_running_mean_in_a_compiled_forward(aten: Backend) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = batchnorm_cuda.BatchNorm1d(3, activation="relu")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm.running_mean

    torch._dynamo.reset()
    module, x = filled(Shifted()), torch.randn(4, 3)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))


# --- fusing for inference -----------------------------------------------------------------------


def test_fuse_conv_bn_eval(aten: Backend) -> None:
    net = network()
    assert_same(fuse_conv_bn_eval(*net), net, image())
    with pytest.raises(ValueError, match=r"fuse_conv_bn_eval would leave .*batchnorm_cuda\.fold\("):
        fuse_conv_bn_eval(*network("relu"))


def test_fuse_linear_bn_eval(aten: Backend) -> None:
    net = nn.Sequential(nn.Linear(IN, OUT), batchnorm_cuda.BatchNorm1d(OUT)).double()
    assert_same(fuse_linear_bn_eval(*filled(net)), net, torch.randn(3, IN).double())
    net[1].activation = "relu"
    with pytest.raises(ValueError, match="fuse_linear_bn_eval would leave out activation='relu'"):
        fuse_linear_bn_eval(*net)


def prepare(net: nn.Module) -> nn.Module:
    return prepare_fx(net, get_default_qconfig_mapping(), (image(),))


BY_EXACT_CLASS = {"fuse": fuse, "fuse_fx": fuse_fx, "prepare_fx": prepare}


@pytest.mark.parametrize("tool", BY_EXACT_CLASS)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_fusing_by_class_is_refused(aten: Backend, tool: str, activation: str | None) -> None:
    with pytest.raises(RuntimeError, match=BY_CLASS):
        BY_EXACT_CLASS[tool](network(activation))


@pytest.mark.parametrize("tool", BY_EXACT_CLASS)
def test_fusing_by_class_where_there_is_nothing_to_fuse(aten: Backend, tool: str) -> None:
    """After `fold` or `revert`, and where a batch norm has no layer before it."""
    net = nn.Sequential(nn.ReLU(), batchnorm_cuda.BatchNorm2d(IN), *network())
    for change in (fold, revert):
        ready = change(filled(copy.deepcopy(net)).float())
        BY_EXACT_CLASS[tool](ready)
    assert_same(fuse(fold(filled(copy.deepcopy(net)).double())), filled(net).double(), image())


def test_tracing_without_fusing_is_not_refused(aten: Backend) -> None:
    net = network("relu")
    assert_same(torch.fx.symbolic_trace(net), net, image())
    assert_same(remove_dropout(net), net, image())


# --- torch.ao.quantization.fuse_modules ---------------------------------------------------------

PATTERNS = {
    "conv": (lambda: nn.Conv2d(IN, OUT, 3), "BatchNorm2d", [], (6, 5)),
    "conv relu": (lambda: nn.Conv2d(IN, OUT, 3), "BatchNorm2d", [nn.ReLU], (6, 5)),
    "conv1d": (lambda: nn.Conv1d(IN, OUT, 3), "BatchNorm1d", [], (6,)),
    "conv3d relu": (lambda: nn.Conv3d(IN, OUT, 1), "BatchNorm3d", [nn.ReLU], (2, 3, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(IN, OUT, 3), "BatchNorm2d", [], (6, 5)),
    "linear": (lambda: nn.Linear(IN, OUT), "BatchNorm1d", [], ()),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_fuse_modules(aten: Backend, pattern: str) -> None:
    layer, kind, rest, shape = PATTERNS[pattern]
    norm, x = getattr(batchnorm_cuda, kind)(OUT), torch.randn(3, IN, *shape).double()
    net = filled(nn.Sequential(layer(), norm, *[module() for module in rest])).double()
    log = []
    net[-1].register_forward_hook(lambda *_: log.append("called"))
    names = [str(place) for place in range(len(net))]
    fused = fuse_modules(net, names)
    assert_same(fused, net, x)
    assert type(fused[1]) is nn.Identity and net[1] is norm and log == ["called"] * 2
    fuse_modules(nn.Sequential(*net), names, inplace=True)
    assert type(norm) is getattr(batchnorm_cuda, kind)
    norm.activation = "relu"
    with pytest.raises(ValueError, match=r"call batchnorm_cuda\.fold\(model\) before it"):
        fuse_modules(net, names)


def test_fuse_modules_qat(aten: Backend) -> None:
    """For training: torch's own module of both, with a batch norm of torch.nn in it."""
    net = network().train()
    fused = fuse_modules_qat(net, ["0", "1"])
    assert [type(module) for module in fused[0]] == [nn.Conv2d, nn.BatchNorm2d]
    assert_same(fused, net, image())
    assert type(net[1]) is batchnorm_cuda.BatchNorm2d


def test_fuse_modules_of_the_rest(aten: Backend) -> None:
    """What torch cannot fuse of its own classes has torch's own words, and its own classes work."""
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fuse_modules(nn.Sequential(nn.ReLU(), batchnorm_cuda.BatchNorm2d(3)).eval(), ["0", "1"])
    net = revert(network())
    assert_same(fuse_modules(net, ["0", "1"]), net, image())


# --- torch.jit.script ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [network, lambda: network("relu"), lambda: network()[1]])
def test_script_is_refused(make: Callable[[], Any]) -> None:
    words = r"cannot compile a BatchNorm2d of batchnorm_cuda: call batchnorm_cuda\.revert\(model\)"
    model = make()
    modules = list(model.modules())
    with pytest.raises(RuntimeError, match=words):
        torch.jit.script(model)
    assert list(model.modules()) == modules


def test_script_after_fold_or_revert(aten: Backend) -> None:
    for change in (fold, revert):
        net = network()
        expected = copy.deepcopy(net)
        assert_same(torch.jit.script(change(net)), expected, image())
    net = network("relu")
    folded = fold(copy.deepcopy(net))
    assert "folded" in fold_report(folded)["1"]
    assert_same(torch.jit.script(folded), net, image())
