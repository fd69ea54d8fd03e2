"""Pretraining experiments: each function is one run, ready to start with ``scripts/pretrain.py NAME``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

from xylem.data import spans
from xylem.data.config import DataConfig
from xylem.errors import ConfigError
from xylem.models import PRESETS, bart, bert, mamba, rnn, t5, vanilla
from xylem.models.config import ModelConfig, Seq2SeqConfig, TransformerConfig
from xylem.models.gpt import gpt
from xylem.models.llama import llama
from xylem.training.config import OptimizerConfig, RunConfig, objectives_of
from xylem.training.counting_config import CountingConfig
from xylem.training.objective_config import DenoisingConfig, MaskedConfig, ObjectiveConfig, SpanConfig, settings_of

T = TypeVar("T")


def default() -> RunConfig:
    """A small LLaMA on WikiText-2, in minutes on two cores.

    Few tokens are all there is time for: hence a small vocabulary (the head is a quarter of the work), four layers wide
    enough for fast products, and Muon.
    """
    model = llama(4, 256, 4, 4, 704, vocab_size=4096, max_length=256, rope_theta=1e4, norm_eps=1e-5, head="tied")
    return RunConfig(
        model=model,
        data=DataConfig(corpus="wikitext2", tokenizer="bpe:4096", sequence_length=256),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, schedule="wsd", warmup_steps=20, decay_fraction=0.4),
        steps=320,
        batch_size=16,
        evaluate_every=100,
        save_every=100,
        sample_every=100,
        sample_prompt="The history of",
    )


def nanogpt_cpu() -> RunConfig:
    """The run nanoGPT publishes for a CPU: 4 layers, 4 heads, width 128, context 64, batch 12, characters."""
    return RunConfig(
        model=gpt(4, 128, 4, vocab_size=1154, max_length=64),  # the characters of WikiText-2 and end-of-text
        data=DataConfig(tokenizer="characters", sequence_length=64),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99),
        steps=2000,
        batch_size=12,
    )


def small(model: ModelConfig, objective: ObjectiveConfig, sequence_length: int = 64, **changes: Any) -> RunConfig:
    """A small model of any family on WikiText-2 by its own objective: minutes on two cores.

    A fraction of the text is read once, so nothing is dropped out: there is no time to learn it by heart.
    """
    rate = {"name": "muon", "learning_rate": 5e-3, "schedule": "wsd", "warmup_steps": 20, "decay_fraction": 0.4}
    return RunConfig(
        model=_without_dropout(model),
        data=DataConfig(corpus="wikitext2", tokenizer="bpe:4096", sequence_length=sequence_length),
        optimizer=OptimizerConfig(**rate | changes),
        objective=objective,
        steps=400,
        batch_size=32,
        evaluate_every=100,
        save_every=100,
        sample_prompt="The history of",
    )


def _without_dropout(model: Any) -> Any:
    if isinstance(model, Seq2SeqConfig):
        return replace(model, encoder=_without_dropout(model.encoder), decoder=_without_dropout(model.decoder))
    return replace(model, dropout=0.0) if isinstance(model, TransformerConfig) else model


# Room for what objectives add to the 4,096 tokens: a mask, [CLS] and [SEP], what starts a target, 100 sentinels.
_VOCABULARY = 4096 + 128


def _small_encoder_decoder(made: Seq2SeqConfig) -> Seq2SeqConfig:
    return replace(made, decoder_start=4096 + 1)  # 4096 is the mask


def _small_encoder(made: TransformerConfig) -> TransformerConfig:
    """Positions stand out at the start: until its layers tell places apart, an encoder knows only how frequent the
    tokens of its window are, and that takes most of a short run."""
    return replace(made, init=replace(made.init, embedding=0.05, positions=0.1))


def small_bert() -> RunConfig:
    """Hidden tokens and next sentences."""
    model = _small_encoder(bert.bert(4, 256, 4, _VOCABULARY, 128))
    return small(model, MaskedConfig(pairs="next_sentence"))


def small_roberta() -> RunConfig:
    """Hidden tokens of packed text, others each epoch."""
    return small(_small_encoder(bert.roberta(4, 256, 4, _VOCABULARY, 128)), MaskedConfig())


def small_albert() -> RunConfig:
    """Hidden n-grams and the order of sentences; one layer's weights serve all."""
    model = _small_encoder(bert.albert(4, 256, 4, _VOCABULARY, embedding_size=64))
    return small(model, MaskedConfig(max_ngram=3, pairs="sentence_order"))


def small_transformer() -> RunConfig:
    """The network of 2017 with its label smoothing and schedule; it continues a text it has read one half of."""
    model = _small_encoder_decoder(vanilla.vanilla(3, 256, 4, _VOCABULARY, 128))
    objective = ObjectiveConfig("continuation", label_smoothing=0.1)
    noam = {"name": "adamw", "schedule": "noam", "warmup_steps": 100, "beta2": 0.98, "eps": 1e-9, "weight_decay": 0.0}
    return small(model, objective, 128, learning_rate=2e-3, **noam)


def small_bart() -> RunConfig:
    """Permuted sentences with spans missing, and the text from them."""
    return small(_small_encoder_decoder(bart.bart(3, 256, 4, _VOCABULARY, 128)), DenoisingConfig())


