"""Creates a `Llama` from the settings: finds the folder, loads the tokenizer, starts and warms up an engine.

Knows which module does what; knows nothing about tensors or requests.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llama.engine import Engine, Vocabulary
from llama.errors import BadCheckpoint, BadSettings, BadTokenizer, EngineError
from llama.generation import Llama
from llama.sampling_params import SamplingParams
from llama.settings import Settings
from llama.setup_times import SetupTimes

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from llama.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class EngineStarter(Protocol):
    """The type of each engine's `start_engine` function."""

    def __call__(
        self,
        folder: Path,
        config: LlamaConfig,
        settings: Settings,
        times: SetupTimes,
        vocabulary: Future[Vocabulary],
    ) -> Engine:
        """Load `folder` according to the settings and start an engine.

        `vocabulary` is a future, because the tokenizer is loaded at the same time. Raises a WeightsError,
        including one of the tokenizer.
        """


def load_llama(settings: Settings) -> Llama:
    """Load the model that the settings name, and log its limits and how long each part of the setup took.

    Raises a WeightsError, which names the file or setting at fault.
    """
    times = SetupTimes()
    with times.part("imports"), _without_collecting_garbage():
        from llama.model.config import load_config
        from llama.weights.folder import folder_to_serve

        start_engine = _engine_starter(settings)
    with times.part("folder"):
        folder = folder_to_serve(settings)
        config = load_config(folder)
    with ThreadPoolExecutor(1, "llama-tokenizer") as pool:
        loading = pool.submit(_load_tokenizer, folder, config, times)
        vocabulary = pool.submit(lambda: _vocabulary(folder, config, loading.result()))
        engine = start_engine(folder, config, settings, times, vocabulary)
    with times.part("warm-up"):
        try:
            _warm_up(engine, min(vocabulary.result().eos_token_ids), folder)
        except BaseException:
            engine.close()
            raise
    logger.info("context %d tokens, room for %d requests at once", engine.context_length, engine.max_requests)
    logger.info("ready after %s", times)
    return Llama(loading.result(), engine, settings.max_concurrency)


@contextmanager
def _without_collecting_garbage() -> Iterator[None]:
    """Run imports without the garbage collector, which makes them 0.5 s faster.

    The imported objects are never freed, so later collections skip them too.
    """
    if "torch" in sys.modules or not gc.isenabled():  # nothing to import, or the caller's choice
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _engine_starter(settings: Settings) -> EngineStarter:
    """Import the engine that the settings name. Raises BadSettings if it is not installed."""
    if settings.engine == "torch":
        from llama.torch_engine.start import start_engine as start_torch_engine

        return start_torch_engine
    try:
        from llama.vllm_engine.start import start_engine as start_vllm_engine
    except ImportError as error:
        raise BadSettings(
            f"LLAMA_ENGINE is vllm, but vLLM cannot be imported ({error}); "
            "run `pip install -r requirements-vllm.txt`, or unset LLAMA_ENGINE"
        ) from error
    return start_vllm_engine


def _load_tokenizer(folder: Path, config: LlamaConfig, times: SetupTimes) -> Tokenizer:
    from llama.text.load_tokenizer import fit_tokenizer, load_tokenizer

    with times.part("tokenizer"):
        tokenizer = load_tokenizer(folder)
        fit_tokenizer(tokenizer, config.vocab_size, folder)
    return tokenizer


def _vocabulary(folder: Path, config: LlamaConfig, tokenizer: Tokenizer) -> Vocabulary:
    """Raises BadTokenizer if the vocabulary has no token that ends an answer."""
    from llama.model.config import eos_token_ids

    named = eos_token_ids(folder, config) | {tokenizer.eos_token_id}
    if not (ends := {i for i in named if i < tokenizer.size}):
        raise BadTokenizer(
            f"the tokens that end an answer (ids {sorted(named)}) are all outside the vocabulary: vocab_size "
            f"in {folder / 'config.json'} is {config.vocab_size}; copy the model's own tokenizer files"
        )
    return Vocabulary(tokenizer.size, ends)


def _warm_up(engine: Engine, token_id: int, folder: Path) -> None:
    """Run one prefill and one decode step, so that one-time work does not slow the first request and unusable
    weights are found at setup. The metrics of predictions do not include it. Raises BadCheckpoint."""
    params = SamplingParams(temperature=0.0, max_new_tokens=2, min_new_tokens=2)
    try:
        for _ in engine.submit([token_id], params):
            pass
    except EngineError as error:
        raise BadCheckpoint(
            f"the model in {folder} cannot generate a token ({error.message.partition(';')[0]}); copy the "
            "weights again, or set LLAMA_DTYPE to another type"
        ) from error
