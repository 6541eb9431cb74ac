"""The strategies against each other: a team loses no digits to two passes, and each repeats.

Two strategies add the same values in two fixed orders. What a result is off by is the sum of the
roundings along its way, some D of them (the batches of a thread, 8 levels of a block, the ranks,
the final formulas), each anything up to one roundoff of its scale: two samples of one distribution,
of root mean square r = sqrt(D / 3) roundoffs at most, where a single large value dominates, and
far less elsewhere. Over K channels a root mean square is known to r / sqrt(2 K) and the difference
of two to r / sqrt(K); with r = 1.5 and K = 18 one roundoff is three standard deviations of it. The
largest of K scatters by 0.45 r and the difference of two by 0.64 r: two roundoffs are two standard
deviations even where r is largest. So

    rms(team) <= rms(two passes) + 1        largest(team) <= largest(two passes) + 2

in units of one rounding: tolerances.bound with one unit, the rounding of the result and one of the
accumulation (the float64 reference counts with two). Pooled over all layouts there are 17 channels
of each kind of values, and three standard deviations, 3 / sqrt(17), are three quarters of r itself,
however small it is: on no kind may a team's error be larger by more. A tenth of a rounding is
allowed where one of them happens to be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from types import ModuleType

import harness
import pytest
import torch
from cases import Parameters, channels_last, contiguous, fill_gradient, fill_parameters
from conftest import KERNELS
from parametrisations import every_dtype
from strategies import FORCED, TEAMS, expected, force, launched, walk_of
from tolerances import bound
from torch import Tensor

from batchnorm_cuda._ops import operators as ops

# (shape, layout) by access pattern. A channel is more than 512 windows of any dtype along S, which
# is what several blocks share.
LAYOUTS = {
    "along S": ((8, 18, 20, 28), contiguous),
    "along S, masked": ((8, 18, 21, 27), contiguous),
    "along C": ((4, 24, 15, 15), channels_last),
    "runs along a row": ((18, 24, 7, 7), contiguous),
    "runs along a row, masked": ((18, 18, 7, 7), contiguous),
    "channels along a row": ((2, 18, 16, 15), channels_last),
}
GRADIENTS = ["grad_input", "grad_weight", "grad_bias"]
NAMES = ["output", "save_mean", "save_invstd", "running_mean", "running_var", *GRADIENTS]
KINDS = 6  # of values, one a channel in turn
WORST_RATIO = 1.75

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_team = pytest.mark.parametrize("team", TEAMS)

Run = Callable[[str, torch.dtype, str], dict[str, Tensor]]


def fill(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """KINDS of inputs of tests/kernels/test_numerics.py, one a channel in turn."""
    x = torch.randn(shape, dtype=torch.float64)
    channel = torch.arange(shape[1], dtype=torch.float64).view(-1, 1, 1)
    x[:, 0::KINDS] += 0.7
    x[:, 1::KINDS] += 1e4 * (1 + 0.1 * channel[1::KINDS])
    x[0, 2::KINDS, 0, 0] = 1e4
    x[:, 3::KINDS] = x[:, 3::KINDS] * 300 + 2000
    x[:, 4::KINDS] = torch.rand(x[:, 4::KINDS].shape, dtype=torch.float64) * 0.1 + 1
    x[:, 5::KINDS] = 1e4 / 3 * (1 + 0.13 * channel[5::KINDS])
    return x.to(dtype)


def arguments(layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Parameters]:
    torch.manual_seed(5)
    shape, place = LAYOUTS[layout]
    x = place(fill(shape, dtype)).to(KERNELS.device)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return x, fill_gradient(x, dtype), fill_parameters(shape[1], exact, KERNELS.device)


@pytest.fixture
def run(
    extension: ModuleType, plan_options: Callable, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, torch.dtype, str], dict[str, Tensor]]:
    """All results of a training step by a strategy."""

    def compute(layout: str, dtype: torch.dtype, strategy: str) -> dict[str, Tensor]:
        x, dy, parameters = arguments(layout, dtype)
        with monkeypatch.context() as patch:
            force(strategy, extension, plan_options, patch, **walk_of(layout, strategy))
            results = harness.forward(KERNELS, x, parameters, True)
            weight, bias = parameters.weight, parameters.bias
            statistics = results["save_mean"], results["save_invstd"]
            wanted = True, True, True
            gradients = ops.backward(dy, x, weight, bias, *statistics, True, *wanted)
            return results | dict(zip(GRADIENTS, gradients, strict=True))

    return compute


@pytest.fixture(scope="module")
def known() -> Iterator[dict]:
    """Errors that a test of this module has computed, for the others."""
    yield {}


def errors(run: Run, known: dict, layout: str, dtype: torch.dtype, way: str) -> dict[str, Tensor]:
    """By result: the errors of all its elements, in roundings."""
    key = (layout, dtype, way)
    if key not in known:
        results = run(*key)
        x, dy, parameters = arguments(layout, dtype)
        forward = harness.reference_forward(x, parameters, True)
        backward = harness.reference_backward(dy, x, parameters, True)
        known[key] = {}
        for name in NAMES:
            of = forward if name in forward.scales else backward
            got, want = results[name], getattr(of, name)
            one = bound(name, want, of.scales[name], got.dtype, dtype, units=1)
            error = (got.cpu().double() - want).abs()
            known[key][name] = torch.where(
                error == 0, error, error / one
            )  # of a weight of 0: 0 / 0
    return known[key]


@every_team
@every_dtype
@every_layout
def test_a_team_loses_no_digits(
    run: Run, known: dict, layout: str, dtype: torch.dtype, team: str
) -> None:
    ours = errors(run, known, layout, dtype, team)
    others = errors(run, known, layout, dtype, "two_pass")
    for name in NAMES:
        for measure, slack in ((root_mean_square, 1), (torch.amax, 2)):
            got, other = measure(ours[name]), measure(others[name])
            what = measure.__name__
            assert got <= other + slack, f"{name}: {what} {got:.3g}, of two passes {other:.3g}"


@every_team
@every_dtype
def test_no_team_is_worse_on_the_whole(
    run: Run, known: dict, dtype: torch.dtype, team: str
) -> None:
    for name, kind in product(NAMES, range(KINDS)):

        def pooled(way: str, name: str = name, kind: int = kind) -> Tensor:
            of_kind = [
                channels_of(errors(run, known, layout, dtype, way)[name])[kind::KINDS].flatten()
                for layout in LAYOUTS
            ]
            return root_mean_square(torch.cat(of_kind))

        got, other = pooled(team), pooled("two_pass")
        assert got <= WORST_RATIO * other + 0.1, f"{name}, kind {kind}: {got:.3g} of {other:.3g}"


def channels_of(value: Tensor) -> Tensor:
    """[C, ...] of [C] or [N, C, ...]."""
    return value if value.dim() == 1 else value.transpose(0, 1)


def root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


@pytest.mark.parametrize("strategy", FORCED)
def test_forcing_takes_effect(run: Run, extension: ModuleType, strategy: str) -> None:
    """The plan's word is not enough: these kernels were launched."""
    names = launched(extension, lambda: run("along S", torch.float32, strategy))
    kinds = {"team" if "team_kernel" in name else "stage" for name in names}
    assert kinds == {"stage" if expected(strategy, extension) == "two_pass" else "team"}


@pytest.mark.parametrize("strategy", FORCED)
@every_layout
def test_bits_repeat(run: Run, layout: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two runs, whose orders of blocks and threads the emulation draws from the seed."""
    runs = []
    for seed in ("1", "20260"):
        monkeypatch.setenv("BATCHNORM_CUDA_EMULATE_SEED", seed)
        runs.append(run(layout, torch.bfloat16, strategy))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
