"""Which precision fits which GPUs, compared with figures calculated by hand."""

from __future__ import annotations

import re
from typing import Literal

import pytest
import torch
from small_models import LLAMA_2_TOKENIZER
from transformers import LlamaConfig
from typer.testing import CliRunner

from llama import ROOT
from llama.cli.main import app
from llama.cli.plan import table
from llama.errors import BadSettings, DoesNotFit
from llama.model.config import load_config
from llama.model.loader import empty_model
from llama.model.parallel_sizes import parallel_sizes
from llama.model.precision_plan import (
    LLAMA_2_70B,
    RESERVE,
    Gpu,
    Planner,
    bytes_of_weights,
    bytes_per_token,
)
from llama.model.quantized_layers import Quantization, quantize, to_stored

CONTEXT = 4096
HOPPER, AMPERE, TURING, PASCAL = (9, 0), (8, 0), (7, 5), (6, 1)


def planner(cards: list[Gpu], config: LlamaConfig = LLAMA_2_70B, **more: object) -> Planner:
    engine = "torch" if len(cards) == 1 else "vllm"
    return Planner(**{"config": config, "gpus": tuple(cards), "context": CONTEXT, "engine": engine, **more})


def gpus(*gigabytes: int, capability: tuple[int, int] = HOPPER) -> list[Gpu]:
    return [Gpu(f"a GPU of {size} GB", size * 10**9, capability) for size in gigabytes]


@pytest.mark.parametrize(
    ("quantization", "gigabytes"), [("none", 137.95), ("fp8", 69.53), ("int8", 69.53), ("nf4", 39.55)]
)
def test_the_70b_takes_the_bytes_that_the_docstring_states(
    quantization: Quantization, gigabytes: float
) -> None:
    assert bytes_of_weights(LLAMA_2_70B, quantization) / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_a_request_of_4096_tokens_takes_1_34_gigabytes_of_cache() -> None:
    assert CONTEXT * bytes_per_token(LLAMA_2_70B, torch.bfloat16) == 1_342_177_280


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantization", ["none", "fp8", "int8", "nf4"])
def test_the_planned_bytes_equal_the_bytes_of_a_real_model(quantization: Quantization, tied: bool) -> None:
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
            # NF4's table and the description of a layer have a small constant size, which is not planned.
            total += sum(
                t.nbytes for n, t in stored.items() if not re.search("quant_map|quant_state|format", n)
            )
        elif not (tied and name == "lm_head"):
            total += sum(2 * p.numel() for p in module.parameters(recurse=False))
    assert bytes_of_weights(config, quantization) == total


@pytest.mark.parametrize(
    ("cards", "requests", "auto"),
    [
        # Concurrent requests in 16 bits, FP8, int8 and NF4. None: the weights do not fit.
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
        # The smaller GPU limits both.
        (gpus(80, 48), (None, 16, None, None), "fp8"),
        (gpus(*[141] * 8), (724, 775, None, None), "none"),
        (gpus(80, capability=PASCAL), (None, None, None, None), None),
        (gpus(48, capability=TURING), (None, None, None, 3), "nf4"),
    ],
)
def test_the_plan_of_the_70b_on_many_machines(
    cards: list[Gpu], requests: tuple[int | None, ...], auto: str | None
) -> None:
    table = planner(cards).plan()
    assert [choice.quantization for choice in table.choices] == ["none", "fp8", "int8", "nf4"]
    assert tuple(None if choice.refusal else choice.requests for choice in table.choices) == requests
    assert (table.chosen and table.chosen.quantization) == auto


def test_weights_cache_and_reserve_add_up_to_the_free_memory() -> None:
    (*_, nf4) = planner(gpus(80)).plan().choices
    assert nf4.weights + nf4.cache + RESERVE["torch"] == 80 * 10**9


def test_more_requests_of_a_shorter_context_fit() -> None:
    (*_, nf4) = planner(gpus(48), context=1024).plan().choices
    assert nf4.requests == 15


def test_a_quantized_checkpoint_is_planned_only_in_its_stored_precision() -> None:
    table = planner(gpus(192), stored="nf4").plan()
    assert [choice.quantization for choice in table.choices] == ["nf4"]
    assert table.chosen is not None
    assert table.chosen.quantization == "nf4"


@pytest.mark.parametrize(
    ("card", "wanted", "stored", "words"),
    [
        (gpus(24), "auto", "none", "no precision fits on .*on a GPU with 44 GB free .for 'nf4'"),
        (
            gpus(48),
            "int8",
            "none",
            "LLAMA_QUANTIZATION is int8, which cannot be served on a GPU of 48 GB: it needs 69.5 GB .*; "
            "set LLAMA_QUANTIZATION to nf4",
        ),
        (gpus(80, capability=AMPERE), "fp8", "none", "needs compute capability 8.9 .the GPU has 8.0."),
        (gpus(80), "none", "none", "set LLAMA_QUANTIZATION to fp8 or int8 or nf4"),
        (gpus(48), "auto", "int8", "on a GPU with 74 GB free .for 'int8'"),
    ],
)
def test_the_refusal_of_a_precision_names_what_would_fit(
    card: list[Gpu], wanted: Quantization | Literal["auto"], stored: Quantization, words: str
) -> None:
    with pytest.raises(DoesNotFit, match=f"^E3005 DoesNotFit: .*{words}"):
        planner(card, stored=stored).pick(wanted)


