"""The byte-level BPE vocabulary inside a GGUF file.

Metadata keys: github.com/ggml-org/ggml, docs/gguf.md, "Tokenizer". The file names its pre-tokenizer in
``tokenizer.ggml.pre``; what each name means stands only in the source of llama.cpp (``src/llama-vocab.cpp``).
"""

from pathlib import Path
from typing import Any

from xylem.data.tokenizers import BYTE_LEVEL, describe
from xylem.errors import ConfigError
from xylem.models.gguf_file import header

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


def read(path: Path) -> dict[str, Any]:
    """The arguments that make a ``Tokenizer`` of a GGUF file's metadata, ``name`` apart.

    Raises:
        ConfigError: not a whole GGUF file, or its vocabulary is of another kind (SentencePiece) or pre-tokenizer.
    """
    fields, _ = header(path)
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


def _pair(merge: str, vocabulary: dict[str, int]) -> list[str]:
    """The two tokens a merge joins. No byte-level token has a plain space in it, so the one space parts them."""
    left, _, right = merge.partition(" ")
    if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
        raise ValueError(f"merge {merge!r} names tokens that are not in the vocabulary")
    return [left, right]
