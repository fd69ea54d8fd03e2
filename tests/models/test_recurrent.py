"""Recurrent language models: documents kept apart, state carried, windows, leaves, meshes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart
from small import B, T, apply, init, logits, random_weights

from xylem.errors import ConfigError
from xylem.generation.sampling import Sampling, generate
from xylem.models import rnn
from xylem.models.leaves import LowRank, materialize
from xylem.models.recurrent import RecurrentLM
from xylem.models.settings import Compute
from xylem.peft import tree
from xylem.sharding import batch_sharding, make_mesh, shardings
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import causal_lm, truncated

BAR = 1e-6
CELL = pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
SEGMENTS = jnp.array([[1] * 5 + [2] * 6 + [0] * 2, [1] * 13, [1] * 2 + [2] * 2 + [3] * 9])


def small(cell, **values):
    return dataclasses.replace(rnn.recurrent(cell, 3, 14, vocab_size=31, max_length=64), **values)


@pytest.fixture(params=["rnn", "lstm", "gru"])
def case(request, rng_seed):
    config = small(request.param)
    module = RecurrentLM(config)
    keys = jax.random.split(jax.random.key(rng_seed), 3)
    tokens = jax.random.randint(keys[0], (B, T), 0, config.vocab_size)
    return config, module, random_weights(module, keys[2], tokens), tokens


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "values", "said"),
    [
        ("rnn", {"d_model": 0}, "d_model: 0"),
        ("gru", {"dropout": 1.0}, "dropout: 1.0"),
        ("gru", {"forget_bias": 1.0}, "forget_bias: 1.0"),
        ("lstm", {"forget_bias": None}, "forget_bias: None"),
    ],
)
def test_recurrent_config_names_what_cannot_be(cell, values, said):
    with pytest.raises(ConfigError, match=said):
        small(cell, **values)


@CELL
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_recurrent_sizes_are_torchs_and_forget_gates_start_open(cell, head):
    config = dataclasses.replace(rnn.recurrent(cell, 3, 64, vocab_size=31, max_length=64), head=head)
    params = init(RecurrentLM(config), jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    gates = {"rnn": 1, "lstm": 4, "gru": 3}[cell]
    layer = 2 * gates * 64 * (64 + 1)  # torch.nn.RNN, "Variables": weight_ih, weight_hh, bias_ih, bias_hh
    assert tree.count(params) == 3 * layer + 64 * 31 * (2 if head == "untied" else 1)
    own = params["layers"]["cell"]
    np.testing.assert_allclose(np.std(own["input"]["kernel"]), (3 * 64) ** -0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(own["recurrent"]["kernel"]), (3 * 64) ** -0.5, rtol=0.05)
    assert not np.allclose(*own["input"]["kernel"][:2])
    open_gate = np.zeros(gates * 64)
    open_gate[64:128] = 1.0 if cell == "lstm" else 0.0
    np.testing.assert_array_equal(own["input"]["bias"], np.broadcast_to(open_gate, (3, gates * 64)))
    assert not np.any(own["recurrent"]["bias"])


@CELL
@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_recurrent_flops_are_those_of_the_products_in_a_step(cell, kernels):
    module = RecurrentLM(small(cell, compute=Compute(kernels=kernels, layers="scan")))
    tokens = jnp.zeros((B, T), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    loss = lambda params: module.apply({"params": params}, tokens).logits.sum()  # noqa: E731
    step = jax.make_jaxpr(jax.value_and_grad(loss))(params)
    assert _product_flops(step.jaxpr) == B * T * module.config.train_flops_per_token(T)


def _product_flops(jaxpr) -> int:
    """Operations of all matrix products, those in scans as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left[axis] for axis in contracted]))
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += times * _product_flops(inner) if hasattr(inner, "eqns") else 0
    return total


# --- documents --------------------------------------------------------------------------------------------------------


