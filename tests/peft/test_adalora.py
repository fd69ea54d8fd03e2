"""AdaLoRA: what Hugging Face's computes from the same numbers, keeps of the same gradients, and when."""

import functools
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from operations import apart
from oracles import pair, random_llama, random_tokens

from xylem import models
from xylem.errors import ConfigError
from xylem.models.leaves import LowRank
from xylem.peft import adalora as short
from xylem.peft import tree
from xylem.peft.config import AdaLoRAConfig
from xylem.peft.methods import adalora
from xylem.peft.methods.adalora import Triplets
from xylem.sharding import path_name
from xylem.training.config import OptimizerConfig
from xylem.training.optimizers import make_optimizer

# Our paths, and the modules of theirs.
NAMES = {"attention/query": "self_attn.q_proj", "attention/value": "self_attn.v_proj", "mlp/up": "mlp.up_proj"}
CONFIG = AdaLoRAConfig(rank=5, target=2, alpha=7.0, targets=r"attention/(query|value)/kernel|mlp/up/kernel")
STEPS = 20
FIELDS = {"a": "lora_A", "values": "lora_E", "b": "lora_B"}


def kernel(params, name: str) -> Triplets:
    block, module = name.split("/")
    return params["layers"][block][module]["kernel"]


def theirs_of(config: AdaLoRAConfig, steps: int, **values):
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        target_modules=[name.split(".")[1] for name in NAMES.values()],
        init_r=config.rank,
        target_r=config.target,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        tinit=round(config.warmup * steps),
        tfinal=round(config.settle * steps),
        deltaT=config.every,
        total_step=steps,
        orth_reg_weight=config.penalty,
        **values,
    )


def their_parameters(model) -> dict:
    """(our name, layer, field) -> their parameter."""
    held = dict(model.named_parameters())
    found = {}
    for ours, theirs in NAMES.items():
        for layer in range(model.config.num_hidden_layers):
            for field, name in FIELDS.items():
                (key,) = [k for k in held if f"layers.{layer}.{theirs}.{name}." in k]
                found[ours, layer, field] = held[key]
    return found


def as_theirs(field: str, array) -> np.ndarray:
    """One layer's array in their layout."""
    array = np.array(array)
    return array[:, None] if field == "values" else np.ascontiguousarray(array.T)


