"""A batch whose rows have adapters of their own: each row served alone is the same, and so is peft's mixed batch."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import adapter_of, learned
from grid import VOCAB, base_of, module_of, texts
from operations import apart
from oracles import pair, random_llama

from xylem import models, peft
from xylem.errors import ConfigError
from xylem.generation.sampling import Sampling, generate
from xylem.models.conversion import flatten
from xylem.models.leaves import LowRank
from xylem.peft.methods import slora
from xylem.sharding import P, batch_sharding, make_mesh, path_name, shardings

RANKS, ADAPTERS, REQUESTS, T = (8, 16, 32, 64), 32, 64, 5
EVERYTHING = r"layers/.*/kernel|embed/"


@pytest.fixture(scope="module")
def many(module_seed):
    """A base, 32 adapters of ranks 8 to 64, the pool of them, and 64 requests."""
    base, keys = base_of("llama", module_seed), jax.random.split(jax.random.key(module_seed), ADAPTERS)
    adapters = [adapter_of(base, key, RANKS[i % 4]) for i, key in enumerate(keys)]
    rng = np.random.default_rng(module_seed)
    ids = np.concatenate([rng.permutation(ADAPTERS), rng.integers(0, ADAPTERS, REQUESTS - ADAPTERS)])
    tokens = jnp.asarray(rng.integers(0, VOCAB, (REQUESTS, T)), jnp.int32)
    return module_seed, base, adapters, slora.stack(base, adapters), ids, tokens


@jax.jit
def forward(params, tokens):
    return module_of("llama").apply({"params": params}, tokens).logits


def test_requests_of_many_adapters_equal_each_served_alone(many, proof):
    seed, _, adapters, pool, ids, tokens = many
    together = forward(slora.assign(pool, ids), tokens)
    alone = [forward(adapters[i], tokens[row : row + 1])[0] for row, i in enumerate(ids)]
    error = apart([together], [np.stack(alone)])
    wrong = forward(slora.assign(pool, np.roll(ids, 1)), tokens)
    assert apart([wrong], [np.stack(alone)]) > 1e-2, "the next row's adapter is another"
    row = "S-LoRA: 64 requests, 32 adapters of ranks 8 to 64"
    proof(row, "each served alone", error, 1e-5, seed, "every row served by its neighbour's adapter")


def test_rows_may_come_in_any_order_and_without_an_adapter(many):
    seed, base, _, pool, ids, tokens = many
    order = np.random.default_rng(seed).permutation(REQUESTS)
    ids = np.where(np.arange(REQUESTS) % 5 == 0, -1, ids)
    out = forward(slora.assign(pool, ids), tokens)
    np.testing.assert_array_equal(forward(slora.assign(pool, ids[order]), tokens[order]), out[order])
    plain = forward(base, tokens)
    assert apart([out[::5]], [plain[::5]]) <= 1e-6, "of another program: within rounding"
    assert all(apart([out[row]], [plain[row]]) > 1e-4 for row in range(REQUESTS) if row % 5)


def test_other_ids_and_another_adapter_are_the_same_program(many):
    seed, base, _, pool, ids, tokens = many
    assign, before = jax.jit(slora.assign), forward._cache_size()
    params = assign(pool, jnp.asarray(ids))
    forward(params, tokens)
    new = adapter_of(base, jax.random.key(seed + 1), 24)
    grown = slora.replace(pool, 3, new)
    served = forward(assign(grown, jnp.full(REQUESTS, 3, jnp.int32)), tokens)
    assert apart([served[:1]], [forward(new, tokens[:1])]) <= 1e-5
    assert assign._cache_size() == 1
    assert forward._cache_size() - before <= 2, "one for the batch, one for the adapter alone"
    kept = forward(assign(grown, jnp.asarray(ids)), tokens)
    others = np.flatnonzero(ids != 3)
    np.testing.assert_array_equal(kept[others], forward(params, tokens)[others])


def test_the_compiled_program_has_one_product_with_each_base_weight(many):
    _, base, _, pool, ids, tokens = many
    text = forward.lower(slora.assign(pool, ids), tokens).compile().as_text()
    products = [re.findall(r"\[([\d,]*)\]", line)[0] for line in text.splitlines() if re.search(r" dot\(", line)]
    # Products with the base are of all rows at once, those with pairs have the row for a batch axis.
    kernels = [w for path, w in flatten(base).items() if path.endswith("/kernel")]
    wanted = sorted(f"{REQUESTS * T},{kernel.shape[-1]}" for kernel in kernels)
    assert sorted(shape for shape in products if shape.count(",") == 1) == wanted
    assert len(products) == len(wanted) + 2 * (len(wanted) - 1) + 2, "two for a pair, two of attention"


def test_a_sharded_batch_equals_a_whole_one(many):
    _, _, _, pool, ids, tokens = many
    params, mesh = slora.assign(pool, ids), make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, shardings(params, mesh))
    assert placed["layers"]["mlp"]["up"]["kernel"].a.sharding.spec == P(None, None, None, "fsdp")
    with jax.set_mesh(mesh):
        out = forward(placed, jax.device_put(tokens, batch_sharding(mesh)))
    assert apart([out], [forward(params, tokens)]) <= 1e-5


def test_cached_decoding_serves_each_row_its_own(many):
    _, _, adapters, pool, ids, tokens = many
    rows, greedy, module = slice(0, 5), Sampling(max_new_tokens=7, temperature=0.0), module_of("llama")
    prompts = [row[: 1 + i % T].tolist() for i, row in enumerate(np.asarray(tokens[rows]))]
    together = generate(module, slora.assign(pool, ids[rows]), prompts, greedy, jax.random.key(0))
    for prompt, adapter, got in zip(prompts, ids[rows], together.tokens, strict=True):
        text = list(prompt)
        for _ in range(7):
            padded = jnp.asarray([text + [0] * (12 - len(text))], jnp.int32)
            text.append(int(jnp.argmax(forward(adapters[adapter], padded)[0, len(text) - 1])))
        assert got.tolist() == text[len(prompt) :]


@pytest.mark.parametrize("family", ["gpt2", "mamba", "t5"])
def test_other_families_and_tables_serve_mixed_batches(family, rng_seed):
    base, keys = base_of(family, rng_seed), jax.random.split(jax.random.key(rng_seed), 2)
    few = r"query|/input/|embed/" if family == "gpt2" else EVERYTHING
    adapters = [adapter_of(base, keys[0], 3, EVERYTHING), adapter_of(base, keys[1], 3, few)]
    batch, ids = texts(family, rng_seed), [1, 0, -1]
    run = jax.jit(lambda params, batch: module_of(family).apply({"params": params}, **batch).logits)
    together = run(slora.assign(slora.stack(base, adapters), ids), batch)
    nothing = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if learned(path_name(path), x) else x, adapters[0])
    for row, i in enumerate(ids):
        real = slice(0, None if "decoder_tokens" in batch else int(batch["segments"][row].sum()))
        alone = run(nothing if i < 0 else adapters[i], batch)
        # T5 does not scale its scores, which enlarges rounding.
        assert apart([together[row, real]], [alone[row, real]]) <= (1e-4 if family == "t5" else 1e-5)


@pytest.mark.oracle
def test_a_mixed_batch_equals_that_of_hugging_face_peft(tmp_path, rng_seed, proof):
    import peft as theirs
    import torch

    rng = np.random.default_rng(rng_seed)
    made = pair(random_llama(rng, tied=True), tmp_path)
    names = [
        "query:q_proj",
        "key:k_proj",
        "value:v_proj",
        "output:o_proj",
        "gate:gate_proj",
        "up:up_proj",
        "down:down_proj",
    ]
    adapters, keys, model = [], jax.random.split(jax.random.key(rng_seed), 3), None
    for i, rank in enumerate((2, 5, 3)):
        config = theirs.LoraConfig(r=rank, lora_alpha=16, target_modules=[n.split(":")[1] for n in names])
        if model is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name it gave up
                model = theirs.PeftModel(made.model, config, adapter_name="0")
        else:
            model.add_adapter(str(i), config)
        adapters.append(adapter_of(made.params, keys[i], rank))
        fill(model, str(i), adapters[i], names)
    tokens, ids = rng.integers(0, made.config.vocab_size, (4, 7)), [2, 0, -1, 1]
    called = ["__base__" if i < 0 else str(i) for i in ids]
    with torch.no_grad():
        reference = model.eval()(torch.tensor(tokens), adapter_names=called).logits.numpy()
    run = jax.jit(lambda params: models.build(made.config).apply({"params": params}, jnp.asarray(tokens)).logits)
    pool = slora.stack(made.params, adapters)
    error = apart([run(slora.assign(pool, ids))], [reference])
    assert apart([run(slora.assign(pool, [2, 0, 1, 1]))], [reference]) > 1e-3
    proof("S-LoRA: a mixed batch", "peft, adapter_names", error, 1e-4, rng_seed, "the base's row given an adapter")


def fill(model, name, adapter, names):
    """Write our pairs into Hugging Face's modules."""
    import torch

    layers = model.base_model.model.model.layers
    flat = {path: leaf for path, leaf in flatten(adapter).items() if isinstance(leaf, LowRank)}
    for path, leaf in flat.items():
        outside = dict(n.split(":") for n in names)[path.split("/")[-2]]
        for i, layer in enumerate(layers):
            module = getattr(layer.mlp if "mlp" in path else layer.self_attn, outside)
            assert np.isclose(module.scaling[name], leaf.scale[i])
            with torch.no_grad():
                module.lora_A[name].weight.copy_(torch.from_numpy(np.array(leaf.a[i].T)))
                module.lora_B[name].weight.copy_(torch.from_numpy(np.array(leaf.b[i].T)))


