"""The declaration of arguments: operators, the compiled module and the public functions agree."""

from __future__ import annotations

import inspect
import re
from ast import literal_eval
from pathlib import Path
from types import ModuleType

import pytest
import torch

import batchnorm_cuda
from batchnorm_cuda._ops.calls import Backward, DoubleBackward, Forward
from batchnorm_cuda._ops.operators import OPERATORS, Operator

# What programs call that torch.export has saved: a schema may get further arguments with defaults,
# at its end, and nothing else.
SCHEMAS = (Path(__file__).with_name("schemas.txt")).read_text().splitlines()

OF_SCHEMA = {
    "Tensor": "torch.Tensor",
    "Tensor?": "Optional[torch.Tensor]",
    "bool": "bool",
    "float": "float",
    "float?": "Optional[float]",
    "str": "str",
}
# pybind11 spells a parameter that converts by its protocol.
SPELLINGS = {
    r"(typing\.)?SupportsFloat( \| (typing\.)?SupportsIndex)?": "float",
    r"([\w.]+) \| None": r"Optional[\1]",
}

every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda o: o.name)


def of_module(extension: ModuleType, name: str) -> list[tuple[str, ...]]:
    """Names, types and defaults of a function's arguments, by pybind11's own line about it."""
    line = getattr(extension, name).__doc__.splitlines()[0]
    for theirs, ours in SPELLINGS.items():
        line = re.sub(theirs, ours, line)
    listed = re.search(r"\((.*)\) ->", line).group(1)
    return [tuple(re.split(": | = ", argument)) for argument in listed.split(", ")]


def test_schemas_stay() -> None:
    assert sorted(operator.schema for operator in OPERATORS.values()) == SCHEMAS
    registered = (getattr(torch.ops.batchnorm_cuda, name).default for name in OPERATORS)
    assert sorted(str(o._schema).removeprefix("batchnorm_cuda::") for o in registered) == SCHEMAS


def test_what_is_recorded_takes_a_plain_call_and_what_is_fused(extension: ModuleType) -> None:
    names = [name for name, *_ in of_module(extension, "recorded")]
    plain = Forward._fields[: Forward._fields.index("residual")]
    assert names == [*plain, "residual", "relu", "activation", "parameter"]


@every_operator
def test_the_module_takes_the_arguments_of_the_operator(
    extension: ModuleType, operator: Operator
) -> None:
    listed = re.search(r"\((.*)\) ->", re.sub(r"\(.!\)", "", operator.schema)).group(1)
    triples = [
        re.fullmatch(r"(\S+) (\w+)=?(.*)", argument).groups() for argument in listed.split(", ")
    ]
    expected = [
        (name, OF_SCHEMA[kind], *([repr(literal_eval(default))] if default else []))
        for kind, name, default in triples
    ]
    assert of_module(extension, operator.name) == expected


@every_operator
def test_a_record_holds_what_the_operator_takes(operator: Operator) -> None:
    values = tuple(range(len(operator.arguments)))
    call = operator.bind(*values)
    assert operator._values(call) == values or operator._values(call) == values[0]
    by_name = operator.bind(**dict(zip(operator.arguments, values, strict=True)))
    assert by_name == call
    assert all(getattr(call, name) == value for name, value in operator.fixed.items())


@pytest.mark.parametrize("record", [Forward, Backward, DoubleBackward], ids=lambda r: r.__name__)
def test_every_field_is_an_argument_somewhere(record: type) -> None:
    taken = {f for o in OPERATORS.values() if o.record is record for f in o.fields}
    # The group is Python's: the kernels see what was gathered in it.
    own = {"group"} | ({"count"} if record is DoubleBackward else set())
    assert taken == set(record._fields) - own


def test_public_arguments_are_fields_and_documented() -> None:
    public = list(inspect.signature(batchnorm_cuda.batch_norm).parameters)
    assert set(public) <= set(Forward._fields)
    arguments = batchnorm_cuda.batch_norm.__doc__.partition("Args:")[2].partition("Returns:")[0]
    described = re.findall(r"^        (\w+): ", arguments, re.MULTILINE)
    assert described == public
