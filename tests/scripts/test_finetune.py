"""``scripts/finetune.py`` as a user calls it, with methods and objectives that every run of the tests draws anew."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import LENGTH, VOCAB
from programs import script
from small import random_weights

from xylem import models
from xylem.data.tokenizers import byte_level
from xylem.errors import ConfigError
from xylem.models import gpt, hub, llama, mamba
from xylem.models.conversion import flatten
from xylem.peft.calls import METHODS
from xylem.peft.config import PromptConfig
from xylem.training.restore import judges, open_any

BASES = {
    "llama": llama.llama(2, 12, 3, 1, 20, VOCAB, 32, rope_theta=777.0, norm_eps=1e-4),
    "gpt2": gpt.gpt(2, 12, 3, VOCAB, 32),
    "mamba": mamba.mamba(2, 12, VOCAB, 32, state_size=5, conv_width=3, dt_rank=4),
}
OTHER = {"state": "mamba", "bitfit": "gpt2"}  # what a LLaMA has not: states to begin with, biases


@pytest.fixture(scope="module")
def bases(tmp_path_factory, module_seed):
    """A folder for each network."""
    folder = tmp_path_factory.mktemp("bases")
    for name, config in BASES.items():
        params = random_weights(models.build(config), jax.random.key(module_seed), jnp.zeros((1, 2), jnp.int32))
        hub.save(folder / name, config, params)
        byte_level().save(folder / name)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    lines = {
        "answers": [{"prompt": f"{a}+{b}", "completion": str(a + b)} for a in range(5) for b in range(5)],
        "classification": [{"text": "ab" * (1 + place % 4), "label": place % 2} for place in range(24)],
        "causal_lm": [{"text": "the old oak tree sleeps " * 3} for _ in range(24)],
    }
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"olora"}))  # that one begins with what an earlier task left
def test_a_method_learns_by_the_command_line(method, bases, files, rng_seed, tmp_path):
    """By an objective that every run of the tests draws anew."""
    fitting = ["answers", "causal_lm", *(["classification"] if method != "state" else [])]  # a Mamba does not judge
    objective = str(np.random.default_rng(rng_seed).choice(fitting))
    print(f"{method} by {objective}")
    learns(method, objective, bases / OTHER.get(method, "llama"), files, rng_seed, tmp_path / "run")


def learns(method, objective, base, files, seed, run_dir):
    """A run of three steps: its figures are there, and what it learned is opened, alone as well."""
    given = {
        "method": method,
        "objective.name": objective,
        "data.corpus": files / f"{objective}.jsonl",
        "data.cache-dir": files,
        "data.sequence-length": LENGTH,
        "optimizer.learning-rate": 0.01,
        "optimizer.warmup-steps": 0,
        "model.compute.layers": "scan",
        "steps": 3,
        "log-every": 1,
        "batch-size": 8,
        "run-dir": run_dir,
    }
    if method == "relora":
        given |= {"method.every": 2, "method.rewarm": 1}
    script("finetune")([str(base), *(word for name, value in given.items() for word in (f"--{name}", str(value)))])
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and np.isfinite([row["loss"] for row in rows]).all()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert np.isfinite(summary["validation_loss"])
    assert ("sample" in summary) == (objective != "classification")
    checks = {"check": judges} if objective == "classification" else {}
    tuned, bare = open_any(str(run_dir), **checks), open_any(str(base))
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB - 1, (2, 7)), jnp.int32)
    moved = tuned.module.apply({"params": tuned.params}, tokens).hidden
    still = bare.module.apply({"params": bare.params}, tokens).hidden
    assert float(jnp.abs(moved - still).max()) > 1e-6, "what was learned is opened"
    if objective != "classification":
        apart = open_any(str(run_dir / "adapter"))
        for path, leaf in flatten(tuned.params).items():
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), leaf, flatten(apart.params)[path])


def refused(said, base, *flags):
    with pytest.raises(ConfigError, match=said):
        script("finetune")([str(base), *map(str, flags)])


def test_what_a_method_cannot_do_is_named_before_anything_runs(bases, files, tmp_path):
    where = ("--data.corpus", files / "answers.jsonl", "--data.cache-dir", files, "--run-dir", tmp_path / "run")
    said = r"data.sequence_length: 32 is not possible; 32 tokens are read, 25 fit beside 7 virtual ones"
    refused(said, bases / "gpt2", "--method", "prompt", "--method.length", 7, "--data.sequence-length", 32, *where)
    refused(
        r"method.every: 5000 is not possible; less than steps = 9", bases / "llama", "--method", "relora", "--steps", 9
    )
    rates = ("--method.every", 3, "--method.rewarm", 1, "--steps", 9, "--optimizer.schedule", "linear")
    refused(r"optimizer.schedule: 'linear' is not possible; cosine", bases / "llama", "--method", "relora", *rates)
    refused(r"ema: 0.9 is not possible; None: ", bases / "llama", "--method", "adalora", "--ema", 0.9, *where)
    script("pretrain")(["ngram", "--data.corpus", str(files / "causal_lm.jsonl"), "--data.tokenizer", "bytes",
                        "--data.cache-dir", str(files), "--run-dir", str(tmp_path / "counts")])  # fmt: skip
    refused("counts learn by counting", tmp_path / "counts", *where)
    assert not (tmp_path / "run").exists()


def test_a_pattern_alone_selects_what_it_finds(bases):
    script("finetune")
    parse, model = sys.modules["script_finetune"].parse, open_any(str(bases / "gpt2"))
    rows = ["--data.sequence-length", "16"]
    for flags, chosen in (
        ([], (1, None)),
        (["--method.targets", "norm/"], (0, "norm/")),
        (["--method.last", "2"], (2, None)),
        (["--method.last=2", "--method.targets=norm/"], (2, "norm/")),
    ):
        method = parse(str(bases / "gpt2"), "selection", model, rows + flags).method
        assert (method.last, method.targets) == chosen
    asked = (("lora", []), ("prompt", []), ("prefix", ["--method.length", "5"]), ("prefix", ["--method.length=7"]))
    lengths = [parse(str(bases / "gpt2"), method, model, flags).data.sequence_length for method, flags in asked]
    assert lengths == [32, 12, 27, 25], "a learned position for each virtual token"
    grafted = METHODS["prompt"].graft(model.params, jax.random.key(0), PromptConfig(length=4))
    assert parse("", "prefix", model._replace(params=grafted), ["--method.length=7"]).data.sequence_length == 21
