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
from xylem.peft import tree
from xylem.training import metrics as measure
from xylem.training.checkpoint import Restored
from xylem.training.config import RunConfig, writes
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


def sample(module: LanguageModel, params: Any, tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt and what the model continues it with, always from the same randomness."""
    room = module.config.max_length - len(tokenizer.encode(prompt)) - 1 - virtual_tokens(module, params)[-1]
    sampling = Sampling(max_new_tokens=max(1, min(SAMPLE_TOKENS, room)), temperature=0.8, top_p=0.95)
    (text,) = Generator(module, params, tokenizer)([prompt], sampling, jax.random.key(0))
    return f"{prompt}{text}"


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


def written(
    prompt: str, folder: Path, data: Prepared, module: LanguageModel, params: Any, note: Note
) -> dict[str, Any]:
    """What a model that continues texts adds to a summary: a sample, and what compressors need for the same text.

    All hosts write the sample together; the rest is for process 0.
    """
    text = sample(module, params, data.tokenizer, prompt)
    note(f"sample:\n{text}\n")
    if jax.process_index() != 0:
        return {"sample": text}
    write_whole(folder / "sample.txt", text + "\n")
    bars = references(data)
    whole = data.counts["validation"]["bytes"] <= REFERENCE_BYTES
    of = "the same text" if whole else f"the first {REFERENCE_BYTES / 1e6:g} MB of the same text"
    note(f"bits per byte of {of}: {', '.join(f'{name} {bits:.3f}' for name, bits in bars.items())}")
    return {"sample": text, "compressors_bits_per_byte": bars}


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
    adds = written(config.sample_prompt, folder, data, module, params, note) if writes(config) else {}
    summary = {**final, **adds}
    if jax.process_index() == 0:
        summarise(folder, summary)
        title = f"{config.model.family}, {tree.count(params):,} parameters, on {config.data.corpus}"
        loss_curve(folder / METRICS, folder / "loss.png", adds.get("compressors_bits_per_byte", {}), title)
        note(f"loss curve {folder / 'loss.png'}, checkpoints {folder / CHECKPOINTS}")
    return summary
