"""What every decoder offers, whatever its layers are: the calls that losses, samplers and methods rely on."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from xylem.models import fused
from xylem.models.layers import parameter
from xylem.models.leaves import Transposed, is_leaf
from xylem.models.stack import Intervention


class Output(struct.PyTreeNode):
    """What a model returns. Inside one jit, what nobody reads is never computed.

    Attributes:
        logits: float32.
        hidden: the final normalised state, which ``module.head`` turns into logits.
        cache: the cache after these tokens, when one was given.
        taps: site -> what passed there, stacked by layer (the embedding has no layer axis).
    """

    logits: Float[Array, "B T V"] | Any
    hidden: Float[Array, "B T D"] | Any
    cache: Any
    taps: dict[str, Array]


class LanguageModel(nn.Module):
    """Base of the decoder families: a config, the door inside (``stack.py``), and the head apart from the rest.

    A family adds ``__call__(tokens, *, positions, segments, token_types, embeddings, cache, train) -> Output`` and
    ``init_cache(batch, max_length, params=None)``, the cache of its layers before a text. ``config`` has at least
    ``family``, ``vocab_size``, ``max_length``, ``num_layers``, ``d_model``, ``head`` (tied or untied) and ``compute``.
    """

    config: Any
    taps: tuple[str, ...] = ()
    intervene: Intervention | None = None

    SITES: ClassVar[tuple[str, ...]] = ()

    @nn.nowrap
    def head(self, params: dict[str, Any], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of final states: the output matrix apart from the rest, so losses and prefill can chunk it."""
        tied = self.config.head != "untied"
        weight = params["embed"]["embedding"] if tied else params["head"]["kernel"]
        equation = "...d,vd->...v" if tied else "...d,dv->...v"
        if self.config.head == "tied_scaled":
            hidden = hidden * self.config.d_model**-0.5
        held = isinstance(weight, Transposed)
        if is_leaf(weight) and not held:
            return weight.einsum(equation, hidden.astype(jnp.float32))
        weight = weight.rows if held else jnp.asarray(weight)
        kernels = fused.choose(self.config.compute, jax.default_backend())
        if held or (kernels.matmul and tied):
            logits = fused.few_rows(hidden.reshape(-1, hidden.shape[-1]), weight.astype(hidden.dtype))
            return logits.reshape(*hidden.shape[:-1], logits.shape[-1])
        if kernels.wide_product and hidden.dtype != jnp.float32:
            return fused.wide_product(hidden, weight, tied)
        # Summed and kept in float32 even where both sides are bfloat16.
        return jnp.einsum(equation, hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)

    @nn.nowrap
    def head_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """The part of the tree that ``head`` reads."""
        name = "head" if self.config.head == "untied" else "embed"
        return {name: params[name]}

    @nn.nowrap
    def check_call(self, token_types: Array | None) -> None:
        """Raise ValueError for token types where the embedding has none, and for taps at sites that there are not."""
        embedding = getattr(self.config, "embedding", None)
        if token_types is not None and not (embedding and embedding.token_types):
            raise ValueError(f"token_types: the {self.config.family} family has no token types")
        unknown = [name for name in self.taps if name not in self.SITES]
        if unknown:
            raise ValueError(f"taps {unknown}: the sites are {self.SITES}")


class Head(nn.Module):
    """Owner of an untied output matrix, so that ``init`` makes it; logits always come from ``LanguageModel.head``."""

    config: Any

    @nn.compact
    def __call__(self) -> Any:
        shape = (self.config.d_model, self.config.vocab_size)
        return parameter(self, "kernel", self.config.init.kernel, shape, self.config.compute.param_dtype)
