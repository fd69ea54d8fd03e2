"""textgenrnn: a language model that reads its last characters anew, from Keras's file to the text that it writes."""

import builtins
import dataclasses
import json

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart, normal
from oracles import error
from small import apply, init, logits, random_weights
from textgenrnn_files import PROMPTS, drawn, next_characters, real, softmax, write

from xylem.data import tokenizers
from xylem.errors import ConfigError
from xylem.generation.generator import Generator
from xylem.generation.sampling import Sampling, generate
from xylem.models import build, hub, textgenrnn
from xylem.models.leaves import LowRank, materialize
from xylem.models.state_config import WindowedConfig
from xylem.peft import tree
from xylem.training.restore import open_model

BAR = 1e-5
SIGMOID = lambda x: 1.0 / (1.0 + np.exp(-x))  # noqa: E731


class Keras:
    """A NumPy twin in float64 of the Keras model, from the tensors of its file (keras.io, LSTM; textgenrnn, model.py).

    ``converted`` is what Keras makes of cuDNN's kernels before an LSTM layer multiplies by them.
    """

    def __init__(self, tensors: dict, window: int):
        self.tensors = {name: np.float64(value) for name, value in tensors.items()}
        self.window, self.layers = window, sum("recurrent" in name for name in tensors)

    def converted(self, name: str) -> np.ndarray:
        order = "C" if "recurrent" in name else "F"
        turned = [gate.T.reshape(gate.shape, order=order) for gate in np.split(self.tensors[name], 4, axis=1)]
        return np.concatenate(turned, axis=1)

    def lstm(self, number: int, x: np.ndarray) -> np.ndarray:
        kernel, recurrent = (self.converted(f"rnn_{number}/{name}") for name in ("kernel", "recurrent_kernel"))
        bias = np.add(*np.split(self.tensors[f"rnn_{number}/bias"], 2))
        h = c = np.zeros(recurrent.shape[0])
        states = []
        for row in x:
            i, f, candidate, o = np.split(row @ kernel + h @ recurrent + bias, 4)
            c = SIGMOID(f) * c + SIGMOID(i) * np.tanh(candidate)
            h = SIGMOID(o) * np.tanh(c)
            states.append(h)
        return np.array(states)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of what comes behind these ids; zeros stand before too short a text (pad_sequences)."""
        ids = [0] * (self.window - len(ids)) + list(ids)[-self.window :]
        stages = [self.tensors["embedding/embeddings"][ids]]
        for number in range(1, self.layers + 1):
            stages.append(self.lstm(number, stages[-1]))
        states = np.concatenate(stages, axis=1)
        scores = states @ self.tensors["attention/attention_W"][:, 0]
        weights = np.exp(scores - scores.max())
        average = (weights / (weights.sum() + 1e-7)) @ states
        return average @ self.tensors["output/kernel"] + self.tensors["output/bias"]


@pytest.fixture
def case(rng_seed, tmp_path):
    """A small model as it comes from its file, some texts, and the file's tensors."""
    rng = np.random.default_rng(rng_seed)
    tensors = drawn(rng)
    config, params = hub.load(write(tmp_path / "a_weights.hdf5", tensors, max_length=6))
    tokens = jnp.asarray(rng.integers(1, 23, (3, 11)), jnp.int32)
    return build(config), params, tokens, tensors


# --- what it computes -------------------------------------------------------------------------------------------------


def test_every_place_of_a_text_equals_the_twin(case, rng_seed, proof):
    module, params, tokens, tensors = case
    assert (module.config.num_layers, module.config.window, module.config.d_model) == (3, 6, 26)
    twin = Keras(tensors, window=6)
    expected = np.array([[twin.logits(row[: end + 1]) for end in range(11)] for row in np.asarray(tokens)])
    found = logits(module, params, tokens)
    longer = build(dataclasses.replace(module.config, window=7))
    assert error(np.asarray(logits(longer, params, tokens)), expected) > BAR
    row = "LSTM over a window: logits at every place"
    proof(row, "NumPy twin of Keras's formulas", error(np.asarray(found), expected), BAR, rng_seed, "one token more")


def test_documents_in_one_row_do_not_see_each_other(case):
    module, params, tokens, _ = case
    segments = jnp.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11, [1] * 1 + [2] * 2 + [3] * 8])
    packed = logits(module, params, tokens, segments=segments)
    for row, start, stop in ((0, 0, 4), (0, 4, 9), (1, 0, 11), (2, 1, 3), (2, 3, 11)):
        alone = logits(module, params, tokens[row : row + 1, start:stop])
        np.testing.assert_allclose(packed[row, start:stop], alone[0], rtol=1e-5, atol=1e-5)
    other = tokens.at[:, :3].set(tokens[:, :3] % 22 + 1)
    changed = logits(module, params, other, segments=segments)
    np.testing.assert_array_equal(packed[0, 4:9], changed[0, 4:9])
    assert apart(packed[0, :4], changed[0, :4]) > 0


