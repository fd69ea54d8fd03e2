"""The byte-level BPE vocabulary inside a GGUF file.

Metadata keys: github.com/ggml-org/ggml, docs/gguf.md, "Tokenizer". The file names its pre-tokenizer in
``tokenizer.ggml.pre``; what each name means stands only in the source of llama.cpp (``src/llama-vocab.cpp``).
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from xylem.data.tokenizers import BYTE_LEVEL, describe
from xylem.errors import ConfigError

_DIGITS = {"type": "Digits", "individual_digits": True}
# LLaMA 3 (github.com/meta-llama/llama3, llama/tokenizer.py, pat_str).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(expression: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}


PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, BYTE_LEVEL]},
    "llama-bpe": _split(_LLAMA3),
}

# Kinds of token (gguf.md, token_type): these two are matched in the text before any merge.
_CONTROL, _USER_DEFINED = 3, 4
# Types of metadata values (gguf.md, gguf_metadata_value_type): numbers as struct codes, and the two that nest.
_NUMBERS: dict[int, str] = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


def read(path: Path) -> dict[str, Any]:
    """The arguments that make a ``Tokenizer`` of a GGUF file's metadata, ``name`` apart.

    Raises:
        ConfigError: not a GGUF file, or its vocabulary is of another kind (SentencePiece) or pre-tokenizer.
    """
    fields = metadata(path, "tokenizer.")
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ConfigError("tokenizer", str(path), f"a GGUF file with a byte-level BPE; this one has {kind!r}")
    if pre not in PRE_TOKENIZERS:
        allowed = f"its pre-tokenizer is {pre!r}; read are {', '.join(PRE_TOKENIZERS)}"
        raise ConfigError("tokenizer", str(path), allowed)
    try:
        tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
        types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        vocabulary = {token: number for number, token in enumerate(tokens)}
        pairs = [_pair(merge, vocabulary) for merge in merges]
        special = {token: vocabulary[token] for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL}
        defined = {token: vocabulary[token] for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED}
        named = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
        text = {name: tokens[number] for name, number in named.items() if number is not None}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError("tokenizer", str(path), f"its vocabulary is broken ({error!r})") from error
    # LLaMA 3 takes a whole word that is in the vocabulary before it tries merges (tokenizer.json of the original).
    model = {"type": "BPE", "vocab": vocabulary, "merges": pairs, "ignore_merges": pre == "llama-bpe"}
    description = describe(model, PRE_TOKENIZERS[pre], {"type": "ByteLevel"}, special | defined)
    for added in description["added_tokens"]:
        added["special"] = added["content"] in special
    end = next((token for token in ("<|endoftext|>", "<|end_of_text|>") if token in vocabulary), text.get("eos"))
    return {
        "description": description,
        "end_of_text": end,
        "begin_of_text": text.get("bos") if fields.get("tokenizer.ggml.add_bos_token") else None,
        "stop": list(dict.fromkeys(text[name] for name in ("eos", "eot") if name in text)),
        "named": {f"{name}_token": text[name] for name in ("bos", "eos") if name in text},
        "chat_template": fields.get("tokenizer.chat_template"),
    }


def metadata(path: Path, prefix: str = "") -> dict[str, Any]:
    """The metadata of a GGUF file whose keys start with ``prefix``; tensors are not touched.

    The reader of the ``gguf`` package makes an array of every string: seconds for a vocabulary that takes a tenth of
    one here.

    Raises:
        ConfigError: not a GGUF file (version 2 or 3, little-endian), or cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            magic, version, _, count = struct.unpack_from("<4sIQQ", data)
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError("it does not begin as one")
            found, at = {}, struct.calcsize("<4sIQQ")
            for _ in range(count):
                key, at = _value(data, at, _STRING)
                (kind,) = struct.unpack_from("<I", data, at)
                value, at = _value(data, at + 4, kind)
                if key.startswith(prefix):
                    found[key] = value
            return found
    except (OSError, ValueError, KeyError, struct.error, RecursionError) as error:
        raise ConfigError("tokenizer", str(path), f"a GGUF file; it cannot be read ({error})") from error


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """The metadata value of type ``kind`` at offset ``at``, and the offset behind it."""
    if kind == _STRING:
        (length,) = struct.unpack_from("<Q", data, at)
        end = at + 8 + length
        if end > len(data):
            raise ValueError("a string runs past its end")
        return data[at + 8 : end].decode("utf-8", errors="replace"), end
    if kind == _ARRAY:
        inner, count = struct.unpack_from("<IQ", data, at)
        at += 12
        if inner in _NUMBERS:
            if count > len(data):
                raise ValueError("an array runs past its end")
            form = f"<{count}{_NUMBERS[inner]}"
            return list(struct.unpack_from(form, data, at)), at + struct.calcsize(form)
        values = []
        for _ in range(count):
            value, at = _value(data, at, inner)
            values.append(value)
        return values, at
    form = f"<{_NUMBERS[kind]}"
    return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)


def _pair(merge: str, vocabulary: dict[str, int]) -> list[str]:
    """The two tokens a merge joins. No byte-level token has a plain space in it, so the one space parts them."""
    left, _, right = merge.partition(" ")
    if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
        raise ValueError(f"merge {merge!r} names tokens that are not in the vocabulary")
    return [left, right]
