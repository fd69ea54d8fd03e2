"""Trees and caches laid out for decoding: the same network, whatever its weights are made of."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import FAMILIES, T, base_of, method_of, module_of, moved, texts
from operations import apart, normal

from xylem import models
from xylem.models import fused
from xylem.models.cache import KEY_BLOCK, KVCache, Seq2SeqCache
from xylem.models.decoding import ready, ready_cache
from xylem.models.leaves import Transposed, is_leaf
from xylem.models.settings import Compute
from xylem.peft import config as configs
from xylem.peft import tree

# The same products, summed in another order; T5's unscaled scores enlarge what is rounded.
BARS = {"t5": 3e-5}
BAR = 1e-5
UNROLLED = Compute(layers="unroll", kernels="fused", scan="sequential")
METHODS = {
    "gpt2": ("dora", configs.DoRAConfig(rank=2, alpha=3.0)),
    "llama": ("lora", configs.LoRAConfig(rank=3, alpha=5.0)),
    "t5": ("ia3", configs.IA3Config()),
    "mamba": ("lora", configs.LoRAConfig(rank=3, alpha=5.0)),
}


def grafted(family: str, seed: int):
    """A tree with moved grafts of the family's method."""
    name, config = METHODS[family]
    method = method_of(name)
    params = method.graft(base_of(family, seed), jax.random.key(seed), config)
    return moved(params, method.trainable(params, config), jax.random.key(seed + 1))


def started(module, params, batch):
    """An empty cache, or one that holds the source."""
    if "decoder_tokens" in batch:
        return module.start(params, batch["tokens"], T, batch["segments"])
    return module.init_cache(len(batch["tokens"]), T)


@partial(jax.jit, static_argnames="module")
def step(module, params, cache, tokens):
    ids = (None, tokens) if isinstance(cache, Seq2SeqCache) else (tokens,)
    out = module.apply({"params": params}, *ids, cache=cache)
    return out.logits, out.cache


def written(module, params, family, seed, lay_out=lambda cache: cache):
    """Logits behind three tokens: of two together, then of one after the rows have changed places."""
    batch = texts(family, seed)
    tokens, rows = batch.get("decoder_tokens", batch["tokens"])[:, :T], jnp.array([2, 0, 1])
    _, cache = step(module, params, lay_out(started(module, params, batch)), tokens[:, :3])
    two, cache = step(module, params, cache, tokens[:, 3:5])
    one, _ = step(module, params, cache.select(rows), tokens[rows, 5:6])
    return [two, one]


def exchanged(laid_out):
    """A ready tree whose first two layers have changed places."""
    side = laid_out.get("decoder", laid_out)
    wrong = {**side, "layers_0": side["layers_1"], "layers_1": side["layers_0"]}
    return {**laid_out, "decoder": wrong} if "decoder" in laid_out else wrong


@pytest.mark.parametrize("family", METHODS)
def test_a_ready_tree_and_cache_write_what_the_stacked_ones_write(family, rng_seed, proof):
    params, config = grafted(family, rng_seed % 1000), FAMILIES[family].with_compute(UNROLLED)
    unrolled, laid_out = models.build(config), ready(config, params)
    write = partial(written, family=family, seed=rng_seed)
    expected = write(module_of(family), params)
    error = apart(write(unrolled, laid_out, lay_out=partial(ready_cache, config)), expected)
    bar = BARS.get(family, BAR)
    assert apart(write(unrolled, exchanged(laid_out), lay_out=partial(ready_cache, config)), expected) > bar
    row = f"decoding: layers apart, matrices transposed ({family})"
    proof(row, "the stacked tree", error, bar, rng_seed, "the first two layers exchanged")


@pytest.mark.parametrize("family", METHODS)
def test_a_ready_tree_in_bfloat16_is_as_near_to_float32_as_the_stacked_one(family, rng_seed, proof):
    compute = Compute("bfloat16", "bfloat16", layers="unroll", kernels="fused", scan="sequential")
    config, params = FAMILIES[family].with_compute(compute), grafted(family, rng_seed % 1000)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    module, laid_out, cache_of = models.build(config), ready(config, half), partial(ready_cache, config)
    write = partial(written, family=family, seed=rng_seed)
    expected = write(module_of(family), jax.tree.map(lambda x: x.astype(jnp.float32), half))
    mean = lambda ours: sum(float(jnp.abs(a - b).mean()) for a, b in zip(ours, expected, strict=True))  # noqa: E731
    bar = 3.0 * mean(write(module, half))  # what is rounded differs, and how much by chance
    assert mean(write(module, exchanged(laid_out), lay_out=cache_of)) > bar
    own = mean(write(module, laid_out, lay_out=cache_of))
    proof(f"decoding in bfloat16 ({family})", "the network in float32", own, bar, rng_seed, "two layers exchanged")


