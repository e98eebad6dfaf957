"""Loads the tokenizer of a model's folder, with the dialogue format that the model was trained on.

Knows the files of a tokenizer and how they can be damaged; knows nothing about how a dialogue is formatted.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.errors import BadTokenizer, InvalidInput
from llama.prompt.dialog import B_SYS, Dialog
from llama.text.llama2_tokenizer import Llama2Tokenizer
from llama.text.sentencepiece_model import from_tokenizer_json
from llama.text.tokenizer import Tokenizer
from llama.weights.file_checks import named_ends, read_object, without_byte_order_marks

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    from llama.text.chat_template import ChatTemplateTokenizer

logger = logging.getLogger(__name__)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a model's folder, with the dialogue format that the model was trained on.

    Raises BadTokenizer if the tokenizer is missing or damaged, or if its dialogue format is not supported.
    """
    template = _chat_template(folder)
    if template is not None and B_SYS not in template:
        return _load_chat_template_tokenizer(folder)
    path = next(
        (folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()), None
    )
    if path is None:
        raise BadTokenizer(
            f"{folder / 'tokenizer.model'} does not exist, and neither does tokenizer.json; copy the "
            "model's tokenizer files into the folder"
        )
    processor = _load_sentencepiece(path)
    if [processor.id_to_piece(i) for i in range(4)] != ["<unk>", "<s>", "</s>", "<0x00>"]:
        raise BadTokenizer(
            f"{path} is not a Llama 2 vocabulary, and the folder has no chat template for another format; "
            "add the chat template that the model was trained on"
        )
    return Llama2Tokenizer(processor)


def fit_tokenizer(tokenizer: Tokenizer, rows: int, folder: Path) -> None:
    """Restrict a tokenizer to the ids below `rows`, the number of rows in the model's embedding table.

    The table may have padding rows that belong to no token, and a few control tokens may lie beyond its end.
    Raises BadTokenizer if the tokenizer cannot belong to the model.
    """
    if tokenizer.text_size > rows:
        raise BadTokenizer(
            f"the tokenizer in {folder} has {tokenizer.text_size} tokens, but vocab_size in config.json is "
            f"{rows}; copy the tokenizer files that belong to this model"
        )
    if 2 * tokenizer.size < rows:
        logger.warning(
            "the tokenizer in %s has %d tokens, but vocab_size in config.json is %d; check that the "
            "tokenizer belongs to this model",
            folder,
            tokenizer.size,
            rows,
        )
    tokenizer.restrict(rows)


def _chat_template(folder: Path) -> str | None:
    """The chat template that transformers would render, or None if the folder has no templates.

    Of several named templates this is the one named default, or "" if none has that name.
    """
    try:
        if (path := folder / "chat_template.jinja").is_file():
            return path.read_text(encoding="utf-8-sig")
        if (path := folder / "additional_chat_templates").is_dir() and any(path.glob("*.jinja")):
            return ""
    except (OSError, ValueError) as error:
        raise BadTokenizer(f"{path} cannot be read ({error}); copy it again") from error
    path = folder / "tokenizer_config.json"
    template = read_object(path, BadTokenizer).get("chat_template") if path.is_file() else None
    if isinstance(template, dict):
        template = template.get("default", "")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else ""
    if not isinstance(template, str | None):
        raise BadTokenizer(f"{path} has a chat_template that is not a string; copy the file again")
    return template


def _load_sentencepiece(path: Path) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    try:
        if path.suffix == ".json":
            return SentencePieceProcessor(model_proto=from_tokenizer_json(path))
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise BadTokenizer(f"{path} is not a SentencePiece model; copy it again") from error


def _load_chat_template_tokenizer(folder: Path) -> ChatTemplateTokenizer:
    """Load the folder's fast tokenizer and try out its chat template.

    Raises BadTokenizer if the tokenizer cannot be loaded, if its vocabulary is of an unsupported kind, or if
    the chat template cannot render a user message.
    """
    tokenizer = _load(folder)
    faults = [_template_fault(tokenizer, system) for system in ("", "Be brief.")]
    if all(faults):  # some templates require a system message, and some reject one
        raise BadTokenizer(
            f"the chat template in {folder} {faults[0]}; correct it, or copy the model's own chat template"
        )
    if faults[1]:
        logger.warning(
            "with a system message, the chat template %s; callers must leave system_prompt blank", faults[1]
        )
    return tokenizer


def _template_fault(tokenizer: ChatTemplateTokenizer, system: str) -> str | None:
    """Describe what is wrong with how the chat template renders one user message; None if nothing is."""
    one, other = Dialog(system, ("Hello",)), Dialog(system, ("Why?",))
    try:
        if not tokenizer.encode(one):
            return "renders a user message as an empty prompt"
        if tokenizer.render(one) == tokenizer.render(other):
            return "leaves out the text of a user message"
    except InvalidInput as error:
        line = getattr(error.__cause__, "lineno", None)
        return f"cannot render a user message ({error.__cause__}{f', line {line}' if line else ''})"
    return None


def _load(folder: Path) -> ChatTemplateTokenizer:
    from transformers import AutoTokenizer

    from llama.text.chat_template import ChatTemplateTokenizer

    try:
        with without_byte_order_marks(folder) as clean:
            tokenizer = AutoTokenizer.from_pretrained(clean, local_files_only=True, trust_remote_code=False)
        _check_end_of_text(tokenizer, folder)
        return ChatTemplateTokenizer(tokenizer)
    except BadTokenizer:
        raise
    # transformers and tokenizers raise many types here, including plain Exception
    except Exception as error:
        if not (folder / "tokenizer.json").is_file():
            raise BadTokenizer(
                f"{folder} has a chat template but no tokenizer.json, which the template requires; copy the "
                "model's tokenizer.json into the folder, or create one with transformers' save_pretrained"
            ) from error
        raise BadTokenizer(
            f"the tokenizer files in {folder} cannot be loaded ({type(error).__name__}: {error}); copy them "
            "again"
        ) from error


def _check_end_of_text(tokenizer: Any, folder: Path) -> None:
    """If the tokenizer defines no end-of-text token, set the one in the model's configuration."""
    if not tokenizer.is_fast:
        raise BadTokenizer(f"{folder} has no tokenizer.json; copy the model's tokenizer.json into the folder")
    if tokenizer.eos_token_id is not None:
        return
    token_id = _end_of_text(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token_id)
    if tokenizer.eos_token_id is None:
        raise BadTokenizer(
            f"eos_token_id is {token_id}, which {folder / 'tokenizer.json'} does not contain; correct "
            "eos_token_id in the model's configuration"
        )


def _end_of_text(folder: Path) -> int:
    """The first end-of-text id in the model's configuration."""
    for _, named in named_ends(folder):
        first = named[0] if isinstance(named, list) and named else named
        if type(first) is int:
            return first
    raise BadTokenizer(
        f"no file in {folder} defines the end-of-text token; set eos_token in tokenizer_config.json"
    )
