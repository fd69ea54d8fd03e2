"""Mamba under the contracts of every decoder: cache, packing, taps, runs, leaves, sharding, generation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart
from small import B, T, apply, init, logits, random_weights, small_mamba

from xylem import models
from xylem.errors import ConfigError
from xylem.generation.sampling import Sampling, generate
from xylem.models.conversion import flatten, unflatten
from xylem.models.joined import fuse
from xylem.models.leaves import LowRank, materialize
from xylem.models.mamba import mamba
from xylem.models.settings import Compute
from xylem.peft import tree
from xylem.sharding import batch_sharding, make_mesh, param_specs
from xylem.training.config import OptimizerConfig
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import causal_lm
from xylem.training.optimizers import decays, is_hidden_matrix, make_optimizer
from xylem.training.state import abstract_state, make_state, new_state
from xylem.training.step import train_step

BAR = 1e-5


@pytest.fixture(params=["euler", "zoh"])
def case(request, rng_seed):
    config = small_mamba(discretization=request.param)
    module = models.build(config)
    keys = jax.random.split(jax.random.key(rng_seed), 3)
    tokens = jax.random.randint(keys[0], (B, T), 0, config.vocab_size)
    params = random_weights(module, keys[2], tokens)
    # A small model hears little of its past: larger step sizes and a wider embedding make it loud.
    flat = flatten(params)
    flat["embed/embedding"] *= 5.0
    flat["layers/mixer/delta/bias"] += 3.0
    return config, module, unflatten(flat), tokens


@pytest.fixture
def plain_case(rng_seed):
    config = small_mamba()
    module = models.build(config)
    keys = jax.random.split(jax.random.key(rng_seed), 3)
    tokens = jax.random.randint(keys[0], (B, T), 0, config.vocab_size)
    return config, module, random_weights(module, keys[2], tokens), tokens


# --- what it starts from ----------------------------------------------------------------------------------------------


def test_initial_weights_are_those_of_the_table():
    config = mamba(3, 96, vocab_size=999, max_length=40)
    params = models.build(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    start, mixer = config.init, params["layers"]["mixer"]
    for weight, std in [
        (params["embed"]["embedding"], start.embedding),
        (mixer["input"]["kernel"], start.kernel),
        (mixer["gate"]["kernel"], start.kernel),
        (mixer["B"]["kernel"], start.selection),
        (mixer["low"]["kernel"], start.selection),
        (mixer["output"]["kernel"], start.residual),
        (mixer["conv"]["kernel"], start.conv / math.sqrt(3)),
        (mixer["delta"]["kernel"], start.delta / math.sqrt(3)),
    ]:
        np.testing.assert_allclose(np.std(weight), std, rtol=0.05)
    # torch's linear maps: uniform within 1 / sqrt(inputs), of that spread.
    assert start.kernel == pytest.approx(96**-0.5 / math.sqrt(3)) and start.conv == 0.5
    np.testing.assert_allclose(-np.exp(mixer["A_log"]), np.broadcast_to(-np.arange(1.0, 17.0), (3, 192, 16)), rtol=1e-6)
    assert bool((mixer["D"] == 1.0).all()) and bool((mixer["conv"]["bias"] == 0.0).all())
    steps = np.asarray(jax.nn.softplus(mixer["delta"]["bias"]))
    assert 0.99e-3 <= steps.min() < 2e-3 and 0.05 < steps.max() <= 0.101
    np.testing.assert_allclose(np.log(steps).mean(), (np.log(1e-3) + np.log(0.1)) / 2, atol=0.2)
    assert not np.allclose(*mixer["input"]["kernel"][:2]), "layers must start apart from one another"


def test_bfloat16_parameters_leave_a_and_d_in_float32(plain_case):
    config, _, params, tokens = plain_case
    half = models.build(dataclasses.replace(config, compute=Compute("bfloat16", "bfloat16")))
    stored = flatten(init(half, jax.random.key(0), tokens))
    wide = {path for path, leaf in stored.items() if leaf.dtype == jnp.float32}
    assert wide == {"layers/mixer/A_log", "layers/mixer/D"}
    out = apply(half, params, tokens)
    assert out.hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits: errors of a few parts in a hundred after three layers of wide random weights.
    assert apart(out.logits, logits(models.build(config), params, tokens)) <= 0.1


def test_a_and_d_never_decay_and_muon_leaves_the_convolution(plain_case):
    paths = flatten(plain_case[2])
    assert {path for path in paths if not decays(path)} == {
        *("layers/mixer_norm/scale", "final_norm/scale", "layers/mixer/conv/bias", "layers/mixer/delta/bias"),
        *("layers/mixer/A_log", "layers/mixer/D"),
    }
    hidden = {path.split("/")[-2] for path in paths if is_hidden_matrix(path)}
    assert hidden == {"input", "gate", "low", "B", "C", "delta", "output"}


@pytest.mark.parametrize(("name", "value"), [("d_inner", 0), ("state_size", -1), ("norm_eps", 0.0)])
def test_config_refuses_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(small_mamba(), **{name: value})


def test_flops_follow_the_weights_and_the_states():
    config = small_mamba()
    shapes = flatten(
        jax.eval_shape(models.build(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    )
    kernels = sum(x.size for path, x in shapes.items() if path.endswith("/kernel") and "conv" not in path)
    products = kernels + config.vocab_size * config.d_model
    scan = sum(x.size for path, x in shapes.items() if path.endswith("A_log")) * 7
    conv = shapes["layers/mixer/conv/kernel"].size * 2
    assert config.train_flops_per_token(9) == 6 * products + 3 * (scan + conv) == config.train_flops_per_token(10**6)


# --- documents and caches ---------------------------------------------------------------------------------------------

SEGMENTS = [[1] * 5 + [2] * 6 + [0] * 2, [1] * 13, [1] * 2 + [2] * 2 + [3] * 9]


def test_packed_documents_read_as_if_alone(case, proof, rng_seed):
    config, module, params, tokens = case
    segments = jnp.array(SEGMENTS)
    packed, leaking = logits(module, params, tokens, segments=segments), logits(module, params, tokens)
    errors, faulty = [], []
    for row in range(B):
        for segment in range(1, 4):
            where = np.flatnonzero(np.asarray(segments[row]) == segment)
            if len(where):
                alone = logits(module, params, tokens[row, where][None])[0]
                errors.append(apart(packed[row, where], alone))
                faulty.append(apart(leaking[row, where], alone))
    assert len(errors) == 6 and max(faulty) > BAR
    row = f"packed documents (mamba, {config.discretization})"
    proof(row, "each document alone", max(errors), BAR, rng_seed, "segments left out")


@pytest.mark.parametrize("form", ["sequential", "parallel", "chunked", "kernel"])
def test_another_first_document_leaves_the_second_alone_to_the_bit(plain_case, form):
    """Its logits, and every gradient of what is computed from them."""
    config, _, params, tokens = plain_case
    module = models.build(dataclasses.replace(config, compute=Compute(scan=form)))
    segments = jnp.array([[1] * 6 + [2] * 7] * B)
    changed = tokens.at[:, :6].set((tokens[:, :6] + 7) % config.vocab_size)

    @jax.jit
    def run(ids):
        def second(params, embeddings):
            out = module.apply({"params": params}, ids, segments=segments, embeddings=embeddings).logits
            return jnp.sin(out[:, 6:]).sum(), out

        return jax.grad(second, (0, 1), has_aux=True)(params, params["embed"]["embedding"][ids])

    ((by_params, by_inputs), before), ((other_params, other_inputs), after) = run(tokens), run(changed)
    assert bool((before[:, 6:] == after[:, 6:]).all())
    assert bool((by_inputs[:, 6:] == other_inputs[:, 6:]).all()) and bool((by_inputs[:, 6:] != 0.0).all())
    assert bool((by_inputs[:, :6] == 0.0).all())
    jax.tree.map(np.testing.assert_array_equal, by_params, other_params)
    assert apart(before[:, :6], after[:, :6]) > 1e-3


def test_cached_decoding_equals_the_full_forward(case, proof, rng_seed):
    config, module, params, tokens = case
    full = logits(module, params, tokens)
    step = lambda cache, ids: apply(module, params, ids, cache=cache)  # noqa: E731
    out = prefilled = step(module.init_cache(B, T), tokens[:, :6])
    parts = [out.logits]
    for t in range(6, T):
        out = step(out.cache, tokens[:, t : t + 1])
        parts.append(out.logits)
    assert out.cache.lengths.tolist() == [T] * B
    states = jax.tree.map(lambda x: jnp.roll(x, 1, axis=-1), prefilled.cache.states)
    assert apart(step(prefilled.cache.replace(states=states), tokens[:, 6:7]).logits[:, 0], full[:, 6]) > BAR
    error = apart(jnp.concatenate(parts, axis=1), full)
    row = f"cache: token by token (mamba, {config.discretization})"
    proof(row, "the full forward pass", error, BAR, rng_seed, "states shifted by one channel")


@pytest.mark.parametrize("lengths", [(9, 4, 6), (9, 1, 2)])
def test_cache_forgets_padding(case, lengths, proof, rng_seed):
    config, module, params, tokens = case
    real = (jnp.arange(9)[None] < jnp.array(lengths)[:, None]).astype(jnp.int32)
    cache = apply(module, params, tokens[:, :9], segments=real, cache=module.init_cache(B, T)).cache
    assert cache.lengths.tolist() == list(lengths)
    remembering = apply(module, params, tokens[:, :9], cache=module.init_cache(B, T)).cache

    def error(cache):
        out = apply(module, params, tokens[:, 9:11], cache=cache).logits
        alone = [jnp.concatenate([tokens[row, : lengths[row]], tokens[row, 9:11]])[None] for row in range(B)]
        return max(apart(out[row], logits(module, params, ids)[0, -2:]) for row, ids in enumerate(alone))

    assert error(remembering) > BAR
    row = f"cache: prompts of lengths {lengths} (mamba, {config.discretization})"
    proof(row, "each row alone", error(cache), BAR, rng_seed, "padding remembered")


def test_cache_goes_back_as_far_as_its_history(plain_case):
    _, module, params, tokens = plain_case
    cache = module.init_cache(B, T, history=3)
    cache = apply(module, params, tokens[:, :5], cache=cache).cache
    cache = apply(module, params, tokens[:, 5:9], cache=cache).cache.rewind(jnp.array([9, 6, 8]))
    out = apply(module, params, tokens[:, 9:11], cache=cache)
    for row, length in enumerate([9, 6, 8]):
        alone = jnp.concatenate([tokens[row, :length], tokens[row, 9:11]])[None]
        assert apart(out.logits[row], logits(module, params, alone)[0, -2:]) <= BAR
    lost = cache.rewind(jnp.array([9, 1, 8]))  # further than was kept: unusable, and seen to be
    out = apply(module, params, tokens[:, 9:11], cache=lost).logits
    assert bool(jnp.isnan(out[1]).all()) and not bool(jnp.isnan(out[0]).any())


def test_cache_select_follows_its_rows(plain_case):
    _, module, params, tokens = plain_case
    rows = jnp.array([2, 0, 0, 1])
    out = apply(module, params, tokens[:, :5], cache=module.init_cache(B, T))
    chosen = apply(module, params, tokens[rows, 5:8], cache=out.cache.select(rows))
    assert apart(chosen.logits, logits(module, params, tokens)[rows, 5:8]) <= BAR


def test_generation_writes_what_the_full_forward_finds_likeliest(plain_case):
    _, module, params, _ = plain_case
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6]]
    written = generate(module, params, prompts, Sampling(max_new_tokens=6, temperature=0.0), jax.random.key(0))
    for prompt, new in zip(prompts, written.tokens, strict=True):
        ids = jnp.array([[*prompt, *new.tolist()]])
        likeliest = logits(module, params, ids).argmax(-1)[0, len(prompt) - 1 : -1]
        assert likeliest.tolist() == new.tolist() and len(new) == 6


# --- inside -----------------------------------------------------------------------------------------------------------


def test_taps_equal_a_recomputation_layer_by_layer(plain_case, proof, rng_seed):
    config, module, params, tokens = plain_case
    out = apply(module.clone(taps=module.SITES), params, tokens)
    taps = out.taps
    assert taps["mixer_inner"].shape == (config.num_layers, B, T, config.d_inner)
    stream = jnp.concatenate([taps["embed"][None], taps["block_out"][:-1]]) + taps["mixer_out"]
    assert apart(jnp.roll(stream, 1, axis=0), taps["block_out"]) > BAR
    error = apart(stream, taps["block_out"])
    proof("taps (mamba)", "the residual stream summed from them", error, BAR, rng_seed, "layers shifted by one")
    projected = jnp.einsum("lbti,lid->lbtd", taps["mixer_inner"], params["layers"]["mixer"]["output"]["kernel"])
    assert apart(projected, taps["mixer_out"]) <= BAR
    assert apart(out.logits, logits(module, params, tokens)) <= BAR


def test_intervention_patches_one_runs_residual_into_another(plain_case, proof, rng_seed):
    config, module, params, tokens = plain_case
    other, last = jnp.flip(tokens, axis=1), config.num_layers - 1
    clean = apply(module.clone(taps=("block_out",)), params, tokens)

    def patched(source):
        def patch(layer, site, x):
            return jnp.where(layer == last, clean.taps["block_out"][source], x) if site == "block_out" else x

        return logits(module.clone(intervene=patch), params, other)

    assert apart(patched(last - 1), clean.logits) > BAR
    error = apart(patched(last), clean.logits)
    row = "intervention: another run's residual (mamba)"
    proof(row, "that run's logits", error, BAR, rng_seed, "the residual of the layer before")


def test_low_rank_leaf_equals_its_matrix_everywhere(plain_case, proof, rng_seed):
    _, module, params, tokens = plain_case

    def graft(path, weight):
        if not path.endswith(("kernel", "embedding")) or "conv" in path:
            return weight
        *layers, rows, columns = weight.shape
        keys = jax.random.split(jax.random.key(len(path)), 2)
        a, b = 0.3 * jax.random.normal(keys[0], (*layers, rows, 2)), jax.random.normal(keys[1], (*layers, 2, columns))
        return LowRank(base=weight, a=a, b=0.3 * b, scale=jnp.full(layers, 0.7))

    grafted = unflatten({path: graft(path, weight) for path, weight in flatten(params).items()})
    ours = logits(module, grafted, tokens)
    assert apart(ours, logits(module, params, tokens)) > BAR
    error = apart(ours, logits(module, materialize(grafted), tokens))
    row = "leaf: low rank on every matrix (mamba)"
    proof(row, "the same matrices, multiplied out", error, BAR, rng_seed, "the low-rank part left out")


def test_two_runs_equal_one_to_the_bit(plain_case):
    _, module, params, tokens = plain_case
    whole = logits(module, params, tokens)
    assert apart(logits(module, tree.split(params, 1), tokens), whole) == 0.0


def test_joined_kernels_are_the_same_network(plain_case):
    _, module, params, tokens = plain_case
    joined = fuse(params)
    assert "input_gate" in joined["layers"]["mixer"] and "input" not in joined["layers"]["mixer"]
    assert apart(logits(module, joined, tokens), logits(module, params, tokens)) <= 1e-6
    specs = flatten(param_specs(joined))
    assert specs["layers/mixer/input_gate/kernel"] == jax.sharding.PartitionSpec(None, "fsdp", "tensor")


def test_adapter_slot_acts_when_present(plain_case):
    config, module, params, tokens = plain_case
    layers, width, key = config.num_layers, config.d_model, jax.random.key(1)
    adapter = {
        "down": {"kernel": jax.random.normal(key, (layers, width, 7)), "bias": jnp.ones((layers, 7))},
        "up": {"kernel": jnp.zeros((layers, 7, width)), "bias": jnp.zeros((layers, width))},
    }
    with_it = lambda: logits(module, {**params, "layers": {**params["layers"], "mixer_adapter": adapter}}, tokens)  # noqa: E731
    assert apart(with_it(), logits(module, params, tokens)) <= 1e-6
    adapter["up"]["kernel"] = jax.random.normal(key, (layers, 7, width))
    assert apart(with_it(), logits(module, params, tokens)) > 1e-2


@pytest.mark.parametrize("compute", [Compute(layers="unroll"), Compute(remat="full"), Compute(remat="dots")])
def test_ways_of_computing_agree_on_gradients(plain_case, compute):
    config, _, params, tokens = plain_case

    def slopes(compute):
        module = models.build(dataclasses.replace(config, compute=compute))
        return jax.jit(jax.grad(lambda p: logits(module, p, tokens).std()))(params)

    plain, other = slopes(Compute(layers="scan", kernels="plain")), slopes(compute)
    largest = max(float(jnp.abs(slope).max()) for slope in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), other, plain)


def test_given_embeddings_replace_the_look_up_and_the_head_is_apart(plain_case):
    _, module, params, tokens = plain_case
    out = apply(module, params, tokens)
    given = apply(module, params, jnp.zeros_like(tokens), embeddings=params["embed"]["embedding"][tokens])
    assert apart(given.logits, out.logits) <= BAR
    # The same products, which XLA sums otherwise for other numbers of rows.
    assert apart(module.head(module.head_params(params), out.hidden[:, -1]), out.logits[:, -1]) <= 1e-6
    with pytest.raises(ValueError, match="token_types"):
        apply(module, params, tokens, token_types=tokens)


# --- training ---------------------------------------------------------------------------------------------------------

ROWS, STEPS = 8, 5


def trained(sizes: tuple[int, int, int]):
    """Losses of a few AdamW steps on packed text and the last parameters, on a mesh."""
    config = mamba(2, 12, vocab_size=32, max_length=16, state_size=5, dt_rank=4)
    config = dataclasses.replace(config, compute=Compute(layers="scan", scan="chunked"))
    module, mesh = models.build(config), make_mesh(*sizes)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.02, schedule="constant", warmup_steps=0), STEPS)

    def create():
        return new_state(module.init(jax.random.key(3), jnp.zeros((1, 2), jnp.int32))["params"], optimizer, seed=3)

    def loss(*args):
        return causal_lm(module, ObjectiveConfig(), *args)

    rng, losses = np.random.default_rng(7), []
    with jax.set_mesh(mesh):
        state = make_state(create, abstract_state(create, mesh))
        step = jax.jit(lambda state, batch: train_step(state, batch, loss=loss, optimizer=optimizer))
        for _ in range(STEPS):
            ids = rng.integers(0, 32, (ROWS, T + 1)).astype(np.int32)
            segments = np.repeat(np.arange(1, 3), [5, T - 5])[None].repeat(ROWS, 0).astype(np.int32)
            weights = (np.arange(T)[None] < rng.integers(1, T, (ROWS, 1))).astype(np.float32)
            batch = {"tokens": ids[:, :-1], "labels": ids[:, 1:], "segments": segments, "weights": weights}
            batch = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return np.array(losses), state.params


def test_mesh_of_eight_trains_as_one_device(proof):
    one, _ = trained((1, 1, 1))
    eight, params = trained((2, 2, 2))
    part = lambda array: array.addressable_shards[0].data.shape  # noqa: E731
    mixer = params["layers"]["mixer"]
    assert part(mixer["input"]["kernel"]) == (2, 6, 12) and part(mixer["output"]["kernel"]) == (2, 12, 6)
    assert part(mixer["A_log"]) == (2, 12, 5) and part(mixer["delta"]["kernel"]) == (2, 4, 6)
    assert abs(one[1] / one[0] - 1) > 1e-4, "what a step less would show"
    error = float(np.max(np.abs(eight / one - 1)))
    proof(f"mamba on data 2 x fsdp 2 x tensor 2, {STEPS} steps", "one device", error, BAR, 7, "one step less")
