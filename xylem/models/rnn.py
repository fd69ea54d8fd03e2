"""RNN, LSTM and GRU language models of any size, as settings of one config.

Word or character in, a stack of recurrent layers, next word or character out (Mikolov et al. 2010, "Recurrent neural
network based language model"; with LSTM cells Zaremba et al. 1409.2329).
"""

from __future__ import annotations

from typing import Literal

from xylem.models.state_config import RecurrentConfig, RecurrentInitializers


def recurrent(
    cell: Literal["rnn", "lstm", "gru"], num_layers: int, d_model: int, vocab_size: int, max_length: int
) -> RecurrentConfig:
    """A recurrent language model with an output matrix of its own.

    Kernels start with the spread of torch's, uniform within 1 / sqrt(D), but normal; the embedding with 1, as torch's
    (torch.nn.RNN and torch.nn.Embedding, "Variables"). The forget gate of an LSTM starts open, with a bias of 1
    (Jozefowicz et al. 2015, "An Empirical Exploration of Recurrent Network Architectures", section 2.2).
    """
    return RecurrentConfig(
        family="recurrent",
        cell=cell,
        vocab_size=vocab_size,
        max_length=max_length,
        num_layers=num_layers,
        d_model=d_model,
        head="untied",
        forget_bias=1.0 if cell == "lstm" else None,
        init=RecurrentInitializers(embedding=1.0, kernel=(3 * d_model) ** -0.5, recurrent=(3 * d_model) ** -0.5),
    )


def rnn(num_layers: int, d_model: int, vocab_size: int, max_length: int) -> RecurrentConfig:
    """Elman's network."""
    return recurrent("rnn", num_layers, d_model, vocab_size, max_length)


def lstm(num_layers: int, d_model: int, vocab_size: int, max_length: int) -> RecurrentConfig:
    """Long short-term memory."""
    return recurrent("lstm", num_layers, d_model, vocab_size, max_length)


def gru(num_layers: int, d_model: int, vocab_size: int, max_length: int) -> RecurrentConfig:
    """Gated recurrent units."""
    return recurrent("gru", num_layers, d_model, vocab_size, max_length)