def test_what_cannot_be_served_says_why(rng_seed):
    base, key = base_of("llama", rng_seed), jax.random.key(rng_seed)
    lora = adapter_of(base, key, 3, "query")
    with pytest.raises(ConfigError, match=r"adapters\[1\]: .*LoRA's pairs"):
        slora.stack(base, [lora, peft.dora(base, key, rank=3)])
    other = base_of("llama", rng_seed + 1)
    with pytest.raises(ConfigError, match="must be the base's"):
        slora.stack(base, [adapter_of(other, key, 3)])
    with pytest.raises(ConfigError, match="rank: 2 is not possible"):
        slora.stack(base, [lora], rank=2)
    pool = slora.stack(base, [lora], rank=4)
    for ids in ([0, 1], [-2]):
        with pytest.raises(ConfigError, match="ids"):
            slora.assign(pool, ids)
    with pytest.raises(ConfigError, match="targets: 'layers/attention/key"):
        slora.replace(pool, 0, adapter_of(base, key, 3, "query|key"))
    with pytest.raises(ConfigError, match="index"):
        slora.replace(pool, 1, lora)
    with pytest.raises(ConfigError, match="rank: 5"):
        slora.replace(pool, 0, adapter_of(base, key, 5, "query"))
    with pytest.raises(ValueError, match="2 rows, and adapters for 3"):
        forward(slora.assign(pool, [0, 0, -1]), jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="a weight of its own"):
        peft.merge(pool)
