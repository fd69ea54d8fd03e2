"""The scripts as a user meets them: help, a small run, and every mistake as one message with its exit code."""

import json
import shutil
import subprocess
import sys

import pytest
from programs import SCRIPTS, run, script

from xylem.errors import BusyError, CheckpointError, ConfigError, Failure
from xylem.training.run_folder import open_run

TINY = (
    *("--model.num-layers", "2", "--model.d-model", "16", "--model.num-heads", "2", "--model.num-kv-heads", "1"),
    *("--model.head-dim", "8", "--model.d-ff", "24", "--model.vocab-size", "257", "--model.max-length", "96"),
    *("--model.compute.layers", "scan", "--data.tokenizer", "bytes", "--data.sequence-length", "16"),
    *("--batch-size", "8", "--steps", "3", "--log-every", "1"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps under the old oak tree. "
    (folder / "text.txt").write_text(text * 60)
    return folder


@pytest.fixture
def flags(corpus, tmp_path):
    where = ("--data.corpus", str(corpus / "text.txt"), "--data.cache-dir", str(corpus / "cache"))
    return (*TINY, *where, "--run-dir", str(tmp_path / "run"))


NAMES = (
    "finetune",
    "pretrain",
    "generate",
    "classify",
    "plan",
    "evaluate",
    "scaling",
    "gradient_flow",
    "architectures",
    "ladder",
    "compare_methods",
    "merge",
)


@pytest.mark.parametrize("name", NAMES)
def test_help_comes_without_loading_jax(name):
    path = SCRIPTS / f"{name}.py"
    code = f"""
import runpy, sys
sys.argv = [{str(path)!r}, "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    heavy = [name for name in ("jax", "flax", "grain", "tensorflow_datasets", "matplotlib") if name in sys.modules]
    print("heavy:", heavy, "code:", end.code)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout
    assert "heavy: [] code: 0" in out and "usage:" in out


def test_a_run_leaves_all_that_it_promises_and_its_model_talks(flags, tmp_path, capfd):
    script("pretrain")([*flags, "--evaluate-every", "2"])
    folder = tmp_path / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["loss"] > 0 and row["tokens_per_second"] > 0 for row in rows)
    assert "validation_bits_per_byte" in rows[1] and "validation_bits_per_byte" in rows[2]
    summary = json.loads((folder / "summary.json").read_text())
    assert {"bzip2", "xz"} == set(summary["compressors_bits_per_byte"])
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "checkpoints" / "00000003" / "COMPLETE").is_file()
    assert list((folder / "tensorboard").iterdir())
    for name in ("config.json", "versions.json", "starts.jsonl", "sample.txt", "tokenizer/tokenizer.json"):
        assert (folder / name).is_file(), name
    out = capfd.readouterr().out
    assert "bits per byte" in out and "perplexity" in out and "step 3/3" in out
    script("generate")([str(folder), "--prompt", "The quick", "--max-new-tokens", "5"])
    assert capfd.readouterr().out.startswith("The quick")
    script("evaluate")([str(folder)])
    out = capfd.readouterr().out
    assert f"{summary['validation_bits_per_byte']:.3f} bits per byte" in out
    (tmp_path / "other.txt").write_text("Sphinx of black quartz, judge my vow. " * 300)
    script("evaluate")([str(folder), "--corpus", str(tmp_path / "other.txt")])
    assert f"{summary['validation_bits_per_byte']:.3f} bits per byte" not in capfd.readouterr().out
    for flag, value, said in (("--limit", "0", "limit: 0"), ("--sequence-length", "97", "sequence_length: 97")):
        with pytest.raises(ConfigError, match=said):
            script("evaluate")([str(folder), flag, value])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt2_mediun"], "did you mean 'gpt2_medium'"),
        (["--model.num-kv-heads", "3", "--model.num-heads", "4"], "num_kv_heads: 3"),
        (["--model.head-dim", "7"], "head_dim: 7"),
        (["--steps", "0"], "steps: 0"),
        (["--batch-size", "9", "--accumulate", "2"], "accumulate: 2"),
        (["--data.sequence-length", "4096"], "data.sequence_length: 4096"),
        (["--optimizer.learning-rate", "-1"], "optimizer.learning_rate: -1.0"),
        (["--mesh.tensor", "3"], "mesh.fsdp x mesh.tensor: '1 x 3'"),
        (["--mesh.data", "1", "--mesh.fsdp", "5", "--batch-size", "5"], "mesh.fsdp: 5"),
        (["--mesh.data", "16"], "mesh.data x mesh.fsdp x mesh.tensor"),
        (["--mesh.data", "8", "--batch-size", "6"], "batch_size: 6"),
        (["--model.vocab-size", "200"], "model.vocab_size: 200"),
        (["--data.corpus", "nowhere.txt"], "nowhere.txt"),
        (["--data.tokenizer", "nothing.json"], "nothing.json"),
        (["--sample-prompt", "x" * 96], "sample_prompt"),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_trained(flags, tmp_path, arguments, said):
    named = arguments[:1] if not arguments[0].startswith("-") else []
    with pytest.raises(ConfigError) as caught:
        script("pretrain")([*named, *flags, *arguments[len(named) :]])
    assert said in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "config.json").exists(), "the mended command may use the same folder"


def test_an_empty_corpus_is_named(flags, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(Failure, match="empty"):
        script("pretrain")([*flags, "--data.corpus", str(tmp_path / "empty.txt")])


def test_a_full_disk_is_told_before_the_first_step(flags, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(CheckpointError, match="disk") as caught:
        script("pretrain")(list(flags))
    assert caught.value.code == 4


def test_a_run_folder_in_use_says_try_later(flags, tmp_path):
    with open_run(tmp_path / "run", {}, []), pytest.raises(BusyError) as caught:
        script("pretrain")(list(flags))
    assert caught.value.code == 75 and str(tmp_path / "run") in str(caught.value)


def test_another_config_on_the_same_folder_is_refused(flags, tmp_path):
    script("pretrain")(list(flags))
    with pytest.raises(ConfigError, match="seed"):
        script("pretrain")([*flags, "--seed", "1"])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["pretrain", "--stepz", "3"], 2, "Perhaps you meant"),
        (["pretrain", "--steps", "many"], 2, "many"),
        (["pretrain", "nonesuch"], 2, "it must be one of"),
        (["generate", "smolm2", "--prompt", "x"], 2, "did you mean 'smollm2'"),
        (["generate", "smollm2"], 2, "--prompt"),
    ],
)
def test_the_process_ends_with_the_code_and_no_traceback(arguments, code, said):
    done = run(*arguments)
    assert done.returncode == code
    assert said in done.stderr + done.stdout and "Traceback" not in done.stderr


def test_tokens_outside_the_vocabulary_are_named(flags, corpus, tmp_path):
    script("pretrain")(list(flags))
    import jax

    from xylem.generation.sampling import Sampling, generate
    from xylem.training.restore import open_model

    module, params, *_ = open_model(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"ids must lie in \[0, 257\)"):
        generate(module, params, [[257]], Sampling(1), jax.random.key(0))


def test_generating_with_an_encoder_is_refused(tmp_path):
    import jax

    from xylem.models import build, hub
    from xylem.models.bert import bert

    config = bert(1, 8, 2, vocab_size=11, max_length=9)
    params = build(config).init(jax.random.key(0), jax.numpy.zeros((1, 2), int))["params"]
    hub.save(tmp_path / "hf", config, params)
    with pytest.raises(ConfigError, match="a decoder is wanted, and bert models are none"):
        script("generate")([str(tmp_path / "hf"), "--prompt", "x"])
