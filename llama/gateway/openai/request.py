"""The bodies of OpenAI's chat and text completions, and how they become the predictor's inputs.

Knows OpenAI's members, defaults and bounds. `openai/members.py` knows the members that are not implemented,
and `openai/messages.py` the messages. Knows nothing about HTTP or responses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llama.errors import json_type
from llama.gateway.openai.members import (
    CHAT_VALUES,
    TEXT_VALUES,
    explain,
    implemented,
    invalid,
    unknown,
    unsupported,
)
from llama.gateway.openai.messages import read_messages
from llama.gateway.problems import Problem
from llama.gateway.stop_sequences import join_stops

DEFAULT_TEXT_TOKENS = 16
"""How many tokens a text completion has at most if the client does not say, as OpenAI documents."""
UP_TO_THE_CONTEXT = 2**31 - 1
"""A maximum number of tokens that the predictor lowers to the room left in the context."""
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 256
"""The predictor's limits. OpenAI allows 4 stop sequences."""

_SEED_LIMIT = 2**63
_SAME_NAME = frozenset(
    {
        "frequency_penalty",
        "min_tokens",
        "presence_penalty",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    }
)


def _whole(value: object) -> object:
    """Convert a float such as 16.0 to an integer, because JSON has only one number type."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _within_limits(stops: list[str]) -> list[str]:
    # The predictor ignores empty and repeated ones, so they do not count.
    stops = list(dict.fromkeys(filter(None, stops)))
    if len(stops) > MAX_STOPS:
        raise ValueError(f"it has {len(stops)} sequences, and at most {MAX_STOPS} are allowed.")
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
        raise ValueError(
            f"it has a sequence of {longest} characters, and at most {MAX_STOP_CHARACTERS} are allowed."
        )
    return stops


def _without_token_ids(value: object) -> object:
    if isinstance(value, list) and value and isinstance(value[0], int | list):
        raise unsupported("prompt", "Prompts of token ids are not supported; send text as 'prompt'.")
    return [value] if isinstance(value, str) else value


def _not_blank(prompts: list[str]) -> list[str]:
    if not prompts:
        raise ValueError("it is empty; send a string or an array of strings.")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is blank; send a text to continue.")
    return prompts


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1)]
Number = Annotated[Whole, Field(ge=1, le=UP_TO_THE_CONTEXT)]
Setting = Annotated[Whole, Field(ge=-1, le=UP_TO_THE_CONTEXT)]
Texts = Annotated[list[str], Field(fail_fast=True)]  # only the first error is reported
Penalty = Annotated[float, Field(ge=-2, le=2)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Has no effect: nothing is added to hide the lengths of the chunks."""


def _known_options(value: object) -> object:
    if not isinstance(value, dict):
        return value
    options = {name: option for name, option in value.items() if option is not None}
    _check_names(options, StreamOptions, "stream_options.")
    return options


def _check_names(members: Iterable[str], model: type[BaseModel], prefix: str = "") -> None:
    """Refuse the first member that the model does not have. pydantic would describe all of them first."""
    for name in members:
        if name not in model.model_fields:
            raise unknown(f"{prefix}{name}")


@dataclass(frozen=True)
class CompletionRequest:
    """What a client asked for, and the inputs of the predictions that it takes."""

    is_chat: bool
    model: str
    inputs: tuple[dict[str, Any], ...]
    """The inputs of each choice, by its index."""
    choices_per_prompt: int
    stream: bool
    include_usage: bool


class CompletionBody(_Strict):
    """The members that chat and text completions have in common. None means that a member is unset."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]]
    is_chat: ClassVar[bool]

    model: str
    stream: bool = False
    stream_options: Annotated[StreamOptions, BeforeValidator(_known_options)] | None = None
    n: Number = 1
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: Annotated[Texts, BeforeValidator(_texts), AfterValidator(_within_limits)] = Field(
        default_factory=list
    )
    seed: Annotated[Whole, Field(ge=-_SEED_LIMIT, lt=_SEED_LIMIT)] | None = None
    top_k: Setting | None = None
    repetition_penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    min_tokens: Setting | None = None
    """The last three are inputs of the predictor that OpenAI does not have."""

    @classmethod
    def parse(cls, body: Any) -> Self:
        """Read a parsed JSON body. Raises Problem 400, which names the parameter that cannot be used."""
        if not isinstance(body, dict):
            raise Problem(
                400, "Invalid request", f"The body has to be a JSON object, but it is {json_type(body)}."
            )
        members = implemented(body, cls.unsupported)
        _check_names(members, cls)
        try:
            request = cls.model_validate(members)
        except ValidationError as error:
            raise explain(error) from error
        if request.stream_options is not None and not request.stream:
            raise invalid(
                "stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            )
        return request

    def request(self, places: int) -> CompletionRequest:
        """Return the inputs of all choices. Raises Problem 400 if they are more than `places`."""
        prompts = self.prompts()
        if self.n * len(prompts) > places:
            raise invalid(
                "n",
                f"Invalid 'n': {self.n * len(prompts)} choices were requested, and at most {places} are "
                "generated at once.",
            )
        sampling = self._sampling()
        return CompletionRequest(
            is_chat=self.is_chat,
            model=self.model,
            inputs=tuple(
                {**prompt, **sampling, **self._seed(choice)} for prompt in prompts for choice in range(self.n)
            ),
            choices_per_prompt=self.n,
            stream=self.stream,
            include_usage=self.stream_options is not None and self.stream_options.include_usage,
        )

    def prompts(self) -> list[dict[str, Any]]:
        """The inputs that differ between prompts."""
        raise NotImplementedError

    def max_new_tokens(self) -> int:
        raise NotImplementedError

    def _sampling(self) -> dict[str, Any]:
        inputs = self.model_dump(include=set(_SAME_NAME), exclude_none=True)
        inputs["max_new_tokens"] = min(self.max_new_tokens(), UP_TO_THE_CONTEXT)
        if self.stop:
            inputs["stop_sequences"] = join_stops(self.stop)
        return inputs

    def _seed(self, choice: int) -> dict[str, int]:
        return {} if self.seed is None else {"seed": self.seed + choice}


class ChatBody(CompletionBody):
    """The body of `POST /chat/completions`."""

    unsupported = dict(CHAT_VALUES)
    is_chat = True

    messages: list[Any]
    max_completion_tokens: Count | None = None

    def prompts(self) -> list[dict[str, Any]]:
        # Without a system prompt, the predictor would use its own.
        return [{"messages": read_messages(self.messages), "system_prompt": ""}]

    def max_new_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or UP_TO_THE_CONTEXT


class TextBody(CompletionBody):
    """The body of `POST /completions`. The prompt is sent to the model without any formatting."""

    unsupported = dict(TEXT_VALUES)
    is_chat = False

    prompt: Annotated[Texts, BeforeValidator(_without_token_ids), AfterValidator(_not_blank)]
    best_of: Count | None = None

    def prompts(self) -> list[dict[str, Any]]:
        if self.best_of not in (None, 1, self.n):
            raise unsupported("best_of", "'best_of' is not supported with this model, unless it equals 'n'.")
        return [{"prompt": prompt, "prompt_template": "{prompt}"} for prompt in self.prompt]

    def max_new_tokens(self) -> int:
        return self.max_tokens or DEFAULT_TEXT_TOKENS
