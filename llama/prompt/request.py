"""Turns a prediction's raw inputs into a typed, validated and frozen Request.

Knows the rules that involve several inputs (`sampling_params.py` has the rules for numbers and stop
sequences). The only fact about the model that it knows is the length of the context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama.errors import BadMessages, InvalidInput, PromptRequired, UnsupportedWeights, json_type
from llama.prompt.dialog import B_INST, Dialog, read_messages, read_prompt
from llama.prompt.limits import PromptLimits
from llama.prompt.prompt_template import FormattedPrompt, PromptTemplate, is_default, raw_text
from llama.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    """A validated request. `notes` are lines for the prediction's log."""

    prompt: Dialog | FormattedPrompt
    params: SamplingParams
    debug: bool
    log_performance_metrics: bool
    notes: tuple[str, ...]

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any], limits: PromptLimits) -> Request:
        """Validate the inputs of `Predictor.run`, by name. Unknown names are ignored, as in Cog.

        Raises a UserError if they are invalid.
        """
        if _text(inputs, "replicate_weights").strip():
            raise UnsupportedWeights(
                "replicate_weights is set, but fine-tuned weights are not supported; leave it out"
            )
        params = SamplingParams.from_inputs(inputs)
        prompt, notes = _read_prompt(inputs, limits)
        if params.length_penalty != 1:
            notes.append("length_penalty has no effect: it applies to beam search, which is not used here")
        if not params.greedy and params.seed is None:
            params = params.with_seed()
            notes.append(f"seed: {params.seed} (chosen at random; send it to get this answer again)")
        if isinstance(prompt, Dialog) and prompt.begun_answer:
            notes.append("the dialogue ends with the beginning of an answer, which is continued")
        return cls(
            prompt,
            params,
            debug=_flag(inputs, "debug"),
            log_performance_metrics=_flag(inputs, "log_performance_metrics"),
            notes=tuple(notes),
        )

    @property
    def continues(self) -> bool:
        """Whether the answer continues text of the prompt, so that its leading space must be kept."""
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
            raise BadMessages(
                "messages is set together with prompt or prompt_template; send either messages or a prompt"
            )
        limits.check_at_least(len(messages))
        return _within(read_messages(messages, system_prompt), limits), []
    if not prompt.strip():
        raise PromptRequired("prompt is blank and there are no messages; send a prompt or messages")
    limits.check_at_least(prompt.count(B_INST))  # every turn has at least one token
    if custom is None:
        return _within(read_prompt(prompt, system_prompt), limits), []
    return _fill_template(custom, prompt, system_prompt, limits)


def _fill_template(
    template: PromptTemplate, prompt: str, system_prompt: str, limits: PromptLimits
) -> tuple[Dialog | FormattedPrompt, list[str]]:
    notes = []
    if template.is_for_llama_3:
        notes.append(
            "warning: prompt_template is in Llama 3's format, whose control words are sent to the model as "
            "plain text"
        )
    # Check only the repeated text here. The rest is counted when it is encoded, because formats may strip
    # white space.
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
        raise BadMessages(f"messages is {json_type(messages)}; send an array of messages")
    return messages or []


def _text(inputs: Mapping[str, Any], name: str) -> str:
    value = inputs.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidInput(f"{name} is {json_type(value)}; send a string")
    return value or ""


def _flag(inputs: Mapping[str, Any], name: str) -> bool:
    value = inputs.get(name, False)
    if not isinstance(value, bool):
        raise InvalidInput(f"{name} is {json_type(value)}; send true or false")
    return value
