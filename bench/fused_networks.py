"""`convert(fuse=True)` on whole networks: what is fused, and that they compute what they did.

    python -m bench.fused_networks                       # torchvision's classification networks
    python -m bench.fused_networks --timm                # a list of timm's, where it is installed
    python -m bench.fused_networks resnet18 regnet_y_400mf --size 64
    python -m bench.fused_networks --timm --only-report  # no step is run

Each network is built without weights, and runs two training steps and an evaluation: as it is, as
it is with an input that differs in the last bit, fused, and reverted. Outputs, gradients,
parameters and buffers of the fused one may be off by as much as the last bit makes of them, times
--factor, and a little more. Float64 below --large parameters, else float32; above 200 million,
outputs only.

"fused" counts the batch norms with an activation behind them, alone or behind an add, which those
take over; one whose output is what another one adds has nothing left to take, and one whose output
is needed by something else, too. Activations that batch_norm does not have count as none.

Exit status 1 if a network computes something else, is not itself after `revert`, or if fewer than
--share of all those batch norms are fused.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

import batchnorm_cuda
from batchnorm_cuda import FusedBatchNorm, FusionReport
from batchnorm_cuda._fusion.activations import BY_FUNCTION, BY_MODULE

# Their own initialisation takes minutes; the auxiliary head of inception needs large images.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
}
SIZES = {"maxvit_t": 224}
TIMM = (
    *("botnet26t_256", "coatnet_nano_rw_224", "convmixer_768_32"),
    *("cspdarknet53", "cspresnet50", "densenet121", "dla34", "dla60_res2net", "dpn48b"),
    *("eca_botnext26ts_256", "ecaresnet50d", "efficientformer_l1", "efficientnet_b0"),
    *("efficientvit_m0", "ese_vovnet19b_dw", "fastvit_t8", "fbnetc_100", "gernet_s"),
    *("ghostnet_050", "hgnet_tiny", "hrnet_w18_small", "inception_next_atto", "inception_v3"),
    *("inception_v4", "lcnet_050", "legacy_seresnet18", "legacy_xception", "levit_128s"),
    *("mixnet_s", "mnasnet_small", "mobilenetv2_050", "mobilenetv3_small_050"),
    *("mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs", "pnasnet5large"),
    *("regnetx_002", "regnety_002", "repghostnet_050", "repvgg_a0", "repvit_m0_9"),
    *("res2net50_26w_4s", "resnest14d", "resnet18", "resnet50d", "resnetblur50"),
    *("resnext50_32x4d", "rexnet_100", "selecsls42b", "seresnet50", "skresnet18"),
    *("tf_efficientnet_lite0", "tf_efficientnetv2_b0", "tinynet_e", "tresnet_m", "vgg11_bn"),
    *("vovnet39a", "wide_resnet50_2", "xception41"),
)
STEPS = 2
LEARNING_RATE = 1e-3
OUTPUTS_ONLY = 2e8  # parameters, of which several copies would be kept


@dataclass(frozen=True)
class Comparison:
    """A network, fused and as it was.

    Attributes:
        report: of the fused one.
        excess: the largest difference, over what is allowed; None where nothing was run.
        where: of which value.
        reverted: whether the network computes to the bit what it did, with the classes it had.
    """

    report: FusionReport
    excess: float | None = None
    where: str = ""
    reverted: bool = True


def build(name: str, timm: bool = False) -> nn.Module:
    """The network with ten classes, and its own initialisation."""
    if timm:
        import timm as library

        return library.create_model(name, num_classes=10)
    import torchvision

    return torchvision.models.get_model(name, num_classes=10, **ARGUMENTS.get(name, {}))


class WithoutMemory(TorchFunctionMode):
    """Parameters on the meta device; all else is computed, as some widths are, by tensors."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        placed = {"device": "meta"} if function is torch.empty else {}
        return function(*args, **{**(kwargs or {}), **placed})


