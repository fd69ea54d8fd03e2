"""What a run minimises, as values: one class for each objective with settings of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from xylem.data import corruption, spans
from xylem.errors import ConfigError
from xylem.models.settings import check_choices

Objective = Literal[
    "causal_lm", "truncated", "scheduled_sampling", "continuation", "masked_lm", "span_corruption", "denoising",
    "answers", "classification", "token_classification",
]  # fmt: skip


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised, in nats a real token. This class serves the objectives without settings of their own.

    Attributes:
        name: ``causal_lm``, the next token from those before it; ``truncated``, the same with a state that goes on from
            window to window (recurrent models); ``continuation``, the second half of a window by an encoder-decoder
            that has read the first. Fine-tuning has three more: ``answers``, ``causal_lm`` of what an assistant says
            alone; ``classification``, the label of a text; ``token_classification``, that of each word. The others
            have a class each.
        label_smoothing: share of the target spread over the vocabulary (1512.00567, section 7).
        z_loss: weight of ``logsumexp(logits)**2``, which keeps logits from drifting (PaLM 2204.02311, section 5).
    """

    name: Objective = "causal_lm"
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        check_choices(self)
        if type(self) is not (wanted := settings_of(self.name)):
            allowed = f"its settings are a {wanted.__name__}, these are another's"
            raise ConfigError("objective.name", self.name, allowed)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError("objective.label_smoothing", self.label_smoothing, "it must lie in [0, 1)")
        if self.z_loss < 0.0:
            raise ConfigError("objective.z_loss", self.z_loss, "it must not be negative")


def settings_of(name: str) -> type[ObjectiveConfig]:
    """The class of an objective's settings."""
    own = (SampledConfig, MaskedConfig, SpanConfig, DenoisingConfig)
    return next((each for each in own if each.name == name), ObjectiveConfig)


@dataclass(frozen=True)
class SampledConfig(ObjectiveConfig):
    """The next token after prefixes that the model itself wrote in part (1506.03099; see ``scheduled_sampling.py``).

    Attributes:
        decay: how the probability that a token shown is the true one falls with the step (section 2.4):
            ``linear:START,SLOPE,LEAST`` is max(LEAST, START - SLOPE step), ``exponential:BASE`` is BASE ** step, and
            ``inverse_sigmoid:K`` is K / (K + exp(step / K)), one half at step K log K.
    """

    name: Objective = "scheduled_sampling"
    decay: str = "inverse_sigmoid:100"

    def __post_init__(self):
        super().__post_init__()
        kind, numbers = decay_of(self.decay)
        if kind == "linear":
            start, slope, least = numbers
            holds, allowed = 0 <= least <= start <= 1 and slope >= 0, "0 <= LEAST <= START <= 1, and 0 <= SLOPE"
        elif kind == "exponential":
            holds, allowed = 0 < numbers[0] < 1, "BASE lies between 0 and 1"
        else:
            holds, allowed = 1 <= numbers[0] < math.inf, "K is at least 1"
        if not holds:
            raise ConfigError("objective.decay", self.decay, allowed)


def decay_of(text: str) -> tuple[str, list[float]]:
    """The formula and the numbers that ``SampledConfig.decay`` names."""
    forms = {"linear": "START,SLOPE,LEAST", "exponential": "BASE", "inverse_sigmoid": "K"}
    kind, _, rest = text.partition(":")
    try:
        numbers = [float(number) for number in rest.split(",")]
    except ValueError:
        numbers = []
    if kind not in forms or len(numbers) != len(forms[kind].split(",")):
        allowed = f"it must be {' or '.join(f'{one}:{form}' for one, form in forms.items())}, in numbers"
        raise ConfigError("objective.decay", text, allowed)
    return kind, numbers


@dataclass(frozen=True)
class MaskedConfig(ObjectiveConfig):
    """Hidden tokens from both sides (BERT 1810.04805, section 3.1; see ``data/masking.py``).

    Attributes:
        rate: share of the tokens that is chosen.
        masked, random: shares of the chosen that become the mask or a random token; the rest stays.
        max_ngram: the longest run chosen at once (ALBERT 1909.11942, section 4.1: 3).
        pairs: the second objective: BERT's ``next_sentence``, ALBERT's ``sentence_order``, or ``none`` (RoBERTa), which
            reads packed text in place of pairs.
    """

    name: Objective = "masked_lm"
    rate: float = 0.15
    masked: float = 0.8
    random: float = 0.1
    max_ngram: int = 1
    pairs: Literal["none", "next_sentence", "sentence_order"] = "none"

    def __post_init__(self):
        super().__post_init__()
        for name in ("rate", "masked", "random"):
            corruption.check_fraction(f"objective.{name}", getattr(self, name))
        if self.masked + self.random > 1 + 1e-9:
            allowed = f"at most {1 - self.masked:g}: objective.masked is {self.masked:g}"
            raise ConfigError("objective.random", self.random, allowed)
        if self.max_ngram < 1:
            raise ConfigError("objective.max_ngram", self.max_ngram, "it must be at least 1")


@dataclass(frozen=True)
class SpanConfig(ObjectiveConfig):
    """Spans taken out of a text, listed (T5 1910.10683, section 3.1.4; see ``data/spans.py``), and tasks besides.

    Attributes:
        tasks: supervised tasks, text to text: by name a file of one ``{"input": ..., "target": ...}`` a line. The name
            and a colon stand before each input (section 2.3).
        mixing_limit: K: corpus and tasks are mixed in proportion to their examples, of which no more than K count
            (section 3.5.2); a window is an example of the corpus.
        target_length: tokens of a target at least, for tasks whose targets are longer than what is listed; what is
            longer still is cut.
    """

    name: Objective = "span_corruption"
    noise_density: float = 0.15
    mean_span: float = 3.0
    sentinels: int = 100
    tasks: dict[str, str] = field(default_factory=dict)
    mixing_limit: int = 2**16
    target_length: int = 0

    def __post_init__(self):
        super().__post_init__()
        corruption.check_fraction("objective.noise_density", self.noise_density)
        if self.mean_span < 1:
            raise ConfigError("objective.mean_span", self.mean_span, "it must be at least 1 token")
        if self.sentinels < 1:
            raise ConfigError("objective.sentinels", self.sentinels, "it must be at least 1")
        if self.mixing_limit < 1:
            raise ConfigError("objective.mixing_limit", self.mixing_limit, "it must be at least 1 example")
        if self.target_length < 0:
            raise ConfigError("objective.target_length", self.target_length, "it must not be negative")
        if "" in self.tasks:
            raise ConfigError("objective.tasks", "", "a task has a name")

    def sizes(self, length: int) -> tuple[int, int]:
        """Tokens of a source and of a target, of windows of ``length`` tokens."""
        source, target = spans.sizes(length, self.noise_density, self.mean_span)
        return source, max(target, self.target_length)


@dataclass(frozen=True)
class DenoisingConfig(ObjectiveConfig):
    """A text from what permuting its sentences and infilling left of it (BART 1910.13461, section 5.1)."""

    name: Objective = "denoising"
    rate: float = 0.3
    mean_span: float = 3.0

    def __post_init__(self):
        super().__post_init__()
        corruption.check_fraction("objective.rate", self.rate)
        if not self.mean_span > 0:
            raise ConfigError("objective.mean_span", self.mean_span, "it must be positive")
