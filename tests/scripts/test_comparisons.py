"""Scripts that compare methods, on tiny models: every arm has its figures, and is not run again."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import documents_of, write_jsonl
from programs import script
from small import init

from xylem import models
from xylem.data import tokenizers
from xylem.errors import ConfigError
from xylem.models import hub
from xylem.models.llama import llama

pytestmark = pytest.mark.slow


def test_low_rank_runs_go_on_from_one_beginning(tmp_path, capsys):
    data = ["--data.corpus", write_jsonl(tmp_path / "a.jsonl", documents_of(3)), "--data.cache-dir", str(tmp_path)]
    data = [*data, "--data.tokenizer", "bytes", "--data.sequence-length", "16", "--width", "32", "--batch-size", "8"]
    flags = [*data, "--warm", "4", "--steps", "8", "--restarts", "1", "--rank", "2", "--points", "2"]
    flags = [*flags, "--run-dir", str(tmp_path / "runs")]
    flags = [*flags, "--seeds", "1", "5"]
    script("relora")(flags)
    found = json.loads((tmp_path / "runs/relora.json").read_text())
    curves, ends = found["curves"], found["ends"]
    assert list(curves) == ["full", "lora", "relora"]
    assert len({tuple(points[0]) for points in curves.values()}) == 1, "one beginning"
    assert [[tokens for tokens, _ in points] for points in curves.values()] == [[0, 512, 1024]] * 3
    assert len({loss for losses in ends.values() for loss in losses}) == 6
    for arm, losses in ends.items():
        assert curves[arm][-1][1] == pytest.approx(sum(losses) / 2)
        summaries = [json.loads((tmp_path / f"runs/seed-{seed}/{arm}/summary.json").read_text()) for seed in (1, 5)]
        assert losses == [pytest.approx(one["validation_loss"], rel=1e-4) for one in summaries]
    shown = re.search(r"lora +\S+ +(\S+) ± (\S+)\nrelora", capsys.readouterr().out)
    lower = np.subtract(ends["lora"], ends["relora"])
    told = [lower.mean(), abs(lower[0] - lower[1]) / 2]  # two differences: half their distance is the standard error
    assert [float(number) for number in shown.groups()] == [pytest.approx(number, abs=6e-5) for number in told]
    assert (tmp_path / "runs/relora.png").read_bytes().startswith(b"\x89PNG")
    script("relora")(flags)
    assert "step 8/8" not in capsys.readouterr().out


def test_both_arms_of_each_seed_are_judged(tmp_path, capsys):
    plain, base = tokenizers.byte_level(), tmp_path / "base"
    config = llama(2, 12, 2, 2, 20, plain.vocab_size, 32, rope_theta=777.0, norm_eps=1e-4)
    params = init(models.build(config), jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    hub.save(base, config, params)
    plain.save(base)
    flags = ["--base", str(base), "--seeds", "3", "--steps", "10", "--run-dir", str(tmp_path / "runs")]
    script("adalora")(flags)
    runs = json.loads((tmp_path / "runs/adalora.json").read_text())["runs"]
    assert list(runs) == ["lora", "adalora"]
    for rows in runs.values():
        assert 0 <= rows[0]["accuracy"] < 1 and rows[0]["loss"] > 0
    # Two layers, each with four matrices of attention (12 x 12) and three of an MLP (12 x 20): 28 values at rank 2.
    sizes = [24, 24, 24, 24, 32, 32, 32]
    assert runs["lora"][0]["parameters"] == 2 * 2 * sum(sizes)
    assert 28 * min(sizes) <= runs["adalora"][0]["parameters"] <= 28 * (max(sizes) + 1)
    capsys.readouterr()
    script("adalora")(flags)
    assert "step 10/10" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("relora", ["--steps", "3", "--restarts", "1"], "steps: 3"),
        ("relora", ["--seeds", "3", "3"], "seeds: '3 3'"),
        ("adalora", ["--seeds"], "seeds"),
    ],
)
def test_mistakes_are_named(name, flags, said):
    with pytest.raises(ConfigError, match=said):
        script(name)(flags)
