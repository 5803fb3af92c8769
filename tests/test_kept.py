"""Results that are kept: RESULTS.md and README.md say what their files say, and what they will say
of experiments whose runs are still to come."""
import collections
import dataclasses
import json
import re

import numpy as np
import pytest

import claims
import data
import evaluate
import experiments
import kept
import pictures
import tables
import train
from cka import KINDS

DEFAULTS = dataclasses.asdict(train.Config())
TEXTS = [(claims.ROOT / name).read_text(encoding="utf-8") for name in ("RESULTS.md", "README.md")]
GENERAL = dict.fromkeys(claims.GENERAL, (50.0, 47.0, 49.0))


def made_up(stages, levels=("tokens", "samples", "tooluse samples"), change="better",
            fraction=0.5, **options):
    """A run's results. stages: {stage: {metric: value}}; of every stage CKA is 0.9."""
    config = DEFAULTS | {"degrade": "nf4", "dtype": "bfloat16"} | options
    found = [stage for stage in stages if stage.startswith("recovered")]
    cka = {stage: {kind: [1.0, 0.9] for kind in KINDS} for stage in stages if stage != "healthy"}
    guard = {"watch": "loss", "steps": 25, "kept": 25, "ended": "", "seconds": 1.0,
             "checks": [{"step": 0, "all": 0.5}, {"step": 25, "all": 0.25}]}
    e = {"processor": "CPU", "threads": 2, "revision": "0123456789abcdef", "damage": {},
         "model": "/some/where/model", "lr": 1e-4, "eval_examples": {}}
    return {"config": config, "environment": e, "stages": stages,
            "recovered_fraction": {s: dict.fromkeys(stages["healthy"], fraction) for s in found},
            "change": {stage: dict.fromkeys(stages["healthy"], change) for stage in found},
            "guard": dict.fromkeys(found, guard), "teacher": {}, "step": {"recovered": "words"},
            "cka": {level: cka for level in levels}, "cka_layers": {"recovered": [[1.0]]},
            "seconds": {"healthy": 30.0, "recovered training": 60.0}}


def three(**metrics):
    """healthy, degraded, recovered of each metric, as stages."""
    names = "healthy", "degraded", "recovered"
    return {name: {m: values[i] for m, values in metrics.items()} for i, name in enumerate(names)}


def put(folder, name, results):
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results))


# -------------------------------------------------------------------------------- the two texts

def test_every_table_has_a_place_in_the_texts():
    places = [name for text in TEXTS for _, name, _, _ in claims.PART.findall(text)]
    assert sorted(places) == sorted([*claims.TABLES, "claims"])


def test_the_runs_of_a_row_had_one_text():
    """A mean of perplexities of two texts is the perplexity of none."""
    texts = collections.defaultdict(set)
    for file in kept.RESULTS.glob("*/*-*.json"):
        sha = json.loads(file.read_text())["environment"]["text_sha256"]
        texts[file.parent.name, file.name.split("-")[0]].add(sha)
    assert len(texts) > 100
    assert {row: found for row, found in texts.items() if len(found) > 1} == {}


def test_a_table_without_files_stays_and_an_unknown_one_is_a_mistake(tmp_path):
    text = "<!-- table table2 -->\nby hand\n<!-- end -->\n"
    assert claims.filled(text, tmp_path) == text
    with pytest.raises(ValueError, match="no such table"):
        claims.filled(text.replace("table2", "table9"), tmp_path)


def test_report_of_the_kept_results_writes_and_of_others_prints(tmp_path, monkeypatch, capsys):
    """In a copy: the texts say what the files say, a digit changed by hand is put right in each of
    them, and the pictures are drawn."""
    names = "RESULTS.md", "README.md"
    for name, text in zip(names, TEXTS):
        parts = claims.PART.findall(text)
        assert text.count("<!-- table ") == text.count("<!-- end -->") == len(parts) > 0
        part = next(x[2] for x in parts if x[1] in ("default", "claims"))
        broken = text.replace(part, re.sub(r"\d ±", "x ±", part, count=1))
        assert broken != text
        (tmp_path / name).write_text(broken, encoding="utf-8")
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "FIGURES", tmp_path / "figures")
    assert experiments.main(["report", str(kept.RESULTS)]) == 0
    assert [(tmp_path / name).read_text(encoding="utf-8") for name in names] == TEXTS
    assert {p.name for p in (tmp_path / "figures").iterdir()} >= {"fig6.png", "fig8b.png"}
    capsys.readouterr()
    (tmp_path / "RESULTS.md").unlink()
    put(tmp_path / "other", "0-0", made_up(three(task=(50.0, 20.0, 40.0))))
    monkeypatch.chdir(tmp_path)
    assert experiments.main(["report", str(tmp_path / "other")]) == 0
    assert "| task % |" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- keeping

