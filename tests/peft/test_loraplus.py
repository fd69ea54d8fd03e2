"""LoRA+: B moves as much farther as it should, whatever moves it."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from operations import apart

from xylem.errors import ConfigError
from xylem.peft import tree
from xylem.peft.calls import METHODS
from xylem.peft.config import DoRAConfig, LoRAConfig
from xylem.peft.methods import lora
from xylem.sharding import path_name
from xylem.training.config import OptimizerConfig
from xylem.training.optimizers import make_optimizer

LAYERS, RANK, WIDE, NARROW, STEPS = 2, 3, 7, 5, 4
SETTINGS = OptimizerConfig(learning_rate=0.02, schedule="constant", warmup_steps=0, weight_decay=0.3, clip_norm=None)
CONFIG = LoRAConfig(rank=RANK, targets="kernel|embedding", rate_ratio=16.0)


@pytest.fixture
def case(rng_seed):
    """What learns of a grafted tree, and gradients of some steps."""
    keys = jax.random.split(jax.random.key(rng_seed), 2 + STEPS)
    params = {
        "embed": {"embedding": jax.random.normal(keys[0], (11, WIDE))},
        "layers": {"up": {"kernel": jax.random.normal(keys[0], (LAYERS, WIDE, NARROW))}},
    }
    grafted = lora.graft(params, keys[1], CONFIG)
    trainable, _ = tree.partition(grafted, lora.trainable(grafted, CONFIG))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    draw = lambda key: jax.tree.map(lambda x: jax.random.normal(jax.random.fold_in(key, x.size), x.shape), trainable)  # noqa: E731
    return trainable, [draw(key) for key in keys[2:]]


def trained(config, settings, trainable, gradients):
    optimizer = make_optimizer(settings, STEPS, wrap=lambda inner: lora.optimizer(inner, config, STEPS))
    state, update = optimizer.init(trainable), jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return trainable


@pytest.mark.oracle
def test_loraplus_moves_as_hugging_faces_optimizer(case, rng_seed, proof):
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    trainable, gradients = case
    net = torch.nn.ModuleDict({f"up{i}": torch.nn.Linear(WIDE, NARROW) for i in range(LAYERS)})
    net = get_peft_model(net, LoraConfig(r=RANK, target_modules=["up0", "up1"]))
    optimizer = create_loraplus_optimizer(
        net,
        torch.optim.AdamW,
        lr=SETTINGS.learning_rate,
        loraplus_lr_ratio=CONFIG.rate_ratio,
        loraplus_weight_decay=SETTINGS.weight_decay,
        betas=(SETTINGS.beta1, SETTINGS.beta2),
        eps=SETTINGS.eps,
    )
    held = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}

    def theirs(leaf, into: str) -> None:
        for name, parameter in held.items():
            stack = leaf.a if "lora_A" in name else leaf.b
            setattr(parameter, into, torch.from_numpy(np.array(stack[int(name.split("up")[1][0])].T)))

    theirs(trainable["layers"]["up"]["kernel"], "data")
    for grads in gradients:
        theirs(grads["layers"]["up"]["kernel"], "grad")
        optimizer.step()
    expected = [
        [p.detach().numpy().T for name, p in sorted(held.items()) if each in name] for each in ("lora_A", "lora_B")
    ]
    of = lambda config: trained(config, SETTINGS, trainable, gradients)["layers"]["up"]["kernel"]  # noqa: E731
    ours, alike = of(CONFIG), of(replace(CONFIG, rate_ratio=1.0))
    error = apart([list(ours.a), list(ours.b)], expected)
    assert apart([list(alike.a), list(alike.b)], expected) > 0.1
    proof("LoRA+, 4 steps", "HF peft create_loraplus_optimizer", error, 1e-5, rng_seed, "one rate for A and B")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_loraplus_multiplies_the_first_step_of_b_alone(name, case):
    trainable, gradients = case
    settings = replace(SETTINGS, name=name)
    step = functools.partial(trained, settings=settings, trainable=trainable, gradients=gradients[:1])
    fast, slow = step(CONFIG), step(replace(CONFIG, rate_ratio=1.0))
    for (path, new), same, old in zip(
        jax.tree_util.tree_leaves_with_path(fast), jax.tree.leaves(slow), jax.tree.leaves(trainable), strict=True
    ):
        times = 16.0 if path_name(path) == "layers/up/kernel/b" else 1.0
        np.testing.assert_allclose(new - old, times * (same - old), rtol=1e-3, atol=1e-5, err_msg=path_name(path))


def test_loraplus_of_ratio_one_is_the_optimizer_itself_and_dora_has_it_too(case):
    inner = optax.sgd(1.0)
    assert lora.optimizer(inner, LoRAConfig(), STEPS) is inner
    params = {"layers": {"up": {"kernel": jnp.ones((LAYERS, WIDE, NARROW))}}}
    config = DoRAConfig(rank=RANK, rate_ratio=8.0)
    grafted = METHODS["dora"].graft(params, jax.random.key(0), config)
    trainable, _ = tree.partition(grafted, METHODS["dora"].trainable(grafted, config))
    wrapped = METHODS["dora"].optimizer(inner, config, STEPS)
    updates, _ = wrapped.update(jax.tree.map(jnp.ones_like, trainable), wrapped.init(trainable), trainable)
    moved = {path_name(path): float(x.mean()) for path, x in jax.tree_util.tree_leaves_with_path(updates)}
    kernel = "layers/up/kernel/"
    assert moved == {kernel + "base/a": -1.0, kernel + "base/b": -8.0, kernel + "magnitude": -1.0}
    with pytest.raises(ConfigError, match="rate_ratio"):
        LoRAConfig(rate_ratio=0.0)
