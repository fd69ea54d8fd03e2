"""Every method on every family, small: what the tests of the grid share."""

import os
import secrets
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from small import random_weights

from xylem import models
from xylem.models import bart, bert, gpt, llama, mamba, t5
from xylem.models.config import Seq2SeqConfig
from xylem.models.settings import Compute
from xylem.peft import config as configs
from xylem.peft.calls import METHODS
from xylem.sharding import path_name

SEED = int(os.environ.get("XYLEM_GRID_SEED", secrets.randbits(31)))
_rng = np.random.default_rng(SEED)
_one = lambda *of: int(_rng.choice(of))  # noqa: E731
B, T, S = 3, 7, 9
# Drawn anew by each process that tests. What they have in common lets eight devices cut them: even widths.
VOCAB, LAYERS, HEADS, HEAD, WIDE = _one(31, 37, 41), _one(2, 3), _one(3, 5), _one(4, 6), _one(22, 28, 34)
RANK, ALPHA = _one(2, 3, 4), float(_one(3, 5, 7))
FAMILIES = {
    "bert": bert.bert(LAYERS, HEADS * HEAD, HEADS, VOCAB, 24),
    "t5": t5.t5(LAYERS, 20, HEADS, HEAD, WIDE, "1.1", VOCAB, 24),
    "bart": bart.bart(LAYERS, HEADS * HEAD, HEADS, VOCAB, 24),
    "gpt2": gpt.gpt(LAYERS, HEADS * HEAD, HEADS, VOCAB, 24),
    "llama": llama.llama(LAYERS, 24, 6, 3, WIDE, VOCAB, 24, rope_theta=777.0, norm_eps=1e-4, head="untied"),
    "mamba": mamba.mamba(
        LAYERS, _one(10, 12, 14), VOCAB, 24, state_size=_one(3, 5), conv_width=_one(3, 4), dt_rank=_one(3, 4)
    ),
}
# A setting of each method, and what differs of it in a family.
SETTINGS = {
    "lora": configs.LoRAConfig(RANK, ALPHA),
    "rslora": configs.LoRAConfig(RANK, ALPHA, scaling="stabilized", targets=r"embed/|query|input/|B/"),
    "qlora": configs.QLoRAConfig(RANK, ALPHA, group=32),
    "fp4": configs.QLoRAConfig(RANK, ALPHA, kind="fp4", statistics="single", block=_one(8, 16)),
    "int8": configs.QLoRAConfig(RANK, ALPHA, kind="int8"),
    "dora": configs.DoRAConfig(RANK, ALPHA),
    "olora": configs.OLoRAConfig(RANK, ALPHA),
    "ia3": configs.IA3Config(),
    "houlsby": configs.AdapterConfig(size=_one(5, 6)),
    "pfeiffer": configs.AdapterConfig(size=_one(5, 6), places="mlp"),
    "prompt": configs.PromptConfig(length=_one(3, 4)),
    "prefix": configs.PrefixConfig(length=_one(3, 4), hidden=_one(6, 7)),
    "bitfit": configs.BitFitConfig(),
    "added": configs.BitFitConfig(missing="add"),
    "last": configs.SelectionConfig(last=1),
    "norms": configs.SelectionConfig(targets="norm/"),
    "child": configs.ChildConfig(),
    "adalora": configs.AdaLoRAConfig(RANK + 1, RANK, ALPHA),
    "relora": configs.ReLoRAConfig(RANK, ALPHA, every=7, rewarm=2),
    "state": configs.StateConfig(),
}
# The paths of what each setting shall teach, and nothing else.
_PAIR, _NORM, _PREFIX = r"(kernel|embedding)/[ab]$", r"norm/(scale|bias)$", r"prefix/(cross_)?attention/"
_BIAS = r"layers/.*/bias$|norm/bias$"
LEARNS = dict.fromkeys(("lora", "rslora", "qlora", "fp4", "int8", "olora", "relora"), _PAIR) | {
    "dora": r"kernel/(base/[ab]|magnitude)$",
    "ia3": r"(attention/(key|value)|mlp/down|mixer/(input|output))/kernel/stretch$",
    "houlsby": rf"(attention|mlp|mixer)_adapter/(down|up)/(kernel|bias)$|{_NORM}",
    "pfeiffer": rf"(mlp|mixer)_adapter/(down|up)/(kernel|bias)$|{_NORM}",
    "prompt": r"^prompt/embedding$",
    "prefix": rf"{_PREFIX}(embedding|(down|up)/(kernel|bias))$",
    "bitfit": _BIAS,
    "added": _BIAS,
    "last": r"^(decoder/)?layers_1/",
    "norms": _NORM,
    "child": "",
    "adalora": r"kernel/(a|b|values)$",
    "state": r"^layers/mixer/start$",
}
NAMES = {"rslora": "lora", "fp4": "qlora", "int8": "qlora", "houlsby": "adapter", "pfeiffer": "adapter"}
NAMES |= {"added": "bitfit", "last": "selection", "norms": "selection"}
ROUNDED = ("qlora", "fp4", "int8")  # they make a base of few bits
OWN = ("bitfit", "added", "last", "norms", "child")  # arrays of the network itself learn: merging does nothing
# Cells that raise: there is nothing that the method could teach.
EMPTY = {("bitfit", "llama"), ("bitfit", "t5"), ("prefix", "mamba")}
EMPTY |= {("state", family) for family in FAMILIES if family != "mamba"}
CELLS = [(method, family) for family in FAMILIES for method in SETTINGS if (method, family) not in EMPTY]
# Those that every run of the fast tests looks at: each method once, and each family.
FEW = []
for place, method in enumerate(SETTINGS):
    turned = [list(FAMILIES)[(place + step) % 6] for step in range(6)]
    FEW.append((method, next(family for family in turned if (method, family) not in EMPTY)))
