"""One case of `bench.smoke`: its tensors, the extension's functions on them, and the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from ..timing import check
from .smoke_cases import DTYPES, FORMS, Case, cases

reference = check.reference
EPS, MOMENTUM = 1e-5, 0.3


class Problem:
    def __init__(self, case: Case, extension: ModuleType, device: str) -> None:
        self.case, self.extension = case, extension
        self.training = not case.op.startswith("eval")
        self.residual_form, activation = FORMS[case.form]
        self.relu = activation is not None  # or another
        self.activation, self.parameter = activation or ("relu", 0.0)
        self.highest = 6.0 if self.activation == "relu6" else math.nan
        dtype = DTYPES[case.dtype]
        shape = cases.Case(case.shape, "", case.layout)
        self.x = cases.fill(shape, dtype, device)
        self.dy = self._placed(cases.fill_gradient(self.x, dtype))
        self.residual = self._placed(cases.fill(shape, dtype, device))
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.p = cases.fill_parameters(shape.channels, self.exact, device)
        self.before = self.p.clone()
        self.wrong: list[str] = []  # results that had to be equal to the bit

    def _placed(self, values: Tensor) -> Tensor:
        """In the memory order of x, on a 16-byte boundary: as outputs of operators are."""
        return torch.empty_like(self.x).copy_(values)

    def run(self) -> tuple[dict[str, Tensor], check.Expected]:
        """Results by name, and what they should be."""
        op = self.case.op
        if op == "sync":
            return self._sync()
        if op.endswith("double_backward"):
            return self._double_backward()
        return self._backward() if op.endswith("backward") else self._forward()

    # ------------------------------------------------------------------ the reference

    def _reference_forward(self) -> reference.Forward:
        result = reference.forward(self.x, self.before, self.training, MOMENTUM, EPS)
        if self.residual_form:
            added = self.residual.cpu().double()
            result.output = result.output + added
            result.scales["output"] = result.scales["output"] + added.abs()
        if self.relu:
            z = result.output
            result.output = torch.where(z > 0, z, z * self.parameter)
            result.output = torch.where(result.output > self.highest, self.highest, result.output)
        return result

    def _expected(self, names: Mapping[str, Tensor], *of: object) -> check.Expected:
        values, scales = {}, {}
        for part in of:
            values |= {n: getattr(part, n) for n in names if n in part.scales}
            scales |= part.scales
        c = self.x.shape[1]
        return check.Expected(torch.arange(c), c, values, scales, self.x.dtype)

    def _reference_backward(self, output: Tensor) -> tuple[Tensor, reference.Backward]:
        """The gradient that the activation lets through, and batch norm's gradients of it."""
        passed = self.dy
        if self.relu:
            passed = torch.where(self._steep(output), self.dy, self.dy * self.parameter)
        return passed, reference.backward(passed, self.x, self.before, self.training, EPS)

    def _saved(self, forward: reference.Forward) -> tuple[Tensor, Tensor]:
        """Statistics as a forward pass would have left them, whatever it did."""
        mean, invstd = forward.save_mean, forward.save_invstd
        return tuple(v.to(self.x.device, self.exact).contiguous() for v in (mean, invstd))

    # ------------------------------------------------------------------ operations

    def _forward(self) -> tuple[dict[str, Tensor], check.Expected]:
        p, want = self.p, self._reference_forward()
        arguments = (self.x, p.weight, p.bias, p.running_mean, p.running_var, None)
        if self.case.form:
            residual = self.residual if self.residual_form else None
            output, mean, invstd, mask = self.extension.fused_forward(
                *arguments,
                residual,
                self.relu,
                True,
                self.training,
                MOMENTUM,
                EPS,
                self.activation,
                self.parameter,
            )
            if self.relu:
                self._compare("mask", mask, self._packed(self._steep(output)))
        else:
            output, mean, invstd = self.extension.forward(*arguments, self.training, MOMENTUM, EPS)
        results = {"output": output, "save_mean": mean, "save_invstd": invstd}
        if self.training:
            results |= {"running_mean": p.running_mean, "running_var": p.running_var}
        return results, self._expected(results, want)

    def _backward(self) -> tuple[dict[str, Tensor], check.Expected]:
        forward = self._reference_forward()
        output = self._placed(forward.output.to(self.x.device, self.x.dtype))
        passed, want = self._reference_backward(output)
        arguments = (self.dy, self.x, self.p.weight, self.p.bias, *self._saved(forward))
        names = ("grad_input", "grad_weight", "grad_bias")
        if self.relu:
            *gradients, of_residual = self.extension.fused_backward(
                *arguments,
                self._packed(self._steep(output)),
                self.training,
                True,
                True,
                True,
                self.residual_form,
                self.activation,
                self.parameter,
            )
            if self.residual_form:
                self._compare("grad_residual", of_residual, passed)
        else:
            gradients = self.extension.backward(*arguments, self.training, True, True, True)
        results = dict(zip(names, gradients, strict=True))
        return results, self._expected(results, want)

    def _double_backward(self) -> tuple[dict[str, Tensor], check.Expected]:
        v, p = self.residual, self.before  # any tensor like x will do
        a, b = torch.randn(2, self.x.shape[1]).to(self.x.device, self.exact)
        want = reference.double_backward((v, a, b), self.dy, self.x, p, self.training, EPS)
        saved = self._saved(self._reference_forward())
        results = self.extension.double_backward(
            v, a, b, self.dy, self.x, p.weight, *saved, self.training, True, True, True
        )
        names = ("grad_grad_output", "double_grad_input", "double_grad_weight")
        named = dict(zip(names, results, strict=True))
        return named, self._expected(named, want)

    def _sync(self) -> tuple[dict[str, Tensor], check.Expected]:
        """Two ranks, of which the second has a sample; both in this process, one after another."""
        n = self.x.shape[0]
        self._slices = [slice(0, n - 1), slice(n - 1, n)]
        forward = self._reference_forward()
        results = self._sync_forward()
        passed, backward = self._reference_backward(results["output"])
        results |= self._sync_backward(results, passed)
        return results, self._expected(results, forward, backward)

    def _parts(self, tensor: Tensor) -> list[Tensor]:
        return [torch.empty_like(tensor[s]).copy_(tensor[s]) for s in self._slices]

    def _sync_forward(self) -> dict[str, Tensor]:
        e, parts, residuals = self.extension, self._parts(self.x), self._parts(self.residual)
        gathered = torch.stack([e.sync_statistics(part) for part in parts])
        outputs, self._masks = [], []
        for part, residual in zip(parts, residuals, strict=True):
            p = self.before.clone()
            arguments = (part, p.weight, p.bias, p.running_mean, p.running_var, None, gathered)
            if self.case.form:
                output, mean, invstd, self._count, mask = e.sync_fused_forward(
                    *arguments, residual, self.relu, True, MOMENTUM, EPS
                )
                self._masks.append(mask)
                self._compare("mask", mask, self._packed(self._steep(output)))
            else:
                output, mean, invstd, self._count = e.sync_forward(*arguments, MOMENTUM, EPS)
            outputs.append(output)
        results = {"output": torch.cat(outputs), "save_mean": mean, "save_invstd": invstd}
        return results | {"running_mean": p.running_mean, "running_var": p.running_var}

    def _sync_backward(self, forward: dict[str, Tensor], passed: Tensor) -> dict[str, Tensor]:
        e, p, fused = self.extension, self.before, bool(self.case.form)
        saved = forward["save_mean"], forward["save_invstd"]
        parts = list(zip(self._parts(self.dy), self._parts(self.x), strict=True))
        masks = [(mask,) for mask in self._masks] if fused else [(), ()]
        reduce = e.sync_fused_backward_reduce if fused else e.sync_backward_reduce
        reduced = [
            reduce(*part, p.weight, p.bias, *saved, *mask, True, True)
            for part, mask in zip(parts, masks, strict=True)
        ]
        sums = e.sync_sum(torch.stack([of_rank[0] for of_rank in reduced]))
        inputs, residuals = [], []
        for part, mask in zip(parts, masks, strict=True):
            arguments = (*part, p.weight, *saved, sums, self._count)
            if fused:
                grad, of_residual = e.sync_fused_backward_elementwise(*arguments, *mask, True, True)
                residuals.append(of_residual)
            else:
                grad = e.sync_backward_elementwise(*arguments)
            inputs.append(grad)
        if fused:
            self._compare("grad_residual", torch.cat(residuals), passed)
        weight, bias = (sum(of_rank[i] for of_rank in reduced) for i in (1, 2))
        return {"grad_input": torch.cat(inputs), "grad_weight": weight, "grad_bias": bias}

    def _steep(self, output: Tensor) -> Tensor:
        """Where the slope of the activation is 1."""
        return (output > 0) & ~(output >= self.highest)

    def _packed(self, steep: Tensor) -> Tensor:
        """The mask of a dense output whose slope is 1 there: csrc/kernels/fused.cuh."""
        lanes = 16 // self.x.element_size()
        bits = steep.as_strided((steep.numel(),), (1,)).int()
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % lanes)).view(-1, lanes)
        return (bits << torch.arange(lanes, device=bits.device)).sum(1).to(torch.uint8)

    def _compare(self, name: str, got: Tensor, want: Tensor) -> None:
        """What is copied or a bit has to be equal."""
        if got is None or got.shape != want.shape or not torch.equal(got, want):
            self.wrong.append(name)
