"""What a run says of itself: at its start, at a validation, and at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from xylem.data.mixture import Mixture
from xylem.data.pipeline import Prepared
from xylem.data.tokenizers import Tokenizer
from xylem.files import write_whole
from xylem.generation.generator import Generator
from xylem.generation.sampling import Sampling, virtual_tokens
from xylem.models.language_model import LanguageModel
from xylem.models.leaves import is_leaf
from xylem.models.seq2seq import Seq2Seq
from xylem.peft import tree
from xylem.training import metrics as measure
from xylem.training.checkpoint import Restored
from xylem.training.config import RunConfig, continues, writes
from xylem.training.inputs import example_shapes
from xylem.training.plots import loss_curve
from xylem.training.run_folder import CHECKPOINTS, METRICS
from xylem.training.state import TrainState

Note = Callable[[str], None]

SAMPLE_TOKENS = 80
REFERENCE_BYTES = 8_000_000  # what xz compresses in seconds


def opening(config: RunConfig, data: Prepared, mesh: Mesh, state: TrainState, restored: Restored | None) -> list[str]:
    """Lines that say what is about to be trained, on what, and from where."""
    model, train = config.model, data.counts["train"]
    ramp, steps = config.batch_ramp, config.steps
    read = ramp.tokens_before(steps)
    first, last = ramp.tokens_before(1), read - ramp.tokens_before(steps - 1)
    share = data.rates[0] if isinstance(data, Mixture) else 1.0
    batches = f"{last:,}" if first == last else f"{first:,} to {last:,}"
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        f"{model.family}: {tree.count(state.params):,} parameters, {model.num_layers} layers of width {model.d_model}, "
        f"{model.vocab_size:,} tokens",
        f"{config.data.corpus}: {train['tokens']:,} training tokens of {train['bytes'] / train['tokens']:.2f} bytes; "
        f"{steps:,} steps of {batches} are {share * read / train['tokens']:.2f} epochs",
        learning(state),
        f"mesh {sizes} of {mesh.devices.flat[0].device_kind}; run folder {config.run_dir}",
    ]
    if isinstance(data, Mixture):
        rates = zip(data.rates, (data.corpus.name, *data.tasks), strict=True)
        lines.append(f"mixed of {', '.join(f'{rate:.1%} {name}' for rate, name in rates)}")
        lines += cut_tasks(data, example_shapes(config))
    if restored is not None:
        lines += [f"passed over {line}" for line in restored.passed_over]
        done = restored.step >= config.steps
        lines.append(f"all {config.steps} steps are already done" if done else f"going on from step {restored.step}")
    return lines


def learning(state: TrainState) -> str:
    """A line of how many of the network's numbers learn, and of the memory that their optimizer needs over all devices.

    A weight that is no array counts as the weight it stands for (four bits of a number are one), and what it learns
    beside that is counted too.
    """
    parts = jax.tree.leaves(state.trainable, is_leaf=is_leaf)
    beside = sum(x.size for part in parts if is_leaf(part) for x in jax.tree.leaves(part))
    learned, whole = sum(x.size for x in jax.tree.leaves(state.trainable)), tree.count(state.params) + beside
    held = sum(x.nbytes for x in jax.tree.leaves(state.optimizer))
    return f"{learned:,} of {whole:,} numbers learn ({100 * learned / whole:.3g}%); optimizer state: {held:,} bytes"


def cut_tasks(data: Mixture, shapes: dict[str, Any]) -> list[str]:
    """A line for each task with examples whose texts are longer than their places, end included."""
    lines = []
    for name, task in data.tasks.items():
        for part, place in (("tokens", "tokens"), ("targets", "labels")):
            size = shapes[place][0][0]
            if cut := sum(len(one[part]) >= size for one in task):
                lines.append(f"{name}: {cut:,} of {len(task):,} {part} are cut to {size}")
    return lines


def sample_ids(config: RunConfig, data: Prepared) -> list[int]:
    """The ids that a sample continues: the sample prompt, or a held-out question where answers are learned."""
    if config.objective.name != "answers":
        return data.tokenizer.prompt(config.sample_prompt)
    row = data.source("validation")[0]
    if "decoder_tokens" in row:  # a source, which ends as the generator ends it
        return row["tokens"][row["segments"] > 0][:-1].tolist()
    return row["tokens"][: row["weights"].argmax() + 1].tolist()


def sample(module: LanguageModel, params: Any, tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ``ids`` and what the model writes behind it, always from the same randomness."""
    reads, virtual = isinstance(module, Seq2Seq), virtual_tokens(module, params)
    most = module.config.max_length - virtual[-1]
    # Behind a source comes the token that ends it, behind a text at least one that is written.
    ids = ids[1 - (module.config.encoder.max_length - virtual[0] if reads else most) :]
    sampling = Sampling(min(SAMPLE_TOKENS, most - (1 if reads else len(ids))), temperature=0.8, top_p=0.95)
    (text,) = Generator(module, params, tokenizer).continue_ids([ids], sampling, jax.random.key(0))
    shown = tokenizer.decode(ids[1:] if ids[0] == tokenizer.begin_of_text else ids)
    return f"{shown}\n{text}" if reads else f"{shown}{text}"


