"""BART: what makes an encoder-decoder a BART, and its two sizes.

The original architecture with GELU, learned positions and a norm behind the embeddings (1910.13461, section 2.1).
Positions start at row 2 of their tables: fairseq numbers them from the padding id on.
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

# 1910.13461, section 2.1: normal 0.02.
INITIALIZERS = Initializers(embedding=0.02, positions=0.02, kernel=0.02, residual=0.02)


def bart(num_layers: int, d_model: int, num_heads: int, vocab_size: int, max_length: int = 1024) -> Seq2SeqConfig:
    """A BART of any size: ``num_layers`` on each side, feed-forward of ``4 * d_model``."""
    encoder = TransformerConfig(
        family="bart",
        vocab_size=vocab_size,
        max_length=max_length,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        d_ff=4 * d_model,
        activation="gelu",
        norm="layernorm",
        norm_eps=1e-5,
        norm_position="post",
        positions=PositionConfig("learned", offset=2),
        attention=AttentionConfig(mask="bidirectional"),
        embedding=EmbeddingConfig(norm="present"),
        bias="everywhere",
        head="tied",
        init=INITIALIZERS,
        dropout=0.1,
    )
    # Targets begin with the end-of-text id, 2 (fairseq; the released models' decoder_start_token_id).
    return Seq2SeqConfig("bart", encoder, replace(encoder, attention=AttentionConfig()), decoder_start=2)


def bart_base() -> Seq2SeqConfig:
    """139M parameters."""
    return bart(6, 768, 12, vocab_size=50265)


def bart_large() -> Seq2SeqConfig:
    """406M parameters."""
    return bart(12, 1024, 16, vocab_size=50265)
