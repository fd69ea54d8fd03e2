"""Conversations as a real chat template writes them, and as rows in which the answers alone count."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_weights, small, small_mamba

from xylem import models
from xylem.data import conversations, tokenizers
from xylem.data.config import DataConfig
from xylem.data.pretrained import pretrained
from xylem.errors import ConfigError
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import causal_lm

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3?"},
    {"role": "assistant", "content": "Five, <|im_end|> they say."},
]


@pytest.fixture(scope="module")
def chatty():
    """The tokenizer of SmolLM2-135M-Instruct, with its template."""
    return tokenizers.load(pretrained("smollm2"))


def test_what_the_assistant_says_is_learned_with_the_token_that_ends_it(chatty):
    one = conversations.encode(TALK[:3], chatty)
    assert chatty.decode(one.tokens) == chatty.apply_chat_template(TALK[:3], add_generation_prompt=False).rstrip()
    assert chatty.decode(one.tokens[one.answer]) == "Four.<|im_end|>"
    assert one.tokens[-1] in chatty.stop
    opened = chatty.apply_chat_template(TALK[:2], add_generation_prompt=True)
    assert chatty.decode(one.tokens[~one.answer]) == opened


def test_every_answer_of_a_long_conversation_is_learned(chatty):
    one = conversations.encode(TALK, chatty)
    edges = np.flatnonzero(np.diff(one.answer.astype(int), prepend=0) == 1)
    assert len(edges) == 2 and chatty.decode(one.tokens[one.answer]).startswith("Four.<|im_end|>Five,")


def test_without_a_template_the_question_is_a_line_and_end_of_text_ends_the_answer():
    plain = tokenizers.byte_level()
    one = conversations.encode(TALK[1:3], plain)
    assert plain.decode(one.tokens) == "What is 2 + 2?\nFour.<|endoftext|>"
    assert plain.decode(one.tokens[one.answer]) == "Four.<|endoftext|>"


def test_an_encoder_decoder_reads_what_stands_before_each_answer(chatty, tmp_path):
    first, second = conversations.pairs(TALK, chatty)
    for one, size, answer in ((first, 2, "Four."), (second, 4, "Five, <|im_end|> they say.")):
        asked = chatty.apply_chat_template(TALK[:size], add_generation_prompt=True)
        np.testing.assert_array_equal(one.source[:-1], chatty.encode(asked, parse_special=True))
        assert one.source[-1] == chatty.end_of_text
        assert chatty.decode(one.target) == f"{answer}<|im_end|>" and one.target[-1] in chatty.stop
    plain = tokenizers.byte_level()
    (one,) = conversations.pairs(TALK[1:3], plain)
    assert plain.decode(one.source) == "<|endoftext|>What is 2 + 2?<|endoftext|>"
    assert plain.decode(one.target) == "Four.<|endoftext|>"
    corpus = write(tmp_path / "a.jsonl", *[{"prompt": "0123456789", "completion": "abcdefghijk"}] * 3)
    data = conversations.prepare_pairs(DataConfig(corpus, sequence_length=8), plain, 7)
    row = data.source("train")[0]
    assert plain.decode(row["tokens"]) == "3456789<|endoftext|>", "the end of what is asked, the beginning of an answer"
    assert plain.decode(row["labels"]) == "abcdefgh" and row["decoder_tokens"][0] == 7
    np.testing.assert_array_equal(row["decoder_tokens"][1:], row["labels"][:-1])
    short = conversations.prepare_pairs(DataConfig(corpus, sequence_length=16), plain, 7).source("train")[0]
    assert (short["segments"].sum(), short["weights"].sum()) == (12, 12)


def drawn(rng, count=40, most=30):
    made = []
    for _ in range(count):
        size = int(rng.integers(3, most))
        answer = np.zeros(size, bool)
        answer[int(rng.integers(1, size)) :] = True
        made.append(conversations.Example(rng.integers(1, 31, size).astype(np.int32), answer))
    return made


def test_rows_hold_each_conversation_whole(rng_seed):
    examples = drawn(np.random.default_rng(rng_seed))
    rows = conversations.pack(examples, 32, pad=0)
    found = []
    for row in rows:
        assert all(x.shape == (32,) for x in row.values())
        assert (row["weights"][row["segments"] == 0] == 0).all()
        for number in range(1, row["segments"].max() + 1):
            own = row["segments"] == number
            tokens = np.append(row["tokens"][own], row["labels"][own][-1])
            np.testing.assert_array_equal(tokens[1:], row["labels"][own])
            found.append((tokens.tolist(), [False, *(row["weights"][own] > 0).tolist()]))
    wanted = [(one.tokens.tolist(), [False, *one.answer[1:].tolist()]) for one in examples]
    assert sorted(found) == sorted(wanted)
    assert len(rows) < len(examples) / 1.5, "they are packed"
    (cut,) = conversations.pack([conversations.Example(np.arange(50, dtype=np.int32), np.arange(50) > 20)], 32, pad=0)
    np.testing.assert_array_equal(cut["labels"], np.arange(1, 33))


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_packed_conversations_do_not_see_each_other(family, rng_seed):
    config = small_mamba() if family == "mamba" else small(family)
    module = models.build(config)
    keys = jax.random.split(jax.random.key(rng_seed))
    params = random_weights(module, keys[1], jnp.zeros((1, 2), jnp.int32))
    examples = drawn(np.random.default_rng(rng_seed), count=6, most=9)
    loss = jax.jit(lambda batch: causal_lm(module, ObjectiveConfig(), params, batch))

    def total(rows):
        sums = loss({name: jnp.stack([row[name] for row in rows]) for name in rows[0]})
        return float(sums.loss), float(sums.weight)

    packed = conversations.pack(examples, 16, pad=0)
    alone = [row for one in examples for row in conversations.pack([one], 16, pad=0)]
    assert len(packed) < len(alone)
    np.testing.assert_allclose(total(packed), total(alone), rtol=1e-5)
    blurred = [{**row, "segments": np.minimum(row["segments"], 1)} for row in packed]
    assert abs(total(blurred)[0] / total(alone)[0] - 1) > 1e-4


def write(path, *records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(path)


def test_all_forms_are_read_and_some_held_out(tmp_path):
    forms = [
        {"messages": TALK[1:3]},
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"prompt": "Say no.", "completion": "No."},
    ]
    corpus = write(tmp_path / "a.jsonl", *forms * 10)
    plain = tokenizers.byte_level()
    data = conversations.prepare(DataConfig(corpus, sequence_length=64), plain)
    assert (data.counts["train"]["documents"], data.counts["validation"]["documents"]) == (27, 3)
    texts = {plain.decode(row["tokens"][row["segments"] == 1]) for row in data.source("train")}
    assert any("Add.\n\n2 and 2\n4" in text for text in texts) or len(texts) > 1
    batch = data.batch(data.source("train"), [0, 1], pad_to=3)
    assert batch["tokens"].shape == (3, 64) and batch["weights"][2].sum() == 0


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "no"}, 'each line has "messages"'),
        ({"messages": [{"role": "user", "content": "?"}]}, "somebody must answer"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "a role and a content"),
        ({"instruction": "Add."}, "a role and a content"),
        ({"prompt": "x" * 99, "completion": "y"}, "no answer that begins within 64 tokens"),
    ],
)
def test_lines_that_are_no_conversation_are_named(tmp_path, record, said):
    corpus = write(tmp_path / "a.jsonl", *[record] * 3)
    with pytest.raises(ConfigError, match=said):
        conversations.prepare(DataConfig(corpus, sequence_length=64), tokenizers.byte_level())
