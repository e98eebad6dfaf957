"""Our calls of torch's private operators, against a copy of the schemas of the GPU image's torch.

The tests run with another version of torch than the image, and private operators may change in any version.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from fake_cuda.operator_calls import (
    SCHEMAS,
    OperatorCall,
    calls_in,
    calls_in_source,
    problem_of,
    stored_schemas,
)

from llama import ROOT

CALLS = calls_in(ROOT / "llama")
STORED = stored_schemas()
FLASH = "torch.ops.aten._flash_attention_forward.default"


def test_the_copy_is_of_the_version_that_the_image_installs() -> None:
    pinned = re.search(r"^torch==(.+)$", (ROOT / "requirements-gpu.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    assert f"torch {pinned[1]} " in SCHEMAS.read_text("utf-8").splitlines()[0]


def test_the_copy_has_the_operators_that_are_called_and_no_others() -> None:
    assert {call.operator for call in CALLS} == set(STORED)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.place)
def test_a_call_matches_the_image(call: OperatorCall) -> None:
    assert problem_of(call, STORED[call.operator]) is None


@pytest.mark.parametrize("name", STORED)
def test_this_torch_accepts_the_calls_too(name: str) -> None:
    if name.startswith("mkldnn::") and not torch._C._has_mkldnn:
        pytest.skip("torch was built without oneDNN")
    schemas: list[Any] = torch._C._jit_get_schemas_for_operator(name)
    (schema,) = (schema for schema in schemas if not schema.overload_name)
    stored = STORED[name]
    assert schema.is_backward_compatible_with(stored), f"now {schema}"
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    for argument in stored.arguments:
        assert argument.default_value == defaults[argument.name]
    for call in CALLS:
        assert call.operator != name or problem_of(call, schema) is None


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (f"{FLASH}(q, k, v, a, b, 1, 9, 0.0, True, False, seqused_k=n)", None),
        (
            f"{FLASH}(q, k, v, a, b, 1, 9, 0.0, True, False, block_table=t)",
            "x.py:1: aten::_flash_attention_forward has no argument block_table",
        ),
        (
            f"{FLASH}(q, k, v, a, b, 1, 9, 0.0, True, False, 0.1)",
            "x.py:1: aten::_flash_attention_forward takes 10 positional arguments, not 11",
        ),
        (
            f"{FLASH}(q, k, v, a, b, 1, 9, 0.0, True)",
            "x.py:1: aten::_flash_attention_forward needs return_debug_mask",
        ),
        ("torch._scaled_mm(a, b, scale_a=s)", "x.py:1: aten::_scaled_mm needs scale_b"),
    ],
)
def test_a_wrong_call_is_found(source: str, problem: str | None) -> None:
    (call,) = calls_in_source(source, "x.py")
    assert problem_of(call, STORED[call.operator]) == problem


def test_an_operator_that_is_not_called_directly_is_refused() -> None:
    with pytest.raises(AssertionError, match="x.py:1: call aten::_scaled_mm directly"):
        list(calls_in_source("product = torch._scaled_mm", "x.py"))
