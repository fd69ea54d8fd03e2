"""Segment pairs against builders that move one token at a time, on WikiText-2 and on random documents."""

import random
import re
from functools import partial
from itertools import chain

import numpy as np
import pytest
from draws import BAR, standard_errors

from xylem.data import corpora, pairs
from xylem.data.config import DataConfig
from xylem.errors import ConfigError

CLS, SEP = 300, 301


@pytest.fixture(scope="module")
def articles():
    return list(corpora.open_corpus(DataConfig(), lambda _: None).splits["validation"]())


@pytest.fixture(scope="module")
def wikitext2(articles):
    """Each sentence as the numbers of its bytes."""
    return [
        [np.frombuffer(one.encode(), np.uint8).astype(np.int32) for one in pairs.sentences(text)] for text in articles
    ]


def random_documents(rng):
    """Two or more documents of sentences of very different lengths."""
    most = int(rng.integers(2, 30))
    sizes = [rng.integers(1, most, rng.integers(1, 25)) for _ in range(rng.integers(2, 9))]
    return [[rng.integers(0, 300, size).astype(np.int32) for size in of_document] for of_document in sizes]


class SlowBuilder:
    """Pairs as BERT's and ALBERT's builders make them: a queue of sentences, a list of tokens, one step at a time.

    The order of the draws is theirs: target length, place of the cut, kind of B, document, place, each cut end.
    """

    def __init__(self, rng, length, short_probability, put_back=True):
        self.rng, self.room, self.put_back = rng, length - 3, put_back
        self.short_probability = short_probability

    def row(self, a, b, label):
        a, b = list(a), list(b)
        while len(a) + len(b) > self.room:
            (a if len(a) > len(b) else b).pop(0 if self.rng.random() < 0.5 else -1)
        return [CLS, *a, SEP, *b, SEP], [0] * (len(a) + 2) + [1] * (len(b) + 1), label

    def target(self):
        short = self.rng.random() < self.short_probability
        return self.rng.randint(2, self.room) if short else self.room

    def take(self, queue, target, least):
        taken = []
        while queue and (len(taken) < least or sum(map(len, taken)) < target):
            taken.append(queue.pop(0))
        return taken

    def next_sentence(self, documents, index):
        queue, rows, target = [one.tolist() for one in documents[index]], [], self.target()
        while queue:
            chunk = self.take(queue, target, 1)
            cut = 1 if len(chunk) == 1 else self.rng.randint(1, len(chunk) - 1)
            a = list(chain(*chunk[:cut]))
            if len(chunk) > 1 and self.rng.random() >= 0.5:
                rows.append(self.row(a, chain(*chunk[cut:]), 0))
                continue
            other, tries = index, 0
            while other == index and tries < 10:
                other, tries = self.rng.randint(0, len(documents) - 1), tries + 1
            start = self.rng.randint(0, len(documents[other]) - 1)
            b = chain(*self.take([one.tolist() for one in documents[other][start:]], target - len(a), 1))
            queue = (chunk[cut:] if self.put_back else []) + queue
            rows.append(self.row(a, b, 1))
        return rows

    def sentence_order(self, document):
        queue, rows, target = [one.tolist() for one in document], [], self.target()
        while len(queue) > 1:
            chunk = self.take(queue, target, 2)
            cut = self.rng.randint(1, len(chunk) - 1)
            a, b = chain(*chunk[:cut]), chain(*chunk[cut:])
            swapped = self.rng.random() < 0.5
            rows.append(self.row(b, a, 1) if swapped else self.row(a, b, 0))
        return rows


def rows_of(made):
    return [(pair.tokens.tolist(), pair.token_types.tolist(), pair.label) for pair in made]


def share_that_differs(one, other):
    """Of two lists of rows, place by place; 1 where even their lengths do."""
    if len(one) != len(other):
        return 1.0
    return sum(a != b for a, b in zip(one, other, strict=True)) / len(one)


def slow_corpus(documents, seed, length, short_probability, passes, **settings):
    """The rows of a whole corpus, as the builder of BERT's files goes through it."""
    rng, documents = random.Random(seed), list(documents)
    rng.shuffle(documents)
    builder = SlowBuilder(rng, length, short_probability, **settings)
    rows = [
        row for _ in range(passes) for index in range(len(documents)) for row in builder.next_sentence(documents, index)
    ]
    rng.shuffle(rows)
    return rows


def test_next_sentence_pairs_of_wikitext2_equal_their_slow_twin(wikitext2, rng_seed, proof):
    length, short = int(np.random.default_rng(rng_seed).integers(200, 600)), 0.1
    ours = rows_of(pairs.next_sentence_corpus(wikitext2, random.Random(rng_seed), length, CLS, SEP, short, 2))
    assert share_that_differs(ours, slow_corpus(wikitext2, rng_seed, length, short, 2, put_back=False)) > 0.5
    error = share_that_differs(ours, slow_corpus(wikitext2, rng_seed, length, short, 2))
    row, oracle = "BERT next sentence pairs: WikiText-2", "builder sentence by sentence, share of rows that differ"
    proof(row, oracle, error, 0, rng_seed, "unused sentences not put back")
    assert all(len(tokens) <= length for tokens, _, _ in ours)


def test_pairs_of_random_documents_equal_their_slow_twins(rng_seed):
    rng = np.random.default_rng(rng_seed)
    for _ in range(60):
        documents, length, short = random_documents(rng), int(rng.integers(5, 70)), float(rng.choice([0, 0.1, 0.5, 1]))
        for index, document in enumerate(documents):
            seed = int(rng.integers(2**31))
            twin = SlowBuilder(random.Random(seed), length, short)
            settings = (random.Random(seed), length, CLS, SEP, short)
            made = pairs.next_sentence_pairs(documents, index, *settings)
            assert rows_of(made) == twin.next_sentence(documents, index)
            assert rows_of(pairs.sentence_order_pairs(document, *settings)) == twin.sentence_order(document)


