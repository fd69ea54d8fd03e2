"""Trees to trees: methods that change what of a pre-trained network is learned, and with which weights.

    params = peft.lora(params, key, rank=8, alpha=16)       a tree with grafts; the network is the same, and is not told
    merged = peft.merge(params)                             plain arrays again

Each method is a file of ``methods/`` and a config of ``config.py``. The calls come from ``calls.py`` when they are
first asked for, so that configs can be read without jax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xylem.peft.calls import *  # noqa: F403


def __getattr__(name: str) -> Any:
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec(module := f"{__name__}.{name}") is not None:  # "from xylem.peft import config" asks here first
        return import_module(module)
    calls = import_module("xylem.peft.calls")
    if name not in calls.__all__:
        raise AttributeError(f"module 'xylem.peft' has no attribute {name!r}")
    return getattr(calls, name)
