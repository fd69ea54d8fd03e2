"""Child-tuning: which gradients count, in the mean and one by one; what does not learn stays, to the bit."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from operations import apart

from xylem.errors import ConfigError
from xylem.peft.config import ChildConfig
from xylem.peft.methods import child
from xylem.sharding import path_name
from xylem.training.config import OptimizerConfig
from xylem.training.optimizers import make_optimizer

LAYERS, STEPS = 3, 5
SETTINGS = OptimizerConfig(learning_rate=0.05, schedule="constant", warmup_steps=0, weight_decay=0.3)
FISHER = ChildConfig("fisher", share=0.3, clip_norm=0.7)


def weights(key) -> dict:
    shapes = {
        "embed": {"embedding": (11, 7)},
        "layers": {
            "mlp": {"up": {"kernel": (LAYERS, 7, 13), "bias": (LAYERS, 13)}, "down": {"kernel": (LAYERS, 13, 7)}}
        },
        "head": {"kernel": (7, 11)},
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [jax.random.normal(k, shape) for k, shape in zip(keys, leaves, strict=True)])


@pytest.fixture
def case(rng_seed):
    """Parameters, and gradients of some batches, of unlike sizes."""
    params, *gradients = (weights(key) for key in jax.random.split(jax.random.key(rng_seed), STEPS + 1))
    return params, [optax.tree.scale(0.1 + i, each) for i, each in enumerate(gradients)]


def trained(optimizer, params, gradients, mask=None):
    """Parameters and state after a step for each gradient."""

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    state = state if mask is None else child.chosen(state, mask)
    for grads in gradients:
        params, state = step(params, state, grads)
    return params, state


def made(config: ChildConfig, settings: OptimizerConfig = SETTINGS):
    return make_optimizer(settings, STEPS, wrap=lambda inner: child.optimizer(inner, config, STEPS))


def numpy_mask(gradients, config: ChildConfig) -> dict:
    """The official function on one matrix of one layer after the other, and NumPy's percentile of all of them."""
    squares = {}
    for each in gradients:
        for path, stack in jax.tree_util.tree_leaves_with_path(each["layers"]):
            for index, gradient in enumerate(np.asarray(stack, np.float64)):
                factor = min(1.0, config.clip_norm / (np.linalg.norm(gradient) + 1e-6))
                name = (path_name(path), index)
                squares[name] = squares.get(name, 0.0) + (factor * gradient) ** 2 / len(gradients)
    polar = np.percentile(np.concatenate([x.ravel() for x in squares.values()]), (1 - config.share) * 100)
    return {name: x >= polar for name, x in squares.items()}


def test_child_mask_is_that_of_numpys_percentile(case, rng_seed, proof):
    _, gradients = case
    wrong, off = 0, 0
    for share in (0.3, float(np.random.default_rng(rng_seed).uniform(0.05, 0.95)), 1.0):
        config = replace(FISHER, share=share)
        expected, mask = numpy_mask(gradients, config), child.fisher_mask(gradients, config)
        loose = child.fisher_mask(gradients, replace(config, clip_norm=1e9))
        for (name, index), theirs in expected.items():
            off += int(np.sum(np.asarray(dict(_flat(mask["layers"]))[name][index]) != theirs))
            wrong += int(np.sum(np.asarray(dict(_flat(loose["layers"]))[name][index]) != theirs))
        chosen = sum(int(x.sum()) for x in jax.tree.leaves(mask["layers"]))
        size = sum(x.size for x in jax.tree.leaves(mask["layers"]))
        assert abs(chosen - share * size) <= 1
        assert all(bool(x.all()) for x in jax.tree.leaves((mask["embed"], mask["head"]))), "what competes not learns"
    assert wrong > 2
    proof("Child-tuning D: mask", "NumPy percentile of clipped squares", off, 1, rng_seed, "gradients not clipped")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_child_weights_outside_the_mask_never_move(name, case):
    params, gradients = case
    mask = child.fisher_mask(gradients, FISHER)
    new, state = trained(made(FISHER, replace(SETTINGS, name=name)), params, gradients, mask)
    for path, keep in jax.tree_util.tree_leaves_with_path(mask):
        find = lambda held: np.asarray(dict(_flat(held))[path_name(path)])  # noqa: B023, E731
        moved = find(new) != find(params)
        assert not np.any(moved & ~np.asarray(keep)), path_name(path)
        assert np.mean(moved[np.asarray(keep)]) > 0.9, path_name(path)
    if name == "adamw":
        held = dict(_flat(mask))
        moments = [(path, x) for path, x in _flat(state) if "/mu/" in path or "/nu/" in path]
        assert len(moments) == 2 * len(held)
        for path, moment in moments:
            keep = held[path.split("/mu/")[-1].split("/nu/")[-1]]
            assert not np.any(np.asarray(moment)[~np.asarray(keep)]), path


