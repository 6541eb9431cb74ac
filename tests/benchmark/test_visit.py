"""A visit to a GPU without one: parts that hang, crash or leave children, kills, and the files."""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_cases import case, machine, row

from bench import fusions
from bench.rows.results import read_csv, write_csv
from bench.visit import command, figures, folder, plans, save_build, table, test_log, timings
from bench.visit.log import Log
from bench.visit.parts import FAIL, MISSING, NO_GPU, NO_TIME, PASS, SKIPPED, Outcome, Part, Site
from bench.visit.runner import Verdict, run_all, run_part

HERE = Site(gpu=True, device="GPU 1", out=Path("unused"))


def shell(name: str, code: str, reserve: float = 1, **values: object) -> Part:
    return Part(name, lambda site: [["sh", "-c", code]], reserve, **values)


AFTER = shell("after", "echo fine")


def run(*parts: Part, seconds: float = 30) -> dict[str, Outcome]:
    verdicts = run_all(parts, HERE, seconds, lambda verdict: None)
    return {verdict.name: verdict.outcome for verdict in verdicts}


def is_running(pid: int) -> bool:
    """A zombie has ended, whoever has not waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.02)


def test_a_part_that_hangs_takes_no_other_along() -> None:
    started = time.monotonic()
    found = run(shell("hangs", "echo begun; sleep 600", limit=1), AFTER)
    assert found["hangs"] == Outcome(FAIL, "out of time after 1 s: begun")
    assert found["after"] == Outcome(PASS, "fine")
    assert time.monotonic() - started < 10


def test_a_part_that_ignores_signals_is_ended() -> None:
    found = run(shell("deaf", "trap '' INT TERM HUP; sleep 600; sleep 600", limit=1), AFTER)
    assert found["deaf"].text.startswith("out of time") and found["after"].status == PASS


def test_a_part_that_crashes_is_named_by_its_signal() -> None:
    found = run(shell("crashes", "echo begun; kill -SEGV $$"), AFTER)
    assert found["crashes"].status == FAIL
    assert found["crashes"].text.startswith("ended by SIGSEGV of `sh -c echo begun")
    assert found["crashes"].text.endswith(": begun")
    assert found["after"].status == PASS


def test_a_program_that_is_not_there_fails_its_part_alone() -> None:
    found = run(Part("driver", lambda site: [["no-such-make", "all"]], 1), AFTER)
    assert found["driver"].text.startswith("exit status 127 of `no-such-make all`: ")
    assert found["driver"].text.endswith("No such file or directory: 'no-such-make'")
    assert found["after"].status == PASS


@pytest.mark.parametrize("end, status", [("", PASS), ("; sleep 600", FAIL)])
def test_children_in_a_group_of_their_own_are_ended(end: str, status: str) -> None:
    """ninja gives one to every compiler. The pipe that they hold open must not be waited for."""
    started = time.monotonic()
    found = run(shell("leaves", f"setsid sleep 600 & echo $!{end}", limit=1))
    assert found["leaves"].status == status
    pid = int(found["leaves"].text.split()[-1])
    assert not is_running(pid)
    assert time.monotonic() - started < 10


def test_what_a_failed_part_carries_is_skipped() -> None:
    found = run(
        shell("build", "exit 1"),
        shell("smoke", "touch /nonexistent", needs=("build",)),
        shell("step", "touch /nonexistent", needs=("smoke",)),
        AFTER,
    )
    assert found["smoke"] == Outcome(SKIPPED, "needs build: FAIL")
    assert found["step"] == Outcome(SKIPPED, "needs smoke: SKIPPED")
    assert found["after"].status == PASS


def test_nothing_runs_where_it_is_not_known_on_what() -> None:
    assert run(shell("device", "exit 1"), AFTER)["after"].status == SKIPPED


def test_a_visit_never_takes_longer_than_it_may() -> None:
    started = time.monotonic()
    parts = [shell(name, "sleep 600", reserve=3) for name in ("one", "two", "three")]
    found = run(*parts, seconds=2)
    assert time.monotonic() - started < 4
    assert [found[name].status for name in ("two", "three")] == [NO_TIME, NO_TIME]


@pytest.mark.parametrize("gpu, status", [(True, MISSING), (False, NO_GPU)])
def test_a_module_says_that_there_is_nothing_to_run_on(gpu: bool, status: str) -> None:
    site = Site(gpu=gpu, device="", out=Path())
    part = shell("counters", "echo no ncu; exit 2", host=True, module="bench.repeat")
    assert run_part(part, site, 30) == Outcome(status, "no ncu")
    other = shell("bench", "echo wrong usage; exit 2", host=True)
    assert run_part(other, site, 30).status == FAIL


@pytest.mark.parametrize("module", ["bench.not_yet", "bench not-yet"])
def test_a_module_that_is_not_there_is_said_in_words(module: str) -> None:
    outcome = run_part(shell("part", "exit 1", host=True, module=module), HERE, 30)
    assert outcome == Outcome(MISSING, f"there is no `python -m {module}` in this tree")


# ---- the whole command, in a process that may be killed


@pytest.fixture
def visit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Starts a visit of given parts in a fork of this process; gives the folder of its files."""
    monkeypatch.setattr(command, "SCRATCH", tmp_path / "scratch")
    site = Site(True, "GPU 1", tmp_path / "out", scratch=tmp_path / "scratch")
    monkeypatch.setattr(command, "_look_around", lambda visit, options: site)
    started = []

    def start(*parts: Part, minutes: float = 1) -> tuple[multiprocessing.Process, Path]:
        (tmp_path / "out").mkdir()
        settings = {"plan": "first", "minutes": minutes, "commit": "c0ffee", "rehearse": False}
        options = argparse.Namespace(out=tmp_path / "out", **settings)

        def body() -> None:
            with (tmp_path / "stdout").open("w") as file:
                os.dup2(file.fileno(), 1)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            os._exit(command.run(options, parts))

        process = multiprocessing.get_context("fork").Process(target=body)
        process.start()
        started.append(process)
        return process, tmp_path / "out"

    yield start
    for process in started:
        process.kill()
        process.join()


