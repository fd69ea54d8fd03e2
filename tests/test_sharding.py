"""Eight simulated devices compute what one does, hold an eighth or a quarter of it, and refuse what does not divide."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from xylem import models
from xylem.data.config import DataConfig
from xylem.errors import ConfigError
from xylem.generation.sampling import Sampling, generate
from xylem.models.gpt import gpt
from xylem.models.llama import llama
from xylem.models.settings import Compute
from xylem.sharding import batch_sharding, constrain, make_mesh, param_specs, shardings
from xylem.training.config import OptimizerConfig, RunConfig
from xylem.training.program import assemble
from xylem.training.state import make_state

ROWS, T, V, STEPS = 8, 11, 34, 6
PLAIN = Compute(layers="scan", kernels="plain")
CONFIGS = {
    "gpt": replace(gpt(2, 12, 4, V - 1, 18), compute=PLAIN),  # no mesh divides this vocabulary
    "llama": replace(llama(2, 24, 4, 2, 22, V, 18, rope_theta=777.0, norm_eps=1e-4), compute=PLAIN),
}
BATCHES = [
    {
        "tokens": rows[:, :-1],
        "labels": rows[:, 1:],
        "segments": np.ones((ROWS, T), np.int32),
        "weights": (np.arange(T)[None] < np.array([2, 0, T, 5, T, 3, 7, T])[:, None]).astype(np.float32),
    }
    for rows in np.random.default_rng(7).integers(0, V - 1, (STEPS, ROWS, T + 1)).astype(np.int32)
]


@functools.cache
def trained(family: str, sizes: tuple[int, int, int], accumulate: int):
    """Six steps on a mesh, as ``loop.pretrain`` does them: losses, the last state and the compiled program's text.

    The last loss is also given as it would be with two rows left out.
    """
    run = RunConfig(
        model=CONFIGS[family],
        data=DataConfig(sequence_length=T),
        optimizer=OptimizerConfig(learning_rate=0.02, schedule="constant", warmup_steps=0),
        batch_size=ROWS,
        accumulate=accumulate,
        seed=3,
    )
    mesh = make_mesh(*sizes)
    program = assemble(run, mesh)
    with jax.set_mesh(mesh):
        place = lambda batch: jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), batch)  # noqa: E731
        state, losses = make_state(program.create, program.abstract), []
        step = program.step.lower(state, place(BATCHES[0])).compile()
        for batch in BATCHES:
            before = jax.tree.map(jnp.copy, state)
            state, out = step(state, place(batch))
            losses.append(float(out["loss"]))
        fewer = np.where(np.arange(ROWS)[:, None] < ROWS - 2, BATCHES[-1]["weights"], 0)
        short = float(step(before, place(BATCHES[-1] | {"weights": fewer}))[1]["loss"])
    return np.array(losses), state, step.as_text(), short


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_mesh_of_eight_gives_the_losses_of_one_device(family, accumulate, proof):
    one, _, _, short = trained(family, (1, 1, 1), 1)
    eight, _, _, _ = trained(family, (2, 2, 2), accumulate)
    error = float(np.max(np.abs(eight / one - 1)))
    assert abs(short / one[-1] - 1) > 1e-4, "what a device whose rows are not summed would show"
    row = f"{family} on data 2 x fsdp 2 x tensor 2, accumulation {accumulate}, {STEPS} steps"
    proof(row, "one device", error, 1e-5, 7, "the rows of one device left out")


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_mesh_really_splits_the_parameters_and_communicates(family):
    config = CONFIGS[family]
    _, state, text, _ = trained(family, (2, 2, 2), 1)
    part = lambda array: array.addressable_shards[0].data.shape  # noqa: E731
    layers, width = state.params["layers"], config.d_model
    inner = config.num_heads * config.head_dim
    vocabulary = {"gpt": V - 1, "llama": V // 2}[family]
    assert part(state.params["embed"]["embedding"]) == (vocabulary, width // 2)
    assert part(layers["attention"]["query"]["kernel"]) == (2, width // 2, inner // 2)
    assert part(layers["attention"]["output"]["kernel"]) == (2, inner // 2, width // 2)
    assert part(layers["mlp"]["up"]["kernel"]) == (2, width // 2, config.d_ff // 2)
    assert part(layers["mlp"]["down"]["kernel"]) == (2, config.d_ff // 2, width // 2)
    held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves((state.params, state.optimizer)))
    whole = sum(x.size for x in jax.tree.leaves((state.params, state.optimizer)))
    assert held < 0.35 * whole, "fsdp x tensor is 4: all but vectors is cut in four"
    for collective in ("all-gather", "all-reduce"):
        assert collective in text
    alone = trained(family, (1, 1, 1), 1)[2]
    assert "all-gather" not in alone and "all-reduce" not in alone


def test_generation_under_a_mesh_writes_the_same_tokens():
    module, prompt = models.build(CONFIGS["llama"]), [[3, 1, 4, 1, 5]]
    sampling = Sampling(max_new_tokens=7, temperature=0.0)
    _, state, _, _ = trained("llama", (2, 2, 2), 1)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        spread = generate(module, state.params, prompt, sampling, jax.random.key(0))
    gathered = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state.params)
    alone = generate(module, gathered, prompt, sampling, jax.random.key(0))
    assert spread.tokens[0].tolist() == alone.tokens[0].tolist()
    assert len(spread.tokens[0]) == 7


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, r"mesh.fsdp x mesh.tensor: '3 x 1' is not possible; .* divide the number of devices, 8"),
        ({"data": 4, "fsdp": 2, "tensor": 2}, r"'4 x 2 x 2' is not possible; .* at most the number of devices, 8"),
        ({"tensor": 0}, r"mesh.tensor: 0 is not possible; it must be at least 1"),
        ({"fsdp": -1}, r"mesh.fsdp: -1 is not possible"),
        ({"data": 0}, r"mesh.data: 0 is not possible"),
    ],
)
def test_mesh_that_cannot_be_names_field_and_value(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(**sizes)


def test_mesh_takes_all_devices_or_those_asked_for():
    assert dict(make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert make_mesh(data=1, fsdp=2, tensor=2).size == 4
    assert make_mesh(devices=jax.devices()[:3]).shape["data"] == 3


@pytest.mark.parametrize(("axis", "sizes"), [("fsdp", (1, 8, 1)), ("tensor", (2, 1, 4))])
def test_mesh_that_does_not_divide_a_weight_names_axis_and_weight(axis, sizes):
    params = {"layers": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((3, 12, 34), jnp.float32)}}}}
    mesh, size = make_mesh(*sizes), {"fsdp": 12, "tensor": 34}[axis]
    message = rf"mesh.{axis}: {mesh.shape[axis]} .* it must divide axis \d of layers/mlp/up/kernel, of size {size}"
    with pytest.raises(ConfigError, match=message):
        shardings(params, mesh)


def test_mesh_that_does_not_divide_a_vocabulary_leaves_it_whole():
    shapes = jax.eval_shape(
        models.build(models.PRESETS["gpt2"]()).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
    )
    placed = shardings(shapes["params"], make_mesh(1, 4, 2))
    assert placed["embed"]["embedding"].spec == P(None, "fsdp")
    assert placed["layers"]["mlp"]["up"]["kernel"].spec == P(None, "fsdp", "tensor")


def test_specs_are_right_aligned():
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    layer = {"mlp": {"up": {"kernel": array(4, 6)}}}
    stacked = {"mlp": {"up": {"kernel": array(3, 4, 6)}}}
    specs = param_specs({"layers_0": layer, "layers_1": stacked})
    assert specs["layers_0"]["mlp"]["up"]["kernel"] == P("fsdp", "tensor")
    assert specs["layers_1"]["mlp"]["up"]["kernel"] == P(None, "fsdp", "tensor")


def test_constrain_splits_rows_and_leaves_what_does_not_divide():
    x = jnp.zeros((8, 5, 6))
    assert constrain(x, "batch", None, None) is x
    pinned = jax.jit(lambda x: constrain(x, "batch", None, "tensor"))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert pinned(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
        assert pinned(x[:1]).shape == (1, 5, 6)
        assert pinned(x[:, :, :5]).sharding.spec[0] == ("data", "fsdp")
