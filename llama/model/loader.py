"""From a folder of weights to a model in memory, layer by layer.

Knows files and modules; knows nothing of settings or requests. No code from a checkpoint is ever run.
transformers' own loader maps all files at once, and cannot make FP8 layers without a hub.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama.errors import BadCheckpoint, BadConfig, DoesNotFit
from llama.model.assembly import ModelAssembler
from llama.model.checkpoint import EMBEDDINGS, HEAD, Checkpoint
from llama.model.placement import Placement
from llama.weights.progress import LogProgress

logger = logging.getLogger(__name__)


def empty_model(config: LlamaConfig, device: torch.device) -> LlamaForCausalLM:
    """The modules of a model, their parameters without memory; what is computed from `config` alone is
    there, on `device`."""
    plain = copy.copy(config)
    plain.pad_token_id = None  # nothing is padded here, and it may lie outside of the table
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        model = LlamaForCausalLM(plain)
    with device:
        model.model.rotary_emb = LlamaRotaryEmbedding(plain)
    return model.requires_grad_(False).eval()


def load_model(folder: Path, config: LlamaConfig, placement: Placement) -> LlamaForCausalLM:
    """The model on its device, read layer by layer, so that no weight is in memory twice.

    Raises BadCheckpoint naming the file or tensor at fault, BadConfig, DoesNotFit.
    """
    checkpoint = Checkpoint(folder)
    # Tied, and stored under the other name.
    renamed = {HEAD: EMBEDDINGS} if config.tie_word_embeddings and checkpoint.has_only_the_head else {}
    if config.tie_word_embeddings and checkpoint.has_head_of_its_own:
        logger.warning(
            "config.json ties the output layer to the embeddings, but the checkpoint stores another one, "
            "which is used"
        )
        config = copy.copy(config)
        config.tie_word_embeddings = False
    try:
        model = empty_model(config, placement.device)
    except Exception as error:  # fields that only transformers knows, such as a kind of attention
        raise BadConfig(
            f"config.json in {folder} describes no model that transformers can make ({type(error).__name__}: "
            f"{error}); copy it again"
        ) from error
    assembler = ModelAssembler(model, checkpoint.names, placement)
    name, done, progress = "", 0, LogProgress(checkpoint.size, 0)
    try:
        for path in checkpoint.files:
            for name, tensor in checkpoint.tensors(path):
                assembler.add(renamed.get(name, name), tensor)
                done += tensor.nbytes
                progress.show(done)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"{folder} does not fit {placement.device} in {placement.quantization} ({error}); "
            "`python -m llama plan` shows what would"
        ) from error
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:  # bitsandbytes' own checks
        raise BadCheckpoint(
            f"{name} in {folder} cannot be used ({error}); if the file is sound, this device cannot do it: "
            "try other values of LLAMA_QUANTIZATION and LLAMA_DEVICE"
        ) from error
    assembler.check_complete(folder)
    model.tie_weights()
    return model
