"""The runs that are kept in results/EXPERIMENT/NUMBER-SEED.json: putting them there, and rows and
cells of tables that are made of them, each table with the commands, commits, machines, seeds and
minutes that it stands on."""
import collections
import dataclasses
import itertools
import json
import math
import re
import textwrap
from functools import partial
from pathlib import Path

import numpy as np

import evaluate
import tables
import train
from tables import mean_and_error

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
OTHER_TEXTS = {"0e2572736741": ", text of Python 3.12"}  # perplexity's, where it is not of 3.11


# ---------------------------------------------------------------------------------------- Keeping

def keep(folder, name, dirty=False):
    """The numbers of the runs in folder/NUMBER-SEED, as results/NAME/NUMBER-SEED.json.

    Without answers, traces and CKA between layers, CKA to five digits. ValueError, naming the
    runs, for those of code that no commit has (dirty: they are kept, and marked).
    """
    files = sorted(folder.glob("*-*/results.json"))
    if not files:
        raise ValueError(f"keep {folder}: no NUMBER-SEED/results.json in it")
    runs = {file.parent.name: compact(json.loads(file.read_text()), name, file) for file in files}
    unknown = [run for run, r in runs.items() if not re.fullmatch("[0-9a-f]{7}", commit_of(r))]
    if unknown and not dirty:
        raise ValueError(f"keep {folder}: no commit has the code of {', '.join(unknown)}; run them "
                         "again, or keep them with --dirty, marked")
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    for run, results in runs.items():
        path = RESULTS / name / f"{run}.json"
        path.write_text(as_lines(results) + "\n", encoding="utf-8")
        print(f"{path}: {command_of(results['config'])}")


def compact(results, name, file):
    """One run's results.json, less what no table needs, without the paths of its machine."""
    results = {key: value for key, value in results.items() if key not in ("step", "cka_layers")}
    results["cka"] = evaluate.each_leaf(results["cka"], partial(rounded, digits=5))
    for key in {"along", "kl"} & set(results):
        results[key] = evaluate.each_leaf(results[key], partial(rounded, digits=6))
    config, environment = results["config"], results["environment"]
    for option, value in config.items():
        if isinstance(value, str):
            config[option] = ",".join(map(without_folders, value.split(",")))
    config["out"] = f"runs/{name}/{file.parent.name}"
    environment["model"] = without_folders(environment["model"])
    environment["commit"] = commit_of(results)
    environment["command"] = command_of(config).removeprefix("python ")
    return results


def rounded(x, digits):
    """x; a float to as many digits after the point."""
    return round(x, digits) if isinstance(x, float) else x


def without_folders(path):
    """The last step of a path from elsewhere; any other word as it is.

    >>> without_folders("/some/where/blimp.jsonl"), without_folders("runs/small/student")
    ('blimp.jsonl', 'runs/small/student')
    """
    return path.rstrip("/").split("/")[-1] if path.startswith(("/", "..", "~")) else path


def commit_of(results):
    """Seven figures of a run's commit, and whether its code was changed; "unknown" without git."""
    environment = results["environment"]
    if "commit" in environment:
        return environment["commit"]
    commit, _, changed = environment.get("revision", "").partition(" ")
    return (commit[:7] or "unknown") + (f" {changed}" if changed else "")


def command_of(config):
    """The command that makes this run again, but for the seed, on whatever device, into --out and
    with whatever checkpoints on the way.

    >>> command_of({"degrade": "int4", "seed": 3, "symmetric": False})
    'python train.py --degrade int4 --no-symmetric'
    """
    words = ["python train.py"]
    for option, default in dataclasses.asdict(train.Config()).items():
        value = config.get(option, default)
        if value != default and option not in ("seed", "device", "dtype", "out", "save_every"):
            words.append(tables.as_typed(option, value, isinstance(default, bool)))
    return " ".join(words)


def as_lines(results):
    """JSON, a list of numbers on one line."""
    text = evaluate.to_json(results, indent=1)
    number = r"(?:-?[\d.e+-]+|null)"
    return re.sub(rf"\[\n\s+({number}(?:,\n\s+{number})*)\n\s+\]",
                  lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)


# ---------------------------------------------------------------------- Rows, columns, provenance

def runs_of(folder, where, suffix=""):
    """The kept results of EXPERIMENT/NUMBER, by seed; of several, "A/1|B/0", of the first there.
    suffix: that of another model's experiments."""
    for one in where.replace("/", f"{suffix}/").split("|"):
        files = sorted(folder.glob(f"{one}-*.json"), key=lambda f: int(f.stem.split("-")[1]))
        if files:
            return [tables.read_results(file) for file in files]
    return []


def table(rows, columns, below=""):
    """Markdown: a row for each (title, runs) that has runs, a cell for each (heading, function of
    the runs); a line below it, then where the runs come from. '' for no row."""
    rows = [(title, runs) for title, runs in rows if runs]
    cells = [[title + machine(runs), *(cell(runs) for _, cell in columns)] for title, runs in rows]
    return listed(["", *(heading for heading, _ in columns)], cells, [r for _, r in rows], below)


