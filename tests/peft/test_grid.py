"""The whole grid: what holds of every method on every family."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import CELLS, EMPTY, NAMES, SETTINGS, base_of, logits, method_of, moved, texts
from operations import apart

from xylem.errors import ConfigError
from xylem.models.leaves import is_leaf
from xylem.peft import merging
from xylem.peft.saving import fingerprint, load_adapter, save_adapter
from xylem.peft.tree import combine, partition
from xylem.sharding import path_name

# How far a fresh graft may change what the network computes; absent: not by a bit.
NEAR = {"dora": 1e-6, "houlsby": 1e-3, "pfeiffer": 1e-3}
VIRTUAL = ("prompt", "prefix")  # they change what the network reads: their identity is another test


@pytest.fixture(params=CELLS, ids="-".join)
def cell(request, rng_seed):
    method, family = request.param
    base, keys = base_of(family, rng_seed), jax.random.split(jax.random.key(rng_seed), 2)
    grafted = method_of(method).graft(base, keys[0], SETTINGS[method])
    return method, family, base, grafted, keys[1], texts(family, rng_seed)


def learns(method, params):
    return method_of(method).trainable(params, SETTINGS[method])


def test_a_graft_is_nothing_until_it_learns_and_then_alone_moves(cell):
    method, family, base, grafted, key, batch = cell
    forward = partial(logits, family, method)
    trainable, frozen = partition(grafted, learns(method, grafted))
    away = moved(grafted, learns(method, grafted), key)

    @jax.jit
    def facts(trainable, frozen, away):
        cotangent = jax.random.normal(key, forward(away, batch).shape)
        loss = lambda trainable: (forward(combine(trainable, frozen), batch) * cotangent).mean()  # noqa: E731
        updates, _ = optax.sgd(1.0).update(jax.grad(loss)(trainable), optax.sgd(1.0).init(trainable), trainable)
        new = optax.apply_updates(trainable, updates)
        plain = merging.merge(away) if merges(method) else away
        return forward(combine(trainable, frozen), batch), new, forward(away, batch), forward(plain, batch)

    out, new, out_away, out_merged = facts(trainable, frozen, away)
    if method not in VIRTUAL:
        apart_by = apart([out], [jax.jit(forward)(base, batch)])
        assert apart_by <= NEAR.get(method, 0.0)
    assert apart([out_away], [out]) > 1e-3, "what learns matters"
    assert apart([out_merged], [out_away]) <= 1e-5
    still = [path_name(p) for p, x in jax.tree_util.tree_leaves_with_path(new) if not changed(x, at(trainable, p))]
    # B of zero stops A's first gradient, and A of zero B's; a bias of keys has none at all.
    still = [name for name in still if not name.startswith(("pooler/", "pair_head/"))]  # no part of the logits
    assert all(name.endswith(("/a", "/b", "key/bias")) for name in still), still
    assert len(still) < len(jax.tree.leaves(new))
    if merges(method) and method != "dora":
        back = merging.unmerge(merging.merge(away), away)
        assert drift(back, away) <= 2


def merges(method: str) -> bool:
    return method not in (*VIRTUAL, "houlsby", "pfeiffer")


def at(tree, path):
    return dict((path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(tree))[path_name(path)]


def changed(new, old) -> bool:
    return bool(jnp.any(new != old))


def drift(back, grafted) -> float:
    """The largest difference between two trees' bases, in units in the last place of what was added up."""
    worst = 0.0
    pairs = zip(*(jax.tree.leaves(t, is_leaf=is_leaf) for t in (back, grafted)), strict=True)
    for one, two in pairs:
        if is_leaf(two):
            largest = np.maximum(np.abs(two.materialize()), np.abs(two.base))
            worst = max(worst, float(np.max(np.abs(one.base - two.base) / np.spacing(largest))))
    return worst


def test_a_graft_is_saved_and_comes_back(cell, tmp_path):
    method, _, base, grafted, key, _ = cell
    trained = moved(grafted, learns(method, grafted), key)
    name = NAMES.get(method, method)
    save_adapter(tmp_path, name, SETTINGS[method], trained, fingerprint(base))
    found, config, params = load_adapter(tmp_path, base)
    assert (found, config) == (name, SETTINGS[method])
    jax.tree.map(np.testing.assert_array_equal, params, trained)
    kept = (method_of(method).saved or method_of(method).trainable)(trained, SETTINGS[method])
    size = sum(x.size for x in jax.tree.leaves(partition(trained, kept)[0]))
    assert (tmp_path / "adapter.safetensors").stat().st_size < 4 * size + 9000
    other = {**base, "final_norm": base.get("final_norm"), "embed": {"embedding": base["embed"]["embedding"] + 1}}
    with pytest.raises(ConfigError, match="its base has hash"):
        load_adapter(tmp_path, {name: part for name, part in other.items() if part is not None})


@pytest.mark.parametrize(("method", "family"), sorted(EMPTY), ids="-".join)
def test_cells_that_are_empty_say_why(method, family, rng_seed):
    reason = {"bitfit": "no biases", "prefix": "keys and values are attention's"}[method]
    with pytest.raises(ConfigError, match=reason):
        method_of(method).graft(base_of(family, rng_seed), jax.random.key(0), SETTINGS[method])
