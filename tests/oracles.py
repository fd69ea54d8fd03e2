"""What the models are compared with: tiny random Hugging Face networks, drawn anew in every run.

torch and transformers are imported inside the functions, so that test modules can be collected without them.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from operations import apart
from safetensors.numpy import save_file

from xylem.models import build, hub
from xylem.models.config import TransformerConfig
from xylem.models.conversion import flatten, unflatten

IGNORED_LABEL = -100


@dataclass
class Pair:
    """A reference model, and the same one as ``hub`` loads it from what the reference wrote."""

    model: Any
    folder: Path
    config: TransformerConfig
    params: dict


def random_gpt2(rng: np.random.Generator, tied: bool, **values: Any) -> Any:
    """A GPT2LMHeadModel of odd sizes with every parameter random."""
    from transformers import GPT2Config, GPT2LMHeadModel

    heads = int(rng.integers(2, 5))
    settings = {
        "vocab_size": int(rng.integers(30, 50)) * 2 + 1,
        "n_positions": int(rng.integers(30, 40)),
        "n_embd": heads * (2 * int(rng.integers(2, 5)) + 1),
        "n_layer": int(rng.integers(2, 4)),
        "n_head": heads,
        "n_inner": 2 * int(rng.integers(10, 20)) + 1,
        "activation_function": str(rng.choice(["gelu_new", "gelu", "relu", "silu"])),
        "layer_norm_epsilon": float(10 ** rng.uniform(-6, -2)),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.25),
        "tie_word_embeddings": tied,
        **values,
    }
    return _randomised(GPT2LMHeadModel, GPT2Config(**settings, attn_implementation="eager"), rng)


def random_llama(rng: np.random.Generator, tied: bool, scaled: bool = False, **values: Any) -> Any:
    """A LlamaForCausalLM of odd sizes, 1 < K < N, no default left, with every parameter random.

    ``scaled`` asks for LLaMA 3.1's rotary frequencies with bounds that reach kept, blended and stretched ones.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    kv_heads, group = int(rng.integers(2, 4)), int(rng.integers(2, 4))
    heads, head_dim = kv_heads * group, 2 * int(rng.choice([3, 5, 7]))
    width = heads * int(rng.choice([3, 5, 7]))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(10 ** rng.uniform(1.5, 5))}
    if scaled:
        bounds = {"low_freq_factor": 1.0, "high_freq_factor": float(rng.uniform(3, 6))}
        length = {"original_max_position_embeddings": int(rng.integers(24, 40))}
        rope |= {"rope_type": "llama3", "factor": float(rng.uniform(2, 9)), **bounds, **length}
    settings = {
        "vocab_size": int(rng.integers(30, 50)) * 2 + 1,
        "hidden_size": width + heads if width == heads * head_dim else width,
        "intermediate_size": 2 * int(rng.integers(10, 20)) + 1,
        "num_hidden_layers": int(rng.integers(2, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "rms_norm_eps": float(10 ** rng.uniform(-6, -2)),
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        **values,
    }
    return _randomised(LlamaForCausalLM, LlamaConfig(**settings, attn_implementation="eager"), rng)


def _randomised(kind: Any, config: Any, rng: np.random.Generator) -> Any:
    """The model in evaluation mode; kernels keep the signal's size, scales and biases are far from 1 and 0."""
    import torch

    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                std = 1.0 if "embed" in name or "wte" in name or "wpe" in name else 1.5 / math.sqrt(config.hidden_size)
                drawn = std * rng.standard_normal(parameter.shape)
            elif name.endswith("bias"):
                drawn = 0.3 * rng.standard_normal(parameter.shape)
            else:
                drawn = 1.0 + 0.4 * rng.standard_normal(parameter.shape)
            parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    return model


def of_class(name: str, model: Any, rng: np.random.Generator) -> Any:
    """A model of another class with the configuration of ``model``, every parameter random."""
    import transformers

    return _randomised(getattr(transformers, name), model.config, rng)


def pair(model: Any, folder: Path, **saving: Any) -> Pair:
    """Write the reference, read it back through ``hub``."""
    model.save_pretrained(folder, **saving)
    return Pair(model, folder, *hub.load(folder))


def random_tokens(rng: np.random.Generator, vocab_size: int, batch: int = 3, length: int = 17) -> np.ndarray:
    """Token ids (B, T)."""
    return rng.integers(0, vocab_size, (batch, length)).astype(np.int32)


def reference_logits(model: Any, tokens: np.ndarray, real: np.ndarray | None = None) -> np.ndarray:
    """Logits (B, T, V) of the reference; ``real`` (B, T) is False on padding, positions count real tokens alone."""
    import torch

    arguments = {}
    if real is not None:
        positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
        arguments = {
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
            "position_ids": torch.from_numpy(positions.astype(np.int64)),
        }
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64)), **arguments).logits.numpy()


