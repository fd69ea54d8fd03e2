"""``scripts/merge.py``: a grafted model becomes a folder that transformers computes the same with."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import moved
from operations import apart
from programs import script
from small import random_weights

from xylem import models
from xylem.data.tokenizers import byte_level
from xylem.errors import ConfigError
from xylem.models import hub, llama
from xylem.peft import config as configs
from xylem.peft.calls import METHODS
from xylem.peft.saving import fingerprint, save_adapter
from xylem.training.restore import open_model

CONFIG = llama.llama(2, 12, 3, 1, 20, byte_level().vocab_size, 32, rope_theta=777.0, norm_eps=1e-4)
SETTINGS = {
    "lora": configs.LoRAConfig(3, 5.0, targets="kernel|embed/"),
    "qlora": configs.QLoRAConfig(3, 5.0, block=4),
    "prefix": configs.PrefixConfig(3, 0),
}


@pytest.fixture
def adapter(tmp_path, rng_seed):
    """``adapter(method)``: a folder of what looks learned, which knows its base."""
    base, key = tmp_path / "base", jax.random.key(rng_seed)
    params = random_weights(models.build(CONFIG), key, jnp.zeros((1, 2), jnp.int32))
    hub.save(base, CONFIG, params)
    byte_level().save(base)

    def make(name: str):
        method, config = METHODS[name], SETTINGS[name]
        grafted = method.graft(params, key, config)
        learned = moved(grafted, method.trainable(grafted, config), jax.random.key(rng_seed + 1))
        save_adapter(tmp_path / name, config, learned, fingerprint(params), base_path=str(base))
        return tmp_path / name

    return make


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_merged_folder_computes_in_transformers_what_the_grafted_tree_does(
    name, adapter, tmp_path, capsys, rng_seed, proof
):
    import torch
    from transformers import AutoModelForCausalLM

    own, out = adapter(name), tmp_path / "merged"
    script("merge")([str(own), "--out", str(out), "--tokens", "9"])
    printed = float(re.search(r"moves the logits by (\S+) of the largest", capsys.readouterr().out)[1])
    assert printed <= 1e-5
    model, tokens = open_model(str(own)), np.random.default_rng(rng_seed).integers(0, CONFIG.vocab_size, (3, 11))
    grafted = model.module.apply({"params": model.params}, jnp.asarray(tokens, jnp.int32)).logits
    found = {}
    for folder in (out, tmp_path / "base"):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            found[folder] = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert apart([found[tmp_path / "base"]], [grafted]) > 1e-3
    error = apart([found[out]], [grafted])
    proof(f"merged by scripts/merge.py: {name} (llama)", "transformers", error, 1e-5, rng_seed, "the base's weights")
    assert open_model(str(out)).tokenizer.hash == model.tokenizer.hash


def test_what_cannot_be_merged_is_named_and_nothing_is_written(adapter, tmp_path):
    merge, out = script("merge"), tmp_path / "merged"
    with pytest.raises(ConfigError, match=r"run: .*prefix' is not possible; merge: .* are no part of a weight"):
        merge([str(adapter("prefix")), "--out", str(out)])
    with pytest.raises(ConfigError, match="tokens: 1 is not possible"):
        merge([str(tmp_path / "base"), "--out", str(out), "--tokens", "1"])
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"out: .* it must not exist yet, or be empty"):
        merge([str(tmp_path / "base"), "--out", str(tmp_path / "base")])
