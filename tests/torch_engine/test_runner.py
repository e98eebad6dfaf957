"""Our forward pass, computed in three ways (`batches.Computing`), compared with `model(ids).logits`."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from batches import Computing, computing_parts
from flash_reference import positions_read
from transformers import LlamaConfig, LlamaForCausalLM

from llama.errors import EngineNotStarted
from llama.model.placement import Placement, has_flash_attention
from llama.torch_engine.attention import Chunk
from llama.torch_engine.cpu_compiler import Kernels
from llama.torch_engine.kv_cache import CacheShape
from llama.torch_engine.layers import ModelParts
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner

VARIANTS = {
    "grouped heads": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "one head for all": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "no groups": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "an explicit head dimension": {"head_dim": 24},
    "another activation": {"hidden_act": "gelu"},
    "sizes that are not multiples of 8": {"hidden_size": 36, "intermediate_size": 51, "head_dim": 6},
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


class RunnerAndRows(Runner):
    def __init__(self, parts: ModelParts, rows: Rows, kernels: Kernels | None) -> None:
        super().__init__(parts, rows, kernels)
        self.rows = rows


def make_runner(
    model: LlamaForCausalLM, rows: int = 4, length: int = 200, *, computing: Computing = "compiled"
) -> RunnerAndRows:
    parts, cache, kernels = computing_parts(copy.deepcopy(model), CacheShape(rows, length), computing)
    return RunnerAndRows(parts, Rows(cache), kernels)


def skip_what_flash_attention_refuses(model: LlamaForCausalLM, computing: Computing) -> None:
    placement = Placement(model.device, model.dtype, "none", 1)
    if computing != "flash":
        return
    if not has_flash_attention(model.config, torch.float16, (9, 0)):
        pytest.skip("flash attention does not support this head dimension")
    if placement.arithmetic is not placement.cache_dtype:
        pytest.skip("this CPU does not compute in 16 bits, as a GPU does")


def decode(runner: RunnerAndRows, entries: dict[int, tuple[int, int]]) -> dict[int, torch.Tensor]:
    """Run one step. `entries` has a token and its position for each row; return the logits of each row."""
    for row, (token, position) in entries.items():
        runner.feed(row, torch.tensor([token]))
        runner.start_decoding(row, position)
    logits = runner.decode(max(entries) + 1, max(position for _, position in entries.values()) + 1)
    for row in entries:
        runner.rows.vacate(row)
    return {row: logits[row] for row in entries}


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 99, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_prefill_and_decode_return_the_logits_of_the_model(
    overrides: dict[str, object], computing: Computing
) -> None:
    model = make_model(**overrides)
    skip_what_flash_attention_refuses(model, computing)
    runner, ids = make_runner(model, computing=computing), random_ids(90)
    expected = model(ids[None]).logits[0]
    torch.testing.assert_close(runner.prefill([Chunk(2, 0, ids[:80])])[0], expected[79], rtol=1e-4, atol=1e-4)
    for position in range(80, 90):
        logits = decode(runner, {2: (int(ids[position]), position)})[2]
        torch.testing.assert_close(logits, expected[position], rtol=1e-4, atol=1e-4)


def test_positions_advance_with_every_step(computing: Computing) -> None:
    model = make_model()
    runner, ids = make_runner(model, computing=computing), random_ids(30)
    expected = model(ids[None]).logits[0]
    runner.prefill([Chunk(0, 0, ids[:20])])
    runner.start_decoding(0, 20)
    for position in range(20, 30):
        runner.feed(0, ids[position : position + 1])
        logits = runner.decode(1, position + 1)
        torch.testing.assert_close(logits[0], expected[position], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cuts", [[1], [7, 8], [64], [1, 2, 3], list(range(1, 80, 13))])
def test_a_prompt_read_in_chunks_gives_the_same_logits_as_read_at_once(
    cuts: list[int], computing: Computing
) -> None:
    model = make_model()
    runner, ids = make_runner(model, computing=computing), random_ids(80)
    for start, end in zip([0, *cuts], [*cuts, 80], strict=True):
        logits = runner.prefill([Chunk(0, start, ids[start:end])])
    torch.testing.assert_close(logits[0], model(ids[None]).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_prompts_that_are_read_together_give_the_same_logits_as_alone(computing: Computing) -> None:
    model = make_model()
    runner = make_runner(model, rows=6, computing=computing)
    prompts = {4: random_ids(50, 4), 0: random_ids(7, 1), 2: random_ids(1, 2), 5: random_ids(129, 5)}
    runner.prefill([Chunk(4, 0, prompts[4][:20])])  # one of them has been read in part
    logits = runner.prefill(
        [Chunk(row, 20 if row == 4 else 0, ids[20 if row == 4 else 0 :]) for row, ids in prompts.items()]
    )
    for row, mine in zip(prompts, logits, strict=True):
        torch.testing.assert_close(mine, model(prompts[row][None]).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_requests_of_different_lengths_in_any_rows_do_not_affect_each_other(computing: Computing) -> None:
    model = make_model()
    runner = make_runner(model, rows=6, computing=computing)
    lengths = {5: 3, 0: 70, 3: 129}  # row: prompt length; the rows between are free
    prompts = {row: random_ids(length + 1, row) for row, length in lengths.items()}
    for row, ids in prompts.items():
        runner.prefill([Chunk(row, 0, ids[:-1])])
    logits = decode(runner, {row: (int(prompts[row][-1]), length) for row, length in lengths.items()})
    for row in lengths:
        expected = model(prompts[row][None]).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_decoding_keep_their_contents(computing: Computing) -> None:
    model = make_model()
    runner, ids = make_runner(model, computing=computing), random_ids(41)
    runner.prefill([Chunk(0, 0, ids[:40])])  # row 0 waits while row 1 decodes
    runner.prefill([Chunk(1, 0, random_ids(60, seed=3))])
    for position in range(60, 70):
        decode(runner, {1: (5, position)})
    expected = model(ids[None]).logits[0, -1]
    torch.testing.assert_close(decode(runner, {0: (int(ids[40]), 40)})[0], expected, rtol=1e-4, atol=1e-4)


def test_a_request_that_moves_to_another_row_continues_where_it_was(computing: Computing) -> None:
    model = make_model()
    runner, ids = make_runner(model, computing=computing), random_ids(42)
    expected = model(ids[None]).logits[0]
    runner.prefill([Chunk(3, 0, ids[:40])])
    runner.feed(3, ids[40:41])
    runner.start_decoding(3, 40)
    runner.decode(4, 41)
    runner.feed(3, ids[41:42])
    runner.rows.swap(3, 0, 41)
    runner.rows.vacate(3)
    torch.testing.assert_close(runner.decode(1, 42)[0], expected[41], rtol=1e-4, atol=1e-4)


def test_the_contents_of_an_earlier_request_in_a_row_have_no_effect(computing: Computing) -> None:
    model = make_model()
    runner, fresh = make_runner(model, computing=computing), make_runner(model, computing=computing)
    runner.prefill([Chunk(1, 0, random_ids(150, seed=7))])
    ids = random_ids(20)
    for r in (runner, fresh):
        r.prefill([Chunk(1, 0, ids[:-1])])
    last = {1: (int(ids[-1]), 19)}
    assert torch.equal(decode(runner, last)[1], decode(fresh, last)[1])


def test_the_last_position_that_a_request_reads_can_be_used(computing: Computing) -> None:
    model = make_model()
    runner, ids = make_runner(model, length=130, computing=computing), random_ids(129)
    runner.prefill([Chunk(3, 0, ids[:-1])])
    expected = model(ids[None]).logits[0, -1]
    logits = decode(runner, {3: (int(ids[-1]), 128)})[3]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_flash_attention_reads_each_row_to_its_own_length() -> None:
    """With one row of 4,000 tokens and 31 of 200, a step reads no position behind a row's last token."""
    model = make_model(num_hidden_layers=1, max_position_embeddings=4096)
    runner = make_runner(model, rows=32, length=4096, computing="flash")
    lengths = [4000, *[200] * 31]
    for row, length in enumerate(lengths):
        runner.start_decoding(row, length - 1)
    positions_read.total = 0
    runner.decode(32, max(lengths))
    assert positions_read.total == sum(lengths)