def our_logits(
    config: TransformerConfig, params: dict, tokens: np.ndarray, real: np.ndarray | None = None
) -> np.ndarray:
    """Logits (B, T, V) of ours, padding as a segment of its own."""
    segments = None if real is None else jnp.asarray(real.astype(np.int32))
    return np.asarray(_apply(config)(params, jnp.asarray(tokens), segments))


@functools.cache
def _apply(config: TransformerConfig) -> Callable:
    module = build(config)
    return jax.jit(lambda params, tokens, segments: module.apply({"params": params}, tokens, segments=segments).logits)


def reference_gradients(pair: Pair, tokens: np.ndarray, labels: np.ndarray, scratch: Path) -> dict:
    """Gradients of the mean cross-entropy with torch's autograd, laid out as our tree by ``hub`` itself."""
    import torch

    pair.model.zero_grad()
    logits = pair.model(torch.from_numpy(tokens.astype(np.int64))).logits
    target = torch.from_numpy(labels.astype(np.int64))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED_LABEL).backward()
    scratch.mkdir()
    shutil.copyfile(pair.folder / "config.json", scratch / "config.json")
    gradients = {name: parameter.grad.numpy() for name, parameter in pair.model.named_parameters()}
    save_file(gradients, scratch / "model.safetensors", metadata={"format": "pt"})
    return hub.load(scratch)[1]


def our_gradients(config: TransformerConfig, params: dict, tokens: np.ndarray, labels: np.ndarray) -> dict:
    """The same gradients of ours, by jax.grad, with the loss written out."""

    return _gradient(config)(params, jnp.asarray(tokens), jnp.asarray(labels))


@functools.cache
def _gradient(config: TransformerConfig) -> Callable:
    module = build(config)

    def loss(params, tokens, labels):
        scores = jax.nn.log_softmax(module.apply({"params": params}, tokens).logits)
        kept = labels != IGNORED_LABEL
        picked = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(kept, picked, 0.0)) / jnp.sum(kept)

    return jax.jit(jax.grad(loss))


error = apart  # of arrays, as of trees


def tree_error(ours: dict, reference: dict) -> float:
    """The worst leaf's error; a leaf far below the largest (a key bias has no gradient) is held to 1e-3 of that one."""
    assert flatten(ours).keys() == flatten(reference).keys()
    return apart(ours, reference, floor=1e-3)


def edited(params: dict, **leaves: Any) -> dict:
    """The tree with some leaves replaced: ``edited(p, **{"final_norm/scale": ones})``."""
    flat = flatten(params)
    assert leaves.keys() <= flat.keys()
    return unflatten({**flat, **leaves})


def random_encoder(rng: np.random.Generator, family: str, **values: Any) -> Any:
    """A BertForPreTraining, RobertaForMaskedLM or AlbertForPreTraining of odd sizes with every parameter random."""
    import transformers

    heads = int(rng.integers(2, 5))
    settings = {
        "vocab_size": int(rng.integers(30, 50)) * 2 + 1,
        "max_position_embeddings": int(rng.integers(30, 40)),
        "hidden_size": heads * (2 * int(rng.integers(2, 5)) + 1),
        "num_hidden_layers": int(rng.integers(2, 4)),
        "num_attention_heads": heads,
        "intermediate_size": 2 * int(rng.integers(10, 20)) + 1,
        "hidden_act": "gelu" if family == "roberta" else str(rng.choice(["gelu_new", "gelu", "relu", "silu"])),
        "layer_norm_eps": float(10 ** rng.uniform(-6, -2)),
        "type_vocab_size": 1 if family == "roberta" else 2,
        "pad_token_id": int(rng.integers(1, 4)) if family == "roberta" else 0,
        **({"embedding_size": 2 * int(rng.integers(4, 8)) + 1} if family == "albert" else {}),
        **values,
    }
    names = {"bert": "BertForPreTraining", "roberta": "RobertaForMaskedLM", "albert": "AlbertForPreTraining"}
    config = {"bert": "BertConfig", "roberta": "RobertaConfig", "albert": "AlbertConfig"}[family]
    made = getattr(transformers, config)(**settings, attn_implementation="eager")
    return _randomised(getattr(transformers, names[family]), made, rng)


