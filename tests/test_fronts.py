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
N = 1600


def first(percent):
    """N items, in pairs of blocks that are right or wrong: of both halves the same share."""
    pair = 2 * fronts.BLOCK
    return "1" * (percent * pair) + "0" * ((100 - percent) * pair)


def items(task, other, more=80):
    return {"tooluse_request": first(task), "blimp_all": first(other), "arc_easy_all": first(more),
            "perplexity": "2.5 2.6"}


def put(folder, name, end, along=(), seed=0, ended="", **options):
    """A run: its end, and the points on its way, as (task, other) in percent, ten seconds a step of
    ten; the start has none of the task and 80 of the others."""
    config = DEFAULTS | {"data": "tooluse", "degrade": "none", "steps": 40, "seed": seed} | options
    values = {"tooluse_request": 0.0, "blimp_all": 80.0, "perplexity": 12.0}
    points = [{"step": 10 * (i + 1), "part": None, "seconds": 10.0 * (i + 1), "values": values,
               "cka": {}, "items": items(*point), "kl": {"perplexity": point[0] / 100}}
              for i, point in enumerate(along)]
    if along:  # the student that was left, under the step that was kept
        points.append(points[0] | {"step": 40, "items": items(*end), "seconds": 40.0,
                                   "kl": {"perplexity": end[0] / 100}})
    results = {
        "config": config, "stages": dict.fromkeys(("healthy", "degraded", "recovered"), values),
        "cka": {}, "kl": {"perplexity": {"recovered": end[0] / 100}},
        "items": {"healthy": items(0, 80), "degraded": items(0, 80), "recovered": items(*end)},
        "along": {"recovered": points}, "seconds": {"recovered training": 40.0},
        "guard": {"recovered": {"ended": ended}}}
    (folder / f"{name}-{seed}.json").write_text(json.dumps(results))


@pytest.fixture
def runs(tmp_path):
    """sft loses half a point of one test for each point gained, sdft a quarter; each has a worse
    point below its front; sdft ends at 40, sft at 80, or at 35 at a rate that retains less."""
    put(tmp_path, "0", (80, 40), [(40, 60), (20, 50)], recover="sft", lr_fraction=1e-3)
    put(tmp_path, "1", (35, 50), [(20, 60)], recover="sft", lr_fraction=5e-4)
    put(tmp_path, "2", (40, 70), [(20, 75), (10, 60)])
    return tables.read_runs([tmp_path])


def made(folder, number, *rest, **options):
    """As `put`, where --best looks for it."""
    put(folder, str(number), *rest, **options)
    (folder / f"{number}-0").mkdir()
    (folder / f"{number}-0.json").rename(folder / f"{number}-0" / "results.json")


def test_a_rate_is_chosen_by_what_is_kept_at_half_of_the_best_gain(tmp_path):
    """That is 40: the second rate keeps most there; the third, which keeps more at less, does not
    get there, and the fourth was ended by the guard. sdft's only rate stands without a choice."""
    made(tmp_path, 0, (80, 40), [(40, 50)], recover="sft", lr_fraction=4e-3)
    made(tmp_path, 1, (60, 60), [(40, 70)], recover="sft", lr_fraction=2e-3)
    made(tmp_path, 2, (20, 80), [(10, 80)], recover="sft", lr_fraction=1e-3)
    made(tmp_path, 3, (80, 80), [(40, 80)], recover="sft", lr_fraction=8e-3, ended="step 9: …")
    made(tmp_path, 4, (30, 70))
    made(tmp_path, 5, (0, 80), loss="jsd")  # it gains nothing: no seed more
    assert fronts.best_runs(tmp_path, 6) == [1, 4]
    with pytest.raises(ValueError, match="6 of 7 are done"):
        fronts.best_runs(tmp_path, 7)


def test_of_rates_that_do_not_get_there_the_one_that_gains_most(tmp_path):
    made(tmp_path, 0, (80, 40), recover="sft")
    made(tmp_path, 1, (20, 70), lr_fraction=1e-3)
    made(tmp_path, 2, (30, 50), lr_fraction=2e-3)
    assert fronts.best_runs(tmp_path, 3) == [0, 2]


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
    assert sorted((p.rate, p.step, p.seconds) for p in points) == [
        (1e-10, 10, 10.0), (1, 10, 10.0)]


