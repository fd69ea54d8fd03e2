"""LoRA adapters as the folders of Hugging Face peft, both ways.

    adapter_config.json            rank, scale and the modules that have a pair
    adapter_model.safetensors      ``base_model.model.<module>.lora_A.weight`` (R, I) and ``lora_B.weight`` (O, R)

Which module holds which of our matrices is what the tables of ``models/families`` say. Where one module holds several
(GPT-2's ``c_attn``: query, key and value), their pairs become one of as many times the rank, exactly: the A side by
side, the B along a diagonal. Such a pair is read back as those it was made of; one of the plain rank, whose A all three
share, is read as three with equal A, and written as one again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import save_file

from xylem.errors import CheckpointError, ConfigError
from xylem.files import check_new, read_object, whole_folder
from xylem.models import hub, shards
from xylem.models.config import ModelConfig, Seq2SeqConfig, TransformerConfig
from xylem.models.conversion import Row, flatten, listed, unflatten, write
from xylem.models.families import FAMILIES, Family
from xylem.models.families.family import size, value
from xylem.models.leaves import Leaf, LowRank, is_leaf
from xylem.peft.config import LoRAConfig
from xylem.peft.tree import Tree, matches

SETTINGS, ARRAYS = "adapter_config.json", "adapter_model.safetensors"
START = "base_model.model."
# The names of A and B behind a module's, of a matrix and of a table.
KERNEL, TABLE = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
# What may stand in a config: fields of no consequence for what is computed, starts that leave the base as it is, and
# fields that are read here. Any other must be empty.
IDLE = {"alora_invocation_tokens": None, "bias": "none", "peft_type": "LORA"}
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
UNREAD = re.compile(
    r"auto_mapping|base_model_name_or_path|revision|task_type|inference_mode|peft_version|lora_dropout|eva_config"
    r"|fan_in_fan_out|target_modules|exclude_modules|layers_pattern|layers_to_transform|ensure_weight_tying"
    r"|megatron_core|qalora_group_size|runtime_config|r|lora_alpha|use_rslora|rank_pattern|alpha_pattern"
)
Pair = tuple[np.ndarray, np.ndarray]


def save_peft(folder: str | Path, config: ModelConfig, params: Tree, lora_config: LoRAConfig) -> None:
    """Write the pairs of ``params`` to a new folder that ``PeftModel.from_pretrained`` loads onto the same base.

    Raises:
        ConfigError: the folder holds something; the tree has grafts besides the pairs of ``lora_config``, or one that
            peft has no place for.
        CheckpointError: the disk refused.
    """
    folder = Path(folder)
    check_new("folder", folder)
    if type(lora_config) is not LoRAConfig:
        raise ConfigError("lora_config", type(lora_config).__name__, "pairs of LoRA alone are written as peft's")
    flat, family = flatten(params), _family(config)
    pairs = _pairs(config, flat, lora_config)
    tensors, wanted = {}, {}
    modules = _modules(family, config, flat)
    for module, row in modules.items():
        held = [pairs.pop(path, None) for path in row.ours]
        if not any(held):
            continue
        a, b = _join(held, [flat[path].shape for path in row.ours])
        wanted[module] = a.shape[-1]
        for index, name in enumerate(_numbered(module, row, flat)):
            for part, array in zip(_parts(row), (a, b), strict=True):
                tensors[f"{START}{name}.{part}"] = np.ascontiguousarray((array[index] if row.stacked else array).T)
    if pairs:
        raise ConfigError("params", listed(pairs), f"a {family.architecture} has no module for these")
    names = _named(list(wanted), set(modules) - set(wanted))
    ranks = {pattern: wanted[module] for module, (_, pattern) in names.items() if wanted[module] != lora_config.rank}
    plain = [name for name, _ in names.values() if name is not None]
    # The scale stays what it is: alpha grows with the rank, or with its root.
    grown = lambda rank: lora_config.scale * (rank if lora_config.scaling == "standard" else math.sqrt(rank))  # noqa: E731
    described = {
        **{"peft_type": "LORA", "task_type": _task(config), "base_model_name_or_path": None, "inference_mode": True},
        **{"r": lora_config.rank, "lora_alpha": _number(lora_config.alpha), "lora_dropout": 0.0, "bias": "none"},
        "use_rslora": lora_config.scaling == "stabilized",
        "target_modules": plain if len(plain) == len(names) else "|".join(pattern for _, pattern in names.values()),
        "fan_in_fan_out": any(not modules[name].transposed and not _is_table(modules[name]) for name in wanted),
        "rank_pattern": ranks,
        "alpha_pattern": {pattern: _number(grown(rank)) for pattern, rank in ranks.items()},
    }
    try:
        with whole_folder(folder) as draft:
            save_file(tensors, draft / ARRAYS, metadata={"format": "pt"})
            shards.write_json(draft / SETTINGS, described)
            for file in draft.iterdir():
                file.chmod(0o644)  # safetensors writes for its owner alone
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} could not be written: {error}") from error


def load_peft(folder: str | Path, model_config: ModelConfig, base_params: Tree) -> tuple[LoRAConfig, Tree]:
    """``(config, params)``: the base with the pairs of a folder that peft wrote; ``config.targets`` names just those.

    Raises:
        ConfigError: no such adapter, one for another network, or one that asks for what is not implemented here.
    """
    folder = Path(folder)
    raw = read_object(folder / SETTINGS, "adapter")
    _refuse(raw)
    rank, rules = size(raw, "r", 8), {True: "stabilized", False: "standard"}
    scaling: Any = rules[value(raw, "use_rslora", bool, False)]
    config = LoRAConfig(rank, value(raw, "lora_alpha", float, 8.0), scaling=scaling)
    flat, family = flatten(base_params), _family(model_config)
    if folder.is_dir() and not (folder / ARRAYS).exists():
        found = sorted(file.name for file in folder.iterdir() if file.suffix in shards.PICKLES)
        hint = f"; {found[0]} is a pickle, which can run code: save it as safetensors first" if found else ""
        raise ConfigError("adapter", str(folder), f"it must hold {ARRAYS}{hint}")
    tensors = {_bare(name, family): tensor for name, tensor in shards.header(folder / ARRAYS).items()}
    made: dict[str, LowRank] = {}
    for module, row in _modules(family, model_config, flat, bare=True).items():
        names = list(_numbered(module, row, flat))
        parts = [[tensors.pop(f"{name}.{part}", None) for name in names] for part in _parts(row)]
        _check_base(row, names, tensors, flat)
        if all(tensor is None for part in parts for tensor in part):
            continue
        if any(tensor is None for part in parts for tensor in part):
            raise ConfigError("adapter", str(folder), f"{module} must have its A and B in every layer, or in none")
        a, b = (_stacked(part, row) for part in parts)
        for name in names:
            _check_scale(family.outer(f"{name}.weight").removesuffix(".weight"), raw, config, a.shape[-1])
        _check_shapes(module, a, b, row, flat)
        for path, pair in _split(a, b, row, flat, config, module).items():
            made[path] = _leaf(flat[path], pair, config)
    if tensors:
        raise ConfigError("adapter", str(folder), f"this network has no place for {listed(tensors)}")
    if not made:
        raise ConfigError("adapter", str(folder), f"{ARRAYS} holds no pair")
    _refuse_tied(model_config, made)
    targets = f"^({'|'.join(made)})$"
    return LoRAConfig(rank, config.alpha, targets, scaling), unflatten(flat | made)


# --- what is written --------------------------------------------------------------------------------------------------


def _pairs(config: ModelConfig, flat: Mapping[str, Any], lora_config: LoRAConfig) -> dict[str, LowRank]:
    """The pairs by path; anything else that a base does not have is refused."""
    pairs = {path: leaf for path, leaf in flat.items() if isinstance(leaf, LowRank)}
    if not pairs:
        raise ConfigError("params", f"{len(flat)} leaves", "none of them has a pair (peft.lora)")
    heads = {path for path in flat if path.startswith(("classifier", "tagger"))}
    extra = sorted(flat.keys() - hub.parameter_shapes(config).keys() - heads)
    if extra:
        raise ConfigError("params", listed(extra), "the tree must be the network's, its layers one run, and pairs")
    for path, leaf in flat.items():
        inner: Any = leaf.base if isinstance(leaf, LowRank) else leaf
        if is_leaf(inner) and type(inner).rebase is not Leaf.rebase:  # what can take another base is a graft
            raise ConfigError(path, type(inner).__name__, "a weight may have one pair, and no other graft")
    for path, leaf in pairs.items():
        alike = np.asarray(leaf.scale) == np.asarray(jnp.asarray(lora_config.scale, leaf.scale.dtype))
        if leaf.a.shape[-1] != lora_config.rank or not alike.all():
            raise ConfigError("lora_config", lora_config, f"{path} has another rank or scale")
    _refuse_tied(config, pairs)
    return pairs


def _refuse_tied(config: ModelConfig, paths: Any) -> None:
    """In peft a pair beside a table that is read twice changes one of its readers; ours, one weight, changes both."""
    twice = isinstance(config, Seq2SeqConfig) or getattr(config, "head", "tied") != "untied"
    if "embed/embedding" in paths and twice:
        raise ConfigError("embed/embedding", "a pair", "the table is shared, and peft changes one of its readers alone")


def _join(held: list[LowRank | None], shapes: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """One pair for weights that lie side by side: A (*L, I, R), B (*L, R, O)."""
    given = [leaf for leaf in held if leaf is not None]
    first = np.asarray(given[0].a)
    if len(given) == len(held) and all(np.array_equal(first, leaf.a) for leaf in given):
        return first, np.concatenate([np.asarray(leaf.b) for leaf in given], axis=-1)
    rank, dtype = first.shape[-1], first.dtype
    rows, start = [], 0
    width = sum(shape[-1] for shape in shapes)
    for leaf, shape in zip(held, shapes, strict=True):
        row = np.zeros((*shape[:-2], rank, width), dtype)
        if leaf is not None:
            row[..., start : start + shape[-1]] = leaf.b
        rows, start = [*rows, row], start + shape[-1]
    firsts = [np.zeros_like(first) if leaf is None else np.asarray(leaf.a) for leaf in held]
    return np.concatenate(firsts, axis=-1), np.concatenate(rows, axis=-2)


def _named(wanted: list[str], others: set[str]) -> dict[str, tuple[str | None, str]]:
    """By module, the last words of its name that end the names of none of ``others``, which have no pair, or None where
    there are no such words; and a regular expression of the whole name."""
    made = {}
    for module in wanted:
        words = module.rpartition("{layer}.")[2].split(".")
        ends = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
        short = next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), None)
        made[module] = short, re.escape(module).replace(r"\{layer\}", r"\d+")
    return made


def _number(x: float) -> float | int:
    """A whole number as peft writes it."""
    return int(x) if float(x).is_integer() else x


def _task(config: ModelConfig) -> str | None:
    if isinstance(config, Seq2SeqConfig):
        return "SEQ_2_SEQ_LM"
    both = isinstance(config, TransformerConfig) and config.attention.mask != "causal"
    return None if both else "CAUSAL_LM"


# --- what is read -----------------------------------------------------------------------------------------------------


def _refuse(raw: Mapping[str, Any]) -> None:
    """Refuse what a config asks for and is not done here."""
    for key, found in raw.items():
        if key == "init_lora_weights":
            if found not in STARTS:
                raise ConfigError(key, found, "this start changes the base, whose own weights must be kept")
        elif key in IDLE:
            if found != IDLE[key]:
                raise ConfigError(key, found, f"it must be {IDLE[key]!r}")
        elif found and not UNREAD.fullmatch(key):
            raise ConfigError(key, found, "this is not implemented; it must be absent or empty")


def _check_scale(module: str, raw: Mapping[str, Any], config: LoRAConfig, rank: int) -> None:
    """What peft scales a module's pair by must be what ``config`` says: patterns that change it are not implemented."""

    def of(pattern: str, default: Any) -> Any:
        given = value(raw, pattern, dict, {})
        found = next((key for key in given if matches(rf"^(.*\.)?({key})$", module)), None)
        return default if found is None else value(given, found, type(default))

    own, alpha = of("rank_pattern", config.rank), of("alpha_pattern", config.alpha)
    if own != rank:
        raise ConfigError("rank_pattern", own, f"{module} has a pair of rank {rank}")
    scale = alpha / (own if config.scaling == "standard" else math.sqrt(own))
    if not math.isclose(scale, config.scale, rel_tol=1e-6):
        raise ConfigError("alpha_pattern", alpha, f"{module} must be scaled by {config.scale:.6g} as the others")


