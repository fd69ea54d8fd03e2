"""Heads for fine-tuning: a few fresh weights beside a pretrained tree, and pure functions of final states.

``classifier`` judges a whole text by one state: that of an encoder's first token, behind its tanh layer (BERT
1810.04805, section 4.1; RoBERTa, which was pretrained without such a layer, has a fresh one, ``classifier/dense``), or
that of a decoder's last one (GPT-1: Radford et al. 2018, section 3.2). ``tagger`` judges every token by its own (BERT,
section 5.3). The trunk does not know of them: the tree of ``add`` goes to ``module.apply`` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.config import ModelConfig, TransformerConfig
from xylem.models.language_model import LanguageModel, Output
from xylem.models.layers import add_bias, einsum
from xylem.models.masked_lm import EncoderOutput

Kind = Literal["classifier", "tagger"]
# Of what a head reads (google-research/bert, run_classifier.py; openai/finetune-transformer-lm, train.py, clf_pdrop).
DROPOUT = 0.1


def add(config: ModelConfig, params: dict[str, Any], key: PRNGKeyArray, num_labels: int, kind: Kind) -> dict[str, Any]:
    """The tree with a fresh head of ``kind``, and without those of an encoder's pretraining, which nothing reads now.

    Raises:
        ConfigError: no such head for this family, or no label.
    """
    causal = isinstance(config, TransformerConfig) and config.attention.mask == "causal"
    if not isinstance(config, TransformerConfig) or (causal and kind == "tagger"):
        allowed = "a transformer can have a classifier, one that reads in both directions a tagger"
        raise ConfigError("kind", f"{kind} of {config.family}", allowed)
    if num_labels < 1:
        raise ConfigError("num_labels", num_labels, "it must be at least 1")
    keys, stored = jax.random.split(key), params["embed"]["embedding"].dtype

    def linear(key: PRNGKeyArray, outputs: int) -> dict[str, Array]:
        kernel = config.init.kernel * jax.random.normal(key, (config.d_model, outputs), stored)
        return {"kernel": kernel, "bias": jnp.zeros(outputs, stored)}

    head: dict[str, Any] = linear(keys[0], num_labels)
    if causal:
        del head["bias"]  # section 3.2, equation 3: softmax(h W)
        return {**params, kind: head}  # its own head stays: the auxiliary objective reads it
    unread = {"head", "pair_head", "classifier", "tagger"} | ({"pooler"} if kind == "tagger" else set())
    trunk = {name: part for name, part in params.items() if name not in unread}
    if kind == "classifier" and "pooler" not in trunk:
        dense = linear(keys[1], config.d_model)
        if config.embedding.token_types == 2:
            trunk["pooler"] = dense
        else:
            head["dense"] = dense
    return {**trunk, kind: head}


def held(params: dict[str, Any]) -> tuple[int, Kind] | None:
    """How many labels the tree's head has, and its kind; None where it has none."""
    kinds: tuple[Kind, ...] = ("classifier", "tagger")
    return next(((params[kind]["kernel"].shape[1], kind) for kind in kinds if kind in params), None)


def classify(params: dict[str, Any], out: Output, segments: Int[Array, "B T"] | None = None) -> Float[Array, "B C"]:
    """Logits of each text's label, from what the trunk gave for it; ``segments`` as in ``text_states``."""
    return scores(params["classifier"], text_states(params, out, segments))


def tag(params: dict[str, Any], out: Output) -> Float[Array, "B T C"]:
    """Logits of each token's label."""
    return scores(params["tagger"], out.hidden)


def judged(module: LanguageModel, params: dict[str, Any], batch: Mapping[str, Array]) -> Float[Array, "..."]:
    """Logits of what the head of ``params`` judges in a batch of ``tokens``, ``segments`` and perhaps ``token_types``:
    (B, C) of texts, (B, T, C) of tokens."""
    more: dict[str, Any] = {name: batch[name] for name in ("segments", "token_types") if name in batch}
    out: Any = module.apply({"params": params}, batch["tokens"], **more)
    return tag(params, out) if "tagger" in params else classify(params, out, batch["segments"])


def text_states(
    params: dict[str, Any], out: Output, segments: Int[Array, "B T"] | None = None, rng: PRNGKeyArray | None = None
) -> Float[Array, "B D"]:
    """What ``classifier`` reads: one state a text; rows of ``segments`` are 1 on the text and 0 on what pads it.

    With ``rng`` dropout is applied.
    """
    if not isinstance(out, EncoderOutput):
        batch, length = out.hidden.shape[:2]
        last = jnp.full(batch, length - 1) if segments is None else (segments > 0).sum(1) - 1
        return dropped(out.hidden[jnp.arange(batch), last], rng)
    if "dense" not in params["classifier"]:
        return dropped(out.pooled, rng)
    inner = None if rng is None else jax.random.fold_in(rng, 1)
    dense = scores(params["classifier"]["dense"], dropped(out.hidden[:, 0], inner))
    return dropped(jnp.tanh(dense).astype(out.hidden.dtype), rng)


def scores(head: dict[str, Any], states: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
    """Float32 logits of states: ``head`` is ``params["classifier"]`` or ``params["tagger"]``."""
    y = einsum("...i,io->...o", states, head["kernel"])
    return (add_bias(y, head["bias"]) if "bias" in head else y).astype(jnp.float32)


def dropped(x: Float[Array, "*B D"], rng: PRNGKeyArray | None) -> Float[Array, "*B D"]:
    """Inverted dropout of rate ``DROPOUT``; none without ``rng``."""
    if rng is None:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1.0 - DROPOUT, x.shape), x / (1.0 - DROPOUT), 0.0).astype(x.dtype)