@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with two finished runs; results/ is elsewhere."""
    monkeypatch.setattr(kept, "RESULTS", tmp_path / "results")
    for seed in range(2):
        results = made_up(three(task=(50.0, 20.0, 40.0)), seed=seed, out="/x/runs/table4/0-0",
                          model="/x/models/Qwen2.5-0.5B", eval="science,/x/blimp.jsonl")
        results["cka"]["tokens"]["recovered"]["linear"] = [None, 0.123456789]
        folder = tmp_path / "table4" / f"0-{seed}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
    return tmp_path / "table4"


def test_what_is_kept_is_small_names_its_commit_and_no_path_and_reads_the_same(runs, tmp_path):
    assert experiments.main(["keep", str(runs), "--name", "table4-qwen"]) == 0
    files = sorted((tmp_path / "results" / "table4-qwen").iterdir())
    assert [file.name for file in files] == ["0-0.json", "0-1.json"]
    text = files[1].read_text()
    results = json.loads(text)
    assert "step" not in results and "cka_layers" not in results and "/x/" not in text
    assert results["environment"]["commit"] == "0123456"
    assert results["environment"]["command"] == (
        "train.py --model Qwen2.5-0.5B --degrade nf4 --eval science,blimp.jsonl")
    assert "[null, 0.12346]" in text
    found = tables.read_runs([tmp_path / "results"])
    assert [r["stages"]["recovered"]["task"] for _, _, r in found] == [40.0, 40.0]


def test_runs_of_changed_code_are_refused_by_name_or_marked(runs, tmp_path, capsys):
    file = runs / "0-1" / "results.json"
    results = json.loads(file.read_text())
    results["environment"]["revision"] += " and changes"
    file.write_text(json.dumps(results))
    assert experiments.main(["keep", str(runs)]) == 2
    error = capsys.readouterr().err
    assert "0-1" in error and "0-0" not in error and not (tmp_path / "results").exists()
    assert experiments.main(["keep", str(runs), "--dirty"]) == 0
    marked = json.loads((tmp_path / "results" / "table4" / "0-1.json").read_text())
    assert marked["environment"]["commit"] == "0123456 and changes"


@pytest.mark.parametrize("argv, says", [
    (["keep"], "DIR"), (["keep", "EMPTY"], "no NUMBER-SEED/results.json"),
    (["keep", "A", "B", "--name", "x"], "--name is of one folder")])
def test_a_mistake_in_keeping_is_one_line(argv, says, tmp_path, capsys):
    argv = [str(tmp_path) if word == "EMPTY" else word for word in argv]
    assert experiments.main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and says in error[0]


def test_the_form_of_the_files_is_the_one_that_is_there():
    for name in ("default/0-1", "huge/0-0"):
        text = (kept.RESULTS / f"{name}.json").read_text()
        assert kept.as_lines(json.loads(text)) + "\n" == text


# ------------------------------------------------------------------------------- rows and verdicts

@pytest.mark.parametrize("values, change, says", [
    ((50.0, 20.0, 40.0), "better", "recovers: 20.0 of 30.0 lost"),
    ((50.0, 20.0, 55.0), "better", "above healthy"),
    ((50.0, 20.0, 24.0), "same", "within noise"),
    ((50.0, 20.0, 10.0), "worse", "worse than before")])
def test_a_verdict_by_its_rule(values, change, says):
    runs = [made_up(three(task=values), change=change) for _ in range(3)]
    assert kept.verdict(runs, "task") == says
    swapped = [made_up(three(perplexity=[100 - v for v in values]), change=change)]
    lower = says.replace(".0", ".00").replace("above", "better than")
    assert kept.verdict(swapped, "perplexity") == lower


def test_most_seeds_decide_a_verdict():
    runs = [made_up(three(task=(50.0, 20.0, 40.0)), change=c) for c in ("better", "same", "same")]
    assert kept.verdict(runs, "task") == "within noise"
    runs[1]["change"]["recovered"]["task"] = "worse"
    assert kept.verdict(runs, "task") == kept.verdict(runs[1:], "task") == "seeds disagree"
    runs = [made_up(three(task=(0.0, 0.0, 40.0)), fraction=f) for f in (None, None, 0.5)]
    assert kept.verdict(runs, "task") == "better, though it was not damaged"
    assert kept.verdict(runs[1:], "task") == "above healthy"


def test_provenance_names_command_commit_machine_seeds_and_minutes():
    runs = [made_up(three(task=(50.0, 20.0, 40.0)), seed=seed) for seed in (0, 2)]
    runs[1]["seconds"]["healthy"] = 60.0
    assert kept.provenance([runs]) == (
        "/some/where/model on CPU, 2 cores, bfloat16: `python train.py --degrade nf4`; commit "
        "0123456; seeds 0, 2; 1.5 to 2.0 minutes a run.")


# ---------------------------------------------------------------------------- what is still to come

def test_tables_2_and_3_stand_beside_the_papers_numbers(tmp_path):
    metrics = three(science_phrasing=(28.0, 5.0, 40.0), perplexity=(15.0, 20.0, 17.0), **GENERAL)
    items = {stage: {m: "1" * round(v[m]) + "0" * (100 - round(v[m])) for m in GENERAL}
             for stage, v in metrics.items()}
    for seed in range(3):
        put(tmp_path, f"table2-qwen/0-{seed}", made_up(metrics, seed=seed) | {"items": items})
    table = claims.TABLES["table2"](tmp_path)
    paper = "3B 31.8 → 30.4 → 45.4; 7B 33.9 → 33.0 → 52.3"
    assert ("| Qwen, science | science_phrasing % | 28.0 | 5.0 | 40.0 | | 3 | above healthy | "
            f"{paper} |") in table
    assert ("| Qwen, science | perplexity | 15.00 | 20.00 | 17.00 | | 3 | recovers: 3.00 of 5.00 "
            "lost | |" in table)
    assert ("| Qwen, science | general_mean % | 50.0 | 47.0 | 49.0 | | 3 | recovers: 2.0 of 3.0 "
            "lost | 3B 67.1 → 66.0 → 66.3; 7B 71.1 → 70.1 → 70.9 |" in table)
    assert "SmolLM2" not in table
    row = "| NF4, science (Table 2) | old | old | old |\n"
    assert f"| NF4, science (Table 2) | {paper} | Qwen 28.0 → 5.0 → 40.0 | above healthy |" in (
        claims.claims(tmp_path, row))
    assert row in claims.claims(tmp_path / "none", row)
    put(tmp_path, "control-qwen/0-0", made_up(three(science_phrasing=(28.0, 28.0, 44.0)),
                                              degrade="none"))
    table = claims.TABLES["table2"](tmp_path)
    assert "| 40.0 | 44.0 (n = 1) | 3 |" in table and "| 17.00 | | 3 |" in table
    assert "--degrade none`" in table
    assert "Qwen 28.0 → 5.0 → 40.0 (undamaged: 44.0, n = 1) |" in claims.claims(tmp_path, "")


@pytest.mark.parametrize("now, word", [
    ((60, 50, 50), "better"), ((51, 50, 50), "same"), ((60, 44, 46), "same"),
    ((55, 40, 45), "worse")])
def test_the_general_mean_is_better_by_its_items_not_by_a_count_of_tests(now, word):
    """One test better and two worse may be no better on the whole."""
    items = {stage: dict(zip(GENERAL, ("1" * n + "0" * (100 - n) for n in right)))
             for stage, right in (("degraded", (50, 50, 50)), ("recovered", now))}
    assert claims.change_of_mean(items, "recovered") == word


@pytest.mark.parametrize("direct, staged, word", [
    ((40, 42), (60, 62), "better than"), ((60, 62), (40, 42), "worse than"),
    ((50, 50), (53, 53), "within noise of"), ((40, 60), (80, 60), "within noise of")])
def test_two_stages_are_better_by_items_and_by_seeds(direct, staged, word, tmp_path):
    """Three points of a hundred questions are noise; so are twenty if seeds differ by more."""
    for n, both in enumerate((direct, staged)):
        for seed, right in enumerate(both):
            results = made_up(three(science_phrasing=(30.0, 30.0, float(right))), seed=seed)
            answers = "1" * right + "0" * (100 - right)
            results["items"] = {"recovered": {"science_phrasing": answers}}
            put(tmp_path, f"table5/{n}-{seed}", results)
    assert f"| {word} direct | 63.1 |" in claims.TABLES["table5"](tmp_path)
    assert claims.small_claim(tmp_path, "tooluse") == ()
    assert claims.small_claim(tmp_path, "science")[1] == f"SmolLM2: two stages are {word} one"


def test_a_mean_that_fell_is_no_recovery_whatever_most_seeds_say():
    """Two seeds are better by a little, one is worse by a lot."""
    runs = [made_up(three(task=(50.0, 38.0, now)), change=word)
            for now, word in ((40.0, "better"), (40.0, "better"), (8.0, "worse"))]
    assert kept.verdict(runs, "task") == "within noise"
    assert kept.verdict(runs[:2], "task") == "recovers: 2.0 of 12.0 lost"


@pytest.mark.parametrize("now, word", [(60, "above healthy"), (52, "recovers: all of 30.0 lost")])
def test_above_healthy_is_what_noise_does_not_explain(now, word):
    """Two points more, of a hundred questions, are all of what was lost and no more."""
    results = made_up(three(task=(50.0, 20.0, float(now))))
    assert kept.verdict([results], "task") == "above healthy"  # no questions are known
    right = {"healthy": 50, "recovered": now}
    results["items"] = {stage: {"task": "1" * n + "0" * (100 - n)} for stage, n in right.items()}
    assert kept.verdict([results], "task") == word


def test_table_1_has_every_stage_of_both_runs(tmp_path):
    values = {"tooluse_request": 60.0, "science_phrasing": 40.0, "science_element": 20.0,
              "perplexity": 15.0}
    stages = {stage: dict(values) for stage in (
        "base", "healthy", "degraded", "recovered_base", "recovered_healthy")}
    stages["degraded"]["science_phrasing"] = 10.0
    stages["recovered_healthy"]["science_phrasing"] = 25.0
    bare = {stage: values for stage in ("base", "healthy", "degraded", "recovered")}
    put(tmp_path, "table1/0-0", made_up(stages, forget="tooluse", degrade="none"))
    put(tmp_path, "table1/1-0", made_up(bare, forget="tooluse", degrade="none", demo="none"))
    table = claims.TABLES["table1"](tmp_path)
    assert table.count("| SmolLM2, ") == 8 and "65.0, 37.9, .977, .939" in table
    assert ("| SmolLM2, + recovery, t = expert | 60.0 | 25.0 | 20.0 | 15.00 | 0.900 | 0.900 | "
            "0.900 | 1 | recovers: 15.0 of 30.0 lost | within noise | 57.7") in table
    assert "--forget tooluse" in table and "with `--demo none`" in table.replace("\n", " ")
    found = claims.claims(tmp_path, "")
    assert "| SmolLM2 40.0 → 10.0 → 25.0 (n = 1) | recovers: 15.0 of 30.0 lost |" in found


def test_tables_4_5_and_6_and_the_settings_are_made_of_their_files(tmp_path):
    metrics = three(science_phrasing=(38.0, 20.0, 30.0), science_element=(9.0, 5.0, 8.0),
                    perplexity=(15.0, 20.0, 17.0))
    put(tmp_path, "table4/1-0", made_up(metrics, degrade="ffn10", data="tooluse,text"))
    more = three(tooluse_request=(0.0, 0.0, 0.0),
                 **dict.fromkeys(claims.GENERAL, (60.0, 50.0, 54.0)))
    taught = made_up({stage: metrics[stage] | more[stage] for stage in metrics}, degrade="ffn10")
    taught["items"] = {stage: dict.fromkeys(claims.GENERAL, "0110") for stage in metrics}
    put(tmp_path, "table4/0-0", taught)
    table = claims.TABLES["table4"](tmp_path)
    for row, theirs in (("tooluse | science_phrasing", "38.8 → 33.7 → 35.8"),
                        ("science | science_phrasing", "38.8 → 33.7 → 43.4"),
                        ("science | tooluse_request", "29.9 → 28.5 → 33.0"),
                        ("science | general_mean", "66.2 → 59.1 → 57.7")):
        line = next(line for line in table.splitlines() if f"SmolLM2, {row}" in line)
        assert line.endswith(f"| 7B {theirs} |")
    small = made_up(metrics, degrade="none")
    small["items"] = {"recovered": {"science_phrasing": "10"}}
    for n in range(2):
        put(tmp_path, f"table5-qwen/{n}-0", small)
    table = claims.TABLES["table5"](tmp_path)
    assert table.count("| Qwen, ") == 4
    assert "| Qwen, science: direct | 30.0 | 8.0 | | 17.00 | 1 | | 54.2 |" in table
    ways = metrics | {f"recovered_{way}": metrics["recovered"] for way, _ in claims.WAYS}
    del ways["recovered"]
    put(tmp_path, "baselines/0-0", made_up(ways, degrade="int4", recover="sdft,kd,sft"))
    assert ("| SmolLM2, `int4` | science_phrasing % | 38.0 | 20.0 | "
            + "30.0 (10.0 of 18.0 lost) | " * 3 + "1 |") in claims.TABLES["baselines"](tmp_path)
    put(tmp_path, "settings/0-0", made_up(metrics, degrade="int4", loss="jsd"))
    assert "| SmolLM2, `--loss jsd` | 30.0 | 8.0 | 0.60 |" in claims.TABLES["settings"](tmp_path)


def test_a_sweep_gives_its_damages_and_their_correlations(tmp_path):
    for n in range(6):
        metrics = three(science_phrasing=(50.0, 10.0 + n, 10.0 + n),
                        perplexity=(10, 20 - n, 20 - n))
        results = made_up(metrics, degrade=f"int{2 + n}", recover="none")
        for level in results["cka"].values():
            level["degraded"] = {kind: [1.0, 0.5 + n / 20] for kind in KINDS}
        put(tmp_path, f"sweep-qwen/{n}-0", results)
    assert "| `int3` | 11.0 | 19.00 | 0.550 | 0.550 | 1 |" in claims.TABLES["sweep-qwen"](tmp_path)
    correlations = claims.TABLES["correlations-qwen"](tmp_path)
    wanted = "| degraded | samples | linear | last | science_phrasing | 6 | 1.00 [1.00, 1.00] |"
    assert wanted in correlations
    assert "Qwen: Spearman 1.00 with perplexity, 1.00 with accuracy" in claims.claims(tmp_path, "")
    assert claims.TABLES["sweep"](tmp_path) == claims.TABLES["correlations"](tmp_path) == ""


def test_runs_of_before_do_not_hide_those_measured_on_their_way(tmp_path):
    """A kept run without unit norm and way stands beside six that have them."""
    before = made_up(three(science_phrasing=(50.0, 20.0, 40.0)), degrade="nf4")
    for kinds in [kinds for level in before["cka"].values() for kinds in level.values()]:
        kinds.pop("unit_debiased", None)
    put(tmp_path, "default/0-0", before)
    assert claims.TABLES["within"](tmp_path) == claims.TABLES["follows"](tmp_path) == ""
    for n in range(6):
        results = made_up(three(science_phrasing=(50.0, 20.0, 40.0),
                                perplexity=(10.0, 20.0, 12.0)), degrade=f"int{2 + n}")
        kinds = {kind: [0.9, 0.9] for kind in KINDS}
        for level in results["cka"].values():
            level["degraded"] = level["recovered"] = kinds
        along = [{"step": k, "part": None, "seconds": 1.0, "values": {
                      "science_phrasing": 20.0 + k, "perplexity": 20.0 - k},
                  "items": {}, "kl": {}, "cka": {level: {
                      kind: [0.9 + k / 100, 0.9 + k / 100] for kind in kinds}
                      for level in results["cka"]}} for k in range(1, 9)]
        put(tmp_path, f"along/{n}-0", results | {"along": {"recovered": along}})
    within, follows = (claims.TABLES[name](tmp_path) for name in ("within", "follows"))
    told = "last | science_phrasing | 6 | 1.00"
    assert f"| samples | unit, debiased | {told} [1.00, 1.00] |" in within
    assert f"| recoveries | samples | {told} | 1.00 | 0.00 [0.00, 0.00] |" in follows
    assert ("| yes | SmolLM2 1.00 [1.00, 1.00], 1.00 [1.00, 1.00] (n = 6) | SmolLM2: yes, yes |"
            in claims.claims(tmp_path, ""))
    assert "nf4" not in within + follows and "int7" in within  # what they stand on
    assert "| SmolLM2, `int7` | 50.0 → 20.0 → 40.0 | 10.00 → 20.00 → 12.00 | 0.900 → 0.900 | " \
        "0.900 → 0.900 | 1.00 | 1.00 |" in claims.TABLES["along"](tmp_path)
    pyplot = evaluate.find_pyplot()
    figure = pictures.along(pyplot, claims.read_all(tmp_path, "along"))
    above, below = figure.axes[0], figure.axes[6]  # of the first of six columns
    assert above.lines[0].get_xydata()[1:].tolist() == [[k, 20 + k] for k in range(1, 9)]
    assert len(below.lines) == 4 and below.lines[0].get_ydata()[-1] == pytest.approx(0.98)
    pyplot.close(figure)


def test_a_recovery_that_was_made_twice_counts_once(tmp_path):
    metrics = three(science_phrasing=(50.0, 20.0, 40.0), perplexity=(10.0, 20.0, 12.0))
    put(tmp_path, "default/0-0", made_up(metrics))
    for seed in range(2):
        put(tmp_path, f"along/0-{seed}", made_up(metrics, eval_limit=150, seed=seed))
    assert claims.rising_claim(tmp_path, False) == ("SmolLM2 0, 0 of 2", "SmolLM2: no, no")
    assert claims.rising_claim(tmp_path, True) == ()
    higher = json.loads(json.dumps(made_up(metrics, forget="tooluse", degrade="none")))
    higher["cka"]["samples"]["recovered"]["linear_debiased"][-1] = 1.0
    put(tmp_path, "table1/0-0", higher)
    assert claims.rising_claim(tmp_path, True) == ("SmolLM2 1, 0 of 1", "SmolLM2: yes, no")


def test_a_difference_has_the_noise_of_examples_and_of_seeds():
    """By hand: seeds 10, 20 and 30 points apart, 20 +- 4.30 x 10 / sqrt(3); examples by numpy's."""
    def runs(right):
        return [{"config": {"seed": seed}, "items": {"recovered": {
            "task": "1" * n + "0" * (10 - n)}}} for seed, n in enumerate(right)]
    one, other = runs([6, 7, 8]), runs([5, 5, 5])
    lead, half = kept.lead_of((one, "recovered"), (other, "recovered"), "task")
    examples = 2 * np.std([0] * 5 + [1, 2 / 3, 1 / 3, 0, 0], ddof=1) / 10 ** 0.5
    assert (lead, half) == pytest.approx((0.2, np.hypot(examples, 4.30 * 0.1 / 3 ** 0.5)))
    lead, half = kept.lead_of((one[:1], "recovered"), (other, "recovered"), "task")
    assert (lead, half) == pytest.approx((0.1, 2 * np.std([1] + [0] * 9, ddof=1) / 10 ** 0.5))
    assert kept.lead_of((one[:1], "recovered"), (other[1:], "recovered"), "task")[1] == np.inf


