"""Synchronised batch norm over real processes, against one process over the whole batch."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest
import reference
import torch
from cases import Parameters
from conftest import Backend
from forked import Forks, Program
from sync_cases import BACKENDS, CASES, EPS, MOMENTUM, SyncCase
from sync_worker import SHORT_TIMEOUT, TIMEOUT, VARIANTS, seeded_network, variant_data, without_bias
from tolerances import assert_within
from torch import Tensor, nn

import batchnorm_cuda
from batchnorm_cuda import SyncBatchNorm
from batchnorm_cuda._ops import layout
from batchnorm_cuda._ops import operators as ops

WORKER = Path(__file__).parents[1] / "sync_worker.py"
TIGHT = {"rtol": 1e-11, "atol": 1e-12}  # of float64
every_backend = pytest.mark.parametrize("name", BACKENDS)


def launch(
    forks: Forks, folder: Path, groups: dict[int, list[str]]
) -> dict[int, dict[str, list[dict]]]:
    """By number of ranks and job: the results of every rank that lived to the end of it.

    All groups run at the same time.
    """
    programs = []
    for ranks, jobs in groups.items():
        meeting = folder / str(ranks)
        meeting.mkdir()
        for rank in range(ranks):
            command = (str(WORKER), str(rank), str(ranks), str(meeting), *jobs)
            programs.append(Program(command))
    done = forks.run_together(programs)
    assert not any(r.returncode for r in done), "".join(r.stdout + r.stderr for r in done)
    return {
        ranks: {
            job: [torch.load(file) for file in sorted(folder.glob(f"{ranks}/{job}-*.pt"))]
            for job in jobs
        }
        for ranks, jobs in groups.items()
    }


JOBS = {
    2: [
        "cases",
        "variants",
        "without_gradients",
        "compiled",
        "collectives",
        "network",
        "double_backward",
        "batched_gradients",
    ],
    3: ["cases", "failures"],
    4: ["cases", "groups"],
}


@pytest.fixture(scope="module")
def launched(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return launch(forks, tmp_path_factory.mktemp("ranks"), JOBS)


@pytest.fixture(scope="module")
def two(launched: dict) -> dict:
    return launched[2]


@pytest.fixture(scope="module")
def three(launched: dict) -> dict:
    return launched[3]


@pytest.fixture(scope="module")
def four(launched: dict) -> dict:
    return launched[4]


@pytest.fixture(scope="module")
def by_case(two: dict, three: dict, four: dict) -> dict:
    """The results of each part, by (backend, case, order)."""
    found = {}
    for launched in (two, three, four):
        for key in launched["cases"][0]:
            order = key[2]
            of_rank = [results[key] for results in launched["cases"]]
            found[key] = [of_rank[order.index(part)] for part in range(len(order))]
    return found


def rows(part: Tensor) -> Tensor:
    """(N, C, *) as (N * prod(*), C): parts of any shape then make one batch."""
    return part.movedim(1, -1).reshape(-1, part.shape[1])


def whole_batch(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return tuple(torch.cat([rows(part[i]) for part in parts]) for i in (0, 1))


def assert_parts_match(
    case: SyncCase, parts: list[tuple[Tensor, Tensor]], results: list[dict[str, Tensor]]
) -> None:
    """Every result of every rank against the float64 reference over the whole batch."""
    x, dy = whole_batch(parts)
    p = Parameters(*case.parameters())
    if not case.affine:
        p.weight = p.bias = None
    forward = reference.forward(x, p, True, MOMENTUM, EPS)
    backward = reference.backward(dy, x, p, True, EPS)
    for name, expected in (("output", forward), ("grad_input", backward)):
        got = torch.cat([rows(result[name]) for result in results])
        assert_within(name, got, getattr(expected, name), expected.scales[name], case.dtype)
    for name in ("running_mean", "running_var"):
        for result in results:
            assert_within(
                name, result[name], getattr(forward, name), forward.scales[name], case.dtype
            )
    if not case.affine:
        return
    # A rank's own sums, of xhat by the statistics of all.
    xhat = (x.double() - forward.save_mean) * forward.save_invstd
    first = 0
    for (part, own_dy), result in zip(parts, results, strict=True):
        own = rows(own_dy).double()
        own_xhat = xhat[first : first + len(own)]
        first += len(own)
        assert len(own) == rows(part).shape[0]
        for name, want in (("grad_weight", (own * own_xhat).sum(0)), ("grad_bias", own.sum(0))):
            assert_within(name, result[name], want, backward.scales[name], case.dtype)


@every_backend
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_one_process(by_case: dict, name: str, case: SyncCase) -> None:
    results = by_case[name, case.name, tuple(range(case.ranks))]
    assert_parts_match(case, case.parts(), results)
    for (x, _), result in zip(case.parts(), results, strict=True):
        kept = layout.as_dense(x).stride()
        assert result["output"].stride() == result["grad_input"].stride() == kept
        assert result["output"].dtype == result["grad_input"].dtype == case.dtype


@every_backend
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_order_of_ranks_does_not_show(by_case: dict, name: str, case: SyncCase) -> None:
    """Whichever rank has a part, and wherever the other parts are: the same bits."""
    first, *others = case.orders()
    expected = by_case[name, case.name, first]
    for order in others:
        for part, (got, want) in enumerate(
            zip(by_case[name, case.name, order], expected, strict=True)
        ):
            for key in want:
                assert torch.equal(got[key], want[key]), f"{key} of part {part} in order {order}"


@every_backend
def test_process_groups(four: dict, name: str) -> None:
    """Each pair of ranks has statistics of its own."""
    case = next(case for case in CASES if case.name == "four halves")
    for pair in (slice(0, 2), slice(2, 4)):
        results = [result[name] for result in four["groups"][pair]]
        assert_parts_match(case, case.parts()[pair], results)


@every_backend
@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=lambda i: str(VARIANTS[i]))
def test_variants_match_torch(two: dict, name: str, index: int) -> None:
    """Two steps and an evaluation against torch.nn.BatchNorm1d over the whole batch."""
    expected = without_bias(nn.BatchNorm1d, VARIANTS[index])
    ranks = [results[name, index] for results in two["variants"]]
    for number, training in enumerate((True, True, False)):
        data = variant_data(number)
        expected.train(training).zero_grad()
        # Without running statistics every rank evaluates by its own batch, as in torch.
        local = not training and expected.running_mean is None
        batches = (
            data if local else [tuple(torch.cat(tensors) for tensors in zip(*data, strict=True))]
        )
        leaves = [x.requires_grad_() for x, _ in batches]
        outputs = [expected(leaf) for leaf in leaves]
        for output, (_, dy) in zip(outputs, batches, strict=True):
            output.backward(dy)
        steps = [rank[number] for rank in ranks]
        wanted = {"output": torch.cat(outputs), "grad_input": torch.cat([x.grad for x in leaves])}
        for key, want in wanted.items():
            torch.testing.assert_close(torch.cat([s[key] for s in steps]), want, **TIGHT)
        for key, parameter in expected.named_parameters():
            summed = sum(s[f"grad_{key}"] for s in steps)
            torch.testing.assert_close(summed, parameter.grad, **TIGHT)
        for key, buffer in expected.named_buffers():
            for s in steps:
                torch.testing.assert_close(s[key], buffer, **TIGHT)


@every_backend
def test_compiled(two: dict, name: str) -> None:
    """As one graph, by functional collectives, to the same bits."""
    for results in two["compiled"]:
        eager, compiled = results[name]
        assert eager.keys() == compiled.keys()
        for key, want in eager.items():
            assert torch.equal(compiled[key], want), key


@every_backend
def test_without_gradients(two: dict, name: str) -> None:
    for results in two["without_gradients"]:
        expected, got = results[name]
        assert len(got) == 4
        for key, value in got.items():
            assert torch.equal(value, expected[key]), key


@every_backend
def test_one_collective_and_no_waiting(two: dict, name: str) -> None:
    """A pass gathers once, copies no channels-last tensor, and reads nothing back to the host."""
    for results in two["collectives"]:
        # What docs/sync.md counts by: 2 C values and the count forward, 2 C values backward.
        for direction, sent in (("forward", [2 * 16 + 2]), ("backward", [2, 16])):
            events = results[name][direction]
            names = [event for event, _ in events]
            calls = [event for event in names if event.startswith("c10d::")]
            assert len(calls) == 1 and "allgather" in calls[0], direction
            assert ("_c10d_functional::all_gather_into_tensor", sent) in [
                (event, *shapes[:1]) for event, shapes in events
            ]
            assert not set(names) & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}
            if name == "emulated":
                activations = {event for event, shapes in events if [3, 16, 4, 3] in shapes}
                assert activations
                assert not activations & {"aten::copy_", "aten::clone", "aten::contiguous"}
        input, output, grad = results[name]["strides"]
        assert input == output == grad


@every_backend
def test_network(two: dict, name: str) -> None:
    """Gradients summed over the ranks are those of the whole batch in one process."""
    network = seeded_network()
    network(torch.cat([x for x, _ in variant_data(0)])).square().sum().backward()
    for results in two["network"]:
        for key, parameter in network.named_parameters():
            torch.testing.assert_close(results[name][key], parameter.grad, **TIGHT)


@every_backend
def test_double_backward(two: dict, name: str) -> None:
    for results in two["double_backward"]:
        checked = {key: passed for key, passed in results.items() if key[0] == name}
        assert len(checked) == 4
        assert all(checked.values())


@every_backend
def test_batched_gradients_are_refused(two: dict, name: str) -> None:
    for results in two["batched_gradients"]:
        assert len(results[name]) == 2
        for message in results[name]:
            assert message is not None
            assert re.match("SyncBatchNorm: expected one gradient at a time", message)


@pytest.mark.parametrize("kind", ["absent", "dead"])
def test_lost_rank_is_an_error(three: dict, kind: str) -> None:
    """Within the group's timeout, on every rank that is left, and without a trace in the module."""
    assert len(three["failures"]) == 2
    for results in three["failures"]:
        failure = results[kind]
        assert failure["error"]
        timeout = SHORT_TIMEOUT if kind == "absent" else TIMEOUT
        assert failure["seconds"] < timeout.total_seconds() + 1
        assert failure["unchanged"]


