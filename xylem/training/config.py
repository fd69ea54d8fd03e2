"""A whole run as one value: frozen, checked, printable, importable without jax."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from xylem.data import spans
from xylem.data.config import DataConfig
from xylem.data.ramp import BatchRamp
from xylem.errors import ConfigError
from xylem.models.config import ModelConfig, Seq2SeqConfig
from xylem.models.settings import check_choices
from xylem.models.state_config import MambaConfig, RecurrentConfig, WindowedConfig
from xylem.training.objective_config import (
    DenoisingConfig,
    MaskedConfig,
    Objective,
    ObjectiveConfig,
    SampledConfig,
    SpanConfig,
)

if TYPE_CHECKING:
    from xylem.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; ``data = -1`` takes all that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class RampConfig:
    """A batch that grows with what has been read, as GPT-3's (see ``data/ramp.py``).

    Attributes:
        tokens: read when the batch is full; 0 is no ramp: every batch is full.
        start: micro-batches of the first step; the full batch has ``accumulate``.
    """

    tokens: int = 0
    start: int = 1

    def __post_init__(self):
        if self.tokens < 0:
            raise ConfigError("ramp.tokens", self.tokens, "it must not be negative; 0 is no ramp")
        if self.start < 1:
            raise ConfigError("ramp.start", self.start, "it must be at least 1 micro-batch")


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move.

    Attributes:
        name: see ``optimizers.py``.
        learning_rate: the schedule's peak.
        schedule: see ``schedules.py``.
        warmup_steps: linear warm-up from 0.
        decay_fraction: share of the run over which ``wsd`` comes down at its end.
        final_fraction: the last learning rate over the peak.
        weight_decay: decoupled, on matrices and embeddings alone.
        beta1, beta2, eps: of AdamW, and of the AdamW that moves what Muon does not; Lion reads the first two,
            Adafactor none.
        clip_norm: gradients are scaled down to this global norm; None leaves them.
        memory: where moments lie between steps: ``host`` keeps them out of the devices' memory (``paging.py``).
    """

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "wsd", "linear", "noam", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    memory: Literal["device", "host"] = "device"

    def __post_init__(self):
        check_choices(self)
        if not self.learning_rate > 0:
            raise ConfigError("optimizer.learning_rate", self.learning_rate, "it must be positive")
        if self.warmup_steps < 0:
            raise ConfigError("optimizer.warmup_steps", self.warmup_steps, "it must not be negative")
        for name in ("decay_fraction", "final_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"optimizer.{name}", getattr(self, name), "it must lie in [0, 1]")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"optimizer.{name}", getattr(self, name), "it must lie in [0, 1)")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError("optimizer.clip_norm", self.clip_norm, "it must be positive, or None for no clipping")


@dataclass(frozen=True)
class RunConfig:
    """Everything a pretraining run is made of.

    Attributes:
        steps: optimizer steps in all; a second start of a finished run with more steps goes on.
        batch_size: sequences a step, over all devices and accumulation steps.
        accumulate: micro-batches a step; the gradient is that of the whole batch.
        ramp: makes the first steps take fewer micro-batches.
        ema: decay of the averaged weights that validation and the last checkpoint then also carry; None keeps none.
        log_every, evaluate_every, save_every, sample_every: in steps; 0 turns the last three off until the end.
        evaluate_batches: validation batches while training; at the last step the whole split is read.
        keep: checkpoints kept besides the best one.
        sample_prompt: what a sample continues; a model that learns to answer is asked a held-out question instead.
    """

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig | SampledConfig | MaskedConfig | SpanConfig | DenoisingConfig = field(
        default_factory=ObjectiveConfig
    )
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    ramp: RampConfig = field(default_factory=RampConfig)
    seed: int = 0
    ema: float | None = None
    log_every: int = 10
    evaluate_every: int = 200
    evaluate_batches: int = 20
    save_every: int = 200
    sample_every: int = 200
    sample_prompt: str = "The"
    keep: int = 3
    run_dir: str = "runs/pretrain"

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "evaluate_batches", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "it must be at least 1")
        for name in ("evaluate_every", "save_every", "sample_every", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "it must not be negative")
        if self.batch_size % self.accumulate:
            raise ConfigError("accumulate", self.accumulate, f"it must divide batch_size = {self.batch_size}")
        if self.ramp.tokens and self.ramp.start >= self.accumulate:
            allowed = f"fewer micro-batches than the full batch's, accumulate = {self.accumulate}"
            raise ConfigError("ramp.start", self.ramp.start, allowed)
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ConfigError("ema", self.ema, "it must lie in (0, 1), or be None")
        allowed = self.objectives
        if self.objective.name not in allowed:
            raise ConfigError("objective.name", self.objective.name, f"this model learns by {' or '.join(allowed)}")
        if self.objective.name == "truncated" and self.accumulate > 1:
            raise ConfigError("accumulate", self.accumulate, "1: each row's state goes on at the next step")
        if isinstance(self.objective, SpanConfig):
            self._check_sentinels(self.objective)
        if self.tokens_read > self.model.max_length:
            allowed = f"the model's max_length is {self.model.max_length}"
            raise ConfigError("data.sequence_length", self.data.sequence_length, allowed)

    def _check_sentinels(self, objective: SpanConfig) -> None:
        length = self.data.sequence_length
        needed = spans.count(length, objective.noise_density, objective.mean_span)
        if needed > objective.sentinels:
            allowed = f"at least {needed}: that many spans are taken out of {length} tokens"
            raise ConfigError("objective.sentinels", objective.sentinels, allowed)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the model can learn by."""
        return objectives_of(self.model)

    @property
    def batch_ramp(self) -> BatchRamp:
        """How many micro-batches each step takes, and what is read before it; without a ramp, one a step."""
        tokens = self.batch_size * self.data.sequence_length
        if not self.ramp.tokens:
            return BatchRamp(1, 1, tokens, 0)
        return BatchRamp(self.ramp.start, self.accumulate, tokens // self.accumulate, self.ramp.tokens)

    @property
    def tokens_read(self) -> int:
        """The longest row that the model sees of a window of ``data.sequence_length`` tokens of text."""
        objective, length = self.objective, self.data.sequence_length
        if isinstance(objective, SpanConfig):
            return max(objective.sizes(length))
        return length - length // 2 if objective.name == "continuation" else length


def objectives_of(model: ModelConfig) -> tuple[Objective, ...]:
    """The objectives a kind of model can learn by."""
    if isinstance(model, Seq2SeqConfig):
        return ("denoising", "span_corruption", "continuation")
    if isinstance(model, RecurrentConfig):
        return ("causal_lm", "truncated", "scheduled_sampling")
    if isinstance(model, MambaConfig | WindowedConfig) or model.attention.mask == "causal":
        return ("causal_lm", "scheduled_sampling")
    return ("masked_lm",)


def special_ids(config: RunConfig, tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of an objective's special tokens: the tokenizer's own where it has them, else the first ones beyond it.

    ``mask`` for what hides tokens, ``cls`` and ``sep`` for pairs; span corruption's sentinels are not among them: they
    are the model's highest ids.
    """
    names = {"mask": ("[MASK]", "<mask>"), "cls": ("[CLS]",), "sep": ("[SEP]",)}
    wanted = {"masked_lm": ["mask"], "denoising": ["mask"]}.get(config.objective.name, [])
    if isinstance(config.objective, MaskedConfig) and config.objective.pairs != "none":
        wanted = [*wanted, "cls", "sep"]
    ids, fresh = {}, tokenizer.vocab_size
    for role in wanted:
        own = next((found for name in names[role] if (found := tokenizer.token_id(name)) is not None), None)
        ids[role] = fresh if own is None else own
        fresh += own is None
    return ids


