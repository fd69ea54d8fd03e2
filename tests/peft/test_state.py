"""States in which a Mamba begins its documents: what they add, in packed rows, in caches, and who may have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import BAR, apart, normal, scan_loop
from small import apply, logits, random_weights, small_mamba

from xylem import models, peft
from xylem.models.conversion import flatten
from xylem.models.selective_scan import left_of, selective_scan
from xylem.peft.config import StateConfig

B, T, INNER, Z = 3, 13, 7, 5
MODEL = 1e-5


def numpy_loop(rule, start, keep, **rest):
    """Outputs of the definition where each document begins with the same states."""
    rows = np.broadcast_to(start, (B, *start.shape))
    return scan_loop(rule, **rest, start=rows, keep=keep, begin=start)[0]


def case(rng):
    keep = (rng.random((B, T)) > 0.2).astype(np.float32)
    keep[:, 0], keep[:, T // 2] = 1.0, 0.0  # in the middle of every row a document begins
    return {
        "x": normal(rng, B, T, INNER),
        "delta": jnp.exp(normal(rng, B, T, INNER) - 1.0),
        "A": -jnp.exp(normal(rng, INNER, Z)),
        "B": normal(rng, B, T, Z),
        "C": normal(rng, B, T, Z),
        "D": normal(rng, INNER),
        "start": normal(rng, Z, INNER),
    }, jnp.asarray(keep)


@pytest.mark.parametrize("rule", ["euler", "zoh"])
def test_states_that_documents_begin_with_equal_a_numpy_loop_with_gradients(rule, rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    args, keep = case(rng)

    @jax.jit
    def ours(args):
        start, rest = args["start"], {name: value for name, value in args.items() if name != "start"}
        y, _ = selective_scan(**rest, keep=keep, rule=rule)
        return y + left_of(start, args["delta"], args["A"], args["C"], keep)

    wide = {name: np.asarray(value, np.float64) for name, value in args.items()}
    out, pull = jax.vjp(ours, args)
    expected = numpy_loop(rule, **wide, keep=np.asarray(keep))
    assert apart(out, numpy_loop(rule, **wide, keep=np.ones((B, T)))) > BAR
    row = f"states that documents begin with ({rule})"
    proof(row, "a float64 NumPy loop", apart(out, expected), BAR, rng_seed, "documents run into each other")
    cotangent = normal(rng, B, T, INNER)
    (slopes,) = pull(cotangent)
    errors, faults = [], []
    for name, slope in slopes.items():  # by a complex step, which is exact to rounding (Squire 1998)
        direction = rng.standard_normal(slope.shape)
        moved = {each: value.astype(np.complex128) for each, value in wide.items()}
        moved[name] = moved[name] + 1e-30j * direction
        exact = (
            np.sum(numpy_loop(rule, **moved, keep=np.asarray(keep)).imag * np.asarray(cotangent, np.float64)) / 1e-30
        )
        scale = np.linalg.norm(slope) * np.linalg.norm(direction)
        errors.append(abs(np.sum(np.asarray(slope, np.float64) * direction) - exact) / scale)
        faults.append(abs(np.sum(np.roll(np.asarray(slope, np.float64), 1, axis=-1) * direction) - exact) / scale)
    assert max(faults) > BAR
    oracle = "complex steps of a NumPy loop"
    proof(f"{row}: gradients", oracle, max(errors), BAR, rng_seed, "gradients shifted by one place")


@pytest.fixture
def taught(rng_seed):
    """A small Mamba whose states learned something."""
    module, keys = models.build(small_mamba()), jax.random.split(jax.random.key(rng_seed), 3)
    tokens = jax.random.randint(keys[0], (B, T), 0, 31)
    params = peft.state(random_weights(module, keys[1], tokens), keys[2])
    start = params["layers"]["mixer"]["start"]
    params["layers"]["mixer"]["start"] = start + jax.random.normal(keys[2], start.shape)
    return module, params, tokens


def test_packed_documents_and_cached_ones_begin_with_the_states(taught, rng_seed, proof):
    module, params, tokens = taught
    segments = jnp.array([[1] * 5 + [2] * 8, [1] * 13, [1] * 2 + [2] * 3 + [3] * 8])
    packed = logits(module, params, tokens, segments=segments)
    cache = module.init_cache(1, T, params)
    once = logits(module, params, tokens)
    errors, faults = [], []
    for row in range(B):
        for segment in range(1, int(segments[row].max()) + 1):
            where = np.flatnonzero(np.asarray(segments[row]) == segment)
            ids = tokens[row, where][None]
            first = apply(module, params, ids[:, :1], cache=cache)
            rest = apply(module, params, ids[:, 1:], cache=first.cache)
            stepped = jnp.concatenate([first.logits, rest.logits], axis=1)[0]
            errors.append(apart(packed[row, where], stepped))
            faults.append(apart(once[row, where], stepped))
            cache = rest.cache.rewind(jnp.zeros(1, jnp.int32))  # which begins anew, with the states
    assert max(faults) > MODEL
    row = "Mamba's states learned: packed documents"
    proof(row, "each document from an empty cache", max(errors), MODEL, rng_seed, "documents not kept apart")


def test_states_alone_learn_and_belong_to_mamba(taught):
    _, params, _ = taught
    learns = peft.METHODS["state"].trainable(params, StateConfig())
    assert [path for path, value in flatten(params).items() if learns(path, value)] == ["layers/mixer/start"]
