"""Virtual tokens that stand for real ones: a prompt of their embeddings, a prefix of their keys and values.

Whatever the network is given in front of a text this way, it must compute what it computes behind the tokens
themselves: in one call, through a cache, step by step, recomputed, and in packed rows.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from grid import FAMILIES, VOCAB, base_of, method_of, module_of
from operations import apart

from xylem import models
from xylem.generation.sampling import Sampling, generate
from xylem.models.config import Seq2SeqConfig
from xylem.models.layers import merge_heads
from xylem.models.settings import Compute
from xylem.models.stack import runs
from xylem.peft.config import PrefixConfig, PromptConfig

B, T, P = 3, 6, 4
# The same sums, which XLA may cut otherwise where a cache is larger; T5's unscaled scores enlarge what is rounded.
BARS = {"t5": 1e-5}
BAR = 3e-6
CASES = [
    *(("prompt", family) for family in ("gpt2", "llama", "mamba", "bert", "t5", "bart")),
    *(("prefix", family) for family in ("gpt2", "llama", "t5", "bart")),
    *(("both", family) for family in ("gpt2", "llama")),
]
CACHED = [case for case in CASES if case[1] != "bert"]


def is_seq2seq(family: str) -> bool:
    return isinstance(FAMILIES[family], Seq2SeqConfig)


def drawn(family: str, seed: int):
    """The base, ids of the tokens in front, and arguments of a call; all rows of an encoder-decoder read one source."""
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.permutation(VOCAB)[:P], jnp.int32)  # all distinct: their order matters
    batch = {"tokens": jnp.asarray(rng.integers(0, VOCAB, (B, T)), jnp.int32)}
    if is_seq2seq(family):
        batch["tokens"] = jnp.broadcast_to(batch["tokens"][:1], (B, T))
        batch["decoder_tokens"] = jnp.asarray(rng.integers(0, VOCAB, (B, T + 1)), jnp.int32)
    return base_of(family, seed), ids, batch


def soft(family: str, kind: str, base, ids, batch):
    """The base with ``ids`` in front as a prompt, as a prefix, or two of them as a prefix and the rest as a prompt."""
    first, rest = {"prompt": (0, P), "prefix": (P, 0), "both": (2, P - 2)}[kind]
    params = base
    if rest:
        chosen = PromptConfig(rest, ids=tuple(ids[first:].tolist()))
        params = method_of("prompt").graft(params, jax.random.key(0), chosen)
    if first:
        params = with_prefix(params, *remembered(module_of(family), base, ids[:first], batch))
    return params


@partial(jax.jit, static_argnames="module")
def remembered(module, base, ids, batch):
    """Keys and values (L, P, K H) that a network keeps of tokens."""
    tokens = ids[None]
    if "decoder_tokens" in batch:
        cache = module.start(base, batch["tokens"][:1], len(ids), None)
        cache = module.apply({"params": base}, None, tokens, cache=cache).cache.own
    else:
        cache = module.apply({"params": base}, tokens, cache=module.init_cache(1, len(ids))).cache
    first = lambda x, axes: merge_heads(rearrange(x[:, 0], f"{axes} -> l p k h"))  # noqa: E731
    return first(cache.key, "l k h p"), first(cache.value, "l k p h")


def with_prefix(params, key, value):
    """The tree with a prefix at its decoder's own attention."""
    if "decoder" in params:
        return {**params, "decoder": with_prefix(params["decoder"], key, value)}
    (name,) = runs(params)
    attention = {**params[name]["attention"], "prefix": {"key": key, "value": value}}
    return {**params, name: {**params[name], "attention": attention}}


def behind(ids, tokens):
    return jnp.concatenate([jnp.broadcast_to(ids, (tokens.shape[0], len(ids))), tokens], axis=1)


