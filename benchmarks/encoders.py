"""Full training step of encoders and encoder-decoders beside Hugging Face: speed, CPU time and memory, in one run.

    python benchmarks/encoders.py --config bert_base
    python benchmarks/encoders.py --config t5_base --sides xylem xylem:plain hf hf-compile --out t5_base.json

How it measures is told in ``sides.py`` and ``train_step.py``: one process a side, the same first weights, batches and
AdamW, float32, dropout 0, losses compared step by step.

BERT's masked-token head is applied to all positions, as Hugging Face does, and 15% of them count in the loss.
``xylem:masked`` and ``hf:masked`` gather those first and apply the head to them alone: the same loss, less work.
Encoder-decoders are trained on every token of the target.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ours
import peers
import sides

from xylem.models import bart, bert, t5
from xylem.models.config import ModelConfig, Seq2SeqConfig, TransformerConfig
from xylem.models.fused_cross_entropy import cross_entropy, cross_entropy_plain
from xylem.models.settings import Compute

if TYPE_CHECKING:
    from jax import Array

MASKED = 0.15  # of all positions (BERT, 1810.04805, section 3.1)
IGNORED = -100  # the label that torch's cross-entropy passes over


@dataclass(frozen=True)
class Workload:
    """A preset and its batch; ``targets`` is the length that a decoder writes, None for an encoder."""

    preset: str
    batch: int
    length: int
    targets: int | None

    @property
    def config(self) -> ModelConfig:
        """The network, without dropout."""
        config = PRESETS[self.preset]()
        if isinstance(config, Seq2SeqConfig):
            without = (replace(side, dropout=0.0) for side in (config.encoder, config.decoder))
            return replace(config, **dict(zip(("encoder", "decoder"), without, strict=True)))
        return replace(config, dropout=0.0)

    @property
    def masked(self) -> int:
        """Hidden positions of a text."""
        return max(1, int(MASKED * self.length))

    @property
    def tokens(self) -> int:
        """Tokens a step, read and written."""
        return self.batch * (self.length + (self.targets or 0))

    @property
    def flops(self) -> float:
        """Useful training FLOPs a token: 6 for each weight in a product and token that it is applied to.

        Attention to S keys costs 12 S E a query, half of it where it is causal. Of BERT's head only what the loss needs
        counts, the hidden positions.
        """
        config = self.config
        if isinstance(config, Seq2SeqConfig):
            assert self.targets is not None
            decoder, read, write = config.decoder, self.length, self.targets
            width = decoder.num_heads * decoder.head_dim
            cross = write * 2 * decoder.d_model * width + read * 2 * decoder.d_model * width + write * 2 * read * width
            row = _stack(config.encoder, read, read) + _stack(decoder, write, write / 2) + decoder.num_layers * cross
            row += write * config.vocab_size * config.d_model
        else:
            row = _stack(config, self.length, self.length)
            row += self.masked * (config.vocab_size + config.d_model) * config.d_model
        return 6.0 * self.batch * row / self.tokens


def _stack(config: TransformerConfig, queries: int, keys: float) -> float:
    """Multiply-adds of one text through the layers' self-attention and MLP, forward."""
    width = config.num_heads * config.head_dim
    weights = 4 * config.d_model * width + (3 if config.gated else 2) * config.d_model * config.d_ff
    return config.num_layers * queries * (weights + 2 * keys * width)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "bert_base": bert.bert_base,
    "t5_base": t5.t5_base,
    "bart_base": bart.bart_base,
    "tiny_bert": lambda: bert.bert(2, 32, 2, 96, 16),
    "tiny_t5": lambda: t5.t5(2, 32, 2, 16, 64, vocab_size=96),
    "tiny_bart": lambda: bart.bart(2, 32, 2, 96, 16),
}
WORKLOADS = {
    "bert_base": Workload("bert_base", 4, 128, None),
    "t5_base": Workload("t5_base", 4, 128, 64),
    "bart_base": Workload("bart_base", 4, 128, 64),
    "tiny_bert": Workload("tiny_bert", 4, 16, None),  # the last three show that the script works
    "tiny_t5": Workload("tiny_t5", 4, 16, 8),
    "tiny_bart": Workload("tiny_bart", 4, 16, 8),
}
COMPUTES = {"": Compute(), "masked": Compute(), "scan": Compute(layers="scan"), "plain": Compute(kernels="plain")}


def batches(workload: Workload, count: int = 4) -> list[dict[str, Any]]:
    """The few random batches that every side cycles through.

    ``tokens`` (B, S) and ``labels``: of an encoder (B, P), for the ``places`` (B, P) that are hidden; of a decoder
    (B, T), which reads ``decoder_tokens`` (B, T), the same shifted by one.
    """
    rng, config, w = np.random.default_rng(0), workload.config, workload
    made = []
    for _ in range(count):
        batch = {"tokens": rng.integers(0, config.vocab_size, (w.batch, w.length))}
        if isinstance(config, Seq2SeqConfig):
            batch["labels"] = rng.integers(0, config.vocab_size, (w.batch, w.targets))
            batch["decoder_tokens"] = np.pad(
                batch["labels"][:, :-1], ((0, 0), (1, 0)), constant_values=config.decoder_start
            )
        else:
            drawn = [rng.permutation(w.length)[: w.masked] for _ in range(w.batch)]
            batch["places"] = np.sort(np.stack(drawn), axis=1)
            batch["labels"] = rng.integers(0, config.vocab_size, (w.batch, w.masked))
        made.append(batch)
    return made


