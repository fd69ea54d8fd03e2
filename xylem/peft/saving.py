"""Adapters as files: what was trained alone, what made it, and which base it belongs to.

    adapter.safetensors    the trained arrays, by path
    adapter.json           the method's config, the base's hash; of a run, where its base lies and what it was taught

The grafts' other arrays (scales, structure) come from the config again; so a file of rank 8 for a model of 135 million
parameters takes megabytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from xylem.errors import CheckpointError, ConfigError
from xylem.files import read_object, write_whole
from xylem.models.settings import from_dict
from xylem.peft import tree
from xylem.peft.calls import METHODS
from xylem.peft.tree import Tree
from xylem.sharding import path_name

ARRAYS, SETTINGS = "adapter.safetensors", "adapter.json"


def fingerprint(params: Tree) -> str:
    """A hash of a base: of every weight's path, shape, type and bytes."""
    digest = hashlib.sha256()
    for path, weight in sorted(arrays(params).items()):
        array = np.ascontiguousarray(weight)
        digest.update(f"{path} {array.shape} {array.dtype}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return digest.hexdigest()


def save_adapter(folder: str | Path, config: Any, params: Tree, base: str, **about: Any) -> None:
    """Write what a method trained in ``params`` to a folder; ``base`` is the ``fingerprint`` it was grafted onto.

    ``about`` goes into the JSON file as it is. ``training.restore`` reads ``base_path``, the base by name; and of what
    a run taught its ``objective``, its ``data`` (a ``DataConfig``) and the ``labels`` of one that judges.
    """
    method = METHODS[config.name]
    kept = (method.saved or method.trainable)(params, config)
    write(folder, config, tree.partition(params, kept)[0], base, **about)


def write(folder: str | Path, config: Any, trained: Any, base: str, **about: Any) -> None:
    """``save_adapter`` of what is trained alone."""
    content = save({name: np.asarray(x) for name, x in arrays(trained).items()})
    digest = hashlib.sha256(content).hexdigest()
    settings = {"config": dataclasses.asdict(config), "base": base, "sha256": digest, **about}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_whole(Path(folder) / ARRAYS, content)
    write_whole(Path(folder) / SETTINGS, json.dumps(settings, indent=2) + "\n")


def about(folder: str | Path) -> dict[str, Any]:
    """What the JSON file of an adapter says.

    Raises:
        ConfigError: there is none that can be read.
    """
    return read_object(Path(folder) / SETTINGS, "adapter")


def load_adapter(
    folder: str | Path, base: Tree, headed: Callable[[Tree], Tree] = lambda base: base
) -> tuple[Any, Tree]:
    """``(config, params)``: a method's choices, and the base with the saved graft.

    ``headed`` puts the head on the base that was trained with the graft.

    Raises:
        ConfigError: it was trained on another base, or there is no adapter.
        CheckpointError: its arrays are damaged.
    """
    path = Path(folder)
    settings = about(path)
    if (own := fingerprint(base)) != settings["base"]:
        raise ConfigError("adapter", str(path), f"its base has hash {settings['base'][:12]}, this one {own[:12]}")
    method = METHODS[settings["config"]["name"]]
    config = from_dict(method.config, settings["config"])
    try:
        if hashlib.sha256((path / ARRAYS).read_bytes()).hexdigest() != settings["sha256"]:
            raise CheckpointError(f"{path / ARRAYS}: its hash is not the one that was written")
        trained = load_file(path / ARRAYS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / ARRAYS}: {error}") from error
    params = placed(method.graft(headed(base), jax.random.key(0), config), trained)
    return config, params


def placed(params: Tree, trained: Mapping[str, Any]) -> Tree:
    """The tree with arrays put where their paths say.

    Raises:
        CheckpointError: one has no place in it.
    """
    left = dict(trained)
    params = jax.tree_util.tree_map_with_path(lambda path, x: left.pop(path_name(path), x), params)
    if left:
        raise CheckpointError(f"{next(iter(left))} has no place in this network")
    return params


def arrays(params: Any) -> dict[str, Any]:
    """Every array by path, those inside leaves by their field."""
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
