"""`fold` moves batch norms into the layer before them: what is computed, and what is left."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Backend
from fold_cases import IN, OUT, assert_folds, both, filled, folds, image, pair
from tolerances import ROUNDOFF
from torch import Tensor, nn

import batchnorm_cuda
from batchnorm_cuda import SyncBatchNorm, convert, fold, fold_report

SPATIAL = {1: (9,), 2: (7, 5), 3: (5, 4, 3)}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


# --- layers and batch norms ---------------------------------------------------------------------

LAYERS = {
    **{f"conv{d}d": (CONVOLUTIONS[d], d, {}) for d in CONVOLUTIONS},
    **{f"transposed{d}d": (TRANSPOSED[d], d, {}) for d in TRANSPOSED},
    "groups": (nn.Conv2d, 2, {"groups": 2}),
    "depthwise": (nn.Conv2d, 2, {"groups": IN, "out": 2 * IN}),
    "transposed groups": (nn.ConvTranspose2d, 2, {"groups": 2, "stride": 2}),
    "no bias": (nn.Conv2d, 2, {"bias": False, "padding": 1, "padding_mode": "reflect"}),
    "transposed no bias": (nn.ConvTranspose1d, 1, {"bias": False}),
    "linear": (nn.Linear, 0, {}),
    "linear no bias": (nn.Linear, 0, {"bias": False}),
}
BATCH_NORMS = {
    "plain": {},
    "no affine": {"affine": False},
    "eps": {"eps": 0.5},
    "no shift": {},  # its bias is taken away
}


def layer_and_norm(case: str, norm: str) -> nn.Sequential:
    kind, dimensions, settings = LAYERS[case]
    settings = dict(settings)
    out = settings.pop("out", OUT)
    kernel = () if kind is nn.Linear else (3,)
    batch_norm = NORMS[max(dimensions, 1)](out, **BATCH_NORMS[norm])
    if norm == "no shift":
        batch_norm.register_parameter("bias", None)
    return filled(nn.Sequential(kind(IN, out, *kernel, **settings), batch_norm))


def scale_of_terms(model: nn.Sequential, x: Tensor) -> Tensor:
    """For every output the magnitudes that are added: |scale| (|W| |x| + |b| + |mean|) + |bias|."""
    layer, norm = copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.abs_()
        shape = (-1, *[1] * (x.dim() - 2))
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.abs()
        terms = layer(x.double().abs()) + norm.running_mean.abs().view(shape)
        shift = 0 if norm.bias is None else norm.bias.abs().view(shape)
        return scale.view(shape) * terms + shift


@both
@pytest.mark.parametrize("norm", BATCH_NORMS)
@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layers(aten: Backend, case: str, norm: str, dtype: torch.dtype, converted: bool) -> None:
    """Within the bound of a sum of n terms whose weights and bias have been rounded once.

    In any order such a sum is off by at most n roundoffs of its terms' magnitudes; each rounded
    weight adds one, the bias and its addition two. The same goes for the reference in float64,
    where the batch norm adds six operations.
    """
    model = layer_and_norm(case, norm).to(dtype)
    exact = copy.deepcopy(model).double()
    fold(convert(model) if converted else model)
    assert folds(model) == ["1"]
    x = torch.randn(3, IN, *SPATIAL.get(LAYERS[case][1], ()), dtype=dtype)
    with torch.no_grad():
        got, expected = model(x), exact(x.double())
    n = model[0].weight[0].numel() * (IN if "transposed" in case else 1)
    units = (n + 3) * ROUNDOFF[dtype] + (n + 6) * ROUNDOFF[torch.float64]
    assert got.dtype == dtype
    assert ((got.double() - expected).abs() <= units * scale_of_terms(exact, x)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@both
def test_half_weights_are_rounded_once(aten: Backend, dtype: torch.dtype, converted: bool) -> None:
    """With float32 statistics beside them: computed in float64, rounded to the layer's dtype."""
    model = layer_and_norm("conv2d", "plain")
    model[0].to(dtype)
    layer, norm = copy.deepcopy(model).double()
    fold(convert(model) if converted else model)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = (layer.weight * scale.view(-1, 1, 1, 1)).to(dtype)
    bias = ((layer.bias - norm.running_mean) * scale + norm.bias).to(dtype)
    assert torch.equal(model[0].weight, weight) and torch.equal(model[0].bias, bias)


