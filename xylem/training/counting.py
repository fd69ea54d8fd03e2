"""The run of an n-gram model: config -> data -> counts -> figures -> file. Its folder is used like that of any run.

It holds what a training run's holds, and ``ngram.safetensors`` in place of checkpoints and metrics.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from xylem.data import pipeline
from xylem.data.config import cache_root
from xylem.launch import settle_jax
from xylem.models import ngram
from xylem.models.ngram_file import NGRAM, save_tree
from xylem.models.ngram_lm import NGramLM
from xylem.training import report
from xylem.training.counting_config import CountingConfig
from xylem.training.evaluate import counted_figures
from xylem.training.run_folder import open_run


def count(config: CountingConfig, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Count the grams of a corpus's train split, measure its validation split, write; returns the final figures.

    Once more in the same folder counts anew, which takes seconds and gives the same. Raises a ``Failure``.
    """
    settle_jax(cache_root(config.data.cache_dir) / "xla")
    changeable = ("sample_prompt", "run_dir", "data.cache_dir")
    with open_run(config.run_dir, dataclasses.asdict(config), argv, changeable=changeable) as folder:
        data = pipeline.prepare(config.data)
        data.tokenizer.save(folder / "tokenizer")
        model = config.model(data.tokenizer.vocab_size, data.tokenizer.end_of_text)
        start = time.perf_counter()
        tree = ngram.count(data.documents("train"), model)
        seconds, tokens = time.perf_counter() - start, data.counts["train"]["tokens"]
        grams = sum(len(tree[f"grams/{k}/tokens"]) for k in range(1, model.order + 1))
        print(
            f"{model.family} of order {model.order}, {model.smoothing}: {grams:,} grams of {model.vocab_size:,} tokens"
        )
        print(f"{config.data.corpus}: {tokens:,} training tokens counted in {seconds:.1f} s")
        save_tree(folder / NGRAM, model, tree, data.tokenizer.hash)
        figures = counted_figures(model, tree, data, "validation")
        final = {"parameters": grams, "tokens_per_second": tokens / seconds}
        final |= {f"validation_{name}": value for name, value in figures.items()}
        print(report.figures_line(final))
        ids = data.tokenizer.prompt(config.sample_prompt)
        final["sample"] = report.sampled(folder, NGramLM(model), tree, data.tokenizer, ids, print)
        final["compressors_bits_per_byte"] = report.compressed(data, print)
        return report.summarise(folder, final)