@pytest.mark.parametrize(("wanted", "taken"), [("auto", "nf4"), ("int8", "int8"), ("fp8", "fp8")])
def test_a_precision_that_fits_is_picked(wanted: Quantization | Literal["auto"], taken: Quantization) -> None:
    assert planner(gpus(80)).pick(wanted) == taken


def test_int8_and_nf4_are_not_picked_for_vllm() -> None:
    card = gpus(85)
    assert planner(card, engine="vllm").pick("auto") == "fp8"
    with pytest.raises(
        DoesNotFit, match="on a GPU of 85 GB: it is not supported by vLLM.*; set LLAMA_QUANTIZATION to fp8"
    ):
        planner(card, engine="vllm").pick("int8")
    with pytest.raises(DoesNotFit, match="no precision fits"):
        planner(gpus(48), engine="vllm").pick("auto")


@pytest.mark.skipif(not LLAMA_2_TOKENIZER.is_dir(), reason="the 70B's configuration is not in this checkout")
def test_the_built_in_configuration_equals_the_published_one() -> None:
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
def test_all_gpus_are_used_by_tensor_parallelism_first(
    gpus: int, asked: dict[str, int], sizes: tuple[int, int]
) -> None:
    assert parallel_sizes(LLAMA_2_70B, gpus, **{"tensor": None, "pipeline": None, **asked}) == sizes


def test_a_tensor_size_that_does_not_divide_the_heads_is_refused() -> None:
    with pytest.raises(
        BadSettings, match="^E3000 BadSettings: LLAMA_TENSOR_PARALLEL is 3, but .* 64 attention heads"
    ):
        parallel_sizes(LLAMA_2_70B, 3, tensor=3, pipeline=None)


LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)


def test_weights_and_cache_of_a_7b_in_float32_take_twice_the_bytes() -> None:
    assert bytes_of_weights(LLAMA_2_7B, "none") == 2 * 6_738_415_616
    assert bytes_of_weights(LLAMA_2_7B, "none", torch.float32) == 4 * 6_738_415_616
    wide, narrow = (
        planner(gpus(48), LLAMA_2_7B, dtype=dtype).plan().choices[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (wide.weights / 1e9, narrow.weights / 1e9) == pytest.approx((27.0, 13.5), abs=0.05)
    assert (wide.requests, narrow.requests) == (4, 14)


def test_unquantized_weights_are_counted_in_their_dtype() -> None:
    tables = 2 * LLAMA_2_7B.vocab_size * LLAMA_2_7B.hidden_size + 65 * LLAMA_2_7B.hidden_size
    wide, narrow = (bytes_of_weights(LLAMA_2_7B, "nf4", d) for d in (torch.float32, torch.bfloat16))
    assert wide - narrow == 2 * tables


def test_the_torch_engine_is_planned_in_the_dtype_that_is_set() -> None:
    card = gpus(24)
    assert planner(card, LLAMA_2_7B).pick("none") == "none"
    with pytest.raises(DoesNotFit, match="needs 27.0 GB for weights"):
        planner(card, LLAMA_2_7B, dtype=torch.float32).pick("none")


def test_the_table_shows_how_many_requests_fit_beyond_the_servers_limit() -> None:
    large = planner(gpus(149))
    assert "  32 (56 fit)  " in table(large.plan(), large, 32).splitlines()[2]
    assert "  56  " in table(large.plan(), large, 56).splitlines()[2]


def rows_of(document: str, columns: int) -> list[list[str]]:
    text = (ROOT / "docs" / document).read_text("utf-8")
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if len(line) == columns]


@pytest.mark.parametrize(("document", "sizes"), [("deploy.md", 1), ("scale.md", 0)])
def test_the_tables_of_the_documents_agree_with_plan(document: str, sizes: int) -> None:
    rows = [row for row in rows_of(document, 5) if re.fullmatch(r"[\d,]+( GB)?", row[sizes])]
    assert len(rows) >= 7
    for row in rows:
        if document == "deploy.md":
            capability, precision, requests = "8.0" if "A100" in row[0] else "9.0", row[2], row[4]
        else:
            _, capability, precision, requests, _ = row
        command = ["plan", "--gpus", row[sizes].removesuffix(" GB"), "--capability", capability]
        result = CliRunner().invoke(app, command)
        chosen = [line for line in result.stdout.splitlines() if line.endswith("chosen")]
        if precision == "none fits":
            assert (result.exit_code, chosen) == (1, [])
        else:
            cells = re.split(r"  +", chosen[0])
            assert (result.exit_code, cells[0], cells[3]) == (0, precision, requests), row


def test_the_table_has_one_row_per_precision() -> None:
    lines = table(planner(gpus(80)).plan(), planner(gpus(80)), 32).splitlines()
    assert [line.split()[0] for line in lines] == ["precision", "16", "fp8", "int8", "nf4"]
    assert "needs 138.0 GB for weights (76.8 GB available)" in lines[1]
    assert lines[4].endswith("torch   chosen")
