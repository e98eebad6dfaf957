"""Finds the calls of torch's private operators in source code, and checks them against operator schemas.

Knows syntax and schemas; knows nothing about what an operator does.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SCHEMAS = Path(__file__).with_name("torch_2_11_operators.txt")


@dataclass(frozen=True, slots=True)
class OperatorCall:
    operator: str
    """Such as `aten::_scaled_mm`."""
    positional: int
    keywords: tuple[str, ...]
    place: str


def stored_schemas() -> dict[str, torch._C.FunctionSchema]:
    """Return the schemas of torch 2.11 by the names of their operators."""
    lines = SCHEMAS.read_text("utf-8").splitlines()
    schemas = [torch._C.parse_schema(line) for line in lines if line and not line.startswith("#")]
    return {schema.name: schema for schema in schemas}


def calls_in(folder: Path) -> list[OperatorCall]:
    """Return the calls in all Python files below a folder."""
    return [
        call
        for path in sorted(folder.rglob("*.py"))
        for call in calls_in_source(path.read_text("utf-8"), str(path.relative_to(folder.parent)))
    ]


def calls_in_source(source: str, name: str) -> Iterator[OperatorCall]:
    """Yield the calls in one file. Raises AssertionError if an operator is used in any other way."""
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inside = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if id(node) in inside or (operator := _operator(node)) is None:
            continue
        call = called.get(id(node))
        place = f"{name}:{getattr(node, 'lineno', 0)}"
        assert call is not None, f"{place}: call {operator} directly, so that its arguments can be checked"
        keywords = tuple(keyword.arg or "**" for keyword in call.keywords)
        yield OperatorCall(operator, len(call.args), keywords, place)


def _operator(node: ast.AST) -> str | None:
    """The operator that `torch.ops.<namespace>.<name>` or `torch._<name>` means, or None."""
    parts = _attributes(node)
    if parts[:2] == ["torch", "ops"] and len(parts) >= 4:
        return f"{parts[2]}::{parts[3]}"
    if (
        len(parts) == 2
        and parts[0] == "torch"
        and parts[1].startswith("_")
        and hasattr(torch.ops.aten, parts[1])
    ):
        return f"aten::{parts[1]}"
    return None


def _attributes(node: ast.AST) -> list[str]:
    """["torch", "ops", "aten"] for `torch.ops.aten`, [] for anything else."""
    match node:
        case ast.Name(name):
            return [name]
        case ast.Attribute(value, name) if inner := _attributes(value):
            return [*inner, name]
        case _:
            return []


def problem_of(call: OperatorCall, schema: torch._C.FunctionSchema) -> str | None:
    """Return why a call does not match a schema, or None if it does."""
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    names = {argument.name for argument in schema.arguments}
    given = {*positional[: call.positional], *call.keywords}
    required = {argument.name for argument in schema.arguments if not argument.has_default_value()}
    where = f"{call.place}: {call.operator}"
    if call.positional > len(positional):
        return f"{where} takes {len(positional)} positional arguments, not {call.positional}"
    if unknown := set(call.keywords) - names:
        return f"{where} has no argument {', '.join(sorted(unknown))}"
    if missing := required - given:
        return f"{where} needs {', '.join(sorted(missing))}"
    return None
