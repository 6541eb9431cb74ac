"""Faults planted in the exchange between blocks (team.cuh of csrc/kernels, and others): all caught.

On a CPU no fence can be missed by running: memory is always up to date there. What stands in for
it is the host model, which logs accesses and reports those that nothing orders. Here it is held to
that claim on the real sources: a driver (tests/simt/exchange) runs the forward team kernels, for
every scope and access pattern, over several rounds and launches; with no fault its results are
those of a reference in double, and with a fault planted (planting.py) the model must report it.
Beside them it merges the partial results of a large device, where a fault shows in the results.
"""

import re
import subprocess

import pytest
from planting import Fault, SourceChangedError, barrier_faults, plant
from simt_build import (
    CSRC,
    FLAGS,
    HEADERS,
    KERNEL_FLAGS,
    ROOT,
    SIMT,
    build_folder,
    compile_objects,
    digest_of,
    link,
)

SEEDS = 3
EXCHANGE = SIMT / "exchange"
STANDALONE = ROOT / "bench" / "standalone"  # has references and comparisons to drive kernels with
CASES = re.findall(r'^    \{"(\w+)",', (EXCHANGE / "driver.cpp").read_text(), re.MULTILINE)
ONE_LEVEL = ["grid_s", "grid_c", "grid_row", "grid_row_short"]
TWO_LEVEL = ["grid_c_two_level", "grid_row_two_level"]  # the second wait covers for a second slot
GRID = [*ONE_LEVEL, *TWO_LEVEL]
CLUSTER = ["cluster_s", "cluster_c", "cluster_row"]
NOT_RESIDENT = "grid_not_resident"
WORKING = [case for case in CASES if case != NOT_RESIDENT]
MERGE = "merge_rows"

PLACE = r"team_kernel<.+>: block \(\d+,0,0\) thread \(\d+,\d+,0\) at {file}:\d+: "
OTHER = r"by block \(\d+,0,0\) thread \(\d+,\d+,0\) with "
ACCESS = PLACE.format(file=r"(?:team|team_kernel|reduce)\.cuh")
SHARED_RACE = ACCESS + "shared memory race: .*" + OTHER + "no barrier between the two"
GLOBAL_RACE = ACCESS + r"global memory race: .* of '(?:slots|sync)' .*" + OTHER + "nothing ordering"
UNWRITTEN = ACCESS + r"(?:reads unwritten memory at .* of 'slots'|reads uninitialised shared)"
REMOTE = ACCESS + ".*(?:before any cluster barrier|shared memory race|has left|uninitialised)"
LEAVES = (
    PLACE.format(file=r"(?:team|team_kernel)\.cuh")
    + ".*(?:leaves the kernel while|has left the kernel)"
)
DEADLOCK = (
    r"team_kernel<.+>: deadlock: no thread can go on; .*\d+ threads, such as block \(\d+,0,0\) "
    r"thread \(\d+,\d+,0\): polls at team\.cuh:\d+"
)
UNWRITTEN_SYNC = r"team_kernel<.+>: unwritten output: \d+ bytes of 'sync'"
TOO_EARLY = f"{GLOBAL_RACE}|{UNWRITTEN}"
WRONG = "wrong: mean"
MISSING_BARRIER = f"{SHARED_RACE}|{TOO_EARLY}|{REMOTE}|{LEAVES}"

PUBLISH = "store_release(flags + rank(), flag_);"
POLL = "while (load_acquire(flags + rank) < flag_) {\n      }"
NEXT_EPOCH = "load_acquire(sync_ + kEpoch) + waits"
PARITY = "(round_ & 1) * team_.slot_values"
WAIT = "wait_for_team();"


def in_team(name, text, replacement, count=1):
    return Fault(name, "team.cuh", text, replacement, count)


def poll_with(load):
    return f"while ({load}(flags + rank) < flag_) {{ }}"


