"""Whole fine-tuning runs: begun with a base, resumed, opened, refused on another base."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree, rmtree

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import script
from safetensors.numpy import load_file
from small import init

from xylem import models
from xylem.data import conversations, pipeline
from xylem.data.config import DataConfig
from xylem.data.pipeline import TrainIterator
from xylem.data.tokenizers import byte_level
from xylem.errors import ConfigError
from xylem.generation.generator import Generator
from xylem.generation.sampling import Sampling
from xylem.models import hub
from xylem.models.leaves import LowRank, is_leaf
from xylem.models.settings import Compute
from xylem.peft import config as peft
from xylem.peft import continual, merging, saving
from xylem.peft.calls import METHODS
from xylem.peft.methods import child
from xylem.sharding import make_mesh
from xylem.training import paging
from xylem.training.checkpoint import load_params
from xylem.training.config import MeshConfig, OptimizerConfig
from xylem.training.evaluate import evaluate
from xylem.training.finetune import finetune, start_of
from xylem.training.finetune_config import FinetuneConfig
from xylem.training.judging import judge_texts, judge_words
from xylem.training.loop import pretrain
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import causal_lm
from xylem.training.paging import HOST
from xylem.training.program import assemble
from xylem.training.restore import judges, open_any, open_model, writes_texts


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
    figures = evaluate(tuned, tuned.data, "validation", 8, None)
    assert figures["loss"] == pytest.approx(summary["validation_loss"], rel=1e-5), "measured on answers"
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
        asked = "The" if objective == "causal_lm" else r"5\+\d\n"  # the last questions are held out
        assert re.match(asked, summary["sample"])
        assert (Path(config.run_dir) / "adapter/adapter.safetensors").is_file()
        tuned = open_model(config.run_dir)
        if objective == "answers":
            up = lambda params: np.asarray(params["layers"]["mlp"]["up"]["kernel"][0])  # noqa: E731
            moved = up(merging.merge(tuned.params)) - up(model.params)
            assert np.linalg.matrix_rank(moved, tol=1e-6) > 2, "restarts add ranks up"


@pytest.mark.slow
def test_an_encoder_decoder_learns_to_answer(folder, tmp_path):
    """Taught three answers by heart, it writes them when it is asked, and stops."""
    start = tmp_path / "base"
    model = families.FAMILIES["t5"][0].with_compute(Compute(layers="scan", kernels="plain"))
    hub.save(start, model, init(models.build(model), jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    byte_level().save(start)
    taught = {"a": "xy", "bb": "!", "cab": "12x"}
    talks = [json.dumps({"prompt": asked, "completion": said}) + "\n" for asked, said in taught.items()]
    (tmp_path / "talks.jsonl").write_text("".join(talks))
    method = peft.SelectionConfig(targets=".")
    often = {"steps": 150, "batch_size": 3, "log_every": 50, "evaluate_every": 0, "save_every": 0}
    path = tmp_path / "talks.jsonl"
    config, model = run(str(start), {"answers": path}, folder, method=method, run_dir=str(tmp_path / "run"), **often)
    config = replace(config, data=replace(config.data, sequence_length=8, validation=str(path)))
    summary = finetune(config, model.params, model.tokenizer)
    assert summary["validation_loss"] < 0.1
    assert summary["sample"].splitlines()[0] in taught
    with pytest.raises(ConfigError, match="a decoder is wanted"):
        open_model(config.run_dir)
    tuned = open_any(config.run_dir, check=writes_texts)
    figures = evaluate(tuned, tuned.data, "validation", 3, None)
    assert figures["loss"] == pytest.approx(summary["validation_loss"], rel=1e-5)
    said = Generator(tuned.module, tuned.params, tuned.tokenizer)(list(taught), Sampling(8, temperature=0.0))
    assert said == list(taught.values())


def test_a_fixed_mask_is_that_of_the_first_batches_and_stays(base, files, folder, tmp_path):
    """Child-tuning D: the mask is made of the gradients of the loss at the base, and goes on with the run."""
    method = peft.ChildConfig("fisher", share=0.4, batches=2)
    config, model = run(base, files, folder, method=method, run_dir=str(tmp_path / "whole"), batch_size=4)
    finetune(config, model.params, model.tokenizer)
    mask = mask_of(config.run_dir)
    data = conversations.prepare(config.data, model.tokenizer)
    batches = TrainIterator(data, config.batch_size, config.seed)
    loss = partial(causal_lm, model.module, config.objective)

    @jax.jit
    def slope(batch):
        return jax.grad(lambda params: loss(params, batch).loss / batch["weights"].sum())(model.params)

    wanted = [slope(next(batches)) for _ in range(3)]
    size = sum(x.size for x in jax.tree.leaves(mask["layers"]))
    # Another program rounds otherwise, which may turn a few around that lie at the bound.
    assert apart(mask, child.fisher_mask(wanted[:2], method)) <= size / 500
    assert apart(mask, child.fisher_mask(wanted[1:], method)) > size / 50, "other batches, another mask"
    tuned, _ = load_params(config.run_dir, entries=("trainable",))

    def moved(keep, old, new):
        assert not np.any((np.asarray(old) != np.asarray(new)) & ~np.asarray(keep))

    jax.tree.map(moved, mask, model.params, tuned)
    halves = replace(config, run_dir=str(tmp_path / "halves"), steps=3)
    finetune(halves, model.params, model.tokenizer)
    # Only the steps that follow read these batches: the mask is not made again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "fisher_mask", lambda *_: pytest.fail("the mask is restored"))
        finetune(replace(halves, steps=6), model.params, model.tokenizer)
    jax.tree.map(np.testing.assert_array_equal, load_params(halves.run_dir, entries=("trainable",))[0], tuned)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["classification", "truncated"])
def test_a_fixed_mask_is_found_for_any_objective(base, files, folder, run_of, tmp_path, objective):
    start = base
    if objective == "truncated":
        short = run_of("rnn", "base", steps=1, evaluate_every=0, save_every=0)
        pretrain(short)
        start = short.run_dir
    own = {**files, "truncated": files["causal_lm"]}
    method = peft.ChildConfig("fisher", share=0.25, batches=2)
    config, model = run(start, own, folder, objective, method, run_dir=str(tmp_path / "run"), steps=2)
    finetune(config, model.params, model.tokenizer)
    in_layers = [np.asarray(x) for x in jax.tree.leaves(mask_of(config.run_dir)["layers"])]
    chosen, size = sum(int(x.sum()) for x in in_layers), sum(x.size for x in in_layers)
    assert abs(chosen - 0.25 * size) <= 2


def apart(mask, other):
    """In how many places two masks differ."""
    return sum(int((x != y).sum()) for x, y in zip(jax.tree.leaves(mask), jax.tree.leaves(other), strict=True))


def mask_of(folder):
    """The mask in a run's last checkpoint."""
    held, _ = load_params(folder, entries=("optimizer",))
    while "mask" not in held:
        (held,) = [part for part in held.values() if isinstance(part, dict)]
    return held["mask"]


