"""The methods as short calls, ``xylem.peft.lora(params, key, rank=8)``, and as a table by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from jaxtyping import PRNGKeyArray

from xylem.peft import config
from xylem.peft.merging import merge, unmerge
from xylem.peft.methods import adapter as _adapter
from xylem.peft.methods import bitfit as _bitfit
from xylem.peft.methods import dora as _dora
from xylem.peft.methods import ia3 as _ia3
from xylem.peft.methods import lora as _lora
from xylem.peft.methods import prefix as _prefix
from xylem.peft.methods import prompt as _prompt
from xylem.peft.methods import qlora as _qlora
from xylem.peft.methods import selection as _selection
from xylem.peft.tree import Predicate, Tree

P, C = ParamSpec("P"), TypeVar("C")


def _short(make: Callable[P, C], graft: Callable[[Tree, Any, C], Tree]) -> Callable[Concatenate[Tree, Any, P], Tree]:
    """``graft`` that takes the fields of its config instead of a config."""

    def call(params: Tree, key: PRNGKeyArray, *args: P.args, **fields: P.kwargs) -> Tree:
        return graft(params, key, make(*args, **fields))

    return call


class Method(NamedTuple):
    """What there is of a method.

    Attributes:
        config: its choices.
        graft: ``(params, key, config) -> params``.
        trainable: ``(params, config) -> predicate`` of (path, weight).
        fold: ``params -> params``: what the network is given, where that is computed from what is learned.
    """

    config: Any
    graft: Callable[[Tree, Any, Any], Tree]
    trainable: Callable[[Tree, Any], Predicate]
    fold: Callable[[Tree], Tree] = lambda params: params


METHODS = {
    "lora": Method(config.LoRAConfig, _lora.graft, _lora.trainable),
    "qlora": Method(config.QLoRAConfig, _qlora.graft, _qlora.trainable),
    "dora": Method(config.DoRAConfig, _dora.graft, _dora.trainable),
    "ia3": Method(config.IA3Config, _ia3.graft, _ia3.trainable),
    "adapter": Method(config.AdapterConfig, _adapter.graft, _adapter.trainable),
    "prompt": Method(config.PromptConfig, _prompt.graft, _prompt.trainable),
    "prefix": Method(config.PrefixConfig, _prefix.graft, _prefix.trainable, _prefix.fold),
    "bitfit": Method(config.BitFitConfig, _bitfit.graft, _bitfit.trainable),
    "selection": Method(config.SelectionConfig, _selection.graft, _selection.trainable),
}
lora = _short(config.LoRAConfig, _lora.graft)
qlora = _short(config.QLoRAConfig, _qlora.graft)
dora = _short(config.DoRAConfig, _dora.graft)
ia3 = _short(config.IA3Config, _ia3.graft)
adapter = _short(config.AdapterConfig, _adapter.graft)
prompt = _short(config.PromptConfig, _prompt.graft)
prefix = _short(config.PrefixConfig, _prefix.graft)
bitfit = _short(config.BitFitConfig, _bitfit.graft)
selection = _short(config.SelectionConfig, _selection.graft)
__all__ = [
    "METHODS",
    "adapter",
    "bitfit",
    "dora",
    "ia3",
    "lora",
    "merge",
    "prefix",
    "prompt",
    "qlora",
    "selection",
    "unmerge",
]