def hard(family: str, kind: str, base, ids, batch):
    """Logits of the text behind the tokens themselves: a prompt's stand in front of an encoder's source."""
    read = "decoder_tokens" if kind == "prefix" and is_seq2seq(family) else "tokens"
    out = whole(module_of(family), base, {**batch, read: behind(ids, batch[read])})
    return out[:, P:] if read == "decoder_tokens" or not is_seq2seq(family) else out


@partial(jax.jit, static_argnames="module")
def whole(module, params, batch):
    return module.apply({"params": params}, **batch).logits


@partial(jax.jit, static_argnames="module")
def stepwise(module, params, batch):
    """Logits through a cache: some tokens at once, the rest one by one."""
    if "decoder_tokens" in batch:
        tokens = batch["decoder_tokens"]
        cache = module.start(params, batch["tokens"], tokens.shape[1], None)
        read = lambda new, cache: module.apply({"params": params}, None, new, cache=cache)  # noqa: E731
    else:
        tokens = batch["tokens"]
        cache = module.init_cache(B, tokens.shape[1], params)
        read = lambda new, cache: module.apply({"params": params}, new, cache=cache)  # noqa: E731

    def step(cache, new):
        out = read(new[:, None], cache)
        return out.cache, out.logits[:, 0]

    out = read(tokens[:, :2], cache)
    _, rest = jax.lax.scan(step, out.cache, tokens[:, 2:].T)
    return jnp.concatenate([out.logits, jnp.moveaxis(rest, 0, 1)], axis=1)


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_virtual_tokens_made_of_real_ones_do_what_these_do(kind, family, rng_seed, proof):
    base, ids, batch = drawn(family, rng_seed)
    wanted = hard(family, kind, base, ids, batch)
    params = soft(family, kind, base, ids, batch)
    ways = [whole(module_of(family), params, batch)]
    if (kind, family) in CACHED:
        ways.append(stepwise(module_of(family), params, batch))
    what = "prefix and prompt" if kind == "both" else kind
    row, oracle = f"{what} tuning of {family}, folded", "the tokens themselves in front"
    bar = BARS.get(family, BAR)
    wrong = soft(family, kind, base, ids[::-1], batch)
    assert apart([whole(module_of(family), wrong, batch)], [wanted]) > 100 * bar
    error = max(apart([out], [wanted]) for out in ways)
    proof(row, oracle, error, bar, rng_seed, "the virtual tokens in the opposite order")


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_trained_prefix_decodes_by_steps_as_in_one_call(family, rng_seed):
    """Those of an encoder and of cross-attention, which stand for no tokens, too."""
    base, _, batch = drawn(family, rng_seed)
    params = method_of("prefix").graft(base, jax.random.key(rng_seed), PrefixConfig(P, hidden=0, std=0.5))
    module = module_of(family)
    out = whole(module, params, batch)
    assert apart([stepwise(module, params, batch)], [out]) <= BARS.get(family, BAR)
    assert apart([whole(module, base, batch)], [out]) > 1e-3


@pytest.mark.parametrize(("kind", "family"), [("prompt", "gpt2"), ("prefix", "llama"), ("prefix", "t5")])
def test_virtual_tokens_learn_when_layers_are_recomputed(kind, family, rng_seed):
    """By the hand-written derivatives as well: the gradient is that of plain code which keeps everything."""
    base, ids, batch = drawn(family, rng_seed)
    params = soft(family, kind, base, ids, batch)
    virtual, place = learned(params)
    bar = BARS.get(family, BAR)
    wanted = hard(family, kind, base, ids, batch)
    fast = models.build(FAMILIES[family].with_compute(Compute(layers="scan", kernels="fused", remat="full")))
    made = []
    for module in (module_of(family), fast):

        @jax.jit
        def gradient(virtual, module=module):
            out = lambda virtual: module.apply({"params": place(virtual)}, **batch).logits  # noqa: E731
            loss = lambda virtual: (jnp.sin(out(virtual)).sum(), out(virtual))  # noqa: E731
            return jax.value_and_grad(loss, has_aux=True)(virtual)

        (_, out), slope = gradient(virtual)
        assert apart([out], [wanted]) <= 10 * bar
        made.append(slope)
    plain, recomputed = made
    assert apart(recomputed, plain) <= 10 * bar
    assert all(bool(jnp.all(jnp.any(x != 0, axis=-1))) for x in jax.tree.leaves(plain))