def check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """What can be checked only once the tokenizer is there.

    Raises:
        ConfigError: the model lacks ids for its tokens and the objective's, or the sample prompt leaves no room to
            write.
    """
    largest = max(tokenizer.vocab_size - 1, *special_ids(config, tokenizer).values(), 0)
    sentinels = config.objective.sentinels if isinstance(config.objective, SpanConfig) else 0
    if (least := largest + 1 + sentinels) > config.model.vocab_size:
        extra = (
            f" and {config.objective.name} needs {least - tokenizer.vocab_size} more"
            if least > tokenizer.vocab_size
            else ""
        )
        allowed = f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens{extra}, so at least {least}"
        raise ConfigError("model.vocab_size", config.model.vocab_size, allowed)
    if not continues(config):
        return
    # The text starts with begin-of-text, and at least one token is written.
    length, most = len(tokenizer.encode(config.sample_prompt)), config.model.max_length - 2
    if not 0 < length <= most:
        allowed = f"between 1 and {most} tokens; it has {length}"
        raise ConfigError("sample_prompt", config.sample_prompt, allowed)


def continues(config: RunConfig) -> bool:
    """Whether the model learns to continue a text: then bits per byte mean something."""
    return config.objective.name in ("causal_lm", "truncated", "scheduled_sampling")


def writes(config: RunConfig) -> bool:
    """Whether the model learns to continue a text or to answer: then samples are written."""
    return continues(config) or config.objective.name == "answers"
