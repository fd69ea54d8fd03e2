"""Held-out answers judged in packed rows as one would judge them one by one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import apply, random_weights

from xylem import models
from xylem.data import conversations, tokenizers
from xylem.data.config import DataConfig
from xylem.models.llama import llama
from xylem.training import choices

BAR = 1e-5


def one_by_one(module, params, talks, tokenizer, allowed):
    """Nats, tokens of answers, and right choices, each conversation read by itself."""
    nats, count, right = 0.0, 0, 0
    for talk in talks:
        one = conversations.encode(talk, tokenizer)
        padded = np.zeros(31, np.int32)
        padded[: len(one.tokens) - 1] = one.tokens[:-1]
        scores = np.asarray(jax.nn.log_softmax(apply(module, params, jnp.asarray(padded)[None]).logits[0]), np.float64)
        places = np.flatnonzero(one.answer) - 1
        nats -= sum(scores[place, one.tokens[place + 1]] for place in places)
        count += len(places)
        right += max(allowed, key=lambda token: scores[places[0], token]) == one.tokens[places[0] + 1]
    return nats / count, right / len(talks)


@pytest.mark.oracle
def test_packed_answers_are_judged_as_each_by_itself(rng_seed, tmp_path, proof, monkeypatch):
    rng, plain = np.random.default_rng(rng_seed), tokenizers.byte_level()
    turn = lambda role, content: {"role": role, "content": content}  # noqa: E731
    words = ("yes", "no", "perhaps")
    talks = [
        [turn("user", "".join(rng.choice([*"abcdef"], rng.integers(2, 12)))), turn("assistant", rng.choice(words))]
        for _ in range(40)
    ]
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    data = conversations.prepare(DataConfig(str(file), sequence_length=60, validation_fraction=0.6), plain)
    model = llama(2, 24, 6, 3, 29, vocab_size=plain.vocab_size, max_length=60, rope_theta=777.0, norm_eps=1e-4)
    module = models.build(model)
    params = random_weights(module, jax.random.key(rng_seed), jnp.zeros((1, 2), jnp.int32))
    found = choices.judge(module, params, data, 5)
    allowed = sorted({int(plain.encode(talk[1]["content"])[0]) for talk in talks[:16]})
    loss, accuracy = one_by_one(module, params, talks[16:], plain, allowed)
    assert found["answers"] == 24 and found["accuracy"] == pytest.approx(accuracy)
    assert {row["segments"].max() for row in data.rows["validation"]} - {1}, "some rows hold several"
    monkeypatch.setattr(choices, "begins", lambda row: np.asarray(row["weights"]) > 0)
    assert choices.judge(module, params, data, 5)["answers"] > 24
    error = abs(found["loss"] / loss - 1)
    proof("multiple choice by an answer's first token", "one conversation at a time", error, BAR, rng_seed, "any token")
