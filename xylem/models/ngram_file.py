"""A counted n-gram model as one safetensors file that says what it is and proves itself whole.

The header holds the model's config, the hash of the tokenizer whose ids were counted, and the SHA-256 of the arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save

from xylem.errors import ConfigError
from xylem.files import write_whole
from xylem.models.ngram import NGramConfig, Tree
from xylem.models.settings import from_dict

NGRAM = "ngram.safetensors"


def save_tree(path: Path, config: NGramConfig, tree: Tree, tokenizer_hash: str) -> None:
    """Write a counted model as one file that says what it is and proves itself whole."""
    header = {"config": json.dumps(dataclasses.asdict(config)), "tokenizer_hash": tokenizer_hash}
    write_whole(path, save(tree, metadata=header | {"sha256": _digest(tree)}))


def load_tree(path: Path) -> tuple[NGramConfig, Tree, str]:
    """The config, the tree and the tokenizer's hash of what ``save_tree`` wrote.

    Raises:
        ConfigError: the file is damaged, or another's.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            tree = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config, wanted, tokenizer_hash = (header[name] for name in ("config", "sha256", "tokenizer_hash"))
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise ConfigError("checkpoint", str(path), f"it is no readable n-gram model ({error})") from error
    if _digest(tree) != wanted:
        raise ConfigError("checkpoint", str(path), "it is damaged (its SHA-256 differs): count again")
    return from_dict(NGramConfig, json.loads(config)), tree, tokenizer_hash


def _digest(tree: Tree) -> str:
    digest = hashlib.sha256()
    for name in sorted(tree):
        digest.update(name.encode() + np.ascontiguousarray(tree[name]).tobytes())
    return digest.hexdigest()