def test_a_ready_tree_holds_each_layer_in_order_and_stays_as_it_is():
    config, params = FAMILIES["llama"].with_compute(UNROLLED), grafted("llama", 1)
    laid_out = ready(config, params)
    assert [name for name in laid_out if name.startswith("layers")] == [f"layers_{i}" for i in range(config.num_layers)]
    for index in range(config.num_layers):
        query, own = (tree.layer(each, index)["attention"]["query"]["kernel"] for each in (laid_out, params))
        assert (query.base.materialize() == own.base).all() and (query.a == own.a).all()
    kernels = jax.tree.leaves(laid_out["layers_0"], is_leaf=is_leaf)
    assert sum(isinstance(getattr(kernel, "base", None), Transposed) for kernel in kernels) == 7
    assert isinstance(laid_out["head"]["kernel"], Transposed)
    again = ready(config, laid_out)
    assert jax.tree.structure(again) == jax.tree.structure(laid_out)
    assert all(a is b or (a == b).all() for a, b in zip(*map(jax.tree.leaves, (again, laid_out)), strict=True))


@pytest.mark.parametrize("compute", [Compute(layers="scan"), Compute(kernels="plain")])
def test_what_was_not_measured_to_pay_stays_as_it_is(compute):
    config, params = FAMILIES["llama"].with_compute(compute), base_of("llama", 1)
    assert ready(config, params) is params
    cache = KVCache.init(config, 2, 5)
    assert ready_cache(config, cache) is cache


@pytest.mark.parametrize("room", [2 * KEY_BLOCK, 2 * KEY_BLOCK + 3])
def test_a_cache_of_layers_apart_holds_what_the_stack_holds(room, rng_seed):
    config = FAMILIES["llama"].with_compute(UNROLLED)
    rng, rows = np.random.default_rng(rng_seed), jnp.array([2, 0, 0])
    lengths = jnp.array([KEY_BLOCK - 2, 5, room - 2])  # five more end in the next block, and behind the last
    stacked = KVCache.init(config, 3, room).advance(lengths)
    both = [stacked, stacked.apart()]

    def written(length: int) -> None:
        """Random tokens, written into every layer of both, which then hold the same."""
        shape = (2, 3, length, config.num_kv_heads, config.head_dim)
        key, value = jnp.asarray(rng.standard_normal(shape, np.float32))
        for layer in range(config.num_layers):
            (one, *held), (other, *reference) = (cache.update(layer, key + layer, value - layer) for cache in both)
            assert all((a == b).all() for a, b in zip(held, reference, strict=True))
            both[:] = one, other
        both[:] = [cache.advance(length) for cache in both]

    written(5)
    for more in (KEY_BLOCK, 3):
        both[:] = [cache.grow(more).select(rows) for cache in both]
        written(2)
    assert both[0].capacity == both[1].capacity == room + KEY_BLOCK + 3
    assert both[1].is_apart and both[1].apart() is both[1]


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("...i,io->...o", (2, 3, 5)),
        ("...i,io->...o", (200, 5)),
        ("...d,dv->...v", (5,)),
        ("...d,vd->...v", (2, 7)),
    ],
)
def test_a_transposed_matrix_is_the_matrix(equation, shape, rng_seed):
    keys = jax.random.split(jax.random.key(rng_seed), 2)
    weight, x = jax.random.normal(keys[0], (5, 7)), jax.random.normal(keys[1], shape)
    leaf = Transposed(weight.T)
    assert leaf.shape == weight.shape and leaf.dtype == weight.dtype
    assert apart(leaf.einsum(equation, x), jnp.einsum(equation, x, weight)) <= 1e-6
    assert (leaf.materialize() == weight).all() and (leaf.rebase(weight).rows == leaf.rows).all()
    assert (leaf.take(jnp.array([[4, 0]])) == weight[jnp.array([[4, 0]])]).all()


def test_one_row_of_bfloat16_is_multiplied_as_its_plain_twin_does(rng_seed):
    rng = np.random.default_rng(rng_seed)
    x, w = normal(rng, 1, 31).astype(jnp.bfloat16), normal(rng, 17, 31).astype(jnp.bfloat16)
    out = fused.few_rows(x, w)
    assert out.shape == (1, 17) and out.dtype == jnp.float32
    assert apart(out, fused.few_rows_plain(x.astype(jnp.float32), w.astype(jnp.float32))) <= BAR  # nothing is rounded
