"""The documentation is true: its code runs, it covers every public name, and every error."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
from forked import Forks

import batchnorm_cuda

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What is printed between two blocks; no page prints such a line of its own.
SEPARATOR = "=== next block ==="


def blocks(page: Path) -> list[tuple[str, str]]:
    """(source, what it prints) of each block of Python: the text block that follows, if any."""
    found = []
    for language, content in BLOCK.findall(page.read_text()):
        if language == "python":
            found.append((content, ""))
        elif found:
            found[-1] = (found[-1][0], content)
    return found


def printed_by(sources: list[str], folder: Path, forks: Forks) -> list[str]:
    """What each block prints, run one after another in one process, without emulation."""
    script = folder / "page.py"  # a file, because torch.compile reads the source of functions
    script.write_text(f"print({SEPARATOR!r})\n".join(sources))
    run = forks.run(str(script), folder=str(folder))
    assert run.returncode == 0, run.stderr
    return run.stdout.split(f"{SEPARATOR}\n")


def test_readme(tmp_path: Path, forks: Forks) -> None:
    """On a CPU, and without the block that compiles csrc/ by itself (test_install.py)."""
    sources = [source for source, _ in blocks(ROOT / "README.md") if "cpp_extension" not in source]
    assert len(sources) > 1
    on_cpu = [s.replace(".cuda()", "").replace('"cuda"', '"cpu"') for s in sources]
    printed_by(on_cpu, tmp_path, forks)


def assert_prints(page: Path, folder: Path, forks: Forks) -> None:
    """Compared as doctest does: "..." stands for anything."""
    sources, expected = zip(*blocks(page), strict=True)
    checker = doctest.OutputChecker()
    printed = printed_by(list(sources), folder, forks)
    for source, want, got in zip(sources, expected, printed, strict=True):
        same = checker.check_output(want, got, doctest.ELLIPSIS)
        assert same, f"{page.name}: this block\n{source}\nprints\n{got}\nthe page says\n{want}"


def test_tutorial(tmp_path: Path, forks: Forks) -> None:
    assert_prints(DOCS / "tutorial.md", tmp_path, forks)


def test_api_page_has_every_public_name() -> None:
    directive = r"^\.\. (?:autoclass|autofunction|py:data):: (\w+)"
    documented = set(re.findall(directive, (DOCS / "api.rst").read_text(), re.MULTILINE))
    assert not set(batchnorm_cuda.__all__) - documented


@pytest.mark.parametrize("name", [n for n in batchnorm_cuda.__all__ if n != "__version__"])
def test_public_name_has_a_docstring(name: str) -> None:
    """Its own: inspect.getdoc would find torch.nn's for a subclass that has none."""
    value = getattr(batchnorm_cuda, name)
    assert len(value.__dict__.get("__doc__") or value.__doc__ or "") > 80
    if isinstance(value, type):
        assert value.__doc__ not in [base.__doc__ for base in value.__mro__[1:]]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "tests/simt/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Those of the site's own pages are checked by `make docs`."""
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    gone = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not gone