def _check_base(row: Row, names: list[str], tensors: dict[str, Any], flat: Mapping[str, Any]) -> None:
    """peft saves a table with its pair, in case it was changed: it must be the base's."""
    for index, name in enumerate(names):
        tensor = tensors.pop(f"{name}.base_layer.weight", None)
        if tensor is None:
            continue
        own = write(row, index, flat)
        if tuple(tensor.shape) != own.shape or not np.array_equal(_whole(tensor).astype(own.dtype), own):
            raise ConfigError(name, "another weight", "the adapter was made with another base, or changed its table")


def _check_shapes(module: str, a: np.ndarray, b: np.ndarray, row: Row, flat: Mapping[str, Any]) -> None:
    shapes = [flat[path].shape for path in row.ours]
    expected = (*shapes[0][:-1], a.shape[-1]), (*shapes[0][:-2], a.shape[-1], sum(shape[-1] for shape in shapes))
    if (a.shape, b.shape) != expected:
        raise ConfigError(module, (a.shape, b.shape), f"A and B of this network have shapes {expected}")


def _split(
    a: np.ndarray, b: np.ndarray, row: Row, flat: Mapping[str, Any], config: LoRAConfig, module: str
) -> dict[str, Pair]:
    """The pairs of the weights that lie side by side in one module: the inverse of ``_join``."""
    edges = np.cumsum([flat[path].shape[-1] for path in row.ours])[:-1]
    pieces = np.split(b, edges, axis=-1)
    if a.shape[-1] == config.rank:
        return {path: (a, piece) for path, piece in zip(row.ours, pieces, strict=True)}
    made = {}
    if a.shape[-1] == config.rank * len(row.ours):
        for index, (path, piece) in enumerate(zip(row.ours, pieces, strict=True)):
            own = slice(index * config.rank, (index + 1) * config.rank)
            if np.count_nonzero(piece) == np.count_nonzero(piece[..., own, :]):
                made[path] = a[..., own], piece[..., own, :]
    if len(made) < max(len(row.ours), 2):
        raise ConfigError("rank_pattern", a.shape[-1], f"{module} must have rank {config.rank} as the others")
    return {path: pair for path, pair in made.items() if any(np.count_nonzero(x) for x in pair)}