def test_a_cache_gives_what_the_whole_text_gives(case):
    module, params, tokens, _ = case
    whole = logits(module, params, tokens)
    lengths = jnp.array([3, 5, 2])
    real = (jnp.arange(5)[None] < lengths[:, None]).astype(jnp.int32)
    prompt = jnp.where(real > 0, tokens[:, :5], 9)  # what stands for padding must leave no trace
    out = apply(module, params, prompt, segments=real, cache=module.init_cache(3, 14))
    step = lambda cache, at: apply(module, params, tokens[jnp.arange(3), at][:, None], cache=cache)  # noqa: E731
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out.logits[row, :length], whole[row, :length], rtol=1e-5, atol=1e-5)
    cache, at = out.cache, lengths
    for _ in range(4):
        out = step(cache, at)
        np.testing.assert_allclose(out.logits[:, 0], whole[jnp.arange(3), at], rtol=1e-5, atol=1e-5)
        cache, at = out.cache, at + 1
    again = step(cache.rewind(lengths + 1), lengths + 1)
    np.testing.assert_allclose(again.logits[:, 0], whole[jnp.arange(3), lengths + 1], rtol=1e-5, atol=1e-5)
    picked = step(cache.select(jnp.array([2, 2, 0])), at)  # rows 0 and 1 now continue the text of row 2
    assert cache.capacity == 14 and picked.cache.lengths.tolist() == [7, 7, 8]
    expected = logits(module, params, jnp.concatenate([tokens[2, :6], tokens[0, 7:8]])[None])[0, -1]
    np.testing.assert_allclose(picked.logits[0, 0], expected, rtol=1e-5, atol=1e-5)


def test_greedy_text_is_the_twins_whatever_its_neighbours(case):
    module, params, tokens, tensors = case
    prompts = [np.asarray(row[: 2 + 3 * i]).tolist() for i, row in enumerate(tokens)]
    written = generate(module, params, prompts, Sampling(max_new_tokens=9, temperature=0.0), jax.random.key(0)).tokens
    twin = Keras(tensors, window=6)
    for prompt, found in zip(prompts, written, strict=True):
        for token in found.tolist():
            scores = twin.logits(prompt)
            assert scores[token] >= scores.max() - 1e-4 * np.abs(scores).max()
            prompt.append(token)


def test_fresh_weights_and_operations_are_counted():
    config = WindowedConfig("textgenrnn", 23, 64, 6, 2, 5, 7)
    module = build(config)
    params = init(module, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    # 6 a weight: every layer and the attention once a token of the window, the head once.
    layers = params["lstm_0"], params["lstm_1"]
    read = sum(one[part]["kernel"].size for one in layers for part in ("input", "recurrent"))
    read += params["attention"]["kernel"].size
    assert config.train_flops_per_token(64) == 6 * (6 * read + params["head"]["kernel"].size)
    # keras.io: embedding, LSTM (two biases, as cuDNN has them), attention, dense.
    first, second = 4 * 7 * (5 + 7 + 2), 4 * 7 * (7 + 7 + 2)
    assert tree.count(params) == 23 * 5 + first + second + 19 + (19 + 1) * 23
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    assert np.isfinite(logits(module, random_weights(module, jax.random.key(1), tokens), tokens)).all()
    with pytest.raises(ValueError, match="no token types"):
        apply(module, params, tokens, token_types=tokens)
    with pytest.raises(ValueError, match="looks them up itself"):
        apply(module, params, tokens, embeddings=jnp.zeros((1, 8, 5)))
    with pytest.raises(ConfigError, match="window: 0"):
        dataclasses.replace(config, window=0)


def test_weights_that_are_no_arrays_multiply_as_what_they_stand_for(case, rng_seed, proof):
    module, params, tokens, _ = case
    rng = np.random.default_rng(rng_seed)

    def graft(weight):
        if weight.ndim < 2:
            return weight
        a, b = normal(rng, weight.shape[0], 2, std=0.5), normal(rng, 2, weight.shape[1], std=0.5)
        return LowRank(base=weight, a=a, b=b, scale=jnp.float32(0.7))

    grafted = jax.tree.map(graft, params)
    expected = logits(module, materialize(grafted), tokens)
    assert apart(logits(module, params, tokens), expected) > BAR
    measured = apart(logits(module, grafted, tokens), expected)
    row = "leaf: low rank on every matrix (LSTM over a window)"
    proof(row, "the same matrices, multiplied out", measured, BAR, rng_seed, "the low-rank part left out")


# --- its file ---------------------------------------------------------------------------------------------------------


def test_a_file_that_holds_something_else_is_refused(rng_seed, tmp_path, monkeypatch):
    file, tensors = tmp_path / "a_weights.hdf5", drawn(np.random.default_rng(rng_seed))

    def refused(match: str, *lacking: str, more=None, **settings) -> None:
        kept = {name: value for name, value in tensors.items() if name not in lacking}
        write(file, {**kept, **(more or {})}, **settings)
        with pytest.raises(ConfigError, match=match):
            hub.load(file)

    refused("it is no textgenrnn: it lacks or misshapes 'embedding/embeddings'", "embedding/embeddings")
    refused("lacks output/bias", "output/bias")
    refused("no place for context_output/kernel", more={"context_output/kernel": tensors["output/kernel"]})
    # A plain LSTM's file has half the biases, and kernels that lie otherwise.
    refused(r"rnn_1/bias .* has this shape", more={f"rnn_{i}/bias": tensors["rnn_1/bias"][:28] for i in (1, 2, 3)})
    refused("four gates", more={"rnn_1/recurrent_kernel": tensors["rnn_1/recurrent_kernel"][:, :21]})
    refused("only float32", more={"output/bias": np.float64(tensors["output/bias"])})
    refused("rnn_bidirectional: True", rnn_bidirectional=True)
    refused("max_length: 0", max_length=0)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="no whole HDF5 file"):
        hub.load(file)
    with pytest.raises(ConfigError, match="no such file"):
        hub.load(tmp_path / "absent.hdf5")
    whole = builtins.__import__

    def without(name, *rest):
        if name == "h5py":
            raise ImportError(name)
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="takes h5py, which is not installed: pip install"):
        hub.load(file)


