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
from oracles import Pair, error, our_logits, random_gpt2, random_llama, random_tokens, reference_logits
from safetensors.numpy import load_file, save_file

from xylem.errors import CheckpointError, ConfigError
from xylem.models import PRESETS, build, conversion, gpt, hub, llama, shards
from xylem.models.config import RopeScaling
from xylem.models.conversion import flatten, unflatten
from xylem.models.leaves import LowRank, Quantized

LOGITS = 1e-4


def tiny(family: str, **values):
    if family == "gpt":
        return replace(gpt.gpt(2, 15, 3, vocab_size=37, max_length=19), d_ff=29, **values)
    return replace(llama.llama(3, 24, 4, 2, 27, 41, 23, rope_theta=731.0, norm_eps=3e-5), **{"d_model": 20, **values})


def random_params(config, seed: int = 0, dtype=jnp.float32) -> dict:
    rng = np.random.default_rng(seed)
    shapes = hub.parameter_shapes(config)
    return unflatten({path: jnp.asarray(rng.standard_normal(leaf.shape), dtype) for path, leaf in shapes.items()})


def same(ours: dict, theirs: dict) -> bool:
    ours, theirs = flatten(ours), flatten(theirs)
    equal = [ours[path].dtype == leaf.dtype and np.array_equal(ours[path], leaf) for path, leaf in theirs.items()]
    return ours.keys() == theirs.keys() and all(equal)


def saved(folder, family: str = "llama", **saving):
    config = tiny(family)
    hub.save(folder, config, random_params(config), **saving)
    return folder


def change_config(folder, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


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
    assert (old.rope_theta, old.rope_scaling) == (5e5, RopeScaling(4.0, 1.0, 4.0, 11))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_hub_can_describe_every_preset(name):
    config = PRESETS[name]()
    model_type, described = hub.describe(config)
    assert model_type in ("gpt2", "llama") and json.loads(json.dumps(described)) == described


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
    scaling = RopeScaling(3.0, 1.0, 4.0, 17) if family == "llama" else None
    config = tiny(family, head=head, rope_scaling=scaling, norm_eps=float(rng.uniform(1e-5, 1e-3)))
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


# --- what cannot work ------------------------------------------------------------------------------------------------


def refused(folder, match: str, **loading) -> None:
    with pytest.raises(ConfigError, match=match):
        hub.load(folder, **loading)


def test_hub_load_refuses_what_is_not_a_checkpoint(tmp_path):
    refused(tmp_path / "absent", "no such folder or file")
    refused(tmp_path, "holds no config.json")
    (tmp_path / "model.pt").write_bytes(b"")
    refused(tmp_path / "model.pt", "pickle can run code")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not readable JSON")
    (tmp_path / "config.json").write_text("[" * 100_000)
    refused(tmp_path, "not readable JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "must be a JSON object")
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    refused(tmp_path, r"supported are gpt2, llama \(did you mean 'llama'\?\)")
    refused(saved(tmp_path / "hf"), "dtype: 'float16'", dtype="float16")
    refused(tmp_path / "hf" / "model.safetensors", "give the folder that holds this file")


def test_hub_load_refuses_pickled_weights_with_a_hint(tmp_path):
    folder = saved(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is a pickle")


@pytest.mark.parametrize(
    "family, setting",
    [
        *(("llama", {key: True}) for key in ("attention_bias", "mlp_bias")),
        ("llama", {"attention_dropout": 0.1}),
        ("llama", {"hidden_act": "tanh"}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}),
        ("llama", {"num_key_value_heads": 3}),
        ("llama", {"num_attention_heads": 7}),
        ("llama", {"hidden_size": "20"}),
        ("llama", {"hidden_size": True}),
        ("llama", {"vocab_size": None}),
        ("llama", {"num_hidden_layers": 0}),
        ("gpt", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt", {"attn_pdrop": 0.3}),
        ("gpt", {"n_head": 0}),
        ("gpt", {"activation_function": "gelu_nwe"}),
    ],
)
def test_hub_load_refuses_settings_it_does_not_implement(family, setting, tmp_path):
    folder = saved(tmp_path / "hf", family)
    change_config(folder, **setting)
    refused(folder, "is not possible")


def test_hub_load_names_missing_and_unexpected_tensors(tmp_path):
    folder = saved(tmp_path / "hf")
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, r"lacks layers\.1\.mlp\.up_proj\.weight")
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.9.extra": np.zeros(3, np.float32)}))
    refused(folder, r"lacks layers\.1\.mlp\.up_proj\.weight; its config has no place for layers\.9\.extra")


def test_hub_load_names_a_wrong_shape_on_both_sides(tmp_path):
    folder = saved(tmp_path / "hf")
    change_config(folder, intermediate_size=29)
    refused(
        folder, r"layers/mlp/\w+/kernel: \(\S+ \S+\) is not possible; layers\.0\.mlp\.\w+_proj\.weight in .*asks for"
    )


def test_hub_load_refuses_integer_weights(tmp_path):
    folder = saved(tmp_path / "hf")
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(20, np.int8)}))
    refused(folder, "I8.*types that can be read")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a\\b.safetensors", "model.bin", "", 3])
