"""Many runs' results.json as tables: reading them, means and errors over seeds, CKA
against performance (§5.4), between damages and on the way of a recovery."""
import dataclasses
import itertools
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np

import evaluate
import train

# ------------------------------------------------------------------------------------ Reading runs

RESULTS = re.compile(r"(results|\d+-\d+)\.json")  # NUMBER-SEED.json: results that are kept
DAMAGE = ("degrade", "forget", "student")  # these options are the damage
IGNORED = {  # in a run's name
    "seed", "out", "device", "dtype", "micro_batch", "plain", "eval", "measure_every",
    "interpolate", "save_every", "resume", "dry_run", "verify"}


def read_runs(paths):
    """The results under these folders as [(name, stage, results)]; name: the run's options that are
    not defaults; stage: a recovery of it.

    A run with several recoveries counts as several. ValueError for a folder without any, or a file
    that is none.
    """
    runs, seen = [], set()
    for path in paths:
        files = {f.resolve() for f in Path(path).rglob("*.json") if RESULTS.fullmatch(f.name)}
        if not files:
            raise ValueError(f"report {path}: no results.json in it")
        for file in sorted(files - seen):
            results = read_results(file)
            name = name_of(results["config"])
            for stage in recoveries_of(results):
                way = stage.removeprefix("recovered").removeprefix("_")
                runs.append((f"{name} {way}".rstrip(), stage, results))
        seen |= files
    if not runs:
        raise ValueError(f"report {' '.join(map(str, paths))}: no run in it has a recovery")
    return runs


def read_results(file):
    """One run's results.json, with nan for null; ValueError for any other file.

    "items", "kl" and "along", which older files lack, are there, if empty.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        results = {"items": {}, "kl": {}, "along": {}} | results
        for key in ("stages", "cka", "kl"):
            results[key] = evaluate.each_leaf(results[key], nan_for_none)
        for point in itertools.chain(*results["along"].values()):
            point |= {key: evaluate.each_leaf(point[key], nan_for_none)
                      for key in ("values", "kl", "cka")}
        if "healthy" not in results["stages"]:
            raise KeyError("healthy")
        name_of(results["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: not the results of a run ({what})") from None
    return results


def nan_for_none(x):
    """x, but nan for None: what JSON has no word for."""
    return math.nan if x is None else x


def recoveries_of(results):
    """The names of a run's stages of recovery."""
    return [stage for stage in results["stages"] if stage.startswith("recovered")]


def name_of(config):
    """The options of a run that are not defaults, as they are typed, the damage always among them.

    >>> name_of({"degrade": "int4", "demo": "none", "seed": 3})
    '--degrade int4 --demo none'
    """
    words = []
    for option, default in dataclasses.asdict(train.Config()).items():
        value = config.get(option, default)
        if option in IGNORED:
            continue
        if option == "text":  # further texts are measured, too: the numbers of the first stay
            value = value.split(",")[0]
        if option == "degrade":
            shown = damages_by_option(config)
        else:
            shown = value != default
        if shown:
            words.append(as_typed(option, value, isinstance(default, bool)))
    return " ".join(words)


def damages_by_option(config):
    """Whether --degrade stands in a run's name: always, unless only another option did damage."""
    others = [config.get(option) for option in DAMAGE if option != "degrade"]
    return config["degrade"] not in ("", "none") or not any(others)


def as_typed(option, value, is_switch):
    """One option of a command line; of a folder from the root on only the last two steps.

    >>> as_typed("group_size", 32, False), as_typed("symmetric", False, True)
    ('--group-size 32', '--no-symmetric')
    """
    flag = option.replace("_", "-")
    if is_switch:
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, str):
        value = ",".join("/".join(word.split("/")[-2:]) if word.startswith("/") else word
                         for word in value.split(","))
    return f"--{flag} {value}"


def by_name(runs):
    """[(name, [(stage, results), …]), …]: the runs of one name, which differ in their seed."""
    found = {}
    for name, stage, results in runs:
        found.setdefault(name, []).append((stage, results))
    return list(found.items())


def common_metrics(group):
    """The metrics that all these (stage, results) have."""
    _, first = group[0]
    return [metric for metric in first["stages"]["healthy"]
            if all(metric in results["stages"]["healthy"] for _, results in group)]


