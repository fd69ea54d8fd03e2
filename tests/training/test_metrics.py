"""Metrics against figures worked out elsewhere, and their writers."""

import bz2
import json
import lzma
import math
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from xylem.errors import Failure
from xylem.models.config import Initializers, PositionConfig, TransformerConfig
from xylem.training import metrics


def config(**changes) -> TransformerConfig:
    init = Initializers(embedding=0.02, positions=0.02, kernel=0.02, residual=0.02)
    gpt = dict(
        family="gpt", vocab_size=256, max_length=256, num_layers=6, d_model=384, num_heads=6, num_kv_heads=6,
        head_dim=64, d_ff=1536, activation="gelu_tanh", norm="layernorm", norm_eps=1e-5,
        positions=PositionConfig("learned"), bias="everywhere", head="tied", init=init,
    )  # fmt: skip
    return TransformerConfig(**{**gpt, **changes})


LLAMA = dict(
    family="llama", vocab_size=8192, max_length=512, num_layers=8, d_model=512, num_heads=8, num_kv_heads=4,
    head_dim=64, d_ff=1408, activation="swiglu", norm="rmsnorm", norm_eps=1e-6,
    positions=PositionConfig("rope", rope_theta=5e3), bias="none", head="untied",
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, length, millions",
    [({}, 256, 67.8), ({"vocab_size": 50304}, 256, 183.1), (LLAMA, 512, 179.3)],
    ids=["gpt_char", "gpt_bpe", "llama"],
)
def test_metrics_flops_equal_the_published_counts(changes, length, millions):
    assert config(**changes).train_flops_per_token(length) / 1e6 == pytest.approx(millions, abs=0.05)


def test_metrics_flops_equal_what_the_compiler_counts(proof, rng_seed):
    """XLA's own count of every product of a layer written out, full square, which is twice the causal one."""
    sizes = config(num_layers=1, d_model=120, num_heads=4, num_kv_heads=2, head_dim=24, d_ff=336, activation="swiglu",
                   vocab_size=504)  # fmt: skip
    length, d, n, k, h = 128, 120, 4, 2, 24
    shapes = {"q": (d, n * h), "k": (d, k * h), "v": (d, k * h), "o": (n * h, d), "g": (d, 336), "u": (d, 336),
              "w": (336, d), "head": (d, 504)}  # fmt: skip

    def products(x, w):
        q, keys, values = (x @ w[name] for name in "qkv")
        q = q.reshape(length, k, n // k, h)
        scores = jax.numpy.einsum("tkgh,skh->kgts", q, keys.reshape(length, k, h))
        mixed = jax.numpy.einsum("kgts,skh->tkgh", scores, values.reshape(length, k, h))
        y = mixed.reshape(length, n * h) @ w["o"]
        return (((y @ w["g"]) * (y @ w["u"])) @ w["w"] @ w["head"]).sum()

    arguments = (
        jax.ShapeDtypeStruct((length, d), "float32"),
        {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()},
    )

    def counted(function):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"] / length

    ours = sizes.train_flops_per_token(2 * length)
    forward = 3 * counted(products)
    error = abs(ours - forward) / forward
    wrong = abs(config(**{**vars_of(sizes), "activation": "silu"}).train_flops_per_token(2 * length) - forward)
    assert wrong / forward > 0.02
    proof("metrics: analytic FLOPs", "XLA cost analysis of the forward products, x3", error, 0.02, rng_seed, "no gate")


def vars_of(sizes: TransformerConfig) -> dict:
    return {name: getattr(sizes, name) for name in sizes.__dataclass_fields__}


def test_metrics_perplexity_and_bits_per_byte():
    assert metrics.perplexity(math.log(17.0)) == pytest.approx(17.0)
    assert metrics.perplexity(1e4) == math.inf and math.isnan(metrics.perplexity(math.nan))
    # A uniform guess over 256 bytes costs eight bits each, whatever the tokens.
    assert metrics.bits_per_byte(100 * math.log(256.0), 100) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="not empty"):
        metrics.bits_per_byte(1.0, 0)


def test_metrics_references_are_what_the_compressors_need():
    text = b"the cat sat on the mat and the dog lay by the log " * 40
    found = metrics.reference_bits_per_byte(text)
    assert found["bzip2"] * len(text) / 8 == pytest.approx(len(bz2.compress(text)))
    assert found["xz"] <= 8 * len(lzma.compress(text)) / len(text)
    assert metrics.reference_bits_per_byte(b"") == {}


def device(kind: str, platform: str = "gpu", process: int = 0):
    return SimpleNamespace(device_kind=kind, platform=platform, process_index=process)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v4", 275e12),
    ],
)
def test_metrics_peak_of_each_device_kind(kind, peak):
    assert metrics.peak_flops([device(kind)] * 3) == 3 * peak


