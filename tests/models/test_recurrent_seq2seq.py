"""Encoder-decoders of recurrent cells against torch's layers: logits, gradients, what is written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart, normal

from xylem.models import recurrent_seq2seq

pytestmark = pytest.mark.oracle

BAR = 1e-5
START = 2


class Reference:
    """Two torch layers of one kind, embeddings and a head, float64, and the same tree of ours."""

    def __init__(self, cell: str, rng: np.random.Generator):
        import torch

        kind = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell]
        like = {"dtype": torch.float64}
        width, inputs = 2 * int(rng.integers(3, 7)) + 1, 2 * int(rng.integers(2, 5))
        self.symbols = {"encoder": 11, "decoder": 17}
        self.embed = {side: torch.nn.Embedding(number, inputs, **like) for side, number in self.symbols.items()}
        self.cell = {side: kind(inputs, width, batch_first=True, **like) for side in self.symbols}
        self.head = torch.nn.Linear(width, self.symbols["decoder"], **like)
        self.parts = [*self.embed.values(), *self.cell.values(), self.head]
        with torch.no_grad():
            for parameter in (parameter for part in self.parts for parameter in part.parameters()):
                std = 0.3 if parameter.ndim == 1 else 0.7 * parameter.shape[1] ** -0.5
                parameter.copy_(torch.from_numpy(std * rng.standard_normal(parameter.shape)))

    def logits(self, source: np.ndarray, target: np.ndarray) -> Any:
        """Of one pair, without padding."""
        import torch

        _, state = self.cell["encoder"](self.embed["encoder"](torch.from_numpy(source)[None]))
        hidden, _ = self.cell["decoder"](self.embed["decoder"](torch.from_numpy(target)[None]), state)
        return self.head(hidden)[0]

    def tree(self, of: Any = lambda parameter: parameter.detach()) -> dict:
        """Our tree of ``of(parameter)``."""
        array = lambda parameter: jnp.asarray(of(parameter).numpy(), jnp.float32)  # noqa: E731
        part = lambda layer, name: {  # noqa: E731
            "kernel": array(getattr(layer, f"weight_{name}_l0")).T,
            "bias": array(getattr(layer, f"bias_{name}_l0")),
        }
        sides = {
            side: {
                "embed": {"embedding": array(self.embed[side].weight)},
                "cell": {"input": part(self.cell[side], "ih"), "recurrent": part(self.cell[side], "hh")},
            }
            for side in self.symbols
        }
        sides["decoder"]["head"] = {"kernel": array(self.head.weight).T, "bias": array(self.head.bias)}
        return sides


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_recurrent_encoder_decoder_equals_torch(cell, rng_seed, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    reference = Reference(cell, rng)
    lengths = rng.permutation([3, 5, 8])
    real = (np.arange(8) < lengths[:, None]).astype(np.int32)
    sources, targets = (rng.integers(0, number, (3, length)) for number, length in ((11, 8), (17, 6)))
    cotangent = normal(rng, 3, 6, 17)
    rows = [reference.logits(sources[i, : lengths[i]], targets[i]) for i in range(3)]
    out = torch.stack(rows)
    out.backward(torch.tensor(np.asarray(cotangent), dtype=torch.float64))
    expected = out.detach().numpy(), reference.tree(lambda parameter: parameter.grad)
    ids = jnp.asarray(sources, jnp.int32), jnp.asarray(targets, jnp.int32)

    @jax.jit
    def run(params, segments):
        def logits(params):
            state = recurrent_seq2seq.encode(cell, params, ids[0], segments)
            return recurrent_seq2seq.decode(cell, params, ids[1], state)[0]

        out, pull = jax.vjp(logits, params)
        return out, pull(cotangent)[0]

    params = reference.tree()
    assert apart(run(params, jnp.ones_like(real)), expected) > BAR
    measured = apart(run(params, jnp.asarray(real)), expected)
    proof(
        f"{cell.upper()} encoder-decoder: logits and gradients",
        f"torch.nn.{type(reference.cell['encoder']).__name__}, float64",
        measured,
        BAR,
        rng_seed,
        "padding read",
    )
    written = np.asarray(recurrent_seq2seq.greedy(cell, params, ids[0], jnp.asarray(real), START, 7))
    for source, length, found in zip(sources, lengths, written, strict=True):
        with torch.no_grad():
            scores = reference.logits(source[:length], np.array([START, *found[:-1]])).numpy()
        best = scores.max(-1)
        assert (scores[np.arange(7), found] >= best - 1e-5 * np.abs(scores).max()).all()
