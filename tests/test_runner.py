"""The step of our own against the model's own forward: `model(ids).logits`, in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama.torch_engine.kv_cache import CachePlan, KVCache
from llama.torch_engine.runner import Runner

VARIANTS = {
    "grouped heads": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "one head for all": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "no groups": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "a head dimension of its own": {"head_dim": 24},
    "linear rope scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama 3 rope scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def make_model(**overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(1)
    shape = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.requires_grad_(False)


def make_runner(model: LlamaForCausalLM, slots: int = 4, length: int = 200) -> Runner:
    cache = KVCache(model.config, CachePlan(slots, length), torch.float32, torch.device("cpu"))
    return Runner(model, cache)


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 99, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_prefill_and_decode_give_the_logits_of_the_model(overrides: dict[str, object]) -> None:
    model = make_model(**overrides)
    runner, ids = make_runner(model), random_ids(90)
    expected = model(ids[None]).logits[0]
    torch.testing.assert_close(runner.prefill(2, ids[:80], 0)[0], expected[79], rtol=1e-4, atol=1e-4)
    for position in range(80, 90):
        logits = runner.decode([2], ids[position : position + 1], [position])
        torch.testing.assert_close(logits[0], expected[position], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cuts", [[1], [7, 8], [64], [1, 2, 3], list(range(1, 80, 13))])
def test_a_prompt_in_chunks_gives_the_logits_of_the_prompt_at_once(cuts: list[int]) -> None:
    model = make_model()
    runner, ids = make_runner(model), random_ids(80)
    for start, end in zip([0, *cuts], [*cuts, 80], strict=True):
        logits = runner.prefill(0, ids[start:end], start)
    torch.testing.assert_close(logits[0], model(ids[None]).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_requests_of_different_lengths_in_any_slots_do_not_touch_each_other() -> None:
    model = make_model()
    runner = make_runner(model, slots=6)
    lengths = {5: 3, 0: 70, 3: 129}  # slot: prompt length, with holes between
    prompts = {slot: random_ids(length + 1, slot) for slot, length in lengths.items()}
    for slot, ids in prompts.items():
        runner.prefill(slot, ids[:-1], 0)
    slots = sorted(lengths)
    last = torch.stack([prompts[slot][-1] for slot in slots])
    logits = runner.decode(slots, last, [lengths[slot] for slot in slots])
    for row, slot in enumerate(slots):
        expected = model(prompts[slot][None]).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_what_an_earlier_request_left_in_a_slot_is_not_seen() -> None:
    model = make_model()
    runner, fresh = make_runner(model), make_runner(model)
    runner.prefill(1, random_ids(150, seed=7), 0)
    ids = random_ids(20)
    for r in (runner, fresh):
        r.prefill(1, ids[:-1], 0)
    last = ids[-1:]
    assert torch.equal(runner.decode([1], last, [19]), fresh.decode([1], last, [19]))


def test_the_last_position_of_the_cache_can_be_used() -> None:
    model = make_model()
    runner, ids = make_runner(model, length=130), random_ids(130)
    runner.prefill(3, ids[:-1], 0)
    expected = model(ids[None]).logits[0, -1]
    torch.testing.assert_close(runner.decode([3], ids[-1:], [129])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_step_is_as_close_to_float32_as_the_model_itself(dtype: torch.dtype) -> None:
    ids = random_ids(60)
    exact = make_model()(ids[None]).logits[0, -1]
    model = make_model().to(dtype)
    cache = KVCache(model.config, CachePlan(2, 100), dtype, torch.device("cpu"))
    runner = Runner(model, cache)
    runner.prefill(0, ids[:-1], 0)
    step = runner.decode([0], ids[-1:], [59])[0]
    own_error = (model(ids[None]).logits[0, -1].float() - exact).norm()
    assert (step - exact).norm() < 2 * own_error
