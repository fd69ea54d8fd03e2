"""GPT and LLaMA compute what Hugging Face's do: logits and gradients, through our own reading of its checkpoints."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    IGNORED_LABEL,
    Pair,
    edited,
    error,
    our_gradients,
    our_logits,
    pair,
    random_gpt1,
    random_gpt2,
    random_llama,
    random_tokens,
    reference_gradients,
    reference_logits,
    tree_error,
)
from small import with_positions

from xylem.models.conversion import flatten

pytestmark = pytest.mark.oracle

LOGITS, GRADIENTS = 1e-4, 1e-3
EACH = pytest.mark.parametrize(
    "family, tied, scaled",
    [
        ("gpt1", True, False),
        ("gpt2", True, False),
        ("gpt2", False, False),
        ("llama", True, True),
        ("llama", False, False),
    ],
    ids=["gpt1", "gpt2-tied", "gpt2-untied", "llama-tied-scaled", "llama-untied"],
)


def make(family: str, tied: bool, scaled: bool, rng: np.random.Generator, folder, **values) -> Pair:
    if family == "gpt1":
        model = random_gpt1(rng, **values)
    else:
        model = random_gpt2(rng, tied, **values) if family == "gpt2" else random_llama(rng, tied, scaled, **values)
    print(model.config)
    return pair(model, folder)


def swapped(pair: Pair) -> dict:
    """The tree with the key and value kernels exchanged."""
    attention = pair.params["layers"]["attention"]
    key, value = attention["key"]["kernel"], attention["value"]["kernel"]
    return edited(pair.params, **{"layers/attention/key/kernel": value, "layers/attention/value/kernel": key})


def regrouped(pair: Pair) -> dict:
    """The tree whose query head n meets key/value head n % K instead of n // G."""
    config = pair.config
    heads = np.arange(config.num_heads).reshape(config.num_kv_heads, -1).T.reshape(-1)
    kernel = pair.params["layers"]["attention"]["query"]["kernel"]
    kernel = kernel.reshape(*kernel.shape[:2], config.num_heads, config.head_dim)[:, :, heads].reshape(kernel.shape)
    return edited(pair.params, **{"layers/attention/query/kernel": kernel})


@EACH
def test_parity_logits(family, tied, scaled, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    made = make(family, tied, scaled, rng, tmp_path / "hf")
    tokens = random_tokens(rng, made.config.vocab_size)
    reference = reference_logits(made.model, tokens)
    assert error(our_logits(made.config, swapped(made), tokens), reference) > LOGITS
    measured = error(our_logits(made.config, made.params, tokens), reference)
    name = f"{family} ({'tied' if tied else 'untied'} head{', scaled rope' if scaled else ''}): logits"
    proof(name, type(made.model).__name__, measured, LOGITS, rng_seed, "key and value kernels exchanged")


@EACH
def test_parity_gradients(family, tied, scaled, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    made = make(family, tied, scaled, rng, tmp_path / "hf")
    tokens = random_tokens(rng, made.config.vocab_size)
    labels = np.where(rng.random(tokens.shape) < 0.25, IGNORED_LABEL, random_tokens(rng, made.config.vocab_size))
    reference = reference_gradients(made, tokens, labels, tmp_path / "gradients")
    last = "layers/mlp_norm/scale" if family == "gpt1" else "final_norm/scale"
    flat_norm = edited(made.params, **{last: jnp.ones_like(flatten(made.params)[last])})
    assert tree_error(our_gradients(made.config, flat_norm, tokens, labels), reference) > GRADIENTS
    measured = tree_error(our_gradients(made.config, made.params, tokens, labels), reference)
    name = f"{family} ({'tied' if tied else 'untied'} head{', scaled rope' if scaled else ''}): gradients"
    proof(name, f"{type(made.model).__name__}, autograd", measured, GRADIENTS, rng_seed, "last norm's scale dropped")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_parity_padded_prompts(family, side, rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    made = make(family, True, False, rng, tmp_path / "hf")
    tokens = random_tokens(rng, made.config.vocab_size, batch=3, length=13)
    lengths = np.array([13, 5, 9])
    real = np.arange(13)[None, :] < lengths[:, None]
    real = real[:, ::-1] if side == "left" else real
    reference = reference_logits(made.model, tokens, real)
    shifted = np.roll(real, 1 if side == "left" else -1, axis=1)
    assert error(our_logits(made.config, made.params, tokens, shifted)[real], reference[real]) > LOGITS
    measured = error(our_logits(made.config, made.params, tokens, real)[real], reference[real])
    oracle = f"{type(made.model).__name__} with attention_mask"
    proof(f"{family}: prompts padded on the {side}", oracle, measured, LOGITS, rng_seed, "mask shifted by one")


def test_parity_grouped_heads_and_theta(rng_seed, tmp_path, proof):
    rng = np.random.default_rng(rng_seed)
    made = make("llama", False, True, rng, tmp_path / "hf", rms_norm_eps=float(rng.uniform(2e-3, 2e-2)))
    config = made.config
    assert 1 < config.num_kv_heads < config.num_heads
    assert config.num_heads * config.head_dim != config.d_model
    tokens = random_tokens(rng, config.vocab_size, batch=1, length=61)
    reference = reference_logits(made.model, tokens)
    faults = {
        "query head n on key/value head n % K": (config, regrouped(made)),
        "rope_theta 10% off": (with_positions(config, rope_theta=1.1 * config.positions.rope_theta), made.params),
        "rope scaling left out": (with_positions(config, rope_scaling=None), made.params),
        "norm_eps ten times too large": (replace(config, norm_eps=10 * config.norm_eps), made.params),
    }
    for fault, (wrong, params) in faults.items():
        assert error(our_logits(wrong, params, tokens), reference) > LOGITS, fault
    measured = error(our_logits(config, made.params, tokens), reference)
    proof("llama 3.1: grouped heads, scaled rope", "LlamaForCausalLM", measured, LOGITS, rng_seed, "; ".join(faults))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_parity_bfloat16(family, rng_seed, tmp_path):
    """bfloat16 keeps 8 bits: coarse, but a wrong cast or an accumulation in bfloat16 is coarser."""
    from xylem.models import hub

    rng = np.random.default_rng(rng_seed)
    made = make(family, True, False, rng, tmp_path / "hf")
    tokens = random_tokens(rng, made.config.vocab_size)
    config, params = hub.load(made.folder, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    logits = our_logits(config, params, tokens)
    assert logits.dtype == np.float32
    assert error(logits, reference_logits(made.model, tokens)) < 0.1
