"""Words to loss: a real tokenizer's pieces, labels and the loss of a tagger equal Hugging Face's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import error, of_class, pair, random_encoder

from xylem.data import tagged, tokenizers
from xylem.data.pretrained import pretrained
from xylem.models import build
from xylem.training.classification import token_classification
from xylem.training.objective_config import ObjectiveConfig

pytestmark = pytest.mark.oracle

WORDS = "the unaffable Xylem carries water upwards , tracheids embolise 42 metres high über alles e.g. antidisestablish"
LENGTH, TEXTS, LABELS, IGNORED, LOSS = 24, 4, 5, -100, 1e-4


def test_labelled_words_cost_what_they_do_in_hugging_face(rng_seed, tmp_path, proof):
    import torch
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(rng_seed)
    tokenizer = tokenizers.load(pretrained("minilm"))
    (tmp_path / "tokenizer.json").write_text((pretrained("minilm") / "tokenizer.json").read_text())
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]")
    texts = [list(rng.choice(WORDS.split(), int(rng.integers(3, 14)))) for _ in range(TEXTS)]
    labels = [rng.integers(0, LABELS, len(words)) for words in texts]

    encoded = theirs(texts, is_split_into_words=True, padding="max_length", truncation=True, max_length=LENGTH)
    marked = np.full((TEXTS, LENGTH), IGNORED)
    for row, own in enumerate(labels):
        ids = encoded.word_ids(row)
        for place, word in enumerate(ids):
            if word is not None and word != ids[place - 1]:
                marked[row, place] = own[word]
    model = random_encoder(rng, "bert", num_labels=LABELS, pad_token_id=0, vocab_size=tokenizer.vocab_size)
    made = pair(of_class("BertForTokenClassification", model, rng), tmp_path / "hf")
    names = {name: torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask")}
    reference = made.model(**names, labels=torch.from_numpy(marked)).loss.item()

    run = jax.jit(partial(token_classification, build(made.config), ObjectiveConfig(), made.params))

    def loss(shift: int) -> float:
        rows = []
        for words, own in zip(texts, labels, strict=True):
            row, places = tagged.row(tokenizer, words, LENGTH, "present")
            target, weights = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.float32)
            kept = places >= 0
            target[places[kept] + shift], weights[places[kept] + shift] = own[kept], 1.0
            rows.append(row | {"labels": target, "weights": weights})
        batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
        np.testing.assert_array_equal(batch["tokens"], encoded["input_ids"])
        sums = run(batch)
        return float(sums.loss / sums.weight)

    measured = error(np.array(loss(0)), np.array(reference))
    assert error(np.array(loss(-1)), np.array(reference)) > LOSS
    proof("bert: words to loss", "BertForTokenClassification", measured, LOSS, rng_seed, "labels one piece early")