def test_flash_attention_reads_nothing_for_rows_that_are_not_decoding() -> None:
    """A captured graph has more rows than the batch, and a prompt may be read in part."""
    runner = make_runner(make_model(num_hidden_layers=1), rows=8, computing="flash")
    runner.start_decoding(3, 49)
    positions_read.total = 0
    runner.decode(8, 50)
    assert positions_read.total == 50


def test_positions_that_flash_attention_does_not_read_may_be_nan() -> None:
    model = make_model()
    runner, ids = make_runner(model, computing="flash"), random_ids(41)
    for layer in runner.rows.cache.layers:
        layer.fill_(float("nan"))
    expected = model(ids[None]).logits[0, -1]
    runner.prefill([Chunk(2, 0, ids[:30])])
    runner.prefill([Chunk(2, 30, ids[30:40]), Chunk(0, 0, random_ids(5))])
    torch.testing.assert_close(decode(runner, {2: (int(ids[40]), 40)})[2], expected, rtol=1e-4, atol=1e-4)


class Adapted(torch.nn.Module):
    """A layer with an adapter, which is no longer a plain linear layer."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(x)
        return output


def test_layers_that_are_not_plain_are_called_unchanged(computing: Computing) -> None:
    model = make_model(attention_bias=True)
    ids = random_ids(30)
    expected = model(ids[None]).logits[0, -1]
    for layer in model.model.layers:
        layer.self_attn.k_proj = Adapted(layer.self_attn.k_proj)
        layer.mlp.up_proj = Adapted(layer.mlp.up_proj)
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    runner = make_runner(model, computing=computing)
    runner.prefill([Chunk(0, 0, ids[:-1])])
    logits = decode(runner, {0: (int(ids[-1]), 29)})[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


SIXTEEN_BITS = {
    "small": {},
    "biases": VARIANTS["biases"],
    "tied embeddings": VARIANTS["tied embeddings"],
    "another activation": VARIANTS["another activation"],
    "sizes that are not multiples of 8": VARIANTS["sizes that are not multiples of 8"],
    "sizes of the packed layout": {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 128},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overrides", SIXTEEN_BITS.values(), ids=SIXTEEN_BITS.keys())
def test_with_16_bit_weights_the_logits_are_close_to_the_exact_ones(
    dtype: torch.dtype, overrides: dict[str, object], computing: Computing
) -> None:
    ids = random_ids(60)
    model = make_model(**overrides).to(dtype)
    skip_what_flash_attention_refuses(model, computing)
    exact = copy.deepcopy(model).float()(ids[None]).logits[0, -1]
    runner = make_runner(model, computing=computing)
    runner.prefill([Chunk(0, 0, ids[:-9])])
    runner.prefill([Chunk(0, 51, ids[51:-1])])
    step = decode(runner, {0: (int(ids[-1]), 59)})[0]
    own_error = (model(ids[None]).logits[0, -1].float() - exact).norm()
    # Keys and values are rounded to 16 bits and, on some CPUs, every result in a layer, as in the model itself.
    assert (step - exact).norm() < 1.5 * own_error


def test_weights_beyond_the_range_of_float16_are_not_clipped(computing: Computing) -> None:
    model = make_model()
    model.lm_head.weight *= 1e6
    model = model.to(torch.bfloat16)
    ids = random_ids(20)
    exact = copy.deepcopy(model).float()(ids[None]).logits[0, -1]
    logits = make_runner(model, computing=computing).prefill([Chunk(0, 0, ids)])[0]
    assert (logits - exact).norm() < 0.1 * exact.norm()


def test_capturing_a_step_without_a_gpu_is_an_error() -> None:
    with pytest.raises(EngineNotStarted, match="^E3010 EngineNotStarted: .*Expected a cuda device"):
        make_runner(make_model()).capture()


def test_deleting_a_runner_frees_its_cache() -> None:
    """The cache is freed immediately, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        runner = make_runner(make_model())
        decode(runner, {0: (5, 0)})
        gone = weakref.ref(runner.rows.cache)
        del runner
        assert gone() is None
    finally:
        gc.enable()