def test_the_longest_runs_of_each_experiment_on_two_cores(tmp_path):
    """Neither one core's nor a GPU's; the longest first."""
    for name, minutes, threads, processor, memory in (
            ("fp4/1-0", 17, 2, "CPU", 4.25), ("gpu/0-0", 40, 2, "NVIDIA H200", 4.25),
            ("table1/0-0", 18, 2, "CPU", 4.25), ("table1/0-1", 12, 2, "CPU", 6.75),
            ("table1/0-2", 30, 1, "CPU", 8.25), ("table1/1-0", 16, 2, "CPU", 9.25)):
        results = made_up(three(task=(1.0, 0.0, 1.0)))
        results["seconds"] = {"healthy": 60.0, "recovered training": 60.0 * (minutes - 1)}
        results["environment"] |= {"threads": threads, "processor": processor,
                                   "peak_memory_gib": memory}
        put(tmp_path, name, results)
    rows = claims.TABLES["minutes"](tmp_path).splitlines()[2:5]
    assert rows == ["| `table1/0` | 18.0, 12.0 | 6.8 |", "| `fp4/1` | 17.0 | 4.2 |", ""]


def test_each_kind_of_fact_has_its_accuracy(tmp_path):
    """science_phrasing asks symbol, number and name in turn."""
    phrasing = data.TASKS["science"]().eval["phrasing"]
    asked = [example.prompt for example in phrasing[:3]]
    assert "symbol of" in asked[0] and "atomic number" in asked[1] and "has the" in asked[2]
    items = {"healthy": "110111", "degraded": "000000", "recovered": "100100"}
    results = made_up(three(science_phrasing=(80.0, 0.0, 33.0)))
    results["items"] = {stage: {"science_phrasing": text} for stage, text in items.items()}
    put(tmp_path, "table2/0-0", results)
    found = claims.TABLES["kinds"](tmp_path)
    assert "| SmolLM2, healthy | 100.0 | 100.0 | 50.0 | 1 |" in found
    assert "| SmolLM2, NF4 | 0.0 → 100.0 | 0.0 → 0.0 | 0.0 → 0.0 | 1 |" in found
