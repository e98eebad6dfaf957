"""Weights and settings that cannot be served. The error says what is wrong, where, and what to do.

Cog shows an operator only the text of the exception, on one line, and nothing that was printed before it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import write_model

from llama import ROOT
from llama.errors import WeightsError
from llama.load import load_llama
from llama.serving.schema import write_schema
from llama.serving.server import CogServer, ServerFailed
from llama.settings import Settings
from predict import Predictor

Change = Callable[[Path], object]
"""Damages a folder of weights."""

CHECKPOINT, INDEX, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.model"


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy of valid weights, which a test damages."""
    copy = tmp_path / "weights"
    shutil.copytree(llama_folder, copy)
    return copy


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def written(name: str, content: Any) -> Change:
    """Overwrite a file: with bytes as they are, and with anything else as JSON."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(data)


def cut(name: str, size: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def edited(name: str, **fields: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps({**content, **fields}), "utf-8")

    return change


def tensors(change_tensors: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        content = load_file(folder / CHECKPOINT)
        change_tensors(content)
        save_file(content, folder / CHECKPOINT, metadata={"format": "pt"})

    return change


def truncated_norm(content: dict[str, Any]) -> None:
    content["model.norm.weight"] = content["model.norm.weight"][:3].clone()


def truncated_linear(content: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    content[name] = content[name][:3].clone()


def without_a_shard(folder: Path) -> None:
    """Split the checkpoint into several files and remove the last one."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / CHECKPOINT).unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()


BAD_ROPE_VALUES: list[Any] = [
    {"rope_type": "linear", "rope_theta": 1e4, "factor": "4"},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": None},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 0},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": -2.0},
    {"rope_type": "linear", "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": "10000"},
    {"rope_type": "default", "rope_theta": None},
    {"rope_type": "default", "rope_theta": []},
    {"rope_type": "default", "rope_theta": 0},
    {"rope_type": "default", "rope_theta": True},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": True},
    {"rope_type": 5, "rope_theta": 1e4},
    {"rope_type": "llama3", "rope_theta": 1e4, "factor": []},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": {}},
    [],
    "linear",
]

