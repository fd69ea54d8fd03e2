"""What is measured while training, as pure functions; and the writers of `metrics.jsonl` and TensorBoard events.

MFU takes the analytic FLOPs of ``config.train_flops_per_token``: what the model needs, never what a program spends, so
that it compares programs.
"""

import bz2
import contextlib
import errno
import functools
import json
import lzma
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xylem.training.run_folder import drop_after, raise_as_failure

# Peak dense bf16 operations a second of one JAX device, by the start of its `device_kind`; the longest fits.
# TPU: peak per chip in the tables of https://cloud.google.com/tpu/docs/v4 (and /v2, /v3, /v5e, /v5p, /v6e, /tpu7x).
# v2, v3 and TPU7x show each of the chip's two TensorCores as a device: half a chip's peak.
# GPU: https://www.nvidia.com/en-us/data-center/ (a100, h100, h200, dgx-b200, l4, l40s), half of what is given "with
# sparsity"; V100 and T4 have no bf16, their fp16 figure stands in.
PEAK_FLOPS: dict[str, float] = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,  # v6e, "TPU v6 lite"
    "TPU7x": 2307e12 / 2,
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
}


def perplexity(nll_per_token: float | int) -> float:
    """exp of the mean negative log-likelihood (nats a token); infinite where that overflows."""
    return math.inf if nll_per_token > 700.0 else math.exp(nll_per_token)


def bits_per_byte(total_nll_nats: float | int, total_bytes: float | int) -> float:
    """Bits the model needs for a byte of the text (UTF-8): comparable between tokenizers, and with compressors.

    `total_nll_nats` is the sum over all tokens of a text of `total_bytes` bytes (The Pile, 2101.00027, section 3.1).
    """
    if not total_bytes > 0:
        raise ValueError("bits per byte need a text that is not empty")
    return total_nll_nats / math.log(2.0) / total_bytes


def reference_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits a byte of `text` costs the compressors of the standard library at their strongest: a bar to get under."""
    sizes = {"bzip2": len(bz2.compress(text, 9)), "xz": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
    return {name: 8.0 * size / len(text) for name, size in sizes.items()} if text else {}


def mfu(tokens_per_second: float | int, flops_per_token: float | int, peak: float | int | None) -> float | None:
    """Model FLOPs utilisation: the share of the devices' peak that useful operations take; None for an unknown peak."""
    return None if not peak else tokens_per_second * flops_per_token / peak


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Peak operations a second of all `devices` together: from `PEAK_FLOPS`, on CPU measured; None where unknown.

    CPU devices of one process are parts of one machine (often simulated), whose peak counts once.
    """
    if all(device.platform == "cpu" for device in devices):
        return measured_cpu_peak() * len({device.process_index for device in devices})
    total = 0.0
    for device in devices:
        kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
        if not kinds:
            return None
        total += PEAK_FLOPS[max(kinds, key=len)]
    return total


@functools.cache
def measured_cpu_peak(size: int = 1536, seconds: float = 0.4) -> float:
    """Operations a second of the fastest of several float32 products of `size` cubed, measured once a process."""
    import jax
    import jax.numpy as jnp

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        product = jax.jit(lambda a, b: a @ b)
        square = jnp.ones((size, size), jnp.float32)
        product(square, square).block_until_ready()
        fastest, end = math.inf, time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            product(square, square).block_until_ready()
            fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest


class Throughput:
    """Tokens a second over the recent past: a ratio of two sums that forget alike, with half-life `half_life` seconds.

    A ratio of sums weighs each second alike, however long a step is, and needs no correction at the start.
    """

    def __init__(self, half_life: float = 20.0):
        self.half_life, self._tokens, self._seconds = half_life, 0.0, 0.0

    def update(self, tokens: float | int, seconds: float | int) -> float:
        """Add an interval in which `tokens` were trained on; return tokens a second."""
        kept = 0.5 ** (seconds / self.half_life)
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + seconds
        return self._tokens / self._seconds if self._seconds else 0.0

    def eta(self, tokens_left: float | int) -> float | None:
        """Seconds until `tokens_left` more are done at the present rate; None before the first interval."""
        return tokens_left * self._seconds / self._tokens if self._tokens else None


class Meter:
    """Turns what a step computed into a row of metrics, with the speed since the row before.

    ``tokens(n)`` read by the first n steps, ``flops`` a token, ``peak`` of all devices together (None where unknown),
    ``steps`` of the run.
    """

    def __init__(self, tokens: Callable[[int], int], flops: float, peak: float | None, steps: int):
        self.tokens, self.flops, self.peak, self.steps = tokens, flops, peak, steps
        self._speed, self._since = Throughput(), time.perf_counter()

    def row(self, step: int, computed: Mapping[str, Any]) -> dict[str, Any]:
        """The row of a step; reading what it ``computed`` waits for it."""
        read = self.tokens(step)
        row = {"step": step, "tokens": read, **{name: float(x) for name, x in computed.items()}}
        now = time.perf_counter()
        rate = self._speed.update(read - self.tokens(step - 1), now - self._since)
        self._since = now
        row |= {"tokens_per_second": rate, "mfu": mfu(rate, self.flops, self.peak)}
        return row | {"eta_seconds": self._speed.eta(self.tokens(self.steps) - read)}

    def restart(self) -> None:
        """Leave out the time since the last row: it went into something else than training."""
        self._since = time.perf_counter()


@contextlib.contextmanager
def metrics_log(
    path: str | Path | None, tensorboard: str | Path | None = None, resumed_at: int = 0
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Open `metrics.jsonl` (and a TensorBoard folder) for a run that goes on from step `resumed_at`.

    Yields `write(row)`: one JSON object a line, handed to the operating system before it returns, `row["step"]` rising.
    Rows that a dead run logged after `resumed_at` are dropped first. Numbers that are not finite are written as null,
    which every JSON reader takes. Without a `path` (a process that does not log) `write` does nothing.

    Raises CheckpointError (4) where the disk is full.
    """
    if path is None:
        yield lambda row: None
        return
    path = Path(path)
    drop_after(path, resumed_at)
    last = resumed_at
    with contextlib.ExitStack() as stack:
        events = stack.enter_context(_events(Path(tensorboard), resumed_at)) if tensorboard else None
        try:
            file = open(path, "ab", buffering=0)  # noqa: SIM115 (the stack closes it)
        except OSError as error:
            raise_as_failure(path, error)
        stack.enter_context(file)

        def write(row: Mapping[str, Any]) -> None:
            nonlocal last
            if row["step"] <= last:
                raise ValueError(f"step {row['step']} is logged after step {last}")
            plain = {key: _plain(value) for key, value in row.items()}
            end = file.tell()
            line = json.dumps(plain, allow_nan=False).encode() + b"\n"
            try:
                if file.write(line) < len(line):  # a disk that fills up takes a part, and complains at the next write
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise_as_failure(path, error)
            last = plain["step"]
            if events:
                events(plain)

        yield write


@contextlib.contextmanager
def _events(folder: Path, resumed_at: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """TensorBoard scalars; what a dead run wrote after `resumed_at` is purged from the graphs."""
    from tensorboardX import SummaryWriter

    try:
        writer = SummaryWriter(str(folder), purge_step=resumed_at + 1 if resumed_at else None)
    except OSError as error:
        raise_as_failure(folder, error)

    def write(row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                writer.add_scalar(key, value, row["step"])

    try:
        yield write
    finally:
        writer.close()


def _plain(value: Any) -> Any:
    """A Python value that strict JSON can hold: scalars of any array library become int or float, NaN becomes None."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