def machine(runs):
    """' (H200)', of runs on a GPU; '' on a CPU."""
    processor = runs[0]["environment"]["processor"]
    return f" ({processor.removeprefix('NVIDIA ')})" if "NVIDIA" in processor else ""


def listed(header, rows, used, below=""):
    """Markdown of rows of cells; below it a line, and where the used [runs, …] come from. '' for no
    row."""
    if not rows:
        return ""
    lines = [row(header), "|" + "---|" * len(header), *map(row, rows)]
    return "\n".join(lines) + "\n\n" + paragraph(below, provenance(used))


def row(cells):
    """A line of a Markdown table."""
    return re.sub(r"\|  (?=\|)", "| ", "| " + " | ".join(cells) + " |")


def paragraph(*sentences):
    """Sentences as lines of a text."""
    return textwrap.fill(" ".join(filter(None, sentences)), 118, break_long_words=False,
                         break_on_hyphens=False) + "\n"


def provenance(used):
    """One sentence a model and machine: commands, commits, seeds, minutes of these [runs, …]."""
    groups = {}
    for results in itertools.chain(*used):
        e = results["environment"]
        cores = f", {e['threads']} core" + "s" * (e["threads"] > 1)
        cores = "" if "NVIDIA" in e["processor"] else cores
        text = OTHER_TEXTS.get(e.get("text_sha256"), "")
        where = (f"{e['model']} on {e['processor'].removeprefix('NVIDIA ')}{cores}{text}, "
                 f"{results['config']['dtype']}")
        groups.setdefault(where, []).append(results)
    return " ".join(f"{where}: {made_by(runs)}." for where, runs in groups.items())


def made_by(runs):
    """Commands, commits, seeds and minutes of runs, in words."""
    seeds = {}
    for r in runs:
        seeds.setdefault(command_of(r["config"]), set()).add(r["config"]["seed"])
    commits = sorted({commit_of(r) for r in runs})
    minutes = list(map(minutes_of, runs))
    spent = " to ".join(dict.fromkeys(f"{f(minutes):.1f}" for f in (min, max)))
    return (f"{commands(list(seeds))}; commit{plural(commits)}; {told_seeds(seeds)}; "
            f"{spent} minutes a run")


def minutes_of(results):
    """What a run's stages took: without reading, writing and --interpolate."""
    return sum(results["seconds"].values()) / 60


def told_seeds(seeds):
    """Of {command: its seeds}, in words.

    >>> told_seeds({"a": {0, 1, 2}, "b": {0, 1, 2}})
    'seeds 0, 1, 2'
    >>> told_seeds({"a": {0, 1, 2}, "b": {0}, "c": {0}})
    'seeds 0, 1, 2 of 1 command, seed 0 of 2'
    """
    found = collections.Counter(tuple(sorted(s)) for s in seeds.values())
    told = [f"seed{plural(those)}" for those in found]
    if len(found) > 1:
        told = [f"{words} of {n}" for words, n in zip(told, found.values())]
        first = next(iter(found.values()))
        told[0] += " command" + "s" * (first > 1)
    return ", ".join(told)


def plural(found):
    """What follows a noun: its plural's s where there are several, and what was found.

    >>> plural([0, 1])
    's 0, 1'
    """
    return "s" * (len(found) > 1) + " " + ", ".join(map(str, found))


def commands(found):
    """Command lines as what they share, then each one's own options; of more than six, which
    values of which options they combine.

    >>> commands(["python train.py --seed 1 --lr 2", "python train.py --lr 3 --seed 1"])
    '`python train.py --seed 1` with `--lr 2` or `--lr 3`'
    >>> commands(["python train.py", "python train.py --lr 3"])
    '`python train.py` as it is or with `--lr 3`'
    >>> commands([f"python train.py --lr {i}" for i in range(7)] + ["python train.py --plain"])
    '`python train.py` with 8 combinations of `--lr 0 | 1 | 2 | 3 | 4 | 5 | 6`, `--plain`'
    """
    split = [command.split(" --")[1:] for command in dict.fromkeys(found)]
    shared = [option for option in split[0] if all(option in options for options in split)]
    shown = f"`{' --'.join(['python train.py', *shared])}`"
    own = [[option for option in options if option not in shared] for options in split]
    if len(own) > 6:
        values = {}
        for name, _, value in (option.partition(" ") for option in itertools.chain(*own)):
            values.setdefault(name, {})[value] = None
        told = (f"`--{name} {' | '.join(those)}".strip() + "`" for name, those in values.items())
        return f"{shown} with {len(own)} combinations of {', '.join(told)}"
    if len(own) > 1:
        shown += " as it is or" if [] in own else ""
        shown += " with " + " or ".join(f"`--{' --'.join(options)}`" for options in own if options)
    return shown


# Cells: functions of runs that differ in their seed.

