"""What people read: Markdown, plots and the HTML page."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_cases import row

from bench import report
from bench.pages import html, markdown, plots
from bench.pages.style import LOOKS
from bench.rows.results import INACCURATE, MODEL, UNSUPPORTED, Row, write_csv, write_json

MEASURED_ROWS = [
    row(
        op=op,
        shape=shape,
        count=count,
        provider=name,
        ms=ms,
        copy_percent=100 / ms,
        compulsory_bytes=6_000_000,
    )
    for op in ("forward", "both")
    for shape, count in (("2x3x5x5", 3), ("2x6x5x5", 1))
    for name, ms in (("ours", 1.5), ("native", 3.0), ("copy", 1.0))
]
MEASURED_ROWS += [
    row(provider="cudnn", status=UNSUPPORTED, ms=None, copy_percent=None, note="Native runs"),
    row(provider="compile", status=INACCURATE, ms=None, copy_percent=None, error=37.0, note="<b>"),
]
MODEL_ROWS = [
    row(kind=MODEL, op=op, provider=name, model_bytes=size, count=2)
    for op in ("forward", "backward", "both")
    for name, size in (("ours", 1000), ("native", 1500))
]


def only(rows: list[Row], title: str) -> markdown.Table:
    return next(table for table in markdown.tables(rows) if table.title == title)


def test_measured_table_keeps_losses_and_errors() -> None:
    table = only(MEASURED_ROWS, "net, forward")
    cells = {line[1]: dict(zip(table.columns, line, strict=True)) for line in table.rows[-5:]}
    by_name = {line[1]: line for line in table.rows}
    assert set(by_name) == {"ours", "native", "copy", "cudnn", "compile"}
    ours = dict(zip(table.columns, by_name["ours"], strict=True))
    assert (ours["ms"], ours["time / native"], ours["error"]) == ("1.5000", "0.50", "0.5")
    assert ours["% of copy"] == "67" and ours["20-80 %"] == "1.9000-2.1000"
    assert cells["cudnn"]["ms"] == "" and cells["cudnn"]["note"] == "unsupported: Native runs"
    assert cells["compile"]["error"] == "37" and cells["compile"]["note"] == "inaccurate: <b>"


def test_sum_of_a_training_step() -> None:
    table = only(MEASURED_ROWS, "Sum of a training step")
    sums = {line[1]: line[2:] for line in table.rows}
    assert sums["ours"] == ("4", "6.000", "4")
    assert sums["native"][1] == "12.000"
    partial = [
        replace(one, ms=None, status=UNSUPPORTED) if one.provider == "native" and n < 9 else one
        for n, one in enumerate(MEASURED_ROWS)
    ]
    # A provider that does not take every layer has no sum: it would look fast.
    table = only(partial, "Sum of a training step")
    assert {line[1]: line[2:] for line in table.rows}["native"] == ("1 of 4", "", "")


def test_model_tables_label_every_figure() -> None:
    tables = markdown.tables(MODEL_ROWS)
    assert [table.title for table in tables] == [
        "net, forward (model)",
        "net, backward (model)",
        "net, both (model)",
        "Sum of a training step (model)",
    ]
    for table in tables:
        for at in table.numbers:
            assert table.columns[at].startswith("model:") or table.columns[at] == "batch norms"
    text = markdown.document({"device": "a described GPU"}, MODEL_ROWS)
    assert text.startswith("# Batch norm on a described GPU (model)\n\n**Model.** No figure")
    assert not re.search(r"\bms\b|GB/s", text)


def test_markdown_is_well_formed() -> None:
    text = markdown.render(markdown.Table("t", ("a", "b"), (("x|y", "1"),), range(1, 2)))
    assert text.splitlines() == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |"]


class Page(HTMLParser):
    """Checks that elements nest, and notes what a browser would run or fetch."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            local = value is None or value.startswith(("#", "data:"))
            if name in ("src", "href", "xlink:href", "srcset") and not local:
                self.fetched.append(value)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("rows", [MEASURED_ROWS, MODEL_ROWS], ids=["measured", "model"])
