"""Reading and writing Hugging Face folders: exact, streaming, atomic, and clear about what cannot work."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import change_config, change_tensors, random_params, same, saved, tiny
from oracles import Pair, error, our_logits, random_gpt2, random_llama, random_tokens, reference_logits
from safetensors.numpy import load_file
from small import with_positions

from xylem.errors import ConfigError
from xylem.models import PRESETS, build, conversion, hub, shards
from xylem.models.config import RopeScaling
from xylem.models.conversion import flatten, unflatten
from xylem.models.families import FAMILIES
from xylem.models.leaves import LowRank, Quantized

LOGITS = 1e-4

# --- what comes back is what was written -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_hub_save_then_load_is_bit_identical(family, head, dtype, tmp_path):
    config = tiny(family, head=head)
    params = random_params(config, dtype=jnp.dtype(dtype))
    hub.save(tmp_path / "one", config, params)
    found, loaded = hub.load(tmp_path / "one", dtype=dtype)
    assert replace(found, compute=config.compute, init=config.init) == config
    assert same(loaded, params)
    assert found.compute.dtype == found.compute.param_dtype == dtype


def test_hub_shards_hold_the_same_tree(tmp_path):
    folder = saved(tmp_path / "sharded", shard_bytes=3000)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(folder / f).values())
    assert same(hub.load(folder)[1], random_params(tiny("llama")))


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_hub_reads_the_bare_network_and_old_buffers(family, tmp_path):
    config = tiny(family, head="tied")
    params = random_params(config)
    hub.save(tmp_path / "hf", config, params)

    def bare(tensors):
        prefix = {"gpt": "transformer.", "llama": "model."}[family]
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)
        if family == "gpt":
            tensors |= {"h.0.attn.bias": np.ones((1, 1, 19, 19), bool), "h.1.attn.masked_bias": np.float32([-1e4])}
        else:
            tensors["layers.2.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
        tensors["lm_head.weight"] = np.zeros((config.vocab_size, config.d_model), np.float32)

    change_tensors(tmp_path / "hf", bare)
    assert same(hub.load(tmp_path / "hf")[1], params)


def test_hub_reads_both_generations_of_rope_settings(tmp_path):
    folder = saved(tmp_path / "hf")
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 11}
    change_config(folder, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    old = hub.load(folder)[0]
    change_config(folder, rope_theta=None, rope_scaling=None)
    change_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert old == hub.load(folder)[0]
    assert (old.positions.rope_theta, old.positions.rope_scaling) == (5e5, RopeScaling(4.0, 1.0, 4.0, 11))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_hub_can_describe_every_preset(name):
    config = PRESETS[name]()
    if name.startswith(("gpt3", "transformer")):  # alternating bands and the original have no name there
        with pytest.raises(ConfigError, match="no such network"):
            hub.describe(config)
        return
    model_type, described = hub.describe(config)
    assert model_type in FAMILIES and json.loads(json.dumps(described)) == described


def test_hub_place_decides_what_the_tree_holds(tmp_path):
    folder = saved(tmp_path / "hf")
    seen = []
    _, tree = hub.load(folder, place=lambda path, leaf: seen.append(path) or leaf)
    assert sorted(seen) == sorted(flatten(tree))
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(tree))
    assert same(tree, random_params(tiny("llama")))


def test_hub_loaded_arrays_may_be_donated(tmp_path):
    params = hub.load(saved(tmp_path / "hf"))[1]
    before = np.array(params["embed"]["embedding"])
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1.0, tree), donate_argnums=0)
    assert np.array_equal(step(params)["embed"]["embedding"], before + 1.0)
    assert same(hub.load(tmp_path / "hf")[1], random_params(tiny("llama")))


def test_hub_saves_leaves_materialized(tmp_path):
    config = tiny("llama")
    flat = flatten(random_params(config))
    kernel = flat["layers/mlp/up/kernel"]
    quantized = Quantized.quantize(kernel)
    low = LowRank(
        base=quantized, a=jnp.ones((*kernel.shape[:2], 2)), b=jnp.ones((3, 2, kernel.shape[2])), scale=jnp.ones(3)
    )
    hub.save(tmp_path / "hf", config, unflatten({**flat, "layers/mlp/up/kernel": low}))
    loaded = flatten(hub.load(tmp_path / "hf")[1])["layers/mlp/up/kernel"]
    np.testing.assert_array_equal(loaded, low.materialize())


# --- Hugging Face agrees ---------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hub_reads_shards_and_bfloat16_of_hugging_face(family, rng_seed, tmp_path, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    model = random_gpt2(rng, tied=False) if family == "gpt2" else random_llama(rng, tied=False)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "hf", max_shard_size="3KB")
    for parameter in model.parameters():  # these alone: rounding the rotary buffers too would be another network
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    made = Pair(model, tmp_path / "hf", *hub.load(tmp_path / "hf"))
    assert len(list(made.folder.glob("*.safetensors"))) > 2
    assert {tensor.dtype for tensor in shards.tensors(made.folder).values()} == {"BF16"}
    tokens = random_tokens(rng, made.config.vocab_size)
    reference = reference_logits(model, tokens)
    flat = flatten(made.params)
    crossed = unflatten({**flat, "layers/mlp/up/kernel": flat["layers/mlp/up/kernel"][::-1]})
    assert error(our_logits(made.config, crossed, tokens), reference) > LOGITS
    measured = error(our_logits(made.config, made.params, tokens), reference)
    row = f"hub.load: {family}, sharded bfloat16 safetensors"
    proof(row, type(model).__name__, measured, LOGITS, rng_seed, "up kernels in the wrong layers")


@pytest.mark.oracle
@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_hub_save_loads_in_hugging_face(family, head, rng_seed, tmp_path, proof):
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(rng_seed)
    config = tiny(family, head=head, norm_eps=float(rng.uniform(1e-5, 1e-3)))
    if family == "llama":
        config = with_positions(config, rope_scaling=RopeScaling(3.0, 1.0, 4.0, 17))
    params = jax.tree.map(lambda leaf: 0.4 * leaf, random_params(config, rng_seed))
    hub.save(tmp_path / "hf", config, params, shard_bytes=4000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    tokens = random_tokens(rng, config.vocab_size)
    reference = reference_logits(model, tokens)
    wrong = replace(config, activation="geglu" if config.gated else "relu")
    assert error(our_logits(wrong, params, tokens), reference) > LOGITS
    measured = error(our_logits(config, params, tokens), reference)
    row, oracle = f"hub.save: {family}, {head} head, sharded", f"AutoModelForCausalLM -> {type(model).__name__}"
    proof(row, oracle, measured, LOGITS, rng_seed, "another activation")


@pytest.mark.oracle
def test_hub_saved_tokenizer_is_read_as_it_is(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer

    vocabulary = {character: i for i, character in enumerate("Ġabcdefg")}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    saved(tmp_path / "hf", tokenizer_file=tmp_path / "tokenizer.json")
    text = "bad cab fade"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"] == tokenizer.encode(text).ids


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
import jax
from xylem.models import hub
from xylem.models.conversion import flatten

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

hub.load(sys.argv[1])  # a tiny one first: everything imported, traced and warm
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is resident now
before = status("VmRSS")
params = flatten(hub.load(sys.argv[2])[1])
assert all(isinstance(leaf, jax.Array) for leaf in params.values())
print(status("VmHWM") - before, sum(leaf.nbytes for leaf in params.values()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's accounts of a process")
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_hub_load_peaks_below_1_3_times_the_checkpoint(family, tmp_path):
    """Peak resident memory of a process of its own (VmHWM, which counts mapped files too) above what it was before.

    Most of the checkpoint is one tensor: to read that one whole beside its place would already be too much.
    """
    saved(tmp_path / "tiny", family)
    width = {"d_model": 72, "head_dim": 24, "d_ff": 20_000} if family == "gpt" else {"d_model": 80, "d_ff": 10_000}
    config = replace(tiny(family, head="tied"), vocab_size=400_000, num_layers=6, **width)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), unflatten(hub.parameter_shapes(config)))
    hub.save(tmp_path / "large", config, params)
    size = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    del params
    assert size > 180e6
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", PEAK, str(tmp_path / "tiny"), str(tmp_path / "large")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    loaded, held = map(int, ran.stdout.split())
    assert held == pytest.approx(size, rel=1e-3)
    print(f"peak {loaded / size:.3f} of the checkpoint's {size / 1e6:.0f} MB")
    assert loaded < 1.3 * size


def test_conversion_interleaved_rotary_pairs_become_half_split():
    assert conversion.half_split(8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_hub_parameter_shapes_are_those_of_init():
    config = tiny("gpt")
    params = build(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == {
        path: leaf.shape for path, leaf in hub.parameter_shapes(config).items()
    }
