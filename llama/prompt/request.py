"""One request, read from a prediction's inputs: typed, validated and frozen.

A mapping of raw inputs comes in, and a Request that the rest of the package trusts goes out. Knows the API's
rules across inputs (those of single numbers are in `sampling_params.py`); knows of a model only how long its
context is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama.errors import BadMessages, InvalidInput, PromptRequired, UnsupportedWeights
from llama.prompt.dialog import B_INST, Dialog, read_messages, read_prompt
from llama.prompt.limits import PromptLimits
from llama.prompt.prompt_template import FormattedPrompt, PromptTemplate, is_default, raw_text
from llama.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asked for. `notes` are lines for the caller's log."""

    prompt: Dialog | FormattedPrompt
    params: SamplingParams
    debug: bool
    log_performance_metrics: bool
    notes: tuple[str, ...]

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any], limits: PromptLimits) -> Request:
        """Read the inputs of `Predictor.run`, by name; other names are ignored, as Cog does.

        Raises a UserError that says what is wrong with them.
        """
        if _text(inputs, "replicate_weights").strip():
            raise UnsupportedWeights(
                "replicate_weights is set and fine-tuned weights are not served; leave it out"
            )
        params = SamplingParams.from_inputs(inputs)
        prompt, notes = _read_prompt(inputs, limits)
        if params.length_penalty != 1:
            notes.append("length_penalty acts on beam search only and has no effect here")
        if not params.greedy and params.seed is None:
            params = params.with_seed()
            notes.append(f"seed: {params.seed} (drawn; send it to get this answer again)")
        if isinstance(prompt, Dialog) and prompt.begun_answer:
            notes.append("the prompt ends with the beginning of an answer: it is being continued")
        return cls(
            prompt,
            params,
            debug=_flag(inputs, "debug"),
            log_performance_metrics=_flag(inputs, "log_performance_metrics"),
            notes=tuple(notes),
        )

    @property
    def continues(self) -> bool:
        """Whether the answer goes on from text of the prompt, whose spacing then matters."""
        return isinstance(self.prompt, Dialog) and self.prompt.begun_answer


def _read_prompt(
    inputs: Mapping[str, Any], limits: PromptLimits
) -> tuple[Dialog | FormattedPrompt, list[str]]:
    prompt, system_prompt = _text(inputs, "prompt"), _text(inputs, "system_prompt")
    template = _text(inputs, "prompt_template")
    limits.check_characters(len(template.strip()))

    custom = None if is_default(template) else PromptTemplate(template)
    if messages := _messages(inputs):
        if prompt.strip() or custom:
            raise BadMessages("messages came together with a prompt or a prompt_template; send one of them")
        limits.check_at_least(len(messages))
        return _within(read_messages(messages, system_prompt), limits), []
    if not prompt.strip():
        raise PromptRequired("neither prompt nor messages has words in it; send one of them")
    limits.check_at_least(prompt.count(B_INST))  # every turn has at least one token
    if custom is None:
        return _within(read_prompt(prompt, system_prompt), limits), []
    return _fill_template(custom, prompt, system_prompt, limits)


def _fill_template(
    template: PromptTemplate, prompt: str, system_prompt: str, limits: PromptLimits
) -> tuple[Dialog | FormattedPrompt, list[str]]:
    notes = []
    if template.is_for_llama_3:
        notes.append("warning: prompt_template is Llama 3's; this model does not know its control words")
    # Only what would be built many times over. The rest is counted as it is encoded: formats strip blanks.
    limits.check_characters(template.repeated(prompt, system_prompt))
    if template.is_open_dialogue:
        return _within(read_prompt(template.expand(prompt, system_prompt), ""), limits), notes
    if template.is_raw:
        limits.check_characters(len(raw_text(prompt)))
    return template.format(prompt, system_prompt), notes


def _within(dialog: Dialog, limits: PromptLimits) -> Dialog:
    limits.check_characters(dialog.characters)
    return dialog


def _messages(inputs: Mapping[str, Any]) -> list[Any]:
    messages = inputs.get("messages")
    if messages is not None and not isinstance(messages, list):
        raise BadMessages(f"messages is of type {type(messages).__name__}; send a list of messages")
    return messages or []


def _text(inputs: Mapping[str, Any], name: str) -> str:
    value = inputs.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidInput(f"{name} is of type {type(value).__name__}; send a string")
    return value or ""


def _flag(inputs: Mapping[str, Any], name: str) -> bool:
    value = inputs.get(name, False)
    if not isinstance(value, bool):
        raise InvalidInput(f"{name} is of type {type(value).__name__}; send true or false")
    return value
