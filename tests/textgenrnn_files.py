"""What the tests of textgenrnn share: files as Keras 2 writes them, random and real, and texts to read with them."""

import json
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np

from xylem.data.pretrained import pretrained

PROMPTS = [
    "The president of the United Stat",
    "My cat",
    "",
    "TIL that",
    "A naïve test in 東京 of \N{SNOWMAN} here",
]


def write(file: Path, tensors: dict, **settings) -> Path:
    """A file as Keras 2 writes it, and the settings beside it."""
    with h5py.File(file, "w") as written:
        for name, value in tensors.items():
            layer, own = name.split("/")
            written[f"{layer}/{layer}/{own}:0"] = value
    if settings:
        file.with_name(file.name.replace("weights.hdf5", "config.json")).write_text(json.dumps(settings))
    return file


def drawn(rng: np.random.Generator, vocab: int = 23, embedding: int = 5, width: int = 7, layers: int = 3) -> dict:
    """Random tensors of such a file."""
    array = lambda *shape: (1.5 * shape[0] ** -0.5 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    tensors = {"embedding/embeddings": array(vocab, embedding) * vocab**0.5}
    for number in range(1, layers + 1):
        tensors[f"rnn_{number}/kernel"] = array(embedding if number == 1 else width, 4 * width)
        tensors[f"rnn_{number}/recurrent_kernel"] = array(width, 4 * width)
        tensors[f"rnn_{number}/bias"] = array(8 * width)
    average = embedding + layers * width
    more = {"attention/attention_W": array(average, 1), "output/kernel": array(average, vocab)}
    return {**tensors, **more, "output/bias": array(vocab)}


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def real() -> dict:
    """The tensors of the package's file."""
    names = [f"rnn_{i}/{name}" for i in (1, 2) for name in ("kernel", "recurrent_kernel", "bias")]
    names += ["embedding/embeddings", "attention/attention_W", "output/kernel", "output/bias"]
    with h5py.File(pretrained("textgenrnn")) as read:
        return {name: np.asarray(read["{0}/{0}/{1}:0".format(*name.split("/"))]) for name in names}


def texts(rng: np.random.Generator, number: int) -> list[str]:
    """Stretches of our own prose, short ones and some beyond the window."""
    whole = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    starts = rng.integers(0, len(whole) - 60, number)
    return [whole[start : start + length] for start, length in zip(starts, rng.integers(1, 60, number), strict=True)]


def next_characters(model, seed: int) -> tuple[list[list[int]], np.ndarray]:
    """The ids of ``PROMPTS`` and of texts that the seed draws, and ours of the next character of each."""
    drawn = texts(np.random.default_rng(seed), 20)
    ids = [[model.tokenizer.begin_of_text, *model.tokenizer.encode(text).tolist()] for text in [*PROMPTS, *drawn]]
    lengths = np.array([len(row) for row in ids])
    padded = jnp.asarray([row + [0] * (lengths.max() - len(row)) for row in ids], jnp.int32)
    logits = jax.jit(lambda params: model.module.apply({"params": params}, padded).logits)(model.params)
    return ids, softmax(np.float64(logits)[np.arange(len(ids)), lengths - 1])
