"""The FAQ's table of versions is what `make versions` found, and pyproject.toml agrees with it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import older_torch
import pytest
from packaging.specifiers import SpecifierSet

from tools import versions

REPORT = """
<testsuites><testsuite>
<testcase classname="tests.test_ops" name="test_a"/>
<testcase classname="tests.test_ops" name="test_b[x]"><failure message="no">no</failure></testcase>
<testcase classname="tests.test_ops" name="test_c"><skipped type="pytest.skip" message="GPU"/>
</testcase>
<testcase classname="tests.test_graphs" name="test_d">
<skipped type="pytest.xfail" message="old torch"/></testcase>
<testcase classname="tests.test_graphs" name="test_e"><error message="gone">gone</error></testcase>
</testsuite></testsuites>
"""


def test_the_page_says_what_was_found() -> None:
    """`python -m tools.versions --table` writes it anew."""
    page, records = versions.PAGE.read_text(), versions.read_records()
    assert records
    assert versions.page_with_table(page, records) == page


def test_versions_that_cannot_work_are_excluded() -> None:
    """And those that were found to work are not."""
    project = (versions.ROOT / "pyproject.toml").read_text()
    torch = SpecifierSet(re.findall(r'"torch([^"]*)"', project)[0])
    python = SpecifierSet(re.findall(r'requires-python = "([^"]*)"', project)[0])
    for record in versions.read_records():
        allowed = torch.contains(record["torch"]) and python.contains(record["python"])
        assert allowed != ("failure" in record), record


class Item(SimpleNamespace):
    """As pytest's, with the markers that it was given."""

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.given.append(mark.kwargs["reason"])


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.6.0+cu124", ["no", "never"]), ("2.9.1", ["no"]), ("2.10.0", []), ("3.0.0", [])],
)
def test_what_an_older_torch_cannot_do(
    monkeypatch: pytest.MonkeyPatch, version: str, expected: list[str]
) -> None:
    known = (
        older_torch.Known((2, 9), "test_a", "no"),
        older_torch.Known((2, 6), "test_b", "never", only="emulated"),
        older_torch.Known((2, 9), "test_a", "not here", passes_on=sys.version_info[:2]),
    )
    monkeypatch.setattr(older_torch, "KNOWN", known)
    monkeypatch.setattr(older_torch.torch, "__version__", version)
    names = ("test_a", "test_a_b[x]", "test_b[emulated-2d]", "test_b[aten-2d]")
    items = [Item(name=name, given=[]) for name in names]
    older_torch.mark(items)
    assert [reason for item in items for reason in item.given] == expected
    assert not items[1].given and not items[3].given


def test_a_report_is_counted(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(REPORT)
    assert versions.read_report(tmp_path / "tests.xml") == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "known": 1,
        "failures": ["test_graphs::test_e", "test_ops::test_b[x]"],
        "reasons": {"old torch": 1},
    }


def test_a_row_tells_all_that_did_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "TRIED", ("2.8.0=3.11", "2.9.1=3.12", "newest=3.13"))
    failures = ["test_ops::test_b[x]", "test_ops::test_b[y]"]
    tests = {"passed": 7, "failed": 2, "failures": failures, "reasons": {"old torch": 3}}
    record = {"torch": "2.10.0", "python": "3.10.13", "cuda": "12.8", "tests": tests}
    older = {"torch": "2.9.1", "python": "3.12.1", "cuda": "12.8", "failure": "no such version"}
    lines = versions.table([older, record]).splitlines()
    assert lines[2:] == [
        "| 2.10.0 | 12.8 | 3.10.13 | 7 pass; 2 fail (test_b); 3 cannot: old torch | not tried |",
        "| 2.9.1 | 12.8 | 3.12.1 | no such version | not tried |",
        "| 2.8.0 | - | 3.11 | not tried | not tried |",
    ]


def test_parts_of_a_record_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests and the compilation may be run apart; a failure forgets both."""
    monkeypatch.setattr(versions, "RECORDS", tmp_path / "versions.json")
    same = {"torch": "2.9.1", "python": "3.12.1"}
    versions.store(same | {"tests": {"passed": 1}})
    versions.store(same | {"extension": "CUDA 13.0"})
    versions.store({"torch": "2.6.0", "python": "3.12.1"})
    kept = same | {"tests": {"passed": 1}, "extension": "CUDA 13.0"}
    assert json.loads(versions.RECORDS.read_text())[1] == kept
    versions.store(same | {"failure": "gone"})
    assert versions.read_records()[1] == same | {"failure": "gone"}


def test_what_cannot_be_tried_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "PLACE", tmp_path)
    record = versions.try_version("2.9.1=3.99", ["tests"])
    assert record["failure"] == "no Python 3.99 here"

    def run(log: Path, *command: object, **options: object) -> int:
        log.write_text("...\nERROR: No matching distribution found for torch==0.0.1\n")
        return 1

    monkeypatch.setattr(versions, "interpreter", lambda version: sys.executable)
    monkeypatch.setattr(versions, "run", run)
    record = versions.try_version("0.0.1=3.11", ["tests"])
    assert record["failure"] == "No matching distribution found for torch==0.0.1"
    assert [path.suffix for path in tmp_path.iterdir()] == [".log"]  # the environment is gone
