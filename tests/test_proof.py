"""What is said of a run before it, and found of it afterwards."""
import json
import re

import pytest
from conftest import GPT2, make_folder
from safetensors.torch import load_file, save_file

import train

QUICK = ("--steps 9 --batch-size 4 --rollout-tokens 5 --eval-tokens 4 --eval-limit 70 "
         "--cka-samples 4 --group-size 16 --teacher-check 2 --calibration 4 --lr 1e-3").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "out"
    options = "--recover", "sdft,sft", "--degrade", "wanda,int4", "--model", str(folder)
    assert train.main([*QUICK, *options, "--out", str(out)]) == 0
    return out


def test_results_say_what_made_them(done):
    e = json.loads((done / "results.json").read_text())["environment"]
    assert re.fullmatch(r"([0-9a-f]{40}( and changes)?)?", e["revision"]) and e["command"]
    assert re.fullmatch(r"[0-9a-f]{12}", e["model_sha256"])


def test_a_finished_run_verifies(done, capsys):
    assert train.main(["--verify", str(done)]) == 0
    said = capsys.readouterr().out
    assert said.endswith("all agree\n") and " then, " not in said
    for line in ("healthy: perplexity", "recovered_sdft: science_phrasing", "recovered_sft: CKA, ",
                 "model_sha256"):
        assert line in said


def test_a_run_of_another_machines_gpu_verifies_here(done, capsys):
    """The tests see none; its weights are the same."""
    path = done / "results.json"
    text = path.read_text()
    try:
        path.write_text(text.replace('"device": "cpu"', '"device": "cuda:0"'))
        assert path.read_text() != text
        assert train.main(["--verify", str(done), "--device", "cpu"]) == 0
    finally:
        path.write_text(text)
    assert capsys.readouterr().out.endswith("all agree\n")


def test_a_student_that_nothing_was_done_to_verifies(folder, tmp_path, capsys):
    options = "--recover", "none,sft", "--degrade", "none", "--model", str(folder)
    assert train.main([*QUICK, *options, "--out", str(tmp_path / "out")]) == 0
    assert train.main(["--verify", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("all agree\n")


@pytest.mark.parametrize("change, named", [
    ("student", "recovered_sft: perplexity"), ("results", "healthy: perplexity"),
    ("model", "what was read: model_sha256")])
def test_what_does_not_agree_is_named(change, named, done, folder, tmp_path, capsys):
    results = json.loads((done / "results.json").read_text())
    changed = {"student": done / "student_sft", "model": folder}.get(change)
    weights = changed and load_file(changed / "model.safetensors")
    try:
        if changed:
            more = {name: w + 0.05 * (w.dim() == 2) for name, w in weights.items()}
            save_file(more, changed / "model.safetensors")
        else:
            other = json.loads(json.dumps(results))
            other["stages"]["healthy"]["perplexity"] *= 1.001
            (done / "results.json").write_text(json.dumps(other))
        assert train.main(["--verify", str(done)]) == 1
    finally:
        (done / "results.json").write_text(json.dumps(results))
        if changed:
            save_file(weights, changed / "model.safetensors")
    said = capsys.readouterr().out
    assert said.endswith("not all agree\n")
    assert [line for line in said.splitlines() if named in line and " then, " in line]


@pytest.mark.parametrize("content", [None, "[]", "{}", '{"config": {"lr": 1}}',
                                     '{"config": {"from_the_future": 1}}'])
def test_a_folder_of_no_finished_run_is_one_line(content, tmp_path, capsys):
    if content:
        (tmp_path / "results.json").write_text(content)
    assert train.main(["--verify", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(tmp_path) in error


@pytest.mark.parametrize("options", [
    "", "--recover none", "--recover kd,sft --lora 2 --measure-every 3 --interpolate 0.5",
    "--forget tooluse --expert-steps 3"])
def test_a_dry_run_says_what_to_expect_and_writes_nothing(options, folder, tmp_path, capsys):
    command = [*QUICK, *options.split(), "--model", str(folder), "--out", str(tmp_path / "out")]
    assert train.main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    questions = 210 if "--forget" in options else 140  # of three splits or two
    assert f"{questions} questions, 16 windows" in said and "nothing was written" in said
    minutes, memory = re.search(r"expect ([\d.]+) minutes .* ([\d.]+) GiB of memory", said).groups()
    assert float(minutes) < 5 and 0.1 < float(memory) < 5
    assert ("recovered" in said) == ("none" not in options)
    assert ("degraded: sft, 20 steps" in said) == ("--forget" in options)


@pytest.mark.parametrize("options, stages", [
    ("--forget tooluse --teacher base,healthy", ["healthy", "degraded", "recovered_base"]),
    ("--degrade none --bootstrap {}", ["healthy", "recovered"]),
    ("--degrade int4", ["recovered"])])
def test_a_dry_run_tries_each_kind_of_training_in_the_order_of_the_run(options, stages, folder,
                                                                       tmp_path, monkeypatch):
    tried, teach = [], train.teach
    monkeypatch.setattr(train, "teach", lambda run, student, lesson: (
        tried.append(lesson.stage), teach(run, student, lesson))[1])
    assert train.main([*QUICK, *options.format(folder).split(), "--model", str(folder),
                       "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert tried == stages


def test_a_dry_run_finds_a_mistake(folder, tmp_path, capsys):
    assert train.main([*QUICK, "--model", str(folder), "--group-size", "7", "--dry-run"]) == 2
    assert "group_size 7" in capsys.readouterr().err


def test_biases_are_no_obstacle(tmp_path, capsys):
    model = make_folder(tmp_path / "gpt2", **GPT2)
    assert train.main([*QUICK, "--model", str(model), "--dry-run"]) == 0
