"""The engine's GPU code on fake CUDA tensors: devices, types, waits for the GPU, and memory.

Nothing is computed and no GPU is needed. What is replaced in torch is restored at the end of each test.
"""

# mypy: disable-error-code="no-untyped-call"
# Many internals of torch have no types.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fake_cuda.cases import CASES, DRAWN, EVERY_RULE, FLASH_CASES, GREEDY, TWO_PRODUCT_CASES, Case
from fake_cuda.models import (
    BIASED,
    SMALL,
    Step,
    llama_2_70b,
    load,
    placement_of,
    step_for,
    step_of,
    tensors_of,
    token_ids,
)
from fake_cuda.patches import (
    CUDA,
    TorchChanged,
    check_behaviour,
    check_internals,
    guard_registry,
    new_fake_mode,
)
from fake_cuda.session import fake_cuda
from torch import Tensor
from transformers import LlamaConfig

from llama.model.gpu_reserve import graph_shapes
from llama.model.precision_plan import bytes_of_weights
from llama.model.quantized_layers import Quantization
from llama.torch_engine.attention import Chunk
from llama.torch_engine.layers import Norm, take_apart

DEVICE = torch.device("cuda:0")
ROWS = 32
Uploads = set[tuple[str, str]]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def step_in(case: Case, config: LlamaConfig, rows: int = 4) -> Step:
    placement = placement_of(config, quantization=case.quantization, dtype=case.dtype)
    return step_of(config, placement, rows, config.max_position_embeddings)


def test_a_changed_internal_of_torch_is_named() -> None:
    with pytest.raises(TorchChanged) as raised:
        check_internals("torch.cuda.CUDAGraph torch.cuda.no_such_function")
    assert str(raised.value) == (
        f"torch {torch.__version__}: torch.cuda.no_such_function does not exist; update tests/fake_cuda/patches.py"
    )


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="a CUDA build has a device guard")
def test_a_changed_behaviour_of_torch_is_named() -> None:
    with new_fake_mode(), pytest.raises(TorchChanged, match="a row of a fake CUDA tensor cannot be selected"):
        check_behaviour()  # without the guard


def test_everything_that_was_replaced_is_restored() -> None:
    names = ("CUDAGraph", "graph", "synchronize", "mem_get_info", "is_available")
    before = [getattr(torch.cuda, name) for name in names]
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    with fake_cuda():
        torch.zeros(2, 2, device="cuda:0")[0]
        torch.backends.cuda.enable_cudnn_sdp(not cudnn)
    assert [getattr(torch.cuda, name) for name in names] == before
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    assert not torch.cuda.is_initialized()
    if not torch.backends.cuda.is_built():
        assert guard_registry()[CUDA] is None


def test_flash_attention_runs_where_the_gpu_and_the_type_allow_it() -> None:
    for case in CASES:
        with fake_cuda(case.card):
            placement = placement_of(SMALL, quantization=case.quantization, dtype=case.dtype)
        assert placement.flash_attention == (case in FLASH_CASES)


@pytest.mark.parametrize("config", [SMALL, BIASED], ids=["small", "biased"])
@every_case
def test_everything_is_on_the_gpu_in_one_type(case: Case, config: LlamaConfig) -> None:
    with fake_cuda(case.card):
        parts, cache, rows, runner, sampler = vars(step_in(case, config)).values()
        tensors = dict(tensors_of(parts))
        assert len(tensors) >= 5 + 6 * len(parts.layers)
        assert {tensor.device for tensor in tensors.values()} == {DEVICE}
        assert cache.dtype is parts.dtype is case.torch_dtype
        logits = runner.prefill([Chunk(0, 0, token_ids(20)), Chunk(1, 3, token_ids(7))])
        assert (logits.shape, logits.dtype, logits.device) == ((2, 512), torch.float32, DEVICE)
        for row, params in enumerate((GREEDY, EVERY_RULE)):
            sampler.add(row, token_ids(20), params)
            runner.start_decoding(row, 20)
        for batch_size in (1, 2, 3, 4):
            logits = runner.decode(batch_size, 21)
            tokens = sampler.sample(logits, 0, [GREEDY, EVERY_RULE])
            assert (tokens.shape, tokens.dtype, tokens.device) == ((batch_size,), torch.int64, DEVICE)
            runner.feed(0, tokens)
        rows.copy_prefix(0, 1, 5)
        rows.swap(0, 1, 5)
        rows.move(1, 0, 5)
        rows.clear(0, 5)
        rows.vacate(1)


@pytest.mark.parametrize("stored", ["fp8", "int8"])
def test_a_quantized_checkpoint_is_loaded_onto_the_gpu(stored: Quantization) -> None:
    with fake_cuda():
        placement = placement_of(SMALL, quantization=stored, dtype="bfloat16")
        parts = take_apart(load(SMALL, placement, stored), placement)
        assert {tensor.device for _, tensor in tensors_of(parts)} == {DEVICE}
        logits = step_for(parts, SMALL, placement, 4, 128).runner.decode(2, 21)
        assert (logits.dtype, logits.device) == (torch.float32, DEVICE)


