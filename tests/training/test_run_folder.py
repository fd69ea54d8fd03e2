"""The run folder: one writer, one configuration, metrics without the rows of a dead run."""

import json
import os
import subprocess
import sys

import pytest

from xylem.errors import BusyError, CheckpointError, ConfigError
from xylem.files import write_whole
from xylem.training.run_folder import drop_after, open_run

CONFIG = {"steps": 20, "seed": 3, "model": {"d_model": 24, "init": {"kernel": 0.02}}, "splits": ("a", "b")}


def test_run_folder_keeps_config_versions_and_every_start(tmp_path):
    for argv in (["pretrain.py", "--steps", "20"], ["pretrain.py"]):
        with open_run(tmp_path / "run", CONFIG, argv) as run:
            pass
    assert json.loads((run / "config.json").read_text()) == {**CONFIG, "splits": ["a", "b"]}
    versions = json.loads((run / "versions.json").read_text())
    assert versions["python"].startswith("3.") and {"jax", "flax", "numpy"} <= set(versions["packages"])
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [start["argv"] for start in starts] == [["pretrain.py", "--steps", "20"], ["pretrain.py"]]
    assert starts[0]["pid"] == os.getpid()
    assert {path.name for path in run.iterdir()} == {"config.json", "versions.json", "starts.jsonl", "lock"}


HOLD = """
import sys
from xylem.training.run_folder import open_run
assert "jax" not in sys.modules
with open_run(sys.argv[1], {"seed": 3}, sys.argv):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_run_folder_in_use_is_refused_naming_the_holder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError) as error, open_run(tmp_path, {"seed": 4}, []):
            pass
        assert f"process {holder.pid} on {os.uname().nodename} since 2" in str(error.value)
        assert error.value.code == 75
        assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 3}
        holder.kill()  # a killed process leaves nothing to clear away
        holder.wait()
    with open_run(tmp_path, {"seed": 3}, []):
        pass


def test_run_folder_of_another_host_neither_locks_nor_writes(tmp_path):
    with open_run(tmp_path / "run", CONFIG, []), open_run(tmp_path / "run", {}, [], writer=False) as run:
        assert json.loads((run / "config.json").read_text())["seed"] == 3
    with open_run(tmp_path / "absent", CONFIG, [], writer=False) as run:
        assert not run.exists()


def test_run_folder_other_settings_are_refused_field_by_field(tmp_path):
    with open_run(tmp_path, CONFIG, []):
        pass
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"}
    other = {**CONFIG, "model": {"d_model": 32, "init": {"kernel": 0.02}}, "dropout": 0.1}
    with pytest.raises(ConfigError) as error, open_run(tmp_path, other, []):
        pass
    assert error.value.code == 2
    assert "dropout: there '(absent)', now 0.1" in str(error.value)
    assert "model.d_model: there 24, now 32" in str(error.value)
    assert "kernel" not in str(error.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "lock"}


def test_run_folder_changeable_fields_may_change_and_are_recorded(tmp_path):
    with open_run(tmp_path, CONFIG, []):
        pass
    longer = {**CONFIG, "steps": 40, "model": {**CONFIG["model"], "init": {"kernel": 0.03}}}
    with open_run(tmp_path, longer, [], changeable=("steps", "model.init.*")):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 40
    last = json.loads((tmp_path / "starts.jsonl").read_text().splitlines()[-1])
    assert last["changed"] == {"model.init.kernel": [0.02, 0.03], "steps": [20, 40]}


def test_run_folder_too_little_disk_is_told_at_the_start(tmp_path):
    with pytest.raises(CheckpointError) as error, open_run(tmp_path, CONFIG, [], needed_bytes=10**18):
        pass
    assert "needs about 1000000000.00 GB of disk" in str(error.value) and error.value.code == 4
    assert not (tmp_path / "config.json").exists()
    with open_run(tmp_path, CONFIG, [], needed_bytes=1000):
        pass


def test_run_folder_that_cannot_be_one_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"run-dir: .*a folder is needed"), open_run(path, CONFIG, []):
            pass
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is not readable"), open_run(tmp_path, CONFIG, []):
        pass


def test_run_folder_write_whole_leaves_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_run_folder_metrics_of_a_dead_run_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert drop_after(path, 5) == 0
    rows = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6, 8))
    path.write_text(rows + '{"step": 10, "lo')
    assert drop_after(path, 6) == 2
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 6]
    assert drop_after(path, 6) == 0
    path.write_text(rows + rows + "[]\n\nnull\n")
    drop_after(path, 100)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 6, 8]
