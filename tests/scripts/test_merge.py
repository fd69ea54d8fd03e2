"""``scripts/merge.py``: a grafted model becomes a folder that transformers computes the same with."""

import json
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
from xylem.files import read_object
from xylem.models import bert, heads, hub, llama, mamba, t5
from xylem.peft import config as configs
from xylem.peft.calls import METHODS
from xylem.peft.saving import fingerprint, save_adapter
from xylem.training.restore import judges, open_any

V = byte_level().vocab_size
FAMILIES = {
    "llama": llama.llama(2, 12, 3, 1, 20, V, 32, rope_theta=777.0, norm_eps=1e-4),
    "t5": t5.t5(2, 10, 3, 6, 22, "1.1", V, 32),
    "mamba": mamba.mamba(2, 10, V, 32, state_size=3, conv_width=3, dt_rank=4),
    "bert": bert.bert(2, 12, 3, V, 32),
}
SETTINGS = {
    "lora": configs.LoRAConfig(3, 5.0, targets="kernel|embed/"),
    "dora": configs.DoRAConfig(3, 5.0),
    "ia3": configs.IA3Config(),
    "qlora": configs.QLoRAConfig(3, 5.0, block=4),
    "prefix": configs.PrefixConfig(3, 0),
}
LABELS = ("no", "yes", "maybe")
CLASSES = {"llama": "CausalLM", "mamba": "CausalLM", "t5": "Seq2SeqLM", "bert": "SequenceClassification"}


@pytest.fixture
def adapter(tmp_path, rng_seed):
    """``adapter(method, family)``: a folder of what looks learned, which knows its base. A BERT judges texts."""

    def make(name: str, family: str = "llama"):
        base, key, config, method = tmp_path / "base", jax.random.key(rng_seed), FAMILIES[family], METHODS[name]
        params = random_weights(models.build(config), key, jnp.zeros((1, 2), jnp.int32))
        hub.save(base, config, params)
        byte_level().save(base)
        about, headed = {"base_path": str(base)}, params
        if family == "bert":
            headed = heads.add(config, params, key, len(LABELS), "classifier")
            about |= {"objective": "classification", "labels": LABELS}
        grafted = method.graft(headed, key, SETTINGS[name])
        learned = moved(grafted, method.trainable(grafted, SETTINGS[name]), jax.random.key(rng_seed + 1))
        save_adapter(tmp_path / name, SETTINGS[name], learned, fingerprint(params), **about)
        return tmp_path / name

    return make


def logits_of(model, tokens):
    """What a model of ours gives for tokens."""
    read = {"tokens": jnp.asarray(tokens, jnp.int32)}
    if model.labels:
        return heads.judged(model.module, model.params, read | {"segments": jnp.ones_like(read["tokens"])})
    if model.module.config.family == "t5":
        read["decoder_tokens"] = read["tokens"][:, ::-1]
    return model.module.apply({"params": model.params}, **read).logits


def theirs_of(folder, family, tokens):
    """What transformers gives, and the names of its labels."""
    import torch
    import transformers

    model = getattr(transformers, f"AutoModelFor{CLASSES[family]}").from_pretrained(folder, dtype=torch.float32).eval()
    read = torch.from_numpy(tokens)
    decoded = {"decoder_input_ids": read.flip(1)} if family == "t5" else {}
    with torch.no_grad():
        return model(read, **decoded).logits.numpy(), model.config.id2label


@pytest.mark.oracle
@pytest.mark.parametrize("name, family", [("lora", "llama"), ("qlora", "llama"), ("dora", "t5"), ("ia3", "mamba")])
def test_a_merged_folder_computes_in_transformers_what_the_grafted_tree_does(
    name, family, adapter, tmp_path, capsys, rng_seed, proof
):
    own, out = adapter(name, family), tmp_path / "merged"
    tokens = np.random.default_rng(rng_seed).integers(0, V, (3, 11))
    merged_as_printed(own, out, capsys)
    model = open_any(str(own))
    grafted = logits_of(model, tokens)
    found = {folder: theirs_of(folder, family, tokens)[0] for folder in (out, tmp_path / "base")}
    assert apart([found[tmp_path / "base"]], [grafted]) > 1e-3
    error = apart([found[out]], [grafted])
    proof(f"merged by scripts/merge.py: {name} ({family})", "transformers", error, 1e-5, rng_seed, "the base's weights")
    assert open_any(str(out)).tokenizer.hash == model.tokenizer.hash


@pytest.mark.oracle
def test_a_merged_judge_judges_in_transformers_and_keeps_its_labels(adapter, tmp_path, capsys, rng_seed, proof):
    own, out = adapter("lora", "bert"), tmp_path / "merged"
    tokens = np.random.default_rng(rng_seed).integers(0, V, (3, 11))
    merged_as_printed(own, out, capsys)
    found, names = theirs_of(out, "bert", tokens)
    assert names == dict(enumerate(LABELS))
    grafted = logits_of(open_any(str(own), check=judges), tokens)
    assert apart([found[:, ::-1]], [grafted]) > 1e-3
    error = apart([found], [grafted])
    proof("merged by scripts/merge.py: a judge (bert)", "transformers", error, 1e-5, rng_seed, "labels reversed")
    told = []
    for folder in (own, out):
        script("classify")([str(folder), "--text", "a fine day", "a bad one"])
        told.append([line.split("\t") for line in capsys.readouterr().out.splitlines()])
    for (label, probability, text), merged in zip(*told, strict=True):
        assert label in LABELS and [label, text] == [merged[0], merged[2]]
        assert float(probability) == pytest.approx(float(merged[1]), abs=2e-4)
    judge = open_any(str(out), check=judges)
    further = METHODS["lora"].graft(judge.params, jax.random.key(0), SETTINGS["lora"])
    save_adapter(tmp_path / "further", SETTINGS["lora"], further, fingerprint(judge.params), base_path=str(out))
    assert open_any(str(tmp_path / "further"), check=judges).labels == LABELS, "it goes on judging"
    told = read_object(out / "config.json", "x")
    for changed in ({"problem_type": "regression"}, {"id2label": {"0": "score"}}):
        (out / "config.json").write_text(json.dumps(told | changed))
        with pytest.raises(ConfigError):
            open_any(str(out), check=judges)
    (out / "config.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"labels: 2 is not possible; .* has 3"):
        hub.save(tmp_path / "other", FAMILIES["bert"], open_any(str(out), check=judges).params, labels=LABELS[:2])


def merged_as_printed(own, out, capsys):
    script("merge")([str(own), "--out", str(out), "--tokens", "9"])
    (printed,) = re.findall(r"moves the logits by (\S+) of the largest", capsys.readouterr().out)
    assert float(printed) <= 1e-5


def test_what_cannot_be_merged_is_named_and_nothing_is_written(adapter, tmp_path):
    merge, out = script("merge"), tmp_path / "merged"
    with pytest.raises(ConfigError, match=r"run: .*prefix' is not possible; merge: .* are no part of a weight"):
        merge([str(adapter("prefix")), "--out", str(out)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: .* a folder that can be made"):
        merge([str(tmp_path / "base"), "--out", str(tmp_path / "file" / "merged")])
    with pytest.raises(ConfigError, match="tokens: 1 is not possible"):
        merge([str(tmp_path / "base"), "--out", str(out), "--tokens", "1"])
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"out: .* it must not exist yet, or be empty"):
        merge([str(tmp_path / "base"), "--out", str(tmp_path / "base")])
