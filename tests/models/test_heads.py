"""Heads beside a trunk: what is made, what is read, what dropout does, what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import BAR, standard_errors

from xylem.errors import ConfigError
from xylem.models import build, heads, hub
from xylem.models.bert import albert, bert, roberta
from xylem.models.gpt import gpt1
from xylem.models.llama import llama
from xylem.models.rnn import lstm
from xylem.models.settings import Compute

PLAIN = Compute(layers="scan", kernels="plain")
CONFIGS = {
    "bert": replace(bert(2, 20, 4, 31, 19), compute=PLAIN),
    "roberta": replace(roberta(2, 20, 4, 31, 19), compute=PLAIN),
    "albert": replace(albert(2, 20, 4, 31, embedding_size=7), compute=PLAIN),
    "gpt1": replace(gpt1(2, 20, 4, 31, 19), compute=PLAIN),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (3, 11)), jnp.int32)


def made(family: str, kind: heads.Kind, labels: int = 3):
    config = CONFIGS[family]
    params = build(config).init(jax.random.key(0), TOKENS)["params"]
    return config, params, heads.add(config, params, jax.random.key(1), labels, kind)


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
def test_a_classifier_takes_the_place_of_the_heads_of_pretraining(family):
    config, params, tuned = made(family, "classifier")
    assert tuned.keys() == (params.keys() - {"head", "pair_head"}) | {"classifier"}
    assert heads.held(tuned) == (3, "classifier") and heads.held(params) is None
    assert all(tuned[name] is params[name] for name in tuned.keys() & params.keys())
    fresh = tuned["classifier"]["kernel"]
    assert fresh.shape == (20, 3) and 0.4 < float(fresh.std()) / config.init.kernel < 1.6
    assert ("dense" in tuned["classifier"]) == (family == "roberta")
    out = build(config).apply({"params": tuned}, TOKENS)
    assert out.logits is None and heads.classify(tuned, out).dtype == jnp.float32


def test_an_encoder_without_a_pooler_gets_a_fresh_one():
    config, params, _ = made("bert", "classifier")
    bare = {name: part for name, part in params.items() if name not in ("pooler", "head", "pair_head")}
    tuned = heads.add(config, bare, jax.random.key(1), 3, "classifier")
    assert heads.classify(tuned, build(config).apply({"params": tuned}, TOKENS)).shape == (3, 3)


def test_a_tagger_needs_no_pooler_and_labels_every_token():
    config, params, tuned = made("bert", "tagger", 5)
    assert tuned.keys() == (params.keys() - {"head", "pooler", "pair_head"}) | {"tagger"}
    out = build(config).apply({"params": tuned}, TOKENS)
    assert heads.tag(tuned, out).shape == (3, 11, 5)


def test_a_decoder_is_judged_by_its_last_real_token():
    config, _, tuned = made("gpt1", "classifier")
    lengths = np.array([11, 4, 7])
    segments = jnp.asarray((np.arange(11)[None] < lengths[:, None]).astype(np.int32))
    found = heads.classify(tuned, build(config).apply({"params": tuned}, TOKENS, segments=segments), segments)
    for row, length in enumerate(lengths):
        alone = build(config).apply({"params": tuned}, TOKENS[row : row + 1, :length])
        np.testing.assert_allclose(found[row], heads.classify(tuned, alone)[0], rtol=1e-5, atol=1e-6)
    assert "bias" not in tuned["classifier"]


def test_dropout_keeps_nine_tenths_and_the_mean(rng_seed):
    x = jnp.ones((100, 200))
    dropped = np.asarray(heads.dropped(x, jax.random.key(rng_seed)))
    kept = int((dropped > 0).sum())
    assert standard_errors([kept, x.size - kept], [0.9, 0.1]) < BAR
    np.testing.assert_allclose(dropped[dropped > 0], 1 / 0.9, rtol=1e-6)
    assert heads.dropped(x, None) is x


@pytest.mark.parametrize(
    ("config", "kind", "labels", "message"),
    [
        (CONFIGS["gpt1"], "tagger", 3, "kind: 'tagger of gpt1'"),
        (lstm(2, 8, 9, 7), "classifier", 3, "kind: 'classifier of recurrent'"),
        (CONFIGS["bert"], "classifier", 0, "num_labels: 0"),
    ],
)
def test_heads_that_cannot_be_are_named(config, kind, labels, message):
    with pytest.raises(ConfigError, match=message):
        heads.add(config, {}, jax.random.key(0), labels, kind)


def test_a_head_that_transformers_does_not_store_is_named(tmp_path):
    config = replace(llama(2, 24, 6, 3, 29, 31, 19, rope_theta=99.0, norm_eps=1e-5), compute=PLAIN)
    params = build(config).init(jax.random.key(0), TOKENS)["params"]
    tuned = heads.add(config, params, jax.random.key(1), 3, "classifier")
    with pytest.raises(ConfigError, match="params: 'classifier' is not possible; transformers stores no such head"):
        hub.save(tmp_path / "out", config, tuned)
    assert not (tmp_path / "out").exists()
