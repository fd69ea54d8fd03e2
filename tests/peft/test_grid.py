"""The whole grid: what holds of every method on every family."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import (
    CELLS,
    FEW,
    LEARNS,
    MEASURED,
    ROUNDED,
    SETTINGS,
    VIRTUAL,
    VOCAB,
    B,
    S,
    base_of,
    case,
    learns,
    logits,
    merges,
    method_of,
    module_of,
    moved,
    texts,
)
from operations import apart

from xylem.errors import ConfigError
from xylem.models.conversion import flatten
from xylem.models.leaves import contract, is_leaf, plain
from xylem.peft import merging
from xylem.peft.methods.dora import Stretched
from xylem.peft.saving import fingerprint, load_adapter, save_adapter
from xylem.peft.tree import combine, partition
from xylem.sharding import make_mesh, path_name, shardings

# How far a fresh graft may change what the network computes; absent: not by a bit.
# Two programs, which XLA fuses each in its own way, differ by rounding; that each leaf is exact is another test.
NEAR = {"houlsby": 1e-3, "pfeiffer": 1e-3}
ROUNDING = 1e-5
ULPS = 2.0  # of adding to a number and taking the same away: each rounds once

PARAMS = [pytest.param(one, marks=[] if one in FEW else pytest.mark.slow, id="-".join(one)) for one in CELLS]


@pytest.fixture(params=PARAMS)
def cell(request, rng_seed):
    method, family = request.param
    return method, family, *case(method, family, rng_seed), texts(family, rng_seed)


def test_fresh_leaves_contract_as_their_bases_do_to_the_bit(cell):
    method, _, base, grafted, key, _ = cell
    bases = flatten(base)
    for path, leaf in flatten(grafted).items():
        if is_leaf(leaf):
            own, below = bases[path], leaf.base.base if isinstance(leaf, Stretched) else leaf.base
            if method in ROUNDED:
                own = plain(below)
            else:
                jax.tree.map(np.testing.assert_array_equal, below, own)
            one_layer = partial(jax.tree.map, lambda x: x[0])
            first, own = map(one_layer, (leaf, own)) if "layers" in path else (leaf, own)
            x = jax.random.normal(key, (2, 3, own.shape[0]))
            contracted, expected = (contract("...i,io->...o", x, weight) for weight in (first, own))
            bar = 1e-6 if isinstance(leaf, Stretched) else 0.0  # lengths over themselves are 1 within rounding
            assert apart([contracted], [expected]) <= bar, path


def test_what_learns_is_what_shall(cell):
    method, _, _, grafted, _, _ = cell
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(grafted)]
    shall = {path for path in paths if re.search(LEARNS[method], path)}
    assert shall and shall == {path for path in paths if learns(method, grafted)(path, None)}


@pytest.fixture
def holds(measured):
    """``holds(kind, cell, error, bar)``: one property of a cell."""
    return lambda kind, cell, error, bar: measured(kind, *cell, error, bar, len(MEASURED[kind]))


def test_a_graft_is_nothing_until_it_learns_and_then_alone_moves(cell, holds):
    method, family, base, grafted, key, batch = cell
    forward = partial(logits, family, method)
    trainable, frozen = partition(grafted, learns(method, grafted))
    away = moved(grafted, learns(method, grafted), key)
    both = stacked(trainable, partition(away, learns(method, away))[0])

    @jax.jit
    def steps(both):
        """Outputs of the fresh graft and of one that has learned, and each after one step of descent."""

        def one(trainable):
            def loss(trainable):
                out = forward(combine(trainable, frozen), batch)
                return (out * jax.random.normal(key, out.shape)).mean(), out

            gradient, out = jax.grad(loss, has_aux=True)(trainable)
            return out, jax.tree.map(jnp.subtract, trainable, gradient)

        return jax.vmap(one)(both)

    (out, out_away), new = steps(both)
    before, after = (jax.tree.map(lambda x: x[1], tree) for tree in (both, new))  # in a fresh pair zero stops gradients
    if method not in VIRTUAL:
        start = jax.tree.map(dequantised, grafted, is_leaf=is_leaf) if method in ROUNDED else base
        off = apart([out], [ungrafted(family, stacked(start, start), batch)[0]])
        holds("fresh", (method, family), off, NEAR.get(method, ROUNDING))
    assert apart([out_away], [out]) > 1e-3, "what learns matters"
    if merges(method):
        merged = merging.merge(away)
        off = apart([ungrafted(family, stacked(merged, merged), batch)[0]], [out_away])
        holds("merged", (method, family), off, ROUNDING)
    else:
        with pytest.raises(ValueError, match=r"merge: .* no part of a weight; the tree holds "):
            merging.merge(away)
    named = [(path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(after)]
    still = [name for (name, x), y in zip(named, jax.tree.leaves(before), strict=True) if not changed(x, y)]
    # The pooler has no part in the logits, and a bias of keys no gradient.
    stuck = [name for name in still if not name.startswith(("pooler/", "pair_head/")) and not name.endswith("key/bias")]
    print(stuck)
    holds("still", (method, family), len(stuck), 0.0)
    if (method, family) in MEASURED["unmerged"]:
        holds("unmerged", (method, family), drift(merging.unmerge(merged, away), away), ULPS)


def stacked(*trees):
    return jax.tree.map(lambda *xs: jnp.asarray(np.stack([np.asarray(x) for x in xs])), *trees)


@partial(jax.jit, static_argnums=0)
def ungrafted(family, both, batch):
    """Two networks without grafts side by side."""
    return jax.vmap(lambda params: logits(family, "lora", params, batch))(both)


def dequantised(weight):
    """A weight as it is below a graft."""
    return plain(weight.base) if is_leaf(weight) else weight


def largest_change(new, old) -> float:
    """The largest difference of two trees of equal structure, whatever their arrays hold."""
    assert jax.tree.structure(new) == jax.tree.structure(old)
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (new, old)), strict=True)
    return max((float(np.max(np.abs(x.astype(float) - y.astype(float)), initial=0.0)) for x, y in pairs), default=0.0)


def changed(new, old) -> bool:
    return bool(np.any(np.asarray(new) != np.asarray(old)))


def drift(back, grafted) -> float:
    """The largest difference between two trees' bases, in units in the last place of what was added up."""
    worst = 0.0
    pairs = zip(*(jax.tree.leaves(t, is_leaf=is_leaf) for t in (back, grafted)), strict=True)
    for one, two in pairs:
        sums = []
        while is_leaf(two):  # a leaf on a leaf, down to an array
            sums.append(np.abs(two.materialize()))
            one, two = one.base, two.base
        largest = np.maximum.reduce([*sums, np.abs(two)])
        worst = max(worst, float(np.max(np.abs(one - two) / np.spacing(largest))))
    return worst


