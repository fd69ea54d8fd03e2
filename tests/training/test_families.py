"""Each family trained by the one loop with its own objective; what is carried from batch to batch."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, VOCAB

from xylem import models
from xylem.configs.pretrain import RUNS, parse
from xylem.data import pipeline
from xylem.data.config import DataConfig
from xylem.errors import ConfigError
from xylem.models.settings import from_dict
from xylem.sharding import make_mesh
from xylem.training.checkpoint import load_params
from xylem.training.config import MeshConfig, OptimizerConfig, RampConfig, RunConfig, check_tokenizer, writes
from xylem.training.evaluate import evaluate
from xylem.training.inputs import example_shapes, objective_data
from xylem.training.loop import pretrain
from xylem.training.objective_config import DenoisingConfig, MaskedConfig, ObjectiveConfig, SampledConfig, SpanConfig
from xylem.training.program import assemble
from xylem.training.restore import open_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_by_its_objective(run_of, family):
    config = run_of(family)
    summary = pretrain(config)
    files = {path.name for path in Path(config.run_dir).iterdir()}
    assert {"summary.json", "loss.png", "metrics.jsonl", "checkpoints", "tokenizer"} <= files
    assert summary["step"] == 6 and summary["validation_loss"] < np.log(VOCAB)
    decodes = writes(config)
    assert ("sample" in summary) == decodes == ("validation_bits_per_byte" in summary)
    if not decodes:
        with pytest.raises(ConfigError, match="a decoder is wanted"):
            open_model(config.run_dir)


@pytest.mark.parametrize("family", ["bert", "t5", "lstm", "llama"])
def test_a_run_goes_on_bit_for_bit(run_of, family):
    """Masks, pairs, the state that a recurrent model carries, what a model draws for itself: all come back."""
    unbroken = run_of(family)
    pretrain(unbroken)
    pretrain(run_of(family, "halves", steps=3))
    resumed = run_of(family, "halves")
    pretrain(resumed)
    entries = ("trainable", "optimizer", *(["carry"] if family == "lstm" else []))
    for entry in entries:
        first, second = (load_params(config.run_dir, entries=(entry,))[0] for config in (unbroken, resumed))
        jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_carried_state_is_that_of_all_text_read(run_of, rng_seed):
    """Of weights that stay as they are: the state after several windows is what one pass over them leaves."""
    still = OptimizerConfig(learning_rate=1e-30, schedule="constant", warmup_steps=0, weight_decay=0.0)
    config = run_of("lstm", "still", optimizer=still, seed=rng_seed, steps=5, save_every=0)
    data = objective_data(config, pipeline.prepare(config.data, lambda _: None))
    program = assemble(config, make_mesh(data=1, devices=jax.devices()[:1]))
    state = program.create()
    params = jax.tree.map(np.asarray, state.params)
    batches = pipeline.TrainIterator(data, config.batch_size, config.seed, order="consecutive")
    tokens, opened = [], []
    for _ in range(config.steps):
        batch = next(batches)
        state, _ = program.step(state, batch)
        tokens.append(batch["tokens"])
        opened.append(batch["opens"])
    text, end = np.concatenate(tokens, axis=1), data.tokenizer.end_of_text
    segments = 1 + np.cumsum(text == end, axis=1).astype(np.int32)
    module = models.build(config.model)
    cache = module.init_cache(config.batch_size, 0)
    whole = module.apply({"params": params}, jnp.asarray(text), segments=jnp.asarray(segments), cache=cache).cache
    for ours, expected in zip(jax.tree.leaves(state.carry.states), jax.tree.leaves(whole.states), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    last = module.apply({"params": params}, jnp.asarray(tokens[-1]), cache=cache).cache
    assert not np.allclose(jax.tree.leaves(last.states)[0], jax.tree.leaves(whole.states)[0], atol=1e-4)


def test_validation_of_a_carrying_run_is_one_pass_over_each_part_of_the_text(run_of):
    config = run_of("rnn", "validated", steps=1, batch_size=3, evaluate_batches=1, mesh=MeshConfig(data=1))
    summary = pretrain(config)
    model = open_model(config.run_dir)
    data = pipeline.prepare(config.data, lambda _: None)
    batches = list(pipeline.eval_batches(data, "validation", config.batch_size, order="consecutive"))
    text, labels, weights = (
        np.concatenate([b[name] for b in batches], axis=1) for name in ("tokens", "labels", "weights")
    )
    segments = 1 + np.cumsum(text == data.tokenizer.end_of_text, axis=1).astype(np.int32)
    out = model.module.apply({"params": model.params}, jnp.asarray(text), segments=jnp.asarray(segments))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(out.logits), jnp.asarray(labels)[..., None], axis=-1)[..., 0]
    whole = float((losses * weights).sum() / weights.sum())
    assert weights.sum() == data.counts["validation"]["tokens"] - 1
    assert summary["validation_loss"] == pytest.approx(whole, rel=1e-5)
    assert evaluate(model, config.data, "validation", 3, None)["loss"] == pytest.approx(whole, rel=1e-5)
    apart = evaluate(model._replace(objective="causal_lm"), config.data, "validation", 3, None)["loss"]
    assert apart != pytest.approx(whole, rel=1e-4), "each window read by itself"


def test_carried_rows_lie_with_their_batch(run_of):
    config = run_of("lstm", mesh=MeshConfig(data=4, fsdp=2))
    carry = assemble(config, make_mesh(data=4, fsdp=2)).abstract.carry
    shapes = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(carry.states)}
    assert {shape[2] for shape in shapes} == {1}
    assert carry.lengths.sharding.shard_shape(carry.lengths.shape) == (1,)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_known_before_there_is_a_text(run_of, family):
    config = run_of(family)
    data = objective_data(config, pipeline.prepare(config.data, lambda _: None))
    batch = next(pipeline.TrainIterator(data, 8, 0))
    assert example_shapes(config) == {name: (x.shape[1:], x.dtype) for name, x in batch.items()}


@pytest.mark.parametrize("name", RUNS)
def test_every_preset_can_be_started_and_written_down(name):
    config = RUNS[name]()
    assert from_dict(RunConfig, dataclasses.asdict(config)) == config


def test_a_config_older_than_a_field_is_read_with_its_default():
    older = dataclasses.asdict(RUNS["t5"]())
    for name in ("tasks", "mixing_limit", "target_length"):
        del older["objective"][name]
    del older["ramp"]
    assert from_dict(RunConfig, older) == RUNS["t5"]()


def test_a_flag_chooses_among_the_objectives_of_a_model():
    parsed = lambda *flags: parse(list(flags), "pretrain.py", "", around=lambda run: run)[1]  # noqa: E731
    sampled = ("--objective.name", "scheduled_sampling", "--objective.decay", "exponential:0.9")
    for preset in ("lstm", "gru", "mamba", "gpt2", "default"):
        assert parsed(preset, *sampled).objective == SampledConfig(decay="exponential:0.9")
    assert parsed("transformer", "--objective.name=denoising").objective == DenoisingConfig(label_smoothing=0.1)
    assert parsed("lstm", "--objective.name", "causal_lm").objective == ObjectiveConfig()
    mixed = parsed("t5", "--objective.tasks", "sst", "a.jsonl", "qa two", "b.jsonl", "--objective.mixing-limit", "9")
    assert mixed.objective == SpanConfig(tasks={"sst": "a.jsonl", "qa two": "b.jsonl"}, mixing_limit=9)
    assert parsed("--accumulate", "4", "--ramp.tokens", "99", "--ramp.start", "2").ramp == RampConfig(99, 2)
    with pytest.raises(ConfigError, match="this model learns by masked_lm"):
        parsed("bert", *sampled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run_of: run_of("bert", objective=ObjectiveConfig()), "this model learns by masked_lm"),
        (lambda run_of: run_of("t5", objective=MaskedConfig()), "denoising or span_corruption or continuation"),
        (lambda run_of: run_of("lstm", accumulate=2), "accumulate: 2"),
        (lambda run_of: ObjectiveConfig("masked_lm"), "MaskedConfig"),
        (lambda run_of: MaskedConfig(rate=1.5), "objective.rate: 1.5"),
        (lambda run_of: MaskedConfig(masked=0.95), "objective.random: 0.1 is not possible; at most 0.05"),
        (lambda run_of: MaskedConfig(max_ngram=0), "objective.max_ngram: 0"),
        (lambda run_of: SpanConfig(mean_span=0.5), "objective.mean_span: 0.5"),
        (lambda run_of: DenoisingConfig(rate=-1.0), "objective.rate: -1"),
        (lambda run_of: run_of("t5", objective=SpanConfig(noise_density=0.5, sentinels=2)), "at least 3"),
        (lambda run_of: replace(MaskedConfig(), name="causal_lm"), "ObjectiveConfig"),
        (lambda run_of: run_of("bert", objective=SampledConfig()), "this model learns by masked_lm"),
        (lambda run_of: run_of("t5", objective=SampledConfig()), "denoising or span_corruption or continuation"),
        (lambda run_of: run_of("bart", data=DataConfig(sequence_length=33)), "max_length is 32"),
    ],
)
def test_what_does_not_fit_is_named(run_of, change, message):
    with pytest.raises(ConfigError, match=message):
        change(run_of)


def test_a_vocabulary_without_room_is_named(run_of):
    config = run_of("t5")
    tokenizer = pipeline.prepare(config.data, lambda _: None).tokenizer
    check_tokenizer(config, tokenizer)
    with pytest.raises(ConfigError, match="tokens and span_corruption needs 30 more, so at least 287"):
        check_tokenizer(replace(config, objective=SpanConfig(sentinels=30)), tokenizer)
    paired = run_of("bert", objective=MaskedConfig(pairs="next_sentence"))
    small = replace(paired, model=replace(paired.model, vocab_size=259))
    with pytest.raises(ConfigError, match="masked_lm needs 3 more, so at least 260"):
        check_tokenizer(small, tokenizer)


def test_a_pretraining_run_does_not_know_what_fine_tuning_alone_teaches(run_of):
    with pytest.raises(ConfigError, match="this model learns by causal_lm or scheduled_sampling"):
        run_of("llama", objective=ObjectiveConfig("answers"))