# ------------------------------------------------------------------ in this process


def special_terms() -> Tensor:
    """Terms of 7 ranks: magnitudes far apart, cancelling, tiny, huge, not finite."""
    inf, nan = math.inf, math.nan
    columns = [
        [1e16, 1.0, -1e16, 3.0, 1e-5, -7.0, 0.1],
        [1e300, -1e300, 1e284, 1.0, 0.0, -0.0, 1e-300],
        [1e-310, 3e-310, -2e-310, 0.0, 5e-324, 1e-320, 0.0],
        [0.0, -0.0, 0.0, 0.0, -0.0, 0.0, 0.0],
        [1.7e308, 1.7e308, -inf, 1.0, 2.0, 1.7e308, 0.0],
        [inf, 1.0, inf, 2.0, 3.0, -1.0, 0.0],
        [inf, 1.0, -inf, 2.0, 3.0, -1.0, 0.0],
        [nan, inf, 1.0, -nan, 0.0, -inf, 1.0],
    ]
    return torch.tensor(columns, dtype=torch.float64).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float", "double"])
def test_sum_in_any_order(backend: Backend, dtype: torch.dtype) -> None:
    """As good as a sum rounded once, and the same bits in every order."""
    special = special_terms().clamp(-3e38, 3e38).nan_to_num(1.0) if dtype == torch.float32 else None
    magnitudes = 10.0 ** torch.randint(-8, 9, (7, 200))
    terms = torch.cat([torch.randn(7, 200) * magnitudes, special_terms()], 1).to(dtype)
    if special is not None:
        terms = torch.cat([terms, special.to(dtype)], 1)
    terms = terms.to(backend.device)
    total = ops.sync_sum(terms)
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    for _ in range(10):
        shuffled = terms[torch.randperm(7)]
        assert torch.equal(ops.sync_sum(shuffled).view(bits), total.view(bits))
    for column, got in zip(terms.T.tolist(), total.tolist(), strict=True):
        if all(map(math.isfinite, column)):
            want, limits = math.fsum(column), torch.finfo(dtype)
            unit = 2.0**-52 * max(*map(abs, column), 2.0**-900) + limits.eps * abs(want)
            assert abs(got - want) <= unit or (abs(want) > limits.max and got == want * math.inf)
        else:
            unsigned = {abs(value) for value in column if math.isinf(value)}
            signs = {value for value in column if math.isinf(value)}
            lost = any(map(math.isnan, column)) or len(signs) > len(unsigned)
            assert math.isnan(got) if lost else got == signs.pop()


