"""All plans among which the planner chooses: each can be forced, and one of them is its choice."""

from __future__ import annotations

import math
import re
from types import ModuleType
from typing import Any

import pytest
from bench_cases import case
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm_cuda import devices
from batchnorm_cuda._build.extension import load_emulated
from bench.tuning.candidates import geometry, identity, list_plans, thin

OPS = {"forward_training": {}, "backward_training": {"grad_output_shift": 0}}
DTYPES = ["float16", "bfloat16", "float32", "float64"]
# Every pattern, masked and exact; sizes that one block holds, and some that no team does.
SIZES = [
    (32, 64, 3136),
    (32, 1024, 196),
    (32, 2048, 49),
    (33, 65, 729),
    (100352, 256, 1),
    (1568, 1024, 1),
    (6272, 24, 1),
    (4096, 65, 1),
    (128, 3, 50176),
    (1605632, 64, 1),
    (64, 1, 262144),
    (4, 8, 1),
]
FIELDS = ["scope", "size", "pattern"]

every_device = pytest.mark.parametrize("name", sorted(devices.DEVICES))
sizes = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))


def described(name: str) -> dict[str, Any]:
    return devices.planner_properties(devices.describe(name))


def without_reason(plan: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plan.items() if key != "reason"}


@sizes
@every_device
def test_each_can_be_forced_and_one_is_chosen(
    extension: ModuleType, name: str, sizes: tuple[int, int, int]
) -> None:
    device = described(name)
    for op, shifts in OPS.items():
        for dtype in DTYPES:
            problem = (op, *sizes, dtype, device)
            candidates = extension.plan_candidates(*problem, shifts)
            for each in candidates:
                plan = extension.make_plan(*problem, shifts | each["options"])
                assert plan["predicted_bytes"] == each["predicted_bytes"]
                assert plan["strategy"] == each["options"]["strategy"]
                if plan["strategy"] == "team":
                    forced = [each["options"][f"team_{f}" if f == "size" else f] for f in FIELDS]
                    assert [plan["team"][field] for field in FIELDS] == forced
            (chosen,) = [each for each in candidates if each["chosen"]]
            plan = extension.make_plan(*problem, shifts | chosen["options"])
            choice = extension.make_plan(*problem, shifts)
            assert without_reason(plan) == without_reason(choice)
            different = {tuple(sorted(each["options"].items())) for each in candidates}
            assert len(different) == len(candidates)


@sizes
def test_chosen_is_the_cheapest(extension: ModuleType, sizes: tuple[int, int, int]) -> None:
    """Of those that the planner weighs: teams in the scope that suits the size, and two passes as
    it splits them.
    """
    for op, shifts in OPS.items():
        candidates = extension.plan_candidates(op, *sizes, "float16", described("h100"), shifts)
        (chosen,) = [each for each in candidates if each["chosen"]]
        weighed = []
        for each in candidates:
            options = each["options"]
            beside = options.get("scope") == "grid" and options["team_size"] <= 8
            if not beside and "splits" not in options:
                weighed.append(each["cost"])
        assert chosen["cost"] == min(weighed)


def test_lists_every_kind(extension: ModuleType) -> None:
    candidates = extension.plan_candidates(
        "forward_training", 1568, 1024, 1, "float16", described("h100")
    )
    options = [each["options"] for each in candidates]
    teams = [each for each in options if each["strategy"] == "team"]
    assert {each["slab"] for each in teams} == {4, 8}
    assert {each["scope"] for each in teams} == {"block", "cluster", "grid"}
    assert {2, 4, 8, 33} <= {each["team_size"] for each in teams if each["scope"] == "grid"}
    splits = [each.get("splits") for each in options if each["strategy"] == "two_pass"]
    assert splits[0] is None and len(splits) >= 2


def test_what_is_forced_holds_for_all(extension: ModuleType) -> None:
    def listed(**options: Any) -> list[dict[str, Any]]:
        found = extension.plan_candidates(
            "forward_training", 1568, 1024, 1, "float16", described("h100"), options
        )
        return [each["options"] for each in found]

    assert {each["strategy"] for each in listed(strategy="two_pass")} == {"two_pass"}
    assert {each["scope"] for each in listed(strategy="team", scope="cluster")} == {
        "block",
        "cluster",
    }
    assert {each["slab"] for each in listed(strategy="team", slab=16)} == {16}


def test_what_cannot_be_honoured_gives_another_plan(extension: ModuleType) -> None:
    """There is no walk along S for 7 x 7 channels-last."""
    problem = ("forward_training", 1568, 1024, 1, "float16", described("h100"))
    forced = {"strategy": "team", "pattern": "along_s"}
    assert extension.make_plan(*problem, forced)["strategy"] == "two_pass"


@pytest.mark.parametrize("op", ["forward_eval", "double_backward_training"])
def test_where_there_is_no_team(extension: ModuleType, op: str) -> None:
    candidates = extension.plan_candidates(op, 32, 64, 3136, "float16", described("h100"))
    assert {each["options"]["strategy"] for each in candidates} == {"two_pass"}
    assert sum(each["chosen"] for each in candidates) == 1


