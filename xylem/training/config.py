"""A whole run as one value: frozen, checked, printable, importable without jax."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from xylem.data.config import DataConfig
from xylem.errors import ConfigError
from xylem.models.config import MambaConfig, TransformerConfig, check_choices

if TYPE_CHECKING:
    from xylem.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; ``data = -1`` takes all that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised, in nats a real token.

    Attributes:
        label_smoothing: share of the target spread over the vocabulary (1512.00567, section 7).
        z_loss: weight of ``logsumexp(logits)**2``, which keeps logits from drifting (PaLM 2204.02311, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError("objective.label_smoothing", self.label_smoothing, "it must lie in [0, 1)")
        if self.z_loss < 0.0:
            raise ConfigError("objective.z_loss", self.z_loss, "it must not be negative")


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
        ema: decay of the averaged weights that validation and the last checkpoint then also carry; None keeps none.
        log_every, evaluate_every, save_every, sample_every: in steps; 0 turns the last three off until the end.
        evaluate_batches: validation batches while training; at the last step the whole split is read.
        keep: checkpoints kept besides the best one.
    """

    model: TransformerConfig | MambaConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
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
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ConfigError("ema", self.ema, "it must lie in (0, 1), or be None")
        if self.data.sequence_length > self.model.max_length:
            allowed = f"the model's max_length is {self.model.max_length}"
            raise ConfigError("data.sequence_length", self.data.sequence_length, allowed)


def check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """What can be checked only once the tokenizer is there.

    Raises:
        ConfigError: it has more tokens than the model, or the sample prompt leaves no room to write.
    """
    if tokenizer.vocab_size > config.model.vocab_size:
        allowed = f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, so at least that"
        raise ConfigError("model.vocab_size", config.model.vocab_size, allowed)
    # The text starts with begin-of-text, and at least one token is written.
    length, most = len(tokenizer.encode(config.sample_prompt)), config.model.max_length - 2
    if not 0 < length <= most:
        allowed = f"between 1 and {most} tokens; it has {length}"
        raise ConfigError("sample_prompt", config.sample_prompt, allowed)