def everywhere(batch: dict[str, Any], elsewhere: int) -> np.ndarray:
    """Labels of all positions (B, S), those not hidden being ``elsewhere``."""
    labels = np.full(batch["tokens"].shape, elsewhere)
    np.put_along_axis(labels, batch["places"], batch["labels"], axis=1)
    return labels


# --- the two sides ----------------------------------------------------------------------------------------------------


def loss(module: Any, params: Any, batch: dict[str, Array], rng: Any) -> Any:
    """Cross-entropy of the final states, of those at ``places`` where the batch has them."""
    import jax
    import jax.numpy as jnp

    from xylem.models import fused
    from xylem.training.objectives import Sums

    texts = [batch[name] for name in ("tokens", "decoder_tokens") if name in batch]
    hidden = module.apply({"params": params}, *texts).hidden
    if "places" in batch:
        hidden = jnp.take_along_axis(hidden, batch["places"][..., None], axis=1)
    args = (module.head, module.head_params(params), hidden, batch["labels"], batch["weights"], 0.0, 0.0)
    kernels = fused.choose(module.config.compute, jax.default_backend())
    chunk = kernels.loss_chunk(*batch["labels"].shape, module.config.vocab_size)
    sums = cross_entropy(*args, chunk) if kernels.cross_entropy else cross_entropy_plain(*args)
    return Sums(*sums, batch["weights"].sum())


def our_step(workload: Workload, variant: str, dtype: Any) -> Callable[[int], float]:
    """``step(index) -> loss``; without BERT's second head, which nothing here trains."""
    data = batches(workload)
    for batch in data:
        weights = np.ones(batch["labels"].shape)
        if workload.targets is None and variant != "masked":
            weights, batch["labels"] = everywhere(batch, IGNORED) != IGNORED, everywhere(batch, 0)
            del batch["places"]
        batch.update({name: each.astype(np.int32) for name, each in batch.items()}, weights=weights.astype(np.float32))
    config = workload.config.with_compute(replace(COMPUTES[variant], dtype=dtype))
    return ours.stepper(config, loss, data, leave_out=("pooler", "pair_head"))


def their_step(kind: str, variant: str, workload: Workload, args: argparse.Namespace) -> Callable[[int], float]:
    """The same by transformers and torch's fused AdamW; ``kind`` is ``hf``, ``hf-eager`` or ``hf-compile``."""
    import torch
    import transformers
    from torch.nn import functional

    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    both = workload.targets is not None
    family = transformers.AutoModelForSeq2SeqLM if both else transformers.AutoModelForMaskedLM
    attention = "eager" if kind == "hf-eager" else "sdpa"
    model = family.from_pretrained(args.weights, attn_implementation=attention, dtype=torch.float32)
    model = model.train().to(peers.device(args))
    optimizer = peers.adamw(model, fused=True)
    run = torch.compile(model) if kind == "hf-compile" else model
    data = batches(workload)
    for batch in data:
        if not both and variant != "masked":
            batch["labels"] = everywhere(batch, IGNORED)
    tensors = [{name: torch.tensor(each).to(model.device) for name, each in batch.items()} for batch in data]

    def logits(batch: dict[str, Any]) -> Any:
        if both:
            return run(input_ids=batch["tokens"], decoder_input_ids=batch["decoder_tokens"], use_cache=False).logits
        if variant != "masked":
            return run(input_ids=batch["tokens"]).logits
        hidden = model.bert(batch["tokens"]).last_hidden_state
        return model.cls(hidden.take_along_dim(batch["places"][..., None], dim=1))

    def step(index: int) -> float:
        batch = tensors[index % len(tensors)]
        with peers.narrowed(args):
            made = logits(batch).flatten(0, 1).float()
        loss = functional.cross_entropy(made, batch["labels"].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def worker(side: str, args: argparse.Namespace) -> None:
    """One side's process: writes the first weights, or takes steps."""
    workload, (kind, _, variant) = WORKLOADS[args.config], side.partition(":")
    if args.export:
        return ours.save(workload.config, args.export)
    if kind == "xylem":
        return sides.answer(lambda: our_step(workload, variant, args.dtype))
    if kind == "probe":
        return sides.answer(lambda: peers.probe(args))
    return sides.answer(lambda: their_step(kind, variant, workload, args))


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=WORKLOADS, default="bert_base")
    parser.add_argument("--sides", nargs="+", help="xylem[:masked|scan|plain], hf[-eager|-compile][:masked]")
    sides.add_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    workload = WORKLOADS[args.config]
    more = ["xylem:masked", "hf:masked"] if workload.targets is None else []
    names = args.sides or ["xylem", "hf", "hf-compile", *more]
    alike = lambda us, peer: us.endswith(":masked") == peer.endswith(":masked")  # noqa: E731
    sides.report(workload, args, sides.measure(names, args), alike)


if __name__ == "__main__":
    main()
