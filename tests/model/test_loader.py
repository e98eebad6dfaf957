"""Loading and packing in every precision, compared with transformers and the same weights.

The model has the 70B's proportions, such as eight query heads per key/value head.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from server_clients import text
from small_models import VOCABULARY, write_model
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from llama import ROOT
from llama.errors import BadCheckpoint, BadSettings, WeightsError
from llama.load import load_llama
from llama.model.config import load_config
from llama.model.loader import load_model
from llama.model.pack import pack
from llama.model.placement import Placement, place
from llama.model.quantized_layers import Quantization
from llama.sampling_params import SamplingParams
from llama.serving.schema import write_schema
from llama.serving.server import CogServer
from llama.settings import Settings
from llama.torch_engine.attention import Chunk
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import take_apart
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner
from llama.weights.file_checks import PACKED, read_object
from predict import Predictor

CPU = torch.device("cpu")
LIKE_THE_70B = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
BY_TRANSFORMERS = {
    "none": None,
    "int8": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
}
QUANTIZATIONS: list[Quantization] = ["fp8", "int8", "nf4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: Path) -> Path:
    """A checkpoint in several files."""
    folder = tmp_path_factory.mktemp("weights") / "like-the-70b"
    write_model(folder, **LIKE_THE_70B)
    shard(folder, "1MB")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[Quantization, Path]:
    """The same checkpoint, packed in each precision."""
    folders = {name: tmp_path_factory.mktemp("packed") / name for name in QUANTIZATIONS}
    for name, target in folders.items():
        pack(folder, target, name, CPU)
    return folders


def shard(folder: Path, size: str) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def loaded(folder: Path, quantization: Quantization, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return load_model(folder, load_config(folder), Placement(CPU, dtype, quantization, 128))


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (40,), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def logits(model: LlamaForCausalLM) -> Tensor:
    """The logits of transformers' own forward."""
    logits: Tensor = model(tokens()[None]).logits[0]
    return logits


@torch.inference_mode()
def logits_of_a_step(model: LlamaForCausalLM) -> Tensor:
    """The logits of the last token, from a step of the torch engine."""
    parts = take_apart(model, Placement(CPU, model.dtype, "none", 128))
    runner = Runner(parts, Rows(KVCache(model.config, CacheShape(2, 128), torch.float32, CPU)))
    return runner.prefill([Chunk(0, 0, tokens())])[0]


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_loaded_model_gives_the_logits_of_transformers(folder: Path, quantization: Quantization) -> None:
    reference = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BY_TRANSFORMERS[quantization], device_map={"": "cpu"}
    )
    assert torch.equal(logits(loaded(folder, quantization)), logits(reference))


