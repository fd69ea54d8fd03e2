"""BERTs without heads from ONNX files, as torch's exporter writes those of transformers and sentence-transformers.

The exporter keeps the names of embeddings, norms and biases. Kernels lose theirs (``onnx::MatMul_470``) and are stored
(in, out) as ours; the node that multiplies by one still says which layer it was. Widths are the shapes of the weights;
that a head's scores are divided by the root of its width, and what the norms add to a variance, the graph says.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from xylem.errors import ConfigError
from xylem.models import bert, onnx_file
from xylem.models.config import TransformerConfig
from xylem.models.conversion import Row
from xylem.models.families.bert import BERT_LAYERS, EMBEDDINGS
from xylem.models.onnx_file import Node
from xylem.models.shards import Stored

ROWS = tuple(replace(row, transposed=False) for row in (*EMBEDDINGS, *BERT_LAYERS))
# From a root that depends on what was exported: "/model.0/auto_model/encoder/layer.0/attention/self/query/MatMul".
LINEAR = re.compile(r"(?:.*/)?(encoder/layer\.\d+/[\w/]+)/MatMul")
WEIGHT = re.compile(r"(?:.*\.)?((?:embeddings|encoder\.layer\.\d+)\..*)")


def open_file(path: Path) -> tuple[TransformerConfig, tuple[Row, ...], dict[str, Stored]]:
    """Configuration, table and tensors of a file; no weight is read yet.

    Raises:
        ConfigError: the file is missing or damaged, or its graph is not that of a BERT.
    """
    if not path.is_file():
        raise ConfigError("checkpoint", str(path), "there is no such file")
    nodes, stored = onnx_file.read(path)
    named = {}
    for name, tensor in stored.items():
        if found := WEIGHT.fullmatch(name):
            named[found[1]] = tensor
    for node in nodes:
        held = [stored[name] for name in node.inputs if name in stored]
        if node.kind == "MatMul" and held and (found := LINEAR.fullmatch(node.name)):
            named[found[1].replace("/", ".") + ".weight"] = held[0]
    return _config(path, nodes, named), ROWS, named


def _config(path: Path, nodes: list[Node], named: dict[str, Stored]) -> TransformerConfig:
    try:
        (vocab_size, d_model), (max_length, _), (token_types, _) = (
            named[f"embeddings.{name}_embeddings.weight"].shape for name in ("word", "position", "token_type")
        )
        d_ff = named["encoder.layer.0.intermediate.dense.weight"].shape[1]
    except (KeyError, ValueError) as error:
        raise ConfigError("checkpoint", str(path), f"it is no BERT: it lacks or misshapes {error}") from error
    layers = len({name.split(".")[2] for name in named if name.startswith("encoder.layer.")})
    _check_graph(path, nodes, layers)
    constants = {
        name: node.floats.get("value", 0.0) for node in nodes if node.kind == "Constant" for name in node.outputs
    }
    roots = {constants.get(node.inputs[-1], 0.0) for node in nodes if node.name.endswith("/attention/self/Div")}
    epsilons = {node.floats.get("epsilon", 0.0) for node in nodes if node.kind == "LayerNormalization"}
    if len(roots) != 1 or len(epsilons) != 1 or 0.0 in roots | epsilons:
        allowed = "its layers must have one root of a head's width and one epsilon, one of each"
        raise ConfigError("graph", (roots, epsilons), f"in {path}: {allowed}")
    (root,), (epsilon,) = roots, epsilons
    head_dim = round(root**2)
    if head_dim < 1 or d_model % head_dim or abs(head_dim**0.5 - root) > 1e-5 * root:
        raise ConfigError("head_dim", root**2, f"it must divide the model's width {d_model}")
    config = bert.bert(layers, d_model, d_model // head_dim, vocab_size, max_length, d_ff=d_ff)
    embedding = replace(config.embedding, token_types=token_types)
    return replace(config, norm_eps=float(f"{epsilon:.6g}"), embedding=embedding)


def _check_graph(path: Path, nodes: list[Node], layers: int) -> None:
    """Refuse a graph with other numbers of those operations that make a BERT with the exact GELU what it is."""
    wanted = {"MatMul": 8 * layers, "Softmax": layers, "Erf": layers, "LayerNormalization": 2 * layers + 1}
    wanted |= dict.fromkeys(("Tanh", "Relu", "Sigmoid", "Gemm", "QLinearMatMul", "MatMulInteger"), 0)
    counts = Counter(node.kind for node in nodes)
    differing = {kind: counts[kind] for kind, number in wanted.items() if counts[kind] != number}
    if differing:
        allowed = f"a BERT of {layers} layers without heads has { ({kind: wanted[kind] for kind in differing}) }"
        raise ConfigError("graph", differing, f"in {path}: {allowed}")
