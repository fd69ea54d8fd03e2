"""Mamba: what makes a language model a Mamba, and every published size.

Blocks of one kind: RMSNorm, then a mixer of a causal convolution and a selective scan behind a gate (2312.00752,
figure 3 and section 3.4); the inner width is twice the model's, 16 states a channel, the head tied to the embedding.
"""

from __future__ import annotations

from typing import Literal

from xylem.models.state_config import MambaConfig, MambaInitializers


def initializers(num_layers: int, d_model: int, d_inner: int, conv_width: int, dt_rank: int) -> MambaInitializers:
    """Those of the released code (state-spaces/mamba, modules/mamba_simple.py and models/mixer_seq_simple.py).

    Its linear maps start uniform within 1 / sqrt(inputs), torch's default; ours normal, of the same variance. Output
    kernels are scaled by 1 / sqrt(layers), step sizes drawn as in 2312.00752, section 3.6.
    """
    return MambaInitializers(
        embedding=0.02,
        kernel=(3 * d_model) ** -0.5,
        selection=(3 * d_inner) ** -0.5,
        residual=(3 * d_inner * num_layers) ** -0.5,
        conv=conv_width**-0.5,
        delta=dt_rank**-0.5,
        delta_min=1e-3,
        delta_max=0.1,
        delta_floor=1e-4,
    )


def mamba(
    num_layers: int,
    d_model: int,
    vocab_size: int,
    max_length: int,
    expand: int = 2,
    state_size: int = 16,
    conv_width: int = 4,
    dt_rank: int | None = None,
    head: Literal["tied", "untied"] = "tied",
) -> MambaConfig:
    """A Mamba of any size; ``dt_rank`` is ``d_model / 16``, rounded up, unless told otherwise."""
    d_inner, dt_rank = expand * d_model, dt_rank or -(-d_model // 16)
    return MambaConfig(
        family="mamba",
        vocab_size=vocab_size,
        max_length=max_length,
        num_layers=num_layers,
        d_model=d_model,
        d_inner=d_inner,
        state_size=state_size,
        conv_width=conv_width,
        dt_rank=dt_rank,
        discretization="euler",
        norm_eps=1e-5,
        head=head,
        init=initializers(num_layers, d_model, d_inner, conv_width, dt_rank),
    )


def _published(num_layers: int, d_model: int) -> MambaConfig:
    # 2312.00752, table 12, with twice the layers of a transformer; the vocabulary is GPT-NeoX's, rounded up to 50,280;
    # trained on 2,048 tokens (appendix E.2).
    return mamba(num_layers, d_model, vocab_size=50_280, max_length=2048)


def mamba_130m() -> MambaConfig:
    """129M parameters."""
    return _published(24, 768)


def mamba_370m() -> MambaConfig:
    """372M parameters."""
    return _published(48, 1024)


def mamba_790m() -> MambaConfig:
    """793M parameters."""
    return _published(48, 1536)


def mamba_1_4b() -> MambaConfig:
    """1.4B parameters."""
    return _published(48, 2048)


def mamba_2_8b() -> MambaConfig:
    """2.8B parameters."""
    return _published(64, 2560)
