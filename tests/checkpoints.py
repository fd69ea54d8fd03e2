"""Small checkpoints of our own making, and ways to spoil them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from xylem.models import gpt, hub, llama
from xylem.models.config import TransformerConfig
from xylem.models.conversion import flatten, unflatten


def tiny(family: str, **values) -> TransformerConfig:
    """A ``gpt`` or ``llama`` of odd sizes, with some values changed."""
    if family == "gpt":
        return replace(gpt.gpt(2, 15, 3, vocab_size=37, max_length=19), d_ff=29, **values)
    return replace(llama.llama(3, 24, 4, 2, 27, 41, 23, rope_theta=731.0, norm_eps=3e-5), **{"d_model": 20, **values})


def random_params(config, seed: int = 0, dtype=jnp.float32) -> dict:
    """Normal random parameters."""
    rng = np.random.default_rng(seed)
    shapes = hub.parameter_shapes(config)
    return unflatten({path: jnp.asarray(rng.standard_normal(leaf.shape), dtype) for path, leaf in shapes.items()})


def same(ours: dict, theirs: dict) -> bool:
    """Whether two trees have the same paths, types and bits."""
    ours, theirs = flatten(ours), flatten(theirs)
    equal = [ours[path].dtype == leaf.dtype and np.array_equal(ours[path], leaf) for path, leaf in theirs.items()]
    return ours.keys() == theirs.keys() and all(equal)


def saved(folder: Path, family: str = "llama", **saving) -> Path:
    """A folder that ``hub.save`` wrote of the tiny model with ``random_params``."""
    config = tiny(family)
    hub.save(folder, config, random_params(config), **saving)
    return folder


def change_config(folder: Path, **values) -> None:
    """Overwrite fields of a folder's ``config.json``."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    """Rewrite a folder's one safetensors file after ``change`` worked on its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
