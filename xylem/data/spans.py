"""The data of T5 (1910.10683): span corruption and its inverse, inputs that name their task, and mixing rates."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int, Int32

from xylem.data import corruption
from xylem.errors import ConfigError


def span_corruption(
    tokens: Int32[np.ndarray, " T"],
    rng: np.random.Generator,
    vocab_size: int,
    eos: int,
    noise_density: float = 0.15,
    mean_span: float = 3.0,
    sentinels: int = 100,
) -> tuple[Int32[np.ndarray, " _"], Int32[np.ndarray, " _"]]:
    """Take spans out of a text (inputs) and list them (targets), each announced by one sentinel in both.

    Spans of text and of noise alternate: round(noise_density * T) noise tokens in round(noise / mean_span) spans, both
    at least 1, and all ways to cut are equally likely (sections 3.1.4 and 3.3.4). As in T5's own code
    (``random_spans_noise_mask`` of github.com/google-research/text-to-text-transfer-transformer), text comes first,
    noise last, and no sentinel closes the targets. A text of one token loses nothing.

    Args:
        tokens: the text, without sentinels.
        rng: ``corruption.generator`` of the window.
        vocab_size: its highest ids are the sentinels: number i is vocab_size - 1 - i.
        eos: the id both inputs and targets end with.
        noise_density: share of the tokens taken out.
        mean_span: mean length of a noise span in tokens, at least 1.
        sentinels: how many there are.

    Returns:
        inputs and targets; ``lengths`` gives their sizes, ``rebuild`` the text.

    Raises:
        ConfigError: a density outside 0 to 1, a vocabulary too small, a sentinel in the text, or more spans than
            sentinels.
    """
    _check_vocabulary(vocab_size, sentinels)
    corruption.check_id("eos", eos, vocab_size - sentinels)
    if len(tokens) and tokens.max() >= vocab_size - sentinels:
        allowed = f"a text has ids from 0 to {vocab_size - sentinels - 1}; those above are the sentinels"
        raise ConfigError("token id", int(tokens.max()), allowed)
    noise_tokens, spans = _counts(len(tokens), noise_density, mean_span)
    if spans > sentinels:
        allowed = f"at least {spans}: that many spans come out of {len(tokens)} tokens"
        raise ConfigError("sentinels", sentinels, allowed)
    text, noise = _segments(len(tokens) - noise_tokens, spans, rng), _segments(noise_tokens, spans, rng)
    text_ends, noise_ends = np.cumsum(text), np.cumsum(noise)
    is_noise = np.zeros(len(tokens), bool)
    is_noise[corruption.spread(text_ends + noise_ends - noise, noise)] = True
    kept, taken = tokens[~is_noise], tokens[is_noise]
    marks = np.append(vocab_size - 1 - np.arange(spans), eos)
    inputs = np.insert(kept, np.append(text_ends, len(kept)), marks)
    return inputs, np.insert(taken, np.append(noise_ends - noise, len(taken)), marks)


def rebuild(
    inputs: Int32[np.ndarray, " _"], targets: Int32[np.ndarray, " _"], vocab_size: int, sentinels: int = 100
) -> Int32[np.ndarray, " T"]:
    """The text that ``span_corruption`` took apart, or the one that a model's answer makes of its inputs.

    Args:
        inputs, targets: as ``span_corruption`` gives them, eos at the end.
        vocab_size, sentinels: as there.

    Raises:
        ConfigError: the two do not name the same sentinels in the same order.
    """
    _check_vocabulary(vocab_size, sentinels)
    inputs, targets = inputs[:-1], targets[:-1]
    holes, marks = (np.flatnonzero(ids >= vocab_size - sentinels) for ids in (inputs, targets))
    text, taken = np.split(inputs, holes), np.split(targets, marks)
    if len(taken[0]) or inputs[holes].tolist() != targets[marks].tolist():
        allowed = f"a list of spans behind the sentinels {inputs[holes].tolist()}, in this order"
        raise ConfigError("targets", targets.tolist(), allowed)
    filled = [part[1:] for pair in zip(taken[1:], text[1:], strict=True) for part in pair]
    return np.concatenate([text[0], *filled])


def lengths(inputs_length: int, noise_density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """How many tokens of text fill inputs of ``inputs_length``, eos included, and how long their targets are.

    ``lengths(512)`` is (568, 114): cut texts to 568 tokens, and no row is padded.

    Raises:
        ConfigError: inputs that hold no token, or a density at which they never fill.
    """
    if inputs_length < 2:
        raise ConfigError("inputs_length", inputs_length, "at least 2: one token and eos")
    if noise_density == 1:
        raise ConfigError("noise_density", noise_density, "below 1: inputs of noise alone are never full")

    length = inputs_length - 1
    while sizes(length + 1, noise_density, mean_span)[0] <= inputs_length:
        length += 1
    return length, sizes(length, noise_density, mean_span)[1]


def sizes(length: int, noise_density: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """How long inputs and targets of a text of ``length`` tokens are, eos included: ``sizes(568)`` is (512, 114).

    Raises:
        ConfigError: a density or a mean that is none.
    """
    noise, spans = _counts(length, noise_density, mean_span)
    return length - noise + spans + 1, noise + spans + 1


def count(length: int, noise_density: float = 0.15, mean_span: float = 3.0) -> int:
    """How many spans are taken out of a text of ``length`` tokens, and so how many sentinels it needs."""
    return _counts(length, noise_density, mean_span)[1]


def task_input(task: str, text: str = "", **fields: str) -> str:
    """Inputs that say what to do with them (section 2.4 and appendix D).

    ``task_input("summarize", article)`` is ``summarize: ...``, and ``task_input("mnli", hypothesis=..., premise=...)``
    is ``mnli hypothesis: ... premise: ...``.

    Raises:
        ConfigError: neither a text nor fields, or both.
    """
    if bool(text) == bool(fields):
        raise ConfigError("fields", sorted(fields), "one text, or named fields, and not both")
    return " ".join([task, *(f"{name}: {value}" for name, value in fields.items())]) if fields else f"{task}: {text}"


def mixing_rates(
    sizes: Sequence[int], limit: float = float("inf"), temperature: float = 1.0
) -> Float64[np.ndarray, " _"]:
    """The probability of each task in a mixture (section 3.5.2): min(size, limit)^(1/temperature), normalised.

    Args:
        sizes: examples of each task.
        limit: K, the size above which a task counts no more; infinite gives examples-proportional mixing.
        temperature: 1 changes nothing; the larger, the more alike the rates.

    Raises:
        ConfigError: a size, limit or temperature that is not positive, or no task.
    """
    if not len(sizes) or min(sizes) <= 0:
        raise ConfigError("sizes", list(sizes), "at least one task, each with a positive number of examples")
    if limit <= 0:
        raise ConfigError("limit", limit, "a positive number of examples")
    if temperature <= 0:
        raise ConfigError("temperature", temperature, "a positive number")
    capped = np.minimum(np.asarray(sizes, np.float64), limit)
    rates = (capped / capped.max()) ** (1 / temperature)  # at most 1: no power overflows
    return rates / rates.sum()


def _counts(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """Noise tokens and noise spans of a text; each span has a token, and a token of text before it."""
    corruption.check_fraction("noise_density", noise_density)
    if not mean_span >= 1:
        raise ConfigError("mean_span", mean_span, "a number of tokens, at least 1")
    if length < 2 or noise_density == 0:
        return 0, 0
    noise = min(max(round(length * noise_density), 1), length - 1)
    return noise, min(max(round(noise / mean_span), 1), length - noise)


def _segments(total: int, count: int, rng: np.random.Generator) -> Int[np.ndarray, " N"]:
    """Lengths, at least 1, of ``count`` segments of ``total`` items; all ways to cut are equally likely."""
    if count == 0:
        return np.zeros(0, np.int64)
    cuts = corruption.subset(total - 1, count - 1, rng) + 1
    return np.diff(cuts, prepend=0, append=total)


def _check_vocabulary(vocab_size: int, sentinels: int) -> None:
    if not 0 < sentinels < vocab_size:
        raise ConfigError("sentinels", sentinels, f"at least 1, and fewer than the {vocab_size} ids of the vocabulary")
