"""What there is to choose in each method, importable without jax.

``targets`` is always a regular expression, searched for in paths like ``layers/attention/query/kernel``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from xylem.errors import ConfigError
from xylem.models.settings import check_choices, check_sizes

# Every matrix inside a layer (QLoRA 2305.14314, figure 2: adapters on all of them matter more than their rank).
LINEAR = r"layers(_\d+)?/.*/kernel"


@dataclass(frozen=True)
class LoRAConfig:
    """A frozen weight W learns as W + scale A B (LoRA 2106.09685).

    Attributes:
        rank: columns of A, rows of B.
        alpha: the sum is scaled by ``alpha / rank``.
        targets: which matrices.
        scaling: ``standard``, or ``stabilized``: by ``alpha / sqrt(rank)`` (rsLoRA 2312.03732, theorem 3.2).
        init: of A. ``kaiming``: uniform within 1 / sqrt(inputs), as microsoft/LoRA draws it; ``gaussian``: normal of
            variance 1 / rank (2106.09685, section 4.1, names a Gaussian). B is zero.
        rate_ratio: B learns so many times faster than A (LoRA+ 2402.12354, section 4.2: about 16).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = LINEAR
    scaling: Literal["standard", "stabilized"] = "standard"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    rate_ratio: float = 1.0
    name: Literal["lora", "dora"] = field(default="lora", kw_only=True)

    def __post_init__(self):
        check_choices(self)
        check_sizes(self, "rank")
        if not self.rate_ratio > 0:
            raise ConfigError("rate_ratio", self.rate_ratio, "it must be positive")

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))


@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """LoRA of the columns' directions, their lengths learned apart (DoRA 2402.09353)."""

    name: Literal["lora", "dora"] = field(default="dora", kw_only=True)


@dataclass(frozen=True)
class QLoRAConfig(LoRAConfig):
    """LoRA beside a base of few bits (QLoRA 2305.14314).

    Attributes:
        kind: of the base: NormalFloat, four-bit floats, or integers of eight bits with one scale a column.
        statistics: the four-bit kinds' scales are quantized too (``double``, section 3) or kept in float32.
        block: rows of a column that share a scale.
        group: scales that share theirs.
    """

    kind: Literal["nf4", "fp4", "int8"] = "nf4"
    statistics: Literal["double", "single"] = "double"
    block: int = 64
    group: int = 256

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, "block", "group")
        if self.block % 2:
            raise ConfigError("block", self.block, "it must be even: two codes share a byte")


@dataclass(frozen=True)
class IA3Config:
    """Activations are stretched by learned vectors ((IA)3 2205.05638, section 3.3).

    A Mamba block has for keys and values what enters its scan, and for inner activations what leaves it.

    Attributes:
        outputs: kernels, as ``targets``; what they give is stretched.
        inputs: kernels; what they are given is stretched.
    """

    outputs: str = r"attention/(key|value)/kernel|mixer/input/kernel"
    inputs: str = r"mlp/down/kernel|mixer/output/kernel"
    name: Literal["ia3"] = field(default="ia3", kw_only=True)


@dataclass(frozen=True)
class AdapterConfig:
    """Small networks behind sublayers.

    Attributes:
        size: width of their middle (1902.00751, section 3.1: 64).
        places: behind ``both`` sublayers (Houlsby 1902.00751, figure 2) or the feed-forward alone, ``mlp`` (Pfeiffer
            2005.00247, section 3.2.3). A Mamba block has one sublayer, which either takes.
        std: of their matrices, cut off at twice that (google-research/adapter-bert, modeling.py).
    """

    size: int = 64
    places: Literal["both", "mlp"] = "both"
    std: float = 1e-3
    name: Literal["adapter"] = field(default="adapter", kw_only=True)

    def __post_init__(self):
        check_choices(self)
        check_sizes(self, "size")
        if self.std < 0:
            raise ConfigError("std", self.std, "it must not be negative")


@dataclass(frozen=True)
class PromptConfig:
    """Learned rows of embeddings in front of every text, an encoder's where there is one (2104.08691).

    Attributes:
        length: how many.
        ids: tokens whose embeddings they begin as, over and over; none are random tokens of the vocabulary.
    """

    length: int = 20
    ids: tuple[int, ...] = ()
    name: Literal["prompt"] = field(default="prompt", kw_only=True)

    def __post_init__(self):
        check_sizes(self, "length")


@dataclass(frozen=True)
class PrefixConfig:
    """Learned keys and values in front of those of every layer (prefix-tuning 2101.00190).

    Attributes:
        length: how many.
        hidden: width of the network they are computed by while they learn (section 4.3); 0 learns them directly.
        std: of what is drawn.
    """

    length: int = 20
    hidden: int = 512
    std: float = 0.02
    name: Literal["prefix"] = field(default="prefix", kw_only=True)

    def __post_init__(self):
        check_sizes(self, "length")
        if self.hidden < 0:
            raise ConfigError("hidden", self.hidden, "it must not be negative")


@dataclass(frozen=True)
class BitFitConfig:
    """The biases learn (BitFit 2106.10199).

    Attributes:
        missing: a network without biases is ``refuse``d, or has ``add``ed one of zero to every matrix in a layer.
    """

    missing: Literal["refuse", "add"] = "refuse"
    name: Literal["bitfit"] = field(default="bitfit", kw_only=True)

    def __post_init__(self):
        check_choices(self)


@dataclass(frozen=True)
class SelectionConfig:
    """Weights of the network itself learn that either of these names.

    Attributes:
        last: so many layers at the end (of the decoder, where there are two stacks).
        targets: paths of weights of any kind; ``norm/`` finds the norms.
    """

    last: int = 0
    targets: str | None = None
    name: Literal["selection"] = field(default="selection", kw_only=True)

    def __post_init__(self):
        if self.last < 0:
            raise ConfigError("last", self.last, "it must not be negative")
        if not self.last and self.targets is None:
            raise ConfigError("last", self.last, "a number of layers, or targets, or both")