def test_of_nothing(extension: ModuleType) -> None:
    candidates = extension.plan_candidates("forward_training", 0, 3, 5, "float16")
    assert [each["chosen"] for each in candidates] == [True]


def test_costs_decide(extension: ModuleType) -> None:
    """Dear waits: fewer blocks share a channel. The default costs are what no costs are."""
    problem = ("forward_training", 32, 512, 784, "float32", described("h100"))

    def chosen(costs: dict[str, float]) -> dict[str, Any]:
        candidates = extension.plan_candidates(*problem, {}, costs)
        return next(each for each in candidates if each["chosen"])

    assert chosen(extension.cost_model()) == chosen({})
    dear = {"cluster_wait": 1000.0, "grid_wait": 1000.0}
    assert chosen(dear)["options"]["team_size"] == 1
    free = {"launch": 0.001, "along_s.round.forward": 0.001, "sm_rate": 1.0}
    waitless = {"cluster_wait": 0.001, "grid_wait": 0.001}
    assert chosen(dear)["cost"] != chosen(free | waitless)["cost"]
    assert chosen({"launch": 10000.0})["options"] == {"strategy": "two_pass"}


def test_splits_of_two_passes_are_named(extension: ModuleType) -> None:
    """Also where the planner chose them, which is no option: identity tells plans apart."""
    plans = list_plans(extension, "forward", "fp16", (32, 64, 3136), described("h100"))
    passes = [each for each in plans if each["options"]["strategy"] == "two_pass"]
    assert "splits" not in passes[0]["options"] and passes[0]["splits"] > 0
    for each in passes:
        plan = extension.make_plan(
            "forward_training", 32, 64, 3136, "float16", described("h100"), each["options"]
        )
        assert plan["reduce"]["splits"] == each["splits"]
    assert len({identity(each) for each in plans}) == len(plans)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"depth": "deep"}, "unknown options {'depth': 'deep'}"),
        ({"pattern": "along_n"}, "expected pattern to be auto, along_s, along_c or along_row"),
        ({"scope": "device"}, "expected scope to be auto, block, cluster or grid, got device"),
        ({"slabs": 4}, "unknown options {'slabs': 4}"),
        ({"a": 0.1, "b": 1e-7, "c": True}, "unknown options {'a': 0.1, 'b': 1e-07, 'c': True}"),
        ({"splits": 2.5}, "expected splits to be an int, got 2.5"),
        ({"slab": 2**32}, "expected slab to be an int of 32 bits, got 4294967296"),
        ({"scope": 3}, "expected scope to be a str, got 3"),
    ],
)
def test_wrong_options(extension: ModuleType, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        extension.make_plan("forward_training", 4, 8, 16, "float16", {}, options)


def test_option_of_no_type(extension: ModuleType) -> None:
    message = "expected splits to be a bool, int, float or str, got None"
    with pytest.raises(TypeError, match=message):
        extension.make_plan("forward_training", 4, 8, 16, "float16", {}, {"splits": None})


def test_wrong_costs(extension: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"unknown cost \{'lunch': 1.0\}"):
        extension.plan_candidates("forward_training", 4, 8, 16, "float16", {}, {}, {"lunch": 1.0})


def test_geometry() -> None:
    assert geometry(case(sizes=(2, 3, 5, 7))) == (2, 3, 35)
    assert geometry(case(sizes=(2, 3, 5, 7), layout="nhwc")) == (70, 3, 1)
    assert geometry(case(sizes=(8, 4))) == (8, 4, 1)


@settings(max_examples=25)
@given(st.integers(1, 40), st.sampled_from(SIZES), st.sampled_from(["forward", "backward"]))
def test_thinned_out(most: int, sizes: tuple[int, int, int], op: str) -> None:
    extension = load_emulated()
    plans = list_plans(extension, op, "fp16", sizes, described("h100"))
    kept = thin(plans, most)
    assert all(each in plans for each in kept)
    assert len(kept) <= max(most, 2)  # the chosen one and two passes stay
    assert sum(each["chosen"] for each in kept) == 1
    assert {"strategy": "two_pass"} in [each["options"] for each in kept]


def test_neighbours_go_first() -> None:
    def team(size: int, cost: float = 1.0, chosen: bool = False) -> dict[str, Any]:
        options = {"strategy": "team", "scope": "grid", "team_size": size}
        return {"options": options, "cost": cost, "chosen": chosen}

    passes = {"options": {"strategy": "two_pass"}, "cost": 2.0, "chosen": False}
    plans = [team(8), team(9), team(10, chosen=True), team(20), team(60), team(66), passes]
    sizes = [each["options"].get("team_size", math.inf) for each in thin(plans, 5)]
    assert sizes == [8, 10, 20, 66, math.inf]
    assert len(thin([*plans, team(200, cost=40.0)], 99)) == len(plans)  # hopeless