@pytest.mark.parametrize(
    ("mean", "var"), [(1e6, 1.0), (0.0, 1e-12), (0.0, 1e20), (0.0, float("nan"))]
)
def test_half_without_the_range(mean: float, var: float) -> None:
    """Too large, or so small that float16 has few digits left: it stays as it is."""
    model = pair().eval()
    model[0].half()
    with torch.no_grad():
        model[0].weight.mul_(0.1)
        model[1].running_mean.fill_(mean)
        model[1].running_var.fill_(var)
        model[1].eps = 1e-20
    before = model[0].weight
    assert "would not be finite, or too small for float16" in fold_report(fold(model))["1"]
    assert model[0].weight is before


def test_channels_last_weights_stay_so() -> None:
    model = filled(pair()).to(memory_format=torch.channels_last)
    fold(model)
    assert folds(model) and model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("synchronised", [nn.SyncBatchNorm, SyncBatchNorm])
def test_synchronised(synchronised: type) -> None:
    model = nn.Sequential(nn.Conv2d(IN, OUT, 3), synchronised(OUT))
    assert_folds(model, image(), names=["1"])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(IN, OUT), (2, OUT, IN)), (nn.Conv1d(IN, OUT, 3), (IN, OUT + 2))],
    ids=["linear", "conv without a batch"],
)
def test_channels_in_another_place_are_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """A batch norm of one dimension takes both; which one it was cannot be seen before the call."""
    model = filled(nn.Sequential(layer, nn.BatchNorm1d(OUT)))
    assert model(torch.randn(shape)).shape[1] == OUT
    fold(model)
    assert folds(model) == ["1"]
    with pytest.raises(AssertionError, match=r"^batchnorm_cuda\.fold: expected the layer before"):
        model(torch.randn(shape))


# --- what is left -------------------------------------------------------------------------------


