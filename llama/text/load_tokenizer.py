"""The tokenizer of a model's folder, with the dialogue format that the model was trained on.

Knows the files of a tokenizer and what can be wrong with them; knows nothing of how a dialogue is spelt.
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
    """The tokenizer of a model's folder, with the format that the model was trained on.

    Raises BadTokenizer if there is no tokenizer, if it is damaged, or if its dialogue format is not known
    here.
    """
    template = _chat_template(folder)
    if template is not None and B_SYS not in template:
        return _load_chat_template_tokenizer(folder)
    path = next(
        (folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()), None
    )
    if path is None:
        raise BadTokenizer(
            f"{folder / 'tokenizer.model'} is not there, and neither is tokenizer.json; copy the model's "
            "tokenizer files into the folder"
        )
    processor = _load_sentencepiece(path)
    if [processor.id_to_piece(i) for i in range(4)] != ["<unk>", "<s>", "</s>", "<0x00>"]:
        raise BadTokenizer(
            f"{path} is not a Llama 2 vocabulary and the folder has no chat template of another format; "
            "add the chat template that the model was trained on"
        )
    return Llama2Tokenizer(processor)


def fit_tokenizer(tokenizer: Tokenizer, rows: int, folder: Path) -> None:
    """Restrict a tokenizer to the ids below `rows`, the height of the model's table. The table may be padded
    with rows that are no tokens, and a few control tokens may lie outside of it.

    Raises BadTokenizer when the tokenizer cannot belong to the model.
    """
    if tokenizer.text_size > rows:
        raise BadTokenizer(
            f"the tokenizer in {folder} has {tokenizer.text_size} tokens and the vocab_size of config.json "
            f"is {rows}; copy the tokenizer files that belong to this model"
        )
    if 2 * tokenizer.size < rows:
        logger.warning(
            "the tokenizer in %s has %d tokens and the vocab_size of config.json is %d: is it this model's?",
            folder,
            tokenizer.size,
            rows,
        )
    tokenizer.restrict(rows)


def _chat_template(folder: Path) -> str | None:
    """The chat template that transformers would render: of several the one called default, and "" if there is
    none of that name. None for a folder without templates."""
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
        raise BadTokenizer(f"{path} has no text as chat_template; copy it again")
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
    """Raises BadTokenizer when the folder's tokenizer cannot be loaded, when it spells text in a way that is
    not known here, or when its chat template cannot render a message."""
    tokenizer = _load(folder)
    faults = [_template_fault(tokenizer, system) for system in ("", "Be brief.")]
    if all(faults):  # some templates demand a system message, and some refuse one
        raise BadTokenizer(f"the chat template in {folder} {faults[0]}; correct it, or copy the model's own")
    if faults[1]:
        logger.warning(
            "the chat template %s with a system message: callers must leave system_prompt blank", faults[1]
        )
    return tokenizer


def _template_fault(tokenizer: ChatTemplateTokenizer, system: str) -> str | None:
    """What is wrong with how a chat template renders one user message; None when it is right."""
    one, other = Dialog(system, ("Hello",)), Dialog(system, ("Why?",))
    try:
        if not tokenizer.encode(one):
            return "renders a user message as nothing"
        if tokenizer.render(one) == tokenizer.render(other):
            return "leaves out what the user says"
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
    # transformers and tokenizers raise many types here, bare Exception among them
    except Exception as error:
        if not (folder / "tokenizer.json").is_file():
            raise BadTokenizer(
                f"{folder} has a chat template but no tokenizer.json, without which it cannot be used; copy "
                "the model's tokenizer.json into the folder, or write one with transformers' save_pretrained"
            ) from error
        raise BadTokenizer(
            f"the tokenizer files in {folder} cannot be loaded ({type(error).__name__}: {error}); copy them "
            "again"
        ) from error


def _check_end_of_text(tokenizer: Any, folder: Path) -> None:
    """Give the tokenizer the end of text that the model's configuration names, if it names none itself."""
    if not tokenizer.is_fast:
        raise BadTokenizer(f"{folder} has no tokenizer.json; copy the model's into the folder")
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(_end_of_text(folder))
    if tokenizer.eos_token_id is None:
        raise BadTokenizer(
            f"the token that ends a text is not in {folder / 'tokenizer.json'}; correct eos_token_id"
        )


def _end_of_text(folder: Path) -> int:
    """The first id that ends an answer, for a tokenizer that names no token of its own."""
    for _, named in named_ends(folder):
        first = named[0] if isinstance(named, list) and named else named
        if type(first) is int:
            return first
    raise BadTokenizer(
        f"no file in {folder} names the token that ends a text; set eos_token in tokenizer_config.json"
    )