def has_batch_norms(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def share(rows: tuple[FusedBatchNorm, ...]) -> tuple[int, int]:
    """How many have an activation behind them that is fused, and that could be."""
    fused = sum(_takes_activation(row) for row in rows)
    return fused, fused + sum(_misses_activation(row) for row in rows)


def _takes_activation(row: FusedBatchNorm) -> bool:
    return any(taken not in (None, "add") for taken in (row.training, row.evaluation))


def _misses_activation(row: FusedBatchNorm) -> bool:
    """Whether its output, or a sum with it, goes to one of the activations, and only there."""
    if row.reason is None or _takes_activation(row):
        return False
    names = {kind.__name__ for kind in BY_MODULE} | {f.__name__ for f in BY_FUNCTION}
    goes_to = re.search(r"its output goes to (.*)", row.reason)
    added = "added in place to another tensor" in row.reason
    return added or (goes_to is not None and not names.isdisjoint(re.findall(r"\w+", goes_to[1])))


def compare(
    model: nn.Module, x: Tensor, factor: float = 100.0, outputs_only: bool = False
) -> Comparison:
    """Runs the model in its two forms; it has its weights and classes again at the end."""
    state = copy.deepcopy(model.state_dict())

    def run(x: Tensor, change: Callable[[nn.Module], Any] = lambda model: None) -> dict:
        model.load_state_dict(state)
        change(model)
        return results(model, x, outputs_only)

    reports = []

    def fuse(model: nn.Module) -> None:
        batchnorm_cuda.convert(model, fuse=True)
        reports.append(batchnorm_cuda.fusion_report(model))

    classes = [type(module) for module in model.modules()]
    expected = run(x)
    last_bit = run(torch.nextafter(x, torch.full_like(x, torch.inf)))
    spread = {key: _distance(last_bit[key], value) for key, value in expected.items()}
    del last_bit
    found = run(x, fuse)
    largest = max([0.0, *(_size_of(v) for k, v in expected.items() if k.startswith("gradient"))])
    excess, where = max(
        # What is nothing but rounding is measured by the gradients that it is rounded from, and so
        # is what steps have made of it.
        (_excess(found[k], v, factor * spread[k], largest * _share_of_gradients(k)), k)
        for k, v in expected.items()
    )
    del found
    again = run(x, batchnorm_cuda.revert)
    same = all(torch.equal(value, expected[key]) for key, value in again.items())
    reverted = same and [type(module) for module in model.modules()] == classes
    return Comparison(reports[0], excess, where, reverted)


def results(model: nn.Module, x: Tensor, outputs_only: bool = False) -> dict[str, Tensor]:
    """Of STEPS training steps and of an evaluation with what they left."""
    torch.manual_seed(0)  # dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    found = {}
    model.train()
    for i in range(STEPS):
        outputs = list(_tensors(model(x)))
        found |= {f"output {j} of step {i}": tensor.detach() for j, tensor in enumerate(outputs)}
        optimizer.zero_grad()
        sum(tensor.square().mean() for tensor in outputs).backward()
        optimizer.step()
    if not outputs_only:
        named = model.named_parameters()
        found |= {f"gradient of {k}": v.grad.clone() for k, v in named if v.grad is not None}
        found |= {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    model.zero_grad()
    with torch.no_grad():
        outputs = list(_tensors(model.eval()(x)))
    return found | {f"evaluated output {j}": tensor for j, tensor in enumerate(outputs)}


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)


def _share_of_gradients(key: str) -> float:
    return 1.0 if key.startswith("gradient") else STEPS * LEARNING_RATE


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def _size_of(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _excess(found: Tensor, expected: Tensor, allowed: float, scale: float) -> float:
    """How many times the allowed difference there is; not a number is too much."""
    if not found.numel():
        return 0.0
    eps = torch.finfo(found.dtype).eps
    allowed += 1e4 * eps * _size_of(expected) + eps * scale + eps * eps**0.5
    ratio = _distance(found, expected) / allowed
    return ratio if ratio == ratio else float("inf")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.fused_networks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="of networks; all of the list by default")
    parser.add_argument("--timm", action="store_true", help="timm's instead of torchvision's")
    parser.add_argument("--only-report", action="store_true", help="run nothing")
    parser.add_argument("--reasons", action="store_true", help="and why the others are not fused")
    parser.add_argument("--size", type=int, help="of the images; 80, timm 96, for some more")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--factor", type=float, default=100.0)
    parser.add_argument("--large", type=float, default=6e7, help="parameters, for float32")
    parser.add_argument("--share", type=float, default=0.95)
    return parser.parse_args()


def names(arguments: argparse.Namespace) -> list[str]:
    if arguments.names or arguments.timm:
        return arguments.names or list(TIMM)
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def run_one(name: str, arguments: argparse.Namespace) -> Comparison | None:
    """None for a network without batch norms."""
    if arguments.only_report:
        with WithoutMemory():
            model = build(name, arguments.timm)
        if not has_batch_norms(model):
            return None
        return Comparison(batchnorm_cuda.fusion_report(batchnorm_cuda.convert(model, fuse=True)))
    model = build(name, arguments.timm)
    if not has_batch_norms(model):
        return None
    parameters = sum(p.numel() for p in model.parameters())
    dtype = torch.float32 if parameters > arguments.large else torch.float64
    model.to(arguments.device, dtype)
    size = arguments.size or _size(model) or SIZES.get(name, 96 if arguments.timm else 80)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(arguments.batch_size, 3, size, size, generator=generator)
    outputs_only = parameters > OUTPUTS_ONLY
    return compare(model, x.to(arguments.device, dtype), arguments.factor, outputs_only)


def _size(model: nn.Module) -> int | None:
    """Of a timm model that takes one size only."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    return settings["input_size"][-1] if settings.get("fixed_input_size") else None


def main() -> int:
    arguments = parse_arguments()
    print(f"torch {torch.__version__}, {arguments.device}")
    print(f"{'':28}{'batch norms':>12}{'fused':>12}{'excess':>9}{'reverted':>10}{'seconds':>9}")
    fused = candidates = count = 0
    wrong = []
    for name in names(arguments):
        start = time.perf_counter()
        comparison = run_one(name, arguments)
        if comparison is None:
            continue
        rows = comparison.report.batch_norms
        ours, total = share(rows)
        fused, candidates, count = fused + ours, candidates + total, count + 1
        ran = comparison.excess is not None
        right = comparison.reverted and (not ran or comparison.excess <= 1)
        wrong += [] if right else [f"{name} ({comparison.where})"]
        cells = (
            f"{name:28}{len(rows):12}{f'{ours} of {total}':>12}",
            f"{comparison.excess:9.2g}" if ran else f"{'':9}",
            f"{'yes' if comparison.reverted else 'NO':>10}" if ran else f"{'':10}",
            f"{time.perf_counter() - start:9.1f}",
        )
        print("".join(cells), flush=True)
        if arguments.reasons:
            for reason, times in Counter(row.reason for row in rows).most_common():
                print(f"    {times} x {reason}" if reason else "", end="\n" if reason else "")
    print(f"{count} networks; {fused} of {candidates} batch norms with an activation are fused")
    for name in wrong:
        print(f"{name}: not what it computed before", file=sys.stderr)
    return int(bool(wrong) or fused < arguments.share * candidates)


if __name__ == "__main__":
    sys.exit(main())