def _flat(held):
    return [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(held)]


@pytest.mark.parametrize("mode", ["random", "fisher"])
def test_child_of_all_gradients_is_the_optimizer_itself_to_the_bit(mode, case):
    params, gradients = case
    config = ChildConfig(mode, share=1.0)
    mask = child.fisher_mask(gradients, config) if mode == "fisher" else None
    ours, _ = trained(made(config), params, gradients, mask)
    plain, _ = trained(make_optimizer(SETTINGS, STEPS), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def masked_gradients(config: ChildConfig, gradient, draws: int):
    """What the optimizer within is given, by as many draws."""
    optimizer = child.optimizer(optax.identity(), config, STEPS)

    def step(state, _):
        updates, state = optimizer.update(gradient, state, gradient)
        return state, updates

    return jax.jit(lambda: jax.lax.scan(step, optimizer.init(gradient), None, length=draws)[1])()


def test_child_gradients_are_right_in_the_mean(case, rng_seed, proof):
    _, (_, gradient, *_) = case
    share, draws = float(np.random.default_rng(rng_seed).uniform(0.2, 0.8)), 500
    given = masked_gradients(ChildConfig(share=share, seed=rng_seed % 1000), gradient, draws)
    mean = jax.tree.map(lambda x: x.mean(0), given)
    pairs = zip(jax.tree.leaves(mean), jax.tree.leaves(gradient), strict=True)
    parts = [(np.asarray(x, np.float64).ravel(), np.asarray(y).ravel()) for x, y in pairs]
    over = np.concatenate([ours / exact for ours, exact in parts])
    # A weight's draw is g / share or zero: over g, of mean 1.
    sigma = np.sqrt((1 - share) / share / draws)
    off, undivided = np.abs(over - 1) / sigma, np.abs(share * over - 1) / sigma
    assert np.mean(undivided > 3) > 0.9
    assert abs(over.mean() - 1) < 5 * sigma / len(over) ** 0.5
    # Three in a thousand of a normal's draws lie beyond three standard errors.
    row = "Child-tuning F: means of 500 draws beyond 3 sigma"
    proof(row, "the whole gradient", np.mean(off > 3), 0.02, rng_seed, "not divided by the share")


def test_child_draws_anew_in_each_step_and_for_each_layer_and_goes_on_from_its_state(case):
    params, gradients = case
    config = ChildConfig(share=0.5)
    masks = [np.asarray(x != 0) for x in jax.tree.leaves(masked_gradients(config, gradients[0], 4))]
    for mask in masks:
        assert all(np.any(mask[0] != other) for other in mask[1:]), "steps differ"
    kernel = masks[-1]  # (steps, layers, ...)
    assert np.any(kernel[:, 0] != kernel[:, 1]), "layers differ"
    optimizer = made(config)
    whole, _ = trained(optimizer, params, gradients)
    half, state = trained(optimizer, params, gradients[:2])
    for grads in gradients[2:]:
        updates, state = jax.jit(optimizer.update)(grads, state, half)
        half = optax.apply_updates(half, updates)
    assert apart(half, whole) == 0.0


def test_child_by_fisher_information_wants_a_mask_and_batches(case):
    params, gradients = case
    jax.tree.map(np.testing.assert_array_equal, trained(made(FISHER), params, gradients[:2])[0], params)
    with pytest.raises(ValueError, match="at least one batch"):
        child.fisher_mask([], FISHER)
    for values in ({"share": 0.0}, {"share": 1.5}, {"clip_norm": 0.0}, {"batches": 0}):
        with pytest.raises(ConfigError, match=next(iter(values))):
            ChildConfig(**values)
