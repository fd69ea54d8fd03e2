"""Scheduled sampling: its schedules, teacher forcing at one end, the model's own writing at the other."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import BAR, standard_errors
from operations import apart

from xylem.data import pipeline
from xylem.errors import ConfigError
from xylem.models import build
from xylem.models.gpt import gpt
from xylem.models.llama import llama
from xylem.models.mamba import mamba
from xylem.models.rnn import gru, lstm
from xylem.models.settings import Compute
from xylem.sharding import batch_sharding, make_mesh
from xylem.training.checkpoint import load_params
from xylem.training.inputs import objective_data, train_flops_per_token
from xylem.training.loop import pretrain
from xylem.training.objective_config import ObjectiveConfig, SampledConfig
from xylem.training.objectives import causal_lm
from xylem.training.program import assemble
from xylem.training.scheduled_sampling import make_decay, mixed_inputs, scheduled_sampling
from xylem.training.state import make_state

B, T, V = 3, 13, 11
PLAIN = Compute(layers="scan", kernels="plain")
CONFIGS = {
    "gpt": replace(gpt(2, 12, 3, V, T), compute=PLAIN, dropout=0.2),
    "llama": replace(llama(2, 16, 4, 2, 21, V, T, rope_theta=77.0, norm_eps=1e-4), compute=PLAIN),
    "lstm": replace(lstm(2, 10, V, T), compute=PLAIN),
    "gru": replace(gru(1, 10, V, T), compute=PLAIN),
    "mamba": replace(mamba(2, 10, V, T, state_size=3), compute=PLAIN),
}
SEGMENTS = jnp.array([[1] * T, [1] * 5 + [2] * 6 + [0] * 2, [1] * 4 + [0] * (T - 4)])


@pytest.fixture(params=list(CONFIGS))
def case(request, rng_seed):
    """A model far from uniform, and a batch of two documents in a row, padding behind them."""
    module, keys = build(CONFIGS[request.param]), jax.random.split(jax.random.key(rng_seed), 3)
    tokens = jax.random.randint(keys[0], (B, T + 1), 0, V)
    params = jax.jit(module.init)(keys[1], tokens[:, :2])["params"]
    params = jax.tree.map(lambda x: 3.0 * x + 0.1, params)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "segments": SEGMENTS}
    return module, params, batch | {"weights": (SEGMENTS > 0).astype(jnp.float32)}, keys[2]


def formula(name: str, step: int) -> float:
    """Section 2.4, with the constants of the test below."""
    if name == "linear":
        return max(0.25, 0.9 - 0.013 * step)
    return 0.97**step if name == "exponential" else 12.0 / (12.0 + math.exp(step / 12.0))


@pytest.mark.parametrize("decay", ["linear:0.9,0.013,0.25", "exponential:0.97", "inverse_sigmoid:12"])
def test_epsilon_equals_the_formulas_of_the_paper(decay):
    schedule = jax.jit(make_decay(SampledConfig(decay=decay)))
    found = [float(schedule(step)) for step in range(120)]
    expected = [formula(decay.split(":")[0], step) for step in range(120)]
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert all(np.diff(found) <= 0) and 0 <= found[-1] < found[0] <= 1
    assert 0.0 <= float(schedule(10**7)) <= 0.25, "no overflow long after the fall"


@pytest.mark.parametrize(
    ("decay", "allowed"),
    [
        ("linear:0.9,0.1,1.0", "0 <= LEAST <= START <= 1"),
        ("linear:1.1,0.1,0.3", "0 <= LEAST <= START <= 1"),
        ("linear:0.9,-0.1,0.3", "0 <= SLOPE"),
        ("linear:0.9,nan,0.3", "0 <= SLOPE"),
        ("exponential:1.0", "BASE lies between 0 and 1"),
        ("inverse_sigmoid:0.5", "K is at least 1"),
        ("inverse_sigmoid:inf", "K is at least 1"),
        ("linear:0.9,0.1", "linear:START,SLOPE,LEAST or exponential:BASE or inverse_sigmoid:K, in numbers"),
        ("cosine:3", "it must be linear:"),
        ("exponential", "exponential:BASE"),
        ("exponential:high", "in numbers"),
    ],
)
def test_decays_that_cannot_be_are_named(decay, allowed):
    with pytest.raises(ConfigError) as caught:
        SampledConfig(decay=decay)
    assert str(caught.value).startswith(f"objective.decay: '{decay}'") and allowed in str(caught.value)


def test_at_probability_one_it_is_teacher_forcing(case):
    """What is read is the text itself; two programs that read it differ by rounding alone."""
    module, params, batch, key = case
    sampled = partial(scheduled_sampling, module, ObjectiveConfig(), batch=batch, rng=key)
    forced = partial(causal_lm, module, ObjectiveConfig(), batch=batch, rng=key)
    read = jax.jit(partial(mixed_inputs, module))(params, batch["tokens"], SEGMENTS, key, 1.0)
    np.testing.assert_array_equal(read, batch["tokens"])
    both = jax.jit(lambda p, e: jax.value_and_grad(lambda q: sampled(params=q, epsilon=e).loss)(p))
    plain = jax.jit(jax.value_and_grad(lambda q: forced(params=q).loss))
    found, expected, mixed = both(params, 1.0), plain(params), both(params, 0.5)
    assert apart(found[0], expected[0]) <= 1e-6 and apart(found[1], expected[1], floor=1e-3) <= 1e-5
    assert apart(mixed[1], expected[1], floor=1e-3) > 1e-3


def test_inputs_equal_a_slow_loop_with_the_same_randomness(case, rng_seed, proof):
    module, params, batch, key = case
    epsilon, coins_draws = 0.4, jax.random.split(key)
    coins = np.asarray(jax.random.bernoulli(coins_draws[0], epsilon, (B, T)))
    keys = jax.random.split(coins_draws[1], T)
    mix = jax.jit(partial(mixed_inputs, module))
    mixed = mix(params, batch["tokens"], SEGMENTS, key, epsilon)
    apply = jax.jit(lambda tokens: module.apply({"params": params}, tokens, segments=SEGMENTS).logits)
    shown, segments = np.array(batch["tokens"]), np.asarray(SEGMENTS)
    for t in range(1, T):
        logits = apply(jnp.asarray(shown))[:, t - 1]  # all that has been read, anew, without a cache
        drawn = np.asarray(jax.random.categorical(keys[t - 1], logits))
        for row in range(B):
            if segments[row, t] > 0 and segments[row, t] == segments[row, t - 1] and not coins[row, t]:
                shown[row, t] = drawn[row]
    all_drawn = mix(params, batch["tokens"], jnp.ones_like(SEGMENTS), key, 0.0)
    assert bool((all_drawn != shown).any()) and bool((batch["tokens"] != shown).any())
    row, oracle = (
        f"{type(module).__name__} {module.config.family}: scheduled sampling, inputs",
        "a loop without a cache",
    )
    proof(row, oracle, int((np.asarray(mixed) != shown).sum()), 0, rng_seed, "padding and all drawn")


def test_at_probability_zero_inputs_are_the_models_own_samples(rng_seed):
    module = build(CONFIGS["lstm"])
    params = jax.jit(module.init)(jax.random.key(rng_seed), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 2.0 * x, params)
    rows = 20_000
    tokens = jnp.tile(jnp.array([[4, 0, 0]]), (rows, 1))
    shown = np.asarray(jax.jit(partial(mixed_inputs, module))(params, tokens, None, jax.random.key(rng_seed + 1), 0.0))
    assert (shown[:, 0] == 4).all()
    pairs = jnp.array([[4, second] for second in range(V)])
    likely = jax.nn.softmax(module.apply({"params": params}, pairs).logits)
    joint = np.asarray(likely[:1, 0].T * likely[:, 1])  # p(second) p(third | second)
    counts = np.zeros((V, V))
    np.add.at(counts, (shown[:, 1], shown[:, 2]), 1)
    assert standard_errors(counts.sum(1), joint.sum(1)) < BAR
    expected = joint * rows
    often = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[often].sum()
    assert statistic < often.sum() + 6 * (2 * often.sum()) ** 0.5, "chi-square, six standard deviations"


def test_the_gradient_is_that_of_the_words_shown(case):
    module, params, batch, key = case
    config, epsilon = ObjectiveConfig(), 0.3

    def sampled(params):
        return scheduled_sampling(module, config, params, batch, key, epsilon).loss

    def shown(params, tokens):
        return causal_lm(module, config, params, {**batch, "tokens": tokens}, key).loss

    tokens = jax.jit(partial(mixed_inputs, module))(
        params, batch["tokens"], SEGMENTS, jax.random.fold_in(key, 0), epsilon
    )
    assert bool((tokens != batch["tokens"]).any())
    found, expected = jax.jit(jax.grad(sampled))(params), jax.jit(jax.grad(shown))(params, tokens)
    assert apart(found, expected, floor=1e-3) <= 1e-5  # a bias of keys has no gradient but rounding


# --- in a run ---------------------------------------------------------------------------------------------------------


def learned(config) -> list[np.ndarray]:
    """What the last checkpoint of a run has learned."""
    params, _ = load_params(config.run_dir, entries=("trainable",))
    return [np.asarray(x) for x in jax.tree.leaves(params)]


@pytest.mark.slow
def test_a_run_at_probability_one_is_the_run_of_causal_lm(run_of):
    starts = {"forced": None, "one": 1.0, "less": 0.8}
    sampled = {name: SampledConfig(decay=f"linear:{start},0,0") for name, start in starts.items() if start}
    objectives = {"forced": ObjectiveConfig()} | sampled
    configs = [run_of("gru", name, objective=objective, steps=2) for name, objective in objectives.items()]
    losses = [pretrain(config)["validation_loss"] for config in configs]
    forced, one, less = map(learned, configs)
    moved = lambda x, y: sum(float(np.abs(a - b).sum()) for a, b in zip(x, y, strict=True))  # noqa: E731
    # A sum: Adam moves an element by 0.01 whatever its gradient, so one that has none but rounding goes as it pleases.
    assert moved(forced, one) < 0.01 * moved(forced, less)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6), "validation is teacher forcing"
    assert losses[2] != pytest.approx(losses[0], rel=1e-5)
    for config, start in zip(configs, starts.values(), strict=True):
        lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line).get("epsilon") for line in lines] == [pytest.approx(start)] * 2
    assert train_flops_per_token(configs[1]) == pytest.approx(4 / 3 * train_flops_per_token(configs[0]))


def test_each_step_of_a_run_has_the_epsilon_of_its_number(run_of, rng_seed, proof):
    """Against the loss of each step's batch, state and randomness, at the formula's epsilon; one step late is seen."""
    config = run_of("llama", seed=rng_seed)
    data = objective_data(config, pipeline.prepare(config.data, lambda _: None))
    program = assemble(config, make_mesh(data=1, devices=jax.devices()[:1]))
    loss = jax.jit(partial(scheduled_sampling, program.module, config.objective))
    state, batches, errors, late = program.create(), pipeline.TrainIterator(data, 8, rng_seed), [], []
    for step in range(8):
        batch, rng = next(batches), jax.random.fold_in(jax.random.key(rng_seed), step)
        before = jax.tree.map(jnp.copy, state.params)
        state, metrics = program.step(state, batch)
        assert float(metrics["epsilon"]) == pytest.approx(max(0.2, 0.9 - 0.11 * step))
        for number, found in ((step, errors), (step + 1, late)):
            sums = loss(before, batch, rng, max(0.2, 0.9 - 0.11 * number))
            found.append(abs(float(sums.loss / sums.weight) / float(metrics["loss"]) - 1))
    assert max(late) > 1e-4
    row = "scheduled sampling: the loss of each step of a run"
    proof(row, "the formula's epsilon, from outside the run", max(errors), 1e-5, rng_seed, "epsilon one step late")


@pytest.mark.parametrize("family", ["llama", "gru"])
def test_eight_devices_draw_what_one_draws(family, run_of, rng_seed):
    config = run_of(family, objective=SampledConfig(decay="linear:0.5,0,0"), seed=rng_seed)
    data = objective_data(config, pipeline.prepare(config.data, lambda _: None))
    batch, found = next(pipeline.TrainIterator(data, 8, rng_seed)), []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
        program = assemble(config, mesh)
        with jax.set_mesh(mesh):
            state = make_state(program.create, program.abstract)
            placed = {name: jax.device_put(x, batch_sharding(mesh)) for name, x in batch.items()}
            _, metrics = program.step(state, placed)
        found.append([float(metrics[name]) for name in ("loss", "nll", "gradient_norm")])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