@pytest.mark.parametrize("quantization", ["none", *QUANTIZATIONS])
def test_a_step_of_the_engine_gives_the_logits_of_transformers(
    folder: Path, quantization: Quantization
) -> None:
    wanted = logits(loaded(folder, quantization))[-1]
    torch.testing.assert_close(
        logits_of_a_step(loaded(folder, quantization)), wanted, rtol=0, atol=0.02 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_packed_checkpoint_equals_one_that_is_quantized_at_load(
    folder: Path, packed: dict[Quantization, Path], quantization: Quantization
) -> None:
    assert torch.equal(
        logits(loaded(packed[quantization], quantization)), logits(loaded(folder, quantization))
    )


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_transformers_reads_a_packed_checkpoint(
    packed: dict[Quantization, Path], quantization: Quantization
) -> None:
    reference = LlamaForCausalLM.from_pretrained(
        packed[quantization], dtype=torch.float32, device_map={"": "cpu"}
    )
    got, wanted = logits(loaded(packed[quantization], quantization)), logits(reference)
    # transformers computes NF4 in the dtype of its own configuration, or in float32.
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_checkpoint_that_transformers_quantized_and_saved_is_read(
    folder: Path, tmp_path: Path, bits: str, double: bool
) -> None:
    options: dict[str, Any] = {bits: True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    reference = LlamaForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(llm_int8_threshold=0.0, **options),
        device_map={"": "cpu"},
    )
    # Save before the first step: on CPUs with AVX512-BF16, bitsandbytes then changes NF4's layout and cannot
    # change it back.
    reference.save_pretrained(tmp_path, max_shard_size="500KB")
    wanted = logits(reference)
    torch.testing.assert_close(logits(loaded(tmp_path, "none")), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_layers_that_a_quantized_checkpoint_leaves_in_16_bits_stay_so(
    folder: Path, tmp_path: Path, bits: str
) -> None:
    options: dict[str, Any] = {bits: True, "bnb_4bit_quant_type": "nf4", "llm_int8_threshold": 0.0}
    reference = LlamaForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(llm_int8_skip_modules=["self_attn", "lm_head"], **options),
        device_map={"": "cpu"},
    )
    reference.save_pretrained(tmp_path)
    wanted = logits(reference)
    stored = place(Settings(device="cpu"), load_config(tmp_path)).quantization
    assert stored in ("int8", "nf4")
    torch.testing.assert_close(logits(loaded(tmp_path, stored)), wanted, rtol=1e-4, atol=1e-4)


def test_a_tied_output_layer_may_be_stored_beside_the_embeddings(tmp_path: Path) -> None:
    write_model(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    wanted = logits(loaded(tmp_path, "none"))
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": copy}, path, metadata={"format": "pt"})
    assert torch.equal(logits(loaded(tmp_path, "none")), wanted)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.norm.bias"])
def test_a_tensor_that_config_json_does_not_describe_is_named(
    folder: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(folder, tmp_path / "more")
    path = sorted((tmp_path / "more").glob("model-*.safetensors"))[0]
    save_file({**load_file(path), name: torch.zeros(256)}, path, metadata={"format": "pt"})
    with pytest.raises(BadCheckpoint, match=f"has 1 tensor that config.json does not describe: {name}; copy"):
        loaded(tmp_path / "more", "none")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_packed_folder_is_smaller_and_complete(
    folder: Path, packed: dict[Quantization, Path], quantization: Quantization
) -> None:
    def size(of: Path) -> int:
        return sum(path.stat().st_size for path in of.glob("*.safetensors"))

    assert size(packed[quantization]) < 0.5 * size(folder)
    assert (packed[quantization] / "tokenizer.model").is_file()
    index = json.loads((packed[quantization] / "model.safetensors.index.json").read_text("utf-8"))
    assert {packed[quantization] / name for name in index["weight_map"].values()} == set(
        packed[quantization].glob("*.safetensors")
    )
    assert not packed[quantization].with_name(f"{quantization}.part").exists()
    assert read_object(packed[quantization] / "config.json")[PACKED] == quantization


def test_a_packed_folder_has_all_files_of_the_model_and_no_others(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    kept = ("chat_template.jinja", "LICENSE.txt", "tokenizer_config.json", "generation_config.json")
    for name in (*kept, "pytorch_model.bin", "modeling.py"):
        (source / name).write_text("{}")
    pack(source, tmp_path / "packed", "nf4", CPU)
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert names == {path.name for path in source.iterdir()} - {"pytorch_model.bin", "modeling.py"}
    assert len({path.stat().st_mode for path in (tmp_path / "packed").iterdir()}) == 1


def test_packing_refuses_an_existing_target_and_a_packed_source(
    folder: Path, packed: dict[Quantization, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadSettings, match="already exists; use another folder"):
        pack(folder, packed["nf4"], "nf4", CPU)
    with pytest.raises(BadSettings, match="is already quantized; set LLAMA_WEIGHTS to unquantized weights"):
        pack(packed["nf4"], tmp_path / "again", "int8", CPU)


def test_packing_that_fails_leaves_no_folder_and_can_be_repeated(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    last = sorted(broken.glob("model-*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError):
        pack(broken, tmp_path / "packed", "nf4", CPU)
    assert not (tmp_path / "packed").exists()
    last.write_bytes(whole)
    pack(broken, tmp_path / "packed", "nf4", CPU)
    assert torch.isfinite(logits(loaded(tmp_path / "packed", "nf4"))).all()


def test_a_precision_other_than_the_stored_one_is_refused(packed: dict[Quantization, Path]) -> None:
    with pytest.raises(
        BadSettings, match="LLAMA_QUANTIZATION is int8, but the checkpoint is stored in nf4; unset"
    ):
        load_llama(Settings(weights=packed["nf4"], quantization="int8"))


@pytest.mark.parametrize("quantization", ["none", *QUANTIZATIONS])
def test_a_context_of_4096_tokens_works_in_every_precision(folder: Path, quantization: Quantization) -> None:
    llama = load_llama(Settings(weights=folder, quantization=quantization, cache_memory="200MB"))
    try:
        assert llama._engine.context_length == 4096
        prompt = torch.randint(3, VOCABULARY, (4000,), generator=torch.Generator().manual_seed(1)).tolist()
        params = SamplingParams(temperature=0.0, max_new_tokens=96, min_new_tokens=96)
        answer = [token for tokens in llama._engine.submit(prompt, params) for token in tokens]
        assert len(answer) == 96
    finally:
        llama.close()


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_the_server_gives_the_answer_of_transformers_with_the_same_quantization(
    folder: Path, packed: dict[Quantization, Path], quantization: Quantization
) -> None:
    reference = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BY_TRANSFORMERS[quantization], device_map={"": "cpu"}
    )
    from llama.text.llama2_tokenizer import Llama2Tokenizer
    from llama.text.load_tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, Llama2Tokenizer)
    inputs = {"prompt": "Hi there", "prompt_template": "{prompt}", "temperature": 0, "max_new_tokens": 12}
    ids = torch.tensor([[1, *tokenizer._encode_text("Hi there")]])
    wanted = reference.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    write_schema(Predictor.run, ROOT)
    for weights, setting in ((folder, quantization), (packed[quantization], "auto")):
        environment = {"LLAMA_WEIGHTS": str(weights), "LLAMA_QUANTIZATION": setting}
        with CogServer(environment) as server:
            server.wait_until_ready()
            assert text(server, inputs) == detokenized(tokenizer, wanted.tolist())


def detokenized(tokenizer: Any, token_ids: list[int]) -> str:
    from llama.text.detokenizer import Detokenizer

    ids = token_ids[: token_ids.index(2)] if 2 in token_ids else token_ids
    detokenizer = Detokenizer(tokenizer.vocabulary, continues=False)
    return detokenizer.update(ids) + detokenizer.flush()


PEAK = """
import resource, sys, torch
from pathlib import Path
from llama.model.config import load_config
from llama.model.loader import load_model
from llama.model.placement import Placement
from llama.model.quantized_layers import quantize
folder = Path(sys.argv[1])
def resident(name):
    line = next(l for l in open("/proc/self/status") if l.startswith(name))
    return int(line.split()[1]) * 1024
config = load_config(folder)
for _ in range(2):  # memory that libraries allocate when they are first used is not counted
    quantize(torch.randn(64, 64), None, sys.argv[2], torch.float32)(torch.randn(1, 64))
open("/proc/self/clear_refs", "w").write("5")  # reset the peak
before = resident("VmRSS")
model = load_model(folder, config, Placement(torch.device("cpu"), torch.bfloat16, sys.argv[2], 128))
stays = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
print(resident("VmHWM") - before, stays)
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file per layer. One matrix is a quarter of a file; in the 70B's files it is a twentieth."""
    folder = tmp_path_factory.mktemp("large")
    config = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    }
    write_model(folder, num_hidden_layers=1, **config)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    layer = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.0.")}
    files = {"rest.safetensors": {name: tensors[name] for name in tensors.keys() - layer.keys()}}
    for number in range(6):
        files[f"layer-{number}.safetensors"] = {
            name.replace("layers.0", f"layers.{number}"): tensor for name, tensor in layer.items()
        }
    for name, content in files.items():
        save_file(content, folder / name, metadata={"format": "pt"})
    index = {"weight_map": {tensor: name for name, content in files.items() for tensor in content}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    written = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**written, "num_hidden_layers": 6}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux reports peak memory in /proc")
@pytest.mark.parametrize("quantization", ["none", *QUANTIZATIONS])
def test_the_peak_of_loading_is_below_two_files_and_the_model(
    large_folder: Path, quantization: Quantization
) -> None:
    largest = max(path.stat().st_size for path in large_folder.glob("*.safetensors"))

    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(large_folder), quantization],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    peak, stays = map(int, done.stdout.split())
    assert stays > largest  # otherwise a second copy of the model could go unnoticed
    assert peak < 2 * largest + stays