def references(data: Prepared) -> dict[str, float]:
    """Bits per byte that bzip2 and xz need for the validation text, or for its first ``REFERENCE_BYTES``."""
    text = bytearray()
    for document in data.corpus.splits["validation"]():
        text += document[:REFERENCE_BYTES].encode()
        if len(text) >= REFERENCE_BYTES:
            break
    return measure.reference_bits_per_byte(bytes(text[:REFERENCE_BYTES]))


def figures_line(final: dict[str, Any]) -> str:
    """The figures of the validation split, for people."""
    bits = final.get("validation_bits_per_byte")
    return (
        f"validation loss {final['validation_loss']:.4f} nats/token, perplexity {final['validation_perplexity']:.2f}"
        + (f", {bits:.3f} bits per byte" if bits is not None else "")
    )


def sampled(folder: Path, module: LanguageModel, params: Any, tokenizer: Tokenizer, ids: list[int], note: Note) -> str:
    """Show and keep a sample, which all hosts write together."""
    text = sample(module, params, tokenizer, ids)
    note(f"sample:\n{text}\n")
    if jax.process_index() == 0:
        write_whole(folder / "sample.txt", text + "\n")
    return text


def compressed(data: Prepared, note: Note) -> dict[str, float]:
    """Show and give back what compressors need for the validation text: bits per byte by name."""
    bars = references(data)
    whole = data.counts["validation"]["bytes"] <= REFERENCE_BYTES
    of = "the same text" if whole else f"the first {REFERENCE_BYTES / 1e6:g} MB of the same text"
    note(f"bits per byte of {of}: {', '.join(f'{name} {bits:.3f}' for name, bits in bars.items())}")
    return bars


def summarise(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Keep a run's final figures, and give them back."""
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def closing(
    config: RunConfig,
    folder: Path,
    data: Prepared,
    module: LanguageModel,
    params: Any,
    final: dict[str, Any],
    note: Note,
) -> dict[str, Any]:
    """Show and keep the final figures, a sample where the model writes, and the loss curve; returns what
    ``summary.json`` holds."""
    note(figures_line(final))
    summary = dict(final)
    if writes(config):
        summary["sample"] = sampled(folder, module, params, data.tokenizer, sample_ids(config, data), note)
    if jax.process_index() == 0:
        if continues(config):
            summary["compressors_bits_per_byte"] = compressed(data, note)
        summarise(folder, summary)
        title = f"{config.model.family}, {tree.count(params):,} parameters, on {config.data.corpus}"
        loss_curve(folder / METRICS, folder / "loss.png", summary.get("compressors_bits_per_byte", {}), title)
        note(f"loss curve {folder / 'loss.png'}, checkpoints {folder / CHECKPOINTS}")
    return summary
