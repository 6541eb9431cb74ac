"""The inputs that PyTorch tests its own batch norms with, valid and invalid, given to ours.

They ship with torch, so that each version of torch brings the inputs of its own semantics.
"""

from __future__ import annotations

from collections.abc import Iterable
from unittest import mock

import hypothesis
import pytest
import torch
from conftest import Backend
from parametrisations import both_modes
from torch import Tensor, nn

import batchnorm_cuda

# On import torch's tests change settings of the whole process; ours keep theirs.
with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db
    from torch.testing._internal.opinfo.core import OpInfo
hypothesis.settings.load_profile("default")

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = {
    getattr(nn, name): getattr(batchnorm_cuda, name)
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
}
MODULES = [info for info in module_db if info.module_cls in OURS]
# The variant without cuDNN has the same inputs.
OPERATORS = [i for i in op_db if i.full_name == "nn.functional.batch_norm"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# The reference is float64. Ours is rounded to the dtype once, its parameters' gradients and updated
# statistics too; float32 and float64 results also carry the roundings of the sums. All are measured
# in the largest value of a result: a gradient may cancel in single elements.
ROUNDINGS = 8

every_module = pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
every_operator = pytest.mark.parametrize("info", OPERATORS, ids=lambda info: info.formatted_name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def test_there_are_inputs() -> None:
    assert (len(MODULES), len(OPERATORS)) == (3, 1)


def in_double(value: object) -> object:
    """A float64 copy, on the CPU, of what is a tensor."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().cpu().double().requires_grad_(value.requires_grad)


def assert_near(got: Iterable[Tensor], expected: Iterable[Tensor], dtype: torch.dtype) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        bound = ROUNDINGS * torch.finfo(dtype).eps * max(largest, 1.0)
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=0, atol=bound)


def with_gradients(output: Tensor, leaves: Iterable[Tensor], dy: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, list(leaves), dy)]


@every_module
@every_dtype
@both_modes
def test_modules(backend: Backend, info: ModuleInfo, dtype: torch.dtype, training: bool) -> None:
    for sample in info.module_inputs_func(
        info, backend.device, dtype, requires_grad=True, training=training
    ):
        made, given = sample.constructor_input, sample.forward_input
        theirs = info.module_cls(*made.args, **made.kwargs, dtype=torch.float64).train(training)
        ours = OURS[info.module_cls](
            *made.args, **made.kwargs, device=backend.device, dtype=dtype
        ).train(training)
        (x,) = given.args
        reference_x = in_double(x)
        results = []
        dy = torch.randn(x.shape, dtype=dtype)
        for module, leaf, gradient in (
            (ours, x, dy.to(backend.device)),
            (theirs, reference_x, dy.double()),
        ):
            passed = with_gradients(module(leaf), [leaf, *module.parameters()], gradient)
            results.append([*passed, *(b for b in module.buffers() if b.is_floating_point())])
        assert_near(*results, dtype)
        counts = [module.num_batches_tracked for module in (ours, theirs)]
        assert counts[0] is counts[1] is None or counts[0].cpu() == counts[1]


@every_operator
@every_dtype
def test_operator(backend: Backend, info: OpInfo, dtype: torch.dtype) -> None:
    for sample in info.sample_inputs(backend.device, dtype, requires_grad=True):
        ours = (sample.input, *sample.args)
        theirs = tuple(in_double(value) for value in ours)
        dy = torch.randn(sample.input.shape, dtype=dtype)
        results = []
        for function, arguments, gradient in (
            (batchnorm_cuda.batch_norm, ours, dy.to(backend.device)),
            (info.op, theirs, dy.double()),
        ):
            leaves = [a for a in arguments if a is not None and a.requires_grad]
            output = function(*arguments, **sample.kwargs)
            running = [a for a in arguments[1:3] if a is not None]
            results.append([*with_gradients(output, leaves, gradient), *running])
        assert_near(*results, dtype)


@every_module
@both_modes
def test_module_errors(backend: Backend, info: ModuleInfo, training: bool) -> None:
    samples = info.module_error_inputs_func(
        info, backend.device, torch.float32, requires_grad=False, training=training
    )
    assert samples
    for sample in samples:
        made = sample.module_error_input.constructor_input
        given = sample.module_error_input.forward_input
        assert sample.error_on == ModuleErrorEnum.FORWARD_ERROR
        module = OURS[info.module_cls](*made.args, **made.kwargs).to(backend.device)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            module(*given.args, **given.kwargs)
        assert int(module.num_batches_tracked) == 0
