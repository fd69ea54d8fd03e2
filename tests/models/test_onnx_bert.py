"""A real encoder in an ONNX file: ours against onnxruntime, which executes the same file."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import edited, error

from xylem.data.pretrained import pretrained
from xylem.errors import ConfigError
from xylem.models import build, hub, onnx_file

BAR = 1e-5


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return bytes([number << 3, content])
    return bytes([number << 3 | 2, len(content)]) + content


@pytest.mark.slow
def test_minilm_l3_gives_what_onnxruntime_computes(rng_seed, proof):
    import onnxruntime

    file, rng = pretrained("minilm-l3"), np.random.default_rng(rng_seed)
    lengths = [17, 3, 29, 11]
    ids = rng.integers(1000, 30522, (4, 29))
    real = (np.arange(29) < np.array(lengths)[:, None]).astype(np.int64)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {"input_ids": ids * real, "attention_mask": real})
    expected = next(one for one in found if one.shape == (4, 29, 384))
    config, params = hub.load(file)
    assert (config.num_layers, config.num_heads, config.vocab_size) == (3, 12, 30522)

    def worst(params) -> float:
        out = build(config).apply({"params": params}, jnp.asarray(ids * real), segments=jnp.asarray(real))
        assert out.logits is None and out.pooled is None
        return error(np.asarray(out.hidden)[real == 1], expected[real == 1])

    query = params["layers"]["attention"]["query"]["kernel"]
    assert worst(edited(params, **{"layers/attention/query/kernel": query.mT})) > BAR
    row, oracle = "paraphrase-MiniLM-L3 from ONNX: states", "onnxruntime on the same file"
    proof(row, oracle, worst(params), BAR, rng_seed, "a kernel's axes exchanged")


def test_tensors_and_numbers_of_a_file_written_by_hand(tmp_path):
    file = tmp_path / "model.onnx"
    values = np.arange(6, dtype="<f4")
    for dims in (field(1, b"\x02\x03"), field(1, 2) + field(1, 3)):  # packed, and one by one
        tensor = dims + field(2, 1) + field(8, b"w") + field(9, values.tobytes())
        constant = field(1, b"value") + field(5, field(2, 1) + field(9, np.float32(5.5).tobytes()))
        node = field(2, b"c") + field(3, b"n") + field(4, b"Constant") + field(5, constant)
        file.write_bytes(field(1, 8) + field(7, field(1, node) + field(5, tensor)))
        (read,), stored = onnx_file.read(file)
        assert (read.kind, read.name, read.outputs, read.floats) == ("Constant", "n", ["c"], {"value": 5.5})
        np.testing.assert_array_equal(next(stored["w"].blocks(1 << 20)), values.reshape(2, 3))


def test_damaged_and_other_onnx_files_are_refused(tmp_path):
    file = tmp_path / "model.onnx"

    def refused(content: bytes, match: str) -> None:
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=match):
            hub.load(file)

    tensor = field(1, 3) + field(2, 1) + field(8, b"w") + field(9, bytes(12))
    refused(b"", "damaged")
    refused(b"\xff" * 20, "more than ten bytes")
    refused(b"\x3b", "wire type 3")
    refused(b"\x3a\x7f\x00", "ends behind its message")
    refused(field(7, field(5, tensor[:-14] + field(9, bytes(8)))), "bytes that its shape")
    refused(field(7, field(5, tensor.replace(field(2, 1), field(2, 7)))), "only float32 weights")
    refused(field(7, field(5, tensor[:-14])), "only float32 weights")
    refused(field(7, field(5, tensor)), "it is no BERT")
    with pytest.raises(ConfigError, match="no such file"):
        hub.load(tmp_path / "absent.onnx")


@pytest.mark.slow
def test_a_graph_that_is_not_a_berts_is_refused(tmp_path):
    file = tmp_path / "model.onnx"
    shutil.copy(pretrained("minilm-l3"), file)
    content = file.read_bytes()
    assert content.count(b"\x03Erf") == 3
    root, other = (np.float32(width**0.5).tobytes() for width in (32, 33))
    bias = b"encoder.layer.1.output.dense.bias"
    for old, new, times, match in (
        (b"\x22\x03Erf", b"\x22\x03Sin", 1, "graph: {'Erf': 2}"),
        (root, other, 1, "one of each"),
        (root, other, -1, "head_dim"),
        (bias, bias[:-1] + b"z", -1, "no place for"),
    ):
        file.write_bytes(content.replace(old, new, times))
        with pytest.raises(ConfigError, match=match):
            hub.load(file)
