"""Molecules and reactions as text (SMILES), cut into atoms, bonds, branches and ring numbers (1711.04810)."""

from pathlib import Path

from xylem.data.tokenizers import Tokenizer, describe
from xylem.errors import ConfigError

# An atom in brackets, one of two letters, a reaction's arrow, a ring's number of two digits; else one character.
PIECES = r"\[[^\]]+\]|Br|Cl|>>|%\d\d|."
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load(vocabulary: str | Path) -> Tokenizer:
    """The tokenizer of a ``vocab.txt``, one piece a line, as chemical BERTs have it; others are [UNK].

    Raises:
        ConfigError: there is no such file, it lists a piece twice, or it lacks a special token.
    """
    file = Path(vocabulary)
    if not file.is_file():
        raise ConfigError("tokenizer", str(file), "there is no such vocab.txt")
    pieces = file.read_text("utf-8").split()
    ids = {piece: number for number, piece in enumerate(pieces)}
    if len(ids) < len(pieces) or not ids.keys() >= set(SPECIAL):
        raise ConfigError("tokenizer", str(file), f"its lines must differ, and {', '.join(SPECIAL)} be among them")
    model = {"type": "WordLevel", "vocab": ids, "unk_token": "[UNK]"}
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    description = describe(model, split, {"type": "Fuse"}, {token: ids[token] for token in SPECIAL})
    return Tokenizer(description, end_of_text="[SEP]", begin_of_text="[CLS]", name=str(file))