def test_hub_load_refuses_an_index_that_points_elsewhere(name, tmp_path):
    folder = saved(tmp_path / "hf", shard_bytes=3000)
    index = folder / shards.INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    refused(folder, "may name only")


def test_hub_load_names_a_missing_shard(tmp_path):
    folder = saved(tmp_path / "hf", shard_bytes=3000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    refused(folder, f"{shard.name}' is not possible; there is no such file")
    (folder / shards.INDEX).write_text('{"weight_map": {}}')
    refused(folder, "must map names")


def test_hub_load_names_tensors_the_index_only_promises(tmp_path):
    folder = saved(tmp_path / "hf", shard_bytes=3000)
    index = folder / shards.INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["model.promised"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    refused(folder, r"lack model\.promised")


@pytest.mark.parametrize("damage", ["empty", "length", "header", "truncated", "text"])
def test_hub_load_refuses_damaged_files_by_path(damage, tmp_path):
    file = saved(tmp_path / "hf") / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "length": (1 << 62).to_bytes(8, "little") + content[8:],
            "header": content[:20] + b"\xff" * 30 + content[50:],
            "truncated": content[:-7],
            "text": b"this is no safetensors file at all",
        }[damage]
    )
    refused(tmp_path / "hf", "model.safetensors' is not possible; it is not a whole safetensors file")


def test_hub_save_refuses_a_folder_in_use_and_another_tree(tmp_path):
    config = tiny("llama")
    params = random_params(config)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="be empty"):
        hub.save(tmp_path / "used", config, params)
    with pytest.raises(ConfigError, match=r"missing: final_norm/scale; unexpected: extra/kernel"):
        extra = {**params, "extra": {"kernel": jnp.ones(3)}}
        extra.pop("final_norm")
        hub.save(tmp_path / "hf", config, extra)
    with pytest.raises(ConfigError, match=r"final_norm/scale: \(3,\)"):
        hub.save(tmp_path / "hf", config, {**params, "final_norm": {"scale": jnp.ones(3)}})
    with pytest.raises(ConfigError, match="tokenizer_file"):
        hub.save(tmp_path / "hf", config, params, tokenizer_file=tmp_path / "absent.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used"]


@pytest.mark.parametrize(
    "family, values",
    [
        ("gpt", {"positions": "sinusoidal"}),
        ("gpt", {"num_kv_heads": 1}),
        ("gpt", {"norm": "rmsnorm"}),
        ("gpt", {"head_dim": 7}),
        ("llama", {"bias": "everywhere"}),
        ("llama", {"activation": "gelu"}),
        ("llama", {"positions": "none", "rope_theta": None}),
        ("llama", {"dropout": 0.1}),
    ],
)
def test_hub_save_refuses_networks_without_a_name_there(family, values, tmp_path):
    config = tiny(family, **values)
    with pytest.raises(ConfigError, match="has no such network"):
        hub.save(tmp_path / "hf", config, random_params(config))
    assert not (tmp_path / "hf").exists()


def test_hub_save_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_json", full)
    with pytest.raises(CheckpointError, match=r"hf could not be written: .*No space left"):
        saved(tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_conversion_interleaved_rotary_pairs_become_half_split():
    assert conversion.half_split(8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_hub_parameter_shapes_are_those_of_init():
    config = tiny("gpt")
    params = build(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == {
        path: leaf.shape for path, leaf in hub.parameter_shapes(config).items()
    }