def test_gain_is_the_tasks_and_retention_the_mean_of_the_others(runs):
    _, points = next(iter(fronts.scenes(runs).items()))
    end = next(p for p in points if p.rate == 1e-3 and p.step == 40)
    for part in (fronts.CHOSEN, fronts.SCORED):
        assert fronts.gain(end, "tooluse", part) == pytest.approx(80)
        assert fronts.retention(end, "tooluse", part) == pytest.approx(-20)  # of -40 and 0


def test_a_line_is_one_rates_points_that_no_line_between_others_beats(runs, tmp_path):
    """Of sft's 20, 40 and 80 the middle lies on the line from the start to the end, and so does one
    of sdft's; half a point above it is a corner."""
    put(tmp_path, "2", (40, 70), [(20, 76), (10, 60)])
    runs = tables.read_runs([tmp_path])
    _, points = next(iter(fronts.scenes(runs).items()))
    found = fronts.lines_of(points, "tooluse")
    gains = {method: [round(fronts.gain(p, "tooluse", fronts.SCORED)) for p in line]
             for method, line in found.items()}
    assert gains == {"--recover sft": [80], "sdft": [20, 40]}
    assert {p.rate for p in found["--recover sft"]} == {1e-3}


def test_retention_at_equal_gain_by_hand(runs):
    """At 20 points sft keeps -5, sdft -2.5; at 30, between its points, -7.5 and -3.75; sdft does
    not get to 60. The best gain is 80."""
    _, points = next(iter(fronts.scenes(runs).items()))
    found, once = fronts.lines_of(points, "tooluse"), fronts.weights_of(points[0], fronts.SCORED)
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
    row = next(line for line in table.splitlines()
               if line.startswith("| `sdft` | 5.2e-04 | 1 | 20.0 (25%) |"))
    assert " | -2.5 | +2.5 | " in row and row.endswith("| -5.0 | +0.0 | 0.200 |")
    assert "| `sdft` | 5.2e-04 | 1 | 60.0 (75%) | – |  | – | – | – |" in table


def test_equal_seconds_by_hand(tmp_path):
    """sft takes 20 s for 80 points, sdft has 40 of its 60 by then; both lose half as much."""
    put(tmp_path, "0", (80, 40), recover="sft")
    put(tmp_path, "1", (60, 50), [(30, 65), (40, 60)])
    file = tmp_path / "0-0.json"
    file.write_text(file.read_text().replace('"recovered training": 40.0',
                                             '"recovered training": 20.0'))
    table = fronts.tuned_table(tables.read_runs([tmp_path]))
    rate = "| 5.2e-04 | 1 |"
    assert f"| `--recover sft` {rate} +80.0 | -20.0 | 0.800 | 20 | 20 s | +80.0 | -20.0 |" in table
    assert f"| `sdft` {rate} +60.0 | -15.0 | 0.600 | 40 | 20 s | +40.0 | -10.0 |" in table


def test_the_interval_holds_the_difference_and_is_paired(runs, tmp_path):
    """The same model against itself differs by nothing in every draw; where one of the two falls
    short of the gain there is none."""
    _, points = next(iter(fronts.scenes(runs).items()))
    found = fronts.lines_of(points, "tooluse")
    value, low, high = fronts.difference(found["sdft"], found["--recover sft"], "tooluse", 20)
    assert value == pytest.approx(2.5) and np.isnan([low, high]).all()  # of one seed
    put(tmp_path, "0", (80, 40), [(40, 60), (20, 50)], recover="sft", lr_fraction=1e-3, seed=1)
    put(tmp_path, "2", (40, 70), [(20, 75), (10, 60)], seed=1)
    _, points = next(iter(fronts.scenes(tables.read_runs([tmp_path])).items()))
    found = fronts.lines_of(points, "tooluse")
    value, low, high = fronts.difference(found["sdft"], found["--recover sft"], "tooluse", 20)
    assert low < 2.5 < high and high - low < 10 and value == pytest.approx(2.5)
    same = fronts.difference(found["sdft"], found["sdft"], "tooluse", 20)
    assert fronts.told(same) == "+0.0 [+0.0, +0.0]"
    assert fronts.difference(found["sdft"], found["--recover sft"], "tooluse", 40) != ()
    assert fronts.difference(found["sdft"], found["--recover sft"], "tooluse", 41) == ()