def test_a_graft_is_saved_and_comes_back(cell, holds, tmp_path):
    method, family, base, grafted, key, _ = cell
    trained = moved(grafted, learns(method, grafted), key)
    save_adapter(tmp_path, SETTINGS[method], trained, fingerprint(base))
    config, params = load_adapter(tmp_path, base)
    assert config == SETTINGS[method]
    holds("saved", (method, family), largest_change(params, trained), 0.0)
    kept = (method_of(method).saved or method_of(method).trainable)(trained, SETTINGS[method])
    size = sum(x.size for x in jax.tree.leaves(partition(trained, kept)[0]))
    assert (tmp_path / "adapter.safetensors").stat().st_size < 4 * size + 9000
    other = {**base, "final_norm": base.get("final_norm"), "embed": {"embedding": base["embed"]["embedding"] + 1}}
    with pytest.raises(ConfigError, match="its base has hash"):
        load_adapter(tmp_path, {name: part for name, part in other.items() if part is not None})


@pytest.mark.parametrize(("method", "family"), MEASURED["empty"], ids=map("-".join, MEASURED["empty"]))
def test_cells_that_are_empty_say_why(method, family, measured, rng_seed):
    reasons = {"bitfit": "no biases", "prefix": "keys and values are attention's", "state": "has states to begin with"}
    reason = reasons[method]
    with pytest.raises(ConfigError, match=reason) as caught:
        method_of(method).graft(base_of(family, rng_seed), jax.random.key(0), SETTINGS[method])
    measured("empty", method, family, str(caught.value), None, len(MEASURED["empty"]))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), MEASURED["cached"], ids=map("-".join, MEASURED["cached"]))