@every_case
def test_no_captured_step_makes_the_host_wait(case: Case) -> None:
    with fake_cuda(case.card) as fakes:
        config = llama_2_70b(2)
        runner = step_in(case, config, ROWS).runner
        fakes.trace.waits.clear()
        runner.capture()
        assert fakes.trace.waits == []
        replayed = fakes.gpu.replays
        batch_sizes, lengths = graph_shapes(ROWS, 4096, flash_attention=case in FLASH_CASES)
        assert fakes.gpu.graphs == len(batch_sizes) * len(lengths)
        for batch_size in batch_sizes:
            for length in lengths:
                assert runner.decode(batch_size, length).shape == (batch_size, config.vocab_size)
        assert fakes.gpu.replays == replayed + fakes.gpu.graphs
        assert fakes.trace.waits == []


@pytest.mark.parametrize("case", [FLASH_CASES[0], TWO_PRODUCT_CASES[0]], ids=str)
def test_only_random_numbers_and_the_sizes_of_chunks_are_uploaded(case: Case) -> None:
    """The engine also uploads token ids (`test_fake_cuda_engine.py`)."""
    noise = {("upload", "torch_engine/sampler.py Sampler.add")}
    sizes = {("upload", "torch_engine/runner.py Runner.prefill")}
    if case in FLASH_CASES:
        sizes.add(("upload", "torch_engine/flash_attention.py FlashAttention.prefill"))
    with fake_cuda(case.card) as fakes:
        _, _, rows, runner, sampler = vars(step_in(case, llama_2_70b(1), ROWS)).values()
        prompt, logits = token_ids(9), torch.zeros(ROWS, 32000, device=DEVICE)
        calls: list[tuple[Uploads, Callable[[], object]]] = [
            (sizes, lambda: runner.prefill([Chunk(0, 0, prompt), Chunk(1, 5, prompt)])),
            (set(), lambda: sampler.add(0, prompt, GREEDY)),
            (noise, lambda: sampler.add(0, prompt, EVERY_RULE)),
            (set(), lambda: runner.start_decoding(0, 9)),
            (set(), lambda: runner.decode(2, 16)),
            (set(), lambda: sampler.sample(logits, 0, [GREEDY] * ROWS)),
            (set(), lambda: sampler.sample(logits, 0, [DRAWN] * ROWS)),
            (set(), lambda: sampler.sample(logits, 0, [GREEDY, DRAWN, EVERY_RULE])),
            (set(), lambda: runner.feed(0, prompt)),
            (set(), lambda: rows.copy_prefix(0, 1, 9)),
            (set(), lambda: rows.swap(0, 1, 9)),
            (set(), lambda: rows.move(0, 1, 9)),
            (set(), lambda: rows.clear(0, 9)),
            (set(), lambda: rows.vacate(1)),
        ]
        for allowed, call in calls:
            fakes.trace.waits.clear()
            call()
            assert fakes.trace.wait_places == allowed


def test_a_number_is_assigned_to_a_slice_without_a_wait() -> None:
    with fake_cuda() as fakes:
        tensor = torch.zeros(4, device=DEVICE)
        tensor[1:2] = 5
        assert fakes.trace.waits == []
        tensor[1] = 5
        assert fakes.trace.wait_places == {("upload", "outside of the package")}


def test_a_tensor_on_the_cpu_is_found() -> None:
    with fake_cuda():
        step = step_in(FLASH_CASES[0], SMALL)
        norm = Norm(step.parts.norm.weight.cpu(), step.parts.norm.epsilon)
        placement = placement_of(SMALL, dtype="bfloat16")
        planted = step_for(replace(step.parts, norm=norm), SMALL, placement, 4, 128)
        with pytest.raises(Exception, match="same device|two different devices"):
            planted.runner.decode(2, 21)


def test_a_step_that_depends_on_the_value_of_a_tensor_is_found() -> None:
    def activation(gate: Tensor) -> Tensor:
        return gate if gate.sum() > 0 else -gate

    with fake_cuda() as fakes:
        step = step_in(FLASH_CASES[0], SMALL)
        layers = [replace(layer, activation=activation) for layer in step.parts.layers]
        placement = placement_of(SMALL, dtype="bfloat16")
        planted = step_for(replace(step.parts, layers=layers), SMALL, placement, 4, 128)
        fakes.trace.waits.clear()
        with pytest.raises(Exception, match="_local_scalar_dense"):
            planted.runner.decode(2, 21)
        assert {kind for kind, _ in fakes.trace.wait_places} == {"DataDependentOutputException"}


@every_case
def test_weights_take_the_memory_that_the_plan_says(case: Case) -> None:
    config = llama_2_70b(2)
    with fake_cuda(case.card) as fakes:
        step = step_in(case, config, 1)
        tables = step.parts.cos.nbytes + step.parts.sin.nbytes
        used = sum(
            {
                t.untyped_storage()._cdata: t.untyped_storage().nbytes() for _, t in tensors_of(step.parts)
            }.values()
        )
        planned = bytes_of_weights(config, case.quantization, case.torch_dtype) + tables
        assert planned <= used < planned * 1.0001
        assert used < fakes.memory.now
