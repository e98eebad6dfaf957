"""All errors of predictions, settings and weights. Each has a stable code.

    LlamaError
    ├── UserError                the request is at fault, E1xxx
    │   ├── InvalidInput         E1000
    │   ├── PromptRequired       E1001
    │   ├── PromptTooLong        E1002
    │   ├── BadPromptTemplate    E1003
    │   ├── BadMessages          E1005
    │   ├── UnsupportedWeights   E1006
    │   ├── MinimumAboveMaximum  E1101
    │   └── NotSupported         E1103
    ├── EngineError              the engine failed, E2xxx
    │   ├── GenerationFailed     E2001
    │   └── EngineStopped        E2002
    ├── WeightsError             weights or settings are at fault, found at setup, E3xxx
    │   ├── BadSettings          E3000
    │   ├── WeightsNotFound      E3001
    │   ├── BadConfig            E3002
    │   ├── BadCheckpoint        E3003
    │   ├── BadTokenizer         E3004
    │   ├── DoesNotFit           E3005
    │   ├── BadManifest          E3006
    │   ├── DownloadFailed       E3007
    │   ├── DiskFull             E3008
    │   ├── DamagedWeights       E3009
    │   └── EngineNotStarted     E3010
    └── GatewayError             the gateway could not complete a prediction, E4xxx
        ├── ServerLost           E4001
        ├── GatewayRestarted     E4002
        ├── NotStarted           E4003
        └── BudgetUsedUp         E4004

A message states what happened and what to do, on one line. It never quotes the caller's text, because Cog
reports a prediction as cancelled if its error message contains the word "cancelled".
"""

from __future__ import annotations

from typing import Any, ClassVar

_JSON_TYPES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


def json_type(value: Any) -> str:
    """Name the JSON type of an input, for messages to callers."""
    return _JSON_TYPES.get(type(value), type(value).__name__)


class LlamaError(Exception):
    """Base class of all errors. `str()` returns the published line, such as `E1002 PromptTooLong: ...`."""

    code: ClassVar[str]

    def __init__(self, message: str) -> None:
        self.message = " ".join(message.split())
        """The message without the code and the name of the error."""
        super().__init__(f"{self.code} {type(self).__name__}: {self.message}")


class UserError(LlamaError):
    """The request is invalid, and retrying it without a change fails again."""


class InvalidInput(UserError):
    """An input has the wrong type or is out of range."""

    code = "E1000"


class PromptRequired(UserError):
    """The request has neither a prompt nor messages, or its last user turn is empty."""

    code = "E1001"


class PromptTooLong(UserError):
    """The formatted prompt fills the context, so that not even one new token fits."""

    code = "E1002"


class BadPromptTemplate(UserError):
    """`prompt_template` has no placeholder for the prompt."""

    code = "E1003"


class BadMessages(UserError):
    """`messages` is not a valid dialogue: roles, order or contents are wrong."""

    code = "E1005"


class UnsupportedWeights(UserError):
    """`replicate_weights` asks for fine-tuned weights."""

    code = "E1006"


class MinimumAboveMaximum(UserError):
    """The minimum number of new tokens is larger than the maximum."""

    code = "E1101"


class NotSupported(UserError):
    """The running engine does not support the value of an input, but another engine does."""

    code = "E1103"


class EngineError(LlamaError):
    """The engine failed. The same request may succeed later or on another server."""


class GenerationFailed(EngineError):
    """The answer could not be generated. If a whole step fails, all running and waiting requests fail."""

    code = "E2001"


class EngineStopped(EngineError):
    """The engine has stopped and accepts no requests."""

    code = "E2002"


class WeightsError(LlamaError):
    """The model cannot be served with these weights and settings, so setup fails."""


class BadSettings(WeightsError):
    """A setting or a command's argument is invalid, or a file that setup must write cannot be written."""

    code = "E3000"


class WeightsNotFound(WeightsError):
    """The weights folder does not exist, or the embedded model is not installed."""

    code = "E3001"


class BadConfig(WeightsError):
    """`config.json` is missing, unreadable or invalid, or describes another architecture."""

    code = "E3002"


class BadCheckpoint(WeightsError):
    """A weights file is missing or damaged, or does not match `config.json`."""

    code = "E3003"


class BadTokenizer(WeightsError):
    """The tokenizer is missing, does not match the model, or has no known dialogue format."""

    code = "E3004"


class DoesNotFit(WeightsError):
    """The model and a cache for one request do not fit into memory."""

    code = "E3005"


class BadManifest(WeightsError):
    """The weights manifest has an invalid line, or cannot be read or written."""

    code = "E3006"


class DownloadFailed(WeightsError):
    """A weights file could not be downloaded, written or moved into place."""

    code = "E3007"


class DiskFull(WeightsError):
    """The disk has too little free space for the weights."""

    code = "E3008"


class DamagedWeights(WeightsError):
    """A weights file does not match the hash or size that the manifest or the server states."""

    code = "E3009"


class EngineNotStarted(WeightsError):
    """The engine did not start with these weights and settings."""

    code = "E3010"


class GatewayError(LlamaError):
    """The gateway could not complete a prediction. The same request may succeed later."""


class ServerLost(GatewayError):
    """The server ended, or stopped responding, during the answer."""

    code = "E4001"


class GatewayRestarted(GatewayError):
    """The gateway ended during the answer."""

    code = "E4002"


class NotStarted(GatewayError):
    """No server took the request in time."""

    code = "E4003"


class BudgetUsedUp(GatewayError):
    """The monthly budget of the key was used up while the request waited."""

    code = "E4004"
