"""What only the vLLM engine has: its parameters, its division among GPUs, and its processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; run `make test-vllm`")

from server_clients import until  # noqa: E402
from test_contract import CONTEXT, PROMPT, collect, greedy, load, prompt_of  # noqa: E402
from transformers import LlamaConfig  # noqa: E402
from vllm import AsyncEngineArgs  # noqa: E402

from llama import ROOT  # noqa: E402
from llama.errors import BadSettings, DoesNotFit, EngineError, EngineNotStarted, EngineStopped  # noqa: E402
from llama.load import load_llama  # noqa: E402
from llama.model.placement import planner_for  # noqa: E402
from llama.model.precision_plan import LLAMA_2_70B, Gpu  # noqa: E402
from llama.sampling_params import SamplingParams  # noqa: E402
from llama.settings import Settings  # noqa: E402
from llama.vllm_engine.engine import vllm_params  # noqa: E402
from llama.vllm_engine.start import engine_arguments  # noqa: E402

HOPPER = Gpu("H100", 72 * 10**9, (9, 0))
AMPERE = Gpu("A100", 72 * 10**9, (8, 0))
SMALL = Gpu("L4", 21 * 10**9, (8, 9))


def engine_cores(pid: int | None = None) -> list[psutil.Process]:
    """Return vLLM's engine processes that are descendants of this process, or of `pid`."""
    children = psutil.Process(pid).children(recursive=True)
    return [
        p for p in children if p.status() != psutil.STATUS_ZOMBIE and "EngineCore" in "".join(p.cmdline())
    ]


@pytest.mark.parametrize(
    ("ours", "name", "theirs"),
    [
        ({"temperature": 0.7}, "temperature", 0.7),
        ({"top_p": 0.0, "temperature": 0.7}, "temperature", 0.0),
        ({"top_k": 1, "temperature": 0.7}, "temperature", 0.0),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 40}, "top_k", 40),
        ({"top_k": 10**20}, "top_k", 2**31 - 1),
        ({"repetition_penalty": 1e-50}, "repetition_penalty", 1e-6),  # 0 in float32
        ({"repetition_penalty": 1e39}, "repetition_penalty", 1e6),
        ({"top_p": 0.9}, "top_p", 0.9),
        ({"repetition_penalty": 0.0}, "repetition_penalty", 1.0),
        ({"repetition_penalty": 1.2}, "repetition_penalty", 1.2),
        ({"presence_penalty": -2.0}, "presence_penalty", -2.0),
        ({"frequency_penalty": 2.0}, "frequency_penalty", 2.0),
        ({"seed": -1}, "seed", 2**63 - 1),  # vLLM would read -1 as no seed
        ({"seed": 0}, "seed", 0),
        ({"seed": 2**100 + 5}, "seed", 5),
        ({}, "seed", None),
        ({"max_length": 9}, "max_tokens", 9),
        ({}, "max_tokens", 512),
        ({"min_new_tokens": -1}, "min_tokens", 0),
        ({"min_tokens": 7}, "min_tokens", 7),
    ],
)
def test_parameters_are_translated_for_vllm(ours: dict[str, float], name: str, theirs: float | None) -> None:
    params = vllm_params(SamplingParams(**ours), [7, 2])
    assert getattr(params, name) == theirs
    assert params.logit_bias is None
    assert vllm_params(SamplingParams(**ours), [2], range(700, 702)).logit_bias == {
        700: float("-inf"),
        701: float("-inf"),
    }
    assert (params.stop_token_ids, params.ignore_eos, params.detokenize) == ([2, 7], True, False)


def arguments_for(folder: Path, config: LlamaConfig, settings: Settings, gpus: list[Gpu]) -> AsyncEngineArgs:
    return engine_arguments(folder, planner_for(settings, config, gpus, "vllm"), settings)


