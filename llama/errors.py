"""Every error a caller, an operator or a log may see, each with a stable code.

    LlamaError
    ├── UserError                the caller's fault, E1xxx
    │   ├── InvalidInput         E1000
    │   ├── PromptRequired       E1001
    │   ├── PromptTooLong        E1002
    │   ├── BadPromptTemplate    E1003
    │   ├── BadMessages          E1005
    │   ├── UnsupportedWeights   E1006
    │   ├── MinimumAboveMaximum  E1101
    │   └── NotSupported         E1103
    ├── EngineError              ours, E2xxx
    │   ├── GenerationFailed     E2001
    │   └── EngineStopped        E2002
    └── WeightsError             weights and settings, found at setup, E3xxx
        ├── BadSettings          E3000
        ├── WeightsNotFound      E3001
        ├── BadConfig            E3002
        ├── BadCheckpoint        E3003
        ├── BadTokenizer         E3004
        ├── DoesNotFit           E3005
        ├── BadManifest          E3006
        ├── DownloadFailed       E3007
        ├── DiskFull             E3008
        ├── DamagedWeights       E3009
        └── EngineNotStarted     E3010

A message says what was got and what to do, on one line. It never quotes the caller's text: Cog
reports an error that happens to contain the word "cancelled" as a cancelled prediction.
"""

from __future__ import annotations

from typing import ClassVar


class LlamaError(Exception):
    """Base of all errors; `str()` gives the published line `E1002 PromptTooLong: ...`."""

    code: ClassVar[str]

    def __init__(self, message: str) -> None:
        self.message = " ".join(message.split())
        """Without code and name."""
        super().__init__(f"{self.code} {type(self).__name__}: {self.message}")


class UserError(LlamaError):
    """The request cannot be served as it was sent; sending it again will not help."""


class InvalidInput(UserError):
    """An input has the wrong type or is out of its bounds."""

    code = "E1000"


class PromptRequired(UserError):
    """Neither a prompt nor messages, or a last user turn without words."""

    code = "E1001"


class PromptTooLong(UserError):
    """The formatted prompt leaves no room in the context for one new token."""

    code = "E1002"


class BadPromptTemplate(UserError):
    """`prompt_template` has no place for the prompt."""

    code = "E1003"


class BadMessages(UserError):
    """`messages` is not a dialogue: wrong roles, order or contents."""

    code = "E1005"


class UnsupportedWeights(UserError):
    """`replicate_weights` asks for fine-tuned weights."""

    code = "E1006"


class MinimumAboveMaximum(UserError):
    """More tokens are demanded than are allowed."""

    code = "E1101"


class NotSupported(UserError):
    """The engine that serves here has no such thing; another one has."""

    code = "E1103"


class EngineError(LlamaError):
    """The engine failed; the same request may succeed later or elsewhere."""


class GenerationFailed(EngineError):
    """A step of the engine failed with every running and waiting request, or reading one request's prompt
    failed."""

    code = "E2001"


class EngineStopped(EngineError):
    """The engine is not running any more and takes no requests."""

    code = "E2002"


class WeightsError(LlamaError):
    """The model cannot be served with these weights and settings; setup stops here."""


class BadSettings(WeightsError):
    """A `LLAMA_*` variable has a value that cannot be used."""

    code = "E3000"


class WeightsNotFound(WeightsError):
    """No folder of weights where one was asked for."""

    code = "E3001"


class BadConfig(WeightsError):
    """`config.json` is missing, unreadable, or describes another architecture."""

    code = "E3002"


class BadCheckpoint(WeightsError):
    """A weights file is missing, damaged, or does not fit `config.json`."""

    code = "E3003"


class BadTokenizer(WeightsError):
    """The tokenizer is missing, does not match the model, or has no known dialogue format."""

    code = "E3004"


class DoesNotFit(WeightsError):
    """The memory does not hold the model and a cache for one request."""

    code = "E3005"


class BadManifest(WeightsError):
    """The manifest of weights has a line that cannot be used, or is not to be read or written."""

    code = "E3006"


class DownloadFailed(WeightsError):
    """A file of weights could not be downloaded or moved into place."""

    code = "E3007"


class DiskFull(WeightsError):
    """The disk does not hold the weights."""

    code = "E3008"


class DamagedWeights(WeightsError):
    """A file of weights is not the one that the manifest or the server says."""

    code = "E3009"


class EngineNotStarted(WeightsError):
    """An engine did not start with these weights and settings."""

    code = "E3010"
