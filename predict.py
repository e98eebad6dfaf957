"""The Cog predictor for Llama 2 70B Chat: takes the inputs of `meta/llama-2-70b-chat` and streams the answer.

Cog parses this file without running it, so every default and bound below is a plain literal. An input whose
default is None gets its value later: the default of 512 new tokens is in `llama/sampling_params.py`.

To add an input, declare it here and read it in `llama/sampling_params.py` (numbers and stop sequences) or
`llama/prompt/request.py` (everything else). If it changes sampling, implement it in both engines
(`llama/torch_engine/sampler.py` and `llama/vllm_engine/engine.py`). The schema and the command line pick it
up automatically.
"""

import contextvars
import logging
from functools import partial
from typing import Optional

from cog import BaseRunner, ConcatenateIterator, Input, concurrent, current_scope, streaming

from llama.load import load_llama
from llama.serving.cancellation import cancellation_of_current_task
from llama.settings import Settings


class Predictor(BaseRunner):
    def setup(self) -> None:
        """Load the model and start the engine."""
        logging.basicConfig(format="%(message)s")
        logging.getLogger("llama").setLevel(logging.INFO)
        self.llama = load_llama(Settings.from_environment())

    def healthcheck(self) -> bool:
        return self.llama.healthy

    @streaming
    @concurrent(max=32)
    async def run(
        self,
        prompt: str = Input(
            default="",
            description="The user message to answer, or a whole dialogue in [INST] and [/INST] tags. If the dialogue ends with the beginning of an answer, the model continues it. Required unless `messages` is set.",
        ),
        system_prompt: str = Input(
            default="You are a helpful, respectful and honest assistant.",
            description="Instructions for how the model should behave, such as its role, tone or output format. Leave blank for no system prompt. A system message in `messages` or a <<SYS>> block in `prompt` takes precedence.",
        ),
        messages: Optional[list[dict]] = Input(
            default=None,
            description="A dialogue to answer, as a list of objects with a `role` (system, user or assistant) and a `content` string. Start with an optional system message, then alternate user and assistant messages. If the last message is from the assistant, the model continues it. Cannot be combined with `prompt` or `prompt_template`.",
        ),
        max_new_tokens: Optional[int] = Input(
            default=None,
            ge=1,
            description="Maximum number of tokens to generate. A token is about three quarters of an English word. If unset, the maximum is 512, or `min_new_tokens` if that is larger. It is lowered if the context has less room left.",
        ),
        max_tokens: Optional[int] = Input(
            default=None,
            ge=1,
            description="Another name for `max_new_tokens`. Ignored if `max_new_tokens` is set.",
        ),
        max_length: Optional[int] = Input(
            default=None,
            ge=1,
            deprecated=True,
            description="Old name for `max_new_tokens`. The prompt does not count towards it. Ignored if `max_new_tokens` or `max_tokens` is set.",
        ),
        min_new_tokens: Optional[int] = Input(
            default=None,
            ge=-1,
            description="Minimum number of tokens to generate. Until then, the answer cannot end and stop sequences have no effect. Must not exceed the maximum. Set to 0 or -1 to disable.",
        ),
        min_tokens: Optional[int] = Input(
            default=None,
            ge=-1,
            description="Another name for `min_new_tokens`. Ignored if `min_new_tokens` is set.",
        ),
        temperature: float = Input(
            default=0.7,
            ge=0,
            le=5,
            description="Randomness of the answer. 0 always picks the most likely token. Lower values make the answer more predictable, and values above 1 make it increasingly random.",
        ),
        top_p: float = Input(
            default=0.95,
            ge=0,
            le=1,
            description="Sample from the smallest set of most likely tokens whose probabilities add up to this value. Lower values ignore less likely tokens. Set to 1 to disable; 0 always picks the most likely token.",
        ),
        top_k: int = Input(
            default=0,
            ge=-1,
            description="Sample from only this many of the most likely tokens. Set to 0 or -1 to disable.",
        ),
        repetition_penalty: float = Input(
            default=1.0,
            ge=0,
            description="Penalty for tokens that already appear in the prompt or the answer. Values above 1 discourage repetition, and values below 1 encourage it. Set to 1 or 0 to disable.",
        ),
        presence_penalty: float = Input(
            default=0.0,
            ge=-2,
            le=2,
            description="Amount to subtract from the score of every token that already appears in the answer, however often. Positive values discourage repetition, and negative values encourage it.",
        ),
        frequency_penalty: float = Input(
            default=0.0,
            ge=-2,
            le=2,
            description="Amount to subtract from the score of a token for each time that it already appears in the answer. Positive values discourage repetition, and negative values encourage it.",
        ),
        length_penalty: float = Input(
            default=1.0,
            ge=0,
            le=5,
            deprecated=True,
            description="Has no effect. It applies to beam search, which this model does not use.",
        ),
        stop_sequences: Optional[str] = Input(
            default=None,
            description="Comma-separated list of texts that end the answer. For example, `<end>,<stop>` ends the answer just before the first `<end>` or `<stop>`. Each text is matched exactly, including spaces. To match a newline, type a backslash followed by n; to match a comma or a backslash, type a backslash in front of it. At most 64 texts of up to 256 characters each.",
        ),
        seed: Optional[int] = Input(
            default=None,
            description="Random seed. The same seed with the same inputs gives the same answer. If unset and the answer is sampled, a seed is chosen at random and written to the log.",
        ),
        prompt_template: Optional[str] = Input(
            default=None,
            description="Custom format for the prompt. It must contain `{prompt}` and may contain `{system_prompt}`. Leave blank to use the model's own format. To send the prompt to the model without any formatting, set it to just `{prompt}`.",
        ),
        debug: bool = Input(
            default=False,
            description="Write the formatted prompt, the sampling settings and the timings to the log.",
        ),
        log_performance_metrics: bool = Input(
            default=False,
            description="Write the token counts, the tokens per second and the time to first token to the log.",
        ),
        replicate_weights: Optional[str] = Input(
            default=None,
            description="Not supported: this model cannot load fine-tuned weights. Leave it unset.",
        ),
    ) -> ConcatenateIterator[str]:
        """Answer a prompt with a stream of text."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        # After an await, `current_scope()` may return the scope of a prediction that started later.
        scope, cancellation = current_scope(), cancellation_of_current_task()
        # Cog runs the generator in another thread: the copied context sends its lines to this prediction's log.
        log = partial(contextvars.copy_context().run, partial(print, flush=True))
        prediction = await self.llama.prepare_in_thread(inputs)
        # Cog streams and runs predictions concurrently only if an async method returns a plain generator.
        return self.llama.stream(prediction, scope=scope, log=log, cancellation=cancellation)
