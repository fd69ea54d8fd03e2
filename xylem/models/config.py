"""What a network is, as values: frozen, checked once when made, importable without jax.

Constants that differ between families (``rope_theta``, ``norm_eps``, ...) have no default here: a preset names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from xylem.errors import ConfigError
from xylem.models.settings import Compute, check_choices, check_sizes
from xylem.models.state_config import MambaConfig, RecurrentConfig, WindowedConfig

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu"]
GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3.1's stretching of the rotary frequencies (2407.21783, section 3.4.2; llama-models ``apply_scaling``)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_length: int


@dataclass(frozen=True)
class Initializers:
    """Standard deviations of the zero-mean normal each kind of weight starts from; biases start at 0, scales at 1."""

    embedding: float
    positions: float
    kernel: float
    residual: float  # the projections that write into the residual stream


@dataclass(frozen=True)
class PositionConfig:
    """How a network knows the order of its tokens.

    Attributes:
        kind: ``learned`` table; ``sinusoidal`` sums (1706.03762, section 3.5); ``rope``, rotary (2104.09864);
            ``relative``, a learned bias a head and bucket of distances (T5 1910.10683, section 2.1).
        offset: rows of the learned table before position 0 (RoBERTa and BART leave 2 unused).
        rope_theta: base of the rotary frequencies.
        buckets, max_distance: of the relative bias; from ``max_distance`` on all distances share a bucket.
    """

    kind: Literal["learned", "sinusoidal", "rope", "relative", "none"]
    offset: int = 0
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    buckets: int | None = None
    max_distance: int | None = None

    def __post_init__(self):
        check_choices(self)
        if self.offset < 0 or (self.offset and self.kind != "learned"):
            raise ConfigError("positions.offset", self.offset, 'it must be 0, or positive where kind = "learned"')
        if self.kind == "rope" and not (self.rope_theta is not None and self.rope_theta > 0):
            raise ConfigError("positions.rope_theta", self.rope_theta, 'kind = "rope" needs a positive number')
        if self.kind == "relative" and not (self.buckets and self.max_distance and self.buckets < self.max_distance):
            allowed = 'kind = "relative" needs a number of buckets, and a max_distance above it'
            raise ConfigError("positions.buckets", self.buckets, allowed)
        for name, kind in {"rope_theta": "rope", "rope_scaling": "rope", "buckets": "relative"}.items():
            if getattr(self, name) is not None and self.kind != kind:
                raise ConfigError("positions.kind", self.kind, f'{name} is for "{kind}" alone', [kind])


@dataclass(frozen=True)
class AttentionConfig:
    """Who sees whom, and how products become weights.

    Attributes:
        mask: ``causal`` in decoders, ``bidirectional`` in encoders.
        window: every second layer, from the second on, sees only this many tokens, itself included (GPT-3 2005.14165,
            section 2.1: alternating dense and locally banded layers); None for none.
        scale: scores are divided by ``sqrt(head_dim)``, or not at all (T5).
    """

    mask: Literal["causal", "bidirectional"] = "causal"
    window: int | None = None
    scale: Literal["head_dim", "none"] = "head_dim"

    def __post_init__(self):
        check_choices(self)
        if self.window is not None and self.window < 1:
            raise ConfigError("attention.window", self.window, "it must be at least 1, or None")


@dataclass(frozen=True)
class EmbeddingConfig:
    """What happens between token ids and the first layer, beyond a table of ``d_model`` columns.

    Attributes:
        size: columns of the table where they differ from ``d_model``; a projection follows (ALBERT 1909.11942, 3.1).
        token_types: rows of a second table, for the two texts of a pair (BERT); 0 for none.
        norm: whether the network's norm also stands behind the sum of embeddings.
        scale: the look-up is multiplied by this (1706.03762, section 3.4).
    """

    size: int | None = None
    token_types: int = 0
    norm: Literal["absent", "present"] = "absent"
    scale: Literal["none", "sqrt_d_model"] = "none"

    def __post_init__(self):
        check_choices(self)
        if self.size is not None and self.size < 1:
            raise ConfigError("embedding.size", self.size, "it must be at least 1, or None for d_model")
        if self.token_types < 0:
            raise ConfigError("embedding.token_types", self.token_types, "it must not be negative")


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of transformer layers with its embedding and head: every family is a setting of these values.

    Attributes:
        family: whose conventions outside files follow (see ``hub``); the network itself never reads it.
        max_length: the longest sequence, in tokens.
        num_kv_heads: key/value heads; each serves ``num_heads / num_kv_heads`` query heads (GQA 2305.13245).
        activation: ``swiglu`` and ``geglu`` are gated (2002.05202) and have a third matrix.
        norm_position: ``pre``, in front of each sublayer and once at the end, or ``post``, behind each residual sum.
        bias: whether projections carry a bias. LayerNorm always has one, RMSNorm never.
        head: ``tied`` reuses the embedding table as output matrix, ``tied_scaled`` divides states by
            ``sqrt(d_model)`` first (T5 1.0).
        sharing: ``all`` layers have the same weights (ALBERT 1909.11942, section 3.1), or ``none``.
        dropout: rate after the embedding, on attention weights and on both residual branches.
    """

    family: Literal["gpt", "gpt1", "llama", "bert", "roberta", "albert", "transformer", "bart", "t5"]
    vocab_size: int
    max_length: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    activation: Activation
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    positions: PositionConfig
    bias: Literal["everywhere", "none"]
    head: Literal["tied", "untied", "tied_scaled"]
    init: Initializers
    norm_position: Literal["pre", "post"] = "pre"
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    sharing: Literal["none", "all"] = "none"
    dropout: float = 0.0
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self):
        check_choices(self)
        sizes = ("vocab_size", "max_length", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")
        check_sizes(self, *sizes)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("num_kv_heads", self.num_kv_heads, f"it must divide num_heads = {self.num_heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError("dropout", self.dropout, "it must lie in [0, 1)")
        if not self.norm_eps > 0.0:
            raise ConfigError("norm_eps", self.norm_eps, "it must be positive")
        if self.positions.kind == "rope" and self.head_dim % 2:
            raise ConfigError("head_dim", self.head_dim, "rotary positions rotate pairs: it must be even")
        if self.head == "untied" and self.embedding.size is not None:
            raise ConfigError("head", self.head, "a factorised embedding is tied", ["tied"])

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate matrix."""
        return self.activation in GATED

    def with_compute(self, compute: Compute) -> TransformerConfig:
        """The same network, computed otherwise."""
        return replace(self, compute=compute)

    @property
    def embedding_size(self) -> int:
        """Columns of the embedding table."""
        return self.embedding.size or self.d_model

    def train_flops_per_token(self, sequence_length: int, predicted: float = 1.0) -> float:
        """Operations of one training step (forward and backward) for one token of a sequence.

            6 x (weights of every matrix product, the output head included, the embedding look-up not)
          + 6 x layers x sequence_length x heads x head_dim

        One multiply-add is two operations: a weight costs 2 forward and 4 backward. Attention's two products cost
        4 S N H forward for a query that sees S keys; a causal query sees half of the sequence on average; backward
        costs twice that: 3 x 4 x T/2 N H. (PaLM, 2204.02311, appendix B, counts the whole square: 12 L T N H.) In an
        encoder a query does see all of it. Rematerialised products are not counted.

        Args:
            sequence_length: tokens a row.
            predicted: the share of the tokens whose logits are computed.
        """
        return self.layer_flops(sequence_length) + 6.0 * predicted * self.d_model * self.vocab_size

    def layer_flops(self, sequence_length: int) -> float:
        """``train_flops_per_token`` without the head."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.d_model * (2 * query + 2 * kv)
        mlp = (3 if self.gated else 2) * self.d_model * self.d_ff
        seen = sequence_length / 2 if self.attention.mask == "causal" else sequence_length
        return 6.0 * self.num_layers * (attention + mlp) + 12.0 * self.num_layers * seen * query


@dataclass(frozen=True)
class Seq2SeqConfig:
    """An encoder, and a decoder that reads what it made; one embedding table serves both.

    Attributes:
        family: whose conventions outside files follow.
        encoder, decoder: the two stacks. The head is the decoder's.
        decoder_start: the id that stands in front of every target.
    """

    family: Literal["transformer", "bart", "t5"]
    encoder: TransformerConfig
    decoder: TransformerConfig
    decoder_start: int

    def __post_init__(self):
        check_choices(self)
        for name in ("vocab_size", "d_model", "head_dim", "compute"):
            if getattr(self.encoder, name) != getattr(self.decoder, name):
                raise ConfigError(f"decoder.{name}", getattr(self.decoder, name), "it must be the encoder's")
        for side, mask in (("encoder", "bidirectional"), ("decoder", "causal")):
            if getattr(self, side).attention.mask != mask:
                raise ConfigError(f"{side}.attention.mask", getattr(self, side).attention.mask, f"it must be {mask}")
        if not 0 <= self.decoder_start < self.vocab_size:
            raise ConfigError("decoder_start", self.decoder_start, f"an id below vocab_size = {self.vocab_size}")

    @property
    def vocab_size(self) -> int:
        """Rows of the one embedding table."""
        return self.decoder.vocab_size

    @property
    def max_length(self) -> int:
        """The longest target, in tokens."""
        return self.decoder.max_length

    @property
    def d_model(self) -> int:
        """Width of both streams."""
        return self.decoder.d_model

    @property
    def head_dim(self) -> int:
        """Width of a head on both sides."""
        return self.decoder.head_dim

    @property
    def head(self) -> str:
        """Where the output matrix is from: the decoder's ``head``."""
        return self.decoder.head

    @property
    def init(self) -> Initializers:
        """Spreads of the embedding and the head: the decoder's."""
        return self.decoder.init

    @property
    def compute(self) -> Compute:
        """How both sides are computed."""
        return self.decoder.compute

    @property
    def num_layers(self) -> int:
        """Layers of both sides."""
        return self.encoder.num_layers + self.decoder.num_layers

    def train_flops(self, source: int, target: int) -> float:
        """Operations of one training step for one pair of these lengths in tokens, counted as
        ``TransformerConfig.train_flops_per_token`` does; keys and values of the source are made once a layer."""
        decoder = self.decoder
        query, kv = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
        projections = 6.0 * self.d_model * (2 * query * target + 2 * kv * source)
        crossing = decoder.num_layers * (projections + 12.0 * source * target * query)
        own = source * self.encoder.layer_flops(source) + target * decoder.train_flops_per_token(target)
        return own + crossing

    def with_compute(self, compute: Compute) -> Seq2SeqConfig:
        """The same network, computed otherwise."""
        return replace(
            self, encoder=replace(self.encoder, compute=compute), decoder=replace(self.decoder, compute=compute)
        )


ModelConfig = TransformerConfig | Seq2SeqConfig | RecurrentConfig | WindowedConfig | MambaConfig
