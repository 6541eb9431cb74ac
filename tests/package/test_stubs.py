"""batchnorm_cuda/_C.pyi says what the compiled module has: names, arguments, types, defaults."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

import batchnorm_cuda
from tools import stub

STUB = Path(batchnorm_cuda.__file__).with_name("_C.pyi")

# pybind11 spells a parameter that converts by its protocol; a caller passes the type.
SPELLINGS = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "typing.SupportsInt": "int",
    "typing.SupportsFloat": "float",
    "torch.Tensor": "Tensor",
    "dict[str, Any]": "dict",
    "dict[str, object]": "dict",
    "collections.abc.Callable": "Callable",
    "Callable[[str], str]": "Callable",
}


def normalised(signature: str) -> str:
    for theirs, ours in SPELLINGS.items():
        signature = signature.replace(theirs, ours)
    signature = re.sub(r"Optional\[([^\[\]]*)\]", r"\1 | None", signature)
    return " ".join(signature.split())


def stub_signatures() -> dict[str, str]:
    functions = [
        node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    return {
        f.name: normalised(f"{f.name}({spelled(f.args)}) -> {ast.unparse(f.returns)}")
        for f in functions
    }


def spelled(arguments: ast.arguments) -> str:
    """As pybind11 writes them: `name: type = default`."""
    plain = [None] * (len(arguments.args) - len(arguments.defaults))
    pairs = zip(arguments.args, [*plain, *arguments.defaults], strict=True)
    return ", ".join(
        f"{a.arg}: {ast.unparse(a.annotation)}" + (f" = {ast.unparse(d)}" if d else "")
        for a, d in pairs
    )


def test_same_names(extension: ModuleType) -> None:
    assert sorted(stub_signatures()) == [name for name in dir(extension) if name[0] != "_"]


@pytest.mark.parametrize("name", sorted(stub_signatures()))
def test_same_signature(extension: ModuleType, name: str) -> None:
    documented = getattr(extension, name).__doc__.splitlines()[0]
    assert stub_signatures()[name] == normalised(documented)


def test_operators_are_as_generated() -> None:
    text = STUB.read_text()
    assert text == stub.generated(text), "run `python -m tools.stub`"