def small_t5() -> RunConfig:
    """Missing spans, listed; windows are cut so that no source is padded."""
    model = _small_encoder_decoder(t5.t5(3, 256, 4, 64, 1024, "1.1", _VOCABULARY, 128))
    return small(model, SpanConfig(), spans.lengths(64)[0])


def small_recurrent(cell: Literal["rnn", "lstm", "gru"]) -> RunConfig:
    """Truncated back-propagation through time over windows of 64 tokens, each row's state going on."""
    model = rnn.recurrent(cell, 2, 384, vocab_size=4096, max_length=256)
    # An LSTM's gates hardly move at 1e-2; a GRU rises again at 4e-2, an RNN falls apart at 2e-2.
    return small(model, ObjectiveConfig("truncated"), learning_rate=4e-2 if cell == "lstm" else 1e-2)


def small_mamba() -> RunConfig:
    """Selective state spaces."""
    return small(mamba.mamba(4, 256, 4096, 256), ObjectiveConfig(), learning_rate=1e-2)


def published(model: ModelConfig) -> RunConfig:
    """A published model size on the default corpus, by the objective it was published with: what to start from on a
    mesh."""
    length = min(1024, model.max_length)
    room = model.vocab_size if "causal_lm" in objectives_of(model) else model.vocab_size - 128
    size, objective = min(32_000, room), _OBJECTIVES.get(model.family, ObjectiveConfig())
    if isinstance(model, Seq2SeqConfig):
        model = replace(model, decoder_start=size + 1)
    if isinstance(objective, SpanConfig):
        length = spans.lengths(length)[0]
    compute = replace(model.compute, dtype="bfloat16", remat="full")
    data = DataConfig(tokenizer=f"bpe:{size}", sequence_length=length)
    optimizer = OptimizerConfig()
    if model.family == "transformer":  # 1706.03762, section 5.3: the rate peaks at (width x warm-up) ** -0.5
        peak = (model.d_model * 4000) ** -0.5
        optimizer = OptimizerConfig("adamw", peak, "noam", 4000, weight_decay=0.0, beta2=0.98, eps=1e-9)
    shared = {"data": data, "objective": objective, "optimizer": optimizer}
    return RunConfig(model=model.with_compute(compute), **shared, batch_size=64, steps=100_000)


_OBJECTIVES = {
    "bert": MaskedConfig(pairs="next_sentence"),
    "roberta": MaskedConfig(),
    "albert": MaskedConfig(max_ngram=3, pairs="sentence_order"),
    "transformer": ObjectiveConfig("continuation", label_smoothing=0.1),
    "bart": DenoisingConfig(),
    "t5": SpanConfig(),
}


RUNS: dict[str, Callable[[], RunConfig]] = {
    "default": default,
    "nanogpt_cpu": nanogpt_cpu,
    "bert": small_bert,
    "roberta": small_roberta,
    "albert": small_albert,
    "transformer": small_transformer,
    "bart": small_bart,
    "t5": small_t5,
    "mamba": small_mamba,
    **{cell: partial(small_recurrent, cell) for cell in ("rnn", "lstm", "gru")},
    **{name: (lambda preset=preset: published(preset())) for name, preset in PRESETS.items()},
}


# Runs that count and train nothing: theirs is another config.
COUNTS: dict[str, Callable[[], CountingConfig]] = {"ngram": CountingConfig}


def parse(
    arguments: list[str],
    prog: str,
    description: str,
    around: Callable[[Any], T],
    runs: Mapping[str, Callable[[], Any]] = RUNS,
) -> tuple[str, T]:
    """The run a command names in its first word ("default" where it begins with a flag), as its flags change it.

    ``around(run)`` holds the default of every flag of the command: the run itself, or a dataclass with it inside.

    Raises:
        ConfigError: there is no run of that name.
    """
    import tyro

    named = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    name = named[0] if named else "default"
    if name not in runs:
        raise ConfigError("PRESET", name, f"it must be one of {', '.join(runs)}", runs)
    run = runs[name]()
    default = around(_with_objective(run, arguments) if isinstance(run, RunConfig) else run)
    parsed = tyro.cli(
        type(default),
        prog=f"{prog} [PRESET]",
        description=f"{description}\nPresets: {', '.join(runs)}.",
        default=default,
        args=arguments[len(named) :],
        config=(tyro.conf.AvoidSubcommands,),
    )
    return name, parsed


def _with_objective(run: RunConfig, arguments: list[str]) -> RunConfig:
    """The run with the class of settings that ``--objective.name`` asks for: flags fill a class in and choose none."""
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flag.add_argument("--objective.name", dest="asked", nargs="?")
    asked = flag.parse_known_args(arguments)[0].asked
    if asked is None or type(run.objective) is settings_of(asked):
        return run
    shared = {name: getattr(run.objective, name) for name in ("label_smoothing", "z_loss")}
    data = replace(run.data, sequence_length=min(run.data.sequence_length, run.model.max_length))  # any objective fits
    return replace(run, data=data, objective=settings_of(asked)(name=asked, **shared))
