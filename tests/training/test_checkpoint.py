"""Checkpoints: what is saved is restored, onto any mesh, and the right one is chosen and kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from states import CONFIG, assert_equal, flip, make_state, payload, save, steps_in

from xylem.errors import CheckpointError, ConfigError
from xylem.training.checkpoint import Checkpoints, load_params, restore


def test_checkpoint_round_trip_restores_every_bit_and_what_belongs_to_it(tmp_path):
    save(tmp_path, 3)
    found = restore(tmp_path, make_state(0))
    assert_equal(found.state, make_state(3))
    assert (found.step, found.data_state, found.metadata, found.passed_over) == (3, {"position": 21}, CONFIG, [])


def test_checkpoint_manifest_lists_every_file_and_array(tmp_path):
    save(tmp_path, 3)
    manifest = json.loads((tmp_path / "00000003" / "manifest.json").read_text())
    there = {p.relative_to(tmp_path / "00000003").as_posix() for p in (tmp_path / "00000003").rglob("*") if p.is_file()}
    assert there == {*manifest["files"], "manifest.json", "COMPLETE"}
    assert manifest["tree"]["trainable/layers/mlp/up/kernel"] == [[2, 24, 5], "float32"]
    assert manifest["tree"]["frozen/layers/mlp/up/bias"] == [[2, 5], "bfloat16"]
    assert manifest["step"] == 3 and manifest["metadata"] == CONFIG


def test_checkpoint_restore_of_nothing_is_none(tmp_path):
    assert restore(tmp_path / "absent", make_state(0)) is None
    assert restore(tmp_path, make_state(0)) is None


def test_checkpoint_saves_what_was_there_when_save_was_called(tmp_path):
    """The next step donates the buffers that are still being written."""
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"params": jax.random.normal(jax.random.key(1), (1500, 1001)), "step": jnp.int32(0)}
    expected = np.array(state["params"])
    data_state = {"position": 1}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, data_state, {})
        data_state["position"] = 2
        for _ in range(20):
            state = advance(state)
        jax.block_until_ready(state)
    found = restore(tmp_path, state)
    np.testing.assert_array_equal(np.asarray(found.state["params"]), expected)
    assert found.data_state == {"position": 1}


def test_checkpoint_explicit_step_is_taken_or_fails(tmp_path):
    save(tmp_path, 10, 20)
    assert restore(tmp_path, make_state(0), step=10).step == 10
    flip(tmp_path)
    with pytest.raises(CheckpointError, match="damaged") as error:
        restore(tmp_path, make_state(0), step=20)
    assert error.value.code == 4
    with pytest.raises(CheckpointError, match="no checkpoint of step 15; there are: 10, 20"):
        restore(tmp_path, make_state(0), step=15)


def test_checkpoint_when_none_fits_the_differences_are_a_table(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(CheckpointError) as error:
        restore(tmp_path, make_state(0, width=7))
    assert "trainable/layers/mlp/up/kernel: checkpoint (2, 24, 5), model (2, 24, 7)" in str(error.value)
    assert "optimizer/0/mu/layers/mlp/up/kernel: checkpoint (2, 24, 5), model (2, 24, 7)" in str(error.value)


def test_checkpoint_keeps_the_last_and_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4, 5):
            checkpoints.save(step, make_state(step), {}, CONFIG, best=step == 2)
    assert steps_in(tmp_path) == ["00000002", "00000004", "00000005"]
    assert restore(tmp_path, make_state(0), step="best").step == 2
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(6, make_state(6), {}, CONFIG, best=True)
    assert steps_in(tmp_path) == ["00000005", "00000006"]
    assert restore(tmp_path, make_state(0), step="best").step == 6


def test_checkpoint_without_a_best_says_so(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="no complete checkpoint is marked best"):
        restore(tmp_path, make_state(0), step="best")


def test_checkpoint_same_step_can_be_saved_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(1), {}, CONFIG, best=True)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(2), {}, CONFIG)
    assert steps_in(tmp_path) == ["00000010"]
    assert_equal(restore(tmp_path, make_state(0), step="best").state, make_state(2))


def test_checkpoint_newest_is_the_last_written_not_the_highest(tmp_path):
    """Back at step 10 by choice, trained on to 15: a restart goes on from there and not from the branch left behind."""
    save(tmp_path, 10, 20)
    save(tmp_path, 15)
    assert restore(tmp_path, make_state(0)).step == 15


def test_checkpoint_damaged_ones_are_never_deleted_by_age(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "00000010" / "COMPLETE").unlink()
    save(tmp_path, 11, 12, 13, keep=1)
    assert steps_in(tmp_path) == ["00000010", "00000013"]


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_checkpoint_start_clears_or_finishes_what_a_kill_left(tmp_path, sealed, replaced):
    """Every moment of publishing step 20 again: sealed or not, with the former step 20 still there or set aside."""
    save(tmp_path, 10, 20)
    (tmp_path / "00000010").rename(tmp_path / ".retired-00000010")
    if replaced:
        (tmp_path / "00000020").rename(tmp_path / ".replaced-00000020")
    save(tmp_path / "elsewhere", 20)
    (tmp_path / "elsewhere" / "00000020").rename(tmp_path / ".saving-00000020")
    (tmp_path / "elsewhere").rmdir()
    if not sealed:
        (tmp_path / ".saving-00000020" / "COMPLETE").unlink()
    with Checkpoints(tmp_path):
        pass
    assert steps_in(tmp_path) == ["00000020"]
    assert restore(tmp_path, make_state(0)).step == 20


@pytest.mark.parametrize("saved, read", [((2, 4), (8, 1)), ((8, 1), (1, 2)), ((1, 1), (4, 2)), ((4, 2), (1, 1))])
def test_checkpoint_restores_onto_another_mesh(tmp_path, saved, read):
    def placed(state, sizes, abstract=False):
        mesh = Mesh(np.array(jax.devices()[: sizes[0] * sizes[1]]).reshape(sizes), ("fsdp", "tensor"))

        def place(x):
            spec = PartitionSpec(None, "fsdp", "tensor") if x.ndim == 3 else PartitionSpec()
            sharding = NamedSharding(mesh, spec)
            return (
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if abstract else jax.device_put(x, sharding)
            )

        return jax.tree.map(place, state)

    state = make_state(5, width=8)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, placed(state, saved), {}, CONFIG)
    template = placed(state, read, abstract=True)
    found = restore(tmp_path, template).state
    assert_equal(found, state)
    assert jax.tree.all(jax.tree.map(lambda got, asked: got.sharding == asked.sharding, found, template))


def test_checkpoint_params_are_read_alone(tmp_path):
    state = make_state(4)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(4, state, {}, CONFIG)
    kernel, bias = state.trainable["layers"]["mlp"]["up"]["kernel"], state.frozen["layers"]["mlp"]["up"]["bias"]
    expected = {"layers": {"mlp": {"up": {"kernel": kernel, "bias": bias}}}}
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "00000004"):
        params, metadata = load_params(path)
        assert_equal(params, expected)
        assert metadata == CONFIG
    where = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data"))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), expected)
    params, _ = load_params(tmp_path, abstract=abstract)
    assert_equal(params, expected)
    assert all(leaf.sharding == where for leaf in jax.tree.leaves(params))


def test_checkpoint_params_that_are_not_there_are_named(tmp_path):
    save(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"entries: 'emma' .* holds frozen, optimizer, rng, step, trainable"):
        load_params(tmp_path, entries=("emma",))
    with pytest.raises(ConfigError, match="a run folder, its checkpoints folder or one checkpoint"):
        load_params(tmp_path / "absent")
    flip_at = payload(tmp_path, 4)
    flip_at.write_bytes(bytes(flip_at.stat().st_size))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_params(tmp_path / "00000004")


def test_checkpoint_takes_only_arrays(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for leaf in (3, np.int32(3), np.ones(2), jax.random.key(0)):
            with pytest.raises(TypeError, match="count"):
                checkpoints.save(1, {"count": leaf}, {}, {})
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(1, {"count": jnp.ones(2)}, {"position": object()}, {})
    assert restore(tmp_path, make_state(0)) is None
