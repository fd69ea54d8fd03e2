"""The peers of ``train_step.py``: the same network in torch, started from our first weights."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train_step import Workload

# The optimizer all sides use; field names are those of xylem's OptimizerConfig.
ADAMW = {"learning_rate": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
PROBE = {"cpu": 2048, "gpu": 8192}  # side of the probe's square matrices


def batches(vocab: int, batch: int, length: int, count: int = 4) -> list[tuple[Any, Any]]:
    """The few batches of random (tokens, labels) that every side cycles through: all learn the same by heart."""
    import numpy as np

    draws = np.random.default_rng(0).integers(0, vocab, (count, batch, length + 1))
    return [(draw[:, :-1], draw[:, 1:]) for draw in draws]


def device(args: argparse.Namespace) -> str:
    """torch's name for where the sides compute."""
    return {"cpu": "cpu", "gpu": "cuda"}[args.device]


def narrowed(args: argparse.Namespace) -> Any:
    """The context in which torch computes in ``args.dtype``."""
    import torch

    return torch.autocast(device(args), torch.bfloat16, enabled=args.dtype == "bfloat16")


def make(
    kind: str, workload: Workload, args: argparse.Namespace, attach: Callable[[Any], Any] = lambda model: model
) -> Callable[[int], float]:
    """``step(i) -> loss`` of ``probe``, ``nanogpt``, ``nanogpt-fused``, ``hf`` or ``hf-compile``.

    nanoGPT runs as its ``train.py`` runs it: on a GPU compiled and with torch's fused AdamW, on a CPU with neither,
    where ``-fused`` takes that optimizer all the same. Hugging Face sides always have it, and train what ``attach``
    makes of their model. bfloat16 is torch's autocast.
    """
    if kind == "probe":
        return probe(args)
    import torch
    from torch.nn import functional

    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    where = device(args)
    if kind in ("nanogpt", "nanogpt-fused"):
        if args.peer is None:
            raise SystemExit("nanogpt needs --peer DIR, a checkout of it")
        model, optimizer = _nanogpt(workload, args.weights, args.peer, where, fused=kind.endswith("fused"))
        run = torch.compile(model) if where == "cuda" else model
        loss_of = lambda tokens, labels: run(tokens, labels)[1]  # noqa: E731
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(args.weights, attn_implementation="sdpa", dtype=torch.float32)
        model = attach(model).train().to(where)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        optimizer = adamw(model, fused=True)
        run = torch.compile(model) if kind == "hf-compile" else model

        def loss_of(tokens: Any, labels: Any) -> Any:
            logits = run(input_ids=tokens, use_cache=False).logits
            return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    pairs = batches(workload.vocab, workload.batch, workload.length)
    data = [(torch.tensor(tokens).to(where), torch.tensor(labels).to(where)) for tokens, labels in pairs]

    def step(index: int) -> float:
        with narrowed(args):
            loss = loss_of(*data[index % len(data)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def probe(args: argparse.Namespace) -> Callable[[int], float]:
    """One square product: of NumPy's BLAS in float32, or of torch on a GPU in ``args.dtype``."""
    import numpy as np

    size = PROBE[args.device]
    a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    if args.device == "cpu":
        return lambda index: float((a @ b)[0, 0])
    import torch

    a, b = (torch.tensor(x).to("cuda", getattr(torch, args.dtype)) for x in (a, b))
    return lambda index: float((a @ b)[0, 0])


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


def _nanogpt(workload: Workload, weights: str, peer: str, where: str, fused: bool) -> tuple[Any, Any]:
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
    model.to(where)
    with torch.no_grad():
        assert math.isfinite(model(torch.zeros(1, 2, dtype=torch.long, device=where))[0].sum().item())
    if fused:
        return model, adamw(model, fused=True)
    optimizer = model.configure_optimizers(
        ADAMW["weight_decay"], ADAMW["learning_rate"], (ADAMW["beta1"], ADAMW["beta2"]), where
    )
    return model, optimizer
