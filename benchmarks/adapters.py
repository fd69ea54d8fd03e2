"""LoRA pairs that both sides of a benchmark hold: the same numbers beside our matrices and beside peft's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from xylem.models.config import TransformerConfig

ALPHA = 16
SIZE = 0.05  # large enough to change what is written
PROJECTIONS = {  # ours -> theirs, of LLaMA
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


def pairs(
    config: TransformerConfig, adapter: int, rank: int, size: float = SIZE
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """An adapter's path, A (L, I, R) and B (L, R, O), of deviation ``size``, for each projection."""
    rng, layers, width = np.random.default_rng((3, adapter)), config.num_layers, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    outputs = {"query": width, "key": keys, "value": keys, "gate": config.d_ff, "up": config.d_ff}
    inputs = {"output": width, "down": config.d_ff}
    for path in PROJECTIONS:
        name = path.split("/")[1]
        rows, columns = inputs.get(name, config.d_model), outputs.get(name, config.d_model)
        a = rng.standard_normal((layers, rows, rank), np.float32) / rows**0.5
        yield path, a, size * rng.standard_normal((layers, rank, columns), np.float32)


def grafted(config: TransformerConfig, base: Any, adapter: int, rank: int, size: float = SIZE) -> Any:
    """Our tree with an adapter's pairs beside its matrices."""
    import jax.numpy as jnp

    from xylem.models.conversion import flatten, unflatten
    from xylem.models.leaves import LowRank

    flat, scale = flatten(base), jnp.full(config.num_layers, ALPHA / rank)
    for path, a, b in pairs(config, adapter, rank, size):
        name = f"layers/{path}/kernel"
        flat[name] = LowRank(flat[name], jnp.asarray(a), jnp.asarray(b), scale)
    return unflatten(flat)


def attached(model: Any, config: TransformerConfig, ranks: list[int], size: float = SIZE) -> Any:
    """peft's model with adapters "0", "1", ... of these ranks."""
    import peft
    import torch

    targets = [name.split(".")[1] for name in PROJECTIONS.values()]
    for number, rank in enumerate(ranks):
        settings = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False)
        if number:
            model.add_adapter(str(number), settings)
        else:
            model = peft.PeftModelForCausalLM(model, settings, adapter_name="0")
        for path, a, b in pairs(config, number, rank, size):
            for layer, own_a, own_b in zip(model.base_model.model.model.layers, a, b, strict=True):
                module = layer.get_submodule(PROJECTIONS[path])
                with torch.no_grad():
                    module.lora_A[str(number)].weight.copy_(torch.from_numpy(own_a.T))
                    module.lora_B[str(number)].weight.copy_(torch.from_numpy(own_b.T))
    return model