def test_a_cache_sees_the_graft(method, family, holds, rng_seed):
    _, grafted, key = case(method, family, rng_seed)
    params = method_of(method).fold(moved(grafted, learns(method, grafted), key))
    module, batch = module_of(family), texts(family, rng_seed)
    tokens = batch.get("decoder_tokens", batch["tokens"])

    @jax.jit
    def both(params):
        if "decoder_tokens" in batch:
            whole = module.apply({"params": params}, **batch).logits
            cache, more = module.start(params, batch["tokens"], tokens.shape[1], batch["segments"]), (None,)
        else:
            whole = module.apply({"params": params}, tokens).logits
            cache, more = module.init_cache(tokens.shape[0], tokens.shape[1], params), ()
        first = module.apply({"params": params}, *more, tokens[:, :3], cache=cache)

        def step(cache, token):
            out = module.apply({"params": params}, *more, token[:, None], cache=cache)
            return out.cache, out.logits[:, 0]

        _, rest = jax.lax.scan(step, first.cache, tokens[:, 3:].T)
        return whole, jnp.concatenate([first.logits, jnp.swapaxes(rest, 0, 1)], axis=1)

    whole, parts = both(params)
    holds("cached", (method, family), apart([parts], [whole]), ROUNDING)


def on_eight(family, params):
    """A mesh, and the tree cut over it."""
    # T5's relative bias has a column a head, and they are odd.
    sizes = {"data": 2, "fsdp": 4} if family == "t5" else {"data": 2, "fsdp": 2, "tensor": 2}
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(params, mesh))
    cut = [x for x in jax.tree.leaves(placed) if x.sharding.shard_shape(x.shape) != x.shape]
    assert len(cut) > 5
    return mesh, placed


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), MEASURED["sharded"], ids=map("-".join, MEASURED["sharded"]))
def test_a_graft_is_cut_over_devices(method, family, holds, rng_seed):
    _, grafted, key = case(method, family, rng_seed)
    params, batch = moved(grafted, learns(method, grafted), key), texts(family, rng_seed)
    forward = jax.jit(partial(logits, family, method))
    mesh, placed = on_eight(family, params)
    with jax.set_mesh(mesh):
        out = np.asarray(forward(placed, batch))
    holds("sharded", (method, family), apart([out], [forward(params, batch)]), ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), FEW, ids=map("-".join, FEW))
def test_what_learns_has_the_gradient_of_one_device(method, family, rng_seed):
    _, grafted, key = case(method, family, rng_seed)
    params, batch = moved(grafted, learns(method, grafted), key), texts(family, rng_seed)
    weights = jax.random.normal(key, (B, S, VOCAB))

    @jax.jit
    def slope(params, batch):
        trainable, frozen = partition(params, learns(method, params))

        def loss(trainable):
            out = logits(family, method, combine(trainable, frozen), batch)
            return (out * weights[:, : out.shape[1]]).sum()

        gradient = jax.grad(loss)(trainable)
        return {path: x for path, x in flatten(gradient).items() if x is not None and not path.endswith("key/bias")}

    mesh, placed = on_eight(family, params)
    with jax.set_mesh(mesh):
        cut = jax.tree.map(np.asarray, slope(placed, batch))
    # Sums in another order, forth and back through a whole network.
    assert apart(cut, slope(params, batch), floor=1e-3) <= 1e-4