def random_gpt1(rng: np.random.Generator, **values: Any) -> Any:
    """An OpenAIGPTLMHeadModel of odd sizes with every parameter random."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    heads = int(rng.integers(2, 5))
    settings = {
        "vocab_size": int(rng.integers(30, 50)) * 2 + 1,
        "n_positions": int(rng.integers(30, 40)),
        "n_embd": heads * (2 * int(rng.integers(2, 5)) + 1),
        "n_layer": int(rng.integers(2, 4)),
        "n_head": heads,
        "afn": str(rng.choice(["gelu", "relu", "silu"])),
        "layer_norm_epsilon": float(10 ** rng.uniform(-6, -2)),
        **values,
    }
    return _randomised(OpenAIGPTLMHeadModel, OpenAIGPTConfig(**settings), rng)


def random_seq2seq(rng: np.random.Generator, family: str, **values: Any) -> Any:
    """A BartForConditionalGeneration or T5ForConditionalGeneration (``t5`` or ``t5_1_1``) of odd sizes, all random."""
    import transformers

    heads, layers = int(rng.integers(2, 5)), int(rng.integers(2, 4))
    head_dim, vocab = 2 * int(rng.integers(2, 5)) + 1, int(rng.integers(30, 50)) * 2 + 1
    eps, d_ff = float(10 ** rng.uniform(-6, -2)), 2 * int(rng.integers(10, 20)) + 1
    if family == "bart":
        settings = {
            "vocab_size": vocab,
            "d_model": heads * head_dim,
            "max_position_embeddings": int(rng.integers(30, 40)),
            "activation_function": str(rng.choice(["gelu_new", "gelu", "relu", "silu"])),
            "scale_embedding": bool(rng.integers(2)),
            "encoder_layers": layers,
            "decoder_layers": 5 - layers,
            **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
               (("attention_heads", heads), ("ffn_dim", d_ff))},
            **dict.fromkeys(("dropout", "attention_dropout"), 0.25),
            "pad_token_id": 1,
            "decoder_start_token_id": int(rng.integers(2, 9)),
            **values,
        }  # fmt: skip
        made = transformers.BartConfig(**settings, attn_implementation="eager")
        return _randomised(transformers.BartForConditionalGeneration, made, rng)
    settings = {
        "vocab_size": vocab,
        "d_model": 2 * int(rng.integers(6, 12)) + 1,
        "d_kv": head_dim,
        "num_heads": heads,
        "d_ff": d_ff,
        "num_layers": layers,
        "num_decoder_layers": 5 - layers,
        "relative_attention_num_buckets": 2 * int(rng.integers(3, 6)),
        "relative_attention_max_distance": int(rng.integers(14, 20)),
        "layer_norm_epsilon": eps,
        "feed_forward_proj": "relu" if family == "t5" else "gated-gelu",
        "tie_word_embeddings": family == "t5",
        **values,
    }
    model = _randomised(transformers.T5ForConditionalGeneration, transformers.T5Config(**settings), rng)
    if family == "t5_1_1":  # transformers ties every new model; a checkpoint that holds both tables is not tied
        import torch

        drawn = torch.from_numpy(rng.standard_normal(model.lm_head.weight.shape).astype(np.float32))
        model.lm_head.weight = torch.nn.Parameter(drawn / math.sqrt(model.config.d_model))
    return model


def with_small_queries(model: Any) -> Any:
    """A T5 whose queries are smaller by sqrt(d_kv), as it begins (modeling_t5.py, ``_init_weights``): it does not scale
    its scores, and softmaxes of large ones turn rounding into large errors of gradients."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".q.weight"):
                parameter.mul_(model.config.d_kv**-0.5)
    return model


def random_mamba(rng: np.random.Generator, tied: bool, **values: Any) -> Any:
    """A MambaForCausalLM of odd sizes, no default left, every parameter random, whose steps let it hear its past."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    settings = {
        "vocab_size": int(rng.integers(30, 50)) * 2 + 1,
        "hidden_size": 2 * int(rng.integers(6, 12)) + 1,
        "expand": int(rng.integers(1, 4)),
        "state_size": int(rng.integers(3, 8)),
        "conv_kernel": int(rng.integers(2, 6)),
        "time_step_rank": int(rng.integers(2, 6)),
        "num_hidden_layers": int(rng.integers(2, 4)),
        "layer_norm_epsilon": float(10 ** rng.uniform(-6, -2)),
        "tie_word_embeddings": tied,
        **values,
    }
    model = _randomised(MambaForCausalLM, MambaConfig(**settings), rng)
    with torch.no_grad():
        for layer in model.backbone.layers:
            for parameter in (layer.mixer.A_log, layer.mixer.conv1d.weight):
                drawn = 0.6 * rng.standard_normal(parameter.shape)
                parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    return model
