"""Sampling parameters: every rule of the API about numbers and stop sequences.

Knows names, bounds, precedence and what switches a rule off; knows nothing of a model, so clamping
to the room left in a context is done where the context is known (`generation.py`).
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

from llama.errors import InvalidInput, MinimumAboveMaximum

DEFAULT_MAX_NEW_TOKENS = 512
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 256
# What every legal list fits into: each character of it may be escaped, and each stop has a comma.
_MAX_STOP_TEXT = MAX_STOPS * (2 * MAX_STOP_CHARACTERS + 1)
_STOP_TOKEN = re.compile(r"\\[n,\\]|,|[^\\,]+|\\", re.DOTALL)
_STOP_ESCAPES = {"\\n": "\n", "\\,": ",", "\\\\": "\\"}
_EXACT_FLOAT = 2**53  # beyond this a float no longer names one whole number


def _whole(value: object) -> object:
    """JSON has one number type, so 500.0 and 1e20 arrive as floats where a whole number is meant."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _exact(value: object) -> object:
    if isinstance(value, float) and abs(value) > _EXACT_FLOAT:
        raise ValueError("is too large to be exact; send a whole number between -2**53 and 2**53")
    return value


def split_stops(text: str) -> tuple[str, ...]:
    r"""Split the input `stop_sequences` at its commas.

    Sequences are literal and are not trimmed; empty and repeated ones are dropped. `\,` is a comma within a
    sequence, `\\` a backslash and `\n` a newline; a backslash before anything else is itself.
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
    """The numbers of one request, as sent. A default here means that the rule is off.

    The published defaults (temperature 0.7 and so on) are those of `Predictor.run`.
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
        """Take this model's fields out of a prediction's inputs.

        Raises InvalidInput for a wrong type or a broken bound, MinimumAboveMaximum.
        """
        try:
            params = cls(**{name: inputs[name] for name in cls.model_fields if name in inputs})
        except ValidationError as error:
            raise InvalidInput(_explain(error)) from error
        if params.explicit_maximum is not None and params.minimum > params.explicit_maximum:
            raise MinimumAboveMaximum(
                f"at least {params.minimum} new tokens are asked for and at most {params.explicit_maximum} "
                "are allowed; lower min_new_tokens or raise max_new_tokens"
            )
        return params

    @property
    def explicit_maximum(self) -> int | None:
        """The maximum that the caller set, by its newest name that is there."""
        return next(
            (n for n in (self.max_new_tokens, self.max_tokens, self.max_length) if n is not None), None
        )

    @property
    def minimum(self) -> int:
        """Tokens before which neither EOS nor a stop sequence has an effect."""
        asked = self.min_new_tokens if self.min_new_tokens is not None else self.min_tokens
        return max(asked or 0, 0)

    @property
    def maximum(self) -> int:
        """Tokens after which the answer ends, not yet clamped to the context."""
        return self.explicit_maximum or max(DEFAULT_MAX_NEW_TOKENS, self.minimum)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop sequences, as `split_stops` reads them."""
        return split_stops(self.stop_sequences or "")

    @property
    def repetition(self) -> float:
        """The penalty as an engine applies it: 1 where it is off, and within what float32 holds."""
        return min(max(self.repetition_penalty or 1.0, 1e-6), 1e6)

    @property
    def greedy(self) -> bool:
        """Whether every step takes the single best token."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    def with_seed(self) -> Self:
        """The same parameters with a seed: the caller's, or one drawn here."""
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbits(31)})


def _explain(error: ValidationError) -> str:
    """The first fault as one sentence. Numbers are repeated, a caller's text never is."""
    first = error.errors()[0]
    name, got = first["loc"][0], first["input"]
    shown = f" is {got!r}" if isinstance(got, int | float) else f" is of type {type(got).__name__}"
    if name == "stop_sequences" and first["type"] == "value_error":
        return f"{name} {first['msg'].removeprefix('Value error, ')}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{name}{shown}: it {message}; correct it or leave it out"