def test_what_is_left_is_the_same_object(aten: Backend) -> None:
    """Also where the model has it under two names, or in a plain list."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(IN, OUT, 3)
            self.norm = self.again = nn.BatchNorm2d(OUT)
            self.steps = [self.conv, self.norm]

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            return x

    model = Net()
    parts, old = (model.conv, model.norm), model.conv.weight
    value = old.detach().clone()
    state = model.state_dict()
    assert_folds(model, image(), names=["norm"])
    assert (model.conv, model.norm) == parts and model.norm is model.again
    assert type(model.norm) is nn.Identity and list(model.state_dict()) == [
        "conv.weight",
        "conv.bias",
    ]
    # What a checkpoint or an optimizer holds keeps its values.
    assert model.conv.weight is not old and model.conv.weight.requires_grad
    assert torch.equal(old.float(), value) and torch.equal(state["conv.weight"].float(), value)
    fold(model)  # again
    assert folds(model) == ["norm"]
    twin = pickle.loads(pickle.dumps(copy.deepcopy(pair().eval())))
    assert folds(fold(twin)) == ["1"]


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "SyncBatchNorm"])
@pytest.mark.parametrize("residual", [False, True])
def test_activation_stays(backend: Backend, kind: str, residual: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            dimensions = 1 if kind == "BatchNorm1d" else 2
            self.conv = CONVOLUTIONS[dimensions](IN, OUT, 3, padding=1)
            self.norm = getattr(batchnorm_cuda, kind)(OUT, activation="relu")
            self.identity = CONVOLUTIONS[dimensions](IN, OUT, 1)

        def forward(self, x: Tensor) -> Tensor:
            if residual:
                return self.norm(self.conv(x), residual=self.identity(x))
            return self.norm(self.conv(x))

    x = image()[:, :, 0] if kind == "BatchNorm1d" else image()
    model = assert_folds(Net().to(backend.device), x.to(backend.device), names=["norm"])
    assert model(x.to(backend.device)).min() == 0
    assert "BatchNorm" not in type(model.norm).__name__
    assert (type(model.norm) is nn.ReLU) == (kind == "BatchNorm2d" and not residual)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.norm))):
        assert type(twin) in (type(model), type(model.norm))


def test_folded_models_are_traced_scripted_and_exported(aten: Backend) -> None:
    model = nn.Sequential(
        nn.Conv1d(IN, OUT, 3),
        batchnorm_cuda.BatchNorm1d(OUT, activation="relu"),
        nn.Conv1d(OUT, OUT, 3),
        batchnorm_cuda.BatchNorm1d(OUT),
    )
    x = image()[:, :, 0]
    assert_folds(model, x, names=["1", "3"])
    expected = model(x)
    for graph in (
        torch.fx.symbolic_trace(model),
        torch.jit.script(model),
        torch.export.export(model, (x,)).module(),
        torch.compile(model, backend="eager", fullgraph=True),
    ):
        assert torch.equal(graph(x), expected)


def test_compiled_before(aten: Backend) -> None:
    """A compiled model notices, and is folded through its wrapper."""
    torch._dynamo.reset()
    model = filled(pair()).double()
    compiled = torch.compile(model, backend="eager")
    x = image()
    expected = compiled(x)
    assert folds(fold(compiled)) == ["_orig_mod.1"]
    torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(compiled(x), model(x))


def test_distributed_data_parallel(aten: Backend) -> None:
    """Also where no buffer is left for it to broadcast."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(filled(pair())).eval()
        x = image().float()
        expected = wrapped(x)
        assert folds(fold(wrapped)) == ["module.1"]
        torch.testing.assert_close(wrapped(x), expected, rtol=1e-5, atol=1e-5)
    finally:
        dist.destroy_process_group()


def test_graph_module(aten: Backend) -> None:
    graph = torch.fx.symbolic_trace(filled(pair()))
    assert_folds(graph, image(), names=["1"])


def test_lazy_layers_that_have_had_their_input(aten: Backend) -> None:
    model = nn.Sequential(nn.LazyConv2d(OUT, 3), nn.LazyBatchNorm2d())
    model(image().float())
    assert_folds(model, image(), names=["1"])


def test_batch_norm_after_batch_norm(aten: Backend) -> None:
    """And past what hands on its input in evaluation."""
    model = nn.Sequential(
        nn.Conv2d(IN, OUT, 3),
        nn.Dropout(),
        nn.BatchNorm2d(OUT),
        nn.Identity(),
        batchnorm_cuda.BatchNorm2d(OUT, activation="relu"),
        nn.BatchNorm2d(OUT),
    )
    assert_folds(model, image(), names=["2", "4"])


def test_layers_of_a_subclass(aten: Backend) -> None:
    """One that only sets it up is folded; one that computes something else is not."""

    class Wide(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(IN, OUT, 3)

        def number_of_weights(self) -> int:
            return self.weight.numel()

    class Standardised(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight - weight.mean(), bias)

    class Scaled(nn.ConvTranspose2d):
        def _output_padding(self, *settings: Any) -> list[int]:
            return super()._output_padding(*settings)

    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(
        *(Wide(), nn.BatchNorm2d(OUT)),
        *(Standardised(OUT, OUT, 1), nn.BatchNorm2d(OUT)),
        *(Scaled(OUT, OUT, 1), nn.BatchNorm2d(OUT)),
        *(Doubled(OUT, OUT, 1), nn.BatchNorm2d(OUT)),
    )
    assert_folds(model, image(), names=["1"])
    assert "no layer to fold it into, but '2' (Standardised)" in fold_report(model)["3"]