def record(out: Path) -> dict:
    return json.loads((out / "visit.json").read_text())


def names_of(out: Path) -> list[str]:
    return [part["name"] for part in record(out)["parts"]]


def test_a_visit_from_its_parts_to_its_files(visit: Callable, tmp_path: Path) -> None:
    process, out = visit(
        shell("one", f"echo a,b > {tmp_path}/out/step.csv; echo x > {tmp_path}/out/junit.xml"),
        shell("two", "echo why; exit 3"),
    )
    process.join()
    assert process.exitcode == 1
    assert folder.problems(out) == []
    assert {path.name for path in out.iterdir()} == {
        *("visit.json", "visit.log", "step.csv", "extras.tar.gz")
    }
    with tarfile.open(out / "extras.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["junit.xml", "table.txt"]
    assert record(out)["complete"] and record(out)["commit"] == "c0ffee"
    said = (tmp_path / "stdout").read_text().splitlines()
    assert said[0].startswith("PASS     one ") and said[1].startswith("FAIL     two ")
    assert said[-1] == "1 of 2 passed on a GPU; FAIL: two"


def test_a_visit_of_parts_that_write_too_much(visit: Callable, tmp_path: Path) -> None:
    process, out = visit(
        shell("one", f"for n in 1 2 3 4 5 6 7 8 9; do : > {tmp_path}/out/$n.csv; done")
    )
    process.join()
    assert folder.problems(out) == []
    with tarfile.open(out / "extras.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["6.csv", "7.csv", "8.csv", "9.csv", "table.txt"]


def test_a_kill_in_the_middle_leaves_valid_files(visit: Callable, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    process, out = visit(
        shell("one", f"printf 'a,b\\n1,2\\n' > {tmp_path}/out/step.csv; echo done"),
        shell("two", f"echo begun; setsid sleep 600 & echo $! > {pid_file}; wait"),
    )
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
    wait_for(lambda: "begun" in (out / "visit.log").read_text().splitlines())
    process.kill()
    process.join()
    assert names_of(out) == ["one"] and not record(out)["complete"]
    assert "done" in (out / "visit.log").read_text().splitlines()
    assert table.read(out / "step.csv") == [{"a": "1", "b": "2"}]
    assert folder.problems(out) == []
    wait_for(lambda: not is_running(int(pid_file.read_text())))


def test_a_signal_ends_the_part_and_the_table_is_written(visit: Callable, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    process, out = visit(
        shell("one", "echo done"),
        shell("two", f"setsid sleep 600 & echo $! > {pid_file}; wait"),
        shell("three", "echo never"),
    )
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    wait_for(lambda: not is_running(int(pid_file.read_text())))
    assert names_of(out) == ["one", "two"]
    assert record(out)["parts"][1]["text"] == "stopped by SIGTERM"
    last = (tmp_path / "stdout").read_text().splitlines()[-1]
    assert last == "1 of 2 passed on a GPU; FAIL: two"


def test_the_record_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict("one", Outcome(PASS, "fine"), 1)
    folder.write_record(tmp_path, {"plan": "first"}, [verdict])
    monkeypatch.setattr(os, "replace", lambda *paths: None)  # killed before it
    folder.write_record(tmp_path, {"plan": "first"}, [verdict, verdict])
    assert names_of(tmp_path) == ["one"]


# ---- files


def test_only_files_that_may_come_back_stay(tmp_path: Path) -> None:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    for each in (out, scratch, out / "folder"):
        each.mkdir()
    good = ("visit.json", "visit.log", "smoke.csv", "gpu-1-tune.csv", "gpu-1-tune.json")
    for name in (*good, "a b.csv", "report.html"):
        (out / name).write_text("x")
    (out / "large.csv").write_bytes(bytes(folder.MOST_BYTES))
    (out / "link.csv").symlink_to(out / "smoke.csv")
    assert len(folder.problems(out)) == 5
    folder.tidy(out, scratch)
    assert folder.problems(out) == []
    assert {path.name for path in out.iterdir()} == set(good)
    assert folder.pack_extras(out, scratch) == ""
    with tarfile.open(out / "extras.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["a b.csv", "large.csv", "report.html"]


def test_the_record_and_the_rows_stay_of_too_many(tmp_path: Path) -> None:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    for each in (out, scratch):
        each.mkdir()
    kept = {"visit.json", "visit.log", "build.tar.gz", *(f"{n}.csv" for n in range(4))}
    for name in (*kept, "0.json", "1.json"):
        (out / name).write_text("x")
    folder.tidy(out, scratch, folder.MOST_FILES - 1)
    assert {path.name for path in out.iterdir()} == kept


def test_what_no_longer_fits_is_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "MOST_BYTES", 2000)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "small").write_text("x")
    (scratch / "large").write_bytes(os.urandom(4000))
    assert folder.pack_extras(tmp_path, scratch) == "left out for their size: large"
    with tarfile.open(tmp_path / "extras.tar.gz") as archive:
        assert archive.getnames() == ["small"]


def test_the_log_is_cut_part_by_part(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", most=1000, part=400)
    for name in ("one", "two", "three", "four"):
        log.begin(name)
        for _ in range(100):
            log.write(b"x" * 9 + b"\n")
    text = (tmp_path / "log").read_text()
    assert len(text) <= 1000
    assert text.count("is left out") == 3
    assert "== one" in text and "== two" in text


def test_a_build_goes_from_one_visit_to_the_next(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("C-1/_C.so", "C-1/build.json", "C-1/_C.o", "objects/common-2.o", "C-3/_C.so"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(os.urandom(1000))
    recipe = SimpleNamespace(
        folder="C-1",
        sources=[Path("common.cu"), Path("forward.cu")],  # of one the object is gone
        object_name=lambda source: f"{source.stem}-2.o",
    )
    whole, small = (save_build.contents(cache, [recipe], objects) for objects in (True, False))
    assert [str(path.relative_to(cache)) for path in small] == ["C-1/_C.so", "C-1/build.json"]
    assert save_build.pack(cache, tmp_path, whole, most=1000) == []
    assert not list(tmp_path.glob("build.tar.gz*"))
    assert save_build.pack(cache, tmp_path, whole, most=9000) == [tmp_path / "build.tar.gz"]
    save_build.unpack([tmp_path / "build.tar.gz"], tmp_path / "one")
    pieces = save_build.pack(cache, tmp_path, whole, most=2500)
    assert [path.name for path in pieces] == ["build.tar.gz.0", "build.tar.gz.1"]
    assert max(path.stat().st_size for path in pieces) == 2500
    with pytest.raises(ValueError, match=r"all of build.tar.gz, got .*build.tar.gz.0: "):
        save_build.unpack(pieces[:1], tmp_path / "half")
    save_build.unpack(pieces[::-1], tmp_path / "new")
    for name in ("C-1/_C.so", "objects/common-2.o"):
        for copy in ("one", "new"):
            assert (tmp_path / copy / name).read_bytes() == (cache / name).read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--parts=smoke,smok"], "expected --parts to be of build, "),
        (["--build=none.tar.gz"], "No such file"),
        (["--out={full}"], "expected --out to be a new or an empty folder, got"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    given = ["--plan=first", "--minutes=1", f"--out={tmp_path / 'out'}", *arguments]
    monkeypatch.setattr(command, "run", lambda options, parts: 0)
    assert command.main([word.format(full=tmp_path / "full") for word in given]) == 2
    assert message in capsys.readouterr().err


# ---- plans


@pytest.mark.parametrize("plan, minutes", [("first", 9), ("tune", 9), ("full", 9)])
def test_reserves_leave_time_over(plan: str, minutes: float) -> None:
    parts = plans.select(plan, None)
    assert sum(part.reserve for part in parts) < 60 * minutes - 60
    assert all(part.reserve <= part.limit for part in parts)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    for at, part in enumerate(parts):
        assert set(part.needs) <= set(names[:at])
        for site in (HERE, Site(gpu=False, device="", out=Path())):
            assert all(isinstance(word, str) for line in part.commands(site) for word in line)


def test_parts_can_be_chosen_and_reordered() -> None:
    chosen = plans.select("first", ["graph", "build", "racecheck"])
    assert [part.name for part in chosen] == ["graph", "build", "racecheck"]


# ---- the table

LONG = "word " * 1000


def csv_file(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_table_fits_whatever_there_is_to_say(tmp_path: Path) -> None:
    csv_file(
        tmp_path / "bench.csv",
        [
            asdict(row(shape=f"{n}x64x112x112", op=op, provider=provider, ms=1.0 + n))
            for n in range(60)
            for op in ("forward", "backward", "both")
            for provider in ("ours", "cudnn", "native", "compile", "copy")
        ],
    )
    failed = [{"outcome": "failed", "seconds": 1, "test": LONG, "why": f"{LONG}\n{LONG}"}] * 300
    csv_file(tmp_path / "tests.csv", failed)
    for name in ("training.csv", "fusions.csv", "exchange.csv", "smoke.csv"):
        long = [{f"column {n}": f"{LONG}{m}" for n in range(9)} for m in range(40)]
        csv_file(tmp_path / name, long)
    verdicts = [Verdict(f"part {n}", Outcome(FAIL, f"{LONG}\n{LONG}"), 1) for n in range(15)]
    about = {"plan": "first", "commit": LONG, "environment": {"device": LONG}}
    text = table.text(about, verdicts, tmp_path, tmp_path)
    assert len(text) <= table.MOST_CHARACTERS
    lines = text.splitlines()
    assert len(lines) <= table.MOST_LINES
    assert all(any(line.startswith(f"FAIL     part {n} ") for line in lines) for n in range(15))
    assert "== tests: 300 failed" in lines
    assert lines[-1].startswith("0 of 15 passed on a GPU; FAIL: part 0, part 1")


def test_short_lines_fit_too() -> None:
    lines = table.fit([f"line {n}" for n in range(100)], "the last").splitlines()
    assert len(lines) == table.MOST_LINES
    assert lines[-2:] == [f"line {table.MOST_LINES - 2}", "the last"]


def test_the_table_without_any_file(tmp_path: Path) -> None:
    about = {"plan": "first", "commit": "c0ffee"}
    text = table.text(about, [Verdict("one", Outcome(PASS, "fine"), 1)], tmp_path, tmp_path)
    assert text.splitlines()[1:] == [
        "PASS     one              1 s  fine",
        "1 of 1 passed on a GPU",
    ]


def test_rows_that_were_cut_short_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "step.csv").write_text("a,b\n1,2\n3")
    assert table.read(tmp_path / "step.csv") == [{"a": "1", "b": "2"}]


def test_figures_of_the_benchmark(tmp_path: Path) -> None:
    times = {"ours": 2.0, "cudnn": 3.0, "native": 4.0, "copy": 1.0}
    rows = [row(provider=name, ms=ms, op="both") for name, ms in times.items()]
    rows += [row(provider=name, ms=1.0, op="forward", dtype="bf16") for name in times]
    rows.append(row(provider="ours", status="failed", op="forward", ms=None, note="why"))
    write_csv(tmp_path / "bench.csv", rows)
    read = table.read(tmp_path / "bench.csv")
    summary = figures.summary(read)
    assert summary[0].endswith("of 2 cases; ours failed in 1")
    assert "both: cudnn 1.50 native 2.00 compile - copy 0.50" in summary[1]
    assert summary[3].endswith("failed why")
    assert figures.worst(read) == [
        "== ours over the fastest peer, the worst:",
        "2x3x5x5 nchw bf16 forward 1.00 | 2x3x5x5 nchw fp16 both 0.67",
        "== ours over the copy, the worst:",
        "2x3x5x5 nchw fp16 both 2.00 | 2x3x5x5 nchw bf16 forward 1.00",
    ]
    assert figures.cases(read)[1].endswith("both 2.0000/3.0000/4.0000/- 50%")


def test_tests_are_written_down_as_they_end(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 1 == 2\n"
        "def test_skips(): pytest.skip('no such thing')\n"
        "@pytest.fixture\ndef broken(): raise ValueError('in a fixture')\n"
        "def test_errs(broken): pass\n"
        "def test_kills(): os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    arguments = ["-p", "bench.visit.test_log", f"--test-log={tmp_path}/tests.csv", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    rows = table.read(tmp_path / "tests.csv")
    assert [(r["outcome"], r["test"].rpartition("::")[2]) for r in rows] == [
        ("passed", "test_passes"),
        ("failed", "test_fails"),
        ("skipped", "test_skips"),
        ("error", "test_errs"),
    ]
    assert list(rows[0]) == list(test_log.COLUMNS)
    assert "assert 1 == 2" in rows[1]["why"] and "in a fixture" in rows[3]["why"]


# ---- parts that time, on a machine whose clock says 1 ms


def test_timings_of_all_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = [case(op=op) for op in ("forward", "backward", "both")]
    monkeypatch.setattr(timings, "work", lambda compiled: todo)
    told: list[dict] = []
    assert timings.work_through(tmp_path, False, 1, machine(), told.append)
    rows = read_csv(tmp_path / "bench.csv")
    assert {row.provider for row in rows} == set(timings.PROVIDERS)
    assert [row.op for row in rows if row.provider == "ours"] == ["backward", "both"]
    assert all(row.ms == 1.0 for row in rows if row.provider in ("ours", "native", "copy"))
    assert [message.get("done") for message in told] == [None, 2, None, 3, None]
    assert told[-1] == {"end": True}


def test_a_case_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "work", lambda compiled: [case(), case()])
    monkeypatch.setattr(timings, "_context_is_lost", lambda: True)
    rows = [row(status="failed", ms=None, note="an illegal memory access")]
    monkeypatch.setattr(timings, "case_rows", lambda *arguments: rows)
    told: list[dict] = []
    assert not timings.work_through(tmp_path, False, 0, machine(), told.append)
    title = "tiny 2x3x5x5 nchw fp16 forward"
    assert told[1:] == [{"done": 1, "wrong": [f"{title}: failed, an illegal memory access"]}]


# What a worker does, by the case that it begins with.
WORKER = """
import json, os, sys, time
first = int(sys.argv[-1].removeprefix("--first="))
def say(**message): print("@" + json.dumps(message), flush=True)
for n in range(first, 5):
    say(start=n, title=f"case {n}")
    if n == 1: os.kill(os.getpid(), 11)
    if n == 3: time.sleep(600)
    say(done=n + 1, wrong=[])
say(end=True)
"""


def test_timings_go_on_behind_a_case_that_takes_the_process_along() -> None:
    progress = timings.Progress(5)
    command = [sys.executable, "-c", WORKER]
    timings.follow(progress, command, time.monotonic() + 60, patience=1)
    assert progress.ended and progress.done == 5
    assert progress.wrong == [
        "case 1: ended with status -11",
        "case 3: killed: no answer in 1 s",
    ]


def test_timings_stop_in_time() -> None:
    progress = timings.Progress(5)
    timings.follow(progress, ["sh", "-c", "exec sleep 600"], time.monotonic() + 0.5)
    assert not progress.ended and progress.wrong == []


def test_a_worker_that_never_begins_is_not_started_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    progress = timings.Progress(5)
    command = ["sh", "-c", f"echo x >> {count}; echo no module"]
    timings.follow(progress, command, time.monotonic() + 60)
    assert count.read_text() == "x\n"
    assert progress.wrong == ["ended with status 0: no module"]


def test_the_telling_cases_come_first() -> None:
    todo = timings.work(compiled=False)
    dtypes = [case.dtype for case in todo]
    assert dtypes == sorted(dtypes, key=timings.DTYPE_NAMES.index)
    assert {case.layout for case in todo[: len(todo) // 3]} == {"nchw", "nhwc"}
    assert len(timings.work(compiled=True)) == 12


@pytest.mark.parametrize("number", range(8))
def test_fusions_are_checked_and_timed(number: int, aten: object) -> None:
    small = fusions.cases(most_elements=1)[number]
    rows = list(fusions.measured_rows(small, fusions.PROVIDERS, machine()))
    assert [(row.provider, row.status, row.ms) for row in rows] == [
        (provider, "ok", 1.0) for provider in fusions.PROVIDERS
    ]
    assert rows[0].copy_percent == 100


def test_a_fusion_that_is_wrong_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aten: object
) -> None:
    def wrong(kind: str) -> fusions.Run:
        return lambda t, residual: fusions.one_by_one(kind)(t, residual) + 0.1

    monkeypatch.setattr(fusions, "ours", wrong)
    rows = list(fusions.measured_rows(fusions.cases(1)[0], fusions.PROVIDERS, machine()))
    assert (rows[0].status, rows[0].ms) == ("failed", None) and "off by 0." in rows[0].note
    assert rows[1].status == "ok"
    for each in rows:
        fusions.append(tmp_path / "fusions.csv", each)
    statuses = [each["status"] for each in table.read(tmp_path / "fusions.csv")]
    assert statuses == ["failed", "ok", "ok"]


def test_a_file_that_is_not_as_expected_costs_no_other_section(tmp_path: Path) -> None:
    (tmp_path / "bench.csv").write_text("a,b\n1,2\n")
    (tmp_path / "training.csv").write_text("variant,ms\ntorch,20.123456\nours,10\n")
    about = {"plan": "first", "commit": "c0ffee"}
    text = table.text(about, [Verdict("one", Outcome(PASS, "fine"), 1)], tmp_path, tmp_path)
    assert "== bench.csv is not as expected: KeyError: 'status'" in text
    assert "torch    20.12" in text and "ours     10" in text


def test_smoke_failures_are_named(tmp_path: Path) -> None:
    (tmp_path / "smoke.csv").write_text(
        "kind,case,status,note,ran\n"
        "case,fp16 forward block,PASS,,\n"
        "case,fp16 backward grid,FAIL,beyond the tolerance,\n"
        "instance,merge_kernel<half>,,,0\n"
        "instance,forward_kernel<half>,,,1\n"
    )
    text = table.text({"plan": "first", "commit": ""}, [], tmp_path, tmp_path)
    assert "== smoke: 1 failed\nfp16 backward grid: beyond the tolerance\n1 instances did" in text
    assert "such as merge_kernel<half>" in text


def test_the_regret_of_the_planner(tmp_path: Path) -> None:
    about = {"shape": "2x3", "layout": "nchw", "dtype": "fp16", "pattern": "", "status": "ok"}
    about |= {"slab": 0, "splits": 0, "team_size": 2}
    csv_file(
        tmp_path / "gpu-1-tune.csv",
        [
            about | {"op": op, "strategy": strategy, "scope": scope, "ms": ms, "chosen": chosen}
            for op, strategy, scope, ms, chosen in (
                ("forward", "team", "block", 1.0, 1),
                ("forward", "team", "grid", 2.0, 0),
                ("backward", "team", "block", 3.0, 1),
                ("backward", "team", "grid", 2.0, 0),
                ("backward", "copy", "", 0.5, 0),
            )
        ],
    )
    text = table.text({"plan": "tune", "commit": ""}, [], tmp_path, tmp_path)
    assert text.splitlines()[1:4] == [
        "== tune: regret of 2 problems, median 1.000",
        "1.50 2x3 nchw fp16 backward: team block 2 3.0000 ms; best team grid 2 2.0000 ms",
        "1.00 2x3 nchw fp16 forward: team block 2 1.0000 ms; best team block 2 1.0000 ms",
    ]


def test_builds_go_where_nobody_else_can_write(tmp_path: Path) -> None:
    assert command.cache_folder(tmp_path) == tmp_path / "visit-cache"
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    elsewhere = command.cache_folder(tmp_path / "open")
    assert elsewhere.parent == Path(tempfile.gettempdir())
