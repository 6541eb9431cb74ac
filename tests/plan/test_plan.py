"""Properties of make_plan: every element is covered exactly once, and no limit is exceeded.

Of the stage kernels' plan; test_plan_team.py has the team kernels'.
"""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_walk import DTYPE_BYTES, WINDOW_BYTES, covered, stretches

from batchnorm_cuda._build.extension import load_cuda, load_emulated

STAGE_THREADS = 256
MERGE_THREADS = 512
OPS = (
    "forward_training",
    "forward_eval",
    "backward_training",
    "backward_eval",
    "double_backward_training",
    "double_backward_eval",
)


@pytest.fixture(scope="module")
def make_plan():
    load = load_cuda if torch.cuda.is_available() else load_emulated
    module = load()

    def two_pass(op, n, c, s, dtype, device, options):
        options = {"strategy": "two_pass", **options}
        return module.make_plan(op, n, c, s, dtype, device, options)

    return two_pass


def traversals(plan):
    return [plan[stage] for stage in ("reduce", "elementwise") if stage in plan]


def check_limits(plan, c, dtype, device):
    for t in traversals(plan):
        assert 1 <= t["threads_x"] * t["threads_y"] <= STAGE_THREADS
        assert 1 <= t["grid"] <= device.get("max_grid", 2**31 - 1)
        assert t["shared_bytes"] <= 48 * 1024
        # Runs too short for a whole window are dealt by themselves: they are all edges.
        work = t["rows"] * (max(t["row_windows"], 1) if t["pattern"] == "along_s" else 1)
        assert t["work"] == work and t["channel_blocks"] * work >= t["grid"] == t["tasks"]
        assert t["per_split"] == t["channel_blocks"] * work // t["grid"]
        if t["pattern"] == "along_s":
            # Shuffles and the warp partials need whole warps and power-of-two groups.
            assert t["threads_x"] * t["threads_y"] == STAGE_THREADS
            assert t["threads_x"] & (t["threads_x"] - 1) == 0
    if "reduce" in plan:
        merge = plan["merge"]
        assert 1 <= merge["threads_x"] * merge["threads_y"] <= MERGE_THREADS
        assert merge["shared_bytes"] <= 48 * 1024
        t = plan["reduce"]
        repeat = 1 if t["folds"] else t["row_repeat"]
        assert t["folds"] == (t["row_repeat"] > 1 and t["channel_blocks"] == 1)
        assert merge["rows"] == t["splits"] * repeat


sizes = st.tuples(
    st.integers(1, 9),
    st.one_of(st.integers(1, 40), st.sampled_from([96, 257])),
    st.one_of(st.just(1), st.integers(2, 70), st.sampled_from([196, 784])),
)
devices = st.fixed_dictionaries(
    {"sm_count": st.integers(1, 200), "max_grid": st.sampled_from([3, 65535, 2**31 - 1])}
)


