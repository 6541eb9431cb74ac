"""docs/faq.md has every message that a build can end in, and none that has gone.

Messages are read from the sources, with a gap for each value that is filled in. The page quotes
them with "..." for whatever differs. The two are the same if the fixed parts of one are found, in
order, in the other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAQ = ROOT / "docs" / "faq.md"
PYTHON = [ROOT / "setup.py", *sorted((ROOT / "batchnorm_cuda").rglob("*.py"))]
CPP = sorted((ROOT / "csrc").rglob("*.cpp"))

GAP = "\0"
# Fewer fixed letters in a row do not tell one message from another.
TELLING = 8
# Calls whose strings a user gets to read, besides those of exceptions, and names that hold a part
# of a message for later.
SAYING = ("exit", "say", "lock", "warn")
HOLDING = ("problem", "looked")
# These say by themselves what to change: "batch_norm: expected <argument> to be ..., got ...".
SELF_EXPLAINING = re.compile(rf"({GAP}|\w+): (expected |unknown )")


def skeleton(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else GAP for v in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else GAP


def strings_in(node: ast.AST) -> Iterator[str]:
    """The whole strings below a node, not the pieces that they are made of."""
    if isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    ):
        yield skeleton(node)
        return
    for child in ast.iter_child_nodes(node):
        yield from strings_in(child)


def called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def returns_problems(function: ast.FunctionDef) -> bool:
    """Functions such as `inspect`, which give a string where something is wrong."""
    parts = ast.unparse(function.returns).split(" | ") if function.returns else []
    return "str" in parts and len(parts) > 1


def python_messages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = called_name(node)
            if name.endswith("Error") or name in SAYING:
                for argument in node.args:
                    yield from strings_in(argument)
        elif isinstance(node, ast.FunctionDef) and returns_problems(node):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from strings_in(inner.value)
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(getattr(target, "id", "") in HOLDING for target in targets):
                yield from strings_in(node.value)


def cpp_messages(path: Path) -> Iterator[str]:
    raised = r"(?:TORCH_(?:CHECK|WARN)\w*|throw [\w:]+)\((.*?)\);"
    for statement in re.findall(raised, path.read_text(), re.DOTALL):
        literals = re.findall(r'"((?:[^"\\]|\\.)*)"', statement)
        yield GAP.join([*literals, ""])


def fixed_parts(text: str, gap: str) -> list[str]:
    return [part.strip() for part in text.split(gap) if part.strip()]


def is_telling(text: str, gap: str) -> bool:
    return max(map(len, fixed_parts(text, gap)), default=0) >= TELLING


def contains(text: str, parts: list[str]) -> bool:
    """Whether the parts occur in the text, one after another."""
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def same(message: str, quoted: str) -> bool:
    return contains(message, fixed_parts(quoted, "...")) or contains(
        quoted, fixed_parts(message, GAP)
    )


MESSAGES = sorted(
    {
        message
        for read, paths in ((python_messages, PYTHON), (cpp_messages, CPP))
        for path in paths
        for message in read(path)
        if is_telling(message, GAP) and " " in message  # not a mere name
    }
)
TERMS = re.findall(r"^(`.*`)\n: ", FAQ.read_text(), re.MULTILINE)
QUOTED = [quoted for term in TERMS for quoted in re.findall(r"`([^`]+)`", term)]


def test_sources_are_read() -> None:
    """One message of each kind: nothing below would fail if none were found."""
    for known in (
        f"no CUDA toolkit found ({GAP}): {GAP}",  # raised
        f"{GAP} was compiled for PyTorch {GAP}, but this is PyTorch {GAP}",  # returned
        f"waiting for another process: {GAP}",  # said
        f"batch_norm: launching {GAP} failed: {GAP}",  # C++
        f"the extension compiled at installation does not load ({GAP})",  # held
        f"BATCHNORM_CUDA_AOT=1 needs a CUDA build of torch, not {GAP}",  # setup.py
    ):
        assert known in MESSAGES


@pytest.mark.parametrize(
    "message",
    [message for message in MESSAGES if not SELF_EXPLAINING.match(message)],
    ids=lambda message: message.replace(GAP, "...")[:60],
)
def test_message_is_documented(message: str) -> None:
    assert any(same(message, quoted) for quoted in QUOTED)


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda quoted: quoted[:60])
def test_quoted_message_exists(quoted: str) -> None:
    assert is_telling(quoted, "...")
    assert any(same(message, quoted) for message in MESSAGES)
