"""What the methods' optimizers remember of a weight lies where the weight lies."""

import jax
import pytest
from grid import base_of
from jax.sharding import PartitionSpec

from xylem.peft import tree
from xylem.peft.config import AdaLoRAConfig, ChildConfig
from xylem.peft.methods import adalora, child
from xylem.sharding import make_mesh, path_name
from xylem.training.config import OptimizerConfig
from xylem.training.optimizers import make_optimizer
from xylem.training.state import new_state, state_shardings


@pytest.mark.parametrize(
    ("method", "config", "memory"),
    [
        (adalora, AdaLoRAConfig(), ("sensitivity", "uncertainty")),
        (child, ChildConfig("fisher"), ("mask",)),
    ],
    ids=["adalora", "child"],
)
def test_what_a_method_remembers_lies_as_its_weight(method, config, memory, rng_seed):
    params = method.graft(base_of("llama", rng_seed), jax.random.key(0), config)
    wrap = lambda inner: method.optimizer(inner, config, 9)  # noqa: E731
    optimizer = make_optimizer(OptimizerConfig(), 9, wrap=wrap)
    state = jax.eval_shape(lambda: new_state(params, optimizer, 0, trains=method.trainable(params, config)))
    placed = state_shardings(state, make_mesh(data=2, fsdp=2, tensor=2))
    weights = {path_name(path): x.spec for path, x in jax.tree_util.tree_leaves_with_path(placed.trainable)}
    held = {path_name(path): x.spec for path, x in jax.tree_util.tree_leaves_with_path(placed.optimizer)}
    assert len(tree.parts(params)) > 1 and any(spec != PartitionSpec() for spec in weights.values())
    for each in memory:
        found = {path.partition(f"/{each}/")[2]: spec for path, spec in held.items() if f"/{each}/" in path}
        assert found.keys() == weights.keys()
        assert found == weights
