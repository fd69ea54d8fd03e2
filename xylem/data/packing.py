"""One stream of tokens, cut into windows of equal length without losing or repeating a label.

Documents are laid end to end, each opened by end-of-text. Window w holds tokens wT .. wT+T of the stream, T+1 of them,
of which it shares the last with its successor: inputs are the first T, labels the last T. So every token of the stream
but the very first is a label exactly once, the label of a document's last token is the end-of-text that opens the
next, and no label is ever masked but padding.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int32

# Tokens gathered before windows are cut: large enough that NumPy, not Python, does the work.
_BLOCK = 1 << 18


def pack(
    documents: Iterable[Int32[np.ndarray, " _"]], length: int, end_of_text: int
) -> Iterator[tuple[Int32[np.ndarray, "W T1"], Int32[np.ndarray, "W T1"]]]:
    """Windows of a stream of documents, some hundreds at a time; memory does not grow with the stream.

    Args:
        documents: the ids of each document, without end-of-text.
        length: T.
        end_of_text: the id that opens each document; it also fills the padding.

    Yields:
        tokens and segments, both (W, T+1). Segments number the documents of each window 1, 2, ...; padding, which only
        the stream's last window can have, is 0. A stream of fewer than 2 tokens has no label and gives nothing.
    """
    opening = np.array([end_of_text], np.int32)
    tokens, ordinals, gathered = [], [], 0
    for ordinal, document in enumerate(documents):
        tokens += [opening, document]
        ordinals.append(np.full(len(document) + 1, ordinal, np.int64))
        gathered += len(document) + 1
        if gathered > max(_BLOCK, length):
            stream, ordinal_of = np.concatenate(tokens), np.concatenate(ordinals)
            whole = (gathered - 1) // length
            yield _windows(stream, ordinal_of, length, whole)
            # Copies: a view would keep the whole block alive.
            tokens, ordinals = [stream[whole * length :].copy()], [ordinal_of[whole * length :].copy()]
            gathered -= whole * length
    if gathered < 2:
        return
    stream, ordinal_of = np.concatenate(tokens), np.concatenate(ordinals)
    count = -(-(gathered - 1) // length)
    padding = count * length + 1 - gathered
    padded = np.pad(stream, (0, padding), constant_values=end_of_text)
    windows, segments = _windows(padded, np.pad(ordinal_of, (0, padding), mode="edge"), length, count)
    segments[-1, length + 1 - padding :] = 0
    yield windows, segments


def _windows(stream: np.ndarray, ordinal_of: np.ndarray, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``count`` windows, and the documents of each numbered from 1."""
    places = np.arange(count)[:, None] * length + np.arange(length + 1)
    ordinals = ordinal_of[places]
    return stream[places], (ordinals - ordinals[:, :1] + 1).astype(np.int32)