DAMAGE: dict[str, tuple[Change, str, str]] = {
    "a missing folder": (shutil.rmtree, "E3001 WeightsNotFound: ", "weights"),
    "a missing config.json": (removed("config.json"), "E3002 BadConfig: ", "config.json"),
    "a config.json that is not JSON": (written("config.json", b"{"), "E3002 BadConfig: ", "config.json"),
    "a config.json that is a list": (written("config.json", []), "E3002 BadConfig: ", "config.json"),
    "a config.json that is nested too deeply": (
        written("config.json", b"[" * 200_000),
        "E3002 BadConfig: ",
        "config.json",
    ),
    "position tables that are larger than the memory": (
        edited("config.json", max_position_embeddings=10**12),
        "E3005 DoesNotFit: ",
        "LLAMA_MAX_CONTEXT",
    ),
    "another architecture": (
        edited("config.json", model_type="mistral", architectures=["MistralForCausalLM"]),
        "E3002 BadConfig: ",
        "config.json",
    ),
    "a Llama for another task": (
        edited("config.json", architectures=["LlamaForSequenceClassification"]),
        "E3002 BadConfig: ",
        "config.json",
    ),
    "architectures that are not a list": (
        edited("config.json", architectures=5),
        "E3002 BadConfig: ",
        "config.json",
    ),
    "a field of the wrong type": (
        edited("config.json", vocab_size="many"),
        "E3002 BadConfig: ",
        "config.json",
    ),
    "a context of no tokens": (
        edited("config.json", max_position_embeddings=0),
        "E3002 BadConfig: ",
        "config.json",
    ),
    "a quantization that the engine cannot read": (
        edited("config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}),
        "E3002 BadConfig: ",
        "config.json",
    ),
    "a generation_config.json that is a list": (
        written("generation_config.json", []),
        "E3002 BadConfig: ",
        "generation_config.json",
    ),
    "a negative eos_token_id": (
        edited("generation_config.json", eos_token_id=[2, -1]),
        "E3002 BadConfig: ",
        "generation_config.json",
    ),
    "an eos_token_id that is true": (
        edited("generation_config.json", eos_token_id=True),
        "E3002 BadConfig: ",
        "generation_config.json",
    ),
    "an eos_token_id that is not a number": (
        edited("generation_config.json", eos_token_id="</s>"),
        "E3002 BadConfig: ",
        "generation_config.json",
    ),
    "an unknown rope scaling": (
        edited("config.json", rope_parameters={"rope_type": "nonsense", "rope_theta": 1e4, "factor": 2.0}),
        "E3002 BadConfig: ",
        "config.json",
    ),
    **{
        f"rope values {values}": (
            edited("config.json", rope_parameters=values),
            "E3002 BadConfig: ",
            "config.json",
        )
        for values in BAD_ROPE_VALUES
    },
    **{
        f"{name} {value!r}": (edited("config.json", **{name: value}), "E3002 BadConfig: ", "config.json")
        for name, value in (
            ("rms_norm_eps", "1e-5"),
            ("rms_norm_eps", None),
            ("rms_norm_eps", -1.0),
            ("hidden_act", 5),
            ("hidden_act", ["silu"]),
            ("attention_bias", "no"),
            ("mlp_bias", None),
            ("tie_word_embeddings", "no"),
            ("head_dim", 31),
            ("hidden_size", True),
            ("num_key_value_heads", 1.5),
            ("vocab_size", [700]),
            ("max_position_embeddings", "2048"),
            ("dtype", "float31"),
            ("dtype", 1.5),
            ("torch_dtype", True),
            ("architectures", {}),
            ("rope_scaling", False),
            ("rope_scaling", ""),
            ("attn_implementation", "flash_attention_2"),
            ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": "yes"}),
            ("quantization_config", "fp8"),
            ("quantization_config", {"quant_method": ["fp8"]}),
        )
    },
    "an unknown activation": (
        edited("config.json", hidden_act="nonsense"),
        "E3002 BadConfig: ",
        "config.json",
    ),
    "weights that are NaN": (
        tensors(lambda content: content["model.norm.weight"].fill_(float("nan"))),
        "E3003 BadCheckpoint: ",
        "not finite",
    ),
    "an index without file names": (
        written(INDEX, {"weight_map": {"a": [1]}}),
        "E3003 BadCheckpoint: ",
        INDEX,
    ),
    "missing safetensors": (removed(CHECKPOINT), "E3003 BadCheckpoint: ", CHECKPOINT),
    "truncated safetensors": (cut(CHECKPOINT, 50_000), "E3003 BadCheckpoint: ", CHECKPOINT),
    "safetensors truncated inside the header": (cut(CHECKPOINT, 100), "E3003 BadCheckpoint: ", CHECKPOINT),
    "empty safetensors": (cut(CHECKPOINT, 0), "E3003 BadCheckpoint: ", CHECKPOINT),
    "an HTML page instead of safetensors": (
        written(CHECKPOINT, b"<html>404</html>" * 99),
        "E3003 BadCheckpoint: ",
        CHECKPOINT,
    ),
    "a missing shard": (without_a_shard, "E3003 BadCheckpoint: ", "weights/model-0000"),
    "an index that is not JSON": (written(INDEX, b"{"), "E3003 BadCheckpoint: ", INDEX),
    "an index that is a list": (written(INDEX, []), "E3003 BadCheckpoint: ", INDEX),
    "a missing tensor": (
        tensors(lambda content: content.pop("model.layers.1.mlp.up_proj.weight")),
        "E3003 BadCheckpoint: ",
        "model.layers.1.mlp.up_proj.weight",
    ),
    "a missing output layer": (
        tensors(lambda content: content.pop("lm_head.weight")),
        "E3003 BadCheckpoint: ",
        "lm_head.weight",
    ),
    "a linear layer of the wrong shape": (
        tensors(truncated_linear),
        "E3003 BadCheckpoint: ",
        "mlp.up_proj.weight (the checkpoint has [3, 64], config.json requires [128, 64])",
    ),
    "a tensor of the wrong shape": (
        tensors(truncated_norm),
        "E3003 BadCheckpoint: ",
        "model.norm.weight (the checkpoint has [3], config.json requires [64])",
    ),
    "one layer more than config.json has": (
        edited("config.json", num_hidden_layers=1),
        "E3003 BadCheckpoint: ",
        "model.layers.1.",
    ),
    "a tokenizer of the wrong size": (
        lambda folder: write_model(folder, vocab_size=650),
        "E3004 BadTokenizer: ",
        "weights has 700 tokens",
    ),
    "a missing tokenizer": (removed(TOKENIZER), "E3004 BadTokenizer: ", TOKENIZER),
    "a truncated tokenizer": (cut(TOKENIZER, 3000), "E3004 BadTokenizer: ", TOKENIZER),
    "an empty tokenizer": (cut(TOKENIZER, 0), "E3004 BadTokenizer: ", TOKENIZER),
    "a tokenizer_config.json that is not JSON": (
        written("tokenizer_config.json", b"{"),
        "E3004 BadTokenizer: ",
        "tokenizer_config.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_error_of_damaged_weights_names_the_file_and_what_to_do(folder: Path, damage: str) -> None:
    change, code, name = DAMAGE[damage]
    change(folder)

    with pytest.raises(WeightsError) as raised:
        load_llama(Settings(weights=folder))

    line = str(raised.value)
    assert line.startswith(code)
    assert name in line
    assert re.search(r"[;,] (copy|set|use|add) ", line)
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LLAMA_DTYPE", "float8"),
        ("LLAMA_ENGINE", "steam"),
        ("LLAMA_DEVICE", "abacus"),
        ("LLAMA_DEVICE", "cuda:99"),
        ("LLAMA_MAX_CONTEXT", "0"),
        ("LLAMA_MAX_CONTEXT", "1"),
        ("LLAMA_MAX_CONTEXT", "many"),
        ("LLAMA_CACHE_MEMORY", "0"),
        ("LLAMA_CACHE_MEMORY", "1000"),
        ("LLAMA_CACHE_MEMORY", "8 parsecs"),
        ("COG_MAX_CONCURRENCY", "0"),
    ],
)
def test_the_error_of_an_invalid_setting_names_it_and_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv("LLAMA_WEIGHTS", str(folder))
    monkeypatch.setenv(variable, value)

    with pytest.raises(WeightsError) as raised:
        load_llama(Settings.from_environment())

    line = str(raised.value)
    assert line.startswith("E3")
    assert variable in line
    assert re.search(r"; (set|correct) ", line)
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_published_dtype_loads(folder: Path, dtype: Any) -> None:
    load_llama(Settings(weights=folder, dtype=dtype)).close()


@pytest.mark.parametrize(
    ("damage", "environment"),
    [
        ("a missing folder", {}),
        ("truncated safetensors", {}),
        (None, {"LLAMA_DTYPE": "float8"}),
    ],
)
def test_a_server_whose_setup_failed_reports_why_and_refuses_predictions(
    folder: Path, damage: str | None, environment: dict[str, str]
) -> None:
    change, code, name = (
        DAMAGE[damage] if damage else (lambda folder: None, "E3000 BadSettings: ", "LLAMA_DTYPE")
    )
    change(folder)
    write_schema(Predictor.run, ROOT)

    with CogServer({"LLAMA_WEIGHTS": str(folder), **environment}) as server:
        with pytest.raises(ServerFailed):
            server.wait_until_ready()

        health = server.health()
        assert health["status"] == "SETUP_FAILED"
        (line,) = (line for line in health["setup"]["logs"].splitlines() if code in line)
        assert name in line
        assert server.client.post("/predictions", json={"input": {"prompt": "hi"}}).status_code == 503
        # The server keeps running, so that an operator can read the reason.
        assert server.process.poll() is None