def test_an_interval_knows_of_the_seeds_and_of_blocks(tmp_path):
    """Of three seeds sdft keeps 0, 20, 40 of one test more than sft: at half of the gain, of both
    tests' mean, 5 ± 4.30 * 5 / sqrt(3). Blocks of equals count as one item each."""
    for seed, lost in enumerate((0, 20, 40)):
        put(tmp_path, "0", (40, 80 - lost), seed=seed, recover="sft")
        put(tmp_path, "1", (40, 80), seed=seed)
    (data, _), points = next(iter(fronts.scenes(tables.read_runs([tmp_path])).items()))
    lines = fronts.lines_of(points, data)
    assert {line[0].seeds for line in lines.values()} == {(0, 1, 2)}
    value, low, high = fronts.difference(lines["sdft"], lines["--recover sft"], data, 20)
    assert value == pytest.approx(5)  # half of 10
    half = 4.30 * 5 / 3 ** 0.5
    assert low == pytest.approx(5 - half, abs=0.8) and high == pytest.approx(5 + half, abs=0.8)
    assert low < 5 - half and high > 5 + half  # the items' share
    items, _ = fronts.weights_of(points[0], fronts.SCORED, 500)
    drawn = (points[0].items["blimp_all"][0] @ items["blimp_all"])[1:]
    assert drawn.std() == pytest.approx((0.8 * 0.2 / 100) ** 0.5, rel=0.1)  # of 100 blocks
    file = tmp_path / "1-2.json"
    file.write_text(file.read_text().replace('"ended": ""', '"ended": "step 9"'))
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    assert "the guard ended one" in fronts.answer(points, data)[-1]
    file.unlink()
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    assert "not the same seeds" in fronts.answer(points, data)[-1]
    assert "| `sdft` | 5.2e-04 | 2 |" in fronts.gains_table(tables.read_runs([tmp_path]))


@pytest.mark.parametrize("kept, word", [(79, "SDFT keeps more"), (60, "not decided"),
                                        (30, "SFT keeps more")])
