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
    name: Literal["lora", "dora", "qlora", "relora", "olora"] = field(default="lora", kw_only=True)

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

    name: Literal["lora", "dora", "qlora", "relora", "olora"] = field(default="dora", kw_only=True)


@dataclass(frozen=True)
class OLoRAConfig(LoRAConfig):
    """LoRA on a base that holds the pairs of earlier tasks, which it keeps away from (O-LoRA 2310.14152).

    Attributes:
        penalty: weight of the overlap with them (cmnfriend/O-LoRA, scripts/order_1.sh, lamda_1: 0.5).
    """

    penalty: float = 0.5
    name: Literal["lora", "dora", "qlora", "relora", "olora"] = field(default="olora", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.penalty < 0:
            raise ConfigError("penalty", self.penalty, "it must not be negative")


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
    name: Literal["lora", "dora", "qlora", "relora", "olora"] = field(default="qlora", kw_only=True)

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
class StateConfig:
    """The states in which a Mamba begins every document learn (initial state tuning 2410.09016)."""

    name: Literal["state"] = field(default="state", kw_only=True)


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


@dataclass(frozen=True)
class AdaLoRAConfig:
    """A frozen weight W learns as W + scale P diag(values) Q; the least important values go (AdaLoRA 2303.10512).

    Attributes:
        rank: values of each matrix at first.
        target: values of each matrix in the end, on average.
        alpha: the sum is scaled by ``alpha / (rank + 1e-5)`` (huggingface/peft, adalora/layer.py).
        targets: which matrices.
        warmup: share of the run before the budget falls (section 3.3: t_i).
        settle: share of the run at its end in which the choice stands (t_f).
        every: steps from one choice to the next (delta T).
        beta1, beta2: of the averages of sensitivity and of its uncertainty (equations 9 and 10).
        penalty: weight of the distance of P and Q from orthogonality (equation 4; 0.1 in QingruZhang/AdaLoRA).
    """

    rank: int = 12
    target: int = 8
    alpha: float = 16.0
    targets: str = LINEAR
    warmup: float = 0.1
    settle: float = 0.3
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    penalty: float = 0.1
    name: Literal["adalora"] = field(default="adalora", kw_only=True)

    def __post_init__(self):
        check_sizes(self, "rank", "target", "every")
        if self.target > self.rank:
            raise ConfigError("target", self.target, f"at most rank = {self.rank}: the budget falls")
        for name in ("warmup", "settle"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(name, getattr(self, name), "it must lie in [0, 1): a share of the run")
        if not self.warmup + self.settle < 1.0:
            raise ConfigError("settle", self.settle, f"some of the run must be left beside warmup = {self.warmup}")
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(name, getattr(self, name), "it must lie in (0, 1)")
        if self.penalty < 0:
            raise ConfigError("penalty", self.penalty, "it must not be negative")


@dataclass(frozen=True)
class ChildConfig:
    """Every weight of the network learns, but not all of them from every gradient (Child-tuning 2109.05687).

    Attributes:
        mask: ``random``: each step draws which gradients count (section 2.1, CHILD-TUNING_F); ``fisher``: the weights
            with the largest Fisher information learn, the others never move (section 2.2, CHILD-TUNING_D).
        share: how many count.
        targets: of ``fisher``: the weights that compete; all others learn (alibaba/AliceMind, ChildTuningD.py:
            those in layers).
        clip_norm: of ``fisher``: the gradient of each matrix is scaled down to it before it is squared (the same).
        batches: of ``fisher``: so many of the first batches of a run tell the information, or all of one epoch where
            it has fewer (the same: an epoch).
        seed: of what ``random`` draws.
    """

    mask: Literal["random", "fisher"] = "random"
    share: float = 0.3
    targets: str = r"layers(_\d+)?/"
    clip_norm: float = 1.0
    batches: int = 64
    seed: int = 0
    name: Literal["child"] = field(default="child", kw_only=True)

    def __post_init__(self):
        check_choices(self)
        if not 0.0 < self.share <= 1.0:
            raise ConfigError("share", self.share, "it must lie in (0, 1]")
        check_sizes(self, "batches")
        if not self.clip_norm > 0:
            raise ConfigError("clip_norm", self.clip_norm, "it must be positive")


@dataclass(frozen=True)
class ReLoRAConfig(LoRAConfig):
    """LoRA that moves what it has learned into the frozen weights and begins anew (ReLoRA 2307.05695).

    Attributes:
        every: steps from one restart to the next (section 3).
        prune: share of the pairs' moments that each restart sets to zero at random (0.9 to 0.999).
        rewarm: steps in which the learning rate comes back after a restart (50 to 100).
        others: weights that are no target are ``frozen``, or ``learn`` as a run from scratch needs it.
    """

    every: int = 5000
    prune: float = 0.999
    rewarm: int = 100
    others: Literal["frozen", "learn"] = "frozen"
    name: Literal["lora", "dora", "qlora", "relora", "olora"] = field(default="relora", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, "every")
        if not 0.0 <= self.prune <= 1.0:
            raise ConfigError("prune", self.prune, "it must lie in [0, 1]")
        if not 0 <= self.rewarm < self.every:
            raise ConfigError("rewarm", self.rewarm, f"at least 0 and less than every = {self.every}")
