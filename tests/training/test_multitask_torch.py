"""The loss of a batch of windows and tasks equals Hugging Face's T5 on the same ids."""

import json
from dataclasses import replace
from itertools import islice

import families
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import error, pair, random_seq2seq

from xylem.data import pipeline
from xylem.models import build
from xylem.training.inputs import objective_data
from xylem.training.objective_config import SpanConfig
from xylem.training.objectives import causal_lm

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("family", ["t5", "t5_1_1"])
def test_the_loss_of_a_mixed_batch_equals_hugging_face(family, folder, rng_seed, tmp_path, proof):
    import torch

    rng = np.random.default_rng(rng_seed)
    words = ["".join(rng.choice(list("abcxyz"), rng.integers(1, 5))) for _ in range(30)]
    lines = [json.dumps({"input": word, "target": word[::-1]}) + "\n" for word in words]
    (folder / "reversed.jsonl").write_text("".join(lines))
    objective = SpanConfig(sentinels=9, tasks={"turn": str(folder / "reversed.jsonl")}, mixing_limit=30)
    made = pair(random_seq2seq(rng, family, vocab_size=287), tmp_path / "hf")
    config = replace(families.run(folder, "t5"), model=made.config, objective=objective)
    data = objective_data(config, pipeline.prepare(config.data, lambda _: None))
    of_windows = lambda batch: (batch["labels"] >= 287 - 9).any(axis=1).sum()  # noqa: E731
    mixed = lambda batch: 0 < of_windows(batch) < 8 and (batch["weights"] == 0).any()  # noqa: E731
    batch = next(filter(mixed, islice(pipeline.TrainIterator(data, 8, rng_seed), 50)))
    module, given = build(config.model), {name: jnp.asarray(x) for name, x in batch.items()}
    made.model.config.decoder_start_token_id = config.model.decoder_start
    named = {"input_ids": batch["tokens"], "attention_mask": batch["segments"]}
    named["labels"] = np.where(batch["weights"] > 0, batch["labels"], -100)
    tensors = {name: torch.from_numpy(x.astype(np.int64)) for name, x in named.items()}
    expected = np.array(made.model(**tensors).loss.item())

    def ours(batch: dict) -> np.ndarray:
        sums = causal_lm(module, objective, made.params, batch)
        return np.array(float(sums.loss) / float(sums.weight))

    assert error(ours(given | {"weights": jnp.ones_like(given["weights"])}), expected) > 1e-4
    fault = "padding of targets counted"
    row, oracle = f"{family}: loss of windows and tasks in one batch", "T5ForConditionalGeneration"
    proof(row, oracle, error(ours(given), expected), 1e-4, rng_seed, fault)
