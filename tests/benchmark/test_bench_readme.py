"""The README's section on performance is what the generator writes from the committed data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bench_cases import row

from bench import readme
from bench.rows.results import MODEL, UNSUPPORTED, ResultsError, Row, write_csv


def test_the_section_is_what_the_data_gives() -> None:
    """`make readme` writes it again."""
    assert readme.problems(readme.RESULTS, readme.README) == []


def test_what_the_section_shows() -> None:
    text = readme.section(readme.RESULTS)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len({line.split("|")[2] for line in rows}) >= 12
    (plot,) = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert (readme.ROOT / plot).exists()
    kinds = {row.kind for _, members in readme.load(readme.RESULTS) for row in members}
    assert ("**Model, not measured.**" in text) == (kinds == {MODEL})
    if kinds == {MODEL}:
        assert not re.search(r"\bms\b|GB/s|faster|speed-up", text)


def model_rows() -> list[Row]:
    return [
        row(kind=MODEL, op=op, provider=name)
        for op in ("forward", "backward")
        for name in ("ours", "native")
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_csv(tmp_path / "model.csv", model_rows())
    readme.write_plots(tmp_path)
    text = f"# Title\n\n{readme.section(tmp_path)}\n\nMore.\n"
    (tmp_path / "README.md").write_text(text)
    return tmp_path


def test_drift_is_seen(folder: Path) -> None:
    page = folder / "README.md"
    assert readme.problems(folder, page) == []
    text = page.read_text()
    page.write_text(text.replace("1.25", "1.00"))
    assert readme.problems(folder, page) == [
        "README.md: the section on performance is not what bench/results gives"
    ]
    page.write_text(text)
    changed = [*model_rows(), row(kind=MODEL, op="both", provider="copy")]
    write_csv(folder / "model.csv", changed)  # the table is the same, the plot may not be
    assert readme.problems(folder, page) == [
        "model-bytes.svg was not drawn from model.csv as it is"
    ]
    page.write_text(text.replace(readme.END, ""))
    with pytest.raises(ResultsError, match="one pair of markers"):
        readme.problems(folder, page)


def test_only_the_section_is_replaced() -> None:
    before = f"a\n{readme.BEGIN}\nold\n{readme.END}\nb\n"
    new = f"{readme.BEGIN}\nnew\n{readme.END}"
    assert readme.replace_section(before, new) == f"a\n{new}\nb\n"


def test_measured_results_take_the_models_place(folder: Path) -> None:
    write_csv(
        folder / "gpu.csv",
        [
            row(ms=1.25, copy_percent=71.6),
            row(provider="native", ms=3.0),
            row(provider="cudnn", ms=None, status=UNSUPPORTED),
            row(op="both", ms=4.0),
            row(dtype="bf16", ms=1.3),
        ],
    )
    text = readme.section(folder)
    assert "Model" not in text and "Measured on GPU 1" in text
    assert "| network | shape | forward, ms: ours | cudnn | native | ours, % of" in text
    assert "| net | 2x3x5x5 nchw fp16 | 1.2500 | - (unsupported) | 3.0000 | 72 |" in text
    assert "both" not in text and "bf16" not in text
    assert "bench/results/gpu-ratio.svg" in text
    readme.write_plots(folder)
    assert readme.digest(folder / "gpu.csv") in (folder / "gpu-ratio.svg").read_text()


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no results"):
        readme.section(tmp_path)