def values_of(group, stage, metric):
    """The metric at a stage ("": each run's own recovery), run by run, of those that have it."""
    found = []
    for own, results in group:
        if (stage or own) in results["stages"]:
            found.append(results["stages"][stage or own][metric])
    return found


def cka_of(group, stage, level):
    """{kind: [n_layer]} at a stage ("": each run's own recovery), run by run, where it is there."""
    found = []
    for own, results in group:
        stages = results["cka"].get(level, {})
        if (stage or own) in stages:
            found.append(stages[stage or own])
    return found


# ------------------------------------------------------------------------------------------ Tables

def all_tables(runs):
    """Markdown: performance, CKA, and how the two go together; mean ± standard error over the runs
    of one name."""
    found = [performance_table(runs), cka_table(runs), correlation_table(runs),
             within_table(runs), follows_table(runs)]
    return "\n\n".join(table for table in found if table)


def performance_table(runs):
    """A row for each name and metric: every stage, the recovered values run by run, and the
    recovered fraction."""
    lines = ["| options | metric | base | healthy | degraded | recovered | run by run | "
             "recovered fraction |", "|" + "---|" * 8]
    for name, group in by_name(runs):
        for metric in common_metrics(group):
            lines.append(performance_row(name, group, metric))
    return "\n".join(lines)


def performance_row(name, group, metric):
    """One row of `performance_table`."""
    digits = 2 if metric.startswith("perplexity") else 1
    cells = []
    for stage in ("base", "healthy", "degraded", ""):
        cells.append(mean_and_error(values_of(group, stage, metric), digits))
    cells.append(", ".join(f"{v:.{digits}f}" for v in values_of(group, "", metric)))
    fractions = fractions_of(group, metric)
    spared, n = fractions.count(None), len(fractions)
    if not spared:
        cells.append(mean_and_error(fractions, 2))
    elif spared == n:
        cells.append(evaluate.not_damaged(group[0][1], metric))
    else:
        cells.append(f"not damaged in {spared} of {n}")
    return f"| `{name}` | {evaluate.metric_title(metric)} | " + " | ".join(cells) + " |"


def fractions_of(group, metric):
    """Recovered fractions, run by run; None: not damaged, nan: a model of the run broke."""
    found = []
    for own, results in group:
        stages = [results["stages"][stage][metric] for stage in ("healthy", "degraded", own)]
        if any(math.isnan(value) for value in stages):
            found.append(math.nan)
        else:
            found.append(evaluate.recovered_fractions(results)[own][metric])
    return found


def cka_table(runs, kinds=("linear", "linear_debiased")):
    """A row for each name and level: CKA with the healthy model before and after recovery, in the
    last layer and in the mean of layers."""
    lines = ["| options | CKA over | kind | last layer: degraded | recovered | "
             "mean of layers: degraded | recovered |", "|" + "---|" * 7]
    for name, group in by_name(runs):
        for level in group[0][1]["cka"]:
            for kind in kinds:
                lines.append(cka_row(name, group, level, kind))
    return "\n".join(lines)


def cka_row(name, group, level, kind):
    """One row of `cka_table`."""
    cells = []
    for one_value in LAYERS.values():
        for stage in ("degraded", ""):
            found = [one_value(kinds[kind]) for kinds in cka_of(group, stage, level)]
            cells.append(mean_and_error(found, 3))
    return f"| `{name}` | {level} | {kind.replace('_', ', ')} | " + " | ".join(cells) + " |"


def last_layer(values):
    """CKA of the last layer."""
    return values[-1]


def mean_of_layers(values):
    """CKA averaged over layers."""
    return sum(values) / len(values)


LAYERS = {"last": last_layer, "mean": mean_of_layers}  # of a model's CKA, one value a layer


def mean_and_error(values, digits):
    """'mean ± standard error' (the error where it is not 0 at as many digits), '' of nothing.

    >>> mean_and_error([38.0, 44.0, 41.0], 1), mean_and_error([38.0, 38.01], 1)
    ('41.0 ± 1.7', '38.0')
    """
    if not values:
        return ""
    mean, n, error = sum(values) / len(values), len(values), 0
    if n > 1:
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    shown = f"{mean:.{digits}f}"
    return f"{shown} ± {error:.{digits}f}" if error > 0.5 * 10 ** -digits else shown


