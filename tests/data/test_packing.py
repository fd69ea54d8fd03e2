"""The windows against a Python twin that goes token by token."""

import numpy as np
import pytest

from xylem.data import packing


def slow_pack(documents, length, end_of_text):
    """(tokens, segments) of each window, by the definition."""
    stream = [(token, number) for number, ids in enumerate(documents) for token in [end_of_text, *ids]]
    windows = []
    for start in range(0, max(len(stream) - 1, 0), length):
        part = stream[start : start + length + 1]
        numbers = [number - part[0][1] + 1 for _, number in part]
        missing = length + 1 - len(part)
        windows.append(([token for token, _ in part] + [end_of_text] * missing, numbers + [0] * missing))
    return windows


@pytest.mark.parametrize("block", [1, 50, 1 << 18])
@pytest.mark.parametrize("length", [1, 7, 33])
def test_packing_equals_its_slow_twin(block, length, rng_seed, monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK", block)
    rng = np.random.default_rng(rng_seed)
    documents = [rng.integers(0, 900, n).astype(np.int32) for n in rng.integers(0, 60, 40)]
    packed = [row for tokens, of in packing.pack(iter(documents), length, 7) for row in zip(tokens, of, strict=True)]
    expected = slow_pack(documents, length, 7)
    assert len(packed) == len(expected)
    for (tokens, segments), (want_tokens, want_segments) in zip(packed, expected, strict=True):
        assert tokens.dtype == segments.dtype == np.int32
        assert tokens.tolist() == want_tokens
        assert segments.tolist() == want_segments


@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("total", [2, 13, 24, 25, 26])
def test_every_token_but_the_first_is_a_label_once(length, total, monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK", 4)
    ids = np.arange(1, total, dtype=np.int32)  # with the opening 0: total tokens, all distinct
    labels = []
    for tokens, segments in packing.pack([ids], length, 0):
        labels += tokens[:, 1:][segments[:, 1:] > 0].tolist()
    assert labels == list(range(1, total))


def test_the_last_token_of_a_document_predicts_the_opening_of_the_next():
    documents = [np.array([5, 6], np.int32), np.array([8], np.int32)]
    ((tokens, segments),) = packing.pack(documents, 4, 0)
    assert tokens.tolist() == [[0, 5, 6, 0, 8]]
    assert segments.tolist() == [[1, 1, 1, 2, 2]]


def test_a_stream_without_a_label_gives_nothing():
    assert list(packing.pack([], 3, 0)) == []
    assert list(packing.pack([np.array([], np.int32)], 3, 0)) == []


def test_memory_does_not_grow_with_the_stream(monkeypatch):
    import tracemalloc

    monkeypatch.setattr(packing, "_BLOCK", 1000)
    document = np.ones(100, np.int32)

    def peak(count):
        tracemalloc.start()
        for _ in packing.pack((document for _ in range(count)), 16, 0):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(100)
    assert peak(3000) < 1.5 * peak(300)