NO_TEAM_BARRIER = in_team("no team barrier", WAIT, "", count=3)
NOTHING_PUBLISHED = in_team("nothing published", PUBLISH, "")
RELAXED_PUBLICATION = in_team(
    "relaxed publication", PUBLISH, "::simt_exchange::store_relaxed(flags + rank(), flag_);"
)
PLAIN_PUBLICATION = in_team("plain publication", PUBLISH, "store_global(flags + rank(), flag_);")
NO_POLL = in_team("no poll", POLL, "")
RELAXED_POLL = in_team("relaxed poll", POLL, poll_with("::simt_exchange::load_relaxed"))
PLAIN_POLL = in_team("plain poll", POLL, poll_with("load_global"))
FLAG_TOO_EARLY = in_team("flags of the round before", POLL, poll_with("1 + load_acquire"))
SLOT_TOO_EARLY = in_team("slot reused a round early", PARITY, "0")
SAME_EPOCH = in_team("epoch not advanced", NEXT_EPOCH, "load_acquire(sync_ + kEpoch)")
NO_TOTALS = in_team("no totals", "merge_slice(channels);", "")
NO_RESET = in_team("finished not reset", "store_release(sync_ + kFinished, uint64_t{0});", "")
NO_FINISH = Fault("no finish", "team_kernel.cuh", "exchange.finish();", "")
NOT_COOPERATIVE = Fault(
    "launch not cooperative",
    "launch.cuh",
    "attribute.val.cooperative = 1;",
    "attribute.val.cooperative = 0;",
)
LAST_ROW_DROPPED = Fault(
    "last of more than 64 rows dropped",
    "merge.cuh",
    "row < p.partials.rows",
    "row < p.partials.rows - (p.partials.rows > 64)",
)

# Fault, the cases that run with it, what each must report.
TABLE = [
    (NO_TEAM_BARRIER, GRID, TOO_EARLY),
    (NO_TEAM_BARRIER, CLUSTER, REMOTE),
    (NO_TOTALS, TWO_LEVEL[:1], TOO_EARLY),
    (NOTHING_PUBLISHED, GRID, DEADLOCK),
    (RELAXED_PUBLICATION, GRID, GLOBAL_RACE),
    (PLAIN_PUBLICATION, GRID, GLOBAL_RACE),
    (NO_POLL, GRID, TOO_EARLY),
    (RELAXED_POLL, GRID, GLOBAL_RACE),
    (PLAIN_POLL, GRID, GLOBAL_RACE),
    (FLAG_TOO_EARLY, GRID, TOO_EARLY),
    (SLOT_TOO_EARLY, ONE_LEVEL, GLOBAL_RACE),
    (SLOT_TOO_EARLY, CLUSTER, SHARED_RACE),
    (SAME_EPOCH, GRID, TOO_EARLY),
    (NO_RESET, GRID, UNWRITTEN_SYNC),
    (NO_FINISH, GRID, UNWRITTEN_SYNC),
    (NO_FINISH, CLUSTER, LEAVES),
    (NOT_COOPERATIVE, [*GRID, NOT_RESIDENT], DEADLOCK),
    (LAST_ROW_DROPPED, [MERGE], WRONG),
]
PLACES = {path.name: path.relative_to(CSRC) for path in CSRC.rglob("*.*h")}
SOURCES = {name: (CSRC / place).read_text() for name, place in PLACES.items()}
KERNELS = """#include "team_forward_launch.cuh"
namespace batchnorm_cuda {
template LaunchStatus launch_team_forward(const TeamForwardParams<float>&, cudaStream_t);
}
"""
BARRIERS = [
    fault
    for name in ("team.cuh", "team_kernel.cuh", "reduce.cuh")
    for fault in barrier_faults(name, SOURCES[name])
]
# Those whose removal changes nothing, and why.
HARMLESS: dict[str, str] = {}  # barriers whose removal nothing can notice, and why

FAULTS = list(dict.fromkeys([*(row[0] for row in TABLE), *BARRIERS]))