def test_sentence_order_pairs_of_wikitext2_equal_their_slow_twin(wikitext2, rng_seed, proof):
    def slow(**settings):
        builder = SlowBuilder(random.Random(rng_seed), 384, 0.1, **settings)
        return [row for document in wikitext2 for row in builder.sentence_order(document)]

    rng = random.Random(rng_seed)
    made = [pair for document in wikitext2 for pair in pairs.sentence_order_pairs(document, rng, 384, CLS, SEP)]
    ours = rows_of(made)
    unswapped = [(tokens, types, 0) for tokens, types, _ in ours]
    assert share_that_differs(unswapped, slow()) > 0.3
    row, oracle = "ALBERT sentence order pairs: WikiText-2", "builder sentence by sentence, share of rows that differ"
    proof(row, oracle, share_that_differs(ours, slow()), 0, rng_seed, "labels all 0")


def test_sentence_order_is_swapped_half_the_time_and_labelled(rng_seed):
    rng = np.random.default_rng(rng_seed)
    labels = []
    for index in range(300):
        ids = iter(range(10_000))
        document = [np.array([next(ids) for _ in range(size)], np.int32) for size in rng.integers(1, 9, 60)]
        for pair in pairs.sentence_order_pairs(document, pairs.chance(rng_seed, 0, index), 43, -1, -2):
            a, b = (pair.tokens[(pair.token_types == kind) & (pair.tokens >= 0)] for kind in (0, 1))
            assert (a[0] > b[0]) == pair.label
            labels.append(pair.label)
    assert standard_errors(np.bincount(labels), [0.5, 0.5]) <= BAR


def test_random_segments_come_from_other_documents(rng_seed):
    rng = np.random.default_rng(rng_seed)
    documents = [[np.full(3, number, np.int32) for _ in range(40)] for number in range(30)]
    for index in rng.integers(0, 30, 20):
        made = pairs.next_sentence_pairs(documents, int(index), pairs.chance(rng_seed, 0, int(index)), 35, CLS, SEP)
        for pair in made:
            b = pair.tokens[pair.token_types == 1][:-1]
            assert (b != index).all() == pair.label and len(set(b.tolist())) == 1


def test_chance_is_a_function_of_its_three_numbers(rng_seed):
    drawn = {
        numbers: pairs.chance(*numbers).random() for numbers in [(rng_seed, e, i) for e in range(5) for i in range(5)]
    }
    assert all(pairs.chance(*numbers).random() == value for numbers, value in drawn.items())
    assert len(set(drawn.values())) == 25


def test_sentences_end_at_stops_before_capitals_and_at_lines():
    text = (
        ' \n = Robert Boulter = \n \n Robert is an actor . He played " Scott " ! Why ? '
        '" No one knows . " it said , p. 3 . '
        "É la vie.\n\n\tAnd (so on.) Then e.g. this... But that\nis all \n "
    )
    assert [one.strip() for one in pairs.sentences(text)] == [
        "= Robert Boulter =",
        "Robert is an actor .",
        'He played " Scott " !',
        "Why ?",
        '" No one knows . " it said , p. 3 .',
        "É la vie.",
        "And (so on.)",
        "Then e.g. this...",
        "But that",
        "is all",
    ]
    assert pairs.sentences("") == pairs.sentences(" \n\t ") == []


def test_sentences_lose_nothing(articles, rng_seed):
    rng = np.random.default_rng(rng_seed)
    noise = ["".join(rng.choice(list('aB.?! \n\t")(é'), 60)) for _ in range(500)]
    for text in [*articles, *noise]:
        found = pairs.sentences(text)
        assert "".join(found) == (text if text.strip() else "")
        assert all(one.strip() for one in found)
        assert not any(re.search(r"\S\s*\n\s*\S", one) for one in found)
    sizes = [len(one) for text in articles for one in pairs.sentences(text)]
    assert 80 < np.median(sizes) < 200  # characters: English sentences, neither fragments nor paragraphs


ONE = np.ones(3, np.int32)


@pytest.mark.parametrize(
    ("documents", "values", "message"),
    [
        ([[ONE]], {}, "documents: 1 is not possible; at least 2 documents"),
        ([], {}, "documents: 0 is not possible; at least 2 documents"),
        ([[], [ONE]], {}, "documents: [] is not possible; a document has at least one sentence"),
        ([[ONE], []], {}, "documents: 'document 1' is not possible; each has at least one sentence"),
        ([[ONE, ONE[:0]], [ONE]], {}, "documents: [3, 0] is not possible; a document has at least one sentence"),
        ([[ONE], [ONE]], {"length": 4}, "length: 4 is not possible; at least 5"),
        ([[ONE], [ONE]], {"short_probability": 1.5}, "short_probability: 1.5 is not possible; a fraction from 0 to 1"),
    ],
)
def test_pairs_name_what_cannot_work(documents, values, message):
    settings = {"length": 20, "cls": CLS, "sep": SEP} | values
    calls = [partial(pairs.next_sentence_pairs, documents, 0)]
    if documents and (not len(documents[0]) or values):
        calls.append(partial(pairs.sentence_order_pairs, documents[0]))
    for call in calls:
        with pytest.raises(ConfigError) as error:
            call(random.Random(0), **settings)
        assert str(error.value).startswith(message)
