"""Kept runs: the format of their files, how they are named, how new ones are kept."""
import json

import experiments
import pytest
import tables

import train

FILES = sorted(tables.RESULTS.glob("*/*-*.json"))


def test_every_kept_run_has_what_the_tables_read():
    runs = [run for folder in tables.RESULTS.iterdir() for run in tables.read(folder)]
    assert len(runs) == len(FILES) > 300
    for _, seed, r in runs:
        assert {"stages", "cka", "change", "config", "guard", "seconds"} <= r.keys()
        assert {"model", "processor", "commit", "command"} <= r["environment"].keys()
        assert {"healthy", "degraded"} <= r["stages"].keys() and r["config"]["seed"] == seed
        assert all("linear_debiased" in kinds for stages in r["cka"].values()
                   for kinds in stages.values())


def test_no_kept_file_names_a_path_of_the_machine_it_was_made_on():
    for path in FILES:
        r = json.loads(path.read_text())
        words = [*r["config"].values(), r["environment"]["model"], r["environment"]["command"]]
        assert not any(part.startswith(("/", "~")) for word in words if isinstance(word, str)
                       for part in word.replace(",", " ").split()), path


def test_the_runs_of_a_row_read_one_text():
    """A mean of perplexities of two texts is the perplexity of none."""
    texts = {}
    for path in FILES:
        row = path.parent.name, path.stem.split("-")[0]
        sha = json.loads(path.read_text())["environment"]["text_sha256"]
        assert texts.setdefault(row, sha) == sha, path


@pytest.mark.parametrize("config, words", [
    ({"degrade": "nf4", "group_size": 64}, "--degrade nf4"),
    ({"degrade": "int4", "group_size": 32, "symmetric": False},
     "--degrade int4 --group-size 32 --no-symmetric"),
    ({"shard": True, "lr_fraction": 5.2e-4}, "--shard"),
    ({"seed": 3, "out": "elsewhere", "device": "cuda", "dtype": "float32"}, "")])
def test_a_run_is_named_by_how_it_differs_from_the_defaults(config, words):
    assert tables.options_of({"config": config}) == words


def test_todays_defaults_name_nothing_and_a_new_option_is_told():
    assert tables.options_of({"config": tables.DEFAULTS}) == ""
    today = {name: v for name, v in vars(train.Config()).items() if name in tables.DEFAULTS}
    assert tables.options_of({"config": today | {"bits": 3}}) == "--bits 3"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """runs/mine with a run of two seeds, as train.py leaves them; what is kept goes elsewhere."""
    results = json.loads((tables.RESULTS / "default" / "0-0.json").read_text())
    results |= {"step": {"recovered": {}}, "answers": {"healthy": []}, "cka_layers": {}}
    results["config"] |= {"model": "/some/where/model", "eval": "science,/some/where/my.jsonl"}
    results["environment"] |= {
        "revision": "a" * 40, "model": "/some/where/model", "lr": 1.23456789e-6,
        "command": "train.py --model /some/where/model --eval science,/some/where/my.jsonl"}
    for seed in range(2):
        path = tmp_path / "runs" / "mine" / f"0-{seed}" / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(results, indent=1))
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    return tmp_path / "runs" / "mine"


def test_what_is_kept_is_small_names_no_path_and_reads_the_same(runs, tmp_path, capsys):
    assert experiments.main(["keep", str(runs), "--name", "theirs"]) == 0
    assert "--degrade int4" in capsys.readouterr().out
    assert len([*(tmp_path / "results" / "theirs").iterdir()]) == 2
    after = tmp_path / "results" / "theirs" / "0-1.json"
    assert "/some/where" not in after.read_text()
    kept = json.loads(after.read_text())
    assert not {"step", "answers", "items", "cka_layers"} & kept.keys()
    assert kept["config"]["eval"] == "science,my.jsonl" and kept["environment"]["commit"] == 7 * "a"
    assert kept["environment"]["lr"] == pytest.approx(1.23456789e-6, rel=1e-7)
    metrics = [tables.SCIENCE, "perplexity"]
    assert tables.table_of(runs, metrics).replace("/some/where/", "") == tables.table_of(
        after.parent, metrics)


def test_runs_of_code_that_no_commit_has_are_not_kept(runs, tmp_path, capsys):
    path = runs / "0-1" / "results.json"
    results = json.loads(path.read_text())
    results["environment"]["revision"] += " and changes"
    path.write_text(json.dumps(results))
    assert experiments.main(["keep", str(runs)]) == 2
    assert "0-1: no commit has its code" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
