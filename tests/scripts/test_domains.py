"""Adapters for domains and their mixtures as a user makes them, on a tiny model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import script
from small import init

from xylem import models
from xylem.data import tokenizers
from xylem.errors import ConfigError
from xylem.models import hub
from xylem.models.llama import llama


@pytest.mark.slow
def test_each_domain_is_learned_once_and_every_mixture_judged(tmp_path, capsys):
    plain, base = tokenizers.byte_level(), tmp_path / "base"
    config = llama(1, 12, 2, 2, 20, plain.vocab_size, 320, rope_theta=777.0, norm_eps=1e-4)
    params = init(models.build(config), jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    hub.save(base, config, params)
    plain.save(base)
    flags = ["--base", str(base), "--domains", "finance", "medicine", "--sequence-length", "320", "--batch-size", "8"]
    flags = [*flags, "--rank", "2", "--steps", "8", "--learning-rate", "0.1", "--run-dir", str(tmp_path / "runs")]
    script("domains")(flags)
    rows = json.loads((tmp_path / "runs/domains.json").read_text())["rows"]
    assert len(rows) == 8 and all(set(row) == {"finance", "medicine"} for row in rows.values())
    losses = {name: np.array([figures["loss"] for figures in row.values()]) for name, row in rows.items()}
    assert losses["finance"][0] < losses["base"][0] and losses["medicine"][1] < losses["base"][1]
    assert len({tuple(row) for row in losses.values()}) == 8
    assert (tmp_path / "runs/domains.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    script("domains")(flags)
    again = capsys.readouterr().out
    assert "step 8/8" not in again and f"{losses['sum'][0]:.3f}" in again


def test_one_domain_alone_is_refused():
    with pytest.raises(ConfigError, match="domains: 'law' is not possible; at least two"):
        script("domains")(["--domains", "law"])