# ------------------------------------------------------------------ CKA against performance (§5.4)

def points(runs, stages=("degraded", "recovered")):
    """[(stage, its performance, its CKA, the damage)]: a point for each model that was measured
    against its healthy one, none twice."""
    found = {}
    for name, own, results in runs:
        for stage in stages:
            key = own if stage == "recovered" else stage
            levels = results["cka"].items()
            likeness = {level: of_stage[key] for level, of_stage in levels if key in of_stage}
            if not likeness or stage == "recovered" and nobody_taught(own, results["config"]):
                continue
            which = str(results["stages"]["degraded"])
            if stage == "recovered":
                which = f"{name} {results['config']['seed']}"
            damage = evaluate.damage_of(results["config"])
            point = stage, results["stages"][key], likeness, damage
            found.setdefault((stage, which), point)
    return list(found.values())


def nobody_taught(stage, config):
    """Whether this recovery of the run was --recover none."""
    return "none" in (config["recover"], *stage.split("_")[1:2])


def correlation_table(runs):
    """Pearson and Spearman r, with 95 % bootstrap intervals, of CKA with each metric (perplexity:
    with minus its logarithm).

    Over the damaged models, over the recovered ones, and over both. '' for fewer than 5 models.
    """
    lines = ["| models | CKA over | kind | layers | metric | n | Pearson r | Spearman r |",
             "|" + "---|" * 8]
    for stages in (("degraded",), ("recovered",), ("degraded", "recovered")):
        chosen = points(runs, stages)
        if len(chosen) < 5 or {stage for stage, *_ in chosen} != set(stages):
            continue
        for level in ("samples", "tokens"):
            for kind in common_kinds([likeness for _, _, likeness, _ in chosen], level):
                for layers in LAYERS:
                    lines += correlation_rows(chosen, stages, level, kind, layers)
    return "\n".join(lines) if len(lines) > 2 else ""


def common_kinds(likenesses, level):
    """Which of the kinds of CKA all these {level: {kind: …}} have; older files lack some."""
    kinds = ("linear", "linear_debiased", "unit_debiased", "rbf_debiased")
    return [kind for kind in kinds if all(kind in x.get(level, {}) for x in likenesses)]


def correlation_rows(chosen, stages, level, kind, layers):
    """The rows of `correlation_table` for one CKA: a row a metric that all points have."""
    rows, damages = [], [damage for *_, damage in chosen]
    x = np.array([LAYERS[layers](likeness[level][kind]) for _, _, likeness, _ in chosen])
    for metric in chosen[0][1]:
        if not all(metric in values for _, values, _, _ in chosen):
            continue
        y = np.array([more_is_better(values, metric) for _, values, _, _ in chosen])
        r = [interval(x, y, damages, statistic) for statistic in (pearson, spearman)]
        cells = [" and ".join(stages), level, kind.replace("_", ", "), layers, metric, len(x), *r]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def more_is_better(values, metric):
    """The metric, of a perplexity minus its logarithm."""
    return -math.log(values[metric]) if metric.startswith("perplexity") else values[metric]


