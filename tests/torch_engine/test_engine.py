"""The thread of the default engine: cancelled requests, failed steps, and closing the engine."""

from __future__ import annotations

import pytest
from batches import (
    POISON_TOKEN,
    Head,
    collect,
    generate,
    greedy,
    prompt_of,
    running,
)
from server_clients import until
from transformers import LlamaForCausalLM

from llama.errors import EngineStopped, GenerationFailed


def test_a_cancelled_request_frees_its_row_within_one_step(model: LlamaForCausalLM) -> None:
    head = Head()
    with running(model, rows=1, head=head) as engine:
        leaving = engine.submit(prompt_of(1, 5), greedy(400))
        waiting = engine.submit(prompt_of(2, 5), greedy(1))
        next(iter(leaving))
        head.open.clear()  # the engine stops before or in a step
        leaving.cancel()
        steps = head.steps
        head.open.set()
        assert collect(waiting) == generate(model, prompt_of(2, 5), 1)
        # At most the current step, one that was about to be counted, and the one that answers `waiting`.
        assert head.steps <= steps + 3


def test_a_failed_step_fails_all_requests_and_the_next_one_is_refused(
    model: LlamaForCausalLM,
) -> None:
    head = Head()
    with running(model, rows=2, head=head) as engine:
        streams = [engine.submit(prompt_of(i, 5), greedy(400)) for i in range(4)]
        next(iter(streams[0]))
        head.failing = True
        for stream in streams:
            with pytest.raises(GenerationFailed, match=r"^E2001 GenerationFailed: .*RuntimeError"):
                collect(stream)
        until(lambda: not engine.healthy, timeout=30)
        with pytest.raises(EngineStopped, match="^E2002 "):
            engine.submit(prompt_of(1, 5), greedy(5))


def test_closing_the_engine_fails_its_requests_and_refuses_new_ones(model: LlamaForCausalLM) -> None:
    with running(model, rows=1) as engine:
        streams = [engine.submit(prompt_of(i, 5), greedy(400)) for i in range(3)]
        assert engine.healthy
    assert not engine.healthy
    for stream in streams:
        with pytest.raises(EngineStopped):
            collect(stream)
    with pytest.raises(EngineStopped):
        engine.submit([1], greedy(1))


def test_a_request_with_logits_that_are_not_finite_fails_alone_and_its_row_is_cleared(
    model: LlamaForCausalLM,
) -> None:
    embeddings = model.get_input_embeddings().weight
    kept = embeddings[POISON_TOKEN].clone()
    embeddings[POISON_TOKEN] = float("nan")
    try:
        with running(model, rows=2) as engine:
            neighbour = engine.submit(prompt_of(2, 5), greedy(60))
            with pytest.raises(GenerationFailed, match="not finite"):
                collect(engine.submit([1, POISON_TOKEN, 5], greedy(20)))
            assert collect(neighbour) == generate(model, prompt_of(2, 5), 60)
            # Shorter than the failed request: one in the row that it had, and one in the other row.
            after = [engine.submit([1], greedy(30)) for _ in range(2)]
            assert [collect(stream) for stream in after] == [generate(model, [1], 30)] * 2
            assert engine.healthy
    finally:
        embeddings[POISON_TOKEN] = kept
