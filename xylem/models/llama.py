"""LLaMA: what makes a decoder a LLaMA, and every published size.

Pre-norm RMSNorm, rotary positions, SwiGLU, no biases, the head untied (2302.13971, section 2.2). LLaMA-2 70B and all
of LLaMA-3 share key/value heads (2307.09288, section 2.2; 2407.21783, table 3); LLaMA-3 has theta 500,000, LLaMA-3.1
scales the rotary frequencies for 131,072 tokens, the small LLaMA-3.2 ties the head.
"""

from __future__ import annotations

from typing import Literal

from xylem.models.config import Initializers, PositionConfig, RopeScaling, TransformerConfig


def initializers(num_layers: int) -> Initializers:
    """The papers do not say; GPT-2's rule (normal 0.02, residual projections by 1/sqrt(2 L)) serves all sizes."""
    return Initializers(embedding=0.02, positions=0.02, kernel=0.02, residual=0.02 * (2 * num_layers) ** -0.5)


def llama(
    num_layers: int,
    d_model: int,
    num_heads: int,
    num_kv_heads: int,
    d_ff: int,
    vocab_size: int,
    max_length: int,
    rope_theta: float,
    norm_eps: float,
    rope_scaling: RopeScaling | None = None,
    head: Literal["tied", "untied"] = "untied",
) -> TransformerConfig:
    """A LLaMA of any size; heads of ``d_model / num_heads``."""
    return TransformerConfig(
        family="llama",
        vocab_size=vocab_size,
        max_length=max_length,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=d_model // num_heads,
        d_ff=d_ff,
        activation="swiglu",
        norm="rmsnorm",
        norm_eps=norm_eps,
        positions=PositionConfig("rope", rope_theta=rope_theta, rope_scaling=rope_scaling),
        bias="none",
        head=head,
        init=initializers(num_layers),
    )


def _llama1(num_layers: int, d_model: int, num_heads: int, d_ff: int) -> TransformerConfig:
    # 2302.13971, table 2; norm_eps from the released params.json.
    return llama(num_layers, d_model, num_heads, num_heads, d_ff, 32_000, 2048, rope_theta=1e4, norm_eps=1e-6)


def _llama2(num_layers: int, d_model: int, num_heads: int, num_kv_heads: int, d_ff: int) -> TransformerConfig:
    # 2307.09288, table 1; norm_eps from the released params.json.
    return llama(num_layers, d_model, num_heads, num_kv_heads, d_ff, 32_000, 4096, rope_theta=1e4, norm_eps=1e-5)


def _llama3(num_layers: int, d_model: int, num_heads: int, d_ff: int, **values) -> TransformerConfig:
    # 2407.21783, table 3: always 8 key/value heads and 128,256 tokens.
    values = {"max_length": 8192, **values}
    return llama(num_layers, d_model, num_heads, 8, d_ff, 128_256, rope_theta=5e5, norm_eps=1e-5, **values)


def _stretched(factor: float) -> dict:
    # llama-models, models/llama3/args.py and model.py: 8 (3.1) or 32 (3.2) times, over an original 8,192 tokens.
    return {"max_length": 131_072, "rope_scaling": RopeScaling(factor, 1.0, 4.0, 8192)}


def llama_7b() -> TransformerConfig:
    """LLaMA-1, 6.7B parameters."""
    return _llama1(32, 4096, 32, 11_008)


def llama_13b() -> TransformerConfig:
    """LLaMA-1, 13B parameters."""
    return _llama1(40, 5120, 40, 13_824)


def llama_33b() -> TransformerConfig:
    """LLaMA-1, 32.5B parameters."""
    return _llama1(60, 6656, 52, 17_920)


def llama_65b() -> TransformerConfig:
    """LLaMA-1, 65B parameters."""
    return _llama1(80, 8192, 64, 22_016)


def llama2_7b() -> TransformerConfig:
    """LLaMA-2, 6.7B parameters."""
    return _llama2(32, 4096, 32, 32, 11_008)


def llama2_13b() -> TransformerConfig:
    """LLaMA-2, 13B parameters."""
    return _llama2(40, 5120, 40, 40, 13_824)


def llama2_70b() -> TransformerConfig:
    """LLaMA-2, 69B parameters, grouped-query attention."""
    return _llama2(80, 8192, 64, 8, 28_672)


def llama3_8b() -> TransformerConfig:
    """LLaMA-3, 8.0B parameters."""
    return _llama3(32, 4096, 32, 14_336)


def llama3_70b() -> TransformerConfig:
    """LLaMA-3, 71B parameters."""
    return _llama3(80, 8192, 64, 28_672)


def llama3_1_8b() -> TransformerConfig:
    """LLaMA-3.1, 8.0B parameters, 131,072 tokens."""
    return _llama3(32, 4096, 32, 14_336, **_stretched(8.0))


def llama3_1_70b() -> TransformerConfig:
    """LLaMA-3.1, 71B parameters, 131,072 tokens."""
    return _llama3(80, 8192, 64, 28_672, **_stretched(8.0))


def llama3_1_405b() -> TransformerConfig:
    """LLaMA-3.1, 406B parameters, 131,072 tokens."""
    return _llama3(126, 16_384, 128, 53_248, **_stretched(8.0))


def llama3_2_1b() -> TransformerConfig:
    """LLaMA-3.2, 1.2B parameters, tied head."""
    return _llama3(16, 2048, 32, 8192, head="tied", **_stretched(32.0))


def llama3_2_3b() -> TransformerConfig:
    """LLaMA-3.2, 3.2B parameters, tied head."""
    return _llama3(28, 3072, 24, 8192, head="tied", **_stretched(32.0))


def smollm2() -> TransformerConfig:
    """SmolLM2-135M (2502.02737): the LLaMA architecture, 134,515,008 parameters, tied head."""
    return llama(30, 576, 9, 3, 1536, 49_152, 8192, rope_theta=1e5, norm_eps=1e-5, head="tied")