def pearson(x, y):
    """Pearson's r of two vectors; nan where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / size if size > 1e-12 else math.nan


def ranks(x):
    """Ranks from 1, those of equals averaged.

    >>> ranks(np.array([10, 30, 20, 30])).tolist()
    [1.0, 3.5, 2.0, 3.5]
    """
    return np.array([((x < v).sum() + (x <= v).sum() + 1) / 2 for v in x])


def spearman(x, y):
    """Spearman's r: Pearson's r of the ranks."""
    return pearson(ranks(x), ranks(y))


def interval(x, y, damages, statistic):
    """'r [low, high]': the statistic and its 95 % percentile bootstrap interval (seed 0).

    Whole damages are drawn, with all their points: the seeds of one are not independent. Fewer than
    5 damages tell nothing of an interval, and get none.
    """
    return with_interval(members_of(damages), lambda i: statistic(x[i], y[i]))


def members_of(damages):
    """The indices of each damage's points, in the order of the damages' names.

    >>> [i.tolist() for i in members_of(["b", "a", "b"])]
    [[1], [0, 2]]
    """
    damages = np.array(damages)
    return [np.flatnonzero(damages == d) for d in sorted(set(damages.tolist()))]


def with_interval(members, statistic):
    """'statistic [low, high]' over the points of these members, lists of indices; see `interval`.

    >>> with_interval([np.array([i]) for i in range(4)], lambda i: i.mean())
    '1.50'
    """
    ends = bounds(bootstrap(members, statistic)) if len(members) >= 5 else ()
    return in_brackets(statistic(np.concatenate(members)), ends)


def in_brackets(value, ends):
    """'value [low, high]'; 'value' where there are no ends."""
    return rounded(value) + (f" [{', '.join(map(rounded, ends))}]" if ends else "")


def rounded(value, digits=2, sign=""):
    """A number as text, its nought without a minus; sign: "+" for one before what is above it.

    >>> rounded(-0.001), rounded(0.25, 1, "+")
    ('0.00', '+0.2')
    """
    return f"{round(value, digits) + 0:{sign}.{digits}f}"


def bootstrap(members, statistic, samples=1000):
    """The statistic of as many draws of members, with replacement (seed 0)."""
    rng, found = np.random.default_rng(0), []
    for _ in range(samples):
        drawn = rng.integers(len(members), size=len(members))
        found.append(statistic(np.concatenate([members[j] for j in drawn])))
    return found


def of_seeds(values):
    """Half the width of the 95 % interval of a mean over two to ten seeds: Student's t, of one
    degree of freedom less, times its standard error.

    >>> round(of_seeds([1.0, 2.0, 3.0]), 2)
    2.48
    """
    student = 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26
    return student[len(values) - 2] * float(np.std(values, ddof=1)) / len(values) ** 0.5


def bounds(found):
    """The 95 % percentile interval of what a bootstrap found; nan where all of it is."""
    if np.isnan(found).all():
        return math.nan, math.nan
    return tuple(np.nanpercentile(found, [2.5, 97.5]))


# --------------------------------------------------- CKA on the way of a recovery (--measure-every)

def ways(runs):
    """[(damage, way), …] of each recovery with 4 points or more; a way: its points, [(performance,
    CKA), …]."""
    found = [(evaluate.damage_of(results["config"]),
              [point for _, *point in way_of(stage, results)]) for _, stage, results in runs]
    return [(damage, way) for damage, way in found if len(way) >= 4]


def way_of(stage, results):
    """A recovery's points, from the damaged model on: [(step, performance, CKA), …], CKA {level:
    {kind: [last layer, mean of layers]}}."""
    way = [(p["step"], p["values"], p["cka"]) for p in measured_on_the_way(results, stage)]
    damaged = {level: {kind: [last_layer(v), mean_of_layers(v)] for kind, v in kinds.items()}
               for level, stages in results["cka"].items()
               for kinds in [stages.get("degraded", {})] if kinds}
    return [(0, results["stages"]["degraded"], damaged)] * bool(damaged) + way


def measured_on_the_way(results, stage):
    """The points of a recovery by step, each step once and none at step 0. Its end is the last of
    them in the file, under the step whose weights were kept."""
    found = {}
    for point in results["along"].get(stage, []):
        if point["part"] is None and point["step"]:
            found.setdefault(point["step"], point)
    return [found[step] for step in sorted(found)]


def way_r(way, level, kind, layers, metric):
    """Pearson's r of this CKA with this metric along one way."""
    where = list(LAYERS).index(layers)
    x = np.array([likeness[level][kind][where] for _, likeness in way])
    return pearson(x, np.array([more_is_better(values, metric) for values, _ in way]))


