"""The fair comparison: fronts, retention at equal gain and its interval, on made-up runs whose
answer is known."""
import dataclasses
import json

import numpy as np
import pytest

import evaluate
import fronts
import tables
import train

DEFAULTS = dataclasses.asdict(train.Config())
N = 200


def first(percent):
    """N items, the same share of the even and the odd ones right."""
    right = ["1" if i < percent * N // 200 else "0" for i in range(N // 2)]
    return "".join(a + a for a in right)


def items(task, other, more=80):
    return {"tooluse_request": first(task), "blimp_all": first(other), "arc_easy_all": first(more),
            "perplexity": "2.5 2.6"}


def put(folder, name, end, along=(), seed=0, **options):
    """A run: its end, and the points on its way, as (task, other) in percent; the start has none of
    the task and 80 of the others."""
    config = DEFAULTS | {"data": "tooluse", "degrade": "none", "steps": 40, "seed": seed} | options
    values = {"tooluse_request": 0.0, "blimp_all": 80.0, "perplexity": 12.0}
    points = [{"step": 10 * (i + 1), "part": None, "seconds": 5.0, "values": values, "cka": {},
               "items": items(*point), "kl": {"perplexity": point[0] / 100}}
              for i, point in enumerate(along)]
    if along:  # the student that was left, under the step that was kept
        points.append(points[0] | {"step": 40, "items": items(*end), "seconds": 20.0,
                                   "kl": {"perplexity": end[0] / 100}})
    results = {
        "config": config, "stages": dict.fromkeys(("healthy", "degraded", "recovered"), values),
        "cka": {}, "kl": {"perplexity": {"recovered": end[0] / 100}},
        "items": {"healthy": items(0, 80), "degraded": items(0, 80), "recovered": items(*end)},
        "along": {"recovered": points}, "seconds": {"recovered training": 30.0}}
    (folder / f"{name}-{seed}.json").write_text(json.dumps(results))


@pytest.fixture
def runs(tmp_path):
    """sft loses half a point of one test for each point gained, sdft a quarter; each has a worse
    point below its front; sdft ends at 40, sft at 80."""
    put(tmp_path, "0", (80, 40), [(40, 60), (20, 50)], recover="sft", lr_fraction=1e-3)
    put(tmp_path, "1", (40, 60), [(20, 70)], recover="sft", lr_fraction=5e-4)
    put(tmp_path, "2", (40, 70), [(20, 75), (10, 60)])
    return tables.read_runs([tmp_path])


def test_the_best_runs_are_of_each_method_the_one_that_gained_most_at_its_end(tmp_path):
    for n, (end, options) in enumerate([
            ((40, 60), {"recover": "sft", "lr_fraction": 5e-4}), ((60, 40), {"recover": "sft"}),
            ((30, 70), {}), ((10, 80), {"lr_fraction": 1e-3})]):
        put(tmp_path, str(n), end, [(70, 10)], **options)
        (tmp_path / f"{n}-0").mkdir()
        (tmp_path / f"{n}-0.json").rename(tmp_path / f"{n}-0" / "results.json")
    assert fronts.best_runs(tmp_path) == [1, 2]


def test_points_are_methods_rates_and_checkpoints(runs):
    (scene, points), = fronts.scenes(runs).items()
    assert scene == ("tooluse", "none")
    assert {(p.method, p.rate, p.step) for p in points} == {
        ("--recover sft", 1e-3, 10), ("--recover sft", 1e-3, 20), ("--recover sft", 1e-3, 40),
        ("--recover sft", 5e-4, 10), ("--recover sft", 5e-4, 40),
        ("sdft", 5.2e-4, 10), ("sdft", 5.2e-4, 20), ("sdft", 5.2e-4, 40)}


def test_weights_that_were_put_back_are_no_point(tmp_path):
    """The guard kept step 0: the end is the start again; a kept step that was measured counts
    once."""
    for name, kept in (("0", 0), ("1", 10)):
        put(tmp_path, name, (40, 60), [(20, 70)], recover="sft", lr_fraction=10.0 ** -kept)
        file = tmp_path / f"{name}-0.json"
        results = json.loads(file.read_text())
        results["along"]["recovered"][-1]["step"] = kept
        file.write_text(json.dumps(results))
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    assert sorted((p.rate, p.step, p.seconds) for p in points) == [(1e-10, 10, 5.0), (1, 10, 5.0)]


def test_gain_is_the_tasks_and_retention_the_mean_of_the_others(runs):
    _, points = next(iter(fronts.scenes(runs).items()))
    end = next(p for p in points if p.rate == 1e-3 and p.step == 40)
    for part in (fronts.CHOSEN, fronts.SCORED):
        assert fronts.gain(end, "tooluse", part) == pytest.approx(80)
        assert fronts.retention(end, "tooluse", part) == pytest.approx(-20)  # of -40 and 0


def test_a_front_has_no_point_that_another_beats(runs):
    _, points = next(iter(fronts.scenes(runs).items()))
    found = fronts.fronts_of(points, "tooluse")
    gains = {method: [round(fronts.gain(p, "tooluse", fronts.SCORED)) for p in line]
             for method, line in found.items()}
    assert gains == {"--recover sft": [20, 40, 80], "sdft": [20, 40]}


def test_retention_at_equal_gain_by_hand(runs):
    """At 20 points sft keeps -5, sdft -2.5; at 30, between its points, -7.5 and -3.75; sdft does
    not get to 60. The best gain is 80."""
    _, points = next(iter(fronts.scenes(runs).items()))
    found, once = fronts.fronts_of(points, "tooluse"), fronts.weights_of(points[0], fronts.SCORED)
    others = ["blimp_all", "arc_easy_all"]
    for wanted, sft, sdft in ((10, -2.5, -1.25), (20, -5, -2.5), (30, -7.5, -3.75)):
        for method, kept in (("--recover sft", sft), ("sdft", sdft)):
            value, = fronts.retained_at(found[method], "tooluse", wanted, others, once)
            assert value == pytest.approx(kept)
    for wanted in (10, 30):  # from 0 at the healthy start
        kl = fronts.kl_at(found["sdft"], "tooluse", wanted, "perplexity")
        assert kl == pytest.approx(wanted / 100)
    table = fronts.gains_table(runs)
    assert "8 points of 2 methods" in table and "less that of `--recover sft`" in table
    row = next(line for line in table.splitlines() if line.startswith("| `sdft` | 20.0 (25%) |"))
    assert row.startswith("| `sdft` | 20.0 (25%) | -2.5 | +2.5 [")
    assert row.endswith("| -5.0 | +0.0 | 0.200 | 2 |")
    assert "| `sdft` | 60.0 (75%) | – |  | – | – | – | 2 |" in table


def test_the_interval_holds_the_difference_and_is_paired(runs):
    """The same model against itself differs by nothing in every draw of the items."""
    _, points = next(iter(fronts.scenes(runs).items()))
    found = fronts.fronts_of(points, "tooluse")
    value, low, high = fronts.difference(found["sdft"], found["--recover sft"], "tooluse", 20)
    assert low < 2.5 < high and high - low < 10 and value == pytest.approx(2.5)
    same = fronts.difference(found["sdft"], found["sdft"], "tooluse", 20)
    assert fronts.told(same) == "+0.0 [+0.0, +0.0]"


@pytest.mark.parametrize("kept, word", [(79, "SDFT keeps more"), (60, "not decided"),
                                        (30, "SFT keeps more")])
def test_the_question_is_answered_by_its_rule(kept, word, tmp_path):
    """At 40, half of the best gain, sft keeps 60 of 80; the other test is untouched."""
    put(tmp_path, "0", (80, 40), [(40, 60), (20, 60)], recover="sft")
    put(tmp_path, "1", (40, kept), [(20, kept), (10, kept)])
    ((data, _), points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    apart, found = fronts.answer(points, data)
    assert found == word and apart.startswith(f"{(kept - 60) / 2:+.1f} [")
    assert f"| tooluse | none | {apart} | {word} |" in fronts.answers_table(
        tables.read_runs([tmp_path]))
    put(tmp_path, "1", (30, kept), [(20, kept), (10, kept)])
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    assert fronts.answer(points, data)[1].startswith("not known")


def test_a_rate_is_chosen_on_the_even_items_and_scored_on_the_odd(tmp_path):
    """The higher rate is right on the even ones alone, the lower on the odd ones alone: the higher
    is chosen, and gained nothing."""
    for n, (rate, even) in enumerate(((1e-3, True), (5e-4, False))):
        put(tmp_path, str(n), (50, 80), recover="sft", lr_fraction=rate)
        file = tmp_path / f"{n}-0.json"
        results = json.loads(file.read_text())
        results["items"]["recovered"]["tooluse_request"] = ("10" if even else "01") * (N // 2)
        file.write_text(json.dumps(results))
    table = fronts.tuned_table(tables.read_runs([tmp_path]))
    assert "| tooluse | none | `--recover sft --steps 40` | 1.0e-03 | +0.0 |" in table


def test_seeds_are_averaged_item_by_item(tmp_path):
    put(tmp_path, "0", (40, 80), seed=0)
    put(tmp_path, "0", (80, 60), seed=1)
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    point, = points
    assert point.seeds == 2 and fronts.gain(point, "tooluse", fronts.SCORED) == pytest.approx(60)
    assert sorted(set(point.items["tooluse_request"])) == [0.0, 0.5, 1.0]


def test_interpolated_weights_are_a_method_of_their_own(tmp_path):
    put(tmp_path, "0", (80, 40), [(40, 60)], recover="sft")
    results = json.loads((tmp_path / "0-0.json").read_text())
    between = results["along"]["recovered"][0] | {"step": 40, "part": 0.5}
    results["along"]["recovered"].append(between)
    (tmp_path / "0-0.json").write_text(json.dumps(results))
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    assert {(p.method, p.part) for p in points} == {("sdft", 1.0), ("--interpolate", 0.5)}


def test_a_picture_of_all_points_and_old_files_give_nothing(runs, tmp_path):
    pyplot = evaluate.find_pyplot()
    figure = fronts.draw(pyplot, runs)
    assert len(figure.axes) == 2 and len(figure.axes[0].lines) == 4  # points and front, of two
    pyplot.close(figure)
    for *_, results in runs:
        results["items"] = {}
    assert fronts.gains_table(runs) == fronts.tuned_table(runs) == ""
    assert np.isnan(fronts.read([0.0, 1.0], [0.0, 1.0], 2.0))
