"""Hugging Face folders, GGUF, ONNX and Keras files <-> (config, params).

The families and their tables are in ``families.py``. What a checkpoint asks for and this code does not do is refused,
never ignored: a model that loads is the model that was saved.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from safetensors import SafetensorError

from xylem.errors import CheckpointError, ConfigError
from xylem.files import check_new, read_object, whole_folder
from xylem.models import build, heads, shards
from xylem.models.config import ModelConfig
from xylem.models.conversion import Place, Row, Source, flatten, listed, read, rows_for, write
from xylem.models.families import FAMILIES, NAMES, Family
from xylem.models.families.family import size, value
from xylem.models.leaves import with_biases
from xylem.models.settings import Compute

DTYPES = ("float32", "bfloat16")
SHARD_BYTES = 2 << 30


def load(
    folder_or_file: str | os.PathLike, dtype: Any = "float32", place: Place | None = None
) -> tuple[ModelConfig, dict]:
    """A checkpoint's configuration and parameters.

    Memory stays near the size of the tree: each stacked leaf is allocated once and filled from the files a few
    megabytes at a time; jax on a CPU adopts it without a copy, an accelerator takes it before the next one is made.

    Args:
        folder_or_file: a Hugging Face folder (``config.json`` and safetensors, whole or sharded, or a
            ``pytorch_model.bin`` of before torch 1.6) of one of the ``FAMILIES``, a GGUF file of the LLaMA family, an
            ONNX file of a BERT without heads, or the HDF5 file of a textgenrnn.
        dtype: ``float32`` or ``bfloat16``: of the returned parameters, and of ``config.compute``.
        place: (path, NumPy value) -> what the tree shall hold; ``jax.device_put`` to the default device unless given.

    Raises:
        ConfigError: no such checkpoint, one of another kind, a damaged or incomplete one, or a setting that this code
            does not implement.
    """
    path = Path(folder_or_file)
    name = np.dtype(dtype).name
    if name not in DTYPES:
        raise ConfigError("dtype", name, f"it must be one of {DTYPES}", DTYPES)
    if path.suffix == ".gguf":
        from xylem.models import gguf

        (config, rows, sources), optional, head = gguf.open_file(path), (), None
    elif path.suffix == ".onnx":
        from xylem.models import onnx_bert

        (config, rows, sources), optional, head = onnx_bert.open_file(path), ("head", "pair_head", "pooler"), None
    elif path.suffix == ".hdf5":
        from xylem.models import textgenrnn

        (config, rows, sources), optional, head = textgenrnn.open_file(path), (), None
    else:
        config, family, sources, head = _open_folder(path)
        rows, optional = family.table(config), family.optional if head is None else ()
    config = config.with_compute(Compute(dtype=name, param_dtype=name))
    place = place or (lambda _, leaf: jax.device_put(leaf))
    template = _present(parameter_shapes(config, head), rows, sources, optional)
    head_dim = getattr(config, "head_dim", 1)  # only attention has heads, and rows that it interleaves
    return config, read(str(path), rows, sources, template, head_dim, place)


def save(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer_file: str | os.PathLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    labels: Sequence[str] = (),
) -> None:
    """Write a folder that Hugging Face's language model of the family loads to the same function.

    The folder appears whole or not at all. A tree with a head of ``heads.py`` is written as the class that has it.
    Weights that are not plain arrays are materialized.

    Args:
        folder: a new or an empty folder.
        tokenizer_file: a ``tokenizer.json`` to lay beside the weights.
        shard_bytes: the most that one file holds; beyond it come shards and an index.
        labels: the names of what the tree's head judges by; they are numbered unless given.

    Raises:
        ConfigError: the folder holds something, Hugging Face has no word for the configuration, or the tree is not the
            configuration's.
        CheckpointError: the disk refused.
    """
    folder = Path(folder)
    check_new("folder", folder)
    if tokenizer_file is not None and not Path(tokenizer_file).is_file():
        raise ConfigError("tokenizer_file", str(tokenizer_file), "there is no such file")
    model_type, described = describe(config)
    head = heads.held(dict(params))
    flat, template = flatten(with_biases(params)), parameter_shapes(config, head)
    _check_tree(flat, template)
    family = FAMILIES[model_type]
    if len(labels) not in (0, head[0] if head else 0):
        raise ConfigError("labels", len(labels), f"the tree's head has {head[0] if head else 0}")
    if head is not None:
        described |= _described_head(family, head[1], labels or tuple(f"LABEL_{place}" for place in range(head[0])))
    described["torch_dtype"] = np.dtype(flat["embed/embedding"].dtype).name
    try:
        with whole_folder(folder) as draft:
            _write_weights(draft, family, rows_for(family.table(config), template), flat, template, shard_bytes)
            shards.write_json(draft / "config.json", described)
            if tokenizer_file is not None:
                shutil.copyfile(tokenizer_file, draft / "tokenizer.json")
                # Without this transformers rebuilds the tokenizer of the model's family instead of reading the file.
                shards.write_json(draft / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
            for file in draft.iterdir():
                file.chmod(0o644)  # safetensors writes for its owner alone
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {error}") from error


def describe(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Hugging Face's ``model_type`` and ``config.json`` for a configuration.

    Raises:
        ConfigError: they cannot say what the configuration says; the fields that would be lost are named.
    """
    model_type = NAMES.get(config.family, config.family)
    if model_type not in FAMILIES:
        raise ConfigError("family", config.family, f"Hugging Face has no such network; it has {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    described = {"architectures": [family.architecture], "model_type": model_type, **family.from_config(config)}
    # Ids that begin and end a text are the tokenizer's business; left out, transformers would assume those of its own.
    described |= {"bos_token_id": None, "eos_token_id": None}
    try:
        back = family.to_config(described)
    except ConfigError as error:
        raise ConfigError("config", config.family, f"{model_type} has no such network: {error}") from error
    lost = _differing(config, back)
    if lost:
        raise ConfigError("config", lost, f"{model_type} has no such network")
    return model_type, described


def _differing(ours: Any, theirs: Any, prefix: str = "") -> dict[str, Any]:
    """Fields of a configuration, nested ones too, that another has otherwise; how it computes or begins aside."""
    lost = {}
    for name in (field.name for field in fields(ours)):
        one, other = getattr(ours, name), getattr(theirs, name)
        if name in ("compute", "init") or one == other:
            continue
        nested = is_dataclass(one) and is_dataclass(other)
        lost |= _differing(one, other, f"{prefix}{name}.") if nested else {prefix + name: one}
    return lost


def parameter_shapes(
    config: ModelConfig, head: tuple[int, heads.Kind] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and type of every parameter, without computing one; ``head`` is what ``heads.held`` gives."""

    def make(key: PRNGKeyArray) -> dict[str, Any]:
        params: Any = build(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return params if head is None else heads.add(config, params, key, *head)

    return flatten(jax.eval_shape(make, jax.random.key(0)))


def label_names(folder: str | os.PathLike, count: int) -> tuple[str, ...]:
    """The names that a Hugging Face folder gives the ``count`` labels of its head; numbered where it names none."""
    named = value(read_object(Path(folder) / "config.json", "checkpoint"), "id2label", dict, {})
    return tuple(str(named.get(str(place), f"LABEL_{place}")) for place in range(count))


def chooses_a_label(folder: str | os.PathLike, count: int) -> bool:
    """Whether a Hugging Face folder's head gives each text, or word, one of several labels."""
    kind = read_object(Path(folder) / "config.json", "checkpoint").get("problem_type")
    return count > 1 and kind in (None, "single_label_classification")


def _described_head(family: Family, kind: heads.Kind, labels: Sequence[str]) -> dict[str, Any]:
    """What ``config.json`` says of a head."""
    if kind not in family.heads:
        raise ConfigError("params", kind, f"transformers stores no such head of a {family.architecture}")
    words = {"id2label": dict(enumerate(labels)), "label2id": {label: place for place, label in enumerate(labels)}}
    return {"architectures": [family.heads[kind]], **words}


def _head_of(raw: Mapping[str, Any], family: Family) -> tuple[int, heads.Kind] | None:
    """The head that a ``config.json`` tells of: how many labels, and its kind."""
    classes = value(raw, "architectures", list, [])
    kind: Any = next((kind for kind, name in family.heads.items() if name in classes), None)
    if kind is None:
        return None
    # Two labels, transformers' default, are not written down.
    return len(value(raw, "id2label", dict, {})) or size(raw, "num_labels", 2), kind


def _present(
    template: dict[str, jax.ShapeDtypeStruct],
    rows: tuple[Row, ...],
    sources: Mapping[str, Any],
    optional: tuple[str, ...],
) -> dict[str, jax.ShapeDtypeStruct]:
    """The template without the optional parts (``head/...``) of which the checkpoint holds nothing."""
    held = {path for row in rows if row.theirs in sources for path in row.ours}
    lacking = tuple(f"{part}/" for part in optional if not any(path.startswith(f"{part}/") for path in held))
    return {path: leaf for path, leaf in template.items() if not path.startswith(lacking)}


def _open_folder(
    folder: Path,
) -> tuple[ModelConfig, Family, dict[str, Source], tuple[int, heads.Kind] | None]:
    if not folder.is_dir():
        hint = "there is no such folder or file"
        if folder.is_file():
            pickles = dict.fromkeys(shards.PICKLES, "a pickle can run code: save it as safetensors first")
            hints = {**pickles, ".npz": "models/g2p.py reads that of g2p-en"}
            hint = hints.get(folder.suffix, "give the folder that holds this file and its config.json")
        allowed = f"it must be a Hugging Face folder, a .gguf, an .onnx or an .hdf5 file; {hint}"
        raise ConfigError("checkpoint", str(folder), allowed)
    raw = read_object(folder / "config.json", "checkpoint")
    model_type = raw.get("model_type")
    if model_type is not None and str(model_type) not in FAMILIES:
        raise ConfigError("model_type", str(model_type), f"supported are {', '.join(FAMILIES)}", FAMILIES)
    tensors = shards.tensors(folder)
    family = FAMILIES[str(model_type)] if model_type is not None else _family_of(tensors)
    config = family.to_config({**raw, "holds_head": "lm_head.weight" in tensors})
    head, sources = _head_of(raw, family), {}
    for name, tensor in tensors.items():
        name = name.removeprefix(family.prefix)
        if head is not None and head[1] == "tagger" and name.startswith("pooler."):
            continue  # old releases stored it, nothing read it
        if family.ignored.fullmatch(name) or (name == "lm_head.weight" and config.head != "untied"):
            continue
        if tensor.dtype not in shards.TYPES:
            known = ", ".join(shards.TYPES)
            raise ConfigError(name, tensor.dtype, f"in {tensor.file}: types that can be read are {known}", shards.TYPES)
        sources[name] = tensor
    return config, family, sources, head


def _family_of(tensors: Iterable[str]) -> Family:
    """Whose prefix the names have: the first releases of transformers wrote no ``model_type``."""
    found = {name.partition(".")[0] + "." for name in tensors}
    families = [family for family in FAMILIES.values() if family.prefix in found]
    if len(families) != 1:
        raise ConfigError("model_type", None, f"config.json must give it: one of {', '.join(FAMILIES)}")
    return families[0]


def _check_tree(flat: Mapping[str, Any], template: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    missing, extra = template.keys() - flat.keys(), flat.keys() - template.keys()
    if missing or extra:
        problem = f"missing: {listed(missing) or 'none'}; unexpected: {listed(extra) or 'none'}"
        raise ConfigError("params", f"{len(flat)} leaves", f"they must be those of the configuration; {problem}")
    for path, leaf in flat.items():
        if tuple(leaf.shape) != template[path].shape:
            raise ConfigError(path, tuple(leaf.shape), f"the configuration asks for {template[path].shape}")


def _write_weights(
    folder: Path,
    family: Family,
    rows: list[Row],
    flat: Mapping[str, Any],
    template: Mapping[str, Any],
    shard_bytes: int,
) -> None:
    """The family's rows, layer by layer, under the names that its language model gives them."""
    where, plan = {}, []
    for layer in range(max(template[row.ours[0]].shape[0] for row in rows if row.stacked)):
        for row in rows:
            if layer < (template[row.ours[0]].shape[0] if row.stacked else 1):
                name = family.outer(row.theirs.format(layer=layer))
                where[name] = row, layer
                plan.append((name, math.prod(row.shape(template)) * np.dtype(flat[row.ours[0]].dtype).itemsize))

    def tensor(name: str) -> np.ndarray:
        row, layer = where[name]
        return write(row, layer, flat)

    shards.write_folder(folder, plan, tensor, shard_bytes)
