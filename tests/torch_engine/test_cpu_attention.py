"""Attention with compiled kernels: the results and the cache are compared with a plain formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import CONTEXT, Case, combinations, kernels_of, rounding

from llama.torch_engine.cpu_compiler import as_array

HEADS = {"grouped heads": (8, 2), "one KV head": (3, 1), "no groups": (2, 2)}
POSITIONS = [0, 1, 2, 3, 4, 15, 62, 63, 64, CONTEXT - 2]
IDLE = CONTEXT - 1  # the position of rows that are not decoding


@combinations
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("size", [2, 6, 24, 34, 64, 80, 128])
def test_rows_of_any_lengths_attend_to_their_own_contents_only(
    dtype: torch.dtype, cached: torch.dtype, heads: tuple[int, int], size: int
) -> None:
    positions = [POSITIONS[0], IDLE, *POSITIONS[1:], IDLE]
    Case(*heads, size, dtype, cached, rows=len(positions)).check_decode(positions)


@combinations
@pytest.mark.parametrize("position", POSITIONS)
def test_a_single_row_attends_to_its_contents(dtype: torch.dtype, cached: torch.dtype, position: int) -> None:
    Case(4, 2, 16, dtype, cached, rows=1).check_decode([position])


@combinations
def test_many_rows_of_one_step_do_not_affect_each_other(dtype: torch.dtype, cached: torch.dtype) -> None:
    Case(4, 2, 16, dtype, cached, rows=131).check_decode([(7 * row) % CONTEXT for row in range(131)])


@combinations
def test_one_long_row_beside_short_ones_is_read_to_its_end(dtype: torch.dtype, cached: torch.dtype) -> None:
    Case(4, 1, 8, dtype, cached, rows=5, context=5001).check_decode([3, 4999, 0, 5000, 17])


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_random_shapes_and_lengths_give_the_attention_of_the_formula(data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    size, context = 2 * data.draw(st.integers(1, 40)), data.draw(st.integers(2, 70))
    positions = data.draw(st.lists(st.integers(0, context - 1), min_size=1, max_size=9))
    dtypes = torch.float32, torch.float32
    case = Case(kv_heads * group, kv_heads, size, *dtypes, rows=len(positions), context=context)
    case.check_decode(positions)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["query", "key", "value"])
@combinations
def test_inputs_that_are_not_finite_reach_the_result_of_their_row_only(
    dtype: torch.dtype, cached: torch.dtype, part: str, value: float
) -> None:
    case = Case(2, 1, 8, dtype, cached, rows=3)
    qkv = case.projections(3)
    qkv[1, {"query": 3, "key": 16 + 3, "value": 24 + 3}[part]] = value
    attended = case.decode(qkv, [5, 6, 7], torch.tensor([5, 6, 7]))
    finite = attended.isfinite()
    assert finite[0].all()
    assert finite[2].all()
    assert not finite[1, :8].all()  # the first head; the second one has a query of its own


@pytest.mark.parametrize("magnitude", [1e1, 3e3, 1e15])
def test_scores_of_any_size_do_not_overflow(magnitude: float) -> None:
    """One key has by far the highest score, so its value is the result."""
    case = Case(1, 1, 8, torch.float32, torch.float32, rows=1)
    case.cos[:], case.sin[:] = 1, 0
    case.cache[0] = -magnitude
    case.cache[0, 0, 0, 10] = magnitude
    qkv = torch.full((1, 24), magnitude)
    qkv[0, 8:16] = -magnitude
    attended = case.decode(qkv, [40], torch.tensor([0]))
    assert torch.equal(attended[0], case.cache[1, 0, 0, 10])


@combinations
@pytest.mark.parametrize(
    ("start", "count"), [(0, 1), (0, 40), (17, 1), (17, 63), (0, CONTEXT), (CONTEXT - 1, 1)]
)
@pytest.mark.parametrize("angle", [0, CONTEXT])
def test_a_chunk_is_stored_at_its_positions_and_its_queries_are_rotated(
    dtype: torch.dtype, cached: torch.dtype, start: int, count: int, angle: int
) -> None:
    case = Case(6, 2, 34, dtype, cached, rows=2)
    qkv = case.projections(count + 5)[2 : 2 + count]  # chunks are parts of the projections of a step
    queries = torch.empty(count, 6 * 34, dtype=dtype)
    kernels_of(dtype, cached).store_chunk(
        as_array(qkv),
        as_array(case.cos),
        as_array(case.sin),
        angle + start,
        as_array(case.cache),
        1,
        start,
        as_array(queries),
    )
    angles = torch.arange(angle + start, angle + start + count)
    wanted, keys, values = case.split(qkv)
    error = rounding(dtype)
    torch.testing.assert_close(
        queries.float().view_as(wanted), case.rotated(wanted, angles), rtol=error, atol=1e-5
    )
    stored = case.cache[:, 1, :, start : start + count].transpose(1, 2)  # [2, N, KV heads, D]
    torch.testing.assert_close(
        stored[0].float(), case.rotated(keys, angles), rtol=rounding(cached), atol=1e-5
    )
    assert torch.equal(stored[1], values.to(cached))
    case.before[:, 1, :, start : start + count] = case.cache[:, 1, :, start : start + count]
    assert torch.equal(case.cache, case.before)
