"""Fine-tune a model by any method of xylem/peft.

    python scripts/finetune.py BASE --method lora --data.corpus FILE ...

    python scripts/finetune.py smollm2 --method lora --data.corpus trivia

BASE is a run folder or its adapter/, a Hugging Face folder, a .gguf file, or the name of a model that ships inside a
package. --objective.name says what FILE is: "answers", a .jsonl of conversations, of which what the assistant says is
learned, or a set by name: trivia (the default), finance, medicine, law; "classification", a .jsonl of texts with
labels, or trec; "token_classification", one of words with labels; "causal_lm", a text of some domain. Every field is a
flag, those of the method --method.FIELD. The same command on the same folder resumes; scripts/generate.py,
scripts/classify.py and scripts/evaluate.py open it, and its adapter/ is what was learned as a file of its own.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from xylem.launch import launch

METHODS = (
    *("lora", "qlora", "dora", "adalora", "relora", "olora", "ia3", "adapter", "prompt", "prefix", "bitfit"),
    *("state", "selection", "child"),
)


def main(arguments: list[str]) -> None:
    """Parse, open the base, call."""
    import sys

    base = next(iter(arguments), None)
    if base is None or base.startswith("-"):
        print(f"usage: finetune.py BASE [--method METHOD] [flags]\n\n{__doc__}")
        print(f"methods: {', '.join(METHODS)}\nfields and defaults: finetune.py BASE --method METHOD --help")
        if base in ("-h", "--help"):
            sys.exit(0)
        from xylem.errors import ConfigError

        raise ConfigError("BASE", base, "the first word is the model to begin with")
    from xylem.training.finetune import finetune
    from xylem.training.finetune_config import HEADS
    from xylem.training.restore import has_its_own_head, learns_by_gradient, open_any

    method, rest = named("--method", arguments[1:], "lora", METHODS)
    model = open_any(base, check=learns_by_gradient)
    config = parse(base, method, model, rest)
    if config.objective.name not in HEADS:  # those get a fresh head in the place of an old one
        has_its_own_head(base, model.module.config, model.objective)
    finetune(config, model.params, model.tokenizer, sys.argv)


def named(flag: str, arguments: list[str], default: str, allowed: tuple[str, ...]) -> tuple[str, list[str]]:
    """What a flag that chooses a class of settings names, and the other arguments."""
    from xylem.errors import ConfigError

    if flag not in arguments:
        return default, arguments
    place = arguments.index(flag)
    value = arguments[place + 1] if place + 1 < len(arguments) else ""
    if value not in allowed:
        raise ConfigError(flag.lstrip("-"), value, f"it must be one of {', '.join(allowed)}", allowed)
    return value, arguments[:place] + arguments[place + 2 :]


def parse(base: str, method: str, model: Any, arguments: list[str]) -> Any:
    """The run that the flags ask for."""
    from pathlib import Path

    import tyro

    from xylem.data.config import DataConfig
    from xylem.generation.sampling import virtual_tokens
    from xylem.peft.calls import METHODS as every
    from xylem.training.config import OptimizerConfig
    from xylem.training.finetune_config import FinetuneConfig, room_for, taught_by
    from xylem.training.objective_config import ObjectiveConfig

    config = model.module.config
    objective: Any
    objective, rest = named("--objective.name", arguments, next(iter(taught_by(config)), "causal_lm"), OBJECTIVES)
    settings = every[method].config(**named_by(method, rest))
    virtual = getattr(settings, "length", 0) + max(virtual_tokens(model.module, model.params))
    length = min(512, room_for(config, virtual))
    default = FinetuneConfig(
        model=config,  # its layers scanned: unrolled, those of a deep one compile longer than a short run gains
        data=DataConfig(
            "trivia" if objective == "answers" else "wikitext2", tokenizer=model.data.tokenizer, sequence_length=length
        ),
        objective=ObjectiveConfig(name=objective),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=10, weight_decay=0.0),
        base=str(Path(base).resolve()) if Path(base).exists() else base,
        method=settings,
        steps=200,
        batch_size=8,
        run_dir=f"runs/finetune-{method}",
    )
    parsed = tyro.cli(
        FinetuneConfig,
        prog=f"finetune.py {base} --method {method}",
        description=__doc__,
        default=default,
        args=rest,
        config=(tyro.conf.AvoidSubcommands,),
    )
    if method == "relora":
        check_restarts(parsed)
    return parsed


def named_by(method: str, arguments: list[str]) -> dict[str, Any]:
    """What of a method's settings must be known before the flags are read: how many virtual tokens it adds, and what it
    selects, of which there is no default that means something."""
    given = {}
    for flag, value in pairwise([*arguments, ""]):
        name, _, own = flag.partition("=")
        given[name] = own or value
    if method == "selection":
        alone = "--method.targets" in given and "--method.last" not in given
        return {"targets": "."} if alone else {"last": 1}
    length = given.get("--method.length", "")
    return {"length": int(length)} if method in ("prompt", "prefix") and length.isdigit() and int(length) else {}


def check_restarts(config: Any) -> None:
    """Refuse a ReLoRA that never restarts, or by another schedule than its own."""
    from xylem.errors import ConfigError

    if config.method.every >= config.steps:
        allowed = f"less than steps = {config.steps}: pairs that never begin anew are LoRA's"
        raise ConfigError("method.every", config.method.every, allowed)
    if config.optimizer.schedule != "cosine":
        raise ConfigError("optimizer.schedule", config.optimizer.schedule, "cosine: ReLoRA's falls at each restart")


OBJECTIVES = ("answers", "classification", "token_classification", "causal_lm")

if __name__ == "__main__":
    launch(main)