def test_recurrent_documents_read_as_if_alone(case, proof, rng_seed):
    config, module, params, tokens = case
    packed, leaking = logits(module, params, tokens, segments=SEGMENTS), logits(module, params, tokens)
    errors, faulty = [], []
    for row in range(B):
        for segment in range(1, 4):
            where = np.flatnonzero(np.asarray(SEGMENTS[row]) == segment)
            if len(where):
                alone = logits(module, params, tokens[row, where][None])[0]
                errors.append(apart(packed[row, where], alone))
                faulty.append(apart(leaking[row, where], alone))
    assert bool(jnp.isfinite(packed).all())
    assert len(errors) == 6 and max(faulty) > BAR
    proof(f"packed documents ({config.cell})", "each document alone", max(errors), BAR, rng_seed, "segments left out")


def test_recurrent_documents_do_not_leak_to_the_bit(case):
    config, module, params, tokens = case
    read = lambda tokens: logits(module, params, tokens, segments=SEGMENTS)  # noqa: E731
    edited = jnp.where(SEGMENTS == 1, (tokens + 1) % config.vocab_size, tokens)
    before, after = read(tokens), read(edited)
    assert bool((before == after)[SEGMENTS > 1].all())
    assert not np.allclose(before[SEGMENTS == 1], after[SEGMENTS == 1])
    padding = jnp.where(SEGMENTS == 0, (tokens + 1) % config.vocab_size, tokens)
    assert bool((before == read(padding)).all()), "not even at the padding itself"
    embeddings = params["embed"]["embedding"][tokens]

    @jax.jit
    def slope(embeddings):
        second = lambda e: (  # noqa: E731
            module.apply({"params": params}, tokens, segments=SEGMENTS, embeddings=e).logits
            * (SEGMENTS == 2)[..., None]
        )
        return jax.grad(lambda e: jnp.square(second(e)).sum())(embeddings)

    reached = jnp.abs(slope(embeddings)).sum(-1) > 0
    assert bool((reached == (SEGMENTS == 2)).all())


# --- the state --------------------------------------------------------------------------------------------------------


def test_recurrent_step_by_step_equals_the_full_forward(case, proof, rng_seed):
    config, module, params, tokens = case
    full = logits(module, params, tokens)
    step = lambda cache, ids: apply(module, params, ids, cache=cache)  # noqa: E731
    out = prefilled = step(module.init_cache(B, T, history=2), tokens[:, :6])
    parts = [out.logits]
    for t in range(6, T):
        out = step(out.cache, tokens[:, t : t + 1])
        parts.append(out.logits)
    assert out.cache.lengths.tolist() == [T] * B
    shorter = prefilled.cache.rewind(prefilled.cache.lengths - 1)
    assert apart(step(shorter, tokens[:, 6:7]).logits[:, 0], full[:, 6]) > BAR
    assert apart(step(shorter, tokens[:, 5:6]).logits[:, 0], full[:, 5]) <= BAR
    row = f"cache: token by token ({config.cell})"
    error = apart(jnp.concatenate(parts, axis=1), full)
    proof(row, "the full forward pass", error, BAR, rng_seed, "the state one token too old")


def test_recurrent_cache_forgets_padding_to_the_bit(case, proof, rng_seed):
    config, module, params, tokens = case
    lengths = jnp.array([9, 4, 0])
    real = (jnp.arange(9)[None] < lengths[:, None]).astype(jnp.int32)
    first = module.init_cache(B, T)
    cache = apply(module, params, tokens[:, :9], segments=real, cache=first).cache
    assert cache.lengths.tolist() == lengths.tolist()
    other = jnp.where(real == 0, (tokens[:, :9] + 1) % config.vocab_size, tokens[:, :9])
    same = apply(module, params, other, segments=real, cache=first).cache
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), cache, same))
    remembering = apply(module, params, tokens[:, :9], cache=first).cache

    def error(cache):
        out = apply(module, params, tokens[:, 9:11], cache=cache).logits
        alone = [jnp.concatenate([tokens[row, : lengths[row]], tokens[row, 9:11]])[None] for row in range(B)]
        return max(apart(out[row], logits(module, params, ids)[0, -2:]) for row, ids in enumerate(alone))

    assert error(remembering) > BAR
    row = f"cache: prompts of unequal length ({config.cell})"
    proof(row, "each row alone", error(cache), BAR, rng_seed, "padding remembered")


