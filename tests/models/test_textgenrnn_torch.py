"""A language model over a window against torch's LSTM: logits and gradients, and textgenrnn's own weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart, normal
from oracles import edited, error
from textgenrnn_files import next_characters, real, softmax

from xylem.models import build
from xylem.models.state_config import WindowedConfig
from xylem.training.restore import open_model

pytestmark = pytest.mark.oracle

BAR = 1e-5


class Reference:
    """The network in torch, float64, and the same tree of ours."""

    def __init__(self, vocab: int, window: int, embedding: int, width: int, layers: int):
        import torch

        self.config = WindowedConfig("textgenrnn", vocab, 64, window, layers, embedding, width)
        like = {"dtype": torch.float64}
        self.embed = torch.nn.Embedding(vocab, embedding, **like)
        sizes = [embedding, *[width] * (layers - 1)]
        self.layers = [torch.nn.LSTM(size, width, batch_first=True, **like) for size in sizes]
        self.scores = torch.nn.Linear(self.config.d_model, 1, bias=False, **like)
        self.head = torch.nn.Linear(self.config.d_model, vocab, **like)

    @property
    def parameters(self) -> list:
        return [p for part in (self.embed, *self.layers, self.scores, self.head) for p in part.parameters()]

    def logits(self, tokens: Any) -> Any:
        import torch

        window = self.config.window
        seen = torch.nn.functional.pad(tokens, (window - 1, 0)).unfold(1, window, 1).reshape(-1, window)
        stages = [self.embed(seen)]
        for layer in self.layers:
            stages.append(layer(stages[-1])[0])
        states = torch.cat(stages, -1)
        weights = torch.softmax(self.scores(states), dim=1)  # its sum is 1 to what 1e-7 adds to it
        return self.head((states * weights).sum(1)).reshape(*tokens.shape, -1)

    def tree(self, of: Any = lambda parameter: parameter.detach()) -> dict:
        """Our tree of ``of(parameter)``."""
        array = lambda parameter: jnp.asarray(of(parameter).numpy(), jnp.float32)  # noqa: E731
        part = lambda layer, name: {  # noqa: E731
            "kernel": array(getattr(layer, f"weight_{name}_l0")).T,
            "bias": array(getattr(layer, f"bias_{name}_l0")),
        }
        lstms = {
            f"lstm_{number}": {"input": part(layer, "ih"), "recurrent": part(layer, "hh")}
            for number, layer in enumerate(self.layers)
        }
        head = {"kernel": array(self.head.weight).T, "bias": array(self.head.bias)}
        embed, scores = {"embedding": array(self.embed.weight)}, {"kernel": array(self.scores.weight).T}
        return {"embed": embed, **lstms, "attention": scores, "head": head}


def test_logits_and_gradients_equal_torchs(rng_seed, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    odd = lambda low, high: 2 * int(rng.integers(low, high)) + 1  # noqa: E731
    reference = Reference(odd(9, 15), int(rng.integers(4, 9)), odd(2, 5), odd(3, 7), int(rng.integers(2, 4)))
    with torch.no_grad():
        for parameter in reference.parameters:
            parameter.copy_(torch.from_numpy(rng.standard_normal(parameter.shape) / parameter.shape[-1] ** 0.5))
    tokens = rng.integers(0, reference.config.vocab_size, (3, 11))
    cotangent = normal(rng, 3, 11, reference.config.vocab_size)
    out = reference.logits(torch.from_numpy(tokens))
    out.backward(torch.tensor(np.asarray(cotangent), dtype=torch.float64))
    expected = out.detach().numpy(), reference.tree(lambda parameter: parameter.grad)
    module = build(reference.config)

    @jax.jit
    def run(params):
        out, pull = jax.vjp(lambda p: module.apply({"params": p}, jnp.asarray(tokens, jnp.int32)).logits, params)
        return out, pull(cotangent)[0]

    params = reference.tree()
    measured = apart(run(params), expected)
    flat = {**params, "attention": {"kernel": jnp.zeros_like(params["attention"]["kernel"])}}
    assert apart(run(flat), expected) > BAR
    row = "LSTM over a window: logits and gradients"
    proof(row, "torch.nn.LSTM, float64", measured, BAR, rng_seed, "all states weigh the same")


@pytest.mark.slow
def test_textgenrnn_says_what_torch_says(rng_seed, proof):
    import torch

    tensors, reference = real(), Reference(465, 40, 100, 128, 2)
    reference.embed.load_state_dict({"weight": torch.from_numpy(tensors["embedding/embeddings"])})
    for number, layer in enumerate(reference.layers, 1):
        state = {}
        for name, theirs in (("ih", "kernel"), ("hh", "recurrent_kernel")):
            gates = np.split(tensors[f"rnn_{number}/{theirs}"], 4, axis=1)
            # What cuDNN kept, torch keeps too: a gate's memory is (out, in).
            whole = np.concatenate([gate.ravel().reshape(gate.shape[::-1]) for gate in gates])
            state[f"weight_{name}_l0"] = torch.from_numpy(whole)
        first, second = np.split(tensors[f"rnn_{number}/bias"], 2)
        state |= {"bias_ih_l0": torch.from_numpy(first), "bias_hh_l0": torch.from_numpy(second)}
        layer.load_state_dict(state)
    reference.scores.load_state_dict({"weight": torch.from_numpy(tensors["attention/attention_W"].T)})
    head = {"weight": torch.from_numpy(tensors["output/kernel"].T), "bias": torch.from_numpy(tensors["output/bias"])}
    reference.head.load_state_dict(head)

    model = open_model("textgenrnn")
    ids, found = next_characters(model, rng_seed)
    with torch.no_grad():
        expected = softmax(np.array([reference.logits(torch.tensor([row]))[0, -1].numpy() for row in ids]))
    enter, forget, *others = jnp.split(model.params["lstm_1"]["recurrent"]["kernel"], 4, axis=1)
    exchanged = jnp.concatenate([forget, enter, *others], axis=1)
    faulty = model._replace(params=edited(model.params, **{"lstm_1/recurrent/kernel": exchanged}))
    assert error(next_characters(faulty, rng_seed)[1], expected) > BAR
    row, oracle = "textgenrnn: probabilities of the next character", "torch.nn.LSTM on the same weights"
    proof(row, oracle, error(found, expected), BAR, rng_seed, "input and forget gates exchanged")
