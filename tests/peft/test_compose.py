"""Arithmetic on what was learned, against its definitions and Hugging Face peft's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import adapter_of, logits_of
from grid import VOCAB, base_of
from operations import apart

from xylem import peft
from xylem.errors import ConfigError
from xylem.peft import compose


@pytest.fixture(scope="module")
def two(module_seed):
    """A base, what two adapters of different targets add to it, and those adapters."""
    base, keys = base_of("llama", module_seed), jax.random.split(jax.random.key(module_seed), 2)
    adapters = [adapter_of(base, keys[0], 3, "query|value"), adapter_of(base, keys[1], 5, "query|mlp/up")]
    return module_seed, base, adapters, [compose.difference(each, base) for each in adapters]


def test_a_task_vector_is_what_an_adapter_adds(two):
    seed, base, adapters, vectors = two
    tokens = jax.random.randint(jax.random.key(seed), (2, 5), 0, VOCAB)
    assert {path.split("/")[-2] for path in vectors[0]} == {"query", "value"}
    for adapter, vector in zip(adapters, vectors, strict=True):
        same = logits_of("llama", compose.apply(base, vector), tokens)
        assert apart([same], [logits_of("llama", adapter, tokens)]) <= 1e-5
        jax.tree.map(np.testing.assert_array_equal, compose.apply(base, vector), peft.merge(adapter))
    back = compose.apply(compose.apply(base, vectors[0]), compose.negate(vectors[0]))
    assert apart(back, base) <= 1e-6
    plain = compose.difference(peft.merge(adapters[0]), base)
    assert plain.keys() == vectors[0].keys()
    assert apart(plain, vectors[0]) <= 1e-5


def test_sums_and_interpolations_are_those_of_the_weights(two):
    _, base, _, (one, other) = two
    total = compose.add([one, other], [0.5, -2.0])
    query, value, up = (next(path for path in total if name in path) for name in ("query", "value", "up"))
    np.testing.assert_allclose(total[query], 0.5 * one[query] - 2.0 * other[query], rtol=1e-6)
    np.testing.assert_array_equal(total[value], 0.5 * one[value])
    np.testing.assert_array_equal(total[up], -2.0 * other[up])
    jax.tree.map(np.testing.assert_array_equal, compose.interpolate(one, one, 0.5), one)
    assert apart(compose.interpolate(one, other, 0.0), compose.add([one, other], [1.0, 0.0])) == 0
    np.testing.assert_array_equal(
        compose.apply(base, one, 0.25)["layers"]["attention"]["query"]["kernel"],
        base["layers"]["attention"]["query"]["kernel"] + 0.25 * one[query],
    )


def flat(vectors):
    """Vectors as rows, zeros where one has no entry."""
    paths = sorted({path for vector in vectors for path in vector})
    like = {path: vector[path] for vector in vectors for path in vector}
    rows = [[np.ravel(v.get(path, np.zeros_like(like[path]))) for path in paths] for v in vectors]
    return np.stack([np.concatenate(row) for row in rows])


@pytest.mark.oracle
def test_ties_equals_peft(two, rng_seed, proof):
    import torch
    from peft.utils.merge_utils import ties

    _, _, _, (one, other) = two
    rng = np.random.default_rng(rng_seed)
    third = {path: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for path, x in one.items()}
    # Of the same weights, so that the fraction kept is of as many numbers here as there.
    vectors = [one, {path: other.get(path, third[path] * 0.1) for path in one}, third]
    weights, density = rng.uniform(0.3, 1.5, 3).tolist(), float(rng.uniform(0.2, 0.7))
    tensors = [torch.from_numpy(row) for row in flat(vectors)]
    reference = ties(tensors, torch.tensor(weights), density).numpy()
    error = apart([flat([compose.ties(vectors, weights, density)])[0]], [reference])
    assert apart([flat([compose.add(vectors, weights)])[0]], [reference]) > 0.1
    assert apart([flat([compose.ties(vectors, weights, 1.0)])[0]], [reference]) > 1e-2
    proof("TIES merging", "peft.utils.merge_utils.ties", error, 1e-6, rng_seed, "nothing trimmed")


@pytest.mark.oracle
def test_dare_equals_peft_for_the_same_coins(two, rng_seed, proof, monkeypatch):
    import torch
    from peft.utils.merge_utils import dare_linear

    _, _, _, vectors = two
    keys, density = jax.random.split(jax.random.key(rng_seed), 2), 0.3
    dropped = [compose.dare(v, key, density) for v, key in zip(vectors, keys, strict=True)]
    rows, coins = flat(vectors), iter(flat(dropped) != 0)
    monkeypatch.setattr(torch, "bernoulli", lambda _: torch.from_numpy(next(coins).astype(np.float32)))
    reference = dare_linear([torch.from_numpy(row) for row in rows], torch.tensor([0.7, 1.2]), density).numpy()
    error = apart([flat([compose.add(dropped, [0.7, 1.2])])[0]], [reference])
    assert apart([flat([compose.add(vectors, [0.7, 1.2])])[0]], [reference]) > 0.1
    proof("DARE", "peft.utils.merge_utils.dare_linear", error, 1e-6, rng_seed, "nothing dropped")
    kept = np.concatenate([np.ravel(x) for x in dropped[1].values()]) != 0
    assert abs(kept.mean() - density) < 5 * (density * (1 - density) / kept.size) ** 0.5


def test_what_cannot_be_composed_says_why(two):
    _, base, _, vectors = two
    with pytest.raises(ConfigError, match="density"):
        compose.ties(vectors, density=0.0)
    with pytest.raises(ConfigError, match="density"):
        compose.dare(vectors[0], jax.random.key(0), 1.5)
    with pytest.raises(ConfigError, match="one for each of the 2 vectors"):
        compose.add(vectors, [1.0])
    with pytest.raises(ConfigError, match="the base has no such weight"):
        compose.apply(base, {"layers/attention/qery/kernel": jnp.zeros(1)})
    with pytest.raises(ConfigError, match="tuned"):
        compose.difference({name: part for name, part in base.items() if name != "head"}, base)
