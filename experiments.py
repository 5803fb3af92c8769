"""The paper's tables and figures, each with one command; and many runs' results.json as tables.

    python experiments.py table4                         # the runs of one table, then its rows
    python experiments.py table2 baselines sweep         # several, one run after the other
    python experiments.py table4 --steps 50 --model DIR  # further options are for train.py
    python experiments.py report runs/table4 --out DIR   # only the tables and figures of runs

Each run is `python train.py OPTIONS --seed S --out runs/EXPERIMENT/NUMBER-S`, with S = 0, 1, 2 or
those of --seeds (and the further options in EXPERIMENT). What is done is skipped, so that a command
can be stopped and called again. What came of the runs is printed, and drawn into
runs/EXPERIMENT/report.png. The students are not kept.
"""
import argparse
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import fill

import numpy as np

import checkpoint
import evaluate
import train

LEVELS = [
    "int8", "int4", "int4 --group-size 0", "int3", "int3 --group-size 32", "int2 --group-size 32",
    "nf4", "ffn5", "ffn10", "ffn20", "ffn30", "ffn50", "magnitude10", "magnitude20", "magnitude30",
    "magnitude50", "wanda10", "wanda30", "wanda50", "wanda70", "wanda2:4", "ffn10,nf4",
    "wanda30,int4"]
WAYS = "--recover sdft,kd,sft"
VARIANTS = [
    "--loss forward_kl", "--loss reverse_kl", "--loss jsd", "--demo none", "--demo quote",
    "--lora 16", "--ema 0.01", "--cka-weight 1", "--cka-weight 1 --cka-balance",
    "--watch cka --patience 1"]
FRACTIONS = "5.8e-5", "1.7e-4", "5.2e-4", "1.6e-3", "4.7e-3"  # a factor of 3 apart
SMALL = "runs/small/student"  # of Table 5: the default model without three tenths of its neurons
SEEDS = (0, 1, 2)

EXPERIMENTS = {  # name -> options of each run, made with every seed
    "table1": [f"--forget tooluse {how} --lr-fraction 2.6e-4 --eval-limit 150"
               for how in ("--teacher base,healthy", "--teacher healthy --demo none")],
    "table2": ["--degrade nf4 --data science,text",
               "--degrade nf4 --data tooluse,text --eval science"],
    "table4": ["--degrade ffn10 --data science,text",
               "--degrade ffn10 --data tooluse,text --eval science"],
    "table5": [f"--model {SMALL} --degrade none --steps 50",
               f"--model {SMALL} --bootstrap BASE"],
    "baselines": [f"--degrade {damage} {WAYS}" for damage in ("int4", "nf4", "ffn10", "wanda30")],
    "settings": [f"--degrade int4 {variant}" for variant in VARIANTS],
    "default": ["--degrade int4", "--degrade nf4", "--degrade ffn10"],
    "fp4": ["--degrade nvfp4", "--degrade mxfp4"],
    "rates": [f"--degrade nf4 --lr-fraction {fraction}" for fraction in FRACTIONS],
    "demos": [f"--degrade nf4 --demo {demo}" for demo in ("quote", "none")],
    "teachers": [f"--degrade none --data science,tooluse --demo {demo} --teacher-check 150 "
                 "--steps 1 --eval-limit 4" for demo in ("turn", "quote")],
    "sweep": [f"--degrade {damage} --recover none --eval-limit 150" for damage in LEVELS],
}


class RunFailed(Exception):
    """A run of train.py ended with an error."""


def main(argv=None):
    """The command line; returns the exit code: 2 for a user's mistake, 1 for a run that failed."""
    evaluate.any_terminal()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["report"]:
            asked = parse_report(argv[1:])
            report(asked.runs, Path(asked.out))
        else:
            asked, further = parse_experiments(argv)
            for name in asked.experiments:
                run_experiment(name, asked.seeds, further)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_experiments(argv):
    """(experiments and seeds, the options that go on to train.py); ValueError for a mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("experiments", nargs="+", choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=seeds_of, default=SEEDS, help="by commas [0,1,2]")
    asked, further = parser.parse_known_args(argv)
    if "table5" in asked.experiments and "--model" in further:
        raise ValueError("table5 makes its own small model of the default one; "
                         "for others see --bootstrap of train.py")
    return asked, further


def parse_report(argv):
    """The folders to report on, and where the picture goes; ValueError for a mistake."""
    parser = argparse.ArgumentParser(
        prog="experiments.py report", description="The tables of finished runs, and their picture.")
    parser.error = refuse
    parser.add_argument("runs", nargs="+", metavar="DIR", help="folders with runs, at any depth")
    parser.add_argument("--out", default="out", help="folder for report.png [out]")
    return parser.parse_args(argv)


def refuse(message):
    """ValueError, in place of argparse's usage and exit."""
    raise ValueError(f"{message} (--help lists the options)")


