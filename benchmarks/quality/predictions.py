"""Cut a text into windows, and let a model predict their tokens with the engine's own steps.

As in serving, a window's first tokens are read as a prompt (prefill), and the others are decoded one by one,
many windows at a time. The engine samples from the same logits. Knows token ids and tensors; knows nothing
about precisions or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig

from llama.model.placement import Placement
from llama.prompt.prompt_template import FormattedPrompt
from llama.text.tokenizer import Tokenizer
from llama.torch_engine.attention import Chunk
from llama.torch_engine.cpu_compiler import Kernels
from llama.torch_engine.kv_cache import CacheShape, KVCache
from llama.torch_engine.layers import ModelParts
from llama.torch_engine.prompt_share import MOST_PROMPT_TOKENS
from llama.torch_engine.rows import Rows
from llama.torch_engine.runner import Runner

PROMPT = 64
"""The number of tokens at the start of a window that are read as a prompt and not scored."""
SCORED = 256
"""The number of tokens after the prompt. They are scored, and the next window's scored tokens follow them."""
LENGTH = PROMPT + SCORED
_FEWEST = 4  # windows; with fewer, a standard error means little
NEW_TOKENS = 64
"""The number of tokens that are generated after each prompt."""
CANDIDATES = 64
"""The number of the reference's most likely tokens whose probabilities are compared, at every position."""
# The most windows at a time. On a GPU, it is the number of requests that the server runs at once. On a CPU,
# an FP8 step takes nearly as long with 64 rows as with 8.
_ROWS = {"cuda": 32, "cpu": 64}


class TextTooShort(ValueError):
    """The text has fewer tokens than _FEWEST windows."""


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a text. Every token after the first prompt is scored once."""

    token_ids: Tensor
    """[windows, LENGTH], on the CPU."""
    text_tokens: int
    """The number of tokens of the whole text."""


def cut(text: str, tokenizer: Tokenizer) -> Windows:
    """Encode a text, and cut it into windows that start every SCORED tokens.

    Every window begins with the beginning-of-sequence token if the tokenizer adds one to prompts. Tokens at
    the end that do not fill a window are left out. Raises TextTooShort.
    """
    start = tokenizer.encode(FormattedPrompt(()))
    token_ids = tokenizer.encode(FormattedPrompt((text,)))[len(start) :]
    return Windows(_cut(token_ids, start), len(token_ids))


def _cut(token_ids: Sequence[int], start: Sequence[int]) -> Tensor:
    length = LENGTH - len(start)
    needed = length + (_FEWEST - 1) * SCORED
    if len(token_ids) < needed:
        raise TextTooShort(
            f"the text has {len(token_ids)} tokens, but at least {needed} are needed ({_FEWEST} windows of "
            f"{LENGTH} tokens, one every {SCORED}); use a longer text"
        )
    windows = torch.tensor(token_ids).unfold(0, length, SCORED)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(len(windows), -1), windows], dim=1)


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model predicts for N windows of SCORED tokens, on the CPU."""

    losses: Tensor
    """The negative log-likelihood of each token of the text, in nats: [N, SCORED] float32."""
    best: Tensor
    """The most likely token at each position: [N, SCORED]."""
    candidates: Tensor
    """The tokens whose probabilities are compared: [N, SCORED, CANDIDATES]."""
    log_probabilities: Tensor
    """The log-probabilities of the candidates: [N, SCORED, CANDIDATES] float32."""
    generated: Tensor
    """The greedy answer to each window's prompt, without an end-of-sequence token: [N, NEW_TOKENS]."""


class TextPredictor:
    """A model with a key/value cache for a batch of windows."""

    def __init__(
        self,
        parts: ModelParts,
        config: LlamaConfig,
        placement: Placement,
        vocabulary: int,
        kernels: Kernels | None,
    ) -> None:
        """Logits from `vocabulary` on are ignored, as in the engine: the embedding table may be padded."""
        self._vocabulary, self._device = vocabulary, placement.device
        self._rows = _ROWS[placement.device.type]
        # The last position is for rows that are not decoding.
        cache = KVCache.for_placement(config, CacheShape(self._rows, LENGTH + 1), placement)
        self._runner = Runner(parts, Rows(cache), kernels)

    @torch.inference_mode()
    def predict(self, windows: Tensor, candidates: Tensor | None = None) -> Predictions:
        """Predict the scored tokens of windows [N, LENGTH], and answer their prompts.

        Without `candidates` [N, SCORED, CANDIDATES], they are the model's own most likely tokens. Raises
        ArithmeticError if a loss is not finite.
        """
        batches = -(-len(windows) // self._rows)
        given = [None] * batches if candidates is None else candidates.chunk(batches)
        parts = [self._predict(*batch) for batch in zip(windows.chunk(batches), given, strict=True)]
        predictions = Predictions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        if not predictions.losses.isfinite().all():
            raise ArithmeticError("the model's output is not finite")
        return predictions

    def _predict(self, windows: Tensor, candidates: Tensor | None) -> Iterator[Tensor]:
        windows = windows.to(self._device)
        prompts, scored = windows[:, :PROMPT], windows[:, PROMPT:]
        positions: list[tuple[Tensor, ...]] = []

        def score(step: int, logits: Tensor) -> Tensor:
            known = None if candidates is None else candidates[:, step]
            positions.append(_scores(logits, scored[:, step], known))
            return scored[:, step]

        answers: list[Tensor] = []

        def answer(_: int, logits: Tensor) -> Tensor:
            answers.append(logits.argmax(dim=-1))
            return answers[-1]

        first = self._read(prompts)
        self._decode(first, SCORED, score)
        self._decode(first, NEW_TOKENS, answer)
        for tensors in (*zip(*positions, strict=True), answers):
            yield torch.stack(tuple(tensors), dim=1).cpu()

    def _decode(self, logits: Tensor, steps: int, choose: Callable[[int, Tensor], Tensor]) -> None:
        """Decode after the prompts, which have been read and whose next logits are [B, V].

        `choose` gets the number of the step and its logits, and returns the tokens [B] that follow.
        """
        for row in range(len(logits)):
            self._runner.start_decoding(row, PROMPT)
        for step in range(steps):
            self._runner.feed(0, choose(step, logits[:, : self._vocabulary]))
            logits = self._runner.decode(len(logits), PROMPT + step + 1)

    def _read(self, prompts: Tensor) -> Tensor:
        """Read prompts [B, PROMPT] into the first rows, and return the logits that follow them, [B, V]."""
        chunks = [Chunk(row, 0, token_ids) for row, token_ids in enumerate(prompts)]
        at_once = MOST_PROMPT_TOKENS[self._device.type] // PROMPT
        logits = [
            self._runner.prefill(chunks[first : first + at_once]) for first in range(0, len(chunks), at_once)
        ]
        return torch.cat(logits)


def _scores(logits: Tensor, tokens: Tensor, candidates: Tensor | None) -> tuple[Tensor, ...]:
    """Return the fields of Predictions for one position, without the answers: [B] or [B, CANDIDATES] each."""
    log_probabilities = logits.log_softmax(dim=-1)
    best = logits.argmax(dim=-1)
    if candidates is None:
        candidates = logits.topk(CANDIDATES).indices
    losses = -log_probabilities.gather(1, tokens[:, None])[:, 0]
    candidates = candidates.to(logits.device)
    return losses, best, candidates, log_probabilities.gather(1, candidates)
