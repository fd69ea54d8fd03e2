"""The page of architectures: that it is whole, and that its pictures are drawn from the code and tell the truth."""

import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import script

from xylem.configs.pretrain import COUNTS, RUNS, parse
from xylem.errors import ConfigError
from xylem.models import PRESETS, bert, build, gpt, llama, mamba, ngram, rnn, t5, vanilla
from xylem.models.config import Seq2SeqConfig
from xylem.pictures import catalogue, curves, drawing, flow, grafts, layout, masks, texts

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architectures.md"


@cache
def page() -> str:
    return PAGE.read_text()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_family_has_a_section_with_a_picture_its_files_and_a_command():
    sections = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n)*)", page(), re.MULTILINE))
    listed = {title: text.rpartition("Presets:")[2] for title, text in sections.items() if "Presets:" in text}
    for name in {*PRESETS, *RUNS}:
        holders = [title for title, presets in listed.items() if f"`{name}`" in presets]
        assert len(holders) == 1, f"{name} stands among the presets of {holders}"
    for title in {*listed, "N-grams"}:
        text = sections[title]
        assert re.search(r"^!\[.+\]\(figures/\w+\.png\)$", text, re.MULTILINE), f"{title}: no picture"
        assert re.search(r"^Files: \[", text, re.MULTILINE), f"{title}: no files"
        assert "    python scripts/pretrain.py " in text, f"{title}: no command"


def test_the_page_shows_each_picture_of_the_catalogue_and_no_other():
    shown = re.findall(r"\(figures/(\w+)\.png\)", page())
    assert sorted(shown) == sorted(catalogue.PICTURES)
    made = (ROOT / "docs" / "figures").glob("*.png")
    files = {path.stem: path for path in made if path.stem not in grafts.PICTURES}  # those are of docs/peft.md
    assert sorted(files) == sorted(catalogue.PICTURES)
    for name, path in files.items():
        width = int.from_bytes(path.read_bytes()[16:20])  # of the header
        assert path.stat().st_size < 48_000 and width / drawing.DPI < 11, f"{name}: too large for a README's column"


