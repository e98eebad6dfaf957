"""Which precision fits which GPUs, against figures worked out by hand."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import LLAMA_2_TOKENIZER
from transformers import LlamaConfig

from llama.errors import BadSettings, DoesNotFit
from llama.loader import empty_model, load_config
from llama.operations import table
from llama.plan import (
    LLAMA_2_70B,
    RESERVE,
    Gpu,
    bytes_of_weights,
    bytes_per_token,
    parallel_sizes,
    pick,
    plan,
)
from llama.quantization import quantize, to_stored

CONTEXT = 4096
HOPPER, AMPERE, TURING, PASCAL = (9, 0), (8, 0), (7, 5), (6, 1)


def gpus(*gigabytes: int, capability: tuple[int, int] = HOPPER) -> list[Gpu]:
    return [Gpu(f"a GPU of {size} GB", size * 10**9, capability) for size in gigabytes]


@pytest.mark.parametrize(
    ("quantization", "gigabytes"), [("none", 137.95), ("fp8", 69.53), ("int8", 69.53), ("nf4", 39.55)]
)
def test_the_70b_takes_the_bytes_that_the_docstring_works_out(quantization: str, gigabytes: float) -> None:
    assert bytes_of_weights(LLAMA_2_70B, quantization) / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_a_request_of_4096_tokens_takes_1_34_gigabytes() -> None:
    assert CONTEXT * bytes_per_token(LLAMA_2_70B, torch.bfloat16) == 1_342_177_280


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", ["none", "fp8", "int8", "nf4"])
def test_planned_bytes_are_those_that_a_model_has(quantization: str, tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    total = 0
    for name, module in empty_model(config, torch.device("cpu")).named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = torch.randn(module.weight.shape).bfloat16()
            stored = to_stored(quantize(weight, None, quantization, torch.float32))
            # NF4's table and what describes a layer have one size for all layers, which is next to nothing.
            total += sum(
                t.nbytes for n, t in stored.items() if not re.search("quant_map|quant_state|format", n)
            )
        elif not (tied and name == "lm_head"):
            total += sum(2 * p.numel() for p in module.parameters(recurse=False))
    assert bytes_of_weights(config, quantization) == total


@pytest.mark.parametrize(
    ("cards", "requests", "auto"),
    [
        # requests at once in 16 bits, FP8, int8 and NF4; None: does not fit
        (gpus(24), (None, None, None, None), None),
        (gpus(40), (None, None, None, None), None),
        (gpus(48), (None, None, None, 3), "nf4"),
        (gpus(80), (None, 5, 5, 27), "nf4"),
        (gpus(85), (None, 9, 9, 31), "fp8"),
        (gpus(85, capability=AMPERE), (None, None, 9, 31), "int8"),
        (gpus(141), (None, 50, 50, 73), "fp8"),
        (gpus(192), (37, 88, 88, 111), "none"),
        (gpus(24, 24), (None, None, None, None), None),
        (gpus(48, 48), (None, 16, None, None), "fp8"),
        (gpus(80, 80), (13, 64, None, None), "none"),
        (gpus(80, 80, capability=AMPERE), (13, None, None, None), "none"),
        (gpus(24, 24, 24, 24), (None, 13, None, None), "fp8"),
        # The smaller card bounds both.
        (gpus(80, 48), (None, 16, None, None), "fp8"),
        (gpus(*[141] * 8), (724, 775, None, None), "none"),
        (gpus(80, capability=PASCAL), (None, None, None, None), None),
        (gpus(48, capability=TURING), (None, None, None, 3), "nf4"),
    ],
)
def test_the_70b_on_every_kind_of_machine(
    cards: list[Gpu], requests: tuple[int | None, ...], auto: str | None
) -> None:
    table = plan(LLAMA_2_70B, cards, context=CONTEXT)
    assert [choice.quantization for choice in table.choices] == ["none", "fp8", "int8", "nf4"]
    assert tuple(None if choice.refusal else choice.requests for choice in table.choices) == requests
    assert (table.auto and table.auto.quantization) == auto
    assert {choice.engine for choice in table.choices} == {"torch" if len(cards) == 1 else "vllm"}


def test_weights_cache_and_reserve_are_what_the_card_has() -> None:
    (*_, nf4) = plan(LLAMA_2_70B, gpus(80), context=CONTEXT).choices
    assert nf4.weights + nf4.cache + RESERVE["torch"] == 80 * 10**9


def test_a_shorter_context_leaves_room_for_more_requests() -> None:
    (*_, nf4) = plan(LLAMA_2_70B, gpus(48), context=1024).choices
    assert nf4.requests == 15


def test_a_checkpoint_stays_as_it_is_stored() -> None:
    table = plan(LLAMA_2_70B, gpus(192), context=CONTEXT, stored="nf4")
    assert [choice.quantization for choice in table.choices] == ["nf4"]
    assert table.auto is not None
    assert table.auto.quantization == "nf4"


@pytest.mark.parametrize(
    ("card", "wanted", "stored", "words"),
    [
        (gpus(24), "auto", "none", "nothing fits: .*take a GPU with 44 GB free .nf4"),
        (gpus(48), "int8", "none", "int8 on a GPU of 48 GB: needs 69.5 GB .*; set LLAMA_QUANTIZATION to nf4"),
        (gpus(80, capability=AMPERE), "fp8", "none", "needs compute capability 8.9 and has 8.0"),
        (gpus(80), "none", "none", "set LLAMA_QUANTIZATION to fp8 or int8 or nf4"),
        (gpus(48), "auto", "int8", "take a GPU with 74 GB free .int8"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    card: list[Gpu], wanted: str, stored: str, words: str
) -> None:
    with pytest.raises(DoesNotFit, match=f"^E3005 DoesNotFit: .*{words}"):
        pick(LLAMA_2_70B, card, wanted, context=CONTEXT, stored=stored)


@pytest.mark.parametrize(("wanted", "taken"), [("auto", "nf4"), ("int8", "int8"), ("fp8", "fp8")])
def test_what_fits_is_taken(wanted: str, taken: str) -> None:
    assert pick(LLAMA_2_70B, gpus(80), wanted, context=CONTEXT, stored="none") == taken


def test_vllm_on_one_gpu_is_not_given_what_it_cannot_read() -> None:
    card = gpus(85)
    assert pick(LLAMA_2_70B, card, "auto", context=CONTEXT, stored="none", engine="vllm") == "fp8"
    with pytest.raises(
        DoesNotFit, match="int8 on a GPU of 85 GB: is not for vLLM.*; set LLAMA_QUANTIZATION to fp8"
    ):
        pick(LLAMA_2_70B, card, "int8", context=CONTEXT, stored="none", engine="vllm")
    with pytest.raises(DoesNotFit, match="nothing fits"):
        pick(LLAMA_2_70B, gpus(48), "auto", context=CONTEXT, stored="none", engine="vllm")


@pytest.mark.skipif(not LLAMA_2_TOKENIZER.is_dir(), reason="the 70B's configuration is not in this checkout")
def test_the_built_in_configuration_is_the_70b_s() -> None:
    published = load_config(LLAMA_2_TOKENIZER)
    for name in LLAMA_2_70B.to_diff_dict():
        if name not in ("dtype", "transformers_version", "architectures"):
            assert getattr(published, name) == getattr(LLAMA_2_70B, name), name


@pytest.mark.parametrize(
    ("gpus", "asked", "sizes"),
    [
        (0, {}, (1, 1)),
        (1, {}, (1, 1)),
        (2, {}, (1, 2)),
        (4, {}, (1, 4)),
        (6, {}, (3, 2)),  # 6 does not divide 64 heads
        (8, {}, (1, 8)),
        (8, {"pipeline": 2}, (2, 4)),
        (8, {"tensor": 2}, (4, 2)),
        (8, {"tensor": 8, "pipeline": 2}, (2, 8)),  # two machines
    ],
)
def test_all_gpus_of_a_machine_are_used_tensor_first(
    gpus: int, asked: dict[str, int], sizes: tuple[int, int]
) -> None:
    assert parallel_sizes(LLAMA_2_70B, gpus, **{"tensor": None, "pipeline": None, **asked}) == sizes


def test_a_tensor_size_that_does_not_divide_the_heads_is_refused() -> None:
    with pytest.raises(BadSettings, match="^E3000 BadSettings: LLAMA_TENSOR_PARALLEL is 3 and .* 64 heads"):
        parallel_sizes(LLAMA_2_70B, 3, tensor=3, pipeline=None)


def test_the_table_has_a_row_a_choice() -> None:
    lines = table(plan(LLAMA_2_70B, gpus(80), context=CONTEXT), CONTEXT).splitlines()
    assert [line.split()[0] for line in lines] == ["precision", "16", "fp8", "int8", "nf4"]
    assert "needs 138.0 GB for weights and has 76.8" in lines[1]
    assert lines[4].endswith("torch   what auto takes")
