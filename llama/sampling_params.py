"""Sampling parameters: every rule of the API about numbers and stop sequences.

Knows their names and bounds, which of several names takes precedence, and the values that disable a rule.
Knows nothing about the model: `generation.py` clamps the token limits to the room left in the context.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from llama.errors import InvalidInput, MinimumAboveMaximum, json_type

DEFAULT_MAX_NEW_TOKENS = 512
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 256
# The longest valid input: every character may be escaped, and a comma follows every stop sequence.
_MAX_STOP_TEXT = MAX_STOPS * (2 * MAX_STOP_CHARACTERS + 1)
_STOP_TOKEN = re.compile(r"\\[n,\\]|,|[^\\,]+|\\", re.DOTALL)
_STOP_ESCAPES = {"\\n": "\n", "\\,": ",", "\\\\": "\\"}
_EXACT_FLOAT = 2**53  # above this, a float may stand for several integers


def _whole(value: object) -> object:
    """Convert a float such as 500.0 or 1e20 to an integer, because JSON has only one number type."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _exact(value: object) -> object:
    if isinstance(value, float) and abs(value) > _EXACT_FLOAT:
        raise ValueError(
            f"is {value!r}, which is too large to be exact in this notation; write it as an integer, with "
            "all its digits"
        )
    return value


def split_stops(text: str) -> tuple[str, ...]:
    r"""Split the input `stop_sequences` at its commas.

    Sequences are literal and are not trimmed. Empty and repeated sequences are dropped. Within a sequence,
    `\,` is a comma, `\\` is a backslash and `\n` is a newline; any other backslash is literal.
    """
    stops, stop = list[str](), ""
    for token in _STOP_TOKEN.findall(text):
        if token == ",":
            stops.append(stop)
            stop = ""
        else:
            stop += _STOP_ESCAPES.get(token, token)
    return tuple(dict.fromkeys(filter(None, [*stops, stop])))


def _within_stop_limits(text: str) -> str:
    advice = f"send at most {MAX_STOPS} sequences of at most {MAX_STOP_CHARACTERS} characters each"
    if len(text) > _MAX_STOP_TEXT:
        raise ValueError(f"has {len(text)} characters; {advice}")
    stops = split_stops(text)
    if len(stops) > MAX_STOPS:
        raise ValueError(f"has {len(stops)} sequences; {advice}")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
        raise ValueError(f"has a sequence of {longest} characters; {advice}")
    return text


Whole = Annotated[StrictInt, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1)]
Minimum = Annotated[Whole, Field(ge=-1)]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]


class SamplingParams(BaseModel):
    """The numbers and stop sequences of one request, as sent. Every default disables its rule.

    The published defaults, such as the temperature of 0.7, are in `Predictor.run`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: Count | None = None
    max_tokens: Count | None = None
    max_length: Count | None = None
    min_new_tokens: Minimum | None = None
    min_tokens: Minimum | None = None
    temperature: Annotated[Number, Field(ge=0, le=5)] = 1.0
    top_p: Annotated[Number, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[Whole, Field(ge=-1)] = 0
    repetition_penalty: Annotated[Number, Field(ge=0)] = 1.0
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    length_penalty: Annotated[Number, Field(ge=0, le=5)] = 1.0
    stop_sequences: Annotated[StrictStr, AfterValidator(_within_stop_limits)] | None = None
    seed: Annotated[StrictInt, BeforeValidator(_whole), BeforeValidator(_exact)] | None = None

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> Self:
        """Read these parameters from a prediction's inputs.

        Raises InvalidInput if a value has the wrong type or is out of bounds, and MinimumAboveMaximum if the
        minimum number of tokens exceeds a maximum that the caller set.
        """
        try:
            params = cls(**{name: inputs[name] for name in cls.model_fields if name in inputs})
        except ValidationError as error:
            raise InvalidInput(_explain(error)) from error
        if params.explicit_maximum is not None and params.minimum > params.explicit_maximum:
            raise MinimumAboveMaximum(
                f"the minimum of {params.minimum} new tokens is above the maximum of "
                f"{params.explicit_maximum}; lower min_new_tokens or raise max_new_tokens"
            )
        return params

    @property
    def explicit_maximum(self) -> int | None:
        """The maximum that the caller set, by the name that takes precedence, or None."""
        return next(
            (n for n in (self.max_new_tokens, self.max_tokens, self.max_length) if n is not None), None
        )

    @property
    def minimum(self) -> int:
        """The number of tokens before which EOS and stop sequences have no effect."""
        asked = self.min_new_tokens if self.min_new_tokens is not None else self.min_tokens
        return max(asked or 0, 0)

    @property
    def maximum(self) -> int:
        """The number of tokens after which the answer ends, before it is clamped to the context."""
        return self.explicit_maximum or max(DEFAULT_MAX_NEW_TOKENS, self.minimum)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop sequences, split and unescaped."""
        return split_stops(self.stop_sequences or "")

    @property
    def repetition(self) -> float:
        """The repetition penalty that the engine applies: 1 if it is off, and clamped for float32."""
        return min(max(self.repetition_penalty or 1.0, 1e-6), 1e6)

    @property
    def greedy(self) -> bool:
        """Whether every step picks the most likely token."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    def with_seed(self) -> Self:
        """The same parameters, with a random seed if the caller set none."""
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbits(31)})


def _explain(error: ValidationError) -> str:
    """Describe the first fault in one sentence. It may quote a number, but never a caller's text."""
    first = error.errors()[0]
    name, got = first["loc"][0], first["input"]
    if first["type"] == "value_error":  # raised in this module, with the value and the advice
        return f"{name} {first['msg'].removeprefix('Value error, ')}"
    shown = f"is {got!r}" if isinstance(got, int | float) else f"is {json_type(got)}"
    return f"{name} {shown}, but it {first['msg'].removeprefix('Input ')}; correct it or leave it out"