@pytest.mark.slow
def test_moments_on_the_host_change_nothing(base, files, folder, tmp_path):
    """ReLoRA, whose restarts change them too; and a run may go on otherwise than it began."""
    method = peft.ReLoRAConfig(rank=2, every=2, rewarm=1)
    ends = {}
    for name, memories in (("device", ("device",) * 2), ("host", ("host",) * 2), ("both", ("device", "host"))):
        config, model = run(base, files, folder, method=method, run_dir=str(tmp_path / name))
        for steps, memory in zip((3, 5), memories, strict=True):
            rates = replace(config.optimizer, memory=memory)
            finetune(replace(config, optimizer=rates, steps=steps), model.params, model.tokenizer)
        ends[name] = load_params(config.run_dir, entries=("trainable",))[0]
    for name in ("host", "both"):
        # Another program, within rounding: of the mean, for Adam makes a step of the smallest gradient.
        pairs = zip(*(jax.tree.leaves(saving.arrays(ends[each])) for each in ("device", name)), strict=True)
        assert all(np.abs(x - y).sum() <= 1e-5 * np.abs(x).sum() for x, y in pairs)
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    program = assemble(replace(config, optimizer=replace(config.optimizer, memory="host")), mesh)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(program.abstract.optimizer) if x.ndim}
    assert kinds == {HOST}


