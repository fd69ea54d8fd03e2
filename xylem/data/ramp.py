"""A batch that grows with what has been read (GPT-3, 2005.14165, appendix B)."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from xylem.errors import ConfigError


@dataclass(frozen=True)
class BatchRamp:
    """From ``start`` to ``full`` micro-batches a step, linear in tokens, over the first ``ramp_tokens``.

    Sizes are whole micro-batches of one shape, so that a step's program differs in nothing but how many it adds up. A
    step takes ``start + floor((full - start) * read / ramp_tokens)`` of them, ``read`` being the tokens before it.
    Steps count from 0; everything here is exact, on the host, a function of the step alone: nothing must be saved.

    Attributes:
        start, full: micro-batches of the first step and of those behind the ramp.
        micro_tokens: tokens of one micro-batch.
        ramp_tokens: tokens read when the batch is full; 0 is no ramp.
    """

    start: int
    full: int
    micro_tokens: int
    ramp_tokens: int

    def __post_init__(self):
        if self.start < 1:
            raise ConfigError("ramp.start", self.start, "it must be at least 1")
        if self.full < self.start:
            raise ConfigError("ramp.full", self.full, f"it must be at least start = {self.start}")
        if self.micro_tokens < 1:
            raise ConfigError("ramp.micro_tokens", self.micro_tokens, "it must be at least 1")
        if self.ramp_tokens < 0:
            raise ConfigError("ramp.ramp_tokens", self.ramp_tokens, "it must not be negative")

    def micro_batches(self, step: int) -> int:
        """How many micro-batches step ``step`` takes."""
        return self._stage(step)[2]

    def micro_batches_before(self, step: int) -> int:
        """How many the steps before ``step`` took together: where in the order of samples it begins."""
        first, before, size = self._stage(step)
        return before + (step - first) * size

    def tokens_before(self, step: int) -> int:
        """How many tokens the steps before ``step`` read."""
        return self.micro_batches_before(step) * self.micro_tokens

    def steps(self, tokens: int) -> int:
        """The fewest steps that read at least ``tokens``."""
        wanted = -(-tokens // self.micro_tokens)
        first, before, size = max((stage for stage in self._stages if stage[1] < wanted), default=(0, 0, 1))
        return first - (before - wanted) // size

    def _stage(self, step: int) -> tuple[int, int, int]:
        return self._stages[bisect_right(self._stages, step, key=lambda stage: stage[0]) - 1]

    @cached_property
    def _stages(self) -> list[tuple[int, int, int]]:
        """(first step, micro-batches before it, micro-batches a step), wherever the size changes."""
        stages, step, before = [], 0, 0
        while True:
            read = before * self.micro_tokens
            if read >= self.ramp_tokens:
                return [*stages, (step, before, self.full)]
            size = self.start + (self.full - self.start) * read // self.ramp_tokens
            stages.append((step, before, size))
            # The tokens at which the next size is reached; ceilings, for whole steps.
            threshold = -(-(size + 1 - self.start) * self.ramp_tokens // max(1, self.full - self.start))
            until = min(threshold, self.ramp_tokens)
            count = -(-(until - read) // (size * self.micro_tokens))
            step, before = step + count, before + count * size