def test_weights_in_another_file_are_not_followed(rng_seed, tmp_path):
    file, tensors = tmp_path / "a_weights.hdf5", drawn(np.random.default_rng(rng_seed))
    bias = tensors.pop("output/bias")
    (tmp_path / "other").write_bytes(bias.tobytes())
    write(file, tensors)
    with h5py.File(file, "a") as written:
        elsewhere = [(str(tmp_path / "other"), 0, bias.nbytes)]
        written.create_dataset("output/output/bias:0", bias.shape, "f4", external=elsewhere)
    with pytest.raises(ConfigError, match="inside the file"):
        hub.load(file)


def test_characters_are_those_listed_beside_the_weights(tmp_path):
    weights = write(tmp_path / "a_weights.hdf5", {"x/y": np.zeros(1, np.float32)})
    listed = tmp_path / "a_vocab.json"
    listed.write_text(json.dumps({"b": 1, "<s>": 4, "\N{SNOWMAN}": 2, " ": 3}))
    tokenizer = tokenizers.load(weights)
    assert tokenizer.encode("b \N{SNOWMAN}z<s>").tolist() == [1, 3, 2, 0, 0, 0, 0]
    assert tokenizer.decode([1, 3, 2]) == "b \N{SNOWMAN}" and tokenizer.vocab_size == 5
    assert tokenizer.begin_of_text == tokenizer.end_of_text == 4 and tokenizer.stop == (4,)
    for wrong in ({"b": 1, "<s>": 3}, {"b": 1}, {"<s>": 1, "b": "2"}, {"<s>": 1, "b": 1}):
        listed.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=r"a_vocab\.json"):
            tokenizers.load(weights)
    listed.unlink()
    with pytest.raises(ConfigError, match=r"a_vocab\.json"):
        tokenizers.load(weights)


# --- the real one -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_textgenrnn_says_what_keras_would(rng_seed, proof, monkeypatch):
    tensors = real()
    ids, found = next_characters(open_model("textgenrnn"), rng_seed)
    twin = Keras(tensors, textgenrnn.WINDOW)
    expected = softmax(np.array([twin.logits(row) for row in ids]))
    measured = error(found, expected)
    monkeypatch.setattr(textgenrnn, "from_cudnn", lambda kernel: kernel)
    assert error(next_characters(open_model("textgenrnn"), rng_seed)[1], expected) > BAR
    row = "textgenrnn: probabilities of the next character"
    proof(row, "NumPy twin of Keras's formulas", measured, BAR, rng_seed, "cuDNN's kernels taken for Keras's")


@pytest.mark.slow
def test_textgenrnn_writes_what_its_reference_writes():
    module, params, tokenizer, *_ = open_model("textgenrnn")
    written = Generator(module, params, tokenizer)(PROMPTS, Sampling(max_new_tokens=60, temperature=0.0))
    # Written by Keras 2.21 (tf_keras) from the same file, through its own conversion.
    assert PROMPTS[0] + written[0] == (
        "The president of the United States of the World Was Started To Be The World That Have An Art"
    )
    twin = Keras(real(), textgenrnn.WINDOW)
    for prompt, text in zip(PROMPTS, written, strict=True):
        ids, new = [tokenizer.begin_of_text, *tokenizer.encode(prompt).tolist()], []
        while len(new) < 60 and (best := int(np.argmax(twin.logits(ids)))) != tokenizer.end_of_text:
            new.append(best)
            ids.append(best)
        assert tokenizer.decode(new) == text
