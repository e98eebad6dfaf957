"""Builds a SentencePiece model from a `tokenizer.json`, for folders without a `tokenizer.model`.

SentencePiece defines Llama 2's token ids. With the same vocabulary, the `tokenizers` library gives other ids
for some texts, such as runs of spaces. Only the vocabulary and the order of its merges are therefore read
from the file. Knows both formats; knows nothing about dialogues.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama.errors import BadTokenizer
from llama.weights.file_checks import read_object

_CONTROL = ("<s>", "</s>")
_UNKNOWN = "<unk>"
_SPACE = "\u2581"
_LOWEST_SCORE = -1e9
"""Llama 2's score for runs of spaces, which merge last. transformers 5 drops it when it saves a tokenizer."""


def from_tokenizer_json(path: Path) -> bytes:
    """Return a serialized SentencePiece model with the vocabulary of a BPE `tokenizer.json`.

    Raises BadTokenizer if the file contains another kind of tokenizer.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    pieces, ranks = _read(path)
    proto = ModelProto()
    kinds = ModelProto.SentencePiece.Type
    for piece in pieces:
        # SentencePiece first merges the pair with the highest score; `tokenizers`, the pair listed first.
        score = (
            _LOWEST_SCORE
            if set(piece) == {_SPACE} or (len(piece) > 1 and piece not in ranks)
            else -ranks.get(piece, 0)
        )
        proto.pieces.add(piece=piece, score=score, type=kinds.Value(_kind(piece)))
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = (
        "identity",
        True,
        False,
    )
    return bytes(proto.SerializeToString())


def _kind(piece: str) -> str:
    if piece == _UNKNOWN:
        return "UNKNOWN"
    if piece in _CONTROL:
        return "CONTROL"
    return "BYTE" if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else "NORMAL"


def _read(path: Path) -> tuple[list[str], dict[str, int]]:
    """Return the pieces in the order of their ids, and the rank of the first merge that gives each piece."""
    model = read_object(path, BadTokenizer).get("model")
    try:
        if not isinstance(model, dict) or model["byte_fallback"] is not True:
            raise ValueError("not a BPE model with byte fallback")
        vocabulary: dict[str, int] = model["vocab"]
        pieces = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[piece] for piece in pieces] != list(range(len(pieces))):
            raise ValueError("the token ids have gaps")
        if not all(type(token_id) is int for token_id in vocabulary.values()):
            raise ValueError("the token ids are not all integers")
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(model["merges"]):
            ranks.setdefault(_merged(merge), rank)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadTokenizer(
            f"{path} is not a Llama 2 vocabulary (BPE with byte fallback), and the folder has no chat "
            "template for another format; add the chat template that the model was trained on"
        ) from error
    return pieces, ranks


def _merged(merge: Any) -> str:
    """The piece that a merge gives. A merge is a pair of pieces, in older files joined by a space."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(first, str) or not isinstance(second, str):
        raise TypeError("a merge is not a pair of pieces")
    return first + second