@pytest.mark.parametrize(
    ("gpus", "settings", "quantization"),
    [
        ([HOPPER] * 2, {}, "fp8_per_channel"),
        ([HOPPER] * 4, {}, None),
        ([AMPERE] * 4, {}, None),
        ([HOPPER] * 4, {"quantization": "fp8"}, "fp8_per_channel"),
    ],
)
def test_the_precision_depends_on_the_memory_of_all_gpus_together(
    tmp_path: Path, gpus: list[Gpu], settings: dict[str, Any], quantization: str | None
) -> None:
    arguments = arguments_for(tmp_path, LLAMA_2_70B, Settings(**settings), gpus)
    assert arguments.quantization == quantization
    assert arguments.tensor_parallel_size == len(gpus)
    assert arguments.max_model_len == -1  # the model's context, or as much of it as fits in the cache
    assert arguments.gpu_memory_utilization == 0.9


def test_cuda_graphs_are_used_on_gpus_unless_they_are_turned_off(tmp_path: Path) -> None:
    eager = [
        arguments_for(tmp_path, LLAMA_2_70B, settings, gpus).enforce_eager
        for settings, gpus in (
            (Settings(), [HOPPER] * 2),
            (Settings(cuda_graphs=False), [HOPPER] * 2),
            (Settings(), []),
        )
    ]
    assert eager == [False, True, True]


def test_ray_is_used_if_there_are_more_workers_than_gpus(tmp_path: Path) -> None:
    two_machines = Settings(tensor_parallel=4, pipeline_parallel=2)
    assert (
        arguments_for(tmp_path, LLAMA_2_70B, two_machines, [HOPPER] * 4).distributed_executor_backend == "ray"
    )
    assert arguments_for(tmp_path, LLAMA_2_70B, Settings(), [HOPPER] * 4).distributed_executor_backend == "mp"
    asked = Settings(distributed="ray")
    assert arguments_for(tmp_path, LLAMA_2_70B, asked, [HOPPER] * 4).distributed_executor_backend == "ray"


def test_a_model_that_does_not_fit_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="^E3005 DoesNotFit: no precision fits on"):
        arguments_for(tmp_path, LLAMA_2_70B, Settings(), [SMALL])
    with pytest.raises(
        DoesNotFit,
        match="int8, which .* on H100: it is not supported by vLLM.*; set LLAMA_QUANTIZATION to none or fp8",
    ):
        arguments_for(tmp_path, LLAMA_2_70B, Settings(quantization="int8"), [HOPPER] * 2)


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors"])
def test_a_quantized_checkpoint_keeps_its_quantization(tmp_path: Path, method: str) -> None:
    config = LlamaConfig(
        **{**LLAMA_2_70B.to_dict(), "quantization_config": {"quant_method": method, "bits": 4}}
    )
    assert arguments_for(tmp_path, config, Settings(), [HOPPER]).quantization is None


def test_a_bitsandbytes_checkpoint_is_refused(tmp_path: Path) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = LlamaConfig(**{**LLAMA_2_70B.to_dict(), "quantization_config": stored})
    with pytest.raises(BadSettings, match="quantized with bitsandbytes, which vLLM no longer supports"):
        arguments_for(tmp_path, config, Settings(), [HOPPER])


def test_an_impossible_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match="LLAMA_DISTRIBUTED is ray, which vLLM supports only on GPUs"):
        arguments_for(tmp_path, LLAMA_2_70B, Settings(distributed="ray", tensor_parallel=2), [])
    with pytest.raises(
        BadSettings, match="LLAMA_DISTRIBUTED is mp, but this machine has 4 GPUs for 8 workers"
    ):
        arguments_for(tmp_path, LLAMA_2_70B, Settings(distributed="mp", tensor_parallel=8), [HOPPER] * 4)


def test_the_cache_is_divided_among_the_workers(tmp_path: Path) -> None:
    settings = Settings(cache_memory="8GB")
    assert arguments_for(tmp_path, LLAMA_2_70B, settings, [HOPPER] * 4).kv_cache_memory_bytes == 2 * 10**9