def test_the_question_is_answered_by_its_rule(kept, word, tmp_path):
    """At 40, half of the best gain, sft keeps 60 of 80; the other test is untouched."""
    for seed in range(2):
        put(tmp_path, "0", (80, 40), [(40, 60), (20, 60)], recover="sft", seed=seed)
        put(tmp_path, "1", (60, kept - 26), [(40, kept), (10, kept - 9)], seed=seed)
    ((data, _), points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    seeds, apart, found = fronts.answer(points, data)
    assert seeds == "0, 1" and found == word and apart.startswith(f"{(kept - 60) / 2:+.1f} [")
    assert f"| tooluse | none | 0, 1 | {apart} | {word} |" in fronts.answers_table(
        tables.read_runs([tmp_path]))
    for change, says in (({}, "one of them does not gain so much"),
                         ({"loss": "jsd"}, "both must be there, and gain")):
        for seed in range(2):
            put(tmp_path, "1", (15, kept), [(10, kept), (5, kept)], seed=seed, **change)
        (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
        assert fronts.answer(points, data)[-1] == f"not known: {says}"
    for seed in range(2):  # sdft's 5 less at a gain of 20, which is half of its end's
        put(tmp_path, "1", (40, kept), seed=seed)
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    assert fronts.answer(points, data)[1:] == (apart, word)
    for seed in range(2):
        put(tmp_path, "1", (20, (kept + 80) // 2), seed=seed)
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    seeds, less, found = fronts.answer(points, data)
    assert found.endswith(", at a quarter: one does not gain half")
    assert float(less.split(" ")[0]) == pytest.approx(float(apart.split(" ")[0]) / 2, abs=0.3)
    for file in tmp_path.glob("*-1.json"):
        file.unlink()
    put(tmp_path, "1", (60, kept - 5), [(40, kept), (10, kept - 9)])
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    assert fronts.answer(points, data)[-1] == "not known: one seed"


def test_a_rate_is_chosen_on_the_even_blocks_and_scored_on_the_odd(tmp_path):
    """The higher rate is right on the even ones alone, the lower on the odd ones alone: the higher
    is chosen, and gained nothing."""
    block = fronts.BLOCK
    for n, (rate, even) in enumerate(((1e-3, True), (5e-4, False))):
        put(tmp_path, str(n), (50, 80), recover="sft", lr_fraction=rate)
        file = tmp_path / f"{n}-0.json"
        results = json.loads(file.read_text())
        pair = "1" * block + "0" * block if even else "0" * block + "1" * block
        results["items"]["recovered"]["tooluse_request"] = pair * (N // 2 // block)
        file.write_text(json.dumps(results))
    table = fronts.tuned_table(tables.read_runs([tmp_path]))
    assert "| tooluse | none | `--recover sft --steps 40` | 1.0e-03* | 1 | +0.0 |" in table


def test_the_ends_at_every_rate_on_all_items_by_hand(tmp_path):
    """A fifth of the task's items are right, all of them in even blocks: half of them counted
    would be 40 % or none. Of the others one test of two loses 20 points."""
    put(tmp_path, "0", (20, 60), [(70, 80)], recover="sft", lr_fraction=1e-3)
    put(tmp_path, "1", (50, 80), recover="sft", lr_fraction=5e-4)
    file, block = tmp_path / "0-0.json", fronts.BLOCK
    results = json.loads(file.read_text())
    lone = ("1" * block + "0" * block) * (N // 5 // block) + "0" * (N - 2 * (N // 5))
    assert len(lone) == N and lone.count("1") == N // 5
    results["along"]["recovered"][-1]["items"]["tooluse_request"] = lone
    file.write_text(json.dumps(results))
    table = fronts.ends_table(tables.read_runs([tmp_path]))
    assert table.splitlines()[0] == "| tooluse, from none | 5.0e-04 | 1.0e-03 |"
    assert table.splitlines()[-1] == (
        "| `--recover sft --steps 40` | 50, +0.0, 0.500 | 20, -10.0, 0.200 |")


def test_the_first_seed_chooses_a_rate_whatever_others_say(tmp_path):
    """The other rate has one seed, which gained more, but kept less at half of that."""
    for seed, end in ((0, (40, 80)), (1, (80, 20))):
        put(tmp_path, "0", end, [(20, 80)], seed=seed)
    put(tmp_path, "1", (60, 40), [(30, 60)], lr_fraction=1e-3)
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    (line,) = fronts.lines_of(points, "tooluse").values()
    assert {p.rate for p in line} == {5.2e-4} and line[-1].seeds == (0, 1)
    assert fronts.gain(line[-1], "tooluse", fronts.SCORED) == pytest.approx(60)
    assert line[-1].items["tooluse_request"].mean(1).tolist() == [0.4, 0.8]


def test_methods_that_all_fine_tune_are_not_named_sdft(tmp_path):
    put(tmp_path, "0", (40, 80), recover="sft")
    put(tmp_path, "1", (40, 80), recover="sft", anchor=1.0)
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    assert {p.method for p in points} == {"--recover sft", "--recover sft --anchor 1.0"}


def test_interpolated_weights_are_a_method_of_their_own(tmp_path):
    put(tmp_path, "0", (80, 40), [(40, 60)], recover="sft")
    results = json.loads((tmp_path / "0-0.json").read_text())
    between = results["along"]["recovered"][0] | {"step": 40, "part": 0.5}
    results["along"]["recovered"].append(between)
    (tmp_path / "0-0.json").write_text(json.dumps(results))
    (_, points), = fronts.scenes(tables.read_runs([tmp_path])).items()
    assert {(p.method, p.part) for p in points} == {
        ("--recover sft", 1.0), ("--recover sft --interpolate", 0.5)}


def test_a_picture_of_all_points_and_old_files_give_nothing(runs, tmp_path):
    pyplot = evaluate.find_pyplot()
    figure = fronts.draw(pyplot, runs)
    assert len(figure.axes) == 2 and len(figure.axes[0].lines) == 4  # points and line, of two
    pyplot.close(figure)
    for *_, results in runs:
        results["items"] = {}
    assert fronts.gains_table(runs) == fronts.tuned_table(runs) == ""
    assert np.isnan(fronts.read([0.0, 1.0], [0.0, 1.0], 2.0))
