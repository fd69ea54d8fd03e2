"""How other people store each family: names and layouts of its tensors, and the words of its ``config.json``.

To add a family, write its table and add it to ``FAMILIES``, by the ``model_type`` of its ``config.json``. ``NAMES`` are
those of our families that go by another name there.
"""

from xylem.models.families.bart import BART
from xylem.models.families.bert import ALBERT, BERT, ROBERTA
from xylem.models.families.family import Family
from xylem.models.families.gpt import GPT1, GPT2
from xylem.models.families.llama import LLAMA
from xylem.models.families.mamba import MAMBA
from xylem.models.families.t5 import T5

FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "openai-gpt": GPT1,
    "llama": LLAMA,
    "bert": BERT,
    "roberta": ROBERTA,
    "albert": ALBERT,
    "mamba": MAMBA,
    "bart": BART,
    "t5": T5,
}
NAMES = {"gpt": "gpt2", "gpt1": "openai-gpt"}