def learned(params):
    """The virtual tokens of a tree, and the tree as a function of them."""
    if "prompt" in params:
        return params["prompt"]["embedding"], lambda x: {**params, "prompt": {"embedding": x}}
    side = params.get("decoder", params)
    pair = side["layers"]["attention"]["prefix"]
    return pair, lambda pair: with_prefix(params, pair["key"], pair["value"])


@pytest.mark.parametrize(
    ("kind", "family"),
    [("prompt", "gpt2"), ("prefix", "gpt2"), ("prompt", "llama"), ("prefix", "llama"), ("prompt", "mamba")],
)
def test_packed_documents_see_virtual_tokens_as_alone(kind, family, rng_seed):
    base, ids, batch = drawn(family, rng_seed)
    params, cut, module = soft(family, kind, base, ids, batch), 2, module_of(family)
    tokens = batch["tokens"]
    segments = jnp.broadcast_to(jnp.where(jnp.arange(T) < cut, 1, 2), (B, T))
    packed = whole(module, params, {"tokens": tokens, "segments": segments})
    # The prompt of a Mamba belongs to the first document: its state ends there.
    second = base if family == "mamba" else params
    alone = [whole(module, params, {"tokens": tokens[:, :cut]}), whole(module, second, {"tokens": tokens[:, cut:]})]
    assert apart([packed], [jnp.concatenate(alone, axis=1)]) <= BAR


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_padding_sees_and_moves_nothing(kind, rng_seed):
    base, ids, batch = drawn("llama", rng_seed)
    params, module = soft("llama", kind, base, ids, batch), module_of("llama")
    segments = jnp.broadcast_to((jnp.arange(T) < T - 2).astype(jnp.int32), (B, T))
    padded = whole(module, params, {**batch, "segments": segments})[:, : T - 2]
    assert apart([padded], [whole(module, params, {"tokens": batch["tokens"][:, : T - 2]})]) <= BAR


@pytest.mark.parametrize(("kind", "family"), [("prompt", "gpt2"), ("prefix", "gpt2"), ("both", "llama")])
def test_generation_behind_virtual_tokens_is_that_behind_the_tokens(kind, family, rng_seed):
    base, ids, batch = drawn(family, rng_seed)
    texts = [row[: 3 + index].tolist() for index, row in enumerate(np.asarray(batch["tokens"]))]
    sampling = Sampling(max_new_tokens=5, temperature=0.0)
    wanted = generate(module_of(family), base, [ids.tolist() + text for text in texts], sampling, jax.random.key(0))
    params = soft(family, kind, base, ids, batch)
    made = generate(module_of(family), params, texts, sampling, jax.random.key(0))
    np.testing.assert_array_equal(made.tokens, wanted.tokens)


@pytest.mark.parametrize(("kind", "family"), [("prompt", "gpt2"), ("prefix", "gpt2"), ("prompt", "bert")])
def test_a_text_that_virtual_tokens_push_out_of_the_table_is_refused(kind, family, rng_seed):
    base, ids, batch = drawn(family, rng_seed)
    params, length = soft(family, kind, base, ids, batch), FAMILIES[family].max_length - P + 1
    with pytest.raises(ValueError, match=f"{length} tokens and {P} virtual ones: the position table"):
        module_of(family).apply({"params": params}, jnp.zeros((1, length), jnp.int32))
    if family == "gpt2":
        with pytest.raises(Exception, match=f"{P} virtual tokens and new tokens together must fit"):
            generate(module_of(family), params, [[1] * (length - 5)], Sampling(max_new_tokens=5), jax.random.key(0))