def test_sum_over_many_ranks(backend: Backend) -> None:
    """The integers do not overflow where a thousand ranks have terms of the largest magnitude."""
    terms = torch.full((1000, 3), 2.0 - 2.0**-20, dtype=torch.float64).to(backend.device)
    terms[:, 1] *= -1
    expected = terms.sum(0)
    torch.testing.assert_close(ops.sync_sum(terms), expected, rtol=2.0**-40, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float", "double"])
def test_merge_in_any_order(backend: Backend, dtype: torch.dtype) -> None:
    """Statistics of nine parts, one empty, one not finite, one of a single value."""
    sizes = [5, 1, 8, 0, 3, 100, 2, 7, 1000]
    parts = [
        (torch.randn(n, 6, dtype=torch.float64) * 10.0**scale + 100 * scale).to(dtype)
        for n, scale in zip(sizes, random.Random(0).sample(range(-4, 5), 9), strict=True)
    ]
    parts[2][0, 4], parts[4][1, 5] = math.inf, math.nan
    parts = [part.to(backend.device) for part in parts]
    gathered = torch.stack([ops.sync_statistics(part) for part in parts])
    results = []
    for _ in range(10):
        merged = gathered[torch.randperm(9).to(backend.device)]
        running = [torch.zeros(6, dtype=dtype).to(backend.device) for _ in range(2)]
        _, mean, invstd, count = ops.sync_forward(
            parts[0], None, None, *running, None, merged, 1.0, EPS
        )
        results.append(torch.stack([mean, invstd, *running]))
        assert count.tolist() == [sum(sizes)]
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    assert all(torch.equal(r.view(bits), results[0].view(bits)) for r in results)
    whole = torch.cat(parts)[:, :4]
    expected = reference.forward(whole, Parameters(None, None, *torch.zeros(2, 4)), True, 1.0, EPS)
    for name, got in zip(
        ("save_mean", "save_invstd", "running_mean", "running_var"), results[0], strict=True
    ):
        assert_within(name, got[:4], getattr(expected, name), expected.scales[name], dtype)


@pytest.mark.parametrize("values", [0, 1])
def test_nothing_to_learn_from(backend: Backend, values: int) -> None:
    """Fewer than two values per channel on all ranks: no variance, no update, no NaN."""
    part, empty = (
        torch.full((values, 3), 7.0).to(backend.device),
        torch.zeros(0, 3).to(backend.device),
    )
    gathered = torch.stack([ops.sync_statistics(part), ops.sync_statistics(empty)])
    running = [torch.full((3,), 2.0).to(backend.device) for _ in range(2)]
    output, mean, invstd, count = ops.sync_forward(
        part, None, None, *running, None, gathered, 0.1, EPS
    )
    assert count.item() == values
    assert all((r == 2.0).all() for r in running)
    assert (output == 0).all()
    assert (mean == 7.0 * values).all()
    torch.testing.assert_close(invstd, torch.full_like(invstd, EPS**-0.5))


def test_counts_beyond_float32(backend: Backend) -> None:
    """A count goes to the other ranks as an integer, not rounded to 24 bits."""
    part = torch.zeros(1, 2).to(backend.device)
    row = ops.sync_statistics(part)
    large = row.clone()
    large[:2] = torch.tensor([2**24 + 1]).view(torch.float32)
    *_, count = ops.sync_forward(
        part, None, None, None, None, None, torch.stack([row, large]), 0.1, EPS
    )
    assert count.item() == 2**24 + 2


@pytest.mark.parametrize("wrong", ["row", "dtype", "rank"])
def test_refused_gathering(backend: Backend, wrong: str) -> None:
    x = torch.randn(4, 3).to(backend.device)
    gathered = torch.stack([ops.sync_statistics(x)] * 2)
    bad = {"row": gathered[:, 1:], "dtype": gathered.double(), "rank": gathered[0]}[wrong]
    with pytest.raises((TypeError, ValueError), match="batch_norm: expected gathered to h"):
        ops.sync_forward(x, None, None, None, None, None, bad, 0.1, EPS)


@pytest.mark.parametrize(
    "operator", ["statistics", "forward", "counted", "reduce", "sum", "elementwise"]
)
def test_operators(backend: Backend, operator: str) -> None:
    """Schemas and fake kernels agree with what the operators do."""
    x = torch.randn(3, 4, 5, 2).to(memory_format=torch.channels_last).to(backend.device)
    w, b, mean, var = torch.rand(4, 4).to(backend.device).unbind()
    mean, var = mean.clone(), var.clone()
    row = ops.sync_statistics(x)
    sums, count = torch.randn(2, 4).to(backend.device), torch.tensor([60]).to(backend.device)
    one = torch.tensor(1).to(backend.device)
    calls = {
        "statistics": ("sync_statistics", x),
        "forward": ("sync_forward", x, w, b, mean, var, None, torch.stack([row, row]), 0.1, EPS),
        "counted": ("sync_forward", x, w, b, mean, var, one, torch.stack([row, row]), None, EPS),
        "reduce": ("sync_backward_reduce", x, x, w, b, mean, var, True, True),
        "sum": ("sync_sum", sums),
        "elementwise": ("sync_backward_elementwise", x, x, w, mean, var, sums, count),
    }
    name, *arguments = calls[operator]
    torch.library.opcheck(getattr(torch.ops.batchnorm_cuda, name).default, tuple(arguments))


def test_without_process_group(backend: Backend) -> None:
    """Alone it is plain batch norm, with its error for a single value."""
    module = SyncBatchNorm(5).to(backend.device)
    plain = batchnorm_cuda.BatchNorm2d(5).to(backend.device)
    x = torch.randn(3, 5, 4, 2).to(backend.device)
    for training in (True, False):
        assert torch.equal(module.train(training)(x), plain.train(training)(x))
    assert torch.equal(module.running_var, plain.running_var)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module.train()(x[:1, :, :1, :1])
    with pytest.raises(ValueError, match="at least 2D"):
        module(x[0, 0, 0])
    with pytest.raises(ValueError, match="should be non-zero"):
        module(x[:, :0])


def test_conversion() -> None:
    """Ours, torch's and torch's synchronised layers all become ours, with the same tensors."""
    network = nn.Sequential(
        nn.BatchNorm1d(3, eps=1e-3, momentum=None),
        nn.Sequential(batchnorm_cuda.BatchNorm2d(4, affine=False), nn.ReLU()),
        nn.SyncBatchNorm(5, track_running_stats=False),
    ).eval()
    network[0].register_parameter("bias", None)
    before = list(network.modules())
    converted = SyncBatchNorm.convert_sync_batchnorm(network)
    layers = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    originals = [m for m in before if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [type(layer) for layer in layers] == [SyncBatchNorm] * 3
    for layer, original in zip(layers, originals, strict=True):
        state, wanted = layer.state_dict(keep_vars=True), original.state_dict(keep_vars=True)
        assert state.keys() == wanted.keys()
        assert all(state[key] is wanted[key] for key in wanted)
        for name in (
            "num_features",
            "eps",
            "momentum",
            "affine",
            "track_running_stats",
            "training",
        ):
            assert getattr(layer, name) == getattr(original, name), name
    assert type(SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3))) is SyncBatchNorm


