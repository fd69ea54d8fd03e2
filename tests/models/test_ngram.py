"""N-gram models: nltk's probabilities and perplexity, and a plain twin for what nltk lacks."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from ngrams import SMOOTHINGS, draw_case
from nltk.lm import MLE, KneserNeyInterpolated, Laplace, Vocabulary
from safetensors.numpy import load_file, save_file

from xylem.errors import ConfigError
from xylem.models import ngram
from xylem.models.ngram import NGramConfig
from xylem.training import metrics
from xylem.training.evaluate import figures
from xylem.training.objectives import Sums

BAR = 1e-12
TEXT = (Path(__file__).parents[2] / "LICENSE").read_bytes()


def some_contexts(rng, config, documents):
    """Contexts of real documents, and made up ones of which most were never seen."""
    real = ngram.predictions(documents, config)[0]
    return np.concatenate([real, rng.integers(0, config.vocab_size, (30, config.order - 1)).astype(np.int32)])


def all_log_probs(config, tree, contexts):
    return ngram.log_probs(config, tree, contexts[:, None], np.arange(config.vocab_size, dtype=np.int32)[None])


def sentences(documents, config):
    """For each document, the grams of every order that end at each of its tokens and at its end, as nltk wants them."""
    for document in documents:
        padding = [config.end_of_text] * (config.order - 1)
        padded = [str(token) for token in (*padding, *document, config.end_of_text)]
        places = range(config.order - 1, len(padded))
        yield [tuple(padded[at - k + 1 : at + 1]) for at in places for k in range(1, config.order + 1)]


def nltk_model(documents, config):
    # nltk's vocabulary always has one word more than it is given, which stands for all others: here the end of text.
    words = [str(token) for token in range(config.vocab_size) if token != config.end_of_text]
    vocabulary = Vocabulary(words, unk_cutoff=1, unk_label=str(config.end_of_text))
    if config.smoothing == "kneser_ney":
        model = KneserNeyInterpolated(config.order, discount=config.discount, vocabulary=vocabulary)
    else:
        model = {"mle": MLE, "laplace": Laplace}[config.smoothing](config.order, vocabulary=vocabulary)
    model.fit(sentences(documents, config))
    return model


def relative_error(ours, reference):
    """The largest, and infinite where one has a 0 that the other has not."""
    if not np.array_equal(ours == 0, reference == 0):
        return math.inf
    return float(np.max(np.abs(ours - reference)[reference > 0] / reference[reference > 0]))


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_probabilities_equal_nltk(smoothing, rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    errors = []
    for order in range(2 if smoothing == "kneser_ney" else 1, 6):  # nltk's Kneser-Ney has no order 1
        config, documents, others = draw_case(rng, smoothing, order)
        model = nltk_model(documents, config)
        contexts = some_contexts(rng, config, others)
        named = [tuple(map(str, context)) for context in contexts.tolist()]
        expected = np.array([[model.score(str(word), c) for word in range(config.vocab_size)] for c in named])
        tree = ngram.count(documents, config)
        errors.append(relative_error(np.exp(all_log_probs(config, tree, contexts)), expected))
        if smoothing == "kneser_ney":
            raw = ngram.count(documents, NGramConfig(config.vocab_size, config.end_of_text, order, "laplace"))
            faulty, fault = raw | {"discounts": tree["discounts"]}, "raw counts below the highest order"
        else:
            once_more = tree[f"grams/{order}/totals"] + 1
            faulty, fault = tree | {f"grams/{order}/totals": once_more}, "totals one too large"
        assert relative_error(np.exp(all_log_probs(config, faulty, contexts)), expected) > BAR
    proof(f"n-gram: {smoothing}, orders to 5", "nltk.lm", max(errors), BAR, rng_seed, fault)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_perplexity_equals_nltk(smoothing, rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    config, documents, others = draw_case(rng, smoothing, int(rng.integers(2, 5)))
    texts = documents if smoothing == "mle" else others  # which gives others, very likely, probability 0
    tree = ngram.count(documents, config)
    highest = [gram for each in sentences(texts, config) for gram in each if len(gram) == config.order]
    expected = nltk_model(documents, config).perplexity(highest)

    def error(documents):
        score = ngram.score(config, tree, documents)
        return abs(metrics.perplexity(score.nll / score.weight) / expected - 1.0)

    assert ngram.score(config, tree, texts).weight == sum(len(each) + 1 for each in texts) == len(highest)
    assert error([np.concatenate(texts)]) > BAR
    proof(f"n-gram: perplexity, {smoothing}", "nltk.lm", error(texts), BAR, rng_seed, "documents joined")


def twin(documents, config):
    """Kneser-Ney with dictionaries, one gram at a time: estimated discounts, ending in equal shares for all tokens."""
    counts = {config.order: Counter(g for each in sentences(documents, config) for g in each if len(g) == config.order)}
    for k in range(config.order - 1, 0, -1):
        counts[k] = Counter(gram[1:] for gram in counts[k + 1])
    discounts, rows = {}, defaultdict(dict)
    for k, grams in counts.items():
        ones, twos = (sum(value == times for value in grams.values()) for times in (1, 2))
        discounts[k] = ones / (ones + 2 * twos) if ones and twos else 0.5
        for gram, value in grams.items():
            rows[gram[:-1]][gram[-1]] = value

    def probability(word, context):
        lower = probability(word, context[1:]) if context else 1.0 / config.vocab_size
        if not (row := rows[context]):
            return lower
        discount = discounts[len(context) + 1]
        return (max(row.get(word, 0) - discount, 0) + discount * len(row) * lower) / sum(row.values())

    return probability


def test_estimated_discounts_and_uniform_base_equal_a_plain_twin(rng_seed, proof):
    rng = np.random.default_rng(rng_seed)
    errors = []
    for order in range(1, 6):
        drawn, documents, others = draw_case(rng, "laplace", order)
        config = NGramConfig(drawn.vocab_size, drawn.end_of_text, order)
        probability = twin(documents, config)
        contexts = some_contexts(rng, config, others)
        named = [tuple(map(str, context)) for context in contexts.tolist()]
        expected = np.array([[probability(str(word), c) for word in range(config.vocab_size)] for c in named])
        tree = ngram.count(documents, config)
        errors.append(relative_error(np.exp(all_log_probs(config, tree, contexts)), expected))
        equal = tree | {"discounts": tree["discounts"] * 0.99}
        assert relative_error(np.exp(all_log_probs(config, equal, contexts)), expected) > BAR
    row = "n-gram: estimated discounts, uniform base"
    proof(row, "a dictionary twin", max(errors), BAR, rng_seed, "discounts 1% smaller")


def test_distributions_sum_to_one_and_are_the_probabilities(rng_seed):
    rng = np.random.default_rng(rng_seed)
    for smoothing in SMOOTHINGS:
        for order in (1, 2, 4):
            config, documents, others = draw_case(rng, smoothing, order)
            tree, contexts = ngram.count(documents, config), some_contexts(rng, config, others)
            whole = ngram.distribution(config, tree, contexts)
            assert np.abs(whole.sum(axis=-1) - 1.0).max() <= 1e-9
            each = np.exp(all_log_probs(config, tree, contexts))
            known = each.sum(axis=-1) > 0
            assert known.all() or smoothing == "mle"
            np.testing.assert_allclose(whole[known], each[known], rtol=1e-14)


def test_a_context_never_seen():
    documents, unseen = [np.array([1, 2, 3, 1, 2, 4])], np.array([[4, 1, 2]], np.int32)
    every = np.arange(6, dtype=np.int32)[None]
    mle = NGramConfig(6, 0, 4, "mle")
    tree = ngram.count(documents, mle)
    assert (ngram.log_probs(mle, tree, unseen[:, None], every) == -np.inf).all()
    np.testing.assert_array_equal(ngram.distribution(mle, tree, unseen), [[0, 0, 0, 0.5, 0.5, 0]])
    laplace = NGramConfig(6, 0, 4, "laplace")
    uniform = ngram.distribution(laplace, ngram.count(documents, laplace), unseen)
    np.testing.assert_allclose(uniform, np.full((1, 6), 1 / 6))
    kneser_ney = NGramConfig(6, 0, 4, discount=0.5)
    tree = ngram.count(documents, kneser_ney)
    shorter = np.array([[3, 1, 2]], np.int32)  # seen; its last two tokens were followed by 3 and by 4
    assert ngram.distribution(kneser_ney, tree, unseen)[0, 3] > ngram.distribution(kneser_ney, tree, shorter)[0, 3]
    never = NGramConfig(6, 0, 4, discount=0.5, base="unigram")
    assert ngram.log_probs(never, ngram.count(documents, never), unseen, np.array([5], np.int32))[0] == -np.inf
    assert ngram.distribution(kneser_ney, tree, unseen)[0, 5] > 0


def equal_trees(one, other):
    assert one.keys() == other.keys()
    return all(x.dtype == other[name].dtype and np.array_equal(x, other[name]) for name, x in one.items())


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_documents_do_not_leak_into_each_other(smoothing, rng_seed):
    rng = np.random.default_rng(rng_seed)
    config, documents, _ = draw_case(rng, smoothing, 4)
    tree = ngram.count(documents, config)
    shuffled = [documents[place] for place in rng.permutation(len(documents))]
    assert equal_trees(ngram.count(shuffled, config), tree)
    end = np.array([config.end_of_text])
    stream = np.concatenate([part for each in documents for part in (end, each)])[1:]
    assert equal_trees(ngram.count([stream], config), tree), "an end-of-text token in an array begins a document"
    assert not equal_trees(ngram.count([np.concatenate(documents)], config), tree)
    alone = [ngram.score(config, tree, [each]) for each in documents]
    together = ngram.score(config, tree, documents)
    assert together.weight == sum(each.weight for each in alone)
    np.testing.assert_allclose(together.nll, sum(each.nll for each in alone), rtol=1e-12)


def test_more_context_fits_the_training_text_better_than_another(monkeypatch):
    monkeypatch.setattr(ngram, "CHUNK", 1000)  # several parts
    ids = np.frombuffer(TEXT, np.uint8).astype(np.int32)
    train, held_out = ids[:9000], ids[9000:]

    def losses(smoothing):
        for order in range(1, 8):
            config = NGramConfig(257, 256, order, smoothing)
            tree = ngram.count([train], config)
            yield [ngram.score(config, tree, [text]).nll / (len(text) + 1) for text in (train, held_out)]

    on_train, on_held_out = np.array(list(losses("kneser_ney"))).T
    assert (np.diff(on_train) < 0).all()
    assert (np.diff(on_held_out - on_train) > 0).all()
    added_ones = np.array(list(losses("laplace")))[:, 1]
    assert added_ones.argmin() < 4 and added_ones[-1] > on_held_out[-1] + 1.0


def test_figures_take_the_score(rng_seed):
    rng = np.random.default_rng(rng_seed)
    config, documents, _ = draw_case(rng, "laplace", 3)
    score = ngram.score(config, ngram.count(documents, config), documents)
    sums = Sums(loss=score.nll, nll=score.nll, weight=score.weight)
    shown = figures([sums], {"bytes": 1234, "tokens": int(score.weight) + 1})
    assert shown["perplexity"] == pytest.approx(math.exp(score.nll / score.weight))
    assert shown["bits_per_byte"] == pytest.approx(metrics.bits_per_byte(score.nll, 1234))


def test_a_tree_comes_back_from_safetensors_to_the_bit(tmp_path, rng_seed):
    config, documents, others = draw_case(np.random.default_rng(rng_seed), "kneser_ney", 4)
    tree = ngram.count(documents, config)
    save_file(tree, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert equal_trees(loaded, tree)
    assert ngram.score(config, loaded, others) == ngram.score(config, tree, others)


# --- what a user gets wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"order": 0}, "order: 0"),
        ({"vocab_size": 0}, "vocab_size: 0"),
        ({"end_of_text": 9}, "ids are 0 to 8"),
        ({"discount": 1.5}, r"\[0, 1\]"),
        ({"discount": 0.5, "smoothing": "mle"}, "has none"),
    ],
)
def test_bad_configs_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        NGramConfig(**{"vocab_size": 9, "end_of_text": 0, **values})


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "at least one"),
        ([[1, 2], [3, 4, 9, 5]], "documents: 9 .* ids are 0 to 8; this is token 2 of document 1"),
        ([[1, -1]], "documents: -1 .* token 1 of document 0"),
    ],
)
def test_bad_documents_are_named(documents, message):
    config = NGramConfig(9, 0, 3)
    tree = ngram.count([[1, 2, 3]], config)
    for call in (lambda: ngram.count(documents, config), lambda: ngram.score(config, tree, documents)):
        with pytest.raises(ConfigError, match=message):
            call()
