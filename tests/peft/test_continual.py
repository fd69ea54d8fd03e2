"""Tasks one after another: plug-ins forget nothing, a shared adapter does, texts find their own; O-LoRA's term."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import VOCAB, base_of, module_of
from operations import apart

from xylem import peft
from xylem.models.conversion import flatten
from xylem.models.leaves import LowRank
from xylem.peft import continual
from xylem.peft.methods import slora
from xylem.peft.tree import combine, partition

TASKS, B, T = 3, 8, 19
assert VOCAB >= 10 * TASKS, "ten tokens a task"


def texts(rng, task, rows=B):
    """Texts of a task: its own tokens, each followed by the next after a step that is the task's."""
    start = rng.integers(0, 10, (rows, 1)) + 10 * task
    return jnp.asarray((start - 10 * task + (task + 1) * np.arange(T)) % 10 + 10 * task, jnp.int32)


def loss_of(trainable, frozen, tokens):
    logits = module_of("llama").apply({"params": combine(trainable, frozen)}, tokens).logits
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


loss = jax.jit(loss_of)
OPTIMIZER = optax.adam(0.03)


@partial(jax.jit, static_argnames=("steps", "weight"))
def train(trainable, frozen, tokens, steps=80, weight=0.0):
    def one(carry, _):
        trainable, state = carry
        both = lambda t: loss_of(t, frozen, tokens) + weight * continual.overlap(combine(t, frozen))  # noqa: E731
        value, grads = jax.value_and_grad(both)(trainable)
        updates, state = OPTIMIZER.update(grads, state, trainable)
        return (optax.apply_updates(trainable, updates), state), value

    (trainable, _), values = jax.lax.scan(one, (trainable, OPTIMIZER.init(trainable)), None, length=steps)
    return trainable, values


@pytest.fixture(scope="module")
def learned(module_seed):
    """A base, a plug-in a task, texts of each, and one shared adapter's losses: [after each task][on each task]."""
    rng, base = np.random.default_rng(module_seed), base_of("llama", module_seed)
    data, keys = [texts(rng, task) for task in range(TASKS)], jax.random.split(jax.random.key(module_seed), TASKS)
    plugins = []
    for key, tokens in zip(keys, data, strict=True):
        own, frozen = partition(peft.lora(base, key, rank=3), continual.newest)
        plugins.append(combine(train(own, frozen, tokens)[0], frozen))
    shared, frozen = partition(peft.lora(base, keys[0], rank=3), continual.newest)
    losses = []
    for tokens in data:
        shared, _ = train(shared, frozen, tokens)
        losses.append([float(loss(shared, frozen, each)) for each in data])
    return module_seed, base, plugins, data, losses


@jax.jit
def logits(params, tokens):
    return module_of("llama").apply({"params": params}, tokens).logits


def test_each_plugin_learns_its_task_and_a_shared_adapter_forgets(learned):
    """Plug-ins forget nothing by construction: none reads what another learned."""
    _, base, plugins, data, losses = learned
    for plugin, tokens in zip(plugins, data, strict=True):
        own, frozen = partition(plugin, continual.newest)
        untaught = loss(*partition(base, continual.newest), tokens)
        assert loss(own, frozen, tokens) < untaught - 1.0
    first, last = losses[0][0], losses[-1][0]
    print(f"a shared adapter on task 1: {first:.3f} after it, {last:.3f} after {TASKS} tasks")
    assert last > first + 1.0


def test_texts_find_their_plugin_and_are_served_in_one_batch(learned):
    seed, base, plugins, _, _ = learned
    rng, read = np.random.default_rng(seed + 1), partial(continual.features, module_of("llama"), base)
    many = [texts(rng, task, 64) for task in range(TASKS)]
    centres = continual.centroids([read(tokens) for tokens in many])
    fresh = [texts(rng, task) for task in range(TASKS)]
    share = continual.accuracy(centres, [read(tokens) for tokens in fresh])
    print(f"router: {share:.2f} of {TASKS * B} texts of {TASKS} tasks are sent to their own")
    assert share > 0.6, "chance is 0.33"
    order = rng.permutation(TASKS * B)
    mixed = jnp.concatenate(fresh)[order]
    ids = continual.route(centres, read(mixed))
    out = logits(slora.assign(slora.stack(base, plugins), ids), mixed)
    for row in range(0, TASKS * B, 5):
        alone = logits(plugins[int(ids[row])], mixed[row : row + 1])
        assert apart([out[row : row + 1]], [alone]) <= 1e-5
    more = continual.centroids([read(tokens) for tokens in many[:2]])
    np.testing.assert_array_equal(more, centres[:2])


def test_features_pass_over_padding(learned):
    _, base, _, data, _ = learned
    tokens = data[0][:2]
    padded = jnp.pad(tokens, [(0, 0), (0, 4)], constant_values=VOCAB - 1)
    segments = (jnp.arange(T + 4)[None] < T).astype(jnp.int32) * jnp.ones((2, 1), jnp.int32)
    read = partial(continual.features, module_of("llama"), base)
    assert apart([read(padded, segments)], [read(tokens)]) <= 1e-5


def test_the_orthogonal_term_is_that_of_its_code_and_turns_the_new_pair_away(learned, proof):
    seed, _, plugins, data, _ = learned
    stacked = peft.lora(plugins[0], jax.random.key(seed), rank=2)
    own, frozen = partition(stacked, continual.newest)
    names = [leaf for leaf in flatten(own).values() if isinstance(leaf, LowRank)]
    assert all(leaf.a.shape[-1] == 2 and leaf.base.a is None for leaf in names)
    reference = squares = 0.0
    for leaf in flatten(stacked).values():
        if isinstance(leaf, LowRank):
            # torch.abs(torch.mm(old, new.T)).sum() for each module, matrices (rank, inputs)
            old, new = (np.asarray(x.mT, np.float64) for x in (leaf.base.a, leaf.a))
            reference += sum(np.abs(a @ b.T).sum() for a, b in zip(old, new, strict=True))
            squares += sum(np.square(a @ b.T).sum() for a, b in zip(old, new, strict=True))
    assert abs(squares - reference) > 1e-2 * reference
    error = abs(float(continual.overlap(stacked)) - reference) / reference
    assert continual.overlap(plugins[0]) == 0, "one task overlaps with none"
    ends = [combine(train(own, frozen, data[1], weight=weight)[0], frozen) for weight in (0.0, 0.3)]
    free, turned = (float(continual.overlap(end)) for end in ends)
    assert turned < 0.3 * free, (free, turned)
    proof("O-LoRA: the orthogonal term", "NumPy, |A_old A_new^T|", error, 1e-5, seed, "squares, as in the paper")
