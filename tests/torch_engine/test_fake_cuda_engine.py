"""The whole engine on fake CUDA tensors: the start, the graphs, its thread, prefix reuse, and freed rows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda.cases import DRAWN, EVERY_RULE, FLASH_CASES, GREEDY, TWO_PRODUCT_CASES, Case
from fake_cuda.kernel_costs import H100, T4, Card
from fake_cuda.models import EOS, SMALL, load, placement_of
from fake_cuda.patches import new_fake_mode
from fake_cuda.session import Fakes, fake_cuda, fake_gpu
from small_models import write_model

from llama.engine import Vocabulary
from llama.errors import DoesNotFit, GenerationFailed
from llama.model.config import load_config
from llama.model.gpu_reserve import gpu_reserve
from llama.model.precision_plan import bytes_per_token
from llama.sampling_params import SamplingParams
from llama.settings import Settings
from llama.setup_times import SetupTimes
from llama.torch_engine.batch import Batch
from llama.torch_engine.engine import TorchEngine
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import take_apart
from llama.torch_engine.sampler import NOT_FINITE
from llama.torch_engine.scheduler import RequestState
from llama.torch_engine.start import start_engine

UPLOADS = {
    "torch_engine/batch.py Batch._tensor",  # token ids
    "torch_engine/flash_attention.py FlashAttention.prefill",  # where chunks start and how long they are
    "torch_engine/runner.py Runner.prefill",  # how long chunks are
    "torch_engine/sampler.py Sampler.add",  # random numbers
}
"""The places that may wait for a copy to the GPU while the engine serves requests, and what they copy."""

one_case_of_each_precision = pytest.mark.parametrize(
    "case", [*FLASH_CASES[:5:2], FLASH_CASES[6], *TWO_PRODUCT_CASES[:1]], ids=str
)


def batch_on(case: Case, rows: int = 3) -> Batch:
    placement = placement_of(SMALL, quantization=case.quantization, dtype=case.dtype)
    parts = take_apart(load(SMALL, placement), placement)
    cache = KVCache.for_placement(SMALL, CacheShape(rows, placement.context), placement)
    return Batch(parts, cache, vocabulary=SMALL.vocab_size, eos_token_ids={EOS})


@contextmanager
def engine_on(case: Case) -> Iterator[tuple[TorchEngine, Fakes]]:
    def load_batch() -> Batch:
        fakes.enter_this_thread()
        batch = batch_on(case)
        batch.prepare_gpu(graphs=True)
        fakes.trace.waits.clear()
        return batch

    with fake_gpu(case.card) as fakes:
        engine = TorchEngine(load_batch)
        try:
            yield engine, fakes
        finally:
            engine.close()


def params(maximum: int, kind: SamplingParams = GREEDY) -> SamplingParams:
    return kind.model_copy(update={"max_tokens": maximum})


@one_case_of_each_precision
def test_the_engine_serves_requests_and_uploads_only_what_is_listed(case: Case) -> None:
    with engine_on(case) as (engine, fakes):
        replayed = fakes.gpu.replays
        kinds = (GREEDY, EVERY_RULE, DRAWN, GREEDY, EVERY_RULE)
        streams = [
            engine.submit([7] * length, params(maximum, kind))
            for length, maximum, kind in zip((30, 3, 60, 40, 31), (6, 9, 6, 6, 7), kinds, strict=True)
        ]
        answers = [sum(stream, start=list[int]()) for stream in streams]
        assert [len(answer) for answer in answers] == [6, 9, 6, 6, 7]
        assert {token for answer in answers for token in answer} == {fakes.gpu.token}
        assert engine.healthy
    assert fakes.gpu.replays > replayed + 8
    assert {wait.kind for wait in fakes.trace.waits} == {"upload"}
    assert {wait.place for wait in fakes.trace.waits} <= UPLOADS
    assert set(fakes.gpu.reads) == {"torch_engine/batch.py Batch._emit"}


@pytest.mark.parametrize("case", [FLASH_CASES[0], TWO_PRODUCT_CASES[0]], ids=str)
def test_prefixes_are_reused_and_rows_are_freed(case: Case) -> None:
    with fake_cuda(case.card) as fakes:
        batch = batch_on(case)
        batch.prepare_gpu(graphs=True)
        first, second = (batch.request([9] * 40 + [last], params(20)) for last in (3, 4))
        batch.add(first)
        batch.step()
        batch.add(second)
        batch.step()
        assert (first.state, second.state) == (RequestState.DECODING, RequestState.DECODING)
        copied = [launch for launch in fakes.trace.launches if "KVCache.copy" in launch.place]
        assert len(copied) == SMALL.num_hidden_layers
        third = batch.request([8] * 30, params(20))
        batch.add(third)
        batch.step()
        first.stream.cancel()
        batch.step()
        assert first.state is RequestState.ENDED
        assert batch.running == 2
        assert any("KVCache.swap" in launch.place for launch in fakes.trace.launches)
        fakes.gpu.token = NOT_FINITE
        batch.step()
        assert batch.idle
        with pytest.raises(GenerationFailed, match="not finite"):
            sum(second.stream, start=list[int]())
        assert any("KVCache.clear" in launch.place for launch in fakes.trace.launches)


class TimesOnFakes(SetupTimes):
    """Lets the engine's thread create fake tensors: it measures its time before it does anything else."""

    def __init__(self, fakes: Fakes) -> None:
        super().__init__()
        self._fakes = fakes

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if name == "engine":
            self._fakes.enter_this_thread()
        with super().part(name):
            yield


def started(folder: Path, fakes: Fakes, **settings: Any) -> TorchEngine:
    vocabulary: Future[Vocabulary] = Future()
    vocabulary.set_result(Vocabulary(700, {EOS}))
    config, chosen = load_config(folder), Settings(device="cuda:0", **settings)
    times = TimesOnFakes(fakes)
    with new_fake_mode():  # `place` asks this thread for the device
        return start_engine(folder, config, chosen, times, vocabulary)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fake") / "model"
    write_model(path)
    return path


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("card", [H100, T4], ids=lambda card: card.name)
def test_the_engine_starts_within_the_memory_of_the_gpu(folder: Path, card: Card, graphs: bool) -> None:
    config, flash = load_config(folder), card is not T4
    reserve = gpu_reserve(config, "none", torch.float16, rows=8, context=2048, flash_attention=flash)
    total = reserve.total + 4 * 2048 * bytes_per_token(config, torch.float16)
    with fake_gpu(card, total) as fakes:
        settings: dict[str, Any] = {"quantization": "none", "dtype": "float16", "COG_MAX_CONCURRENCY": 8}
        engine = started(folder, fakes, cuda_graphs=graphs, **settings)
        try:
            assert engine.max_requests in (range(1, 5) if graphs else [8])
            assert engine.context_length == 2048
            answer = sum(engine.submit([7] * 1500, params(20, EVERY_RULE)), start=list[int]())
            assert answer == [fakes.gpu.token] * 20
        finally:
            engine.close()
        assert (fakes.gpu.graphs > 0) == graphs
        free, _ = fakes.gpu.mem_get_info()
        assert fakes.memory.peak - fakes.memory.now < free


def test_a_gpu_that_is_too_small_is_refused(folder: Path) -> None:
    with fake_gpu(H100, 64 * 2**20) as fakes, pytest.raises(DoesNotFit):
        started(folder, fakes)
