"""Which of a network's own weights learn: those of the last layers, the norms, or what a pattern finds.

Nothing is added; what was trained is saved as it is.
"""

from __future__ import annotations

from jaxtyping import PRNGKeyArray

from xylem.errors import ConfigError
from xylem.models.conversion import flatten
from xylem.models.stack import run_length, runs
from xylem.peft.config import SelectionConfig
from xylem.peft.tree import Predicate, Tree, matches, split


def graft(params: Tree, key: PRNGKeyArray, config: SelectionConfig) -> Tree:
    """The tree, its last layers apart as a run of their own.

    Raises:
        ConfigError: there are not more layers than those that learn, or ``targets`` finds nothing.
    """
    if config.targets is not None and not any(matches(config.targets, path) for path in flatten(params)):
        raise ConfigError("targets", config.targets, f"it must find some of {', '.join(flatten(params))}")
    if not config.last:
        return params
    if "decoder" in params:
        return {**params, "decoder": graft(params["decoder"], key, SelectionConfig(config.last))}
    layers = sum(run_length(params[name]) for name in runs(params))
    if config.last >= layers:
        raise ConfigError("last", config.last, f"fewer than the {layers} layers that are stored")
    return split(params, layers - config.last)


def trainable(params: Tree, config: SelectionConfig) -> Predicate:
    """The last runs of layers, and what the pattern finds."""
    side, prefix = (params["decoder"], "decoder/") if "decoder" in params else (params, "")
    last, left = [], config.last
    for name in reversed(runs(side)):
        if left > 0:  # ``graft`` has cut a run where the last layers begin
            last, left = [*last, f"{prefix}{name}/"], left - run_length(side[name])

    def learns(path: str, _: object) -> bool:
        named = config.targets is not None and matches(config.targets, path)
        return named or path.startswith(tuple(last))

    return learns