def test_links_of_the_page_lead_somewhere():
    titles = re.findall(r"^## (.+)$", page(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page()):
        assert (PAGE.parent / target).exists() if target else anchor in anchors, target or anchor


def test_commands_of_the_page_are_understood():
    commands = re.findall(r"^    python scripts/pretrain\.py (.+)$", page(), re.MULTILINE)
    assert len(commands) >= 15 and {*re.findall(r"architectures\.py (\w+)", page())} <= set(RUNS)
    for command in commands:
        words = shlex.split(command, comments=True)
        name, run = parse(words, "pretrain.py", "", around=lambda run: run, runs={**RUNS, **COUNTS})
        assert name in command and run.run_dir in command


def test_the_table_of_the_page_is_what_the_configs_say():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", page(), re.MULTILINE)
    assert {PRESETS[name]().family for name, _ in rows} == {PRESETS[name]().family for name in PRESETS} - {"mamba"}
    for name, cells in rows:
        config = PRESETS[name]()
        one = config.decoder if isinstance(config, Seq2SeqConfig) else config
        said = [
            *(f"{one.norm_position}, {one.norm}", one.positions.kind, one.activation, one.bias, one.head),
            *(f"{one.num_heads} / {one.num_kv_heads}", one.attention.scale, f"{one.dropout:g}"),
        ]
        assert cells.split(" | ") == said, name


# --- the pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalogue.PICTURES)
def test_a_picture_is_drawn_from_the_code_as_it_is(name):
    made = catalogue.PICTURES[name]()
    path = ROOT / "docs" / "figures" / f"{name}.png"
    assert drawing.described(path) == str(made), f"python scripts/architectures.py --only {name}"


def test_the_script_draws_the_same_bytes_twice_and_small(tmp_path):
    names = ("roberta_text", "gpt2")
    for folder in ("one", "two"):
        script("architectures")(["--only", *names, "--out", str(tmp_path / folder)])
    for name in names:
        one, two = ((tmp_path / folder / f"{name}.png").read_bytes() for folder in ("one", "two"))
        assert one == two and len(one) < 40_000


def test_the_script_draws_any_run_as_its_flags_change_it(tmp_path, capsys):
    out = tmp_path / "deep" / "mine.png"
    script("architectures")(["default", "--model.norm-position", "post", "--model.num-layers", "3", "--out", str(out)])
    assert "3 layers" in drawing.described(out) and "final_norm" not in drawing.described(out)
    assert str(out) in capsys.readouterr().out


def test_a_picture_that_there_is_not_is_named(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'mamba'"):
        script("architectures")(["--only", "mmaba", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# --- that they tell the truth -----------------------------------------------------------------------------------------


TINY = {
    "gpt2": gpt.gpt(3, 10, 2, vocab_size=31, max_length=17),
    "llama3_8b": llama.llama(3, 12, 3, 1, 22, 31, 17, rope_theta=1e4, norm_eps=1e-5),
    "bert_base": bert.bert(3, 10, 2, vocab_size=31, max_length=17),
    "albert_base": bert.albert(3, 10, 2, vocab_size=31, embedding_size=7),
    "t5_small": t5.t5(3, 10, 2, 3, 22, vocab_size=31),
    "transformer_base": vanilla.vanilla(3, 10, 2, vocab_size=31, max_length=17),
    "mamba_130m": mamba.mamba(3, 10, 31, 17),
    "lstm": rnn.lstm(3, 10, 31, 17),
}


@pytest.mark.parametrize("name", TINY)
def test_a_flow_reads_every_parameter_of_the_tree_in_its_shape(name):
    config = TINY[name]
    ids = {"tokens": jax.ShapeDtypeStruct((1, 5), np.int32)}
    tree = jax.eval_shape(build(config).init, jax.random.key(0), **ids)["params"]
    wanted = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        wanted[path] = leaf.shape[1:] if "layers/" in path else leaf.shape
    whole = flow.of_model(config, name)
    found = {path: shape for node in whole.nodes for path, shape in node.parameters}
    for inner in whole.layers:
        run = inner.name.removeprefix("one of ")
        found |= {f"{run}/{path}": shape for node in inner.nodes for path, shape in node.parameters}
    assert found == wanted


def path_of(one: flow.Flow) -> list[str]:
    """Titles from the input to the output along the longest way."""
    rows = layout.rows_of(one)
    at = max(range(len(rows)), key=rows.__getitem__)
    titles = [one.nodes[at].path]
    while above := [a for a, b in one.edges if b == at and rows[a] == rows[at] - 1]:
        at = above[0]
        titles.append(one.nodes[at].path)
    return titles[::-1]


def test_the_place_of_the_norm_moves_it_in_the_flow():
    config = TINY["gpt2"]
    pre, post = (flow.of_model(replace(config, norm_position=where), "x") for where in ("pre", "post"))
    assert path_of(pre.layers[0])[:3] == ["h", "attention_norm", "attention/query"]
    assert path_of(post.layers[0])[:2] == ["h", "attention/query"] and path_of(post.layers[0])[-2:] == ["mlp_norm", "h"]
    assert "final_norm" in path_of(pre) and "final_norm" not in path_of(post)
    for one in (pre.layers[0], post.layers[0]):
        sums = [number for number, node in enumerate(one.nodes) if node.title == "+"]
        assert [len([1 for _, b in one.edges if b == number]) for number in sums] == [2, 2], (
            "a residual sum has two terms"
        )


def test_what_the_config_says_is_what_the_flow_shows():
    gated, plain = flow.of_model(TINY["llama3_8b"], "x").layers[0], flow.of_model(TINY["gpt2"], "x").layers[0]
    titles = {node.title: node for node in gated.nodes}
    assert titles["gated"].note == "swiglu" and {"gate", "rotate"} <= set(titles)
    assert dict(titles["key"].parameters) == {"attention/key/kernel": (12, 4)}
    assert not {"gate", "rotate"} & {node.title for node in plain.nodes}
    windowed = flow.of_model(gpt.gpt3(2, 10, 2, 5), "x").layers[0]
    assert {"number of the layer", "width"} <= {node.title for node in windowed.nodes}


def test_a_decoder_layer_is_an_encoder_layer_with_attention_to_the_source():
    whole = flow.of_model(TINY["transformer_base"], "x")
    encoder, decoder = ({node.path for node in one.nodes} for one in whole.layers)
    extra = {path for path in decoder if "cross_attention" in path} | {"encoder/layers"}
    assert decoder - extra == encoder and len(extra) == 7


def test_shared_weights_are_told():
    notes = {
        name: {node.note for node in flow.of_model(TINY[name], name).nodes} for name in ("bert_base", "albert_base")
    }
    assert "3 layers" in notes["bert_base"] and "3 layers, one set of weights" in notes["albert_base"]


def test_boxes_of_a_plan_do_not_overlap_and_edges_go_down():
    whole = flow.of_model(TINY["t5_small"], "x")
    for one in (whole, *whole.layers):
        made = layout.plan(one, [(0.5 + 0.1 * (number % 3), 0.4) for number in range(len(one.nodes))])
        for number, box in enumerate(made.boxes):
            for other in made.boxes[:number]:
                apart = abs(box.x - other.x) - (box.width + other.width) / 2, abs(box.y - other.y) - 0.4
                assert max(apart) > 0.1
        assert all(route[0][1] < route[-1][1] for route in made.routes)


def test_the_shares_of_kneser_ney_add_up_to_its_probabilities():
    stream = np.random.default_rng(7).integers(0, 5, 400)
    config = ngram.NGramConfig(vocab_size=7, end_of_text=6, order=3)
    tree = ngram.count([stream], config)
    parts = curves.contributions(config, tree, stream[:2])
    np.testing.assert_allclose(parts.sum(0), ngram.distribution(config, tree, stream[None, :2])[0], rtol=1e-12)


def test_the_masks_are_those_of_the_layers():
    rows = {one.title: one.rows for one in masks.alternating(window=2).grids}
    assert rows["layer 0"][5].startswith("xxxxxx.") and rows["layer 1"][5].startswith("....xx.")
    assert rows["layer 2"] == rows["layer 0"] and rows["layer 3"] == rows["layer 1"]


def test_the_texts_hide_and_move_words_and_lose_none():
    for made in (texts.roberta(), texts.bert(), texts.albert()):
        rows = dict(made.rows)
        whole = rows.get("the text") or rows["the pair"]
        for name, row in made.rows:
            if name.startswith(("epoch", "it reads")):
                same = [a == b for (a, _), (b, _) in zip(row, whole, strict=True)]
                assert all(same[place] == (look not in ("mask", "random")) for place, (_, look) in enumerate(row))
    rows = dict(texts.bart().rows)
    assert [word for word, _ in rows["decoder says"]][:-1] == [word for word, _ in rows["the text"]]
    assert [word for word, _ in rows["decoder reads"]][1:] == [word for word, _ in rows["decoder says"]][:-1]
