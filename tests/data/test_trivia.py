"""The instruction set that ships in a package: its form, its split, and what is refused."""

import hashlib
import json

import pytest

from xylem.data import conversations, tokenizers, trivia
from xylem.data.config import DataConfig
from xylem.errors import ConfigError, Failure

FILE = """
categories:
- trivia
conversations:
- - Who was first?
  - Anna
- - who was First?
  - Berta
- In a game, which number is called "two ducks"?
  - '22'
- - What is it?
  - 1984
- - ' How many? '
  - '7'
- - Who?
  - me
  - and then?
"""


def asked(talk):
    return [one["content"] for one in talk if one["role"] == "user"]


def test_a_question_is_kept_once_and_what_is_no_pair_is_left_out():
    first, second = trivia.talks(FILE)
    assert first == [{"role": "user", "content": "Who was first?"}, {"role": "assistant", "content": "Anna"}]
    assert [one["content"] for one in second] == ["How many?", "7"]


@pytest.mark.parametrize("text", ["- a\n- b\n", "other: 1\n", "conversations: [", "!!python/object:os.system {}"])
def test_a_file_of_another_form_is_named(text):
    with pytest.raises(Failure, match=r"trivia\.yml is no list of conversations"):
        trivia.talks(text)


def test_the_real_set_has_a_fixed_split_that_shares_no_question():
    made = trivia.load()
    assert {split: len(found) for split, found in made.items()} == {"train": 208, "validation": 52}
    train, held = ({question.casefold() for talk in found for question in asked(talk)} for found in made.values())
    assert len(train) == 208 and not train & held
    # The held-out questions are part of every figure that names this set: they stay these.
    told = hashlib.sha256(json.dumps([asked(talk) for talk in made["validation"]]).encode()).hexdigest()
    assert told.startswith("be0be92e2315f9ba")


def test_it_is_read_by_its_name(tmp_path):
    plain = tokenizers.byte_level()
    data = conversations.prepare(DataConfig("trivia", sequence_length=256), plain)
    assert data.corpus.name == "trivia"
    assert (data.counts["train"]["documents"], data.counts["validation"]["documents"]) == (208, 52)
    text = plain.decode(data.source("train")[0]["tokens"])
    assert "\n" in text
    own = tmp_path / "held.jsonl"
    own.write_text(json.dumps({"prompt": "Who?", "completion": "Me."}) + "\n")
    other = conversations.prepare(DataConfig("trivia", validation=str(own), sequence_length=256), plain)
    assert (other.counts["train"]["documents"], other.counts["validation"]["documents"]) == (208, 1)
    assert other.key != data.key


def test_a_name_that_is_nearly_its_own_is_told(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'trivia'"):
        conversations.prepare(DataConfig("trivias", sequence_length=64), tokenizers.byte_level())
