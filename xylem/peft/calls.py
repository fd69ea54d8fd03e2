"""The methods as short calls, ``xylem.peft.lora(params, key, rank=8)``, and as a table by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from jaxtyping import PRNGKeyArray

from xylem.peft import config
from xylem.peft.merging import merge, unmerge
from xylem.peft.methods import adalora as _adalora
from xylem.peft.methods import adapter as _adapter
from xylem.peft.methods import bitfit as _bitfit
from xylem.peft.methods import child as _child
from xylem.peft.methods import dora as _dora
from xylem.peft.methods import ia3 as _ia3
from xylem.peft.methods import lora as _lora
from xylem.peft.methods import olora as _olora
from xylem.peft.methods import prefix as _prefix
from xylem.peft.methods import prompt as _prompt
from xylem.peft.methods import qlora as _qlora
from xylem.peft.methods import relora as _relora
from xylem.peft.methods import selection as _selection
from xylem.peft.methods import state as _state
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
        optimizer: ``(inner, config, steps) -> optimizer``: what the method makes of the optimizer of a run.
        penalty: ``(trainable params, config) -> scalar`` that the loss has added to it.
        restart: ``(state, key, config) -> state``: what happens to a TrainState before a step for which
        due: ``(step, config) -> bool`` holds.
        saved: as ``trainable``: what a file holds, where that is not what learns.
    """

    config: Any
    graft: Callable[[Tree, Any, Any], Tree]
    trainable: Callable[[Tree, Any], Predicate]
    fold: Callable[[Tree], Tree] = lambda params: params
    optimizer: Callable[..., Any] = lambda inner, config, steps: inner
    penalty: Callable[[Tree, Any], Any] = lambda params, config: 0.0
    restart: Callable[[Any, Any, Any], Any] = lambda state, key, config: state
    due: Callable[[Any, Any], Any] = lambda step, config: False
    saved: Callable[[Tree, Any], Predicate] | None = None


METHODS = {
    "lora": Method(config.LoRAConfig, _lora.graft, _lora.trainable, optimizer=_lora.optimizer),
    "qlora": Method(config.QLoRAConfig, _qlora.graft, _qlora.trainable, optimizer=_lora.optimizer),
    "dora": Method(config.DoRAConfig, _dora.graft, _dora.trainable, optimizer=_lora.optimizer),
    "olora": Method(
        config.OLoRAConfig, _olora.graft, _lora.trainable, optimizer=_lora.optimizer, penalty=_olora.penalty
    ),
    "ia3": Method(config.IA3Config, _ia3.graft, _ia3.trainable),
    "adapter": Method(config.AdapterConfig, _adapter.graft, _adapter.trainable),
    "prompt": Method(config.PromptConfig, _prompt.graft, _prompt.trainable),
    "prefix": Method(config.PrefixConfig, _prefix.graft, _prefix.trainable, _prefix.fold),
    "state": Method(config.StateConfig, _state.graft, _state.trainable),
    "bitfit": Method(config.BitFitConfig, _bitfit.graft, _bitfit.trainable),
    "selection": Method(config.SelectionConfig, _selection.graft, _selection.trainable),
    "child": Method(config.ChildConfig, _child.graft, _child.trainable, optimizer=_child.optimizer),
    "adalora": Method(
        config.AdaLoRAConfig,
        _adalora.graft,
        _adalora.trainable,
        optimizer=_adalora.optimizer,
        penalty=_adalora.penalty,
    ),
    "relora": Method(
        config.ReLoRAConfig,
        _relora.graft,
        _relora.trainable,
        optimizer=_lora.optimizer,
        restart=_relora.restart,
        due=_relora.due,
        saved=_relora.saved,
    ),
}
lora = _short(config.LoRAConfig, _lora.graft)
qlora = _short(config.QLoRAConfig, _qlora.graft)
dora = _short(config.DoRAConfig, _dora.graft)
olora = _short(config.OLoRAConfig, _olora.graft)
ia3 = _short(config.IA3Config, _ia3.graft)
adapter = _short(config.AdapterConfig, _adapter.graft)
prompt = _short(config.PromptConfig, _prompt.graft)
prefix = _short(config.PrefixConfig, _prefix.graft)
state = _short(config.StateConfig, _state.graft)
bitfit = _short(config.BitFitConfig, _bitfit.graft)
selection = _short(config.SelectionConfig, _selection.graft)
child = _short(config.ChildConfig, _child.graft)
adalora = _short(config.AdaLoRAConfig, _adalora.graft)
relora = _short(config.ReLoRAConfig, _relora.graft)
__all__ = [
    "METHODS",
    "adalora",
    "adapter",
    "bitfit",
    "child",
    "dora",
    "ia3",
    "lora",
    "merge",
    "olora",
    "prefix",
    "prompt",
    "qlora",
    "relora",
    "selection",
    "state",
    "unmerge",
]