@pytest.mark.slow
def test_a_second_task_stays_away_from_the_first(base, files, folder, tmp_path):
    """O-LoRA: the first task's adapter is the base of the second's run, which learns beside it."""
    first, model = run(base, files, folder, run_dir=str(tmp_path / "first"), steps=2)
    finetune(first, model.params, model.tokenizer)
    start = f"{first.run_dir}/adapter"
    overlaps = {}
    for weight in (0.0, 0.5):
        method = peft.OLoRAConfig(rank=3, penalty=weight)
        config, model = run(start, files, folder, "answers", method, run_dir=str(tmp_path / f"second-{weight}"))
        finetune(config, model.params, model.tokenizer)
        tuned = open_any(config.run_dir)
        below = jax.tree.map(lambda x: x.base if isinstance(x, LowRank) else x, tuned.params, is_leaf=is_leaf)
        jax.tree.map(np.testing.assert_array_equal, below, model.params)
        overlaps[weight] = float(continual.overlap(tuned.params))
        arrays = load_file(Path(config.run_dir) / "adapter/adapter.safetensors")
        assert all(path.endswith(("kernel/a", "kernel/b")) for path in arrays)
        row = json.loads((Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()[0])
        born = METHODS["olora"].graft(model.params, jax.random.split(jax.random.key(config.seed))[0], method)
        assert row["loss"] - row["nll"] == pytest.approx(weight * float(continual.overlap(born)), rel=1e-3, abs=1e-5)
    print(f"overlap with the first task by the weight of the penalty: {overlaps}")
    assert overlaps[0.5] < 0.9 * overlaps[0.0]
    with pytest.raises(ConfigError, match=r"method\.targets: .* earlier task"):
        config, model = run(base, files, folder, method=peft.OLoRAConfig(rank=3), run_dir=str(tmp_path / "third"))
        finetune(config, model.params, model.tokenizer)


def test_an_adapter_is_opened_on_its_base(base, files, folder, tmp_path):
    own = copytree(base, tmp_path / "base")
    model = open_any(base)
    config = peft.LoRAConfig(rank=2)
    params = METHODS["lora"].graft(model.params, jax.random.key(1), config)
    params = jax.tree.map(lambda x: x + 0.1 if x.ndim > 2 else x, params)  # the base too, which is not saved
    save = partial(saving.save_adapter, config=config, params=params, base=saving.fingerprint(model.params))
    save(tmp_path / "adapter", base_path=str(own))
    found = open_model(str(tmp_path / "adapter"))
    saved, bare = saving.arrays(params), saving.arrays(METHODS["lora"].graft(model.params, jax.random.key(0), config))
    for path, x in saving.arrays(found.params).items():
        np.testing.assert_array_equal(x, (saved if path.endswith(("/a", "/b")) else bare)[path])
    assert found.tokenizer.hash == model.tokenizer.hash and found.data == open_any(str(own)).data
    save(tmp_path / "lost")
    with pytest.raises(ConfigError, match="does not say where its base lies"):
        open_model(str(tmp_path / "lost"))
    save(tmp_path / "other", base="0" * 64, base_path=str(own))
    with pytest.raises(ConfigError, match="its base has hash 000000000000"):
        open_model(str(tmp_path / "other"))
    rmtree(own)
    with pytest.raises(ConfigError, match=r"its base cannot be opened: checkpoint: .*base"):
        open_model(str(tmp_path / "adapter"))


def test_a_base_that_is_a_run_is_cut_over_devices(base, files, folder, tmp_path):
    losses = []
    for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)):
        once = {"steps": 2, "evaluate_every": 0, "save_every": 0, "run_dir": str(tmp_path / str(mesh.data))}
        config, model = run(base, files, folder, **once)
        config = replace(config, mesh=mesh)
        assert finetune(config, model.params, model.tokenizer)["step"] == 2
        rows = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, rows) if "loss" in row])
    assert len(losses[0]) == 2 and losses[0][0] != losses[0][1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_what_is_quantized_cannot_learn(base, files, folder):
    model = open_any(base)
    rounded = METHODS["qlora"].graft(model.params, jax.random.key(0), peft.QLoRAConfig(2, block=4))
    for method in (peft.ChildConfig(), peft.SelectionConfig(targets="mlp"), peft.ReLoRAConfig(others="learn")):
        config, _ = run(base, files, folder, "causal_lm", method)
        with pytest.raises(ConfigError, match=r"method: '\w+' is not possible; it would teach .* holds integers"):
            start_of(config, rounded, pipeline.prepare(config.data)).trains(rounded)
    config, _ = run(base, files, folder, "causal_lm", peft.ChildConfig())
    paired = METHODS["lora"].graft(model.params, jax.random.key(0), peft.LoRAConfig(2))
    learns = start_of(config, paired, pipeline.prepare(config.data)).trains(paired)
    still = {path for path, weight in saving.arrays(paired).items() if not learns(path, weight)}
    assert still and all(path.endswith("kernel/scale") for path in still), "a pair's scale is a constant"


def test_devices_without_host_memory_are_named(base, files, folder, monkeypatch):
    config, _ = run(base, files, folder)
    monkeypatch.setattr(paging, "HOST", "no_such_memory")
    with pytest.raises(ConfigError, match=r"optimizer\.memory: 'host' is not possible; cpu devices know"):
        rates = replace(config.optimizer, memory="host")
        assemble(replace(config, optimizer=rates), make_mesh(data=1, devices=jax.devices()[:1]))


KINDS = {"classification": peft.LoRAConfig(rank=2), "token_classification": peft.SelectionConfig(targets=".")}


@pytest.mark.parametrize("objective", ["token_classification", pytest.param("classification", marks=pytest.mark.slow)])
def test_a_run_that_judges_is_measured_and_used(folder, tmp_path, capsys, objective):
    """Texts are told by their words, words by whether they begin with a vowel."""
    start, words = tmp_path / "base", ["ab", "ox", "ba", "go"]
    model = families.FAMILIES["bert"][0].with_compute(Compute(layers="scan", kernels="plain"))
    hub.save(start, model, init(models.build(model), jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    byte_level().save(start)
    texts = [[words[(place + step) % 4] for step in range(1 + place % 3)] for place in range(24)]
    vowel = [["yes" if word[0] in "ao" else "no" for word in text] for text in texts]
    if objective == "classification":
        lines = [{"text": " ".join(text), "label": own[0]} for text, own in zip(texts, vowel, strict=True)]
    else:
        lines = [{"words": text, "labels": own} for text, own in zip(texts, vowel, strict=True)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    often = {"steps": 40, "log_every": 20, "evaluate_every": 0, "save_every": 0, "run_dir": str(tmp_path / "run")}
    config, base = run(str(start), {objective: path}, folder, objective, KINDS[objective], **often)
    config = replace(config, data=replace(config.data, validation=str(path)))
    summary = finetune(config, base.params, base.tokenizer)

    found = open_any(config.run_dir, check=judges)
    assert found.labels == ("no", "yes") and found.objective == objective
    own = open_any(f"{config.run_dir}/adapter", check=judges)
    assert own.labels == found.labels
    assert own.data == replace(found.data, tokenizer=str(start))
    jax.tree.map(np.testing.assert_array_equal, own.params, found.params)
    if objective == "classification":
        told = [(one.label, one.probability) for one in judge_texts(found, [(line["text"],) for line in lines])]
        wanted = [line["label"] for line in lines]
    else:
        told = [(one.label, one.probability) for text in judge_words(found, texts) for one in text]
        wanted = [label for text in vowel for label in text]
    right = np.mean([label == true for (label, _), true in zip(told, wanted, strict=True)])
    costs = [-np.log(p if label == true else 1 - p) for (label, p), true in zip(told, wanted, strict=True)]
    figures = evaluate(found, found.data, "validation", 7, None)
    assert figures["accuracy"] == pytest.approx(right) and figures["labels"] == len(wanted)
    assert figures["loss"] == pytest.approx(np.mean(costs), rel=1e-3)
    assert summary["validation_loss"] == pytest.approx(figures["loss"], rel=1e-4)
    assert right > 0.9, "words are learned by heart"

    script("evaluate")([config.run_dir])
    assert f"validation: accuracy {right:.4f}" in capsys.readouterr().out
    script("classify")([config.run_dir, "--text", "ox ba", "go"])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    if objective == "classification":
        assert [(row[0], row[2]) for row in rows] == [("yes", "ox ba"), ("no", "go")]
    else:
        assert [row[:2] for row in rows] == [["ox", "yes"], ["ba", "no"], [""], ["go", "no"], [""]]
    for wrong, said in ((start, "was not taught to judge"), (tmp_path / "none", "give a run folder")):
        with pytest.raises(ConfigError, match=said):
            script("classify")([str(wrong), "--text", "x"])
    with pytest.raises(ConfigError, match="taught to judge texts, not to write them"):
        open_any(config.run_dir)
