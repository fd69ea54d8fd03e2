"""A tiny run of each family by its own objective."""

from pathlib import Path

from xylem.data.config import DataConfig
from xylem.models import bart, bert, llama, mamba, rnn, t5, vanilla
from xylem.models.settings import Compute
from xylem.training.config import MeshConfig, OptimizerConfig, RunConfig
from xylem.training.objective_config import DenoisingConfig, MaskedConfig, ObjectiveConfig, SampledConfig, SpanConfig

VOCAB, LENGTH = 280, 16  # 257 tokens of bytes, and what objectives add
FAMILIES = {
    "bert": (bert.bert(2, 12, 3, VOCAB, 32), MaskedConfig(pairs="next_sentence")),
    "roberta": (bert.roberta(2, 12, 3, VOCAB, 32), MaskedConfig()),
    "albert": (bert.albert(2, 12, 3, VOCAB, 8), MaskedConfig(max_ngram=3, pairs="sentence_order")),
    "transformer": (vanilla.vanilla(2, 12, 3, VOCAB, 32), ObjectiveConfig("continuation", label_smoothing=0.1)),
    "bart": (bart.bart(2, 12, 3, VOCAB, 32), DenoisingConfig()),
    "t5": (t5.t5(2, 12, 3, 4, 20, "1.1", VOCAB, 32), SpanConfig(sentinels=9)),
    "mamba": (mamba.mamba(2, 12, VOCAB, 32, state_size=5), ObjectiveConfig()),
    "rnn": (rnn.rnn(2, 12, VOCAB, 32), ObjectiveConfig("truncated")),
    "lstm": (rnn.lstm(2, 12, VOCAB, 32), ObjectiveConfig("truncated")),
    "gru": (rnn.gru(2, 12, VOCAB, 32), ObjectiveConfig()),
    "llama": (
        llama.llama(1, 12, 2, 2, 20, VOCAB, 32, rope_theta=777.0, norm_eps=1e-4),
        SampledConfig(decay="linear:0.9,0.11,0.2"),
    ),
}


def run(folder: Path, family: str, name: str = "run", **changes) -> RunConfig:
    """A run of a few steps on ``folder / "a.jsonl"``; all of a folder share the cache of data and programs."""
    model, objective = FAMILIES[family]
    data = DataConfig(str(folder / "a.jsonl"), tokenizer="bytes", sequence_length=LENGTH, cache_dir=str(folder))
    rate = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.0)
    often = {"steps": 6, "batch_size": 8, "evaluate_every": 3, "save_every": 3, "sample_every": 0, "log_every": 1}
    where = {"mesh": MeshConfig(data=1), "run_dir": str(folder / name / family), "sample_prompt": "a"}
    what = {"data": data, "objective": objective, "optimizer": rate}
    model = model.with_compute(Compute(layers="scan", kernels="plain"))
    return RunConfig(model=model, **what | often | where | changes)
