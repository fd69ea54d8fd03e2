"""Conversations of three domains: headlines by their rules, exams as they were written, held-out ones apart."""

import hashlib
import random
import re

import pytest
from documents import silent

from xylem.data import conversations, domains, headlines, tokenizers
from xylem.data.config import DataConfig
from xylem.errors import ConfigError

# Of all headlines of both splits and their sentiments: they are the same on every machine and every Python.
HEADLINES = "0f52befda89e9b6eadac5e54601ff99c60c7da1e6b4d2606c7aab34f8372633e"


def sentiment(text, words):
    """The rules once more, read off the words of a finished headline."""
    found = lambda group: any(re.search(rf"\b{re.escape(one)}\b", text) for one in group)  # noqa: E731
    if found(words.plain):
        return "neutral"
    if found(words.beats) or found(words.misses):
        return "positive" if found(words.beats) else "negative"
    assert found(words.good) != found(words.bad) and found(words.up) != found(words.down), text
    return "positive" if found(words.good) == found(words.up) else "negative"


def test_headlines_follow_their_rules(rng_seed):
    drawing = random.Random(rng_seed)
    for words in headlines.WORDS.values():
        made = [headlines.draw(words, drawing) for _ in range(300)]
        assert [one.sentiment for one in made] == [sentiment(one.text, words) for one in made]
        counts = [sum(one.sentiment == kind for one in made) for kind in headlines.SENTIMENTS]
        assert sum(counts) == 300 and all(50 < count < 150 for count in counts), "a third each, six standard errors"
        blind = words._replace(beats=("nothing",), misses=("nothing",))
        assert [one.sentiment for one in made] != [sentiment(one.text, blind) for one in made]


def test_held_out_headlines_are_of_other_companies_and_words():
    learned, held = headlines.WORDS["train"], headlines.WORDS["validation"]
    for name in headlines.Words._fields:
        one, other = getattr(learned, name), getattr(held, name)
        assert len(set(one)) == len(one) and not set(one) & set(other)
    splits = {split: headlines.headlines(split) for split in ("train", "validation")}
    texts = [one.text for split in splits.values() for one in split]
    assert len(set(texts)) == len(texts) == headlines.TRAIN + headlines.VALIDATION
    assert hashlib.sha256(repr(splits).encode()).hexdigest() == HEADLINES


@pytest.mark.parametrize(
    ("name", "learned", "held", "answers"),
    [
        ("finance", 400, 60, set(headlines.SENTIMENTS)),
        ("medicine", 240, 60, {f"{letter})" for letter in "abcd"}),
        ("law", 306, 34, set("ABCD")),
    ],
)
def test_each_domain_is_asked_by_name(name, learned, held, answers):
    splits = domains.load(name, report=silent)
    assert {split: len(talks) for split, talks in splits.items()} == {"train": learned, "validation": held}
    asked = [talk[0]["content"] for talks in splits.values() for talk in talks]
    assert len(set(asked)) == learned + held, "no held-out question is learned"
    for talk in [*splits["train"], *splits["validation"]]:
        question, answer = (one["content"] for one in talk)
        assert answer.split(" ")[0] in answers
        assert (answer if name == "medicine" else f"\n{answer}. " if name == "law" else "headline") in question


def test_a_domain_is_prepared_as_a_file_is():
    plain = tokenizers.byte_level()
    data = conversations.prepare(DataConfig("finance", sequence_length=256), plain)
    other = conversations.prepare(DataConfig("medicine", sequence_length=256), plain)
    assert data.counts["validation"]["documents"] == 60 and data.key != other.key
    row = data.source("validation")[0]
    assert plain.decode(row["labels"][row["weights"] > 0]) in {f"{one}<|endoftext|>" for one in headlines.SENTIMENTS}
    with pytest.raises(ConfigError, match=r"finnance.*finance"):
        conversations.prepare(DataConfig("finnance"), plain)