def test_metrics_peak_agrees_with_jax_where_jax_knows():
    from jax._src.pallas.mosaic import tpu_info

    cores = {"TPU v3": 2, "TPU v5 lite": 1, "TPU v6 lite": 1, "TPU7x": 2}
    for kind, count in cores.items():
        theirs = tpu_info.get_tpu_info_for_chip(tpu_info.chip_version_from_device_kind(kind), 1).bf16_ops_per_second
        assert metrics.peak_flops([device(kind, "tpu")]) == pytest.approx(theirs, rel=0.15), (kind, count)


def test_metrics_peak_of_an_unknown_device_is_unknown():
    assert metrics.peak_flops([device("NVIDIA H200"), device("Abacus")]) is None
    assert metrics.mfu(1e3, 1e9, None) is None
    assert metrics.mfu(1e3, 1e9, 4e12) == 0.25


def test_metrics_peak_of_simulated_cpu_devices_counts_once():
    assert len(jax.devices()) == 8
    peak = metrics.peak_flops(jax.devices())
    assert peak == metrics.peak_flops(jax.devices()[:1]) == metrics.measured_cpu_peak()
    assert 1e9 < peak < 1e15


def test_metrics_throughput_follows_a_change_and_starts_unbiased():
    meter = metrics.Throughput(half_life=10.0)
    assert meter.eta(100) is None
    assert meter.update(50, 0.5) == pytest.approx(100.0)
    for _ in range(40):
        meter.update(100, 1.0)
    rate = [meter.update(400, 2.0) for _ in range(30)]
    assert 100 < rate[0] < 130 and rate[-1] == pytest.approx(200, rel=0.05)
    assert meter.eta(1000) == pytest.approx(1000 / rate[-1])


def rows(path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_metrics_log_is_there_at_once_and_strict(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.metrics_log(path) as write:
        write({"step": 1, "loss": jax.numpy.float32(2.5), "text": "a\nb"})
        assert rows(path) == [{"step": 1, "loss": 2.5, "text": "a\nb"}]
        write({"step": 2, "loss": math.nan, "gradient_norm": math.inf})
        with pytest.raises(ValueError, match="step 2 is logged after step 2"):
            write({"step": 2, "loss": 1.0})
    assert rows(path)[1] == {"step": 2, "loss": None, "gradient_norm": None}


def test_metrics_log_of_a_process_that_does_not_log_writes_nothing(tmp_path):
    with metrics.metrics_log(None, tmp_path / "tensorboard") as write:
        write({"step": 1, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_metrics_log_after_a_resume_has_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.metrics_log(path) as write:
        for step in range(1, 8):
            write({"step": step, "loss": 1.0, "start": 1})
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')
    with metrics.metrics_log(path, resumed_at=4) as write:
        for step in range(5, 9):
            write({"step": step, "loss": 1.0, "start": 2})
    assert [(row["step"], row["start"]) for row in rows(path)] == [(s, 1 + (s > 4)) for s in range(1, 9)]


def test_metrics_log_writes_tensorboard_events(tmp_path):
    with metrics.metrics_log(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as write:
        write({"step": 3, "loss": 2.5, "validation_loss": None, "note": "text"})
    (events,) = (tmp_path / "tensorboard").iterdir()
    body = events.read_bytes()
    assert b"loss" in body and b"validation_loss" not in body and b"note" not in body


FULL = """
import resource, sys
from xylem.errors import Failure
from xylem.training.metrics import metrics_log
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    with metrics_log(sys.argv[1]) as write:
        for step in range(1, 100):
            write({"step": step, "loss": 1 / step})
except Failure as failure:
    print(failure.code, failure)
"""


def test_metrics_log_on_a_full_disk_is_told_and_leaves_whole_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60)
    assert run.stdout.startswith(f"4 {path}: disk full"), run.stdout + run.stderr
    steps = [row["step"] for row in rows(path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 20
    assert path.read_bytes().endswith(b"\n") and path.stat().st_size <= 1000


def test_metrics_log_where_nothing_can_be_written_is_a_failure(tmp_path):
    path = tmp_path / "absent" / "metrics.jsonl"
    with pytest.raises(Failure, match="could not be written") as error, metrics.metrics_log(path):
        pass
    assert error.value.code == 1


def test_metrics_of_a_growing_batch_count_what_each_step_read(monkeypatch):
    now = iter([0.0, 2.0, 4.0, 5.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    meter = metrics.Meter([0, 100, 300, 700, 1100].__getitem__, 1e3, 1e6, 4)
    rows = [meter.row(step, {"loss": 1.0}) for step in (1, 2, 3)]
    assert [row["tokens"] for row in rows] == [100, 300, 700]
    assert rows[0]["tokens_per_second"] == pytest.approx(50) and rows[0]["eta_seconds"] == pytest.approx(1000 / 50)
    assert 50 < rows[1]["tokens_per_second"] < 100 < rows[2]["tokens_per_second"] < 400
    assert rows[2]["eta_seconds"] == pytest.approx(400 / rows[2]["tokens_per_second"])
    assert rows[0]["mfu"] == pytest.approx(50 * 1e3 / 1e6)
