"""Which precision fits which GPUs, compared with figures calculated by hand."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
import torch
from small_models import LLAMA_2_TOKENIZER
from transformers import LlamaConfig
from typer.testing import CliRunner

from llama import ROOT
from llama.cli.main import app
from llama.cli.plan import table_cells
from llama.errors import BadSettings, DoesNotFit
from llama.model.config import load_config
from llama.model.fp8_linear import refusals_of_fp8
from llama.model.gpu_reserve import gpu_reserve
from llama.model.loader import empty_model
from llama.model.parallel_sizes import parallel_sizes
from llama.model.placement import has_flash_attention
from llama.model.precision_plan import (
    LLAMA_2_70B,
    VLLM_RESERVE,
    Gpu,
    Planner,
    bytes_of_weights,
    bytes_per_token,
)
from llama.model.quantized_layers import Quantization, quantize, to_stored

CONTEXT = 4096
HOPPER, AMPERE, TURING, PASCAL = (9, 0), (8, 0), (7, 5), (6, 1)
ADA, BLACKWELL, WORKSTATION_BLACKWELL = (8, 9), (10, 0), (12, 0)


def planner(cards: list[Gpu], config: LlamaConfig = LLAMA_2_70B, **more: Any) -> Planner:
    capability = min(card.capability for card in cards)
    dtype = more.pop("dtype", torch.bfloat16 if capability >= AMPERE else torch.float16)
    settings = {
        "context": CONTEXT,
        "rows": 32,
        "engine": "torch" if len(cards) == 1 else "vllm",
        "flash_attention": has_flash_attention(config, dtype, capability),
    }
    return Planner(config=config, gpus=tuple(cards), dtype=dtype, **{**settings, **more})


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
        (gpus(24, capability=ADA), (None, None, None, None), None),
        (gpus(40, capability=AMPERE), (None, None, None, None), None),
        (gpus(48, capability=ADA), (None, None, None, 4), "nf4"),
        (gpus(72), (None, None, None, 21), "nf4"),
        # Six requests of 4,096 tokens are twelve of 2,048.
        (gpus(80), (None, 6, 6, 27), "fp8"),
        (gpus(85), (None, 10, 9, 31), "fp8"),
        (gpus(80, capability=AMPERE), (None, None, 6, 27), "nf4"),
        (gpus(85, capability=AMPERE), (None, None, 9, 31), "nf4"),
        (gpus(102, capability=WORKSTATION_BLACKWELL), (None, 22, 22, 44), "fp8"),
        (gpus(141), (1, 51, 51, 73), "fp8"),
        (gpus(192, capability=BLACKWELL), (39, 89, 89, 111), "none"),
        (gpus(24, 24), (None, None, None, None), None),
        (gpus(48, 48), (None, 16, None, None), "fp8"),
        (gpus(80, 80), (13, 64, None, None), "none"),
        (gpus(80, 80, capability=AMPERE), (13, None, None, None), "none"),
        (gpus(24, 24, 24, 24), (None, 13, None, None), "fp8"),
        # The smaller GPU limits both.
        (gpus(80, 48), (None, 16, None, None), "fp8"),
        (gpus(*[141] * 8), (724, 775, None, None), "none"),
        (gpus(80, capability=PASCAL), (None, None, None, None), None),
        # Without flash attention, graphs for several lengths take 5 GB more.
        (gpus(48, capability=TURING), (None, None, None, None), None),
        (gpus(52, capability=TURING), (None, None, None, 3), "nf4"),
    ],
)
def test_the_plan_of_the_70b_on_many_machines(
    cards: list[Gpu], requests: tuple[int | None, ...], auto: str | None
) -> None:
    table = planner(cards).plan()
    assert [choice.quantization for choice in table.choices] == ["none", "fp8", "int8", "nf4"]
    assert tuple(None if choice.refusal else choice.requests for choice in table.choices) == requests
    assert (table.chosen and table.chosen.quantization) == auto


SMALL_MODELS = {
    "Llama 2 7B": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    ),
    "Llama 2 13B": LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        max_position_embeddings=4096,
    ),
}


@pytest.mark.parametrize(
    ("model", "gigabytes", "capability", "auto"),
    [
        ("Llama 2 7B", 15.6, TURING, "nf4"),  # T4
        ("Llama 2 7B", 24, ADA, "fp8"),  # L4
        ("Llama 2 7B", 24, (8, 6), "nf4"),  # A10
        ("Llama 2 7B", 32, WORKSTATION_BLACKWELL, "none"),  # RTX 5090
        ("Llama 2 7B", 42, AMPERE, "none"),  # A100 with 40 GB
        ("Llama 2 13B", 24, ADA, "nf4"),
        ("Llama 2 13B", 42, AMPERE, "nf4"),
        ("Llama 2 13B", 48, ADA, "fp8"),
        ("Llama 2 13B", 85, HOPPER, "none"),
    ],
)
def test_fp8_is_preferred_on_gpus_that_have_it_and_nf4_to_int8_elsewhere(
    model: str, gigabytes: float, capability: tuple[int, int], auto: str
) -> None:
    card = Gpu("a GPU", int(gigabytes * 1e9), capability)
    assert planner([card], SMALL_MODELS[model]).pick("auto") == auto


def test_a_quantized_precision_needs_room_for_eight_requests_of_at_most_2048_tokens() -> None:
    request = 2048 * bytes_per_token(LLAMA_2_70B, torch.bfloat16)
    needed = planner(gpus(80)).plan().choices[1]
    for context in (2048, 4096):
        just = 80 * 10**9 - needed.cache + 8 * request
        enough, less = (
            planner([Gpu("a GPU", free, HOPPER)], context=context).plan().chosen
            for free in (just, just - 10**8)
        )
        assert (enough and enough.quantization, less and less.quantization) == ("fp8", "nf4"), context


@pytest.mark.parametrize("quantization", ["none", "fp8", "int8", "nf4"])
def test_weights_cache_and_reserve_add_up_to_the_free_memory(quantization: Quantization) -> None:
    (option,) = (c for c in planner(gpus(192)).plan().choices if c.quantization == quantization)
    reserve = gpu_reserve(
        LLAMA_2_70B, quantization, torch.bfloat16, rows=32, context=CONTEXT, flash_attention=True
    )
    assert option.weights + option.cache + reserve.total == 192 * 10**9


def test_vllm_has_a_reserve_of_its_own() -> None:
    fp8 = planner(gpus(85), engine="vllm").plan().choices[1]
    assert fp8.weights + fp8.cache + VLLM_RESERVE == 85 * 10**9


def odd(**widths: int) -> LlamaConfig:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_hidden_layers": 1}
    return LlamaConfig(**{**sizes, **widths})


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (LLAMA_2_70B, None),
        (SMALL_MODELS["Llama 2 7B"], None),
        (odd(), None),
        (odd(intermediate_size=520), 520),
        (odd(hidden_size=520, head_dim=64), 520),
        (odd(num_attention_heads=4, head_dim=100, num_key_value_heads=4), None),
        (odd(num_attention_heads=2, head_dim=100, num_key_value_heads=2), 200),
        # 64 outputs of queries are a multiple of 16, and so are 64 + 2 x 8 of queries, keys and values.
        (odd(head_dim=8, num_key_value_heads=1), None),
        (odd(head_dim=4, num_key_value_heads=1), 40),
    ],
)
def test_a_width_that_is_not_a_multiple_of_16_is_found(config: LlamaConfig, width: int | None) -> None:
    reasons = [*refusals_of_fp8(config, HOPPER)]
    assert reasons == (
        [] if width is None else [f"needs widths that are multiples of 16 (a layer has {width})"]
    )


@pytest.mark.parametrize("capability", [(10, 3), (12, 1)])
def test_fp8_is_refused_on_gpus_for_which_the_images_torch_has_no_kernel(capability: tuple[int, int]) -> None:
    plan = planner(gpus(121, capability=capability)).plan()
    refusals = {choice.quantization: choice.refusal for choice in plan.choices}
    assert (
        refusals["fp8"]
        == f"is not supported on compute capability {capability[0]}.{capability[1]} by torch 2.11"
    )
    assert plan.chosen is not None
    assert plan.chosen.quantization in ("int8", "nf4")


def test_fp8_is_refused_for_a_width_that_torch_cannot_multiply() -> None:
    reason = r"needs widths that are multiples of 16 \(a layer has 520\)"
    found = planner(gpus(24), odd(intermediate_size=520))
    refusals = {choice.quantization: choice.refusal for choice in found.plan().choices}
    assert re.fullmatch(reason, refusals.pop("fp8"))
    assert set(refusals.values()) == {""}
    with pytest.raises(
        DoesNotFit, match=f"LLAMA_QUANTIZATION is fp8, .* it {reason}; set .* to none or int8"
    ):
        found.pick("fp8")
    stored = planner(gpus(24), odd(intermediate_size=520), stored="fp8")
    with pytest.raises(DoesNotFit, match=f"'fp8' {reason}; use weights that are unquantized, or in"):
        stored.pick("auto")
    assert planner(gpus(24), odd(intermediate_size=520), engine="vllm").pick("fp8") == "fp8"


def test_more_requests_of_a_shorter_context_fit() -> None:
    (*_, nf4) = planner(gpus(48), context=1024).plan().choices
    assert nf4.requests == 16
    assert planner(gpus(48), context=1024, rows=8).plan().choices[-1].requests == 17


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
        (gpus(85, capability=AMPERE), "auto", "fp8", "; use weights that are unquantized, or in "),
    ],
)
def test_the_refusal_of_a_precision_names_what_would_fit(
    card: list[Gpu], wanted: Quantization | Literal["auto"], stored: Quantization, words: str
) -> None:
    with pytest.raises(DoesNotFit, match=f"^E3005 DoesNotFit: .*{words}"):
        planner(card, stored=stored).pick(wanted)


@pytest.mark.parametrize(("wanted", "taken"), [("auto", "fp8"), ("int8", "int8"), ("nf4", "nf4")])
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


LLAMA_2_7B = SMALL_MODELS["Llama 2 7B"]


def test_weights_and_cache_of_a_7b_in_float32_take_twice_the_bytes() -> None:
    assert bytes_of_weights(LLAMA_2_7B, "none") == 2 * 6_738_415_616
    assert bytes_of_weights(LLAMA_2_7B, "none", torch.float32) == 4 * 6_738_415_616
    wide, narrow = (
        planner(gpus(48), LLAMA_2_7B, dtype=dtype).plan().choices[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (wide.weights / 1e9, narrow.weights / 1e9) == pytest.approx((27.0, 13.5), abs=0.05)
    assert (wide.requests, narrow.requests) == (4, 15)


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
    for rows, cell in ((32, "32 (57 fit)"), (57, "57")):
        large = planner(gpus(149), rows=rows)
        assert table_cells(large.plan(), large)[2][3] == cell


CAPABILITIES = {"24 GB": "8.9", "L40S": "8.9", "A100": "8.0", "H100": "9.0", "H200": "9.0", "B200": "10.0"}


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
            (capability,) = {c for name, c in CAPABILITIES.items() if row[0].startswith(name)}
            precision, requests = row[2], row[4]
        else:
            _, capability, precision, requests, _ = row
        command = ["plan", "--gpus", row[sizes].removesuffix(" GB"), "--capability", capability]
        result = CliRunner().invoke(app, command)
        chosen = [line for line in result.stdout.splitlines() if "  chosen: " in line]
        if precision == "none fits":
            assert (result.exit_code, chosen) == (1, [])
        else:
            cells = re.split(r"  +", chosen[0])
            assert (result.exit_code, cells[0], cells[3]) == (0, precision, requests), row


def test_the_table_has_one_row_per_precision() -> None:
    cells = table_cells(planner(gpus(80)).plan(), planner(gpus(80)))
    assert [row[0] for row in cells] == ["precision", "16 bits", "fp8", "int8", "nf4"]
    assert cells[1][-1] == "needs 138.0 GB for weights (78.6 GB available)"
    assert cells[2][-1].startswith("chosen: ")


def test_without_graphs_more_memory_is_left_for_the_cache() -> None:
    with_graphs, without = (planner(gpus(80), cuda_graphs=used).plan() for used in (True, False))
    reserve = gpu_reserve(LLAMA_2_70B, "fp8", torch.bfloat16, rows=32, context=CONTEXT, flash_attention=True)
    more = [b.cache - a.cache for a, b in zip(with_graphs.choices, without.choices, strict=True)]
    assert more[1] == reserve.graphs > 10**9
