"""How far gradients reach, as a user asks for it."""

import json

import numpy as np
import pytest
from programs import script

from xylem.errors import ConfigError


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 80)
    return (
        *("--data.corpus", str(tmp_path / "text.txt"), "--data.cache-dir", str(tmp_path / "cache")),
        *("--data.tokenizer", "bytes", "--data.sequence-length", "60", "--d-model", "12", "--num-layers", "2"),
        *("--texts", "3", "--batch-size", "2", "--out", str(tmp_path / "out")),
    )


def test_gradient_flow_vanishes_in_the_rnn_before_the_lstm_and_moves_with_training(flags, tmp_path, capfd):
    script("gradient_flow")(
        [*flags, "--cells", "rnn", "lstm", "--forget-bias", "2", "--steps", "3", "--learning-rate", "0.05"]
    )
    flow = json.loads((tmp_path / "out" / "gradient_flow.json").read_text())["flow"]
    assert list(flow) == ["at birth", "after 3 steps"]
    for curve in (curve for stage in flow.values() for curve in stage.values()):
        mean, low, high = (np.array(curve[name]) for name in ("mean", "low", "high"))
        assert len(mean) == 60 and mean[0] == 0 and (low <= mean + 1e-6).all() and (mean <= high + 1e-6).all()
    born, grown = flow.values()
    assert born["rnn"]["high"][-1] < born["lstm, forget bias 2"]["low"][-1] - 3
    assert all(abs(born[cell]["mean"][-1] - grown[cell]["mean"][-1]) > 1e-3 for cell in born)
    assert (tmp_path / "out" / "gradient_flow.png").read_bytes().startswith(b"\x89PNG")
    out = capfd.readouterr().out
    assert f"{born['rnn']['mean'][-1]:.1f}" in out and "rnn: step 3/3" in out


@pytest.mark.slow
def test_gradient_flow_of_a_run_is_that_of_its_model(flags, tmp_path):
    text, run = flags[:6], str(tmp_path / "run")
    tiny = ("--model.d-model", "12", "--model.num-layers", "1", "--model.vocab-size", "257", "--batch-size", "8")
    forget = ("--model.forget-bias", "6", "--optimizer.learning-rate", "1e-9", "--steps", "1", "--sample-prompt", "The")
    script("pretrain")(["lstm", *text, *tiny, *forget, "--run-dir", run])
    script("gradient_flow")([*flags, "--checkpoint", run])
    (stage,) = json.loads((tmp_path / "out" / "gradient_flow.json").read_text())["flow"].items()
    assert stage[0] == "as trained" and list(stage[1]) == ["lstm"]
    # What the open gates let pass; closed ones (bias 1) leave 10^-5.
    assert len(stage[1]["lstm"]["mean"]) == 64 and stage[1]["lstm"]["low"][-1] > -3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "-1"], "steps: -1"),
        (["--texts", "0"], "texts: 0"),
        (["--d-model", "0"], "d_model: 0"),
        (["--checkpoint", "nowhere"], "checkpoint: 'nowhere'"),
    ],
)
def test_gradient_flow_mistakes_are_named(flags, tmp_path, arguments, said):
    with pytest.raises(ConfigError, match=said):
        script("gradient_flow")([*flags, *arguments])
    assert not (tmp_path / "out").exists()