@pytest.fixture(scope="module")
def driver():
    """The program with all faults, each behind its switch."""
    folder = build_folder()
    kernels = {"kernels.cu": KERNELS, "common.cu": (CSRC / "kernels" / "common.cu").read_text()}
    texts = {**SOURCES, **kernels}
    planted = {name: plant(name, text, enumerate(FAULTS)) for name, text in texts.items()}
    copy = folder / f"exchange-{digest_of(planted.values())}"
    for name, text in planted.items():
        path = copy / PLACES.get(name, f"kernels/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    headers = [*HEADERS, *CSRC.rglob("*.*h"), *STANDALONE.glob("*.h")]
    flags = [*FLAGS, f"-I{EXCHANGE}", f"-I{STANDALONE}"]
    objects = compile_objects([EXCHANGE / "driver.cpp"], folder, flags, headers)
    headers = [*HEADERS, *copy.rglob("*.*h"), EXCHANGE / "planted.h"]
    flags = [*KERNEL_FLAGS, "-include", str(EXCHANGE / "planted.h")]
    sources = [copy / "kernels" / name for name in kernels]
    objects += compile_objects(sources, folder, flags, headers)
    return link("exchange", objects, folder)


def run(driver, case, number=-1):
    """The result of each seed."""
    done = subprocess.run(
        [str(driver), case, str(number), str(SEEDS)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == SEEDS
    return lines


def check_report(line, report):
    """That it is the expected one, and names, if any, a line that accesses memory."""
    expected = report if report == WRONG else f"fault: (?:{report})"
    assert re.match(expected, line), line
    place = re.search(r" at (\w+\.cuh):(\d+): ", line)
    if place:
        text = SOURCES[place[1]].splitlines()[int(place[2]) - 1]
        assert re.search(r"\b(?:load|store)_\w+\(", text), f"{line}\n{text}"


@pytest.mark.parametrize("case", [*WORKING, MERGE])
def test_right_without_faults(driver, case):
    assert run(driver, case) == ["ok"] * SEEDS


def test_a_grid_that_is_not_resident_is_refused(driver):
    refused = "status: cudaErrorCooperativeLaunchTooLarge"
    assert run(driver, NOT_RESIDENT) == [refused] * SEEDS


@pytest.mark.parametrize(
    ("fault", "case", "report"),
    [
        pytest.param(fault, case, report, id=f"{fault.name}-{case}")
        for fault, cases, report in TABLE
        for case in cases
    ],
)
def test_caught(driver, fault, case, report):
    lines = run(driver, case, FAULTS.index(fault))
    if report == TOO_EARLY:
        # Under some orders of the threads nobody happens to be early, and all is well.
        lines = set(lines) - {"ok"}
        assert lines, "went unnoticed under every seed"
    for line in lines:
        check_report(line, report)


@pytest.mark.parametrize("fault", BARRIERS, ids=lambda fault: fault.name)
def test_no_barrier_can_be_left_out(driver, fault):
    number = FAULTS.index(fault)
    for case in WORKING:
        lines = set(run(driver, case, number)) - {"ok"}
        if lines:
            break
    if fault.name in HARMLESS:
        assert not lines, f"{fault.name} is needed after all: {lines}"
        return
    assert lines, f"nothing notices that {fault.name} is missing"
    for line in lines:
        check_report(line, MISSING_BARRIER)


def test_harmless_barriers_exist():
    assert {fault.name for fault in BARRIERS} >= HARMLESS.keys()


@pytest.mark.parametrize(("text", "count"), [("no_such_call();", 1), (WAIT, 1)])
def test_changed_source_is_noticed(text, count):
    fault = Fault("stale", "team.cuh", text, "", count=count)
    with pytest.raises(SourceChangedError, match=r"team\.cuh has changed: fault 'stale'"):
        plant("team.cuh", SOURCES["team.cuh"], [(0, fault)])
