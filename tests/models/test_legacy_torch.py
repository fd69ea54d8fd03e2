"""State dicts in torch's old format against torch.load, tensor by tensor, and through ``hub``."""

import shutil
from collections import OrderedDict

import numpy as np
import pytest
from checkpoints import change_config, same
from oracles import pair, random_encoder

from xylem.errors import ConfigError
from xylem.models import hub, legacy_torch

pytestmark = pytest.mark.oracle


def bits(array: np.ndarray) -> np.ndarray:
    """A float array as integers: NaNs are compared too."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}") if array.dtype.kind in "fV" else array


def value(tensor: legacy_torch.Tensor, size: int) -> np.ndarray:
    blocks = list(tensor.blocks(size))
    if not blocks:
        return np.empty(tensor.shape, legacy_torch.TYPES[tensor.dtype])
    return np.concatenate(blocks) if tensor.shape else blocks[0]


def random_state(rng: np.random.Generator) -> dict:
    """Tensors of every type; contiguous, transposed, strided, from the middle of a storage, shared, empty, scalar."""
    import torch

    shape = [int(n) for n in rng.choice([3, 5, 7], 3, replace=False)]
    wide = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    state = OrderedDict(wide=wide, again=wide[1:, ::2], turned=wide.permute(2, 0, 1), row=wide[1, 2], one=wide[2, 1, 1])
    state["empty"] = wide[:0]
    wide[0, 0, 0] = float("nan")
    for kind in ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"):
        drawn = torch.from_numpy(rng.integers(0, 120, shape[:2])).to(getattr(torch, kind))
        state[f"{kind}.kernel"], state[f"{kind}.turned"] = drawn, drawn.T
    return state


def test_every_type_and_layout_is_what_torch_loads(tmp_path, rng_seed, proof):
    import torch

    rng, file = np.random.default_rng(rng_seed), tmp_path / "pytorch_model.bin"
    torch.save(random_state(rng), file, _use_new_zipfile_serialization=False)
    reference = torch.load(file, weights_only=True)
    found = legacy_torch.tensors(file)

    def differing(found) -> float:
        unequal = 0
        for name, theirs in reference.items():
            low = theirs.dtype == torch.bfloat16
            theirs = (theirs.contiguous().view(torch.int16) if low else theirs).numpy()
            for size in (24, 1 << 20):  # a row at a time, and all at once
                ours = value(found[name], size)
                ours = ours.view(np.int16) if low else ours
                unequal += not (ours.dtype == theirs.dtype and np.array_equal(bits(ours), bits(theirs)))
        return unequal / (2 * len(reference))

    assert list(found) == list(reference)
    turned = found["turned"]
    straight = legacy_torch._contiguous(turned.shape)
    assert differing({**found, "turned": legacy_torch.Tensor(file, "F32", turned.shape, turned.offset, straight)}) > 0
    row, oracle = "Legacy torch files: types, strides, shared storages", "torch.load, share of tensors that differ"
    proof(row, oracle, differing(found), 0.0, rng_seed, "strides left out")


def test_hub_loads_a_legacy_file_as_it_loads_safetensors(tmp_path, rng_seed):
    import torch

    both = pair(random_encoder(np.random.default_rng(rng_seed), "bert"), tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(both.folder / "config.json", old)
    state = OrderedDict(both.model.state_dict())
    torch.save(state, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for given in ({}, {"model_type": None}):  # old configurations do not name the family
        change_config(old, **given)
        config, params = hub.load(old)
        assert config == both.config and same(params, both.params)
    torch.save(state, old / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="zip archive, which torch writes since"):
        hub.load(old)
