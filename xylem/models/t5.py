"""T5: what makes an encoder-decoder a T5, and every published size of both versions.

Pre-norm RMSNorm, no biases, a learned bias a head and bucket of relative distance, shared by the layers of a side, and
attention scores that are not scaled (1910.10683, section 2.1). Version 1.0 has ReLU and a tied head on scaled states,
1.1 a gated GELU and an untied head (the released configurations).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from xylem.models.config import AttentionConfig, Initializers, PositionConfig, Seq2SeqConfig, TransformerConfig


def initializers(d_model: int, d_ff: int) -> Initializers:
    """Embeddings 1, kernels 1/sqrt(inputs) (mesh_tensorflow, layers.py); the down projection has d_ff inputs."""
    return Initializers(embedding=1.0, positions=d_model**-0.5, kernel=d_model**-0.5, residual=d_ff**-0.5)


def t5(
    num_layers: int,
    d_model: int,
    num_heads: int,
    head_dim: int,
    d_ff: int,
    version: Literal["1.0", "1.1"] = "1.0",
    vocab_size: int = 32128,
    max_length: int = 512,
) -> Seq2SeqConfig:
    """A T5 of any size: ``num_layers`` on each side."""
    encoder = TransformerConfig(
        family="t5",
        vocab_size=vocab_size,
        max_length=max_length,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        d_ff=d_ff,
        activation="relu" if version == "1.0" else "geglu",
        norm="rmsnorm",
        norm_eps=1e-6,
        positions=PositionConfig("relative", buckets=32, max_distance=128),
        attention=AttentionConfig(mask="bidirectional", scale="none"),
        bias="none",
        head="tied_scaled" if version == "1.0" else "untied",
        init=initializers(d_model, d_ff),
        dropout=0.1,
    )
    decoder = replace(encoder, attention=AttentionConfig(scale="none"))
    return Seq2SeqConfig("t5", encoder, decoder, decoder_start=0)  # targets begin with the padding id


def t5_small() -> Seq2SeqConfig:
    """60M parameters."""
    return t5(6, 512, 8, 64, 2048)


def t5_base() -> Seq2SeqConfig:
    """223M parameters."""
    return t5(12, 768, 12, 64, 3072)


def t5_large() -> Seq2SeqConfig:
    """738M parameters."""
    return t5(24, 1024, 16, 64, 4096)


def t5_3b() -> Seq2SeqConfig:
    """2.9B parameters; heads of 128 (1910.10683, section 3.6)."""
    return t5(24, 1024, 32, 128, 16384)


def t5_11b() -> Seq2SeqConfig:
    """11B parameters."""
    return t5(24, 1024, 128, 128, 65536)


def t5_1_1_small() -> Seq2SeqConfig:
    """77M parameters."""
    return t5(8, 512, 6, 64, 1024, "1.1")


def t5_1_1_base() -> Seq2SeqConfig:
    """248M parameters."""
    return t5(12, 768, 12, 64, 2048, "1.1")


def t5_1_1_large() -> Seq2SeqConfig:
    """783M parameters."""
    return t5(24, 1024, 16, 64, 2816, "1.1")


def t5_1_1_xl() -> Seq2SeqConfig:
    """2.8B parameters."""
    return t5(24, 2048, 32, 64, 5120, "1.1")


def t5_1_1_xxl() -> Seq2SeqConfig:
    """11B parameters."""
    return t5(24, 4096, 64, 64, 10240, "1.1")
