"""Llama 2 70B Chat on Cog: the inputs of `meta/llama-2-70b-chat`, streamed answers.

Cog reads this file without running it, so every default and bound below is a plain literal. An input whose default is
None gets its value later: the default of 512 new tokens is in `llama/sampling_params.py`.

A new input is declared here and read in `llama/sampling_params.py` (numbers and stop sequences) or
`llama/prompt/request.py` (everything else). If it changes sampling, both engines need the rule
(`llama/torch_engine/sampler.py`, `llama/vllm_engine/engine.py`). The schema and the command line follow by themselves.
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
            description="The message to answer, or a whole dialogue in [INST] tags, which may end with the beginning of an answer to be continued.",
        ),
        system_prompt: str = Input(
            default="You are a helpful, respectful and honest assistant.",
            description="How the model should behave. Leave it blank for no system prompt.",
        ),
        messages: Optional[list[dict]] = Input(
            default=None,
            description="A dialogue in place of prompt: objects with a role (system, user or assistant) and a content. An optional system message first, then user and assistant in turn; a last assistant message is continued.",
        ),
        max_new_tokens: Optional[int] = Input(
            default=None,
            ge=1,
            description="Most tokens to generate, a token being about three quarters of a word. 512 when unset; never more than the context has room for.",
        ),
        max_tokens: Optional[int] = Input(
            default=None, ge=1, description="Another name for max_new_tokens, which wins over it."
        ),
        max_length: Optional[int] = Input(
            default=None,
            ge=1,
            deprecated=True,
            description="The oldest name for max_new_tokens; both newer names win over it.",
        ),
        min_new_tokens: Optional[int] = Input(
            default=None,
            ge=-1,
            description="Fewest tokens to generate: the answer does not end before. 0 and -1 are off.",
        ),
        min_tokens: Optional[int] = Input(
            default=None, ge=-1, description="Another name for min_new_tokens, which wins over it."
        ),
        temperature: float = Input(
            default=0.7,
            ge=0,
            le=5,
            description="How freely to choose among the likely tokens: 0 always takes the best one, above 1 becomes wild.",
        ),
        top_p: float = Input(
            default=0.95,
            ge=0,
            le=1,
            description="Choose among the most likely tokens that together hold this much probability. 1 is off; 0 takes the best one.",
        ),
        top_k: int = Input(
            default=0, ge=-1, description="Choose among this many most likely tokens. 0 and -1 are off."
        ),
        repetition_penalty: float = Input(
            default=1.0,
            ge=0,
            description="Above 1 makes tokens of the prompt and the answer less likely to come again; below 1, more. 1 and 0 are off.",
        ),
        presence_penalty: float = Input(
            default=0.0,
            ge=-2,
            le=2,
            description="Subtracted once from the score of every token that is in the answer already.",
        ),
        frequency_penalty: float = Input(
            default=0.0,
            ge=-2,
            le=2,
            description="Subtracted from a token's score for each time that it is in the answer already.",
        ),
        length_penalty: float = Input(
            default=1.0,
            ge=0,
            le=5,
            deprecated=True,
            description="Acts on beam search only, so it has no effect here.",
        ),
        stop_sequences: Optional[str] = Input(
            default=None,
            description="Texts that end the answer, separated by commas and taken literally; they do not appear in it. At most 64, of at most 256 characters each. A typed backslash-n is a newline, a backslash before a comma makes the comma part of the text, and two backslashes are one.",
        ),
        seed: Optional[int] = Input(
            default=None,
            description="The same seed with the same inputs gives the same answer. Drawn at random when unset; the log says which.",
        ),
        prompt_template: Optional[str] = Input(
            default=None,
            description="A format of your own around {prompt} and {system_prompt}. The template {prompt} alone passes the prompt to the model as it is.",
        ),
        debug: bool = Input(
            default=False, description="Write the formatted prompt, settings and timings to the log."
        ),
        log_performance_metrics: bool = Input(
            default=False,
            description="Write token counts, tokens per second and time to first token to the log.",
        ),
        replicate_weights: Optional[str] = Input(
            default=None, description="Fine-tuned weights are not served: leave this out."
        ),
    ) -> ConcatenateIterator[str]:
        """Answer a prompt, as a stream of text."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        # Cog names the scope of whichever prediction entered last, so it is taken before anything is awaited.
        scope, cancellation = current_scope(), cancellation_of_current_task()
        # The generator runs in a thread of its own, outside this prediction's log.
        log = partial(contextvars.copy_context().run, partial(print, flush=True))
        prediction = await self.llama.prepare_in_thread(inputs)
        # Cog streams a plain generator and runs many at once only when an async method returns it.
        return self.llama.stream(prediction, scope=scope, log=log, cancellation=cancellation)
