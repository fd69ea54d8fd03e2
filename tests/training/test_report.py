"""The end of a run: what is shown first, what is compressed, and by whom."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import SETTINGS, base_of, method_of
from small import random_weights

from xylem import models
from xylem.data import pipeline
from xylem.data.config import DataConfig
from xylem.data.tokenizers import byte_level
from xylem.models.conversion import flatten
from xylem.models.llama import llama
from xylem.models.t5 import t5
from xylem.peft.tree import matrices
from xylem.training import metrics, report
from xylem.training.config import RunConfig
from xylem.training.state import new_state

FINAL = {"step": 1, "validation_loss": 2.0, "validation_perplexity": 7.4, "validation_bits_per_byte": 2.9}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Config and data of a run on a text whose validation split is some 3,000 bytes of several documents."""
    folder = tmp_path_factory.mktemp("report")
    words = np.random.default_rng(5).choice(["sap", "rises", "über", "night", "☃"], (400, 15))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(line)}) + "\n" for line in words))
    data = DataConfig(str(folder / "text.jsonl"), None, "bytes", 16, cache_dir=str(folder / "cache"))
    model = llama(1, 16, 2, 1, 22, 257, 32, rope_theta=777.0, norm_eps=1e-4)
    return RunConfig(model=model, data=data), pipeline.prepare(data, lambda line: None)


@pytest.fixture
def close(run, tmp_path, monkeypatch):
    """Ends the run, without a sample of its own; returns the notes and the summary."""
    config, data = run
    monkeypatch.setattr(report, "sample", lambda *_: "a sample")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"loss": 2.0, **FINAL}) + "\n")

    def closing(notes):
        return report.closing(config, tmp_path, data, models.build(config.model), {}, FINAL, notes.append)

    return closing


def test_report_shows_the_figures_before_it_compresses(close, monkeypatch):
    notes = []
    compress = lambda text: notes.append(f"compressing {len(text)} bytes") or {"xz": 2.5}  # noqa: E731
    monkeypatch.setattr(metrics, "reference_bits_per_byte", compress)
    summary = close(notes)
    bars = "bits per byte of the same text: xz 2.500"
    names = ["validation loss 2.0000", "sample:\na sample", "compressing", bars, "loss curve"]
    assert [note.startswith(name) for note, name in zip(notes, names, strict=True)] == [True] * 5, notes
    assert summary["compressors_bits_per_byte"] == {"xz": 2.5}


def test_report_of_a_long_text_compresses_its_beginning_and_says_so(close, run, tmp_path, monkeypatch):
    text = "".join(run[1].corpus.splits["validation"]()).encode()
    assert len(text) > 2000
    expected = {limit: metrics.reference_bits_per_byte(text[:limit]) for limit in (len(text), 1000)}
    assert expected[1000] != expected[len(text)]
    for limit, of in ((len(text), "the same"), (1000, "the first 0.001 MB of the same")):
        monkeypatch.setattr(report, "REFERENCE_BYTES", limit)
        notes = []
        close(notes)
        assert json.loads((tmp_path / "summary.json").read_text())["compressors_bits_per_byte"] == expected[limit]
        assert any(note.startswith(f"bits per byte of {of} text: ") for note in notes), notes


def test_report_of_another_host_compresses_and_writes_nothing(close, tmp_path, monkeypatch):
    def never(_):
        raise AssertionError("compressed")

    monkeypatch.setattr(metrics, "reference_bits_per_byte", never)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    summary = close(notes := [])
    assert summary == {**FINAL, "sample": "a sample"} and len(notes) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("method", ["lora", "qlora", "bitfit"])
def test_report_counts_what_learns_and_what_its_optimizer_holds(method):
    """Four bits of a number count as one number; Adam holds two of four bytes for each that learns, and its count."""
    family = "bert" if method == "bitfit" else "llama"
    base, config = base_of(family, 3), SETTINGS[method]
    params = method_of(method).graft(base, jax.random.key(0), config)
    learns = method_of(method).trainable(params, config)
    numbers = sum(x.size for x in jax.tree.leaves(base))
    if method == "bitfit":
        learned = sum(x.size for path, x in flatten(base).items() if learns(path, x))
        whole = numbers
    else:
        kernels = matrices(base, config.targets).values()
        learned = sum(x.shape[0] * config.rank * (x.shape[1] + x.shape[2]) for x in kernels)
        whole = numbers + learned
    line = report.learning(new_state(params, optax.adam(0.1), 0, trains=learns))
    assert line.startswith(f"{learned:,} of {whole:,} numbers learn ({100 * learned / whole:.3g}%)")
    assert line.endswith(f" {8 * learned + 4:,} bytes")


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_source_leaves_room_for_what_stands_in_front_of_it(method, rng_seed):
    """As many tokens as the encoder reads without virtual ones: the first of them go."""
    tokenizer, key = byte_level(), jax.random.key(rng_seed)
    module = models.build(t5(1, 12, 2, 6, 20, "1.1", tokenizer.vocab_size, 32))
    base = random_weights(module, key, jnp.zeros((1, 2), jnp.int32))
    params = method_of(method).fold(method_of(method).graft(base, key, SETTINGS[method]))
    source = list(b"the old oak tree sleeps all night long"[:32])
    virtual = SETTINGS[method].length
    shown, _ = report.sample(module, params, tokenizer, source).split("\n", 1)
    assert shown == tokenizer.decode(source[1 - (32 - virtual) :])
    assert report.sample(module, params, tokenizer, source[-5:]).startswith(tokenizer.decode(source[-5:]))
