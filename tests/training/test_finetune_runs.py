"""Whole fine-tuning runs: begun with a base, resumed, opened, refused on another base."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import jax
import numpy as np
import pytest

from xylem.data.config import DataConfig
from xylem.errors import ConfigError
from xylem.peft import config as peft
from xylem.peft import merging, saving
from xylem.training.checkpoint import load_params
from xylem.training.config import MeshConfig, OptimizerConfig
from xylem.training.finetune import finetune
from xylem.training.finetune_config import FinetuneConfig
from xylem.training.loop import pretrain
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.restore import open_any, open_model


@pytest.fixture(scope="module")
def base(run_of):
    """A decoder of one step."""
    config = run_of("llama", "base", steps=1, objective=ObjectiveConfig(), evaluate_every=0, save_every=0)
    pretrain(config)
    return config.run_dir


@pytest.fixture(scope="module")
def files(folder):
    talks = [{"prompt": f"{a}+{b}", "completion": str(a + b)} for a in range(6) for b in range(6)]
    (folder / "talks.jsonl").write_text("".join(json.dumps(one) + "\n" for one in talks))
    texts = [{"text": "ab" * (1 + place % 4), "label": place % 2} for place in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    return {
        "answers": folder / "talks.jsonl",
        "classification": folder / "texts.jsonl",
        "causal_lm": folder / "a.jsonl",
    }


def run(base, files, folder, objective="answers", method=None, **changes):
    model = open_any(base)
    data = DataConfig(str(files[objective]), tokenizer=model.data.tokenizer, sequence_length=16, cache_dir=str(folder))
    often = {"steps": 6, "batch_size": 8, "evaluate_every": 3, "save_every": 3, "sample_every": 0, "log_every": 1}
    config = FinetuneConfig(
        model=model.module.config,
        data=data,
        objective=ObjectiveConfig(objective),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.0),
        base=base,
        method=method or peft.LoRAConfig(rank=2),
        mesh=MeshConfig(data=1),
        **often | changes,
    )
    return config, model


def test_answers_are_learned_by_what_is_grafted_alone(base, files, folder, tmp_path):
    config, model = run(base, files, folder, run_dir=str(tmp_path / "whole"))
    summary = finetune(config, model.params, model.tokenizer)
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert summary["step"] == 6 and rows[-1]["loss"] < rows[0]["loss"]
    held, metadata = load_params(config.run_dir, entries=("trainable", "frozen"))
    assert set(saving.arrays(held)) == {name for name in saving.arrays(held) if name.endswith(("/a", "/b"))}
    assert metadata["config"]["base_hash"] == saving.fingerprint(model.params)
    tuned = open_model(config.run_dir)
    found, params = saving.load_adapter(tmp_path / "whole/adapter", model.params)
    assert found == config.method
    jax.tree.map(np.testing.assert_array_equal, params, tuned.params)

    halves, _ = run(base, files, folder, run_dir=str(tmp_path / "halves"), steps=3)
    finetune(halves, model.params, model.tokenizer)
    finetune(replace(halves, steps=6), model.params, model.tokenizer)
    again, _ = load_params(halves.run_dir, entries=("trainable",))
    jax.tree.map(np.testing.assert_array_equal, again, held)

    other = copytree(base, tmp_path / "other")
    with pytest.raises(ConfigError, match="base_hash: there"):
        moved = jax.tree.map(lambda x: x + 1, model.params)
        finetune(replace(config, base=str(other)), moved, model.tokenizer)


@pytest.mark.parametrize(
    ("objective", "method"),
    [
        ("classification", peft.PrefixConfig(length=3, hidden=4)),
        ("causal_lm", peft.PromptConfig(length=3)),
        ("causal_lm", peft.PrefixConfig(length=3, hidden=4)),
        ("answers", peft.ReLoRAConfig(rank=2, every=2, rewarm=1, others="learn")),
        ("causal_lm", peft.SelectionConfig(targets="norm/")),
    ],
    ids=["classification-prefix", "corpus-prompt", "corpus-prefix", "answers-relora", "corpus-norms"],
)
def test_texts_and_corpora_are_learned_by_any_method(base, files, folder, tmp_path, objective, method):
    config, model = run(base, files, folder, objective, method, run_dir=str(tmp_path / "run"), steps=4)
    summary = finetune(config, model.params, model.tokenizer)
    assert np.isfinite(summary["validation_loss"])
    if objective == "classification":
        held, _ = load_params(config.run_dir, entries=("trainable",))
        assert held["classifier"]["kernel"].shape == (12, 2)
        with pytest.raises(ConfigError, match="taught to judge"):
            open_model(config.run_dir)
    else:
        assert ("sample" in summary) == (objective == "causal_lm")
        assert (Path(config.run_dir) / "adapter/adapter.safetensors").is_file()
        tuned = open_model(config.run_dir)
        if objective == "answers":
            up = lambda params: np.asarray(params["layers"]["mlp"]["up"]["kernel"][0])  # noqa: E731
            moved = up(merging.merge(tuned.params)) - up(model.params)
            assert np.linalg.matrix_rank(moved, tol=1e-6) > 2, "restarts add ranks up"


def test_a_mask_that_needs_gradients_first_is_refused(base, files, folder):
    config, model = run(base, files, folder, method=peft.ChildConfig("fisher"))
    with pytest.raises(ConfigError, match=r"method\.mask: 'fisher'"):
        finetune(config, model.params, model.tokenizer)


def test_a_pretraining_run_does_not_know_what_fine_tuning_alone_teaches(run_of):
    with pytest.raises(ConfigError, match="this model learns by causal_lm or scheduled_sampling"):
        run_of("llama", objective=ObjectiveConfig("answers"))