def test_recurrent_cache_rewinds_within_its_history(case):
    _, module, params, tokens = case
    lengths = jnp.array([9, 7, 6])
    cache = apply(module, params, tokens[:, :9], cache=module.init_cache(B, T, history=3)).cache
    out = apply(module, params, tokens[:, 9:11], cache=cache.rewind(lengths))
    for row, length in enumerate(lengths.tolist()):
        alone = jnp.concatenate([tokens[row, :length], tokens[row, 9:11]])[None]
        assert apart(out.logits[row], logits(module, params, alone)[0, -2:]) <= BAR
    further = apply(module, params, tokens[:, 9:11], cache=cache.rewind(lengths - 1)).logits
    assert bool(jnp.isfinite(further[:2]).all()) and bool(jnp.isnan(further[2]).all())


def test_recurrent_state_carried_in_windows_equals_the_full_run(case, proof, rng_seed):
    config, module, params, tokens = case
    full = causal_lm(module, ObjectiveConfig(), params, _batch(tokens, SEGMENTS))

    @jax.jit
    def run(params, opens_anew):
        cache, total = module.init_cache(B, T), 0.0
        for start, stop in ((0, 5), (5, 9), (9, T)):
            window = _batch(tokens[:, start:stop], SEGMENTS[:, start:stop])
            opens = SEGMENTS[:, start] != SEGMENTS[:, max(start, 1) - 1]
            cache = cache.rewind(jnp.where(opens & opens_anew, 0, cache.lengths))
            sums, cache = truncated(module, ObjectiveConfig(), params, window, cache)
            total += sums.loss
        return total

    error = lambda anew: abs(float(run(params, anew)) / float(full.loss) - 1)  # noqa: E731
    assert error(False) > BAR
    row = f"state carried over windows of packed documents ({config.cell})"
    proof(row, "one run over all of them", error(True), BAR, rng_seed, "a document goes on from the last window's")


def _batch(tokens, segments):
    weights = (segments > 0).astype(jnp.float32)
    return {"tokens": tokens, "labels": (tokens * 7 + 3) % 31, "segments": segments, "weights": weights}


def test_recurrent_generation_equals_repeated_full_forwards(case, rng_seed):
    _, module, params, _ = case
    rng = np.random.default_rng(rng_seed)
    texts = [rng.integers(0, 31, length).tolist() for length in (3, 11, 7)]
    completions = generate(module, params, texts, Sampling(9, temperature=0.0), jax.random.key(0))
    for text, written in zip(texts, completions.tokens, strict=True):
        ids = list(text)
        for token in written:
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(ids)] = ids
            row = np.asarray(logits(module, params, padded))[0, len(ids) - 1]
            assert row[token] >= row.max() - 1e-5 * np.abs(row).max()
            ids.append(int(token))
        assert len(written) == 9


# --- the contracts of every family ------------------------------------------------------------------------------------


def test_recurrent_layers_in_runs_taps_and_interventions(case):
    config, module, params, tokens = case
    out = apply(module.clone(taps=("embed", "block_out")), params, tokens)
    assert out.taps["embed"].shape == (B, T, 14) and out.taps["block_out"].shape == (3, B, T, 14)
    assert bool((out.taps["block_out"][-1] == out.hidden).all())
    assert bool((apply(module, tree.split(params, 2), tokens).logits == out.logits).all())
    patched = module.clone(intervene=lambda layer, site, x: jnp.where(layer == 1, 0.0, x) if site == "block_out" else x)
    silent = tree.set_layer(params, 1, jax.tree.map(jnp.zeros_like, tree.layer(params, 1)))
    if config.cell != "gru":  # zero weights give zero states: tanh(0), and half of nothing
        assert apart(apply(patched, params, tokens).logits, logits(module, silent, tokens)) <= BAR
    assert apart(apply(patched, params, tokens).logits, out.logits) > 1e-3
    with pytest.raises(ValueError, match="token types"):
        module.apply({"params": params}, tokens, token_types=tokens)


