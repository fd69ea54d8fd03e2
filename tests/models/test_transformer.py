"""The contracts every later method stands on: leaves, runs, slots, taps, interventions, the head apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart
from small import B, T, apply, init, logits

from xylem import models
from xylem.models.gpt import gpt
from xylem.models.leaves import LowRank, Quantized, materialize
from xylem.models.settings import Compute
from xylem.peft import tree

BAR = 1e-5


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
        ("llama_7b", 6_738_415_616),
        ("llama_13b", 13_015_864_320),
        ("llama_33b", 32_528_943_616),
        ("llama_65b", 65_285_660_672),
        ("llama2_7b", 6_738_415_616),
        ("llama2_13b", 13_015_864_320),
        ("llama2_70b", 68_976_648_192),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("llama3_1_8b", 8_030_261_248),
        ("llama3_1_70b", 70_553_706_496),
        ("llama3_1_405b", 405_853_388_800),
        ("llama3_2_1b", 1_235_814_400),
        ("llama3_2_3b", 3_212_749_824),
        ("smollm2", 134_515_008),
        ("gpt1", 116_534_784),
        ("mamba_130m", 129_135_360),
        ("mamba_370m", 371_516_416),
        ("mamba_790m", 793_204_224),
        ("mamba_1_4b", 1_372_178_432),
        ("mamba_2_8b", 2_768_345_600),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    module = models.build(models.PRESETS[preset]())
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert tree.count(shapes) == count


# 2005.14165, table 2.1, in millions, as printed there.
GPT3 = {"gpt3_small": 125, "gpt3_medium": 350, "gpt3_large": 760, "gpt3_xl": 1300, "gpt3_2_7b": 2700, "gpt3_6_7b": 6700,
        "gpt3_13b": 13000, "gpt3_175b": 175000}  # fmt: skip


@pytest.mark.parametrize("preset", GPT3)
def test_gpt3_presets_have_the_size_they_are_named_by(preset):
    module = models.build(models.PRESETS[preset]())
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert tree.count(shapes) / 1e6 == pytest.approx(GPT3[preset], rel=0.03)


def test_every_preset_is_counted():
    counted = {name for name, _ in test_presets_have_the_published_number_of_parameters.pytestmark[0].args[1]}
    others = ("bert", "roberta", "albert", "bart", "t5", "transformer")  # test_encoders.py, test_seq2seq.py
    encoders = {name for name in models.PRESETS if name.startswith(others)}
    assert counted | set(GPT3) | encoders == set(models.PRESETS)


def test_initial_weights_have_the_spread_of_the_table():
    config = gpt(num_layers=4, d_model=128, num_heads=4, vocab_size=999, max_length=257)
    params = models.build(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    layers, init = params["layers"], config.init
    for weight, std in [
        (params["embed"]["embedding"], init.embedding),
        (params["positions"]["embedding"], init.positions),
        (layers["attention"]["query"]["kernel"], init.kernel),
        (layers["mlp"]["up"]["kernel"], init.kernel),
        (layers["attention"]["output"]["kernel"], init.residual),
        (layers["mlp"]["down"]["kernel"], init.residual),
    ]:
        np.testing.assert_allclose(np.std(weight), std, rtol=0.03)
    assert init.residual == pytest.approx(0.02 / np.sqrt(8))
    first, second = layers["mlp"]["up"]["kernel"][:2]
    assert not np.allclose(first, second), "layers must start apart from one another"


def test_low_rank_leaf_equals_its_matrix_everywhere(case, proof, rng_seed):
    config, module, params, tokens = case

    def graft(path, weight):
        if not path.endswith(("kernel", "embedding")):
            return weight
        *layers, rows, columns = weight.shape
        keys = jax.random.split(jax.random.key(len(path)), 2)
        a = 0.3 * jax.random.normal(keys[0], (*layers, rows, 2))
        b = 0.3 * jax.random.normal(keys[1], (*layers, 2, columns))
        return LowRank(base=weight, a=a, b=b, scale=jnp.full(layers, 0.7))

    names = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    grafted = jax.tree_util.tree_map_with_path(lambda path, w: graft(names(path), w), params)
    ours = logits(module, grafted, tokens)
    assert apart(ours, logits(module, params, tokens)) > BAR
    error = apart(ours, logits(module, materialize(grafted), tokens))
    row = f"leaf: low rank on every matrix ({config.family})"
    proof(row, "the same matrices, multiplied out", error, BAR, rng_seed, "the low-rank part left out")
    assert tree.count(grafted) == tree.count(params)


def test_int8_leaf_equals_its_matrix_and_nests_under_low_rank(case, proof, rng_seed):
    config, module, params, tokens = case
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    quantized = Quantized.quantize(kernel)
    assert quantized.values.dtype == jnp.int8
    half_step = quantized.scales / 2
    assert bool(jnp.all(jnp.abs(quantized.materialize() - kernel) <= half_step * 1.001))
    layers, rows, columns = kernel.shape
    ones = jnp.ones((layers, rows, 1)), jnp.ones((layers, 1, columns)), jnp.full((layers,), 0.1)
    nested = LowRank(quantized, *ones)
    for name, leaf in (("int8", quantized), ("low rank over int8", nested)):
        mlp = {**params["layers"]["mlp"], "up": {**params["layers"]["mlp"]["up"], "kernel": leaf}}
        grafted = {**params, "layers": {**params["layers"], "mlp": mlp}}
        ours = logits(module, grafted, tokens)
        assert apart(ours, logits(module, params, tokens)) > BAR
        error = apart(ours, logits(module, materialize(grafted), tokens))
        row = f"leaf: {name} ({config.family})"
        proof(row, "the same matrix, decoded", error, BAR, rng_seed, "the matrix as it was before rounding")


def test_gradients_reach_only_what_partition_chose(case):
    _, module, params, tokens = case
    trainable, frozen = tree.partition(params, lambda path, _: path.endswith("mlp/down/kernel"))
    loss = lambda chosen: logits(module, tree.combine(chosen, frozen), tokens).mean()  # noqa: E731
    grads = jax.grad(loss)(trainable)
    assert [leaf.shape for leaf in jax.tree.leaves(grads)] == [params["layers"]["mlp"]["down"]["kernel"].shape]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), tree.combine(trainable, frozen), params))


def test_adapter_slot_changes_nothing_when_absent_and_acts_when_present(case):
    config, module, params, tokens = case
    width, layers = config.d_model, config.num_layers
    key = jax.random.key(1)
    for where in ("attention_adapter", "mlp_adapter"):
        adapter = {
            "down": {"kernel": jax.random.normal(key, (layers, width, 7)), "bias": jnp.ones((layers, 7))},
            "up": {"kernel": jnp.zeros((layers, 7, width)), "bias": jnp.zeros((layers, width))},
        }
        silent = {**params, "layers": {**params["layers"], where: adapter}}
        assert apart(logits(module, silent, tokens), logits(module, params, tokens)) <= 1e-6
        adapter["up"]["kernel"] = jax.random.normal(key, (layers, 7, width))
        assert not np.allclose(logits(module, silent, tokens), logits(module, params, tokens), atol=1e-2)


@pytest.mark.parametrize("at", [1, 2])
def test_two_runs_equal_one_to_the_bit(case, at, proof, rng_seed):
    config, module, params, tokens = case
    cut = tree.split(params, at)
    assert [name for name in cut if name.startswith("layers")] == ["layers_0", "layers_1"]
    whole = logits(module, params, tokens)
    for index in range(config.num_layers):
        same = jax.tree.map(lambda a, b: bool((a == b).all()), tree.layer(cut, index), tree.layer(params, index))
        assert jax.tree.all(same)
    swapped = tree.set_layer(tree.set_layer(cut, 0, tree.layer(cut, 2)), 2, tree.layer(cut, 0))
    assert apart(logits(module, swapped, tokens), whole) > 0.0
    row = f"layers in two runs, cut at {at} ({config.family})"
    error = apart(logits(module, cut, tokens), whole)
    proof(row, "one scan", error, 0.0, rng_seed, "first and last layer exchanged")


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_scan_unroll_and_remat_agree_with_dropout(case, layers, remat):
    config, _, params, tokens = case
    config = dataclasses.replace(config, dropout=0.3)

    def slopes(compute):
        module = models.build(dataclasses.replace(config, compute=compute))
        rngs = {"dropout": jax.random.key(5)}
        return jax.jit(jax.grad(lambda p: logits(module, p, tokens, train=True, rngs=rngs).std()))(params)

    plain = slopes(Compute(layers="scan", kernels="plain"))
    other = slopes(Compute(layers=layers, remat=remat))
    # Of the largest gradient of all: a key's bias shifts every score alike, so its own gradient is rounding noise.
    largest = max(float(jnp.abs(slope).max()) for slope in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), other, plain)


def test_dropout_is_the_same_in_two_runs_and_differs_by_layer(case):
    config, _, params, tokens = case
    module = models.build(dataclasses.replace(config, dropout=0.4)).clone(taps=("block_out",))
    rngs = {"dropout": jax.random.key(5)}
    out = apply(module, params, tokens, train=True, rngs=rngs)
    cut = apply(module, tree.split(params, 1), tokens, train=True, rngs=rngs)
    assert bool((out.logits == cut.logits).all())
    assert not np.allclose(out.logits, logits(module, params, tokens))


def test_set_layer_replaces_one_layer_and_refuses_another_structure(case):
    config, _, params, _ = case
    new = jax.tree.map(lambda x: x * 0.5, tree.layer(params, 1))
    changed = tree.set_layer(params, 1, new)
    for index in range(config.num_layers):
        expected = new if index == 1 else tree.layer(params, index)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), tree.layer(changed, index), expected))
    with pytest.raises(ValueError, match="split the run first"):
        tree.set_layer(params, 1, {**new, "extra": jnp.zeros(1)})
    with pytest.raises(ValueError, match="layers 0 to 2"):
        tree.layer(params, 3)


def test_parts_and_join_undo_each_other(case):
    params = tree.split(case[2], 1)
    cut = tree.parts(params)
    assert set(cut) == {"", "layers_0", "layers_1"}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), tree.join(cut), params))


def test_taps_equal_a_recomputation_layer_by_layer(case, proof, rng_seed):
    config, module, params, tokens = case
    sites = ("embed", "attention_out", "mlp_inner", "mlp_out", "block_out")
    out = apply(module.clone(taps=sites), params, tokens)
    taps, depth = out.taps, config.num_layers
    assert taps["embed"].shape == (B, T, config.d_model)
    assert taps["mlp_inner"].shape == (depth, B, T, config.d_ff)
    before = jnp.concatenate([taps["embed"][None], taps["block_out"][:-1]])
    stream = before + taps["attention_out"] + taps["mlp_out"]
    assert apart(jnp.roll(stream, 1, axis=0), taps["block_out"]) > BAR
    row = f"taps ({config.family})"
    error = apart(stream, taps["block_out"])
    proof(row, "the residual stream summed from them", error, BAR, rng_seed, "layers shifted by one")
    down = params["layers"]["mlp"]["down"]
    projected = jnp.einsum("lbtf,lfd->lbtd", taps["mlp_inner"], down["kernel"])
    if "bias" in down:
        projected = projected + down["bias"][:, None, None]
    assert apart(projected, taps["mlp_out"]) <= BAR
    assert apart(out.logits, logits(module, params, tokens)) <= BAR
    with pytest.raises(ValueError, match="the sites are"):
        apply(module.clone(taps=("nowhere",)), params, tokens)


def test_intervention_patches_one_runs_residual_into_another(case, proof, rng_seed):
    config, module, params, tokens = case
    other = jnp.flip(tokens, axis=1)
    clean = apply(module.clone(taps=("block_out",)), params, tokens)
    last = config.num_layers - 1

    def patched(source):
        def patch(layer, site, x):
            return jnp.where(layer == last, clean.taps["block_out"][source], x) if site == "block_out" else x

        return logits(module.clone(intervene=patch), params, other)

    assert apart(patched(last - 1), clean.logits) > BAR and apart(logits(module, params, other), clean.logits) > BAR
    row = f"intervention: another run's residual ({config.family})"
    error = apart(patched(last), clean.logits)
    proof(row, "that run's logits", error, BAR, rng_seed, "the residual of the layer before")


def test_intervention_is_differentiable(case):
    config, module, params, tokens = case

    def through(delta):
        push = lambda layer, site, x: x + jnp.where(layer == 1, delta, 0.0) if site == "mlp_out" else x  # noqa: E731
        return module.clone(intervene=push).apply({"params": params}, tokens).logits.std()

    through = jax.jit(through)
    slope = jax.grad(through)(jnp.zeros((B, T, config.d_model)))
    step = 1e-2 * slope / jnp.linalg.norm(slope)
    measured = (through(step) - through(-step)) / 2e-2
    np.testing.assert_allclose(measured, jnp.linalg.norm(slope), rtol=2e-2)


def test_head_is_apart_and_equals_the_logits(case):
    _, module, params, tokens = case
    out = apply(module, params, tokens)
    # The same products, which XLA sums otherwise for other numbers of rows.
    assert apart(module.head(params, out.hidden), out.logits) <= 1e-6
    assert apart(module.head(module.head_params(params), out.hidden[:, -1]), out.logits[:, -1]) <= 1e-6


def test_logits_nobody_reads_cost_nothing(case):
    config, module, params, tokens = case
    hidden = jax.jit(lambda p, t: module.apply({"params": p}, t).hidden).lower(params, tokens).compile()
    wide = f"f32[{B},{T},{config.vocab_size}]"
    assert wide not in hidden.as_text()
    assert wide in jax.jit(lambda p, t: logits(module, p, t)).lower(params, tokens).compile().as_text()


def test_given_embeddings_replace_the_look_up(case):
    _, module, params, tokens = case
    rows = params["embed"]["embedding"][tokens]
    given = logits(module, params, jnp.zeros_like(tokens), embeddings=rows)
    assert apart(given, logits(module, params, tokens)) <= BAR


def test_bfloat16_computes_close_and_keeps_float32_masters(case):
    config, module, params, tokens = case
    half = models.build(dataclasses.replace(config, compute=Compute(dtype="bfloat16")))
    out = apply(half, params, tokens)
    assert out.hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits: errors of a few parts in a hundred after three layers of wide random weights.
    assert apart(out.logits, logits(module, params, tokens)) <= 0.1
    assert {x.dtype for x in jax.tree.leaves(init(half, jax.random.key(0), tokens))} == {jnp.dtype("float32")}


def test_token_types_are_refused(case):
    _, module, params, tokens = case
    with pytest.raises(ValueError, match="token_types"):
        apply(module, params, tokens, token_types=jnp.zeros((B, T), jnp.int32))


def test_a_weight_of_another_shape_is_named(case):
    _, module, params, tokens = case
    wrong = {**params, "embed": {"embedding": params["embed"]["embedding"][:, :-1]}}
    with pytest.raises(ValueError, match="embed/embedding: the parameters hold shape"):
        apply(module, wrong, tokens)
