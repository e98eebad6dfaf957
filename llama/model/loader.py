"""Loads a folder of weights as a model in memory, layer by layer.

It replaces transformers' own loader, which maps all files at once and cannot create FP8 layers without
downloading a kernel. It never runs code from a checkpoint. Knows files and modules; knows nothing about
settings or requests.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama.errors import BadCheckpoint, BadConfig, DoesNotFit
from llama.model.assembly import ModelAssembler, TakeLayer
from llama.model.checkpoint import EMBEDDINGS, HEAD, Checkpoint
from llama.model.gpu_errors import is_out_of_memory
from llama.model.placement import Placement
from llama.weights.progress import progress

logger = logging.getLogger(__name__)


def empty_model(config: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """Create a model whose parameters have no memory. Only the rotary embedding, which is computed from
    `config` alone, exists on `device`."""
    plain = copy.copy(config)
    plain.pad_token_id = None  # the engine does not pad, and the id may exceed the embedding table
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        model = LlamaForCausalLM(plain)
    with device:
        model.model.rotary_emb = LlamaRotaryEmbedding(plain)
    return model.requires_grad_(False).eval()


def load_model(
    folder: Path, config: LlamaConfig, placement: Placement, take_layer: TakeLayer | None = None
) -> LlamaForCausalLM:
    """Load the model onto its device layer by layer, without ever holding the whole checkpoint twice.

    `take_layer` is called for each decoder layer as soon as it is complete. On a CPU, its weights may still
    be in the mapped file, which saves a copy. Raises BadCheckpoint (which names the file or tensor at fault),
    BadConfig or DoesNotFit.
    """
    checkpoint = Checkpoint(folder)
    # A checkpoint may store tied embeddings under the name of the output layer only.
    renamed = {HEAD: EMBEDDINGS} if config.tie_word_embeddings and checkpoint.has_only_the_head else {}
    if config.tie_word_embeddings and checkpoint.has_head_of_its_own:
        logger.warning(
            "config.json ties the output layer to the embeddings, but the checkpoint stores a different "
            "output layer; using the stored one"
        )
        config = copy.copy(config)
        config.tie_word_embeddings = False
    try:
        model = empty_model(config, placement.device)
    except Exception as error:  # fields that only transformers checks, such as `attn_implementation`
        if is_out_of_memory(error):
            raise _does_not_fit(folder, placement, error) from error
        raise BadConfig(
            f"transformers cannot create the model that config.json in {folder} describes "
            f"({type(error).__name__}: {error}); copy config.json again"
        ) from error
    assembler = ModelAssembler(model, checkpoint.names, placement, take_layer)
    name, done = "", 0
    try:
        with progress(checkpoint.size, 0) as show:
            for path in checkpoint.files:
                for name, tensor in checkpoint.tensors(path):
                    assembler.add(renamed.get(name, name), tensor)
                    done += tensor.nbytes
                    show(done)
                assembler.end_file()
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:  # checks of torch and bitsandbytes
        if is_out_of_memory(error):
            raise _does_not_fit(folder, placement, error) from error
        raise BadCheckpoint(
            f"the tensor {name} in {folder} cannot be loaded ({error}); copy the weights again or, if this "
            "device does not support the operation, set LLAMA_QUANTIZATION or LLAMA_DEVICE to another value"
        ) from error
    assembler.check_complete(folder)
    model.tie_weights()
    return model


def _does_not_fit(folder: Path, placement: Placement, error: Exception) -> DoesNotFit:
    return DoesNotFit(
        f"the model in {folder} does not fit on {placement.device} with quantization "
        f"{placement.quantization} ({error}); run `python -m llama plan` to see what fits"
    )