def test_html_is_one_file_that_needs_no_network(rows: list[Row]) -> None:
    environment = {"device": "GPU <1>", "commit": "abc"}
    text = html.render(environment, rows, plots.draw(rows))
    page = Page()
    page.feed(text)
    assert page.open == [] and page.fetched == []
    assert "script" not in page.tags and "@import" not in text and "url(http" not in text
    assert page.tags.count("svg") == len(plots.draw(rows)) >= 1
    assert page.tags.count("table") == len(markdown.tables(rows))
    assert "GPU &lt;1&gt;" in text and "GPU <1>" not in text
    assert "prefers-color-scheme: dark" in text and plots.INK not in text
    assert ("No figure below is measured" in text) == (rows is MODEL_ROWS)
    if rows is MODEL_ROWS:
        titles = re.findall(r"<h2>(.*?)</h2>", text)
        assert all(
            "(model)" in title for title in titles if title not in ("Tables", "Where this ran")
        )
    else:
        assert "inaccurate: &lt;b&gt;" in text


@pytest.mark.parametrize("rows", [MEASURED_ROWS, MODEL_ROWS], ids=["measured", "model"])
def test_a_browser_has_nothing_to_say(rows: list[Row], tmp_path: Path) -> None:
    """No message on the console, for want of a network either, and something to see."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    page, picture = tmp_path / "page.html", tmp_path / "page.png"

    def messages(text: str) -> list[str]:
        page.write_text(text)
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--log-level=0"]
        command += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND"]
        command += [f"--user-data-dir={tmp_path}", f"--screenshot={picture}", f"file://{page}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert picture.stat().st_size > 5000, done.stderr
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    text = html.render({"device": "GPU 1"}, rows, plots.draw(rows))
    assert messages(text) == []
    broken = text.replace(
        "</main>", '<img src="http://example.org/x.png"><script>f()</script></main>'
    )
    assert any("f is not defined" in line for line in messages(broken))


def test_plots_tell_nothing_by_colour_alone() -> None:
    looks = list(LOOKS.values())
    assert len({(look.marker, look.filled) for look in looks}) == len(looks)
    pictures = plots.draw(MEASURED_ROWS)
    assert set(pictures) == {"roofline", "ratio"}
    assert "(measured on GPU 1)" in plots.inline_svg(pictures["ratio"], "ratio")
    (name, picture), *rest = plots.draw(MODEL_ROWS).items()
    assert name == "bytes" and not rest
    text = plots.inline_svg(picture, "bytes")
    assert "model: DRAM bytes" in text and "not measured" in text and "GB/s" not in text


def test_nothing_to_draw() -> None:
    assert plots.draw([]) == {}
    assert plots.draw([row(ms=None, status=UNSUPPORTED)]) == {}


def test_report_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "gpu.csv"
    write_csv(path, MEASURED_ROWS)
    write_json(path.with_suffix(".json"), {"device": "GPU 1", "driver": "600.1"}, MEASURED_ROWS)
    assert report.main([str(path)]) == 0
    written = {line.removeprefix("wrote ") for line in capsys.readouterr().out.splitlines()}
    assert {Path(name).name for name in written} == {
        *("gpu.csv", "gpu.json", "gpu.md", "gpu.html"),
        *(f"gpu-{plot}.{kind}" for plot in ("roofline", "ratio") for kind in ("svg", "png")),
    }
    assert all(Path(name).stat().st_size for name in written)
    assert "- driver: 600.1" in path.with_suffix(".md").read_text()
    first = path.with_name("gpu-ratio.svg").read_bytes()
    assert report.main([str(path)]) == 0
    assert path.with_name("gpu-ratio.svg").read_bytes() == first  # no date, no chance
    assert report.main([str(tmp_path / "absent.csv")]) == 2
