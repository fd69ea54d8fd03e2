"""Every method on every family, small: what the tests of the grid share."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from small import randomise

from xylem import models
from xylem.models import bart, bert, gpt, llama, mamba, t5
from xylem.models.config import Seq2SeqConfig
from xylem.models.settings import Compute
from xylem.peft import config as configs
from xylem.peft.calls import METHODS

B, T, S, VOCAB = 3, 7, 9, 31
FAMILIES = {
    "bert": bert.bert(3, 20, 5, VOCAB, 24),
    "t5": t5.t5(3, 20, 5, 6, 28, "1.1", VOCAB, 24),
    "bart": bart.bart(3, 20, 5, VOCAB, 24),
    "gpt2": gpt.gpt(3, 20, 5, VOCAB, 24),
    "llama": llama.llama(3, 24, 6, 3, 28, VOCAB, 24, rope_theta=777.0, norm_eps=1e-4, head="untied"),
    "mamba": mamba.mamba(3, 12, VOCAB, 24, state_size=5, conv_width=3, dt_rank=4),
}
# A setting of each method, and what differs of it in a family.
SETTINGS = {
    "lora": configs.LoRAConfig(rank=3, alpha=5.0),
    "rslora": configs.LoRAConfig(rank=3, alpha=5.0, scaling="stabilized", targets=r"embed/|query|input/|B/"),
    "qlora": configs.QLoRAConfig(rank=3, alpha=5.0, group=32),
    "dora": configs.DoRAConfig(rank=2, alpha=3.0),
    "ia3": configs.IA3Config(),
    "houlsby": configs.AdapterConfig(size=5),
    "pfeiffer": configs.AdapterConfig(size=5, places="mlp"),
    "prompt": configs.PromptConfig(length=4),
    "prefix": configs.PrefixConfig(length=4, hidden=6),
    "bitfit": configs.BitFitConfig(),
    "last": configs.SelectionConfig(last=1),
    "norms": configs.SelectionConfig(targets="norm/"),
    "child": configs.ChildConfig(),
    "adalora": configs.AdaLoRAConfig(rank=3, target=2, alpha=5.0),
    "relora": configs.ReLoRAConfig(rank=3, alpha=5.0, every=7, rewarm=2),
}
NAMES = {"rslora": "lora", "houlsby": "adapter", "pfeiffer": "adapter", "last": "selection", "norms": "selection"}
# Cells that raise: there is nothing that the method could teach.
EMPTY = {("bitfit", "llama"), ("bitfit", "t5"), ("prefix", "mamba")}
CELLS = [(method, family) for family in FAMILIES for method in SETTINGS if (method, family) not in EMPTY]
# Those that every run of the fast tests looks at: each method and each family at least once.
FEW = [(method, family) for place, method in enumerate(SETTINGS) for family in (list(FAMILIES)[place % 6],)]
VIRTUAL = ("prompt", "prefix")  # they change what the network reads: their identity is another test


def merges(method: str) -> bool:
    """Whether a method's grafts can become weights of the network."""
    return method not in (*VIRTUAL, "houlsby", "pfeiffer")


# What is measured, and in which cells.
MEASURED = {
    "fresh": [one for one in CELLS if one[0] not in VIRTUAL],
    "still": CELLS,
    "merged": [one for one in CELLS if merges(one[0])],
    "unmerged": [one for one in CELLS if merges(one[0]) and one[0] not in ("dora", "qlora")],
    "saved": CELLS,
    "cached": [one for one in CELLS if one[1] != "bert"],
    "sharded": [one for one in FEW if one in CELLS],
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
    return _base(module_of(family), jax.random.key(seed))


@partial(jax.jit, static_argnames="module")
def _base(module, key):
    own, noise = jax.random.split(key)
    return randomise(module.init(own, jnp.zeros((1, 2), jnp.int32))["params"], noise)


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
    """The tree with every array that learns moved by a little."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(key, len(leaves))
    from xylem.sharding import path_name

    new = [
        x + 0.1 * jax.random.normal(k, x.shape, x.dtype) if learns(path_name(path), x) else x
        for (path, x), k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, new)
