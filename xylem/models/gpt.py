"""GPT: what makes a decoder a GPT-2, and every published size.

Pre-norm LayerNorm with a last norm before the head, learned positions, the tanh form of GELU, biases everywhere, the
head tied to the embedding (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3).
"""

from __future__ import annotations

from xylem.models.config import Initializers, TransformerConfig


def initializers(num_layers: int) -> Initializers:
    """Normal 0.02, positions 0.01 (openai/gpt-2, src/model.py); residual projections scaled by 1/sqrt(2 L) (2.3)."""
    return Initializers(embedding=0.02, positions=0.01, kernel=0.02, residual=0.02 * (2 * num_layers) ** -0.5)


def gpt(num_layers: int, d_model: int, num_heads: int, vocab_size: int, max_length: int) -> TransformerConfig:
    """A GPT-2 of any size: heads of ``d_model / num_heads``, feed-forward of ``4 * d_model``."""
    return TransformerConfig(
        family="gpt",
        vocab_size=vocab_size,
        max_length=max_length,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        d_ff=4 * d_model,
        activation="gelu_tanh",
        norm="layernorm",
        norm_eps=1e-5,
        positions="learned",
        rope_theta=None,
        bias="everywhere",
        head="tied",
        init=initializers(num_layers),
    )


def gpt2() -> TransformerConfig:
    """124M parameters."""
    return gpt(12, 768, 12, vocab_size=50257, max_length=1024)


def gpt2_medium() -> TransformerConfig:
    """355M parameters."""
    return gpt(24, 1024, 16, vocab_size=50257, max_length=1024)


def gpt2_large() -> TransformerConfig:
    """774M parameters."""
    return gpt(36, 1280, 20, vocab_size=50257, max_length=1024)


def gpt2_xl() -> TransformerConfig:
    """1.6B parameters."""
    return gpt(48, 1600, 25, vocab_size=50257, max_length=1024)