def value(runs, metric, stage="recovered", each=False):
    """A metric's mean ± standard error at a stage, '' where a run lacks it; each: and every run's
    value in brackets."""
    if not runs or any(metric not in r["stages"].get(stage, {}) for r in runs):
        return ""
    found = [r["stages"][stage][metric] for r in runs]
    shown = mean_and_error(found, 2 if metric.startswith("perplexity") else 1)
    return shown + (f" ({', '.join(f'{v:.0f}' for v in found)})" if each and found[1:] else "")


def on_the_way(runs, metric, stages=("healthy", "degraded", "recovered"), each=False):
    """'healthy → degraded → recovered'."""
    found = [value(runs, metric, stage) for stage in stages[:-1]]
    found.append(value(runs, metric, stages[-1], each))
    return " → ".join(filter(None, found))


def beyond(runs, metric, stage):
    """Whether accuracy at this stage is above the healthy model's by more than noise; it is where
    it cannot be said, of perplexity or where no examples were kept."""
    known = all(metric in r.get("items", {}).get(s, {}) for r in runs for s in ("healthy", stage))
    if metric.startswith("perplexity") or not known:
        return True
    lead, noise = lead_of((runs, stage), (runs, "healthy"), metric)
    return lead > noise


def lead_of(one, other, metric):
    """(one's accuracy less the other's, half the width of its 95 % interval), of (runs, stage)
    each, of the seeds that both have: two standard errors of the examples, and Student's t of the
    seeds, both paired, the two added in square. Of one seed: its examples' alone."""
    seeds = set.intersection(*({r["config"]["seed"] for r in runs} for runs, _ in (one, other)))
    if not seeds:
        return 0.0, math.inf
    a, b = (np.array([list(r["items"][stage][metric]) for r in runs
                      if r["config"]["seed"] in seeds], float)
            for runs, stage in (one, other))  # [seeds, examples], by seed
    of_examples, of_each_seed = (a - b).mean(0), (a - b).mean(1)
    examples = 2 * of_examples.std(ddof=1) / len(of_examples) ** 0.5
    of_seeds = tables.of_seeds(of_each_seed) if len(a) > 1 else 0.0
    return of_each_seed.mean(), math.hypot(examples, of_seeds)


def back(results, metric="perplexity", stage="recovered"):
    """(recovered - degraded) / (healthy - degraded), though the damage be within noise."""
    healthy, degraded, recovered = (
        results["stages"][s][metric] for s in ("healthy", "degraded", stage))
    return 0.0 if recovered == degraded else (recovered - degraded) / (healthy - degraded)


def fraction(runs, metric="perplexity", each=False):
    """The mean of `back`; each: and of every run in brackets."""
    found = [back(r, metric) for r in runs]
    shown = mean_and_error(found, 2)
    return shown + (f" ({', '.join(f'{v:.2f}' for v in found)})" if each and found[1:] else "")


def likeness(runs, level, stages=("degraded", "recovered"), kind="linear_debiased"):
    """CKA of the last layer at these stages; of the runs with the most samples alone, since fewer
    give another CKA."""
    most, found = max(r["config"]["cka_samples"] for r in runs), []
    runs = [r for r in runs if r["config"]["cka_samples"] == most]
    for stage in stages:
        of_stage = [r["cka"].get(level, {}).get(stage) for r in runs]
        if all(of_stage):
            found.append(mean_and_error([kinds[kind][-1] for kinds in of_stage], 3))
    return " → ".join(found)


def kept_steps(runs):
    """Which step's weights were kept, run by run."""
    return ", ".join(str(r["guard"]["recovered"]["kept"]) for r in runs)


def held_out(runs):
    """The loss on held-out prompts at the last check."""
    return mean_and_error([r["guard"]["recovered"]["checks"][-1]["all"] for r in runs], 3)


def number(runs):
    """n: how many runs."""
    return str(len(runs))


def verdict(runs, metric, stage="recovered"):
    """A line on a recovery by a rule: what most seeds' `change` says (two paired standard errors
    over the items), whether most had lost anything, then against what was lost, and the healthy
    model."""
    changes = [r["change"].get(stage, {}).get(metric) for r in runs]
    if not any(changes):
        return ""
    word, seeds = collections.Counter(filter(None, changes)).most_common(1)[0]
    if seeds * 2 <= len(changes):
        return "seeds disagree"
    if word != "better":
        return "worse than before" if word == "worse" else "within noise"
    healthy, degraded, now = (sum(r["stages"][s][metric] for r in runs) / len(runs)
                              for s in ("healthy", "degraded", stage))
    sign = -1 if metric.startswith("perplexity") else 1
    if sign * (now - degraded) <= 0:
        return "within noise"
    spared = [evaluate.recovered_fractions(r)[stage].get(metric, 1.0) is None for r in runs]
    if sum(spared) * 2 > len(runs):
        return "better, though it was not damaged"
    whole = sign * (now - healthy) >= 0
    if whole and beyond(runs, metric, stage):
        return "better than healthy" if sign < 0 else "above healthy"
    won, lost = (f"{abs(x - degraded):.{2 if sign < 0 else 1}f}" for x in (now, healthy))
    return f"recovers: {'all' if whole else won} of {lost} lost"