VIRTUAL = ("prompt", "prefix")  # they change what the network reads: their identity is another test


def merges(method: str) -> bool:
    """Whether a method's grafts can become weights of the network."""
    return method not in (*VIRTUAL, "houlsby", "pfeiffer", "state")


# What is measured, and in which cells.
MEASURED = {
    "fresh": [one for one in CELLS if one[0] not in VIRTUAL],
    "still": CELLS,
    "merged": [one for one in CELLS if merges(one[0])],
    "unmerged": [one for one in CELLS if merges(one[0]) and one[0] not in ("dora", *ROUNDED, *OWN)],
    "saved": CELLS,
    "cached": [one for one in CELLS if one[1] != "bert"],
    "sharded": CELLS,
    "empty": sorted(EMPTY),
}


def method_of(name: str):
    """The functions of a setting's method."""
    return METHODS[NAMES.get(name, name)]


@lru_cache
def module_of(family: str):
    return models.build(FAMILIES[family].with_compute(Compute(layers="scan", kernels="plain", scan="sequential")))


def base_of(family: str, seed: int):
    """Random weights: no zero, no one."""
    params = random_weights(module_of(family), jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))
    if family != "t5":
        return params
    # T5 does not divide scores, and starts with queries that much smaller; large ones would enlarge all rounding.
    smaller = lambda path, x: x / HEAD**0.5 if path_name(path).endswith("attention/query/kernel") else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(smaller, params)


def case(method: str, family: str, seed: int):
    """A base, the base with fresh grafts, a key. O-LoRA's base holds the pair of an earlier task."""
    base, keys = base_of(family, seed), jax.random.split(jax.random.key(seed), 3)
    if method == "olora":
        base = graft("lora", base, keys[2])
        base = moved(base, learns("lora", base), keys[2])
    return base, graft(method, base, keys[0]), keys[1]


@partial(jax.jit, static_argnames="method")
def graft(method: str, base, key):
    """The method's grafts, made in one program."""
    return method_of(method).graft(base, key, SETTINGS[method])


def learns(method: str, params):
    """The predicate of what the method teaches."""
    return method_of(method).trainable(params, SETTINGS[method])


def texts(family: str, seed: int):
    """Arguments of a call: one text a row, padded on the right."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, S, B)
    lengths[0] = S
    made = {
        "tokens": jnp.asarray(rng.integers(0, VOCAB, (B, S)), jnp.int32),
        "segments": jnp.asarray(np.arange(S)[None] < lengths[:, None], jnp.int32),
    }
    if isinstance(FAMILIES[family], Seq2SeqConfig):
        made["decoder_tokens"] = jnp.asarray(rng.integers(0, VOCAB, (B, T)), jnp.int32)
    return made


def logits(family: str, method: str, params, batch):
    """What the network gives for the real tokens of a batch; padding's is zero."""
    out = module_of(family).apply({"params": method_of(method).fold(params)}, **batch)
    if "decoder_tokens" in batch:
        return out.logits
    return jnp.where(batch["segments"][..., None] > 0, out.logits, 0.0)


def moved(params, learns, key):
    """The tree with every array that learns moved by a little. In NumPy: each shape would be a program to compile."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def move(path, x):
        step = 0.1 * rng.standard_normal(x.shape)
        return jnp.asarray(np.asarray(x) + step.astype(x.dtype)) if learns(path_name(path), x) else x

    return jax.tree_util.tree_map_with_path(move, params)
