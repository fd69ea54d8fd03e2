"""English words to phonemes: the network of g2p-en (https://github.com/Kyubyong/g2p), a GRU encoder-decoder.

    g2p.load(pretrained("g2p-en"))(["tokenizer"])  # [["T", "OW1", "K", "AH0", "N", "AY2", "Z", "ER0"]]

The network alone: the package asks it for words that are in neither of its dictionaries. Phonemes are those of the CMU
dictionary, vowels with their stress.
"""

from __future__ import annotations

import string
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xylem.errors import ConfigError
from xylem.models.conversion import Held, Row, read
from xylem.models.recurrent_seq2seq import greedy
from xylem.models.state_config import CELL_GATES

VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
CONSONANTS = (
    *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N"),
    *("NG", "P", "R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH"),
)
GRAPHEMES = ("<pad>", "<unk>", "</s>", *string.ascii_lowercase)
PHONEMES = (
    *("<pad>", "<unk>", "<s>", "</s>"),
    *sorted([*(vowel + stress for vowel in VOWELS for stress in "012"), "UW", *CONSONANTS]),
)
LONGEST = 20  # phonemes of a word (g2p.py, ``predict``)
BUCKET = 16  # lengths of words are rounded up to this, so that few shapes are ever compiled


def _side(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
        Row(f"{theirs}_emb", (f"{ours}/embed/embedding",)),
        Row(f"{theirs}_w_ih", (f"{ours}/cell/input/kernel",), transposed=True),
        Row(f"{theirs}_w_hh", (f"{ours}/cell/recurrent/kernel",), transposed=True),
        Row(f"{theirs}_b_ih", (f"{ours}/cell/input/bias",)),
        Row(f"{theirs}_b_hh", (f"{ours}/cell/recurrent/bias",)),
    )


ROWS = (
    *_side("enc", "encoder"),
    *_side("dec", "decoder"),
    Row("fc_w", ("decoder/head/kernel",), transposed=True),
    Row("fc_b", ("decoder/head/bias",)),
)


@dataclass(frozen=True)
class Pronouncer:
    """``Pronouncer(params)(words)`` spells words out in phonemes; ``params`` are those of ``recurrent_seq2seq.py``."""

    params: Any

    def __call__(self, words: Sequence[str]) -> list[list[str]]:
        """The phonemes of each word, at most ``LONGEST``; capitals are as small letters, other characters unknown."""
        tokens, segments = batch(words)
        written = np.asarray(greedy("gru", self.params, tokens, segments, PHONEMES.index("<s>"), LONGEST))
        rows = [row.tolist() for row in written]
        end = PHONEMES.index("</s>")
        return [[PHONEMES[i] for i in (row[: row.index(end)] if end in row else row)] for row in rows]


def batch(words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the letters of each word and of the end behind them, padded on the right, and 1 where they are real."""
    ids = {letter: number for number, letter in enumerate(GRAPHEMES)}
    unknown, end = ids["<unk>"], ids["</s>"]
    rows = [[*(ids.get(letter, unknown) for letter in word.lower()), end] for word in words]
    length = -(-max(map(len, rows), default=1) // BUCKET) * BUCKET
    real = np.array([[place < len(row) for place in range(length)] for row in rows], np.int32).reshape(-1, length)
    tokens = np.zeros_like(real)
    tokens[real > 0] = [each for row in rows for each in row]
    return tokens, real


def load(file: str | Path) -> Pronouncer:
    """The network in a ``checkpoint20.npz`` of g2p-en.

    Raises:
        ConfigError: there is no such file, it is damaged, or it holds another network.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError("checkpoint", str(path), "there is no such file")
    try:
        with path.open("rb") as opened:
            arrays = np.load(opened, allow_pickle=False)
            held = {name: Held(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigError("checkpoint", str(path), f"it is no whole .npz file ({error})") from error
    shape = held["fc_w"].shape if "fc_w" in held else ()
    template = _shapes(shape[-1] if shape else 1)
    return Pronouncer(read(str(path), ROWS, held, template, 1, lambda _, leaf: jax.device_put(leaf)))


def _shapes(width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of every parameter."""
    gates = CELL_GATES["gru"] * width
    shapes = {"decoder/head/kernel": (width, len(PHONEMES)), "decoder/head/bias": (len(PHONEMES),)}
    for side, symbols in (("encoder", GRAPHEMES), ("decoder", PHONEMES)):
        shapes[f"{side}/embed/embedding"] = (len(symbols), width)
        for part in ("input", "recurrent"):
            shapes |= {f"{side}/cell/{part}/kernel": (width, gates), f"{side}/cell/{part}/bias": (gates,)}
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
