"""A fork adds a loss, a damage, a task, a demonstration, a way, an extra: no file is touched.

The first five are the block of README, which is run here as it stands there.
"""
import json
import re
from pathlib import Path

import pytest

import data
import quant
import sdft
import train
from data import Example, Task, contains

ROOT = Path(train.__file__).parent
BLOCK = re.search(r"## Fork it.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
PIECES = re.split(r"\n(?=def )", BLOCK.strip())
SHORT = ["--steps", "2", "--batch-size", "4", "--eval-limit", "4", "--eval-tokens", "4",
         "--rollout-tokens", "4", "--teacher-check", "2", "--cka-samples", "4", "--group-size",
         "16", "--dtype", "float32"]


@pytest.fixture
def forked():
    """README's block, run; conftest takes its entries out again."""
    names = {"sdft": sdft, "data": data, "quant": quant, "train": train, "Example": Example,
             "Task": Task, "contains": contains}
    exec(BLOCK, names)
    return names


def run(folder, out, *options):
    argv = ["--model", str(folder), "--out", str(out), *SHORT, *options]
    code = train.main(argv)
    return code, json.loads((out / "results.json").read_text()) if code == 0 else None


def test_each_is_at_most_ten_lines():
    assert len(PIECES) == 5
    for piece in PIECES:
        assert len(piece.strip().splitlines()) <= 10, piece


def test_readmes_fork_goes_through_a_whole_run(forked, folder, tmp_path):
    code, results = run(folder, tmp_path, "--loss", "variation", "--degrade", "shrink10,int4",
                        "--data", "capitals,text", "--demo", "hint", "--recover", "sdft,twice")
    assert code == 0
    assert results["environment"]["damage"]["percent_smaller"] == 10
    assert {"capitals_held_out", "perplexity"} <= results["stages"]["recovered_twice"].keys()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["stage"] for line in lines]
    assert steps.count("recovered_sdft") == 2 and steps.count("recovered_twice") == 4


def test_an_extra_is_a_file_with_attach(folder, tmp_path, monkeypatch, capsys):
    """--with finds it beside train.py; its options stand in results.json as all others do."""
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "extras").mkdir()
    (tmp_path / "extras" / "louder.py").write_text(
        'OPTIONS = {"loud": (2, "times that each step is told")}\n'
        "def attach(parts):\n"
        '    log = parts["log"]\n'
        '    def louder(c, line):\n'
        "        for _ in range(c.loud):\n"
        "            log(c, line)\n"
        '    parts["log"] = louder\n')
    extras = pytest.importorskip("extras")
    monkeypatch.setattr(extras, "__path__", [str(tmp_path / "extras")])
    code, results = run(folder, tmp_path / "out", "--with", "louder", "--loud", "3")
    assert code == 0 and results["config"]["loud"] == 3
    code, results = run(folder, tmp_path / "out", "--loud", "3")
    assert code == 2 and "--loud" in capsys.readouterr().err


def test_a_missing_extra_is_one_line(folder, tmp_path, capsys):
    assert run(folder, tmp_path, "--with", "nothing")[0] == 2
    assert "extras/nothing.py" in capsys.readouterr().err
