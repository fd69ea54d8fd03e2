"""Networks that carry a state from token to token, as values: recurrent cells, alone or over a window, and Mamba."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from xylem.errors import ConfigError
from xylem.models.settings import Compute, check_choices, check_sizes

CELL_GATES = {"rnn": 1, "lstm": 4, "gru": 3}


@dataclass(frozen=True)
class RecurrentInitializers:
    """Standard deviations of the zero-mean normal each kind of weight starts from; biases start at 0.

    ``kernel`` is for what multiplies inputs, the output matrix included, ``recurrent`` for what multiplies states.
    """

    embedding: float
    kernel: float
    recurrent: float


@dataclass(frozen=True)
class RecurrentConfig:
    """A recurrent language model: layers of one kind of cell, each as wide as the embedding.

    Attributes:
        max_length: the longest sequence it is trained on or asked to write, in tokens; no weight depends on it.
        head: ``tied`` reuses the embedding table as output matrix.
        forget_bias: what the bias of an LSTM's forget gate starts at; None for the other cells.
        dropout: rate after the embedding and after every layer, never from step to step (1409.2329, section 3.1).
    """

    family: Literal["recurrent"]
    cell: Literal["rnn", "lstm", "gru"]
    vocab_size: int
    max_length: int
    num_layers: int
    d_model: int
    head: Literal["tied", "untied"]
    forget_bias: float | None
    init: RecurrentInitializers
    dropout: float = 0.0
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self):
        check_choices(self)
        check_sizes(self, "vocab_size", "max_length", "num_layers", "d_model")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError("dropout", self.dropout, "it must lie in [0, 1)")
        if (self.forget_bias is None) == (self.cell == "lstm"):
            raise ConfigError("forget_bias", self.forget_bias, "an LSTM needs a number, the other cells have none")

    def train_flops_per_token(self, sequence_length: int) -> float:
        """Operations of one training step (forward and backward) for one token, whatever the length of its sequence.

            6 x (weights of every matrix product, the output head included, the embedding look-up not)

        One multiply-add is two operations: a weight costs 2 forward and 4 backward.
        """
        layer = 2 * CELL_GATES[self.cell] * self.d_model**2
        return 6.0 * (self.num_layers * layer + self.d_model * self.vocab_size)

    def with_compute(self, compute: Compute) -> RecurrentConfig:
        """The same network, computed otherwise."""
        return replace(self, compute=compute)


@dataclass(frozen=True)
class WindowedConfig:
    """A language model that reads its last few tokens anew for every next one (``windowed.py``).

    Attributes:
        family: whose conventions outside files follow (see ``hub``).
        max_length: the longest sequence that it is asked to write, in tokens; nothing in the network depends on it.
        window: tokens that it reads.
        num_layers: of LSTM cells, each ``d_layer`` wide, over an embedding ``d_embedding`` wide.
    """

    family: Literal["textgenrnn"]
    vocab_size: int
    max_length: int
    window: int
    num_layers: int
    d_embedding: int
    d_layer: int
    compute: Compute = field(default_factory=Compute)

    head: ClassVar = "untied"

    def __post_init__(self):
        check_choices(self)
        check_sizes(self, "vocab_size", "max_length", "window", "num_layers", "d_embedding", "d_layer")

    @property
    def d_model(self) -> int:
        """Width of what the head reads: the embedding and every layer's output, side by side."""
        return self.d_embedding + self.num_layers * self.d_layer

    def train_flops_per_token(self, sequence_length: int) -> float:
        """Operations of one training step (forward and backward) for one token, whatever the length of its sequence.

        6 x (window x weights of every layer and of the attention's scores + weights of the head)
        """
        inputs = self.d_embedding + (self.num_layers - 1) * self.d_layer
        layers = CELL_GATES["lstm"] * self.d_layer * (inputs + self.num_layers * self.d_layer)
        return 6.0 * (self.window * (layers + self.d_model) + self.d_model * self.vocab_size)

    def with_compute(self, compute: Compute) -> WindowedConfig:
        """The same network, computed otherwise."""
        return replace(self, compute=compute)


@dataclass(frozen=True)
class MambaInitializers:
    """How each weight of a Mamba starts. D starts at 1, A at -1, -2, ... -Z in every channel, the other biases at 0.

    Attributes:
        embedding, kernel, selection, residual: standard deviations of zero-mean normals: of the table, of ``input`` and
            ``gate``, of what reads the inner channels (``low``, ``B``, ``C``), of ``output``.
        conv, delta: bounds of uniform draws around 0: of the convolution's kernel and of the step size's.
        delta_min, delta_max, delta_floor: the step sizes at birth are log-uniform between the first two, at least the
            third.
    """

    embedding: float
    kernel: float
    selection: float
    residual: float
    conv: float
    delta: float
    delta_min: float
    delta_max: float
    delta_floor: float


@dataclass(frozen=True)
class MambaConfig:
    """A stack of selective state-space layers (Mamba 2312.00752) with its embedding and head.

    Attributes:
        family: whose conventions outside files follow (see ``hub``).
        max_length: the longest sequence that it is meant for, in tokens; nothing in the network depends on it.
        d_inner: channels of the scan; each has ``state_size`` states.
        conv_width: tokens that the causal convolution in front of the scan sees, the newest included.
        dt_rank: rank of the projection that gives the step sizes.
        discretization: how B becomes discrete: ``euler`` (delta B), as in the released code and weights, or ``zoh``,
            the exact zero-order hold (2312.00752, equation 4). A always is by zero-order hold.
    """

    family: Literal["mamba"]
    vocab_size: int
    max_length: int
    num_layers: int
    d_model: int
    d_inner: int
    state_size: int
    conv_width: int
    dt_rank: int
    discretization: Literal["euler", "zoh"]
    norm_eps: float
    head: Literal["tied", "untied"]
    init: MambaInitializers
    compute: Compute = field(default_factory=Compute)

    norm: ClassVar = "rmsnorm"
    bias: ClassVar = "none"  # of matrices that are like a transformer's; the convolution and the step size have theirs

    def __post_init__(self):
        check_choices(self)
        check_sizes(self, "vocab_size", "max_length", "num_layers", "d_model")
        check_sizes(self, "d_inner", "state_size", "conv_width", "dt_rank")
        if not self.norm_eps > 0.0:
            raise ConfigError("norm_eps", self.norm_eps, "it must be positive")

    def with_compute(self, compute: Compute) -> MambaConfig:
        """The same network, computed otherwise."""
        return replace(self, compute=compute)

    def train_flops_per_token(self, sequence_length: int) -> float:
        """Operations of one training step (forward and backward) for one token, whatever the length of its sequence.

            6 x (weights of every matrix product, the output head included, the embedding look-up not)
          + 3 x layers x d_inner x (7 state_size + 2 conv_width)

        Forward the scan takes 7 operations a state: delta A, its exponential, decay, input, their sum, and C's product
        and sum; the convolution takes 2 a tap. Backward costs twice that. What is recomputed is not counted.
        """
        inner, low = self.d_inner, self.dt_rank
        layer = 3 * self.d_model * inner + 2 * inner * (low + self.state_size)
        weights = self.num_layers * layer + self.d_model * self.vocab_size
        scan = self.num_layers * inner * (7 * self.state_size + 2 * self.conv_width)
        return 6.0 * weights + 3.0 * scan
