"""A run's numbers are those of commit a6e4aea with --plain, in float32, on tiny models.

reference/a6e4aea.json holds each run's command line and what that commit computed for it, as
`numbers` collects it. Words in capitals stand for FOLDERS and FILES. "checksums" has the sum of the
weights that make_folder makes for each folder. That commit's train.py also got --plain and
--save-every 0, and each run was made twice with equal numbers.
"""
import hashlib
import json
import math
import pydoc_data.topics
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPT2, QWEN2, QWEN3, SMOLLM3, make_folder

import train
from model import GPT

HERE = Path(__file__).parent / "reference"
FOLDERS = {"GPT2": GPT2, "LLAMA": {}, "QWEN2": QWEN2, "QWEN3": QWEN3, "SMOLLM3": SMOLLM3,
           "LARGER": dict(seed=1, n_layer=3, d_model=48, d_ff=96, n_head=6),
           "OTHER": QWEN2 | dict(seed=2)}
FILES = {"CHOICES": HERE / "choices.jsonl"}
KINDS, LINES = ("linear", "linear_debiased", "rbf"), ("loss", "grad_norm", "lr", "tokens")
KNOWN = json.loads((HERE / "a6e4aea.json").read_text())
TEXT = hashlib.sha256(json.dumps(pydoc_data.topics.topics, sort_keys=True).encode()).hexdigest()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """{word: path of a folder or file}."""
    root = tmp_path_factory.mktemp("folders")
    return FILES | {word: make_folder(root / word, **made) for word, made in FOLDERS.items()}


def numbers(out):
    """What is compared of a run: numbers at the leaves of nested dictionaries and lists."""
    results = json.loads((out / "results.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = {"stages", "recovered_fraction", "teacher", "kl"} - ({"kl"} - results.keys())
    found = {key: results[key] for key in keys}  # the seven do not measure "kl", that on texts
    found["cka"] = {level: {stage: {kind: kinds[kind] for kind in KINDS}
                            for stage, kinds in stages.items()}
                    for level, stages in results["cka"].items()}
    found["guard"] = {stage: {"kept": guard["kept"], "all": [c["all"] for c in guard["checks"]]}
                      for stage, guard in results["guard"].items()}
    found["steps"] = {stage: {key: [line[key] for line in lines if line["stage"] == stage]
                              for key in LINES} for stage in {line["stage"]: 0 for line in lines}}
    return found


def flat(tree, name=""):
    """{"cka tokens degraded rbf 0": number, …} of nested dictionaries and lists."""
    if not isinstance(tree, (dict, list)):
        return {name.strip(): tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, branch in pairs for k, v in flat(branch, f"{name} {key}").items()}


def difference(name, a, b):
    """How far two numbers lie apart: a CKA's absolute difference, otherwise the relative one.

    Below 0.01 a difference is relative to 0.01. None differs infinitely from any number.
    """
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / (1 if name.startswith("cka") else max(abs(b), 0.01))


@pytest.mark.skipif(KNOWN["text_sha256"] != TEXT, reason="the text of another Python")
@pytest.mark.parametrize("name", KNOWN["runs"])
def test_a_runs_numbers_are_those_of_a6e4aea(name, paths, tmp_path, monkeypatch):
    """Every number agrees to 1e-4, see `difference`."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no picture
    words, wanted = KNOWN["runs"][name]["argv"].split(), KNOWN["runs"][name]["numbers"]
    for word in {*words} & FOLDERS.keys():
        gpt = GPT.from_pretrained(paths[word], torch.float32, "cpu")
        weights = sum(p.double().sum().item() for p in gpt.parameters())
        assert weights == pytest.approx(KNOWN["checksums"][word], abs=1e-4)
    assert train.main([*(str(paths.get(w, w)) for w in words), "--out", str(tmp_path)]) == 0
    found = numbers(tmp_path)
    found, wanted = flat(found), flat({key: wanted[key] for key in found})
    assert found.keys() == wanted.keys()
    apart = {key: difference(key, found[key], wanted[key]) for key in wanted}
    worst = max(apart, key=apart.get)
    assert apart[worst] <= 1e-4, f"{sum(d > 1e-4 for d in apart.values())} of {len(apart)} " \
        f"numbers differ, the most {worst}: {found[worst]}, not {wanted[worst]}"
