"""The losses of encoders and encoder-decoders equal those of Hugging Face."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import error, pair, random_encoder, random_seq2seq

from xylem.models import build
from xylem.training.objective_config import MaskedConfig, ObjectiveConfig
from xylem.training.objectives import Sums, causal_lm, masked_lm

pytestmark = pytest.mark.oracle

BAR = 1e-4
B, T, HIDDEN = 4, 17, 3
IGNORED = -100


def mean(sums: Sums) -> float:
    return float(sums.loss) / float(sums.weight)


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
def test_masked_lm_equals_hugging_face(family, rng_seed, tmp_path, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    made = pair(random_encoder(rng, family), tmp_path / "hf")
    module = build(made.config)
    tokens = rng.integers(4, made.config.vocab_size, (B, T)).astype(np.int32)
    places = np.stack([np.sort(rng.choice(T, HIDDEN, replace=False)) for _ in range(B)]).astype(np.int32)
    labels = rng.integers(4, made.config.vocab_size, (B, HIDDEN)).astype(np.int32)
    batch: dict[str, Any] = {"tokens": tokens, "places": places, "labels": labels}
    batch |= {"weights": np.ones((B, HIDDEN), np.float32), "segments": np.ones((B, T), np.int32)}
    whole = np.full((B, T), IGNORED)
    np.put_along_axis(whole, places, labels, axis=1)
    named: dict[str, Any] = {"input_ids": tokens, "labels": whole}
    if family != "roberta":
        batch |= {"token_types": rng.integers(0, 2, (B, T)).astype(np.int32)}
        batch |= {"pair_labels": rng.integers(0, 2, B).astype(np.int32)}
        second = {"bert": "next_sentence_label", "albert": "sentence_order_label"}[family]
        named |= {"token_type_ids": batch["token_types"], second: batch["pair_labels"]}
    theirs = made.model(**{name: torch.from_numpy(np.asarray(x, np.int64)) for name, x in named.items()})
    expected = theirs.loss.item()

    def ours(**changes: Any) -> float:
        given = {name: jnp.asarray(x) for name, x in (batch | changes).items()}
        return mean(masked_lm(module, MaskedConfig(), made.params, given))

    other = np.where(labels == 4, 5, 4).astype(np.int32)  # no label stays
    assert abs(ours(labels=other) - expected) > BAR
    halves = [
        masked_lm(module, MaskedConfig(), made.params, {name: jnp.asarray(x[rows]) for name, x in batch.items()})
        for rows in (slice(0, 1), slice(1, B))
    ]
    split = sum(float(each.loss) for each in halves) / sum(float(each.weight) for each in halves)
    measured = max(error(np.array(found), np.array(expected)) for found in (ours(), split))
    proof(f"{family}: loss of its objective", type(made.model).__name__, measured, BAR, rng_seed, "other labels")


@pytest.mark.parametrize("family", ["bart", "t5", "t5_1_1"])
def test_the_loss_of_an_encoder_decoder_equals_hugging_face(family, rng_seed, tmp_path, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    made = pair(random_seq2seq(rng, family), tmp_path / "hf")
    module, start = build(made.config), made.config.decoder_start
    real = np.arange(T)[None, :] < np.array([T, 7, 10, 5])[:, None]
    tokens = rng.integers(4, made.config.vocab_size, (B, T))
    labels = rng.integers(4, made.config.vocab_size, (B, 11))
    known = np.arange(11)[None, :] < np.array([4, 11, 8, 9])[:, None]
    named = {"input_ids": tokens, "attention_mask": real, "labels": np.where(known, labels, IGNORED)}
    made.model.config.decoder_start_token_id = start  # T5's own config names none
    expected = made.model(**{name: torch.from_numpy(np.asarray(x, np.int64)) for name, x in named.items()}).loss.item()
    batch = {
        "tokens": tokens,
        "segments": real,
        "labels": labels,
        "decoder_tokens": np.concatenate([np.full((B, 1), start), labels[:, :-1]], axis=1),
    }
    given: dict[str, Any] = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
    given["weights"] = jnp.asarray(known, jnp.float32)

    def ours(**changes: Any) -> float:
        return mean(causal_lm(module, ObjectiveConfig("continuation"), made.params, given | changes))

    assert abs(ours(decoder_tokens=given["labels"]) - expected) > BAR
    measured = error(np.array(ours()), np.array(expected))
    proof(f"{family}: loss of its objective", type(made.model).__name__, measured, BAR, rng_seed, "target unshifted")
