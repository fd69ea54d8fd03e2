"""Blocks, the scan over layers, and the decoder-only language model built of them.

The residual stream of a pre-norm block::

    h ──┬─ norm ─ attention ─(+)──┬─ norm ─ mlp ─(+)── h'
        └────────────────────┘    └──────────────┘

**Runs.** Layers of equal structure are stored stacked and scanned as one run, ``layers``; a tree may hold several runs
(``layers_0``, ``layers_1``, ...) when layers differ in structure. The scan reads which from the tree.

**Inside.** ``module.clone(taps=("block_out",))`` returns what passed those sites, stacked by layer, in ``Output.taps``;
``module.clone(intervene=fn)`` replaces it: ``fn(layer, site, x) -> x`` sees every site of every layer (traced, so
``layer`` is an array; the embedding's is -1). Absent, neither costs anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xylem.models.attention import Attention
from xylem.models.cache import KVCache
from xylem.models.config import TransformerConfig
from xylem.models.fused import Choice, choose
from xylem.models.layers import MLP, Adapter, Embed, Norm, parameter
from xylem.models.leaves import is_leaf
from xylem.models.masks import Mask
from xylem.models.positions import rope_tables, segment_positions, sinusoidal
from xylem.sharding import constrain

SITES = ("embed", "attention_out", "mlp_inner", "mlp_out", "block_out")
Intervention = Callable[[Array, str, Array], Array]


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
    cache: KVCache | None
    taps: dict[str, Array]


class Context(struct.PyTreeNode):
    """What every layer of one call shares."""

    mask: Mask
    rope: tuple[Array, Array] | None
    rng: PRNGKeyArray | None
    train: bool = struct.field(pytree_node=False)


class Block(nn.Module):
    """One pre-norm layer: attention and MLP, each behind a norm and added to the stream."""

    config: TransformerConfig
    kernels: Choice

    @nn.compact
    def __call__(self, h: Float[Array, "B T D"], context: Context, cache: KVCache | None, layer: Any, site: Any):
        config, kernels = self.config, self.kernels
        drop = nn.Dropout(config.dropout, deterministic=not context.train)
        x = Norm(config, kernels, name="attention_norm")(h)
        attention = Attention(config, kernels, name="attention")
        x, cache = attention(x, context.mask, context.rope, cache, layer, context.train)
        h = constrain(h + drop(self._slot("attention_adapter", site("attention_out", x))), "batch", None, None)
        x = Norm(config, kernels, name="mlp_norm")(h)
        x = site("mlp_out", MLP(config, kernels, name="mlp")(x, site))
        h = constrain(h + drop(self._slot("mlp_adapter", x)), "batch", None, None)
        return site("block_out", h), cache

    def _slot(self, name: str, x: Array) -> Array:
        return Adapter(name=name)(x) if self.has_variable("params", name) else x


class _Sites:
    """The door of one layer: applies the intervention at each site, then keeps what is tapped."""

    def __init__(self, layer: Any, taps: tuple[str, ...], intervene: Intervention | None):
        self.layer, self.taps, self.intervene, self.kept = layer, taps, intervene, {}

    def __call__(self, name: str, x: Array) -> Array:
        x = x if self.intervene is None else self.intervene(self.layer, name, x)
        if name in self.taps:
            self.kept[name] = x
        return x


def block_apply(
    block: nn.Module,
    layer_params: Any,
    h: Float[Array, "B T D"],
    context: Context,
    cache: KVCache | None,
    layer: Int[Array, ""] | int,
    taps: tuple[str, ...] = (),
    intervene: Intervention | None = None,
) -> tuple[Array, KVCache | None, dict[str, Array]]:
    """One layer as a pure function of its own parameters: what the scan, and a pipeline stage, repeat.

    Returns the new stream, the cache and what was tapped. Dropout depends on the layer's number alone, so it does not
    change with how the layers are cut into runs or recomputed.
    """
    site = _Sites(layer, taps, intervene)
    rngs = {} if context.rng is None else {"dropout": jax.random.fold_in(context.rng, layer)}
    out: Any = block.apply({"params": layer_params}, h, context, cache, layer, site, rngs=rngs)
    return *out, site.kept


def runs(params: dict[str, Any]) -> list[str]:
    """Names of the runs of layers in a tree, in order: ``["layers"]`` or ``["layers_0", "layers_1", ...]``."""
    names = [name for name in params if re.fullmatch(r"layers(_\d+)?", name)]
    return sorted(names, key=lambda name: int(name.partition("_")[2] or 0))


def run_length(run: Any) -> int:
    """How many layers a run stacks."""
    return jax.tree.leaves(run)[0].shape[0]


def scan_layers(
    block: nn.Module,
    stacks: list[Any],
    h: Float[Array, "B T D"],
    context: Context,
    cache: KVCache | None,
    taps: tuple[str, ...],
    intervene: Intervention | None,
    remat: str,
    unroll: bool,
) -> tuple[Array, KVCache | None, dict[str, Array]]:
    """Every layer of every run in order; the cache is carried, taps come back stacked by layer."""

    def body(carry, inputs):
        (h, cache), (layer_params, layer) = carry, inputs
        h, cache, kept = block_apply(block, layer_params, h, context, cache, layer, taps, intervene)
        return (h, cache), kept

    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        # Inside a scan nothing can be merged across iterations; unrolled, a barrier asks XLA to recompute all the same.
        body = jax.checkpoint(body, policy=policy, prevent_cse=unroll)
    carry, start, kept = (h, cache), 0, []
    for stack in stacks:
        length = run_length(stack)
        inputs = (stack, start + jnp.arange(length))
        carry, tapped = jax.lax.scan(body, carry, inputs, unroll=length if unroll else 1)
        start, kept = start + length, [*kept, tapped]
    return *carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)


class CausalLM(nn.Module):
    """A decoder-only language model: GPT and LLaMA are two settings of its config.

    ``params`` hold ``embed``, ``positions`` (learned ones), the runs of ``layers``, ``final_norm`` and, when it is not
    tied to the embedding, ``head``.
    """

    config: TransformerConfig
    taps: tuple[str, ...] = ()
    intervene: Intervention | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "#B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        embeddings: Float[Array, "B T D"] | None = None,
        cache: KVCache | None = None,
        train: bool = False,
    ) -> Output:
        """Logits of the next token at every position.

        ``segments`` (0 is padding) keep packed documents apart, and positions then count from each document's start.
        ``embeddings`` replace the look-up of ``tokens``. With a ``cache`` the tokens continue each of its rows.
        ``train=True`` applies dropout and needs ``rngs={"dropout": key}`` when the rate is above 0.
        """
        config, kernels = self.config, choose(self.config.compute, jax.default_backend())
        self._check(tokens, segments, token_types, cache)
        embed = Embed(config.vocab_size, config.init.embedding, config, name="embed")
        h = embed(tokens) if embeddings is None else embeddings.astype(config.compute.dtype)
        if positions is None:
            positions = self._positions(tokens, segments, cache)
        if config.positions == "learned":
            h = h + Embed(config.max_length, config.init.positions, config, name="positions")(positions)
        elif config.positions == "sinusoidal":
            h = h + sinusoidal(positions, config.d_model).astype(h.dtype)
        h = constrain(nn.Dropout(config.dropout, deterministic=not train)(h), "batch", None, None)
        door = _Sites(jnp.int32(-1), self.taps, self.intervene)
        h = door("embed", h)

        rope = None
        if config.rope_theta is not None:
            rope = rope_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        offset = None if cache is None else cache.lengths
        context = Context(
            mask=Mask(query_segments=segments, key_segments=segments, offset=offset),
            rope=rope,
            rng=self.make_rng("dropout") if train and config.dropout > 0.0 else None,
            train=train,
        )
        block = Block(config, kernels, parent=None)
        stacks = self._layers(block, h, context)
        layer_taps = tuple(name for name in self.taps if name != "embed")
        remat, unroll = config.compute.remat, kernels.unroll
        h, cache, kept = scan_layers(block, stacks, h, context, cache, layer_taps, self.intervene, remat, unroll)
        hidden = Norm(config, kernels, name="final_norm")(h)
        if config.head == "untied":
            # Named here so that init makes it; logits always come from ``head``.
            _Head(config, name="head")()
        logits = self.head(dict(self.variables["params"]), hidden)
        cache = None if cache is None else cache.advance(tokens.shape[1])
        return Output(logits=logits, hidden=hidden, cache=cache, taps={**door.kept, **kept})

    @nn.nowrap
    def head(self, params: dict[str, Any], hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of final states: the output matrix apart from the rest, so losses and prefill can chunk it."""
        if self.config.head == "tied":
            weight, equation = params["embed"]["embedding"], "...d,vd->...v"
        else:
            weight, equation = params["head"]["kernel"], "...d,dv->...v"
        if is_leaf(weight):
            return weight.einsum(equation, hidden).astype(jnp.float32)
        # Summed and kept in float32 even where both sides are bfloat16.
        return jnp.einsum(equation, hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)

    @nn.nowrap
    def head_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """The part of the tree that ``head`` reads."""
        name = "embed" if self.config.head == "tied" else "head"
        return {name: params[name]}

    @nn.nowrap
    def _layers(self, block: nn.Module, h: Array, context: Context) -> list[Any]:
        """The runs the tree holds; when there is none yet, one run of freshly initialised layers."""
        held = dict(self.variables.get("params", {}))
        names = runs(held)
        if not names:
            quiet = context.replace(train=False, rng=None)

            def init(key):
                keys = jax.random.split(key, self.config.num_layers)
                site = _Sites(0, (), None)
                return jax.vmap(lambda k: block.init(k, h, quiet, None, 0, site)["params"])(keys)

            return [self.param("layers", init)]
        stacks = [held[name] for name in names]
        count = sum(run_length(stack) for stack in stacks)
        if count != self.config.num_layers:
            raise ValueError(
                f"{names}: the parameters hold {count} layers, the config asks for {self.config.num_layers}"
            )
        return stacks

    @nn.nowrap
    def _positions(self, tokens: Array, segments: Array | None, cache: KVCache | None) -> Int[Array, "#B T"]:
        if segments is not None:
            return segment_positions(segments)
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        return steps if cache is None else cache.lengths[:, None] + steps

    @nn.nowrap
    def _check(self, tokens: Array, segments: Array | None, token_types: Array | None, cache: KVCache | None) -> None:
        config = self.config
        if config.positions == "learned" and tokens.shape[1] > config.max_length:
            raise ValueError(f"{tokens.shape[1]} tokens: the position table has max_length = {config.max_length} rows")
        if token_types is not None:
            raise ValueError(f"token_types: the {config.family} family has no token types")
        if segments is not None and cache is not None:
            raise ValueError("segments and cache exclude each other: a cached row is one document")
        unknown = [name for name in self.taps if name not in SITES]
        if unknown:
            raise ValueError(f"taps {unknown}: the sites are {SITES}")


class _Head(nn.Module):
    """Owner of the untied output matrix."""

    config: TransformerConfig

    @nn.compact
    def __call__(self) -> Any:
        shape = (self.config.d_model, self.config.vocab_size)
        return parameter(self, "kernel", self.config.init.kernel, shape, self.config.compute.param_dtype)
