"""Chat templates: Jinja text that came with a model, run in a sandbox."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from xylem.errors import ConfigError


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tokens: Mapping[str, str],
    name: str,
) -> str:
    """The text of a conversation.

    The names a template may use are those of Hugging Face's chat templates: messages, add_generation_prompt,
    bos_token, eos_token, raise_exception, strftime_now and the filter tojson.

    Args:
        template: Jinja text.
        messages: ``{"role": ..., "content": ...}`` each.
        add_generation_prompt: end with the opening of the assistant's turn.
        tokens: the text of the special tokens the template may name.
        name: what an error message calls the tokenizer.

    Raises:
        ConfigError: the template is broken, refuses the messages, or reaches for what the sandbox forbids.
    """
    try:
        compiled = _compile(template)
        return compiled.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **tokens)
    except Exception as error:  # a template from outside can fail in any way
        raise ConfigError("messages", list(messages), f"the chat template of {name} failed: {error}") from error


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    import json

    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # trim_blocks, lstrip_blocks, loopcontrols: what the published templates are written for.
    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
