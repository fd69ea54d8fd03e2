"""Adapters: small networks ``x + up(gelu(down(x)))`` behind the sublayers of every layer.

Behind both of a transformer's sublayers (Houlsby 1902.00751, figure 2), or behind the feed-forward alone (Pfeiffer
2005.00247, section 3.2.3). A Mamba block has one sublayer, which either takes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from xylem.models.conversion import flatten, unflatten
from xylem.peft.config import AdapterConfig
from xylem.peft.tree import Predicate, Tree, check_absent

# Behind which matrix an adapter stands: a sublayer's last.
SUBLAYERS = {"attention/output": "attention_adapter", "mlp/down": "mlp_adapter", "mixer/output": "mixer_adapter"}


def graft(params: Tree, key: PRNGKeyArray, config: AdapterConfig) -> Tree:
    """The tree with adapters in every layer of every stack; the network computes nearly what it did.

    Raises:
        ConfigError: it has some already.
    """
    check_absent(params, "adapter", *SUBLAYERS.values())
    flat = flatten(params)
    added: dict[str, Array] = {}
    for index, (path, weight) in enumerate(sorted(flat.items())):
        block, _, last = path.removesuffix("/kernel").rpartition("/")
        block, _, sublayer = block.rpartition("/")
        place = SUBLAYERS.get(f"{sublayer}/{last}")
        if place is None or not path.endswith("/kernel") or (config.places == "mlp" and sublayer == "attention"):
            continue
        *layers, _, width = weight.shape
        shapes = {"down": (*layers, width, config.size), "up": (*layers, config.size, width)}
        for name, own in zip(shapes, jax.random.split(jax.random.fold_in(key, index)), strict=True):
            drawn = config.std * jax.random.truncated_normal(own, -2.0, 2.0, shapes[name])
            added[f"{block}/{place}/{name}/kernel"] = drawn.astype(weight.dtype)
            added[f"{block}/{place}/{name}/bias"] = jnp.zeros((*layers, shapes[name][-1]), weight.dtype)
    return unflatten(flat | added)


def trainable(params: Tree, config: AdapterConfig) -> Predicate:
    """The adapters and the norms (section 2.1)."""
    return lambda path, _: "_adapter/" in path or "norm/" in path