def hand_over(params, model, into: str = "data") -> None:
    """Write our triplets into their parameters, or into those's gradients."""
    import torch

    for (name, layer, field), held in their_parameters(model).items():
        setattr(held, into, torch.from_numpy(as_theirs(field, getattr(kernel(params, name), field)[layer])))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, module_seed):
    """A tiny LLaMA of theirs, ours with triplets of random values, and theirs with the same."""
    from peft import get_peft_model

    rng = np.random.default_rng(module_seed)
    both = pair(random_llama(rng, tied=False), tmp_path_factory.mktemp("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(both.model, theirs_of(CONFIG, STEPS))
    grafted = adalora.graft(both.params, jax.random.key(module_seed), CONFIG)
    learns = adalora.trainable(grafted, CONFIG)
    trainable, frozen = tree.partition(grafted, learns)
    noise = lambda x: x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    return model, models.build(both.config), jax.tree.map(noise, trainable), frozen, random_tokens(rng, 31)


@functools.cache
def forward(module):
    """Logits, and gradients of their cross-entropy with the next token."""

    def loss(trainable, frozen, tokens):
        logits = module.apply({"params": tree.combine(trainable, frozen)}, tokens).logits
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.oracle
def test_adalora_gives_the_logits_gradients_and_penalty_of_hugging_face(theirs, module_seed, proof):
    import torch

    model, module, trainable, frozen, tokens = theirs
    hand_over(trainable, model)
    ids = torch.from_numpy(tokens.astype(np.int64))
    model.zero_grad()
    out = model.base_model(ids, labels=ids)  # PeftModel itself passes the penalty by
    out.loss.backward()
    (nll, logits), gradients = forward(module)(trainable, frozen, jnp.asarray(tokens))
    punished = jax.grad(adalora.penalty)(trainable, CONFIG)
    gradients = jax.tree.map(jnp.add, gradients, punished)

    def ours(field, name, layer):
        return as_theirs(field, getattr(kernel(gradients, name), field)[layer])

    held = their_parameters(model)
    pairs = [(ours(field, name, layer), p.grad.numpy()) for (name, layer, field), p in held.items()]
    error = max(apart([logits], [out.logits.detach().numpy()]), apart(*map(list, zip(*pairs, strict=True))))
    error = max(error, abs(float(nll + adalora.penalty(trainable, CONFIG)) - float(out.loss.detach())))
    undivided = lambda where, x: x * (CONFIG.rank + 1e-5) if path_name(where).endswith("kernel/scale") else x  # noqa: E731
    frozen = jax.tree_util.tree_map_with_path(undivided, frozen)
    (_, wrong), _ = forward(module)(trainable, frozen, jnp.asarray(tokens))
    assert apart([wrong], [out.logits.detach().numpy()]) > 1e-2
    row, fault = "AdaLoRA: logits, gradients, penalty", "alpha not over rank"
    proof(row, "HF peft AdaLoraModel", error, 1e-4, module_seed, fault)


@pytest.mark.oracle
def test_adalora_has_the_budget_of_hugging_face_at_every_step(rng_seed, proof):
    from peft.tuners.adalora.layer import RankAllocator

    rng, off, cut = np.random.default_rng(rng_seed), 0, 0
    for _ in range(20):
        rank, steps = int(rng.integers(2, 20)), int(rng.integers(10, 400))
        start, final = int(rng.integers(0, steps // 3)), int(rng.integers(0, steps // 3))
        config = AdaLoRAConfig(rank, int(rng.integers(1, rank + 1)), warmup=start / steps, settle=final / steps)
        config = replace(config, every=int(rng.integers(1, 9)))
        matrices = int(rng.integers(1, 50))
        allocator = object.__new__(RankAllocator)
        allocator.peft_config = theirs_of(config, steps)
        allocator.init_bgt, allocator.target_bgt = config.rank * matrices, config.target * matrices
        expected = [allocator.budget_schedule(step) for step in range(steps + 1)]
        budgets, chosen, end = adalora.schedule(config, steps, config.rank * matrices, config.target * matrices)
        assert end == steps - final
        off += sum(b != budget for b, (budget, _) in zip(budgets, expected, strict=True))
        # At the end of the fall they choose by force, and behind it they put the last choice in place again.
        off += sum(bool(c) != m for c, (_, m) in list(zip(chosen, expected, strict=True))[:end]) + (not chosen[end])
        square = replace(config, warmup=(start + 1) / steps)
        cut += sum(adalora.schedule(square, steps, rank * matrices, config.target * matrices)[0] != budgets)
    assert cut > 0
    proof("AdaLoRA: budget of every step", "HF peft RankAllocator", off, 0, rng_seed, "a warm-up longer by a step")


def our_masks(optimizer, params, gradients):
    """Which values are zero after each step, and the parameters then."""

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for grads in gradients:
        params, state = step(params, state, grads)
        yield {name: np.asarray(kernel(params, name).values == 0) for name in NAMES}, params, state


@pytest.mark.oracle
def test_adalora_keeps_what_hugging_face_keeps_of_the_same_gradients(theirs, module_seed, proof, monkeypatch):
    from peft.tuners.adalora.layer import RankAllocator

    model, _, trainable, _, _ = theirs
    rng = np.random.default_rng(module_seed)
    config = replace(CONFIG, warmup=2 / STEPS, settle=5 / STEPS, every=2)
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    gradients = [jax.tree.map(draw, trainable) for _ in range(STEPS)]
    inner = optax.sgd(0.05)
    ours = [mask for mask, _, _ in our_masks(adalora.optimizer(inner, config, STEPS), trainable, gradients)]
    certain = lambda *args, real=adalora._smoothed: (real(*args)[0], jax.tree.map(jnp.ones_like, args[1]))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(adalora, "_smoothed", certain)
        wrong = [mask for mask, _, _ in our_masks(adalora.optimizer(inner, config, STEPS), trainable, gradients)]

    hand_over(trainable, model)
    held = their_parameters(model)
    model.peft_config["default"] = theirs_of(config, STEPS)
    allocator = RankAllocator(model, model.peft_config["default"], "default")
    monkeypatch.setattr(model.base_model, "rankallocator", allocator)
    off, missed, seen = 0, 0, set()
    for step, grads in enumerate(gradients):
        hand_over(grads, model, into="grad")
        for parameter in held.values():
            parameter.data -= 0.05 * parameter.grad
        model.base_model.update_and_allocate(step + 1)
        for name in NAMES:
            layers = range(model.config.num_hidden_layers)
            expected = np.stack([(held[name, i, "values"].detach().numpy() == 0)[:, 0] for i in layers])
            off += int(np.sum(expected != ours[step][name]))
            missed += int(np.sum(expected != wrong[step][name]))
            seen.add(int(expected.sum()))
    assert len(seen) > 4, "the masks must change"
    assert missed > 0
    row, fault = "AdaLoRA: values kept after each of 20 steps", "sensitivity alone"
    proof(row, "HF peft RankAllocator", off, 0, module_seed, fault)


@pytest.mark.oracle
def test_adalora_ends_with_its_budget_exactly(theirs, module_seed):
    """A real loss, AdamW, layer by layer; and gradients of zero, of which all triplets are equal."""
    _, module, trainable, frozen, tokens = theirs
    settings = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_steps=0)
    wrap = lambda inner: adalora.optimizer(inner, CONFIG, STEPS)  # noqa: E731
    optimizer = make_optimizer(settings, STEPS, wrap=wrap)
    budget = CONFIG.target * sum(kernel(trainable, name).values.shape[0] for name in NAMES)
    first, state = jax.tree.map(jnp.copy, trainable), optimizer.init(trainable)

    @jax.jit
    def step(trainable, state):
        loss = lambda t: forward(module).__wrapped__(t, frozen, jnp.asarray(tokens))[0][0]  # noqa: E731
        value, gradients = jax.value_and_grad(lambda t: loss(t) + adalora.penalty(t, CONFIG))(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    counts, losses = [], []
    for _ in range(STEPS + 2):
        trainable, state, loss = step(trainable, state)
        counts.append(sum(int(jnp.sum(kernel(trainable, name).values != 0)) for name in NAMES))
        losses.append(float(loss))
    assert counts[0] == sum(kernel(trainable, name).values.size for name in NAMES)
    assert counts[-9:] == [budget] * 9, counts
    assert sorted(counts, reverse=True) == counts and len(set(counts)) > 4
    assert losses[-1] < losses[0]
    still = jax.tree.map(jnp.zeros_like, first)
    *_, (_, last, _) = our_masks(adalora.optimizer(optax.sgd(0.1), CONFIG, STEPS), first, [still] * STEPS)
    assert sum(int(jnp.sum(kernel(last, name).values != 0)) for name in NAMES) == budget


def test_adalora_scores_what_it_finds_beside_other_weights(rng_seed):
    """A norm learns too, other weights are frozen, one matrix has no layer axis."""
    keys = jax.random.split(jax.random.key(rng_seed), 4)
    params = {
        "layers": {"up": {"kernel": jax.random.normal(keys[0], (3, 5, 7))}, "norm": {"scale": jnp.ones((3, 5))}},
        "head": {"kernel": jax.random.normal(keys[1], (5, 9))},
    }
    config = AdaLoRAConfig(rank=4, target=1, targets="kernel", warmup=0.0, settle=0.5)
    grafted = adalora.graft(params, keys[2], config)
    learns = lambda path, x: adalora.trainable(grafted, config)(path, x) or path.endswith("norm/scale")  # noqa: E731
    trainable, _ = tree.partition(grafted, learns)
    settings = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(settings, 6, wrap=lambda inner: adalora.optimizer(inner, config, 6))
    draw = lambda key: jax.tree.map(lambda x: jax.random.normal(jax.random.fold_in(key, x.size), x.shape), trainable)  # noqa: E731
    gradients = [draw(key) for key in jax.random.split(keys[3], 6)]
    state = optimizer.init(trainable)
    moved = trainable
    for grads in gradients:
        updates, state = jax.jit(optimizer.update)(grads, state, moved)
        moved = optax.apply_updates(moved, updates)
    held = [moved["layers"]["up"]["kernel"], moved["head"]["kernel"]]
    assert sum(int(jnp.sum(x.values != 0)) for x in held) == 4 * config.target
    assert jax.tree.structure(moved) == jax.tree.structure(trainable)
    assert bool(jnp.all(moved["layers"]["norm"]["scale"] != 1.0))


def test_adalora_penalty_of_orthonormal_factors_is_zero_with_a_gradient(rng_seed):
    eye = lambda rows, columns: jnp.broadcast_to(jnp.eye(rows, columns), (2, rows, columns))  # noqa: E731
    leaf = Triplets(None, eye(5, 3), jnp.ones((2, 3)), eye(3, 7), None)
    value, slope = jax.value_and_grad(adalora.penalty)({"kernel": leaf}, AdaLoRAConfig())
    assert float(value) == 0.0
    assert all(not bool(jnp.any(x)) for x in jax.tree.leaves(slope)), "zero, and no NaN"


def test_adalora_triplets_are_a_pair_with_the_values_in_it(rng_seed):
    params = {"layers": {"mlp": {"up": {"kernel": jax.random.normal(jax.random.key(rng_seed), (2, 5, 7))}}}}
    leaf = short(params, jax.random.key(0), rank=3, target=2, alpha=6.0)["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(leaf, Triplets) and not bool(jnp.any(leaf.values))
    np.testing.assert_array_equal(leaf.materialize(), params["layers"]["mlp"]["up"]["kernel"])
    np.testing.assert_allclose(leaf.scale, 6.0 / (3 + 1e-5))
    leaf = leaf.replace(values=leaf.values + jnp.arange(1.0, 4.0)[None])
    expected = leaf.base + leaf.scale[:, None, None] * ((leaf.a * leaf.values[:, None]) @ leaf.b)
    np.testing.assert_allclose(leaf.materialize(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(leaf.rebase(leaf.materialize()).base, leaf.base, rtol=1e-6, atol=1e-6)
    assert isinstance(leaf.pair(), LowRank)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"rank": 2, "target": 3}, "target"),
        ({"warmup": 0.5, "settle": 0.5}, "settle"),
        ({"warmup": 1.0}, "warmup"),
        ({"beta1": 1.0}, "beta1"),
        ({"penalty": -0.1}, "penalty"),
    ],
)
def test_adalora_refuses_settings_that_make_no_sense(values, field):
    with pytest.raises(ConfigError, match=field):
        AdaLoRAConfig(**values)
