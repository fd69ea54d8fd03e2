"""BERT, RoBERTa, ALBERT: what makes an encoder one of them, and every published size.

Post-norm LayerNorm, learned positions, the exact GELU, biases everywhere, a norm behind the embeddings, dropout 0.1
(1810.04805, section 3 and appendix A.2). RoBERTa drops the second head and its token types, and trains on full
sentences (1907.11692, section 4); ALBERT factorises the embedding and shares one layer among all (1909.11942, section
3.1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from xylem.models.config import AttentionConfig, EmbeddingConfig, Initializers, PositionConfig, TransformerConfig

# Normal 0.02 for every weight (google-research/bert, modeling.py, initializer_range; the two others follow it).
INITIALIZERS = Initializers(embedding=0.02, positions=0.02, kernel=0.02, residual=0.02)


def bert(
    num_layers: int,
    d_model: int,
    num_heads: int,
    vocab_size: int,
    max_length: int = 512,
    family: Literal["bert", "roberta", "albert"] = "bert",
    d_ff: int | None = None,
) -> TransformerConfig:
    """A BERT of any size: heads of ``d_model / num_heads``, feed-forward of ``4 * d_model`` where none is given."""
    return TransformerConfig(
        family=family,
        vocab_size=vocab_size,
        max_length=max_length,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        d_ff=4 * d_model if d_ff is None else d_ff,
        activation="gelu",
        norm="layernorm",
        norm_eps=1e-12,
        norm_position="post",
        positions=PositionConfig("learned"),
        attention=AttentionConfig(mask="bidirectional"),
        embedding=EmbeddingConfig(token_types=2, norm="present"),
        bias="everywhere",
        head="tied",
        init=INITIALIZERS,
        dropout=0.1,
    )


def roberta(num_layers: int, d_model: int, num_heads: int, vocab_size: int, max_length: int = 512) -> TransformerConfig:
    """A RoBERTa of any size. Positions start at row 2 of the table: fairseq numbers them from the padding id on."""
    return replace(
        bert(num_layers, d_model, num_heads, vocab_size, max_length, family="roberta"),
        norm_eps=1e-5,
        positions=PositionConfig("learned", offset=2),
        embedding=EmbeddingConfig(token_types=1, norm="present"),
    )


def albert(
    num_layers: int, d_model: int, num_heads: int, vocab_size: int, embedding_size: int = 128, d_ff: int | None = None
) -> TransformerConfig:
    """An ALBERT of any size; the tanh form of GELU, no dropout (google-research/albert, its v2 configurations)."""
    return replace(
        bert(num_layers, d_model, num_heads, vocab_size, family="albert", d_ff=d_ff),
        activation="gelu_tanh",
        embedding=EmbeddingConfig(size=embedding_size, token_types=2, norm="present"),
        sharing="all",
        dropout=0.0,
    )


def bert_base() -> TransformerConfig:
    """110M parameters."""
    return bert(12, 768, 12, vocab_size=30522)


def bert_large() -> TransformerConfig:
    """335M parameters."""
    return bert(24, 1024, 16, vocab_size=30522)


def roberta_base() -> TransformerConfig:
    """125M parameters."""
    return roberta(12, 768, 12, vocab_size=50265)


def roberta_large() -> TransformerConfig:
    """355M parameters."""
    return roberta(24, 1024, 16, vocab_size=50265)


def albert_base() -> TransformerConfig:
    """12M parameters."""
    return albert(12, 768, 12, vocab_size=30000)


def albert_large() -> TransformerConfig:
    """18M parameters."""
    return albert(24, 1024, 16, vocab_size=30000)


def albert_xlarge() -> TransformerConfig:
    """59M parameters; heads of 128 (1909.11942, table 1, and its released configurations)."""
    return albert(24, 2048, 16, vocab_size=30000)


def albert_xxlarge() -> TransformerConfig:
    """223M parameters."""
    return albert(12, 4096, 64, vocab_size=30000)
