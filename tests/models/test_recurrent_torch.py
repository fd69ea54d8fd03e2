"""RNN, LSTM and GRU against torch's, forward and back through time, each with a fault that the comparison catches."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from operations import apart, normal

from xylem.models import cells, rnn
from xylem.models.recurrent import RecurrentLM
from xylem.models.settings import Compute
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import truncated

pytestmark = pytest.mark.oracle

CELL = pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
BAR = 1e-6
FAULTS = {
    "rnn": "recurrent kernel transposed",
    "lstm": "input and forget gates exchanged",
    "gru": "reset and update gates exchanged",
}


def gradient(parameter):
    return parameter.grad


class Reference:
    """A torch network of random sizes and weights, in float64, and the same tree of ours."""

    def __init__(self, cell: str, rng: np.random.Generator):
        import torch

        self.cell, self.layers = cell, int(rng.integers(2, 4))
        self.width, self.vocab = 2 * int(rng.integers(3, 8)) + 1, 2 * int(rng.integers(10, 20)) + 1
        kind = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell]
        self.embed = torch.nn.Embedding(self.vocab, self.width, dtype=torch.float64)
        self.stack = kind(self.width, self.width, self.layers, batch_first=True, dtype=torch.float64)
        self.head = torch.nn.Linear(self.width, self.vocab, bias=False, dtype=torch.float64)
        self.parameters = [p for part in (self.embed, self.stack, self.head) for p in part.parameters()]
        with torch.no_grad():
            for parameter in self.parameters:
                # Below a spectral radius of 1, beyond which an RNN is chaotic and any rounding grows.
                std = 0.3 if parameter.ndim == 1 else 0.7 * self.width**-0.5
                drawn = std * rng.standard_normal(parameter.shape).astype(np.float32)
                parameter.copy_(torch.from_numpy(drawn))

    def cell_tree(self, of: Any = lambda parameter: parameter.detach()) -> dict:
        """Our tree of ``of(parameter)``, of the recurrent weights alone."""
        named = lambda name: [of(getattr(self.stack, f"{name}_l{i}")).numpy() for i in range(self.layers)]  # noqa: E731
        stacked = lambda name: jnp.asarray(np.stack(named(name)), jnp.float32)  # noqa: E731
        return {
            ours: {"kernel": stacked(f"weight_{theirs}").mT, "bias": stacked(f"bias_{theirs}")}
            for ours, theirs in (("input", "ih"), ("recurrent", "hh"))
        }

    def tree(self, of: Any = lambda parameter: parameter.detach()) -> dict:
        """Our tree of ``of(parameter)``."""
        return {
            "embed": {"embedding": jnp.asarray(of(self.embed.weight).numpy(), jnp.float32)},
            "layers": {"cell": self.cell_tree(of)},
            "head": {"kernel": jnp.asarray(of(self.head.weight).numpy(), jnp.float32).T},
        }

    def faulty(self, params: dict) -> dict:
        """The tree with the cell's fault."""

        def exchanged(path, weight):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if "cell" not in name or (self.cell == "rnn" and not name.endswith("recurrent/kernel")):
                return weight
            if self.cell == "rnn":
                return weight.mT
            first, second, *others = jnp.split(weight, weight.shape[-1] // self.width, axis=-1)
            return jnp.concatenate([second, first, *others], axis=-1)

        return jax.tree_util.tree_map_with_path(exchanged, params)

    def module(self, **values) -> RecurrentLM:
        return RecurrentLM(replace(rnn.recurrent(self.cell, self.layers, self.width, self.vocab, 64), **values))


@CELL
@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_recurrent_stack_equals_torch_through_time(cell, kernels, rng_seed, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    reference = Reference(cell, rng)
    batch, length = int(rng.integers(2, 5)), int(rng.integers(11, 20))
    x = normal(rng, batch, length, reference.width)
    cotangent = normal(rng, batch, length, reference.width)
    theirs = torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
    out, _ = reference.stack(theirs)
    out.backward(torch.tensor(np.asarray(cotangent), dtype=torch.float64))
    expected = out.detach().numpy(), reference.cell_tree(gradient), theirs.grad.numpy()

    module = reference.module(compute=Compute(kernels=kernels, layers="scan" if kernels == "plain" else "auto"))

    @jax.jit
    def run(params, x):
        hidden = lambda p, x: module.apply({"params": p}, jnp.zeros(x.shape[:2], jnp.int32), embeddings=x).hidden  # noqa: E731
        out, pull = jax.vjp(hidden, params, x)
        slope, dx = pull(cotangent)
        return out, slope["layers"]["cell"], dx

    params = reference.tree()
    assert apart(run(reference.faulty(params), x), expected) > BAR
    error = apart(run(params, x), expected)
    row = f"{cell.upper()}, {kernels}: outputs and gradients through time"
    proof(row, f"torch.nn.{type(reference.stack).__name__}, float64", error, BAR, rng_seed, FAULTS[cell])


@CELL
def test_truncated_back_propagation_equals_torch_detached_between_windows(cell, rng_seed, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    reference = Reference(cell, rng)
    batch, length, windows = 3, 7, 3
    tokens = rng.integers(0, reference.vocab, (batch, windows * length + 1)).astype(np.int32)
    cut = [jnp.asarray(tokens[:, i * length : (i + 1) * length + 1]) for i in range(windows)]
    state, expected = None, []
    for window in cut:
        for parameter in reference.parameters:
            parameter.grad = None
        ids = torch.tensor(np.asarray(window, np.int64))
        out, state = reference.stack(reference.embed(ids[:, :-1]), state)
        logits = reference.head(out).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
        loss.backward()
        expected.append((loss.detach().numpy(), reference.tree(gradient)))
        state = tuple(s.detach() for s in state) if cell == "lstm" else state.detach()

    module, params = reference.module(), reference.tree()

    @partial(jax.jit, static_argnames="stopped")
    def losses_and_gradients(params, stopped=True):
        def window_loss(params, cache, window):
            batch = {"tokens": window[:, :-1], "labels": window[:, 1:], "weights": jnp.ones((3, length))}
            sums, cache = truncated(module, ObjectiveConfig(), params, batch, cache)
            return sums.loss, cache

        cache, found = module.init_cache(batch, length), []
        for window in cut:
            start = cache if stopped else module.init_cache(batch, length)
            (loss, cache), slope = jax.value_and_grad(window_loss, has_aux=True)(params, start, window)
            found.append((loss, slope))
        return found

    assert apart(losses_and_gradients(params, stopped=False), expected) > 1e-5
    error = apart(losses_and_gradients(params), expected)
    row = f"{cell.upper()}: truncated back-propagation, losses and gradients of {windows} windows"
    proof(row, "torch, states detached between windows", error, 1e-5, rng_seed, "every window from the zero state")


@CELL
def test_gradient_flow_equals_the_jacobians_of_torch(cell, rng_seed, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    width, inputs, batch, length = 5, 3, 2, 8
    kind = {"rnn": torch.nn.RNNCell, "lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}[cell]
    theirs = kind(inputs, width, dtype=torch.float64)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.from_numpy(0.5 * rng.standard_normal(parameter.shape)))
    x = rng.standard_normal((batch, length, inputs))

    def last(hidden, rest, xs):
        """The last hidden state from a state on; of one row."""
        state = (hidden, rest) if cell == "lstm" else hidden
        for row in xs:
            state = theirs(torch.tensor(row), state)
        return state[0] if cell == "lstm" else state

    expected = np.zeros((batch, length))
    for b in range(batch):
        state = (
            (torch.zeros(width, dtype=torch.float64),) * 2
            if cell == "lstm"
            else torch.zeros(width, dtype=torch.float64)
        )
        for t in range(length):
            state = theirs(torch.tensor(x[b, t]), state)
            hidden, rest = state if cell == "lstm" else (state, None)
            jacobian = torch.autograd.functional.jacobian(partial(last, rest=rest, xs=x[b, t + 1 :]), hidden)
            expected[b, length - 1 - t] = 0.5 * np.log10((jacobian.detach().numpy() ** 2).sum() / width)
    array = lambda parameter: jnp.asarray(parameter.detach().numpy(), jnp.float32)  # noqa: E731
    weights = {
        ours: {"kernel": array(getattr(theirs, f"weight_{name}")).T, "bias": array(getattr(theirs, f"bias_{name}"))}
        for ours, name in (("input", "ih"), ("recurrent", "hh"))
    }
    run = jax.jit(partial(cells.gradient_flow, cell))
    weights_without = {**weights, "input": {**weights["input"], "bias": weights["input"]["bias"] + 0.5}}
    off = lambda weights: float(np.max(np.abs(run(weights, jnp.asarray(x, jnp.float32)) - expected)))  # noqa: E731
    assert off(weights_without) > 1e-4
    row = f"{cell.upper()}: log10 of ||d h_T / d h_t||"
    proof(row, "torch's Jacobians of torch's cell, absolute", off(weights), 1e-5, rng_seed, "biases half too large")
