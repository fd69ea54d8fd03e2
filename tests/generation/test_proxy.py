"""Logits of a base moved by those of an expert and an anti-expert, as one network and with a black box."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import base_of, module_of
from operations import apart
from oracles import pair, random_gpt2, random_llama

from xylem.errors import ConfigError
from xylem.generation import proxy
from xylem.generation.sampling import Sampling, generate
from xylem.models import build

PROMPTS = [[3, 1, 4, 1], [5], [9, 2]]
TOKENS = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32)


@partial(jax.jit, static_argnums=0)
def logits(module, params, tokens):
    return module.apply({"params": params}, tokens).logits


@pytest.fixture(scope="module")
def three(module_seed):
    """A transformer and two Mambas, of one vocabulary, as one network."""
    params = {
        "base": base_of("gpt2", module_seed),
        "expert": base_of("mamba", module_seed),
        "antiexpert": base_of("mamba", module_seed + 1),
    }
    return proxy.proxy(module_of("gpt2"), module_of("mamba"), module_of("mamba"), 0.7), params


def test_equal_experts_leave_the_base_and_alpha_scales(three):
    module, params = three
    base = logits(module_of("gpt2"), params["base"], TOKENS)
    same = logits(module, {**params, "antiexpert": params["expert"]}, TOKENS)
    np.testing.assert_array_equal(same, base)
    expert, anti = (logits(module_of("mamba"), params[name], TOKENS) for name in ("expert", "antiexpert"))
    assert apart([logits(module, params, TOKENS)], [base + 0.7 * (expert - anti)]) <= 1e-6
    assert apart([proxy.mix(anti, expert, anti)], [expert]) <= 1e-6
    moves = [proxy.mix(base, expert, anti, alpha) - base for alpha in (0.5, 1.5)]
    assert apart([3 * moves[0]], [moves[1]]) <= 1e-5
    assert proxy.mix(base, expert[..., :29], jnp.pad(anti, [(0, 0), (0, 0), (0, 4)])).shape[-1] == 29


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_black_box_writes_what_an_open_base_does(three, temperature, rng_seed):
    module, params = three
    sampling, key = Sampling(6, temperature, stop=(7,)), jax.random.key(rng_seed)
    open_base = generate(module, params, PROMPTS, sampling, key)

    def base(texts):
        padded = np.zeros((len(texts), 12), np.int32)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = text
        out = logits(module_of("gpt2"), params["base"], jnp.asarray(padded))
        return np.asarray(out)[np.arange(len(texts)), [len(text) - 1 for text in texts]]

    experts = {name: params[name] for name in ("expert", "antiexpert")}
    mamba = module_of("mamba")
    closed = proxy.generate_black_box(base, mamba, mamba, experts, PROMPTS, sampling, key, 0.7)
    assert [row.tolist() for row in closed.tokens] == [row.tolist() for row in open_base.tokens]
    assert closed.stopped == open_base.stopped


def test_what_cannot_be_mixed_says_why(three):
    mamba = module_of("mamba")
    with pytest.raises(ConfigError, match="proxy tuning mixes decoders"):
        proxy.proxy(module_of("t5"), mamba, mamba)
    call = partial(proxy.generate_black_box, lambda texts: np.zeros((1, 31)), mamba, mamba, {})
    with pytest.raises(ConfigError, match="at least one token"):
        call([[]], Sampling(3), jax.random.key(0))
    with pytest.raises(ConfigError, match="max_length is 24"):
        call([[1]], Sampling(24), jax.random.key(0))


@pytest.mark.oracle
def test_mixed_logits_equal_those_of_torch(tmp_path, rng_seed, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    # The expert has tokens that the base lacks (2401.08565, its code: "extra tokens at the end of the vocabulary").
    kinds = [random_llama(rng, True, vocab_size=61), random_gpt2(rng, True, vocab_size=66)]
    kinds.append(random_gpt2(rng, False, vocab_size=61))
    made = [pair(model, tmp_path / name) for model, name in zip(kinds, proxy.NAMES, strict=True)]
    tokens, alpha = rng.integers(0, 61, (2, 9)), float(rng.uniform(0.3, 1.5))
    with torch.no_grad():
        base, expert, anti = (each.model(torch.tensor(tokens)).logits for each in made)
        reference = (base + alpha * (expert[..., :61] - anti)).numpy()
    params = {name: each.params for name, each in zip(proxy.NAMES, made, strict=True)}
    mixed = lambda alpha: proxy.proxy(*(build(each.config) for each in made), alpha)  # noqa: E731
    error = apart([logits(mixed(alpha), params, jnp.asarray(tokens))], [reference])
    assert apart([logits(mixed(-alpha), params, jnp.asarray(tokens))], [reference]) > 1e-2
    proof("proxy tuning", "transformers, three networks", error, 1e-4, rng_seed, "expert and anti-expert exchanged")