def test_settings_of_the_other_engine_are_refused(llama_folder: Path) -> None:
    with pytest.raises(BadSettings, match="LLAMA_DEVICE is cpu, which only the torch engine supports"):
        load_llama(Settings(weights=llama_folder, engine="vllm", device="cpu"))
    with pytest.raises(BadSettings, match="LLAMA_THREADS is 1, which only the torch engine supports"):
        load_llama(Settings(weights=llama_folder, engine="vllm", threads=1))
    with pytest.raises(BadSettings, match="LLAMA_TENSOR_PARALLEL is 2, which only the vllm engine supports"):
        load_llama(Settings(weights=llama_folder, engine="torch", tensor_parallel=2))
    with pytest.raises(
        BadSettings, match="LLAMA_MEMORY_FRACTION is 0.5, which only the vllm engine supports"
    ):
        load_llama(Settings(weights=llama_folder, engine="torch", memory_fraction=0.5))
    with pytest.raises(
        BadSettings, match="LLAMA_MEMORY_FRACTION is 1.0, which only the vllm engine supports"
    ):
        load_llama(Settings(weights=llama_folder, engine="torch", memory_fraction=1))
    with pytest.raises(BadSettings, match="LLAMA_MEMORY_FRACTION is 0.5, which applies to GPUs only"):
        load_llama(Settings(weights=llama_folder, engine="vllm", memory_fraction=0.5))
    with pytest.raises(BadSettings, match="LLAMA_QUANTIZATION is nf4, which vLLM does not support on a CPU"):
        load_llama(Settings(weights=llama_folder, engine="vllm", quantization="nf4"))


def test_a_cache_that_is_too_small_fails_at_setup(llama_folder: Path) -> None:
    with pytest.raises(EngineNotStarted, match="^E3010 EngineNotStarted: "):
        load_llama(
            Settings(
                weights=llama_folder, engine="vllm", max_context=CONTEXT, cache_memory="64KB", dtype="float32"
            )
        )
    assert "llama-vllm" not in {thread.name for thread in threading.enumerate()}
    until(lambda: not engine_cores())


@pytest.mark.parametrize(
    ("scaling", "context", "lengths"), [("linear", 512, (40, 299)), ("dynamic", 256, (40, 199))]
)
def test_an_untied_output_layer_and_rope_scaling_give_the_answers_of_the_torch_engine(
    llama_folder: Path, tmp_path: Path, scaling: str, context: int, lengths: tuple[int, ...]
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "wild")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {
        "tie_word_embeddings": True,  # although the file has a separate lm_head
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": scaling, "rope_theta": 1e4, "factor": 2.0},
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    prompts = [[1, *(3 + i % 600 for i in range(length))] for length in lengths]
    answers = []
    for engine in ("torch", "vllm"):
        llama = load_llama(Settings(weights=folder, engine=engine, dtype="float32", cache_memory="16MB"))
        try:
            assert llama._engine.context_length == (context if engine == "vllm" else 512)
            streams = [llama._engine.submit(p, greedy(12, min_new_tokens=12)) for p in prompts]
            answers.append([collect(stream) for stream in streams])
        finally:
            llama.close()
    assert answers[0] == answers[1]


def test_ctrl_c_while_loading_ends_the_command_and_its_processes(llama_folder: Path) -> None:
    environment = {**os.environ, "LLAMA_ENGINE": "vllm", "LLAMA_WEIGHTS": str(llama_folder)}
    command = [sys.executable, "-m", "llama", "complete", "Hi!"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    ) as started:
        until(lambda: engine_cores(started.pid))
        cores = engine_cores(started.pid)
        os.killpg(started.pid, signal.SIGINT)
        assert started.wait(timeout=60) == 130
    assert psutil.wait_procs(cores, timeout=60)[1] == []


def test_killing_the_engine_fails_running_requests_and_refuses_new_ones(llama_folder: Path) -> None:
    llama = load(llama_folder, "vllm")
    engine = llama._engine
    try:
        streams = [engine.submit(prompt_of(s, 5), greedy(400, min_new_tokens=400)) for s in range(6)]
        next(iter(streams[0]))
        workers = engine_cores()
        assert workers
        for process in workers:
            process.kill()
        for stream in streams:
            with pytest.raises(EngineError, match="^E200[12] "):
                collect(stream)
        until(lambda: not engine.healthy)
        with pytest.raises(EngineStopped, match="^E2002 "):
            engine.submit(PROMPT, greedy(1))
    finally:
        llama.close()