@pytest.mark.parametrize(("layers", "remat"), [("unroll", "none"), ("scan", "dots"), ("unroll", "full")])
def test_recurrent_scan_unroll_and_remat_agree_with_dropout(layers, remat, rng_seed):
    config = small("lstm", dropout=0.3)
    tokens = jax.random.randint(jax.random.key(rng_seed), (B, T), 0, 31)
    params = random_weights(RecurrentLM(config), jax.random.key(rng_seed), tokens)

    def slopes(compute):
        module = RecurrentLM(dataclasses.replace(config, compute=compute))
        rngs = {"dropout": jax.random.key(5)}
        return jax.jit(jax.grad(lambda p: logits(module, p, tokens, train=True, rngs=rngs).std()))(params)

    plain = slopes(Compute(layers="scan", kernels="plain"))
    assert apart(slopes(Compute(layers=layers, remat=remat)), plain) <= 1e-5


def test_recurrent_low_rank_leaves_equal_their_matrices(case, proof, rng_seed):
    config, module, params, tokens = case

    def graft(path, weight):
        if not str(path[-1].key).endswith(("kernel", "embedding")):
            return weight
        *layers, rows, columns = weight.shape
        keys = jax.random.split(jax.random.key(len(path)), 2)
        a = 0.3 * jax.random.normal(keys[0], (*layers, rows, 2))
        b = 0.3 * jax.random.normal(keys[1], (*layers, 2, columns))
        return LowRank(base=weight, a=a, b=b, scale=jnp.full(layers, 0.7))

    grafted = jax.tree_util.tree_map_with_path(graft, params)
    ours = logits(module, grafted, tokens)
    assert apart(ours, logits(module, params, tokens)) > 1e-5
    row = f"leaf: low rank on every matrix ({config.cell})"
    error = apart(ours, logits(module, materialize(grafted), tokens))
    proof(row, "the same matrices, multiplied out", error, 1e-5, rng_seed, "the low-rank part left out")


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_recurrent_mesh_of_eight_gives_the_loss_of_one_device(kernels, proof, rng_seed):
    compute = Compute(layers="scan", kernels=kernels)
    module = RecurrentLM(small("lstm", d_model=16, vocab_size=32, num_layers=2, compute=compute))
    rng = np.random.default_rng(rng_seed)
    tokens = rng.integers(0, 32, (8, 7)).astype(np.int32)
    params = init(module, jax.random.key(rng_seed), tokens)
    batch = _batch(tokens, jnp.asarray(rng.integers(1, 3, (8, 7))))

    def loss(params, batch):
        return jax.value_and_grad(lambda p: causal_lm(module, ObjectiveConfig(), p, batch).loss)(params)

    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(params, mesh))
        rows = jax.device_put(batch, batch_sharding(mesh))
        compiled = jax.jit(loss).lower(placed, rows).compile()
        spread = compiled(placed, rows)
    kernel = placed["layers"]["cell"]["recurrent"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    # Steps wait for no other device: what a step needs was gathered before the first.
    for body in re.findall(r"^%?(\S*(?:body|region)\S*) \(.*?^}", compiled.as_text(), re.M | re.S):
        assert not re.search("all-gather|all-reduce|collective|all-to-all", body)
    alone = jax.jit(loss)(params, batch)
    short = jax.jit(loss)(params, {**batch, "weights": batch["weights"].at[-1].set(0.0)})
    assert apart(short, alone) > 1e-5
    row = f"lstm ({kernels}) on data 2 x fsdp 2 x tensor 2: loss and gradients"
    proof(row, "one device", apart(spread, alone), 1e-5, rng_seed, "the rows of one device left out")