class UsersBatchNorm(nn.BatchNorm2d):
    """Has more than torch's, and computes more."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(()))


def test_conversion_loses_nothing() -> None:
    """Shared modules, their hooks and attributes, also under a second name of one parent."""
    shared = nn.BatchNorm2d(3)
    shared.note = "kept"
    shared.register_buffer("mask", torch.ones(3))
    handle = shared.register_forward_hook(lambda *_: None)
    network = nn.ModuleDict({"one": nn.Sequential(shared), "other": nn.Sequential(shared)})
    network.first = network.second = nn.BatchNorm1d(3)
    before = [id(module) for module in network.modules()]
    group = object()
    assert SyncBatchNorm.convert_sync_batchnorm(network, group) is network
    assert [id(module) for module in network.modules()] == before
    assert network["one"][0] is network["other"][0] is shared
    for module in (shared, network.first, network.second):
        assert type(module) is SyncBatchNorm and module.process_group is group
    assert (
        shared.note == "kept" and "mask" in shared._buffers and handle.id in shared._forward_hooks
    )
    batchnorm_cuda.revert(network)
    assert type(shared) is nn.BatchNorm2d and type(network.second) is nn.BatchNorm1d


def test_conversion_is_over_one_group() -> None:
    """As by torch's method, also of what was over another group."""
    network = nn.Sequential(nn.SyncBatchNorm(3, process_group=object()), SyncBatchNorm(3))
    network[1].process_group = object()
    SyncBatchNorm.convert_sync_batchnorm(network)
    assert [module.process_group for module in network] == [None, None]