def within_table(runs):
    """Pearson's r of CKA with each metric along a recovery's way: the mean over recoveries, and
    its bootstrap interval over damages. '' where none was measured on its way."""
    found = ways(runs)
    if not found:
        return ""
    lines = ["| on the way, CKA over | kind | layers | metric | recoveries | Pearson r |",
             "|" + "---|" * 6]
    for level, layers, metric in combinations_of(found):
        for kind in common_kinds([x for _, way in found for _, x in way], level):
            r, members = r_of_ways(found, level, [kind], layers, metric)
            if len(r):
                told = with_interval(members, lambda i, r=r: r[i].mean())
                cells = [level, kind.replace("_", ", "), layers, metric, len(r), told]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def combinations_of(found):
    """(level, layers, metric) of all that these ways have."""
    metrics = [m for m in found[0][1][0][0]
               if all(m in values for _, way in found for values, _ in way)]
    return itertools.product(("samples", "tokens"), LAYERS, metrics)


def r_of_ways(found, level, kinds, layers, metric):
    """(`way_r` of each way [n], of each kind [n, kinds] if there are several; the `members_of` its
    damages); without those along which something does not vary."""
    r = np.array([[way_r(way, level, kind, layers, metric) for kind in kinds] for _, way in found])
    there = ~np.isnan(r).any(1)
    members = members_of([damage for (damage, _), seen in zip(found, there) if seen])
    return r[there].squeeze(1) if len(kinds) == 1 else r[there], members


def follows_table(runs):
    """Whether CKA over rows as they are or over rows of unit norm follows performance: Pearson's r
    of both, their difference with its interval, between damages and on the way of recoveries. ''
    where the unit norm was not measured."""
    lines = ["| | CKA over | layers | metric | n | r, plain | r, unit norm | difference | "
             "follows |", "|" + "---|" * 9]
    untaught = [run for run in runs if nobody_taught(run[1], run[2]["config"])]
    found, chosen = ways(runs), points(untaught or runs, ("degraded",))  # each damage once
    for level, layers in itertools.product(("samples", "tokens"), LAYERS):
        likenesses = [likeness for _, _, likeness, _ in chosen]
        if len(chosen) >= 5 and "unit_debiased" in common_kinds(likenesses, level):
            lines += follows_between(chosen, level, layers)
        likenesses = [x for _, way in found for _, x in way]
        if found and "unit_debiased" in common_kinds(likenesses, level):
            lines += follows_within(found, level, layers)
    return "\n".join(lines) if len(lines) > 2 else ""


def follows_between(chosen, level, layers):
    """Rows of `follows_table`: between damaged models."""
    rows, members = [], members_of([damage for *_, damage in chosen])
    plain, unit = (np.array([LAYERS[layers](likeness[level][kind]) for _, _, likeness, _ in chosen])
                   for kind in ("linear_debiased", "unit_debiased"))
    for metric in chosen[0][1]:
        if all(metric in values for _, values, _, _ in chosen):
            y = np.array([more_is_better(values, metric) for _, values, _, _ in chosen])
            difference = partial(difference_of_r, plain, unit, y)
            both = f"{pearson(plain, y):.2f} | {pearson(unit, y):.2f}"
            rows.append(f"| damages | {level} | {layers} | {metric} | {len(y)} | {both} | "
                        f"{verdict_on(members, difference)} |")
    return rows


def difference_of_r(plain, unit, y, i):
    """r of the unit norm with y less that of the plain CKA, of the points i."""
    return pearson(unit[i], y[i]) - pearson(plain[i], y[i])


def follows_within(found, level, layers):
    """Rows of `follows_table`: on the way of recoveries."""
    rows = []
    for of_level, of_layers, metric in combinations_of(found):
        if (of_level, of_layers) != (level, layers):
            continue
        r, members = r_of_ways(found, level, ["linear_debiased", "unit_debiased"], layers, metric)
        if len(r):
            told = verdict_on(members, lambda i, d=r[:, 1] - r[:, 0]: d[i].mean())
            plain, unit = r.mean(0)
            rows.append(f"| recoveries | {level} | {layers} | {metric} | {len(r)} | "
                        f"{plain:.2f} | {unit:.2f} | {told} |")
    return rows


def verdict_on(members, difference):
    """'difference [interval] | which follows better', by whether the interval is off 0."""
    ends, word = (), "not known"
    if len(members) >= 5:
        ends = bounds(bootstrap(members, difference))
        low, high = (round(end, 2) for end in ends)
        word = "unit norm" if low > 0 else "plain" if high < 0 else "no difference"
    return f"{in_brackets(difference(np.concatenate(members)), ends)} | {word}"
