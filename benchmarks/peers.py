"""The peers of ``train_step.py``: the same network in torch, started from our first weights."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train_step import Workload

# The optimizer all sides use; field names are those of xylem's OptimizerConfig.
ADAMW = {"learning_rate": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
PROBE = 2048  # side of the probe's square matrices


def batches(vocab: int, batch: int, length: int, count: int = 4) -> list[tuple[Any, Any]]:
    """The few batches of random (tokens, labels) that every side cycles through: all learn the same by heart."""
    import numpy as np

    draws = np.random.default_rng(0).integers(0, vocab, (count, batch, length + 1))
    return [(draw[:, :-1], draw[:, 1:]) for draw in draws]


def make(
    kind: str,
    workload: Workload,
    weights: str,
    peer: str | None,
    threads: int,
    attach: Callable[[Any], Any] = lambda model: model,
) -> Callable[[int], float]:
    """``step(i) -> loss`` of ``probe``, ``nanogpt``, ``nanogpt-fused``, ``hf`` or ``hf-compile``.

    ``-fused`` takes torch's fused AdamW where nanoGPT, on a CPU, does not; Hugging Face sides always have it, and train
    what ``attach`` makes of their model.
    """
    if kind == "probe":
        return probe()
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)
    if kind in ("nanogpt", "nanogpt-fused"):
        if peer is None:
            raise SystemExit("nanogpt needs --peer DIR, a checkout of it")
        model, optimizer = _nanogpt(workload, weights, peer, fused=kind.endswith("fused"))
        logits_of = None
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(weights, attn_implementation="sdpa", dtype=torch.float32)
        model = attach(model).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        optimizer = adamw(model, fused=True)
        run = torch.compile(model) if kind == "hf-compile" else model
        logits_of = lambda tokens: run(input_ids=tokens, use_cache=False).logits  # noqa: E731

    pairs = batches(workload.vocab, workload.batch, workload.length)
    data = [(torch.tensor(tokens), torch.tensor(labels)) for tokens, labels in pairs]

    def step(index: int) -> float:
        tokens, labels = data[index % len(data)]
        if logits_of is None:
            loss = model(tokens, labels)[1]
        else:
            loss = functional.cross_entropy(logits_of(tokens).flatten(0, 1), labels.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def probe() -> Callable[[int], float]:
    """One square float32 product of NumPy's BLAS."""
    import numpy as np

    a, b = np.random.default_rng(0).standard_normal((2, PROBE, PROBE)).astype(np.float32)

    def step(index: int) -> float:
        return float((a @ b)[0, 0])

    return step


def adamw(model: Any, fused: bool) -> Any:
    """Weight decay on matrices alone, as ours and nanoGPT's."""
    import torch

    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.dim() >= 2], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in learned if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (ADAMW["beta1"], ADAMW["beta2"])
    return torch.optim.AdamW(groups, lr=ADAMW["learning_rate"], betas=betas, eps=ADAMW["eps"], fused=fused)


def _nanogpt(workload: Workload, weights: str, peer: str, fused: bool) -> tuple[Any, Any]:
    """nanoGPT's ``model.py`` from a checkout, and its own optimizer unless ``fused``."""
    import torch
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(peer) / "model.py")
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["nanogpt_model"] = code  # its dataclass looks itself up there
    spec.loader.exec_module(code)
    w = workload
    config = code.GPTConfig(w.length, w.vocab, w.layers, w.heads, w.width, dropout=0.0, bias=True)
    model = code.GPT(config)
    given = {}
    for file in sorted(Path(weights).glob("*.safetensors")):
        given |= load_file(file)
    ours = model.state_dict()
    for name, tensor in given.items():
        # Hugging Face's GPT-2 stores projections (in, out), torch's Linear (out, in).
        if name.rsplit(".", 2)[-2] in ("c_attn", "c_proj", "c_fc") and tensor.dim() == 2:
            given[name] = tensor.t().contiguous()
    given["lm_head.weight"] = given["transformer.wte.weight"]
    assert given.keys() == ours.keys(), given.keys() ^ ours.keys()
    model.load_state_dict(given)
    with torch.no_grad():
        assert math.isfinite(model(torch.zeros(1, 2, dtype=torch.long))[0].sum().item())
    if fused:
        return model, adamw(model, fused=True)
    optimizer = model.configure_optimizers(
        ADAMW["weight_decay"], ADAMW["learning_rate"], (ADAMW["beta1"], ADAMW["beta2"]), "cpu"
    )
    return model, optimizer
