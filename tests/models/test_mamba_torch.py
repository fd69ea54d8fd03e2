"""Mamba computes what transformers' does, through its files in both directions: logits, gradients, steps, bits."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import change_config, random_params, same
from oracles import (
    IGNORED_LABEL,
    edited,
    error,
    our_gradients,
    our_logits,
    pair,
    random_mamba,
    random_tokens,
    reference_gradients,
    reference_logits,
    tree_error,
)
from small import apply, small_mamba

from xylem import models
from xylem.errors import ConfigError
from xylem.models import hub
from xylem.models.conversion import flatten, unflatten
from xylem.models.settings import Compute
from xylem.peft import tree

pytestmark = pytest.mark.oracle

LOGITS, GRADIENTS = 1e-4, 1e-3
FORMS = ("sequential", "parallel", "chunked", "kernel")
HEADS = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@HEADS
def test_mamba_logits_equal_hugging_face(tied, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    made = pair(random_mamba(rng, tied), tmp_path / "hf")
    tokens = random_tokens(rng, made.config.vocab_size)
    reference = reference_logits(made.model, tokens)
    mixer = flatten(made.params["layers"]["mixer"])
    faults = {
        "B and C exchanged": edited(made.params, **{
            "layers/mixer/B/kernel": mixer["C/kernel"], "layers/mixer/C/kernel": mixer["B/kernel"]}),
        "kernel of the convolution reversed": edited(made.params, **{
            "layers/mixer/conv/kernel": mixer["conv/kernel"][:, ::-1]}),
        "D left out": edited(made.params, **{"layers/mixer/D": jnp.zeros_like(mixer["D"])}),
    }  # fmt: skip
    for fault, params in faults.items():
        assert error(our_logits(made.config, params, tokens), reference) > LOGITS, fault
    exact = replace(made.config, discretization="zoh")
    assert error(our_logits(exact, made.params, tokens), reference) > LOGITS
    name = f"mamba ({'tied' if tied else 'untied'} head): logits"
    measured = error(our_logits(made.config, made.params, tokens), reference)
    proof(name, "MambaForCausalLM", measured, LOGITS, rng_seed, "; ".join([*faults, "B by zero-order hold"]))


@pytest.mark.parametrize("form", FORMS)
def test_mamba_gradients_equal_hugging_face(form, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    made = pair(random_mamba(rng, tied=False), tmp_path / "hf")
    config = replace(made.config, compute=Compute(scan=form))
    tokens = random_tokens(rng, config.vocab_size, batch=2, length=9)
    labels = random_tokens(rng, config.vocab_size, batch=2, length=9)
    labels[:, -2:] = IGNORED_LABEL
    reference = reference_gradients(made, tokens, labels, tmp_path / "gradients")
    still = edited(made.params, **{"layers/mixer/D": jnp.zeros_like(made.params["layers"]["mixer"]["D"])})
    assert tree_error(our_gradients(config, still, tokens, labels), reference) > GRADIENTS
    measured = tree_error(our_gradients(config, made.params, tokens, labels), reference)
    proof(f"mamba, {form}: gradients", "MambaForCausalLM, autograd", measured, GRADIENTS, rng_seed, "D left out")


def test_mamba_step_by_step_equals_hugging_face(rng_seed, tmp_path, proof):
    """Prompts of unequal length, padded, then token by token through the cache, against one full pass a row."""
    rng = np.random.default_rng(rng_seed)
    made = pair(random_mamba(rng, tied=True), tmp_path / "hf")
    module, length, new = models.build(made.config), 8, 4
    tokens = random_tokens(rng, made.config.vocab_size, batch=3, length=length + new)
    lengths = np.array([8, 1, 5])
    real = jnp.asarray(np.arange(length)[None] < lengths[:, None], jnp.int32)

    def run(real):
        cache = module.init_cache(3, length + new)
        out, parts = apply(module, made.params, tokens[:, :length], segments=real, cache=cache), []
        for t in range(length, length + new):
            out = apply(module, made.params, tokens[:, t : t + 1], cache=out.cache)
            parts.append(out.logits)
        return np.asarray(jnp.concatenate(parts, axis=1))

    rows = [np.concatenate([tokens[row, : lengths[row]], tokens[row, length:]])[None] for row in range(3)]
    reference = np.concatenate([reference_logits(made.model, row)[:, -new:] for row in rows])
    assert error(run(jnp.ones_like(real)), reference) > LOGITS
    oracle = "MambaForCausalLM, each row alone"
    proof("mamba: padded prompts, then steps", oracle, error(run(real), reference), LOGITS, rng_seed, "padding kept")


# --- files ------------------------------------------------------------------------------------------------------------


@HEADS
def test_mamba_saved_loads_in_hugging_face(tied, rng_seed, tmp_path, proof):
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(rng_seed)
    values = {"d_inner": 30, "norm_eps": float(rng.uniform(1e-5, 1e-3))}
    config = small_mamba(head="tied" if tied else "untied", **values)
    params = jax.tree.map(lambda leaf: 0.4 * leaf, random_params(config, rng_seed))
    hub.save(tmp_path / "hf", config, params, shard_bytes=4000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    tokens = random_tokens(rng, config.vocab_size)
    reference = reference_logits(model, tokens)
    crossed = edited(params, **{"layers/mixer/A_log": params["layers"]["mixer"]["A_log"][::-1]})
    assert error(our_logits(config, crossed, tokens), reference) > LOGITS
    measured = error(our_logits(config, params, tokens), reference)
    row, oracle = f"hub.save: mamba, {config.head} head, sharded", f"AutoModelForCausalLM -> {type(model).__name__}"
    proof(row, oracle, measured, LOGITS, rng_seed, "A of the layers in reverse")


@HEADS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mamba_files_come_back_bit_by_bit(tied, dtype, rng_seed, tmp_path):
    config = small_mamba(head="tied" if tied else "untied", d_inner=20)
    stored = hub.parameter_shapes(config.with_compute(Compute(dtype, dtype)))  # A and D are float32 in both
    drawn = flatten(random_params(config, rng_seed))
    params = unflatten({path: drawn[path].astype(leaf.dtype) for path, leaf in stored.items()})
    hub.save(tmp_path / "one", config, params)
    found, loaded = hub.load(tmp_path / "one", dtype=dtype)
    assert replace(found, compute=config.compute, init=config.init) == config
    assert same(loaded, params)


def test_mamba_of_hugging_face_returns_bit_by_bit(rng_seed, tmp_path):
    """Theirs, read, written and read by them again: every tensor of ``state_dict`` as it was, from bfloat16 too."""
    import torch
    from transformers import AutoModelForCausalLM

    model = random_mamba(np.random.default_rng(rng_seed), tied=False)
    for half in (False, True):
        theirs = copy.deepcopy(model).to(torch.bfloat16 if half else torch.float32)
        made = pair(theirs, tmp_path / f"hf{half}", max_shard_size="3KB")
        hub.save(tmp_path / f"ours{half}", made.config, made.params)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"ours{half}", dtype=torch.float32)
        before, after = theirs.float().state_dict(), again.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_mamba_of_another_shape_has_no_file(tmp_path):
    for strange in (small_mamba(discretization="zoh", d_inner=20), small_mamba(d_inner=22)):
        with pytest.raises(ConfigError, match="no such network"):
            hub.describe(strange)
    hub.save(tmp_path / "hf", small_mamba(d_inner=20), random_params(small_mamba(d_inner=20)))
    for field, value in {"use_bias": True, "hidden_act": "gelu", "residual_in_fp32": False}.items():
        change_config(tmp_path / "hf", **{field: value})
        with pytest.raises(ConfigError, match=field):
            hub.load(tmp_path / "hf")
        change_config(tmp_path / "hf", **{field: None})


# Published sizes (2312.00752, table 12), layers and width; the count is that of transformers' own network.
SIZES = {"mamba_130m": (24, 768), "mamba_370m": (48, 1024), "mamba_790m": (48, 1536), "mamba_1_4b": (48, 2048),
         "mamba_2_8b": (64, 2560)}  # fmt: skip


@pytest.mark.parametrize("preset", SIZES)
def test_mamba_presets_have_the_parameters_of_hugging_face(preset):
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    layers, width = SIZES[preset]
    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(num_hidden_layers=layers, hidden_size=width))
    module = models.build(models.PRESETS[preset]())
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert tree.count(shapes) == sum(parameter.numel() for parameter in model.parameters())
