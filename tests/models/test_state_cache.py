"""The state cache against a list of every state there ever was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xylem.models.cache import StateCache

L, B, HISTORY = 2, 3, 4
SHAPES = {"hidden": jax.ShapeDtypeStruct((5,), jnp.float32), "matrix": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}


class Twin:
    """Of each row, the states after 0, 1, 2, ... tokens; None where nobody can know them."""

    def __init__(self):
        self.rows = [[np.zeros((L, 5), np.float32)] for _ in range(B)]
        self.lengths = [0] * B

    def read(self, new):
        """``new[t]`` (L, B, 5): the states after the next tokens."""
        for b in range(B):
            self.rows[b] += [states[:, b] for states in new]
            self.lengths[b] += len(new)

    def rewind(self, lengths):
        for b, length in enumerate(lengths):
            if length < self.lengths[b]:
                self.rows[b] = self.rows[b][: len(self.rows[b]) - (self.lengths[b] - length)]
                self.lengths[b] = length


def states_of(new):
    """The tree of states, newest first, that a layer would write: (p, B, ...) each."""
    hidden = jnp.asarray(new[::-1])
    return {"hidden": hidden, "matrix": jnp.broadcast_to(hidden[:, :, :1, None], (len(new), B, 2, 3))}


@jax.jit
def advance(cache, new, padded=None):
    """The cache after tokens whose states are ``new`` (T, L, B, 5)."""
    for layer in range(L):
        cache = cache.update(jnp.int32(layer), states_of(new[-(HISTORY + 1) :, layer]), padded)
    return cache.advance(len(new))


def draw(rng, tokens):
    return rng.normal(size=(tokens, L, B, 5)).astype(np.float32)


def test_state_cache_starts_at_zero_with_the_room_asked_for():
    cache = StateCache.init(SHAPES, L, B, HISTORY)
    assert cache.history == HISTORY and cache.lengths.tolist() == [0] * B
    assert jax.tree.map(lambda x: x.shape, cache.states) == {"hidden": (L, 5, B, 5), "matrix": (L, 5, B, 2, 3)}
    assert cache.states["matrix"].dtype == jnp.bfloat16
    assert not any(np.any(x) for x in jax.tree.leaves(cache.states))
    assert StateCache.init(SHAPES, L, B).history == 0


def test_state_cache_follows_a_list_of_all_states(rng_seed):
    rng = np.random.default_rng(rng_seed)
    cache, twin = StateCache.init(SHAPES, L, B, HISTORY), Twin()
    rewind = jax.jit(StateCache.rewind)
    for tokens in (2, 7, 1, 3, 1, 1, 1):
        new = draw(rng, tokens)
        cache = advance(cache, new)
        twin.read(new)
        # What is kept is all that is asked for here: at most HISTORY back, from wherever the row has come to.
        kept = HISTORY if tokens > 1 else 0
        lengths = np.maximum(0, np.array(twin.lengths) - rng.integers(0, kept + 1, B))
        cache = rewind(cache, jnp.asarray(lengths))
        twin.rewind(lengths)
        if kept:
            refill = draw(rng, HISTORY + 1)  # or a second rewind would ask for what the first has used up
            cache = advance(cache, refill)
            twin.read(refill)
        assert cache.lengths.tolist() == twin.lengths
        for layer in range(L):
            state = cache.read(jnp.int32(layer))
            expected = np.stack([twin.rows[b][-1][layer] for b in range(B)])
            np.testing.assert_array_equal(state["hidden"], expected)
            np.testing.assert_allclose(state["matrix"][:, 1, 2], expected[:, 0], rtol=1e-2)


@pytest.mark.parametrize("back", range(HISTORY + 3))
def test_state_cache_rewinds_as_far_as_it_keeps_and_is_nan_beyond(back, rng_seed):
    new = draw(np.random.default_rng(rng_seed), 9)
    rewound = advance(StateCache.init(SHAPES, L, B, HISTORY), new).rewind(jnp.array([9 - back, 9, 30]))
    assert rewound.lengths.tolist() == [9 - back, 9, 9]
    state = rewound.read(1)["hidden"]
    np.testing.assert_array_equal(state[1:], new[-1, 1, 1:])
    if back <= HISTORY:
        np.testing.assert_array_equal(state[0], new[-1 - back, 1, 0])
    else:
        assert np.all(np.isnan(state[0])) and np.all(np.isnan(rewound.read(1)["matrix"][0]))


@pytest.mark.parametrize("history", [0, HISTORY])
def test_state_cache_rewound_to_nothing_is_a_new_one(history, rng_seed):
    cache = StateCache.init(SHAPES, L, B, history)
    for layer in range(L):
        cache = cache.update(layer, states_of(draw(np.random.default_rng(rng_seed), 1)[:, layer]))
    rewound = cache.advance(jnp.array([9, 1, 7])).rewind(jnp.array([0, 0, 8]))
    assert rewound.lengths.tolist() == [0, 0, 7]
    for array in jax.tree.leaves(rewound.states):
        assert not np.any(array[:, :, :2]) and np.any(array[:, 0, 2])


def test_state_cache_of_padded_rows_knows_the_newest_state_alone(rng_seed):
    new = draw(np.random.default_rng(rng_seed), 6)
    cache = advance(StateCache.init(SHAPES, L, B, HISTORY), new, jnp.array([False, True, False]))
    np.testing.assert_array_equal(cache.read(0)["hidden"], new[-1, 0])
    before = cache.rewind(cache.lengths - 1).read(0)["hidden"]
    np.testing.assert_array_equal(before[jnp.array([0, 2])], new[-2, 0, jnp.array([0, 2])])
    assert np.all(np.isnan(before[1]))
    # As more is read, what is not known moves back and out.
    more = draw(np.random.default_rng(rng_seed + 1), HISTORY + 1)
    assert not np.any(np.isnan(advance(cache, more).states["hidden"]))


def test_state_cache_selects_rows_in_order_and_as_often_as_named(rng_seed):
    new = draw(np.random.default_rng(rng_seed), 6)
    cache = advance(StateCache.init(SHAPES, L, B, HISTORY), new).advance(jnp.array([0, 10, 20]))
    chosen = cache.select(jnp.array([2, 0, 0, 1]))
    assert chosen.lengths.tolist() == [26, 6, 6, 16]
    np.testing.assert_array_equal(chosen.read(1)["hidden"], new[-1, 1, jnp.array([2, 0, 0, 1])])
    np.testing.assert_array_equal(
        chosen.rewind(chosen.lengths - 2).read(0)["hidden"], new[-3, 0, jnp.array([2, 0, 0, 1])]
    )


def test_state_cache_may_be_donated():
    cache = StateCache.init(SHAPES, L, B, HISTORY)
    step = jax.jit(lambda cache, new: advance(cache, new), donate_argnums=0)
    memory = step.lower(cache, jnp.zeros((1, L, B, 5))).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(cache))
