"""Who computes batch norm: ours, cuDNN, PyTorch's own kernels, torch.compile, apex, InPlace-ABN.

Each is a function with the arguments of torch.nn.functional.batch_norm, in training, and says for
an input what it runs (`describe`) or why it cannot (`why_not`): a time against "cuDNN" must not be
one of another backend that torch chose without a word.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import batchnorm_cuda
from batchnorm_cuda import explain
from batchnorm_cuda._ops.choice import implementation

from ..cases.case import BenchCase

EPS, MOMENTUM = 1e-5, 0.1
COPY = "copy"
OURS = {"ours": "auto", "ours:two_pass": "two_pass", "ours:team": "team"}
NAMES = (*OURS, "cudnn", "native", "compile", "apex", "inplace_abn", COPY)

Run = Callable[["Tensors"], Tensor]
Function = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Tensors:
    """What a training step takes. Parameters and statistics are float32."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())


class Provider:
    """`call` computes; it is entered `context` for every call, and while a graph captures one."""

    in_place = False  # whether it overwrites x

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self.device = device

    def why_not(self, case: BenchCase, tensors: Tensors) -> str | None:
        return None

    def describe(self, case: BenchCase, tensors: Tensors) -> str:
        return self.name

    def function(self, case: BenchCase) -> Function:
        return F.batch_norm

    def context(self, case: BenchCase) -> AbstractContextManager:
        return nullcontext()

    def call(self, case: BenchCase) -> Run:
        function = self.function(case)

        def run(t: Tensors) -> Tensor:
            args = (t.x, t.running_mean, t.running_var, t.weight, t.bias)
            return function(*args, True, MOMENTUM, EPS)

        return run


class Ours(Provider):
    def __init__(self, name: str, device: str) -> None:
        super().__init__(name, device)
        self.strategy = OURS[name]

    def _plans(self, case: BenchCase, t: Tensors) -> list[batchnorm_cuda.Explanation]:
        parts = ("forward", "backward") if case.op == "both" else (case.op,)
        return [explain(t.x, op=part, strategy=self.strategy) for part in parts]

    def why_not(self, case: BenchCase, tensors: Tensors) -> str | None:
        for plan in self._plans(case, tensors):
            if self.strategy == "team" and plan.strategy != "team":
                return f"no team: {plan.reason}"
        return None

    def describe(self, case: BenchCase, tensors: Tensors) -> str:
        took = [plan.strategy for plan in self._plans(case, tensors)]
        return f"{batchnorm_cuda.backend_for(tensors.x)}, {' + '.join(dict.fromkeys(took))}"

    def function(self, case: BenchCase) -> Function:
        return batchnorm_cuda.batch_norm

    @contextmanager
    def context(self, case: BenchCase) -> Iterator[None]:
        """The options hold for the process: others' calls must not see them."""
        extension = implementation(torch.empty(0, device=self.device))
        extension.set_plan_options({"strategy": self.strategy})
        try:
            yield
        finally:
            extension.set_plan_options({})


class Torch(Provider):
    """F.batch_norm with cuDNN allowed or not, whichever torch is to choose."""

    def __init__(self, name: str, device: str) -> None:
        super().__init__(name, device)
        self.wanted = "Cudnn" if name == "cudnn" else "Native"

    def context(self, case: BenchCase) -> AbstractContextManager:
        return torch.backends.cudnn.flags(enabled=self.wanted == "Cudnn")

    def why_not(self, case: BenchCase, tensors: Tensors) -> str | None:
        chosen = self.describe(case, tensors)
        return None if chosen == f"torch: {self.wanted}" else f"{chosen} is what runs"

    def describe(self, case: BenchCase, tensors: Tensors) -> str:
        with self.context(case):
            return f"torch: {select_backend(tensors)}"


class Compiled(Provider):
    def describe(self, case: BenchCase, tensors: Tensors) -> str:
        return "torch.compile, inductor"

    def why_not(self, case: BenchCase, tensors: Tensors) -> str | None:
        return None if tensors.x.is_cuda else "Inductor's kernels for the CPU are another matter"

    def function(self, case: BenchCase) -> Function:
        torch._dynamo.reset()  # nothing of earlier shapes, and no limit of their number
        return torch.compile(F.batch_norm, dynamic=False, fullgraph=True)


class Apex(Provider):
    """groupbn, the fused NHWC kernels of apex.contrib."""

    def why_not(self, case: BenchCase, tensors: Tensors) -> str | None:
        fits = case.layout == "nhwc" and case.dtype == "fp16" and tensors.x.dim() == 4
        if not fits or tensors.x.shape[1] % 4:
            return "groupbn takes (N, C, H, W) in fp16, channels-last, C a multiple of 4"
        return None

    def describe(self, case: BenchCase, tensors: Tensors) -> str:
        return "apex.contrib.groupbn"

    def call(self, case: BenchCase) -> Run:
        from apex.contrib.groupbn import BatchNorm2d_NHWC

        module = BatchNorm2d_NHWC(case.shape.sizes[1]).to(self.device).train()
        del module.weight, module.bias  # so that plain tensors, ours, can stand in their place

        def run(t: Tensors) -> Tensor:
            module.weight, module.bias = t.weight, t.bias
            module.running_mean, module.running_var = t.running_mean, t.running_var
            return module(t.x.movedim(1, -1)).movedim(-1, 1)

        return run


class InPlaceABN(Provider):
    in_place = True

    def why_not(self, case: BenchCase, tensors: Tensors) -> str | None:
        if case.op != "forward":  # autograd refuses to overwrite a leaf; a copy would be timed too
            return "works in place: its gradients need an input that another operation made"
        return None

    def describe(self, case: BenchCase, tensors: Tensors) -> str:
        return "inplace_abn, overwrites its input"

    def call(self, case: BenchCase) -> Run:
        from inplace_abn.functions import inplace_abn

        def run(t: Tensors) -> Tensor:
            args = (t.weight, t.bias, t.running_mean, t.running_var)
            return inplace_abn(t.x, *args, True, MOMENTUM, EPS, "identity")

        return run


def make(name: str, device: str) -> Provider:
    if name in OURS:
        return Ours(name, device)
    kinds = {"compile": Compiled, "apex": Apex, "inplace_abn": InPlaceABN}
    return kinds.get(name, Torch)(name, device)


def missing(name: str) -> str | None:
    """Why a provider cannot run here for want of a package."""
    package = name if name in ("apex", "inplace_abn") else None
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return None


def select_backend(t: Tensors) -> str:
    """torch's own choice for these very tensors: Native, Cudnn or Miopen."""
    select = getattr(torch._C, "_select_batch_norm_backend", None)
    if select is None:
        return "unknown: this torch does not say"
    args = (t.x, t.weight, t.bias, t.running_mean, t.running_var, True, EPS)
    return str(select(*args)).rpartition(".")[2]
