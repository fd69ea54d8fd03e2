"""ReLoRA: a restart changes no logit and nothing but what it should; what many have learned is of higher rank."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import base_of, logits, module_of, texts
from operations import apart

from xylem.errors import ConfigError
from xylem.models.conversion import flatten, unflatten
from xylem.models.leaves import LowRank, Quantized, materialize
from xylem.peft import relora as short
from xylem.peft import tree
from xylem.peft.config import ReLoRAConfig
from xylem.peft.methods import relora
from xylem.peft.saving import fingerprint, load_adapter, save_adapter
from xylem.sharding import path_name
from xylem.training.config import OptimizerConfig
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import causal_lm
from xylem.training.optimizers import make_optimizer
from xylem.training.state import new_state
from xylem.training.step import train_step

CONFIG = ReLoRAConfig(rank=2, alpha=6.0, every=4, rewarm=2, prune=0.9)
STEPS = 12


@functools.cache
def program():
    """The optimizer of a run with restarts, and its compiled step, with a restart where one is due and without."""
    settings = OptimizerConfig(learning_rate=0.03, weight_decay=0.0)
    rates = relora.schedule(CONFIG, STEPS, peak=0.03, warmup=1, floor=0.5)
    optimizer = make_optimizer(settings, STEPS, schedule=rates)
    loss = functools.partial(causal_lm, module_of("llama"), ObjectiveConfig())

    @jax.jit
    def step(state, batch, key, restarts):
        begin = lambda state: relora.restart(state, key, CONFIG)  # noqa: E731
        state = jax.lax.cond(restarts & relora.due(state.step, CONFIG), begin, lambda state: state, state)
        return train_step(state, batch, loss=loss, optimizer=optimizer, ema=0.9)

    return optimizer, step


@pytest.fixture
def run(rng_seed):
    """The base, a fresh state, and a batch."""
    base, keys = base_of("llama", rng_seed), jax.random.split(jax.random.key(rng_seed), 2)
    grafted = relora.graft(base, keys[0], CONFIG)
    state = new_state(grafted, program()[0], rng_seed, ema=0.9, trains=relora.trainable(grafted, CONFIG))
    tokens = texts("llama", rng_seed)["tokens"]
    batch = {"tokens": tokens, "labels": jnp.roll(tokens, -1, axis=1), "weights": jnp.ones(tokens.shape)}
    return base, state, batch, keys[1]


def after(state, batch, key, steps: int, restarts: bool = True):
    """The state after so many steps, and their losses."""
    losses = []
    for _ in range(steps):
        key, own = jax.random.split(key)
        state, metrics = program()[1](state, batch, own, restarts)
        losses.append(float(metrics["loss"]))
    return state, losses


restarted = jax.jit(relora.restart, static_argnums=2)


def arrays(held) -> dict:
    return {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(held)}


def test_relora_restart_changes_no_logit_and_nothing_else(run, rng_seed, proof):
    _, state, batch, key = run
    old, _ = after(state, batch, key, 3)
    new = restarted(old, key, CONFIG)
    assert jax.tree.structure(new) == jax.tree.structure(old)
    before, now = flatten(old.params), flatten(new.params)
    given = texts("llama", rng_seed)
    forward = jax.jit(functools.partial(logits, "llama", "relora"))
    error = apart([forward(new.params, given)], [forward(old.params, given)])
    lost = {name: x.replace(base=before[name].base) if isinstance(x, LowRank) else x for name, x in now.items()}
    assert apart([forward(unflatten(lost), given)], [forward(old.params, given)]) > 1e-3
    proof("ReLoRA: logits over a restart", "those before it", error, 1e-5, rng_seed, "pairs not added to their bases")
    for name, leaf in now.items():
        if isinstance(leaf, LowRank):
            bound = leaf.base.shape[-2] ** -0.5
            assert not bool(jnp.any(leaf.b)) and 0.5 * bound < float(jnp.abs(leaf.a).max()) <= bound
            assert bool(jnp.any(leaf.a[0] != leaf.a[1])) and bool(jnp.all(leaf.a != before[name].a))
    was, held = arrays(old), arrays(new)
    changed = {name for name in was if np.any(was[name] != held[name])}
    assert all(name.endswith(("/a", "/b", "/base")) for name in changed), changed
    assert len(changed) == sum(name.endswith(("/a", "/b", "/base")) for name in was)
    np.testing.assert_array_equal(jax.tree.leaves(new.ema)[0], jax.tree.leaves(new.trainable)[0])


def test_relora_prunes_its_share_of_the_pairs_moments(rng_seed):
    keys = jax.random.split(jax.random.key(rng_seed), 4)
    kernel = jax.random.normal(keys[0], (3, 131, 129))
    params = {"layers": {"mlp": {"up": {"kernel": kernel}}, "norm": {"scale": jnp.ones((3, 131))}}}
    for prune in (0.9, 0.999):
        config = ReLoRAConfig(rank=70, prune=prune)
        grafted = relora.graft(params, keys[1], config)
        learns = lambda path, x: relora.trainable(grafted, config)(path, x) or path.endswith("scale")  # noqa: B023, E731
        optimizer = make_optimizer(OptimizerConfig(), 10)
        state = new_state(grafted, optimizer, 0, trains=learns)
        filled = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state.optimizer)
        new = arrays(restarted(state.replace(optimizer=filled), keys[2], config).optimizer)
        moments = [x for name, x in new.items() if name.endswith(("/a", "/b"))]
        assert len(moments) == 4 and sum(x.size for x in moments) > 1e5
        zeros = np.concatenate([x.ravel() for x in moments]) == 0
        assert abs(zeros.mean() - prune) < (0.01 if prune < 0.99 else 0.001)
        of = lambda moment: [x for name, x in new.items() if f"/{moment}/" in name and name.endswith("/a")]  # noqa: B023, E731
        np.testing.assert_array_equal(of("mu"), of("nu"), "a weight keeps both moments or none")
        assert all(np.all(x == 1) for name, x in new.items() if not name.endswith(("/a", "/b")))


def official_rate(step, total, first, again, every, floor) -> float:
    """The multiplier of Guitaricet/relora's scheduler, in Python's numbers."""
    if step < first:
        return step / max(1, first)
    cycle, into = divmod(step, every)
    if into < again:
        done = cycle * every / max(1, total - first)
        return into / max(1, again) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
    done = (step - first) / max(1, total - first)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def test_relora_learning_rate_is_the_official_one_at_every_step(rng_seed, proof):
    rng, error, wrong = np.random.default_rng(rng_seed), 0.0, 0.0
    for _ in range(5):
        every = int(rng.integers(20, 100))
        total, first = every * int(rng.integers(3, 9)), int(rng.integers(0, every))
        again, (floor, peak) = int(rng.integers(0, every // 2)), map(float, rng.uniform(0.01, 0.5, 2))
        config = ReLoRAConfig(every=every, rewarm=again)
        steps = jnp.arange(total)
        ours = jax.vmap(relora.schedule(config, total, peak, first, floor))(steps)
        later = jax.vmap(relora.schedule(replace(config, rewarm=again + 1), total, peak, first, floor))(steps)
        expected = peak * np.asarray([official_rate(s, total, first, again, every, floor) for s in range(total)])
        error, wrong = max(error, apart([ours], [expected])), max(wrong, apart([later], [expected]))
    assert wrong > 1e-2
    proof("ReLoRA: learning rate of every step", "official schedule", error, 1e-5, rng_seed, "a step more to come back")


def rank(new, old) -> int:
    """How many singular values of a difference are more than the rounding of a few sums."""
    new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
    noise = np.spacing(np.float32(np.abs(new).max())) * (math.sqrt(new.shape[0]) + math.sqrt(new.shape[1]))
    return int(np.sum(np.linalg.svd(new - old, compute_uv=False) > 4 * noise))


def test_relora_learns_of_higher_rank_than_its_pairs(run):
    base, state, batch, key = run
    learned, losses = after(state, batch, key, 10)
    alone, _ = after(state, batch, key, 10, restarts=False)
    ranks = {True: [], False: []}
    for restarts, end in ((True, learned), (False, alone)):
        merged = materialize(end.params)
        for name, leaf in flatten(end.params).items():
            if isinstance(leaf, LowRank):
                ranks[restarts] += list(map(rank, flatten(merged)[name], flatten(base)[name]))
    assert max(ranks[False]) <= CONFIG.rank
    assert min(ranks[True]) > CONFIG.rank
    assert max(ranks[True]) <= 3 * CONFIG.rank
    assert losses[-1] < losses[0]


def test_relora_restarts_when_a_cycle_begins():
    due = [step for step in range(13) if bool(relora.due(jnp.asarray(step), CONFIG))]
    assert due == [4, 8, 12]


def test_relora_is_saved_with_the_bases_it_changed(run, tmp_path):
    base, state, batch, key = run
    state, _ = after(state, batch, key, 6)
    save_adapter(tmp_path, CONFIG, state.params, fingerprint(base))
    config, params = load_adapter(tmp_path, base)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_relora_lets_all_that_is_no_target_learn_when_asked(rng_seed):
    params = short(base_of("llama", rng_seed), jax.random.key(0), rank=2, targets="mlp/up", others="learn")
    config = ReLoRAConfig(rank=2, targets="mlp/up", others="learn")
    trainable, frozen = tree.partition(params, relora.trainable(params, config))
    assert set(arrays(frozen)) == {"layers/mlp/up/kernel/base", "layers/mlp/up/kernel/scale"}
    assert "layers/mlp/down/kernel" in arrays(trainable)


def test_relora_refuses_bases_that_are_no_arrays_and_cycles_too_short(rng_seed):
    params = {"layers": {"mlp": {"up": {"kernel": Quantized.quantize(jnp.ones((2, 5, 7)))}}}}
    with pytest.raises(ConfigError, match="plain arrays alone"):
        relora.graft(params, jax.random.key(0), ReLoRAConfig())
    for values in ({"rewarm": 7, "every": 7}, {"prune": 1.1}, {"every": 0}, {"rank": 0}):
        with pytest.raises(ConfigError, match=next(iter(values))):
            ReLoRAConfig(**values)
