"""GPT: what makes a decoder a GPT-1, 2 or 3, and every published size.

Pre-norm LayerNorm with a last norm before the head, learned positions, the tanh form of GELU, biases everywhere, the
head tied to the embedding (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3).
"""

from __future__ import annotations

from dataclasses import replace

from xylem.models.config import AttentionConfig, Initializers, PositionConfig, TransformerConfig


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
        positions=PositionConfig("learned"),
        bias="everywhere",
        head="tied",
        init=initializers(num_layers),
    )


def gpt1(
    num_layers: int = 12, d_model: int = 768, num_heads: int = 12, vocab_size: int = 40478, max_length: int = 512
) -> TransformerConfig:
    """GPT-1, 117M parameters unless told otherwise: post-norm, so without a last norm, 512 tokens, dropout 0.1
    (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 4.1)."""
    config = gpt(num_layers, d_model, num_heads, vocab_size, max_length)
    # Normal 0.02 everywhere (section 4.1): the scaled residual projections are GPT-2's.
    init = Initializers(embedding=0.02, positions=0.02, kernel=0.02, residual=0.02)
    return replace(config, family="gpt1", norm_position="post", init=init, dropout=0.1)


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


def gpt3(num_layers: int, d_model: int, num_heads: int, head_dim: int) -> TransformerConfig:
    """A GPT-3 (2005.14165, section 2.1): GPT-2 whose every second layer sees a band of the last tokens only.

    The paper does not give the band's width; 256 is ours. Sizes are those of its table 2.1, but for the heads of the
    1.3B: 24 of 128, as printed there, would be 1.5B.
    """
    config = gpt(num_layers, d_model, num_heads, vocab_size=50257, max_length=2048)
    return replace(config, head_dim=head_dim, attention=AttentionConfig(window=256))


def gpt3_small() -> TransformerConfig:
    """125M parameters."""
    return gpt3(12, 768, 12, 64)


def gpt3_medium() -> TransformerConfig:
    """350M parameters."""
    return gpt3(24, 1024, 16, 64)


def gpt3_large() -> TransformerConfig:
    """760M parameters."""
    return gpt3(24, 1536, 16, 96)


def gpt3_xl() -> TransformerConfig:
    """1.3B parameters."""
    return gpt3(24, 2048, 16, 128)


def gpt3_2_7b() -> TransformerConfig:
    """2.7B parameters."""
    return gpt3(32, 2560, 32, 80)


def gpt3_6_7b() -> TransformerConfig:
    """6.7B parameters."""
    return gpt3(32, 4096, 32, 128)


def gpt3_13b() -> TransformerConfig:
    """13B parameters."""
    return gpt3(40, 5140, 40, 128)


def gpt3_175b() -> TransformerConfig:
    """175B parameters."""
    return gpt3(96, 12288, 96, 128)