def _leaf(weight: Any, pair: Pair, config: LoRAConfig) -> LowRank:
    a, b = (jnp.asarray(x, weight.dtype) for x in pair)
    scale: Float[Array, "*L"] = jnp.full(weight.shape[:-2], config.scale, weight.dtype)
    return LowRank(weight, a, b, scale)


def _stacked(tensors: list[Any], row: Row) -> np.ndarray:
    arrays = [_whole(tensor).T for tensor in tensors]
    return np.stack(arrays) if row.stacked else arrays[0]


def _whole(tensor: Any) -> np.ndarray:
    if tensor.dtype not in shards.TYPES:
        raise ConfigError("adapter", tensor.dtype, f"types that can be read are {', '.join(shards.TYPES)}")
    return np.concatenate(list(tensor.blocks(1 << 23)))


# --- the table --------------------------------------------------------------------------------------------------------


def _family(config: ModelConfig) -> Family:
    return FAMILIES[hub.describe(config)[0]]


def _modules(family: Family, config: ModelConfig, flat: Mapping[str, Any], bare: bool = False) -> dict[str, Row]:
    """The family's modules that are matrices or tables, by name; ``bare``: without the network's prefix."""
    full: Callable[[str], str] = (lambda name: name) if bare else family.outer
    return {
        full(row.theirs).removesuffix(".weight"): row
        for row in family.table(config)
        if all(path in flat for path in row.ours)
        and row.theirs.endswith(".weight")
        and len(flat[row.ours[0]].shape) - row.stacked == 2
        and not row.depthwise
    }


def _bare(name: str, family: Family) -> str:
    return name.removeprefix(START).removeprefix(family.prefix)


def _numbered(module: str, row: Row, flat: Mapping[str, Any]) -> list[str]:
    layers = flat[row.ours[0]].shape[0] if row.stacked else 1
    return [module.format(layer=index) for index in range(layers)]


def _is_table(row: Row) -> bool:
    return row.ours[0].endswith("/embedding")


def _parts(row: Row) -> tuple[str, str]:
    return TABLE if _is_table(row) else KERNEL