@settings(max_examples=150, deadline=None)
@given(
    sizes=sizes,
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    op=st.sampled_from(OPS),
    device=devices,
    shift=st.integers(0, 7),
    splits=st.sampled_from([0, 0, 2, 7, 300]),
)
def test_every_element_is_covered_once(make_plan, sizes, dtype, op, device, shift, splits):
    n, c, s = sizes
    vec = WINDOW_BYTES // DTYPE_BYTES[dtype]
    options = {"input_shift": shift % vec, "output_shift": (shift + 1) % vec, "splits": splits}
    plan = make_plan(op, n, c, s, dtype, device, options)
    check_limits(plan, c, dtype, device)
    for t in traversals(plan):
        assert (covered(plan, t, c, s, n * c * s) == 1).all()
        parts = Counter(block for stretch in stretches(t) for block, _, _ in stretch)
        assert max(parts.values()) <= t["splits"] <= max(parts.values()) + 1


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 2**20),
    c=st.integers(1, 2**20),
    s=st.integers(1, 2**16),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    op=st.sampled_from(OPS),
    device=devices,
    shift=st.integers(0, 7),
)
def test_limits_hold_at_any_size(make_plan, n, c, s, dtype, op, device, shift):
    """No cap on N, C or numel: up to 2^56 elements, far past 2^31, without allocating them."""
    vec = WINDOW_BYTES // DTYPE_BYTES[dtype]
    plan = make_plan(op, n, c, s, dtype, device, {"input_shift": shift % vec})
    check_limits(plan, c, dtype, device)
    numel = n * c * s
    for t in traversals(plan):
        if t["index_bits"] == 32:
            # The furthest index a cursor forms: one step past its last window.
            if t["pattern"] == "along_s":
                step = (t["threads_x"] // t["row_windows"] + 1) * c * s
            else:
                step = t["threads_y"] * t["row_windows"] * vec
            assert numel + step + vec < 2**31
        covered_windows = t["rows"] * t["row_windows"]
        if t["pattern"] == "along_s":
            at_ends = 0 if t["exact"] else 2 * (vec - 1)  # of a run, at most
            assert (covered_windows * vec + t["rows"] * at_ends) * c >= numel
        else:
            assert covered_windows * vec >= numel + t["shift"]


@pytest.mark.parametrize("numel_log2, bits", [(24, 32), (29, 32), (31, 64), (33, 64), (40, 64)])
@pytest.mark.parametrize("s", [1, 4096])
def test_index_width_follows_the_size(make_plan, numel_log2, bits, s):
    c = 64
    plan = make_plan("forward_training", 2**numel_log2 // (c * s), c, s, "float16", {}, {})
    assert [t["index_bits"] for t in traversals(plan)] == [bits, bits]


def test_index_width_can_be_widened_but_not_narrowed(make_plan):
    wide = make_plan("forward_training", 8, 8, 64, "float32", {}, {"index_bits": 64})
    assert [t["index_bits"] for t in traversals(wide)] == [64, 64]
    huge = make_plan("forward_training", 2**20, 64, 4096, "float32", {}, {"index_bits": 32})
    assert [t["index_bits"] for t in traversals(huge)] == [64, 64]


@pytest.mark.parametrize("n, s", [(32, 3136), (32 * 3136, 1)])
@pytest.mark.parametrize("c", [1, 3, 16])
def test_few_channels_still_fill_the_device(make_plan, n, c, s):
    plan = make_plan("forward_training", n, c, s, "float16", {"sm_count": 132}, {})
    for t in traversals(plan):
        windows = t["rows"] * t["row_windows"] * (c if t["pattern"] == "along_s" else 1)
        enough_work = windows >= 132 * STAGE_THREADS
        assert t["grid"] >= 132 or not enough_work


@pytest.mark.parametrize(
    "op, need_sums, reads_writes",
    [
        ("forward_training", True, 3),  # x twice, y
        ("forward_eval", True, 2),  # x, y
        ("backward_training", True, 5),  # x and dy twice, dx
        ("backward_eval", True, 4),  # x and dy, dy, dx
        ("backward_eval", False, 2),  # dy, dx
    ],
)
def test_predicted_bytes(make_plan, op, need_sums, reads_writes):
    n, c, s = 4, 16, 100
    tensor = n * c * s * 2
    small = {"l2_bytes": 0}
    plan = make_plan(op, n, c, s, "float16", small, {"need_sums": need_sums})
    assert plan["predicted_bytes"] == reads_writes * tensor
    assert plan["compulsory_bytes"] + plan["reread_bytes"] == plan["predicted_bytes"]
    # Beside all inputs and the output of what lies between two reads, L2 holds the rest.
    inputs = 1 if op.startswith("forward") else 2
    half = {"l2_bytes": (inputs + 1) * tensor // 2}
    plan = make_plan(op, n, c, s, "float16", half, {"need_sums": need_sums})
    assert plan["predicted_bytes"] == plan["compulsory_bytes"] + plan["reread_bytes"] // 2
    large = {"l2_bytes": (inputs + 1) * tensor}
    plan = make_plan(op, n, c, s, "float16", large, {"need_sums": need_sums})
    assert plan["predicted_bytes"] == plan["compulsory_bytes"]


@pytest.mark.parametrize("op", ["backward_eval", "double_backward_eval"])
def test_nothing_wanted_is_nothing_moved(make_plan, op):
    plan = make_plan(op, 4, 16, 100, "float16", {}, {"need_sums": False, "output_shift": -1})
    assert plan["predicted_bytes"] == plan["launches"] == 0


@pytest.mark.parametrize(
    "op, shifts, reduce_exact, elementwise_exact",
    [
        ("forward_training", {"input_shift": 1}, False, False),
        ("forward_training", {"output_shift": 1}, True, False),
        ("backward_training", {"grad_output_shift": 1}, False, False),
        ("backward_training", {"input_shift": 1}, False, False),
        ("backward_eval", {"input_shift": 1}, False, True),  # dx does not read x
        ("backward_training", {"grad_output_shift": 0}, True, True),
    ],
)
@pytest.mark.parametrize("s", [1, 64])
def test_exact_tiling_needs_every_tensor_aligned(
    make_plan, op, shifts, reduce_exact, elementwise_exact, s
):
    """An exact kernel reads 16 bytes at a time from each tensor, so none may be misaligned."""
    plan = make_plan(op, 4, 16, s, "float32", {}, shifts)
    assert plan["reduce"]["exact"] == reduce_exact
    assert plan["elementwise"]["exact"] == elementwise_exact


def test_row_groups_keep_windows_aligned(make_plan):
    """C = 3 in half precision: 8 rows of 3 channels are 3 windows of 8 lanes."""
    plan = make_plan("forward_training", 1000, 3, 1, "float16", {}, {})
    assert plan["reduce"]["row_windows"] == 3
    assert plan["reduce"]["row_repeat"] == 8
    assert plan["reduce"]["folds"] and plan["merge"]["rows"] == plan["reduce"]["splits"]


def test_repeats_that_no_block_has_together_are_rows(make_plan):
    """C = 1001 in half precision: a row group of 1001 windows is 33 blocks wide."""
    plan = make_plan("forward_training", 1000, 1001, 1, "float16", {}, {})
    assert not plan["reduce"]["folds"] and plan["reduce"]["channel_blocks"] == 32
    assert plan["merge"]["rows"] == 8 * plan["reduce"]["splits"]


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_problems_launch_nothing(make_plan, sizes):
    plan = make_plan("forward_training", *sizes, "float32", {}, {})
    assert plan["launches"] == 0
    assert plan["workspace_bytes"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("forward", 1, 1, 1, "float32", {}, {}), "expected op to be"),
        (("forward_eval", 1, 1, 1, "int8", {}, {}), "expected dtype to be"),
        (("forward_eval", -1, 1, 1, "float32", {}, {}), r"n\*c\*s < 2\^57"),
        (("forward_eval", 2**31, 2**31, 4, "float32", {}, {}), r"n\*c\*s < 2\^57"),
        (("forward_eval", 1, 1, 1, "float32", {"sms": 3}, {}), "unknown device property"),
        (("forward_eval", 1, 1, 1, "float32", {}, {"split": 3}), "unknown options"),
    ],
)
def test_bad_requests_are_refused(make_plan, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(*arguments)


def test_splits_are_bounded_by_the_work(make_plan):
    """A million requested splits of 10 windows are 10 splits."""
    plan = make_plan("forward_training", 1, 1, 40, "float32", {}, {"splits": 10**6})
    assert plan["reduce"]["splits"] == 10
    assert plan["reduce"]["per_split"] == 1
