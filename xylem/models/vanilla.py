"""The Transformer of 2017: what makes an encoder-decoder the original one, and its two sizes.

Post-norm LayerNorm, sinusoids added to embeddings that are scaled by sqrt(d_model), ReLU, one table for both sides and
the head, dropout 0.1 (1706.03762, sections 3.1 to 3.4 and 5.4). It is trained with label smoothing 0.1 and the ``noam``
schedule over 4,000 warm-up steps (sections 5.3 and 5.4).
"""

from __future__ import annotations

from dataclasses import replace

from xylem.models.config import (
    AttentionConfig,
    EmbeddingConfig,
    Initializers,
    PositionConfig,
    Seq2SeqConfig,
    TransformerConfig,
)


def initializers(d_model: int) -> Initializers:
    """Embeddings of spread 1/sqrt(d_model), which their scaling brings to 1, and Glorot-sized kernels
    (tensor2tensor, layers/modalities.py and its ``uniform_unit_scaling``)."""
    std = d_model**-0.5
    return Initializers(embedding=std, positions=std, kernel=std, residual=std)


def vanilla(
    num_layers: int, d_model: int, num_heads: int, vocab_size: int, max_length: int = 512, dropout: float = 0.1
) -> Seq2SeqConfig:
    """An original Transformer of any size: ``num_layers`` on each side, feed-forward of ``4 * d_model``."""
    encoder = TransformerConfig(
        family="transformer",
        vocab_size=vocab_size,
        max_length=max_length,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        d_ff=4 * d_model,
        activation="relu",
        norm="layernorm",
        norm_eps=1e-6,
        norm_position="post",
        positions=PositionConfig("sinusoidal"),
        attention=AttentionConfig(mask="bidirectional"),
        embedding=EmbeddingConfig(scale="sqrt_d_model"),
        bias="everywhere",
        head="tied",
        init=initializers(d_model),
        dropout=dropout,
    )
    return Seq2SeqConfig("transformer", encoder, replace(encoder, attention=AttentionConfig()), decoder_start=0)


def transformer_base() -> Seq2SeqConfig:
    """65M parameters with its 37,000 shared tokens (1706.03762, table 3)."""
    return vanilla(6, 512, 8, vocab_size=37_000)


def transformer_big() -> Seq2SeqConfig:
    """213M parameters; dropout 0.3 (1706.03762, table 3)."""
    return vanilla(6, 1024, 16, vocab_size=37_000, dropout=0.3)
