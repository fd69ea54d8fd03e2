"""What cannot be read or written as a Hugging Face folder is refused in words, and leaves nothing behind."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import change_config, change_tensors, random_params, saved, tiny

from xylem.errors import CheckpointError, ConfigError
from xylem.models import hub, shards
from xylem.models.config import PositionConfig


def refused(folder, match: str, **loading) -> None:
    with pytest.raises(ConfigError, match=match):
        hub.load(folder, **loading)


def test_hub_load_refuses_what_is_not_a_checkpoint(tmp_path):
    refused(tmp_path / "absent", "no such folder or file")
    refused(tmp_path, "holds no config.json")
    (tmp_path / "model.pt").write_bytes(b"")
    refused(tmp_path / "model.pt", "pickle can run code")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not readable JSON")
    (tmp_path / "config.json").write_text("[" * 100_000)
    refused(tmp_path, "not readable JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "must be a JSON object")
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    refused(tmp_path, r"supported are gpt2, .* \(did you mean 'llama'\?\)")
    refused(saved(tmp_path / "hf"), "dtype: 'float16'", dtype="float16")
    refused(tmp_path / "hf" / "model.safetensors", "give the folder that holds this file")


def test_hub_load_refuses_pickled_weights_with_a_hint(tmp_path):
    folder = saved(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin.* a pickle can run code: save it as safetensors first")
    (folder / "pytorch_model.bin").rename(folder / "model.pt")
    refused(folder, "model.pt is a pickle")


@pytest.mark.parametrize(
    "family, setting",
    [
        *(("llama", {key: True}) for key in ("attention_bias", "mlp_bias")),
        ("llama", {"attention_dropout": 0.1}),
        ("llama", {"hidden_act": "tanh"}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}),
        ("llama", {"num_key_value_heads": 3}),
        ("llama", {"num_attention_heads": 7}),
        ("llama", {"hidden_size": "20"}),
        ("llama", {"hidden_size": True}),
        ("llama", {"hidden_size": 10**30}),
        ("llama", {"num_hidden_layers": 10**9}),
        ("llama", {"rms_norm_eps": float("nan")}),
        ("llama", {"model_type": {}}),
        ("llama", {"vocab_size": None}),
        ("llama", {"num_hidden_layers": 0}),
        ("gpt", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt", {"attn_pdrop": 0.3}),
        ("gpt", {"n_head": 0}),
        ("gpt", {"activation_function": "gelu_nwe"}),
    ],
)
def test_hub_load_refuses_settings_it_does_not_implement(family, setting, tmp_path):
    folder = saved(tmp_path / "hf", family)
    change_config(folder, **setting)
    refused(folder, "is not possible")


def test_hub_load_names_missing_and_unexpected_tensors(tmp_path):
    folder = saved(tmp_path / "hf")
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, r"lacks layers\.1\.mlp\.up_proj\.weight")
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.9.extra": np.zeros(3, np.float32)}))
    refused(folder, r"lacks layers\.1\.mlp\.up_proj\.weight; its config has no place for layers\.9\.extra")


def test_hub_load_names_a_wrong_shape_on_both_sides(tmp_path):
    folder = saved(tmp_path / "hf")
    change_config(folder, intermediate_size=29)
    refused(
        folder, r"layers/mlp/\w+/kernel: \(\S+ \S+\) is not possible; layers\.0\.mlp\.\w+_proj\.weight in .*asks for"
    )


def test_hub_load_refuses_integer_weights(tmp_path):
    folder = saved(tmp_path / "hf")
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(20, np.int8)}))
    refused(folder, "I8.*types that can be read")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a\\b.safetensors", "model.bin", "", 3])
def test_hub_load_refuses_an_index_that_points_elsewhere(name, tmp_path):
    folder = saved(tmp_path / "hf", shard_bytes=3000)
    index = folder / shards.INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    refused(folder, "may name only")


def test_hub_load_names_a_missing_shard(tmp_path):
    folder = saved(tmp_path / "hf", shard_bytes=3000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    refused(folder, f"{shard.name}' is not possible; there is no such file")
    (folder / shards.INDEX).write_text('{"weight_map": {}}')
    refused(folder, "must map names")


def test_hub_load_names_tensors_the_index_only_promises(tmp_path):
    folder = saved(tmp_path / "hf", shard_bytes=3000)
    index = folder / shards.INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["model.promised"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    refused(folder, r"lack model\.promised")


@pytest.mark.parametrize("damage", ["empty", "length", "header", "truncated", "text"])
def test_hub_load_refuses_damaged_files_by_path(damage, tmp_path):
    file = saved(tmp_path / "hf") / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "length": (1 << 62).to_bytes(8, "little") + content[8:],
            "header": content[:20] + b"\xff" * 30 + content[50:],
            "truncated": content[:-7],
            "text": b"this is no safetensors file at all",
        }[damage]
    )
    refused(tmp_path / "hf", "model.safetensors' is not possible; it is not a whole safetensors file")


def test_hub_save_refuses_a_folder_in_use_and_another_tree(tmp_path):
    config = tiny("llama")
    params = random_params(config)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="be empty"):
        hub.save(tmp_path / "used", config, params)
    with pytest.raises(ConfigError, match=r"missing: final_norm/scale; unexpected: extra/kernel"):
        extra = {**params, "extra": {"kernel": jnp.ones(3)}}
        extra.pop("final_norm")
        hub.save(tmp_path / "hf", config, extra)
    with pytest.raises(ConfigError, match=r"final_norm/scale: \(3,\)"):
        hub.save(tmp_path / "hf", config, {**params, "final_norm": {"scale": jnp.ones(3)}})
    with pytest.raises(ConfigError, match="tokenizer_file"):
        hub.save(tmp_path / "hf", config, params, tokenizer_file=tmp_path / "absent.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used"]


@pytest.mark.parametrize(
    "family, values",
    [
        ("gpt", {"positions": PositionConfig("sinusoidal")}),
        ("gpt", {"num_kv_heads": 1}),
        ("gpt", {"norm": "rmsnorm"}),
        ("gpt", {"head_dim": 7}),
        ("llama", {"bias": "everywhere"}),
        ("llama", {"activation": "gelu"}),
        ("llama", {"positions": PositionConfig("none")}),
        ("llama", {"dropout": 0.1}),
    ],
)
def test_hub_save_refuses_networks_without_a_name_there(family, values, tmp_path):
    config = tiny(family, **values)
    with pytest.raises(ConfigError, match="has no such network"):
        hub.save(tmp_path / "hf", config, random_params(config))
    assert not (tmp_path / "hf").exists()


def test_hub_save_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_json", full)
    with pytest.raises(CheckpointError, match=r"hf could not be written: .*No space left"):
        saved(tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_hub_save_clears_away_what_a_killed_save_left(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)  # a process that is killed clears nothing away
        killed.setattr(shards, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path / "hf")
    assert len(list(tmp_path.iterdir())) == 1
    saved(tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
