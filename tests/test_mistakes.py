"""Mistakes that people make end in one line and exit code 2, before anything is written.

A training that goes wrong ends with exit code 1, and the last good weights are kept.
"""
import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import launch, make_folder
from safetensors.torch import load_file, save_file

import data
import model
import train

TINY = ["--steps", "2", "--batch-size", "2", "--eval-limit", "4", "--eval-tokens", "4",
        "--rollout-tokens", "4", "--teacher-check", "2", "--cka-samples", "4", "--group-size",
        "16", "--dtype", "float32"]
ROW = {"prompt": "What is it?", "response": "It."}


def changed(folder, to, name="config.json", **entries):
    """A copy of a model's folder with other entries in one JSON file."""
    shutil.copytree(folder, to)
    hf = json.loads((to / name).read_text()) | entries
    (to / name).write_text(json.dumps(hf))
    return to


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                            for row in rows))
    return path


def pickled(folder, to):
    shutil.copytree(folder, to)
    torch.save({}, to / "pytorch_model.bin")
    (to / "model.safetensors").unlink()
    return to


def without_weights(folder, to):
    shutil.copytree(folder, to)
    (to / "model.safetensors").unlink()
    return to


def pointer(folder, to):
    shutil.copytree(folder, to)
    (to / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid 1\n")
    return to


def adapter(folder, to):
    to.mkdir()
    (to / "adapter_config.json").write_text("{}")
    return to


def swapped(folder, to):
    """A tokenizer in which two bytes have changed places."""
    shutil.copytree(folder, to)
    spec = json.loads((to / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["é"], vocab["è"] = vocab["è"], vocab["é"]
    (to / "tokenizer.json").write_text(json.dumps(spec))
    return to


def not_finite(folder, to):
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, to / "model.safetensors")
    return to


MISTAKES = {  # name -> (options, given a model's folder and an empty one; what the line says)
    "no such folder": (lambda f, t: ["--model", t / "nothing"], "nothing"),
    "a folder without weights": (lambda f, t: ["--model", without_weights(f, t / "m")],
                                 "safetensors"),
    "a quantized folder": (lambda f, t: ["--model", changed(
        f, t / "m", quantization_config={"quant_method": "gptq"})], "quantized"),
    "a pickle": (lambda f, t: ["--model", pickled(f, t / "m")], "safetensors"),
    "a git-lfs pointer": (lambda f, t: ["--model", pointer(f, t / "m")], "git lfs pull"),
    "an adapter": (lambda f, t: ["--model", adapter(f, t / "m")], "adapter"),
    "another architecture": (lambda f, t: ["--model", changed(f, t / "m", model_type="bert")],
                             "bert"),
    "weights of nan": (lambda f, t: ["--model", not_finite(f, t / "m")], "not finite"),
    "an unknown damage": (lambda f, t: ["--degrade", "int9"], "int9"),
    "two grids": (lambda f, t: ["--degrade", "int4,nf4"], "nf4"),
    "a group size that does not divide": (lambda f, t: ["--group-size", 7], "7"),
    "a row without a response": (lambda f, t: [
        "--data", lines(t / "q.jsonl", ROW, {"prompt": "What?"})], "q.jsonl:2"),
    "a response that is a number": (lambda f, t: [
        "--data", lines(t / "q.jsonl", {"prompt": "What?", "response": 3})], "q.jsonl:1"),
    "a line that is no JSON": (lambda f, t: ["--data", lines(t / "q.jsonl", ROW, "{")],
                               "q.jsonl:2"),
    "an empty file": (lambda f, t: ["--data", lines(t / "q.jsonl")], "q.jsonl"),
    "a table": (lambda f, t: ["--data", lines(t / "q.csv", "prompt,response", "a,b")], ".jsonl"),
    "a prompt longer than the context": (lambda f, t: ["--data", lines(
        t / "q.jsonl", ROW, {"prompt": "word " * 900, "response": "x"})], "context"),
    "a special token in a response": (lambda f, t: ["--data", lines(
        t / "q.jsonl", ROW, {"prompt": "a", "response": "Paris<|im_end|>"})], "<|im_end|>"),
    "an unknown option": (lambda f, t: ["--step", 3], "--step"),
    "a number that is none": (lambda f, t: ["--steps", "many"], "--steps"),
    "a number out of bounds": (lambda f, t: ["--steps", 0], "--steps"),
    "an unknown way": (lambda f, t: ["--recover", "dpo"], "dpo"),
    "a teacher of another tokenizer": (lambda f, t: ["--teacher", swapped(f, t / "m")],
                                       "tokenizer"),
    "a CUDA device that is not there": (lambda f, t: ["--device", "cuda:7"], "cuda:7"),
    "an extra that is not there": (lambda f, t: ["--with", "quicker"], "extras/quicker.py"),
    "an --out that is a file": (lambda f, t: ["--out", lines(t / "file", "x")], "--out"),
    "a text with questions": (lambda f, t: ["--eval", lines(t / "a.txt", "words " * 99)], "--text"),
    "no such task": (lambda f, t: ["--data", "sience"], "science"),
    "two things at once": (lambda f, t: ["--student", f, "--forget", "tooluse"], "--student"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, folder, tmp_path, capsys):
    options, says = MISTAKES[mistake]
    out = tmp_path / "out"
    argv = ["--model", folder, "--out", out, *TINY, *options(folder, tmp_path)]
    assert train.main([*map(str, argv)]) == 2
    told = capsys.readouterr().err
    assert says in told and told.startswith("error: ") and told.count("\n") == 1, told
    assert not out.exists()


def test_a_step_size_far_too_large_keeps_the_last_good_weights(folder, tmp_path, capsys):
    """Exit code 1; the student that is saved is the one before the first step."""
    for name, lr, steps in (("wild", "1e9", "9"), ("none", "1e-12", "1")):
        argv = ["--model", str(folder), "--out", str(tmp_path / name), *TINY]
        code = train.main([*argv, "--lr", lr, "--steps", steps])
        assert code == (1 if name == "wild" else 0)
    assert "went back to step 0" in capsys.readouterr().err
    wild, none = (load_file(tmp_path / name / "student" / "model.safetensors")
                  for name in ("wild", "none"))
    for key in wild:
        torch.testing.assert_close(wild[key], none[key], rtol=0, atol=1e-6)


def test_a_forgetting_that_breaks_ends_in_one_line(folder, tmp_path, capsys):
    argv = ["--model", str(folder), "--out", str(tmp_path), *TINY, "--forget", "tooluse"]
    assert train.main([*argv, "--expert-steps", "1", "--forget-lr", "1e30"]) == 1
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("full", ["results.json", "student"])
def test_a_disk_that_fills_costs_what_does_not_fit(full, folder, tmp_path, monkeypatch, capsys):
    """Exit code 2 in one line; all else is there, and nothing is there by half."""
    def no_room(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    if full == "student":
        monkeypatch.setattr(model.GPT, "save_pretrained", no_room)
    else:
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: no_room() if "results" in str(b)
                            else replace(a, b))
    assert train.main(["--model", str(folder), "--out", str(tmp_path), *TINY]) == 2
    told = capsys.readouterr()
    assert full in told.err and "No space left" in told.err and "recovered fraction" in told.out
    there = {path.name for path in tmp_path.iterdir()} - {"report.png"}
    assert there == {"results.json", "metrics.jsonl", "student"} - {full}


def test_ctrl_c_ends_in_one_line_with_exit_code_1(folder, tmp_path):
    log = tmp_path / "log.txt"
    process = launch(["--model", folder, "--out", tmp_path / "out", *TINY, "--steps", "5000"], log)
    lines = tmp_path / "out" / "metrics.jsonl"
    while process.is_alive() and not (lines.exists() and lines.read_text().count("\n") > 1):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 1
    assert log.read_text().strip().splitlines()[-1] == "error: interrupted; no student was written"
    assert not (tmp_path / "out" / "student").exists()


def damaged(folder, to, rng):
    """A copy with one file changed at random places, cut, or replaced by other JSON."""
    shutil.copytree(folder, to)
    path = to / rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json",
                            "model.safetensors"])
    raw = bytearray(path.read_bytes())
    how = rng.randrange(4)
    if how == 0:
        raw = raw[:rng.randrange(len(raw))]
    elif how == 1:
        for _ in range(rng.randint(1, 9)):
            raw[rng.randrange(min(len(raw), 4000))] = rng.randrange(256)
    elif how == 2 and path.suffix == ".json":
        spec = json.loads(raw)
        spec[rng.choice(list(spec))] = rng.choice([None, -1, "x", [], {}, 1e99, True])
        raw = json.dumps(spec).encode()
    else:
        raw = rng.choice([b"", b"[]", b"null", b"{}", b'{"a": 1}', b"\xff\xfe\x00", b"3"])
    path.write_bytes(bytes(raw))
    return f"{path.name}, way {how}"


def test_a_hundred_damaged_folders_are_read_or_refused_in_one_line(tmp_path):
    """Whatever is wrong with a file: a line that main catches, or a model."""
    folder, rng = make_folder(tmp_path / "good"), random.Random(0)
    for n in range(100):
        what = damaged(folder, tmp_path / f"{n}", rng)
        try:
            data.load_tokenizer(tmp_path / f"{n}").encode_text("A word, 1.")
            model.GPT.from_pretrained(model.resolve(tmp_path / f"{n}"))
        except (ValueError, OSError) as error:
            assert str(error).count("\n") == 0 and len(str(error)) < 600, (n, what)
        except Exception as error:
            raise AssertionError(f"{n}: {what}: {error!r}") from error


@pytest.mark.parametrize("content", [b"", b"\x00", b"\xff\xfe", b"[1, 2]", b"{}", b"null\n",
                                     b'{"prompt": 1, "response": "a"}', b'{"prompt": "a"}\n{',
                                     b'{"messages": [{"role": "user"}]}', b'{"messages": 3}',
                                     b'{"prompt": "\\ud83d", "response": "a"}',
                                     b'{"prompt": "a", "choices": ["b"], "answer": 7}'])
def test_a_damaged_file_of_rows_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError)) as error:
        data.load_task(str(path))
    assert "rows.jsonl" in str(error.value) and "\n" not in str(error.value)
