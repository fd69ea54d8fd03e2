"""The comparison of methods: what its figures are, what it does not do again, and its mistakes."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import script
from small import random_weights, small

from xylem import models
from xylem.data import conversations
from xylem.errors import ConfigError
from xylem.peft.calls import METHODS
from xylem.training.objective_config import ObjectiveConfig
from xylem.training.objectives import causal_lm

PAGE = "before\n<!-- methods:begin -->\nold\n<!-- methods:end -->\nbehind\n"


@pytest.fixture(scope="module")
def compare():
    script("compare_methods")
    return sys.modules["script_compare_methods"]


def test_losses_by_conversation_add_up_to_the_loss_of_the_loop(compare, rng_seed):
    rng, module = np.random.default_rng(rng_seed), models.build(small("llama"))
    keys = jax.random.split(jax.random.key(rng_seed))
    params = random_weights(module, keys[1], jnp.zeros((1, 2), jnp.int32))
    examples = []
    for size in (9, 7, 5, 4, 3):
        answer = np.arange(size) >= rng.integers(1, size)
        examples.append(conversations.Example(rng.integers(1, 31, size).astype(np.int32), answer))
    rows = conversations.pack(examples, 16, pad=0)
    batch = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    found = np.asarray(jax.jit(compare.by_conversation, static_argnums=(0, 3))(module, params, batch, 3))
    sums = jax.jit(lambda: causal_lm(module, ObjectiveConfig(), params, batch))()
    np.testing.assert_allclose(found.sum((0, 1)), [sums.nll, sums.weight], rtol=1e-4)
    tokens = sorted(found[..., 1].ravel())[-len(examples) :]
    assert tokens == sorted(one.answer[1:].sum() for one in examples)
    (alone,) = conversations.pack(examples[:1], 16, pad=0)
    lonely = jax.tree.map(lambda x: jnp.asarray(x)[None], alone)
    first = float(causal_lm(module, ObjectiveConfig(), params, lonely).nll)
    nearest = np.min(np.abs(found[..., 0] - first))
    assert nearest < 1e-3 * max(1.0, first), "each is that of its conversation alone"


def test_the_spread_is_that_of_drawing_conversations_anew(compare, rng_seed):
    rng = np.random.default_rng(rng_seed)
    tokens = rng.integers(1, 9, 200).astype(float)
    nll = tokens * rng.gamma(2.0, 1.0, 200)
    drawn = rng.integers(0, 200, (4000, 200))
    means = nll[drawn].sum(1) / tokens[drawn].sum(1)
    assert compare.spread(nll.tolist(), tokens.tolist()) == pytest.approx(means.std(), rel=0.15)
    assert compare.spread((2.0 * tokens).tolist(), tokens.tolist()) == pytest.approx(0.0, abs=1e-9)


def keep(compare, parsed, name, part, **figures):
    path = compare.Path(parsed.run_dir) / name / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": name, "settings": compare.settings_of(parsed, name), **figures}))


def test_what_is_there_is_shown_and_not_done_again(compare, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    flags = ["--run-dir", str(tmp_path / "runs"), "--methods", "lora", "prompt", "--page", str(page)]
    parsed = compare.Arguments(methods=("lora", "prompt"), run_dir=str(tmp_path / "runs"))
    keep(compare, parsed, "base", "learn", nll=[8.0, 6.0], tokens=[2.0, 2.0])
    sizes = {"parameters": 1_234_567, "file": 4_900_000, "memory": 2e9}
    keep(compare, parsed, "lora", "learn", nll=[2.0, 4.0], tokens=[2.0, 2.0], **sizes)
    keep(compare, parsed, "prompt", "learn", nll=[4.0, 7.0], tokens=[2.0, 2.0], **sizes)
    keep(compare, parsed, "lora", "speed", seconds=[3.0, 1.0, 1.5])
    keep(compare, parsed, "prompt", "speed", seconds=[1.0])
    script("compare_methods")(flags)
    text = page.read_text()
    assert text.startswith("before\n<!-- methods:begin -->\n| method |") and text.endswith(
        "<!-- methods:end -->\nbehind\n"
    )
    assert "| LoRA, rank 8 | 1,234,567 | 0.001 | 4.90 | 2.00 | 1.50 | 1.50 ± 0.50 | 2.00 ± 1.00 | best |" in text
    assert (
        "| prompt tuning, 20 | 1,234,567 | 0.02 | 4.90 | 2.00 | 1.00 | 2.75 ± 0.75 | 0.75 ± 1.25 | 1.25 ± 0.25 |"
        in text
    )
    assert "the base, untouched | - |" in text and "old" not in text
    assert (tmp_path / "runs/methods.png").read_bytes().startswith(b"\x89PNG")
    assert "LoRA, rank 8" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"run_dir: .* its lora was made with"):
        script("compare_methods")([*flags, "--steps", "7"])


def test_every_method_is_compared_with_settings_of_its_own(compare):
    # Without earlier tasks O-LoRA is LoRA; a state to begin with is Mamba's, and the model compared on is a LLaMA.
    assert {config.name for config, _ in compare.METHODS.values()} == set(METHODS) - {"olora", "state"}
    assert [*compare.METHODS, "base"] == [*(name for name in compare.NAMES if name != "base"), "base"]
    assert set(compare.TITLES) == set(compare.NAMES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "steps: 0"),
        (["--batch-size", "0"], "batch_size: 0"),
        (["--parts"], "parts"),
        (["--page", "nowhere.md"], "page: 'nowhere.md'"),
    ],
)
def test_comparing_mistakes_are_named(arguments, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        script("compare_methods")(["--run-dir", str(tmp_path), *arguments])