def seeds_of(text):
    """'0,1' -> (0, 1)."""
    return tuple(int(seed) for seed in text.split(","))


# ------------------------------------------------------------------------------------- Making runs

def run_experiment(name, seeds, further):
    """Make the runs that are not there yet, then print and draw what came of all of them."""
    folder = Path("runs", "".join([name, *further]).replace("/", "-"))
    if name == "table5":
        run("--degrade ffn30 --recover none --eval-limit 1", Path("runs/small"), [], keep=True)
    for seed in seeds:
        for number, options in enumerate(EXPERIMENTS[name]):
            run(f"{options} --seed {seed}", folder / f"{number}-{seed}", further)
    report([folder], folder)


def run(options, out, further, keep=False):
    """One run of train.py, unless it is done; its students are deleted but for keep."""
    if (out / "results.json").exists():
        return
    if "BASE" in options:
        options = options.replace("BASE", str(checkpoint.default_model()))
    command = with_options(options.split(), further)
    print(f"python train.py {' '.join(command)}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, str(Path(__file__).parent / "train.py")]
    with open(out / "log.txt", "w") as log:
        done = subprocess.run([*program, *command, "--out", str(out)], stdout=log, stderr=log)
    if done.returncode and not (out / "results.json").exists():  # 1 with it: the guard ended it
        raise RunFailed(f"this run failed (exit code {done.returncode}); see {out}/log.txt")
    if not keep:
        for student in out.glob("student*"):
            shutil.rmtree(student)


def with_options(options, further):
    """Both, as one command line: what comes later wins, but everything in --eval is measured.

    >>> with_options(["--eval", "a", "--steps", "9"], ["--eval", "b"])
    ['--eval', 'a,b', '--steps', '9']
    """
    both = [*options, *further]
    asked = [i for i, word in enumerate(both) if word == "--eval"]
    for i in asked[:0:-1]:
        both[asked[0] + 1] += "," + both[i + 1]
        del both[i:i + 2]
    return both


# ------------------------------------------------------------------------------------ Reading runs

RESULTS = re.compile(r"(results|\d+-\d+)\.json")  # NUMBER-SEED.json: results that are kept
DAMAGE = ("degrade", "forget", "student")  # these options are the damage
IGNORED = {"seed", "out", "device", "dtype", "micro_batch", "plain", "eval"}  # in a run's name


def report(paths, out):
    """Print the tables of the runs under these folders, and draw report.png into `out`."""
    runs = read_runs(paths)
    print(tables(runs))
    draw_runs(runs, out)


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
    """One run's results.json, with nan for null; ValueError for any other file."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        for key in ("stages", "cka"):
            results[key] = evaluate.each_leaf(results[key], nan_for_none)
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
    """One option of a command line; of a folder only the last two steps.

    >>> as_typed("group_size", 32, False), as_typed("symmetric", False, True)
    ('--group-size 32', '--no-symmetric')
    """
    flag = option.replace("_", "-")
    if is_switch:
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, str):
        value = "/".join(value.split("/")[-2:])
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

def tables(runs):
    """Markdown: performance, CKA, and how the two go together; mean ± standard error over the runs
    of one name."""
    found = [performance_table(runs), cka_table(runs), correlation_table(runs)]
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
    """'mean ± standard error' (the error where there are two or more that differ), '' of nothing.

    >>> mean_and_error([38.0, 44.0, 41.0], 1)
    '41.0 ± 1.7'
    """
    if not values:
        return ""
    mean, n, error = sum(values) / len(values), len(values), 0
    if n > 1:
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    shown = f"{mean:.{digits}f}"
    return f"{shown} ± {error:.{digits}f}" if error > 1e-9 else shown


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
            for kind in ("linear", "linear_debiased", "rbf_debiased"):
                for layers in LAYERS:
                    lines += correlation_rows(chosen, stages, level, kind, layers)
    return "\n".join(lines) if len(lines) > 2 else ""


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


def interval(x, y, damages, statistic, samples=1000):
    """'r [low, high]': the statistic and its 95 % percentile bootstrap interval (seed 0).

    Whole damages are drawn, with all their points: the seeds of one are not independent. Fewer than
    5 damages tell nothing of an interval, and get none.
    """
    if len(set(damages)) < 5:
        return f"{statistic(x, y):.2f}"
    rng, damages = np.random.default_rng(0), np.array(damages)
    members = [np.flatnonzero(damages == d) for d in sorted(set(damages))]
    found = []
    for _ in range(samples):
        drawn = rng.integers(len(members), size=len(members))
        i = np.concatenate([members[j] for j in drawn])
        found.append(statistic(x[i], y[i]))
    low, high = math.nan, math.nan
    if not np.isnan(found).all():
        low, high = np.nanpercentile(found, [2.5, 97.5])
    return f"{statistic(x, y):.2f} [{low:.2f}, {high:.2f}]"


# ----------------------------------------------------------------------------------------- Figures

def draw_runs(runs, out):
    """report.png in `out`: Fig. 6, performance by kind of damage; Fig. 8, CKA along the way (a) and
    against performance (b). Nothing without matplotlib."""
    pyplot = evaluate.find_pyplot()
    if pyplot is None:
        return
    groups = by_name(runs)
    metrics = common_metrics([(stage, results) for _, stage, results in runs])
    columns = max(2, len(metrics))
    figure, axes = pyplot.subplots(
        2, columns, figsize=(5.5 * columns, 9), layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        draw_performance(axis, groups, metric)
    names = [fill(name, 36) for name, _ in groups]
    axes[0, 0].set_yticks(range(len(groups)), names, fontsize=7)
    axes[0, 0].legend()
    draw_along(axes[1, 0], groups)
    draw_against(axes[1, 1], runs, metrics[0])
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "report.png", dpi=100)
    pyplot.close(figure)


def draw_performance(axis, groups, metric):
    """Fig. 6: a bar for each name and stage."""
    for i, stage in enumerate(("healthy", "degraded", "")):
        heights = [np.mean(values_of(group, stage, metric)) for _, group in groups]
        where = np.arange(len(groups)) + 0.27 * (1 - i)
        axis.barh(where, heights, 0.27, label=stage or "recovered")
    axis.set(title=evaluate.metric_title(metric))
    axis.set_yticks(range(len(groups)), [])


def draw_along(axis, groups):
    """Fig. 8a: CKA from healthy to degraded to recovered, a line a name, dotted over tokens."""
    for i, (name, group) in enumerate(groups):
        for level, style, label in (("samples", "-", name), ("tokens", ":", None)):
            heights = [1]
            for stage in ("degraded", ""):
                found = [kinds["linear_debiased"][-1] for kinds in cka_of(group, stage, level)]
                heights.append(np.mean(found or [math.nan]))
            axis.plot(["healthy", "degraded", "recovered"], heights, style, color=f"C{i}",
                      label=label)
    axis.set(title="CKA with the healthy model (last layer, linear, debiased; dotted: tokens)")
    axis.legend(fontsize=7)


def draw_against(axis, runs, metric):
    """Fig. 8b: a point a model, CKA over samples against performance."""
    for stage, marker in (("degraded", "x"), ("recovered", "o")):
        chosen = points(runs, (stage,))
        x = [likeness["samples"]["linear_debiased"][-1] for _, _, likeness, _ in chosen]
        axis.plot(x, [values[metric] for _, values, _, _ in chosen], marker, label=stage)
    axis.set(title="CKA (samples, last layer) against performance", xlabel="CKA",
             ylabel=evaluate.metric_title(metric))
    axis.legend()


if __name__ == "__main__":
    sys.exit(main())
