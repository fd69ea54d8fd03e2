"""N-gram language models: maximum likelihood, Laplace, and interpolated Kneser-Ney, of any order.

A model is a pure function of its tree here too, and the tree is a plain dict of arrays: ``count`` makes it from
documents, ``log_probs``, ``distribution`` and ``score`` read it. In NumPy they compute in float64; given a tree of jax
arrays, the same lines compute in float32 under ``jit`` (``ngram_lm.NGramLM``, for ``generation``). Ids fit 32 bits.

The tree. A *gram* of order k is a token after a context of k - 1 tokens. Contexts have dense ids: those of length m are
the places of ``contexts/m/tokens``, which holds for each context of length m - 1, in rows of sorted tokens, the tokens
seen one farther back; ``contexts/m/starts`` says where each row begins. So a context is walked from its newest token
back, and what was never seen shows where it happens. The grams of order k lie alike in rows, one a context:

    grams/k/starts   (contexts + 1,)  where each context's row begins
    grams/k/tokens   (grams,)         the tokens seen after it, sorted
    grams/k/counts   (grams,)         how often; Kneser-Ney below the top: after how many different tokens
    grams/k/totals   (contexts,)      the sum of each row's counts
    discounts        (order,)         taken from every count; 0 but for Kneser-Ney

Documents. Each begins after ``order - 1`` end-of-text tokens, which are context only, and ends with one, which is
predicted. No context reaches across: an end-of-text token begins a document wherever it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from xylem.errors import ConfigError
from xylem.models.settings import check_choices

Tree = dict[str, Any]

# Of an order whose discount cannot be estimated: what KenLM takes from a count of 1 (lmplz --discount_fallback).
FALLBACK_DISCOUNT = 0.5
CHUNK = 1 << 17  # tokens scored at once: what they need stays in the caches


@dataclass(frozen=True)
class NGramConfig:
    """What is counted and how unseen grams get their share.

    Attributes:
        end_of_text: the id that stands before a document's first token, and that a document ends with.
        order: n; a token is predicted from the n - 1 before it.
        smoothing: ``mle`` divides counts, and a gram never seen has probability 0; ``laplace`` adds one to each count;
            ``kneser_ney`` is the interpolated form (Chen & Goodman 1999, doi:10.1006/csla.1999.0128, section 2.7), of
            which Kneser & Ney 1995 (doi:10.1109/ICASSP.1995.479394) is the backing-off original.
        discount: Kneser-Ney's, at every order; None estimates one for each order from how many grams have a count of
            1 and of 2, n1 / (n1 + 2 n2) (Ney, Essen & Kneser 1994, doi:10.1006/csla.1994.1001).
        base: where Kneser-Ney's recursion ends: in equal shares for all tokens, so that none is impossible, or in the
            undiscounted unigrams, as ``nltk`` does. Chen & Goodman name both (section 2.3).
    """

    family: ClassVar[str] = "ngram"
    max_length: ClassVar[int] = 1 << 30  # contexts are short, texts may be of any length

    vocab_size: int
    end_of_text: int
    order: int = 5
    smoothing: Literal["mle", "laplace", "kneser_ney"] = "kneser_ney"
    discount: float | None = None
    base: Literal["uniform", "unigram"] = "uniform"

    def __post_init__(self):
        check_choices(self)
        for name in ("vocab_size", "order"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "it must be at least 1")
        if not 0 <= self.end_of_text < self.vocab_size:
            raise ConfigError("end_of_text", self.end_of_text, f"ids are 0 to {self.vocab_size - 1}")
        if self.discount is not None and self.smoothing != "kneser_ney":
            raise ConfigError("discount", self.discount, f'it is for "kneser_ney"; "{self.smoothing}" has none')
        if self.discount is not None and not 0 <= self.discount <= 1:
            raise ConfigError("discount", self.discount, "it must lie in [0, 1], or be None to be estimated")


class Score(NamedTuple):
    """The sum over the predicted tokens of a text, in nats, and how many they are."""

    nll: float
    weight: float


# --- counting ---------------------------------------------------------------------------------------------------------


def count(documents: Sequence[Any], config: NGramConfig) -> Tree:
    """The tree of a corpus: every gram of every order up to ``config.order``, counted.

    Args:
        documents: the ids of each document, without end-of-text (as ``Prepared.documents`` gives them).
        config: the model.

    Returns:
        NumPy arrays, int32 but for the float64 ``discounts``.

    Raises:
        ConfigError: there is no document, or an id outside the vocabulary; the message names document and position.
    """
    contexts, tokens = predictions(documents, config)
    # Sorted by context from its newest token back, then by token: at every level what is equal lies together.
    small = np.min_scalar_type(config.vocab_size - 1)  # NumPy sorts 16 bits eight times as fast as 32
    order = np.lexsort([column.astype(small) for column in (tokens, *contexts.T)])
    contexts, tokens = contexts[order], tokens[order]
    tree: Tree = {}
    begins = np.arange(len(tokens)) == 0  # where a context begins; at first there is one, the empty one
    for m in range(1, config.order):
        begins = _add_level(tree, f"contexts/{m}", begins, contexts[:, -m])
    grams = np.flatnonzero(_add_level(tree, f"grams/{config.order}", begins, tokens))
    tree[f"grams/{config.order}/counts"] = np.diff(grams, append=len(tokens)).astype(np.int32)
    for k in range(config.order - 1, 0, -1):
        tree |= _ends(config, tree, k)
    for k in range(1, config.order + 1):
        tree[f"grams/{k}/totals"] = np.add.reduceat(tree[f"grams/{k}/counts"], tree[f"grams/{k}/starts"][:-1])
    return tree | {"discounts": _discounts(config, tree)}


def _add_level(
    tree: Tree, name: str, begins: Bool[np.ndarray, "T"], column: Int[np.ndarray, "T"]
) -> Bool[np.ndarray, "T"]:
    """Part each run of sorted predictions, one a row, by the tokens of ``column``; returns where the parts begin."""
    parts = begins.copy()
    parts[1:] |= column[1:] != column[:-1]
    places = np.flatnonzero(parts)
    tree[f"{name}/starts"] = np.append(np.flatnonzero(begins[places]), len(places)).astype(np.int32)
    tree[f"{name}/tokens"] = column[places]
    return parts


def _ends(config: NGramConfig, tree: Tree, k: int) -> Tree:
    """The grams of order k, which are the ends of those of order k + 1.

    Each counts as often as those it ends; for Kneser-Ney once for each of them, so for each token seen before it.
    """
    row_of = lambda name: np.repeat(np.arange(len(tree[name]) - 1), np.diff(tree[name]))  # noqa: E731
    shorter = row_of(f"contexts/{k}/starts")[row_of(f"grams/{k + 1}/starts")]  # the context without its far end
    counts, tokens = tree[f"grams/{k + 1}/counts"], tree[f"grams/{k + 1}/tokens"]
    weights = np.ones_like(counts) if config.smoothing == "kneser_ney" else counts
    shape = (len(tree[f"contexts/{k}/starts"]) - 1, config.vocab_size)
    ends = csr_array((weights, (shorter, tokens)), shape)  # adds up what falls on one place, and sorts each row
    parts = {"starts": ends.indptr, "tokens": ends.indices, "counts": ends.data}
    return {f"grams/{k}/{name}": array.astype(np.int32) for name, array in parts.items()}


def _discounts(config: NGramConfig, tree: Tree) -> Float[np.ndarray, "O"]:
    """What is taken from every count, by order."""
    discounts = np.zeros(config.order)
    if config.smoothing != "kneser_ney":
        return discounts
    for k in range(1, config.order + 1):
        ones, twos = (np.count_nonzero(tree[f"grams/{k}/counts"] == times) for times in (1, 2))
        estimate = ones / (ones + 2 * twos) if ones and twos else FALLBACK_DISCOUNT
        discounts[k - 1] = estimate if config.discount is None else config.discount
    if config.base == "unigram":
        discounts[0] = 0.0
    return discounts


def predictions(documents: Sequence[Any], config: NGramConfig) -> tuple[Int[np.ndarray, "T C"], Int[np.ndarray, "T"]]:
    """Each token that is predicted of some documents, their ends included, and the C = order - 1 before it.

    Raises:
        ConfigError: as ``count``.
    """
    if not len(documents):
        raise ConfigError("documents", [], "there must be at least one")
    arrays = [np.asarray(document) for document in documents]
    opening = np.array([config.end_of_text], np.int32)
    for number, ids in enumerate(arrays):
        if len(ids) and not (ids.min() >= 0 and ids.max() < config.vocab_size):
            place = int(np.argmax((ids < 0) | (ids >= config.vocab_size)))
            allowed = f"ids are 0 to {config.vocab_size - 1}; this is token {place} of document {number}"
            raise ConfigError("documents", int(ids[place]), allowed)
    stream = np.concatenate([part for ids in arrays for part in (opening, ids.astype(np.int32))] + [opening])
    read, places = stream[None, :-1], np.arange(len(stream) - 1)[None]
    return contexts_at(read, read == config.end_of_text, places, config)[0], stream[1:]


def contexts_at(
    tokens: Int[Any, "B S"], opens: Bool[Any, "B S"], places: Int[Any, "B T"], config: NGramConfig
) -> Int[Any, "B T C"]:
    """The C = order - 1 tokens up to and with each place of a row, the newest last. End-of-text stands for all that
    lies before the latest token that ``opens`` a document, or before the row."""
    xp = tokens.__array_namespace__()
    end_of_text = xp.asarray(config.end_of_text, dtype=tokens.dtype)
    known, columns = xp.ones(places.shape, bool), [xp.zeros((*places.shape, 0), tokens.dtype)]
    for back in range(config.order - 1):
        known, at = known & (places >= back), xp.maximum(places - back, 0)
        column = xp.where(known, xp.take_along_axis(tokens, at, axis=1), end_of_text)
        columns.insert(0, column[..., None])
        known = known & ~xp.take_along_axis(opens, at, axis=1)
    return xp.concatenate(columns, axis=-1)


# --- reading ----------------------------------------------------------------------------------------------------------


def log_probs(
    config: NGramConfig, tree: Tree, contexts: Int[Any, "*#B C"], tokens: Int[Any, "*#B"]
) -> Float[Any, "*B"]:
    """The log-probability of tokens, each after a context of C = order - 1 tokens, the newest last; shapes broadcast.

    Natural logarithms; minus infinity where the probability is 0: under ``mle`` for every gram never seen, so for
    every token after a context never seen; under ``kneser_ney`` with base ``unigram`` for a token never seen.
    """
    return _log(_probabilities(config, tree, contexts, tokens))


def distribution(config: NGramConfig, tree: Tree, contexts: Int[Any, "*B C"]) -> Float[Any, "*B V"]:
    """The probability of every token after each context; they sum to 1.

    It is that of ``log_probs``, except where ``mle`` knows nothing: after a context never seen, the distribution is
    that after the longest end of the context that was. So whatever is sampled from always has a next token.
    """
    every = tree["discounts"].__array_namespace__().arange(config.vocab_size, dtype=np.int32)
    every = every.reshape(*[1] * (contexts.ndim - 1), config.vocab_size)
    return _probabilities(config, tree, contexts[..., None, :], every, shorten=True)


def log_distribution(config: NGramConfig, tree: Tree, contexts: Int[Any, "*B C"]) -> Float[Any, "*B V"]:
    """The natural logarithm of ``distribution``, minus infinity for what it holds impossible."""
    return _log(distribution(config, tree, contexts))


def score(config: NGramConfig, tree: Tree, documents: Sequence[Any]) -> Score:
    """How well documents are predicted, their ends included.

    ``training.evaluate.figures`` makes perplexity and bits per byte of it, as ``Sums(score.nll, score.nll,
    score.weight)``. The packed stream of a split (``data.packing``) has one label less: nothing follows its last
    document.

    Raises:
        ConfigError: as ``count``.
    """
    contexts, tokens = predictions(documents, config)
    parts = [slice(start, start + CHUNK) for start in range(0, len(tokens), CHUNK)]
    nll = -sum(float(log_probs(config, tree, contexts[part], tokens[part]).sum()) for part in parts)
    return Score(nll=nll, weight=float(len(tokens)))


def _log(probabilities: Float[Any, "*B"]) -> Float[Any, "*B"]:
    with np.errstate(divide="ignore"):  # the logarithm of 0 is meant
        return probabilities.__array_namespace__().log(probabilities)


def _probabilities(
    config: NGramConfig, tree: Tree, contexts: Int[Any, "*#B C"], tokens: Int[Any, "*#B"], shorten: bool = False
) -> Float[Any, "*B"]:
    """Probabilities, from the lowest order that matters to the highest. ``shorten`` lets ``mle`` leave out the far end
    of a context never seen; without discounts Kneser-Ney's recursion does just that."""
    xp = tree["discounts"].__array_namespace__()
    recursive = config.smoothing == "kneser_ney" or (config.smoothing == "mle" and shorten)
    row, seen = xp.zeros(contexts.shape[:-1], np.int32), xp.ones(contexts.shape[:-1], bool)
    p = 1.0 / config.vocab_size if recursive else 0.0
    for k in range(1, config.order + 1):
        if k > 1:
            row, there = _find(config, tree, f"contexts/{k - 1}", row, contexts[..., 1 - k])
            seen = seen & there
        if k < config.order and not recursive:
            continue
        starts, discount = tree[f"grams/{k}/starts"], tree["discounts"][k - 1]
        place, there = _find(config, tree, f"grams/{k}", row, tokens)
        times = xp.where(there & seen, tree[f"grams/{k}/counts"][place], 0)
        total = xp.where(seen, tree[f"grams/{k}/totals"][row], 0)
        if config.smoothing == "laplace":
            p = (times + 1) / (total + config.vocab_size)
        else:
            # What the discount takes from each kind of token seen here is given to all, in the proportions of the next
            # shorter context (Chen & Goodman 1999, section 2.7).
            shared = discount * (starts[row + 1] - starts[row]) * p
            p = xp.where(seen, (xp.maximum(times - discount, 0.0) + shared) / xp.maximum(total, 1), p)
    return p


def _find(
    config: NGramConfig, tree: Tree, name: str, row: Int[Any, "*#B"], token: Int[Any, "*#B"]
) -> tuple[Int[Any, "*B"], Bool[Any, "*B"]]:
    """Where a token lies in its row of sorted tokens, and whether it is there (the place is then any valid one).

    A binary search that halves its step, all queries in step: as many array operations as V has bits.
    """
    starts, held = tree[f"{name}/starts"], tree[f"{name}/tokens"]
    xp = held.__array_namespace__()
    last = held.shape[0] - 1
    place, end = starts[row] - 1, starts[row + 1]
    for bit in reversed(range(config.vocab_size.bit_length())):
        probe = place + (1 << bit)
        before = (probe < end) & (held[xp.minimum(probe, last)] < token)
        place = xp.where(before, probe, place)
    place = xp.minimum(place + 1, last)
    return place, (place < end) & (held[place] == token)
