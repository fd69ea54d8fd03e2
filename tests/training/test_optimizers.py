"""Optimizers: a stack of layers moves as its layers would alone, and each rule as its paper's or peers' does."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from operations import apart

from xylem.peft import tree
from xylem.sharding import path_name
from xylem.training.config import OptimizerConfig
from xylem.training.optimizers import decays, is_hidden_matrix, make_optimizer, one_layer
from xylem.training.schedules import make_schedule

NAMES = ("adamw", "adafactor", "lion", "muon")
LAYERS, WIDE, NARROW, STEPS = 3, 131, 129, 11  # sides above 128, from where Adafactor factors
CONFIG = OptimizerConfig(learning_rate=0.02, schedule="linear", warmup_steps=2, weight_decay=0.3, clip_norm=None)


def weights(rng: np.random.Generator, scale: float = 1.0) -> dict:
    """A tree with a matrix that Adafactor factors, one that it does not, vectors, and both kinds of unstacked ones."""
    draw = lambda *shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "embed": {"embedding": draw(WIDE, NARROW)},
        "layers": {
            "attention_norm": {"scale": 1.0 + draw(LAYERS, 15)},
            "attention": {"query": {"kernel": draw(LAYERS, 15, 21), "bias": draw(LAYERS, 21)}},
            "mlp": {"up": {"kernel": draw(LAYERS, NARROW, WIDE)}},
        },
        "final_norm": {"scale": 1.0 + draw(15)},
        "head": {"kernel": draw(15, 37)},
    }


@pytest.fixture
def case(rng_seed):
    """Parameters, and gradients of three steps that differ much in size from layer to layer."""
    rng = np.random.default_rng(rng_seed)
    params = weights(rng, 0.5)

    def uneven(grads):
        factor = lambda x: jnp.asarray([0.01, 1.0, 30.0]).reshape(-1, *[1] * (x.ndim - 1)) * x  # noqa: E731
        return {**grads, "layers": jax.tree.map(factor, grads["layers"])}

    return params, [uneven(weights(rng, 0.1)) for _ in range(3)]


@functools.cache
def stepper(optimizer: optax.GradientTransformation):
    """One jitted step; jit keys on the function, so each optimizer compiles once a structure."""

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(optimizer, params, gradients):
    """Parameters after each step, and the last state."""
    state, history = jax.jit(optimizer.init)(params), []
    for grads in gradients:
        params, state = stepper(optimizer)(params, state, grads)
        history.append(params)
    return history, state


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_moves_a_stack_as_its_layers_alone(name, case):
    params, gradients = case
    config = replace(CONFIG, name=name)
    ours, state = run(make_optimizer(config, STEPS), params, gradients)
    alone = one_layer(config, make_schedule(config, STEPS))
    for index in range(LAYERS):
        of_layer = lambda whole: {"layers": tree.layer(whole, index)}  # noqa: B023, E731
        expected, _ = run(alone, of_layer(params), [of_layer(grads) for grads in gradients])
        for step in (0, 2):
            error = apart(of_layer(ours[step]), expected[step])
            assert error <= 1e-6, f"layer {index} after step {step + 1}: {error}"
    rest = lambda whole: {key: value for key, value in whole.items() if key != "layers"}  # noqa: E731
    expected, _ = run(alone, rest(params), [rest(grads) for grads in gradients])
    assert apart(rest(ours[-1]), expected[-1]) <= 1e-6
    stacked = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(state["layers"])}
    assert all(x.shape[0] == LAYERS for x in stacked.values())


def torch_steps(make, params, gradients):
    """The same steps by a torch optimizer, whose groups are (flat parameters that decay, those that do not)."""
    import torch

    flat = {path_name(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    held = {name: torch.nn.Parameter(torch.from_numpy(x.copy())) for name, x in flat.items()}
    optimizer = make([p for n, p in held.items() if decays(n)], [p for n, p in held.items() if not decays(n)])
    for step, grads in enumerate(gradients):
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            held[path_name(path)].grad = torch.from_numpy(np.array(grad))
        for group in optimizer.param_groups:
            group["lr"] = float(make_schedule(CONFIG, STEPS)(step))
        optimizer.step()
    leaves = [held[path_name(path)].detach().numpy() for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


@pytest.mark.oracle
def test_adamw_equals_torch(case, rng_seed, proof):
    import torch

    params, gradients = case
    options = {"betas": (CONFIG.beta1, CONFIG.beta2), "eps": CONFIG.eps}

    def make(decayed, spared, share=CONFIG.weight_decay):
        groups = [{"params": decayed, "weight_decay": share}, {"params": spared, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, **options)

    ours, _ = run(make_optimizer(CONFIG, STEPS), params, gradients)
    error = apart(ours[-1], torch_steps(make, params, gradients))
    everything = torch_steps(lambda a, b: make(a + b, []), params, gradients)
    assert apart(ours[-1], everything) > 1e-4, "decay of biases and scales must show"
    proof("AdamW, 3 steps", "torch.optim.AdamW", error, 1e-5, rng_seed, "weight decay on biases and norm scales")


@pytest.mark.oracle
def test_adafactor_equals_transformers(case, rng_seed, proof):
    from transformers.optimization import Adafactor

    # transformers scales its decay by the parameter's size and factors every matrix: no decay, and wide ones alone.
    params, gradients = case
    only = lambda whole: {  # noqa: E731
        "embed": whole["embed"],
        "layers": {"mlp": whole["layers"]["mlp"]},
        "final_norm": whole["final_norm"],
    }
    # Steps are in proportion to a matrix's own size: layers of unlike sizes show whose size was taken.
    sizes = jnp.asarray([0.2, 1.0, 5.0]).reshape(-1, 1, 1)
    params = {**params, "layers": {"mlp": jax.tree.map(lambda x: sizes * x, params["layers"]["mlp"])}}
    params, gradients = only(params), [only(grads) for grads in gradients]
    config = replace(CONFIG, name="adafactor", weight_decay=0.0)

    def unstack(whole):
        layers = {str(i): tree.layer(whole, i) for i in range(LAYERS)}
        return {"embed": whole["embed"], "final_norm": whole["final_norm"], "layers": layers}

    make = lambda a, b: Adafactor(a + b, lr=1.0, relative_step=False, warmup_init=False)  # noqa: E731
    expected = torch_steps(make, unstack(params), [unstack(grads) for grads in gradients])
    ours, _ = run(make_optimizer(config, STEPS), params, gradients)
    error = apart(unstack(ours[-1]), expected)
    stacked = torch_steps(make, params, gradients)
    assert apart(ours[-1], stacked) > 1e-4, "one size for a whole stack must show"
    proof("Adafactor, 3 steps", "transformers Adafactor", error, 1e-5, rng_seed, "RMS of the stack, not of a layer")


def test_adafactor_decays_by_learning_rate_times_decay(case):
    params, gradients = case
    with_decay, _ = run(make_optimizer(replace(CONFIG, name="adafactor"), STEPS), params, gradients[:1])
    without, _ = run(make_optimizer(replace(CONFIG, name="adafactor", weight_decay=0.0), STEPS), params, gradients[:1])
    shrunk = CONFIG.weight_decay * float(make_schedule(CONFIG, STEPS)(0))
    difference = jax.tree.map(lambda a, b: a - b, with_decay[0], without[0])
    kernel = lambda whole: np.asarray(whole["layers"]["mlp"]["up"]["kernel"])  # noqa: E731
    np.testing.assert_allclose(kernel(difference), -shrunk * kernel(params), rtol=1e-3, atol=1e-6)
    assert not np.any(difference["layers"]["attention_norm"]["scale"])


def numpy_lion(params, gradients, config):
    """Lion as in algorithm 2 of 2302.06675, one leaf at a time in float64; NaN where rounding decides a sign."""
    after = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        weight, momentum = np.asarray(leaf, np.float64), np.zeros(leaf.shape)
        for step, grads in enumerate(gradients):
            grad = np.asarray(functools.reduce(lambda t, k: t[k.key], path, grads), np.float64)
            old, new = config.beta1 * momentum, (1 - config.beta1) * grad
            direction = np.where(np.abs(old + new) > 1e-5 * np.abs(new), np.sign(old + new), np.nan)
            decay = config.weight_decay * weight if decays(path_name(path)) else 0.0
            weight = weight - float(make_schedule(config, STEPS)(step)) * (direction + decay)
            momentum = config.beta2 * momentum + (1 - config.beta2) * grad
        after.append(weight)
    return jax.tree.unflatten(jax.tree.structure(params), after)


def test_lion_equals_its_algorithm(case, rng_seed, proof):
    params, gradients = case
    config = replace(CONFIG, name="lion", beta2=0.99)
    (*_, ours), _ = run(make_optimizer(config, STEPS), params, gradients)

    def off(twin) -> float:
        unsure = np.concatenate([np.isnan(leaf).ravel() for leaf in jax.tree.leaves(twin)])
        assert unsure.mean() < 1e-3
        return apart(ours, jax.tree.map(lambda theirs, leaf: np.where(np.isnan(theirs), leaf, theirs), twin, ours))

    error = off(numpy_lion(params, gradients, config))
    assert off(numpy_lion(params, gradients, replace(config, beta1=config.beta2))) > 1e-3
    proof("Lion, 3 steps", "NumPy twin of 2302.06675, alg. 2", error, 1e-5, rng_seed, "one beta for both averages")


def numpy_muon(params, gradients, config, steps=5):
    """Muon for the kernels of one layer in float64: Nesterov momentum, Newton-Schulz, root mean square of 0.2."""
    after, beta, coefficients = [], 0.95, (3.4445, -4.7750, 2.0315)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        weight, momentum = np.asarray(leaf, np.float64), np.zeros(leaf.shape)
        for step, grads in enumerate(gradients):
            grad = np.asarray(functools.reduce(lambda t, k: t[k.key], path, grads), np.float64)
            momentum = beta * momentum + (1 - beta) * grad
            count = step + 1
            x = beta * momentum / (1 - beta ** (count + 1)) + (1 - beta) * grad / (1 - beta**count)
            wide = x.T if x.shape[0] > x.shape[1] else x
            wide = wide / np.linalg.norm(wide)
            for _ in range(steps):
                square = wide @ wide.T
                wide = coefficients[0] * wide + (coefficients[1] * square + coefficients[2] * square @ square) @ wide
            direction = 0.2 * np.sqrt(max(x.shape)) * (wide.T if x.shape[0] > x.shape[1] else wide)
            weight = weight - float(make_schedule(config, STEPS)(step)) * (direction + config.weight_decay * weight)
        after.append(weight)
    return jax.tree.unflatten(jax.tree.structure(params), after)


def kernels(whole: dict, index: int) -> dict:
    """The two kernels of one layer."""
    layer = tree.layer(whole, index)
    return {"up": layer["mlp"]["up"]["kernel"], "query": layer["attention"]["query"]["kernel"]}


def test_muon_equals_its_algorithm_on_hidden_matrices(case, rng_seed, proof):
    params, gradients = case
    config = replace(CONFIG, name="muon")
    ours, _ = run(make_optimizer(config, STEPS), params, gradients)
    error, wrong = 0.0, 0.0
    for index in range(LAYERS):
        args = kernels(params, index), [kernels(grads, index) for grads in gradients], config
        error = max(error, apart(kernels(ours[-1], index), numpy_muon(*args)))
        wrong = max(wrong, apart(kernels(ours[-1], index), numpy_muon(*args, steps=4)))
    assert wrong > 1e-3
    proof("Muon, 3 steps", "NumPy twin (Jordan 2024; 2502.16982)", error, 1e-4, rng_seed, "four iterations, not five")


def test_muon_updates_have_a_root_mean_square_near_0_2_and_the_rest_is_adamw(case):
    params, gradients = case
    config = replace(CONFIG, name="muon", weight_decay=0.0, schedule="constant", warmup_steps=0)
    history, _ = run(make_optimizer(config, STEPS), params, gradients[:1])
    updates = jax.tree.map(lambda new, old: new - old, history[0], params)
    for index in range(LAYERS):
        for name, update in kernels(updates, index).items():
            size = float(jnp.sqrt(jnp.mean(jnp.square(update)))) / config.learning_rate
            assert 0.13 < size < 0.25, f"{name} of layer {index}: {size}"
    adamw, _ = run(make_optimizer(CONFIG, STEPS), params, gradients)
    muon, _ = run(make_optimizer(replace(CONFIG, name="muon"), STEPS), params, gradients)
    spared = lambda whole: {  # noqa: E731
        path_name(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(whole)
        if not is_hidden_matrix(path_name(path))
    }
    assert set(spared(params)) == {
        "embed/embedding",
        "final_norm/scale",
        "head/kernel",
        "layers/attention_norm/scale",
        "layers/attention/query/bias",
    }
    assert apart(spared(muon[-1]), spared(adamw[-1])) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_decays_matrices_and_embeddings_alone(name, case):
    params, gradients = case
    config = replace(CONFIG, name=name)
    decayed, _ = run(make_optimizer(config, STEPS), params, gradients[:1])
    plain, _ = run(make_optimizer(replace(config, weight_decay=0.0), STEPS), params, gradients[:1])
    for path, moved in jax.tree_util.tree_leaves_with_path(decayed[0]):
        other = functools.reduce(lambda t, k: t[k.key], path, plain[0])
        differs = bool(np.any(np.asarray(moved) != np.asarray(other)))
        assert differs == decays(path_name(path)), path_name(path)
        assert decays(path_name(path)) == path_name(path).endswith(("kernel", "embedding"))


def test_clipping_is_by_the_global_norm_of_the_whole_tree(case):
    params, gradients = case
    squares = [np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(gradients[0])]
    factor = 0.7 / np.sqrt(np.sum(squares))
    assert factor < 0.5, "the case must clip"
    optimizer = make_optimizer(replace(CONFIG, clip_norm=0.7), STEPS)
    _, (_, state) = run(optimizer, params, gradients[:1])
    first = {name: part[0].mu for name, part in state.items()}  # (1 - beta1) times the clipped gradient
    expected = jax.tree.map(lambda g: np.asarray(g) * factor * (1 - CONFIG.beta1), tree.parts(gradients[0]))
    assert apart(first, expected) <= 1e-5
    small = jax.tree.map(lambda g: g * 0.1 * factor, gradients[0])
    _, (_, state) = run(optimizer, params, [small])
    first = {name: part[0].mu for name, part in state.items()}
    assert apart(first, jax.tree.map(lambda g: np.asarray(g) * (1 - CONFIG.beta1), tree.parts(small))) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chosen", [r"head/kernel", r"layers/mlp/up/kernel", r"layers/.*/bias"])
def test_optimizer_state_exists_for_what_is_learned_alone(name, chosen, case):
    import re

    params, gradients = case
    cut = lambda whole: tree.partition(whole, lambda path, _: re.fullmatch(chosen, path) is not None)[0]  # noqa: E731
    optimizer = make_optimizer(replace(CONFIG, name=name, clip_norm=1.0), STEPS)
    trainable = cut(params)
    history, state = run(optimizer, trainable, [cut(grads) for grads in gradients])
    assert jax.tree.structure(history[-1]) == jax.tree.structure(trainable)
    assert apart(history[-1], trainable) > 0
    held = {path_name(path) for path, x in jax.tree_util.tree_leaves_with_path(state) if x.size > 10}
    assert held and all(re.search(chosen, path) for path in held), held


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_state_is_float32(name, case):
    state = jax.eval_shape(make_optimizer(replace(CONFIG, name=name), STEPS).init, case[0])
    assert {str(x.dtype) for x in jax.tree.leaves(state)} <= {"float32", "int32"}
