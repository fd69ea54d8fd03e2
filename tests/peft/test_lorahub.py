"""LoRAs of other tasks mixed: what the mixture is, and that the search finds a planted one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import adapter_of, logits_of
from grid import VOCAB, base_of
from operations import apart

from xylem import peft
from xylem.errors import ConfigError
from xylem.models.conversion import flatten
from xylem.models.leaves import LowRank
from xylem.peft.methods import lorahub

TARGETS = "query|value|mlp/down"


@pytest.fixture(scope="module")
def five(module_seed):
    """Five adapters of one base, and a text."""
    base, keys = base_of("llama", module_seed), jax.random.split(jax.random.key(module_seed), 6)
    tokens = jax.random.randint(keys[5], (4, 7), 0, VOCAB)
    return module_seed, base, [adapter_of(base, key, 3, TARGETS) for key in keys[:5]], tokens


def test_one_weight_of_one_is_that_adapter_to_the_bit(five):
    _, _, adapters, _ = five
    for index, adapter in enumerate(adapters):
        jax.tree.map(np.testing.assert_array_equal, lorahub.combine(adapters, np.eye(5)[index]), adapter)


def test_factors_are_mixed_apart(five, proof):
    seed, _, adapters, _ = five
    w = np.random.default_rng(seed).uniform(-1.5, 1.5, 5)
    mixed, flats = flatten(lorahub.combine(adapters, w)), [flatten(each) for each in adapters]
    error, other = 0.0, []
    for path, leaf in mixed.items():
        if isinstance(leaf, LowRank):
            pairs = [tuple(np.asarray(x, np.float64) for x in (f[path].a, f[path].b, f[path].scale)) for f in flats]
            a = sum(weight * pair[0] for weight, pair in zip(w, pairs, strict=True))
            b = sum(weight * pair[1] for weight, pair in zip(w, pairs, strict=True))
            scale = pairs[0][2][:, None, None]
            weight = np.asarray(flats[0][path].base, np.float64) + scale * (a @ b)
            error = max(error, apart([leaf.materialize()], [weight]))
            products = sum(each * pair[0] @ pair[1] for each, pair in zip(w, pairs, strict=True))
            other.append(apart([scale * products], [scale * (a @ b)]))
    assert min(other) > 0.1
    proof("LoRAHub: the mixture", "NumPy, (sum w A)(sum w B)", error, 1e-5, seed, "sum w A B")


def test_the_search_finds_a_planted_mixture(five):
    _, base, adapters, tokens = five
    planted = np.array([0.8, 0.0, -0.6, 0.0, 0.0])
    wanted = logits_of("llama", lorahub.combine(adapters, planted), tokens)
    calls = []

    def loss(params):
        calls.append(float(jnp.square(logits_of("llama", params, tokens) - wanted).mean()))
        return calls[-1]

    weights, params = lorahub.search(loss, adapters, budget=40)
    assert len(calls) <= 40
    assert np.abs(weights).max() <= 1.5
    found = lorahub.objective(loss(params), weights)
    single = [lorahub.objective(loss(adapter), np.eye(5)[i]) for i, adapter in enumerate(adapters)]
    nothing = lorahub.objective(loss(base), np.zeros(5))
    print(f"objective: found {found:.4f} at {weights}, best single {min(single):.4f}, none {nothing:.4f}")
    # Forty evaluations of five weights come near, not there: COBYLA's first steps are the adapters alone.
    assert found < 0.7 * min(*single, nothing)
    assert lorahub.objective(2.0, np.array([1.0, -0.5])) == 2.0 + 0.05 * 0.75, "algorithm.py, default_l1_regularization"


def test_what_cannot_be_mixed_says_why(five):
    seed, base, adapters, _ = five
    with pytest.raises(ConfigError, match="one for each of the 5 adapters"):
        lorahub.combine(adapters, [1.0])
    for other in (
        adapter_of(base, jax.random.key(seed), 4, TARGETS),
        peft.lora(base, jax.random.key(0), rank=3, alpha=1.0),
    ):
        with pytest.raises(ConfigError, match=r"adapters\[1\]: 'layers/.*' is not possible; targets, rank and scale"):
            lorahub.combine([adapters[0], other], [1.0, 1.0])
    with pytest.raises(ConfigError, match="budget: 6"):
        lorahub.search(lambda params: 0.0, adapters, budget=6)
