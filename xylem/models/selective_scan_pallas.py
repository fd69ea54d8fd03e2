"""The selective scan as two Pallas kernels, one each way, for TPUs and for GPUs.

The states of a block of channels stay on the chip while its tokens stream past, and only what the layer reads and
writes anyway goes through main memory (the hardware-aware scan of 2312.00752, section 3.3.2), with one state a chunk
for the backward pass. That one goes through the chunks in reverse, computes the states of each again and pulls the
gradient back through them, as ``chunked`` does.

Here is what both kinds of chip share: the derivative, and which kernels run. How blocks and chunks are laid out is told
in ``selective_scan_tpu.py`` and ``selective_scan_gpu.py``, one step in ``selective_scan_step.py``. On other backends
the kernels are interpreted: slow, and the same numbers.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from xylem.models import selective_scan_gpu, selective_scan_tpu

CHUNK = 64  # tokens a chunk
INTERPRETED: ModuleType = selective_scan_tpu  # whose kernels are interpreted


def kernel(
    rule: str, x: Array, delta: Array, A: Array, B: Array, C: Array, keep: Array, start: Array
) -> tuple[Array, Array]:
    """Outputs (B, T, I) and last states (B, Z, I); ``A`` is (Z, I), all is float32."""
    length = x.shape[1]
    # Steps of size 0 fill the last chunk: they leave the states as they are.
    fill = lambda value: jnp.pad(value, [(0, 0), (0, -length % CHUNK), (0, 0)])  # noqa: E731
    keep = jnp.pad(keep, [(0, 0), (0, -length % CHUNK)], constant_values=1.0)[..., None]
    out: Any = _scan(rule, A, start, fill(x), fill(delta), fill(B), fill(C), keep)
    return out[0][:, :length], out[1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(rule: str, *args: Array) -> tuple[Array, Array]:
    return _scan_forward(rule, *args)[0]


def _scan_forward(rule, A, start, *tokens):
    y, last, before = _run("forward", rule, A, start, *tokens)
    return (y, last), (A, before, tokens)


def _scan_backward(rule, saved, slopes):
    A, before, tokens = saved
    return *_run("backward", rule, A, before, *tokens, *slopes), None  # none of keep


_scan.defvjp(_scan_forward, _scan_backward)


def _run(direction: str, rule: str, *arrays: Array) -> Any:
    """``forward`` or ``backward`` of the module for the chip that this is compiled for."""

    def of(module: ModuleType, interpret: bool = False) -> Any:
        return partial(getattr(module, direction), rule, CHUNK, interpret)

    gpu = of(selective_scan_gpu)
    choices = {"tpu": of(selective_scan_tpu), "cuda": gpu, "rocm": gpu, "default": of(INTERPRETED, interpret=True)}
    return jax.lax.platform_dependent(*arrays, **choices)