@pytest.mark.parametrize("convert", ["convert", "convert_sync_batchnorm"])
def test_conversion_names_what_stays_local(convert: str) -> None:
    """A user's subclass keeps what it adds, and is not synchronised without a word."""
    network = nn.Sequential(UsersBatchNorm(3), nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    words = rf"^{convert}: left as they are, and not synchronised, .*: UsersBatchNorm at '0'$"
    with pytest.warns(UserWarning, match=words) as caught:
        if convert == "convert":
            batchnorm_cuda.convert(network, sync=True)
        else:
            SyncBatchNorm.convert_sync_batchnorm(network)
    assert caught[0].filename == __file__
    assert [type(module) for module in network] == [UsersBatchNorm, SyncBatchNorm, SyncBatchNorm]
    assert "0.gain" in network.state_dict()


@pytest.mark.parametrize("kind", [nn.LazyBatchNorm2d, batchnorm_cuda.LazyBatchNorm2d])
def test_conversion_refuses_lazy_modules_before_any_change(kind: type) -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), kind())
    with pytest.raises(ValueError, match=r"^convert_sync_batchnorm: expected model to have no la"):
        SyncBatchNorm.convert_sync_batchnorm(network)
    assert [type(module) for module in network] == [nn.BatchNorm2d, kind]
    with pytest.raises(TypeError, match=r"^convert_sync_batchnorm: expected model to be a torch"):
        SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d)
