"""What RESULTS.md and README.md say of the runs in results/ (kept.py): tables, claims, pictures.

`python experiments.py report results/` writes each table anew between its two lines in the text,
<!-- table NAME --> and <!-- end -->, and the pictures in figures/. A further table is a function of
the results' folder in TABLES, and its two lines. Where none of its files is there, what stands
between the lines stays. A test holds the texts to the files.
"""
import re
from functools import partial

import numpy as np

import data
import evaluate
import fronts
import pictures
import tables
from kept import (
    RESULTS,
    ROOT,
    command_of,
    fraction,
    held_out,
    kept_steps,
    lead_of,
    likeness,
    listed,
    machine,
    minutes_of,
    number,
    on_the_way,
    paragraph,
    provenance,
    row,
    runs_of,
    table,
    value,
    verdict,
)

FIGURES = ROOT / "figures"
PART = re.compile(r"(<!-- table (\S+) -->\n)(.*?)(<!-- end -->)", re.S)
QWEN = "Qwen"
MODELS = {"SmolLM2": "", QWEN: "-qwen"}  # name in a table -> what follows an experiment's name


# ----------------------------------------------------------------------------------- The two texts

def write():
    """RESULTS.md, README.md and the pictures from results/; ValueError for an unknown table."""
    paths = [ROOT / name for name in ("RESULTS.md", "README.md")]
    texts = [filled(path.read_text(encoding="utf-8"), RESULTS) for path in paths]
    for path, text in zip(paths, texts):
        path.write_text(text, encoding="utf-8")
        print(path)
    draw(RESULTS, FIGURES)


def filled(text, folder):
    """The text with each of its parts written anew from this folder's results."""
    def part(found):
        """One part, between its two lines; ValueError for an unknown table."""
        begin, name, old, end = found.groups()
        if name == "claims":
            new = claims(folder, old)
        elif name in TABLES:
            new = TABLES[name](folder)
        else:
            raise ValueError(f"<!-- table {name} -->: claims.TABLES has no such table")
        return begin + (new or old) + end
    return PART.sub(part, text)


# ----------------------------------------------------------- The tables of the step and the teacher

SHORT = [("science_phrasing %", partial(value, metric="science_phrasing")),
         ("science_element %", partial(value, metric="science_element")),
         ("perplexity's fraction", fraction)]
LIKENESS = [("CKA, tokens", partial(likeness, level="tokens", stages=("recovered",))),
            ("CKA, samples", partial(likeness, level="samples", stages=("recovered",)))]


def rows_of(folder, *wanted):
    """[(title, runs), …] of (title, EXPERIMENT/NUMBER) pairs."""
    return [(title, runs_of(folder, where)) for title, where in wanted]


def each_number(folder, experiment):
    """[runs, …] of an experiment, number by number."""
    numbers = {int(f.stem.split("-")[0]) for f in folder.glob(f"{experiment}/*.json")}
    return [runs_of(folder, f"{experiment}/{n}") for n in sorted(numbers)]


def rows_by_damage(folder, model, experiment):
    """[(model and damage, runs), …] of an experiment."""
    return [(f"{model}, `{runs[0]['config']['degrade']}`", runs)
            for runs in each_number(folder, experiment)]


def default_table(folder):
    """The default run on both models."""
    rows = rows_of(folder, ("SmolLM2, `int4`", "default/0"), ("SmolLM2, `nf4`", "default/1"),
                   ("SmolLM2, `ffn10`", "default/2"), ("Qwen, `int4`", "default-qwen/0"),
                   ("Qwen, `nf4`", "default-qwen/1"),
                   ("Qwen, `ffn10`", "default-qwen/2"),
                   ("Qwen, `nf4`", "default-qwen-cpu/1"),
                   ("Qwen, `ffn10`", "default-qwen-cpu/2"))
    return table(rows, [
        ("science_phrasing %", partial(on_the_way, metric="science_phrasing", each=True)),
        ("science_element %", partial(on_the_way, metric="science_element", each=True)),
        ("perplexity", partial(on_the_way, metric="perplexity")),
        ("its fraction", partial(fraction, each=True)),
        ("CKA over tokens", partial(likeness, level="tokens")),
        ("CKA over samples", partial(likeness, level="samples"))])


def damages_table(folder):
    """Other damages, both models, and how often CKA rose."""
    rows = []
    for model, experiment in ((QWEN, "damages-qwen"), ("SmolLM2", "damages"), ("SmolLM2", "fp4"),
                              (QWEN, "fp4-qwen")):
        rows += rows_by_damage(folder, model, experiment)
    return table(rows, [
        ("science_phrasing %", partial(on_the_way, metric="science_phrasing")),
        ("perplexity", partial(on_the_way, metric="perplexity")),
        ("its fraction", partial(fraction, each=True)),
        ("CKA over tokens", partial(likeness, level="tokens")),
        ("CKA over samples", partial(likeness, level="samples"))], rises(rows))


def untaught_table(folder):
    """What the default recovery does to two things that it does not teach, both models."""
    rows = rows_of(folder, ("SmolLM2, `nf4`", "untaught/1"), ("Qwen, `nf4`", "untaught-qwen/1"),
                   ("Qwen, `nf4`, a third of the step", "untaught-qwen/2"))
    return table(rows, [
        *((evaluate.metric_title(metric), partial(on_the_way, metric=metric, each=True))
          for metric in ("science_phrasing", "instructions_all", "tooluse_request")),
        ("instructions", partial(verdict, metric="instructions_all")),
        ("tool calls", partial(verdict, metric="tooluse_request"))])


def rises(rows):
    """In how many rows the mean CKA after recovery is above that before, in words."""
    found = {}
    for level in ("tokens", "samples"):
        means = [[sum(r["cka"][level][stage]["linear_debiased"][-1] for r in runs)
                  for stage in ("degraded", "recovered")] for _, runs in rows]
        found[level] = sum(after > before for before, after in means)
    return (f"CKA over tokens rises in {found['tokens']} of these {len(rows)} rows, over samples "
            f"in {found['samples']}.")


def scales_table(folder):
    """One step size for all matrices, and each its own."""
    rows = rows_of(folder, ("SmolLM2, `int4`, one scale", "one-scale/0"),
                   ("SmolLM2, `int4`, each its own", "default/0"),
                   ("Qwen, `nf4`, one scale", "one-scale/1"),
                   ("Qwen, `nf4`, each its own", "own-scale/1"),
                   ("Qwen, `ffn10`, one scale", "one-scale/2"),
                   ("Qwen, `ffn10`, each its own", "default-qwen/2"))
    return table(rows, [*SHORT, ("held-out loss, last step", held_out),
                        ("kept, by seed", kept_steps)])


def rates_table(folder):
    """Fractions of the weights' size as learning rates, run by run, smallest first."""
    rows = []
    for title, *places in (("SmolLM2, `nf4`", "rates/*", "default/1-0"),
                           ("Qwen, `nf4`", "rates-qwen/*", "default-qwen/1-0"),
                           ("Qwen, `ffn10`", "rates-ffn-qwen/*", "default-qwen/2-0"),
                           ("SmolLM2, `int4`", "tenfold/*"),
                           ("Qwen, `nf4`", "tenfold-qwen/*")):
        files = [file for place in places for file in folder.glob(f"{place}.json")]
        runs = sorted(map(tables.read_results, files), key=lambda r: (
            r["config"]["lr_fraction"], r["config"]["seed"]))
        rows += [(title, [r]) for r in runs]
    return table(rows, [
        ("fraction", asked_rate),
        ("rate on average", lambda runs: f"{runs[0]['environment']['lr']:.1e}"),
        *SHORT, ("held-out loss, first → last step", first_and_last), ("kept", kept_steps)])


def asked_rate(runs):
    """--lr, or the fraction of the weights' size."""
    config = runs[0]["config"]
    return f"`--lr {config['lr']:g}`" if config["lr"] else f"{config['lr_fraction']:.1e}"


def first_and_last(runs):
    """The loss on held-out prompts at the first and the last check of the first run."""
    checks = runs[0]["guard"]["recovered"]["checks"]
    return f"{checks[0]['all']:.3f} → {checks[-1]['all']:.3f}"


def teachers_table(folder):
    """Right answers of the healthy model, by what it is shown."""
    found, rows = {}, []
    for experiment in ("teachers", "teachers-qwen"):
        for file in sorted(folder.glob(f"{experiment}/*.json")):
            results = tables.read_results(file)
            found[experiment, results["config"]["demo"]] = results
    for title, demo, shown in (("`none`: not shown", "turn", "bare"),
                               ("`quote`: after the question", "quote", "shown"),
                               ("`turn`: as an earlier turn", "turn", "shown")):
        cells = [found[e, demo]["teacher"]["healthy"][task][shown] if (e, demo) in found else None
                 for e in ("teachers", "teachers-qwen") for task in ("science", "tooluse")]
        rows.append([title, *("" if cell is None else f"{cell:.0f}" for cell in cells)])
    header = ["`--demo`", "SmolLM2, science", "SmolLM2, tools", "Qwen, science",
              "Qwen, tools"]
    return listed(header, rows if found else [], [found.values()])


def demos_table(folder):
    """Recoveries by the two forms of the demonstration."""
    rows = rows_of(folder, ("SmolLM2, `nf4`, `turn`", "default/1"),
                   ("SmolLM2, `nf4`, `quote`", "demos/0"),
                   ("SmolLM2, `nf4`, `turn`", "demos-gpu/1"),
                   ("SmolLM2, `nf4`, `quote`", "demos-gpu/0"),
                   ("Qwen, `nf4`, `turn`", "default-qwen/1"),
                   ("Qwen, `nf4`, `quote`", "demos-qwen/0"))
    return table(rows, SHORT + LIKENESS)


def text_table(folder):
    """How much of a text its prompts have."""
    rows = rows_of(folder, ("16 tokens", "text/0"), ("32 tokens", "text/1"),
                   ("48 tokens, the default", "text/2"),
                   ("48 tokens, the default", "default/0"))
    return table(rows, SHORT)


def refusals_table(folder):
    """Whose trained weights the guard did not keep, and why."""
    rows = []
    for title, place in (("SmolLM2, `nf4`", "rates"), ("Qwen, `nf4`", "rates-qwen"),
                         ("Qwen, `ffn10`", "rates-ffn-qwen"), ("SmolLM2, `int4`", "tenfold"),
                         ("Qwen, `nf4`", "tenfold-qwen"), ("SmolLM2, `int4`", "huge"),
                         ("Qwen, `nf4`", "huge-qwen")):
        for file in sorted(folder.glob(f"{place}/*.json")):
            results = tables.read_results(file)
            if not results["guard"]["recovered"]["kept"]:
                rows.append((title, [results]))
    return table(rows, [("fraction", asked_rate), ("loss, first → last check", first_and_last),
                        ("kept", kept_steps), ("why", refused_for)])


def refused_for(runs):
    """Why no step's weights were kept, in words."""
    found = runs[0]["guard"]["recovered"]
    worse = dict.fromkeys(task for check in found["checks"] for task in check.get("worse", []))
    if found["ended"]:
        return "ended at " + found["ended"].split(" (")[0]
    return f"worse on {', '.join(worse)}" if worse else "no check below the first"


def guard_table(folder):
    """What the guard's checks and their preparation take, of the first run."""
    def seconds(runs):
        spent, whole = runs[0]["guard"]["recovered"]["seconds"], sum(runs[0]["seconds"].values())
        return f"{spent:.0f} of {whole:.0f}, {100 * spent / whole:.1f} %"
    rows = [(title, runs[:1]) for title, runs in rows_of(folder, ("SmolLM2, `int4`", "default/0"))]
    return table(rows, [("seconds, of the whole run's", seconds)])


def minutes_table(folder):
    """Of each experiment the number whose runs on two cores of a CPU took longest, seed by seed;
    the longest first."""
    found, longest = {}, {}
    for file in sorted(folder.glob("*/*-*.json")):
        results = tables.read_results(file)
        if results["environment"]["threads"] == 2 and not machine([results]):
            where = f"{file.parent.name}/{file.stem.split('-')[0]}"
            found.setdefault(where, []).append(results)
    for where in sorted(found, key=lambda where: -max(map(minutes_of, found[where]))):
        longest.setdefault(where.split("/")[0], where)
    rows = [(f"`{where}`", found[where]) for where in longest.values()]
    return table(rows, [
        ("minutes, by seed", lambda runs: ", ".join(f"{minutes_of(r):.1f}" for r in runs)),
        ("peak memory, GiB",
         lambda runs: f"{max(r['environment']['peak_memory_gib'] for r in runs):.1f}")])


def lora_table(folder):
    """LoRA's recovery."""
    return table(rows_of(folder, ("SmolLM2, `int4`, `--lora 16`", "lora/0"),
                         ("Qwen, `nf4`, `--lora 16`", "lora-qwen/0")), SHORT)


# ------------------------------------------------------------------------------ The paper's tables

NF4_GENERAL = "3B 67.1 → 66.0 → 66.3; 7B 71.1 → 70.1 → 70.9"  # Table 3, whatever is taught
PAPER = {  # experiment, taught on -> metric's beginning -> the paper's numbers
    ("table2", "science"): {"science": "3B 31.8 → 30.4 → 45.4; 7B 33.9 → 33.0 → 52.3",
                            "general": NF4_GENERAL},
    ("table2", "tooluse"): {"tooluse": "3B 29.2 → 28.7 → 50.5; 7B 42.4 → 41.6 → 62.9",
                            "general": NF4_GENERAL},
    ("table4", "science"): {"science": "7B 38.8 → 33.7 → 43.4",
                            "tooluse": "7B 29.9 → 28.5 → 33.0",
                            "general": "7B 66.2 → 59.1 → 57.7"},
    ("table4", "tooluse"): {"tooluse": "7B 29.9 → 28.5 → 34.1",
                            "science": "7B 38.8 → 33.7 → 35.8",
                            "general": "7B 66.2 → 59.1 → 63.7"}}
GENERAL = "blimp_all", "arc_easy_all", "winogrande_all"  # Table 3's test sets here


COMPRESSIONS = {  # taught on science, on tool calls: where the runs are, or the same by default
    "table2": ("table2/0|default/1", "table2/1"), "table4": ("table4/0|default/2", "table4/1")}


def compression_table(folder, experiment):
    """Tables 2, 3 or 4: a row for each model, task that brings back, and metric; beside it what the
    undamaged model comes to by the same training."""
    rows, used = [], []
    for model, suffix in MODELS.items():
        for n, task in enumerate(("science", "tooluse")):
            runs = with_mean(runs_of(folder, COMPRESSIONS[experiment][n], suffix))
            sound = with_mean(runs_of(folder, f"control/{n}", suffix)) if runs else []
            used += runs, sound
            theirs = PAPER[experiment, task]
            for metric in runs[0]["stages"]["healthy"] if runs else ():
                way = [value(runs, metric, s) for s in ("healthy", "degraded", "recovered")]
                rows.append([f"{model}, {task}", evaluate.metric_title(metric), *way,
                             few(sound, value(sound, metric)), number(runs),
                             verdict(runs, metric), theirs.get(metric.split("_")[0], "")])
    header = ["taught on", "metric", "healthy", "degraded", "recovered", "undamaged, trained alike",
              "n", "verdict", "the paper"]
    return listed(header, rows, used)


FACTS = "symbols", "numbers", "names"  # what science_phrasing asks for, in turn


def kinds_table(folder):
    """Of science_phrasing, each kind of fact by itself, as its items were kept: before, after."""
    rows, used = [], []
    for model, suffix in MODELS.items():
        for title, where, stages in (
                ("healthy", "table2/0", ["healthy"]),
                ("undamaged, trained alike", "control/0", ["recovered"]),
                ("NF4", "table2/0", ["degraded", "recovered"]),
                ("a tenth of the FFN", "table4/0", ["degraded", "recovered"]),
                ("science expert", "table1/0", ["healthy"]),
                ("SFT on tool calls, t = base", "table1/0", ["degraded", "recovered_base"]),
                ("the same, t = expert", "table1/0", ["degraded", "recovered_healthy"])):
            runs = runs_of(folder, where, suffix)
            if runs:
                used.append(runs)
                rows.append([f"{model}, {title}",
                             *(" → ".join(of_kind(runs, stage, k) for stage in stages)
                               for k in range(len(FACTS))), number(runs)])
    return listed(["", *(f"{kind} %" for kind in FACTS), "n"], rows, used)


def of_kind(runs, stage, k):
    """The accuracy on facts of the k-th kind, its mean ± standard error; with --eval-limit on those
    that were asked."""
    found, every = [], len(data.TASKS["science"]().eval["phrasing"])
    for r in runs:
        items = r["items"][stage]["science_phrasing"]
        asked = evaluate.spread(range(every), len(items))
        found.append(100 * np.mean([int(c) for c, i in zip(items, asked) if i % len(FACTS) == k]))
    return tables.mean_and_error(found, 1)


def few(runs, cell):
    """A cell of other runs than its row's, with n where they are not three."""
    return f"{cell} (n = {len(runs)})" if cell and len(runs) != 3 else cell


def with_mean(runs):
    """The runs; where all of the general tests were measured, with their mean as one more."""
    for results in runs:
        if all(metric in results["stages"]["healthy"] for metric in GENERAL):
            for values in results["stages"].values():
                values["general_mean"] = sum(values[m] for m in GENERAL) / len(GENERAL)
            for stage, changes in results["change"].items():
                changes["general_mean"] = change_of_mean(results["items"], stage)
    return runs


def change_of_mean(items, stage):
    """`evaluate.change` of the general tests' mean from the degraded model to this stage: "better",
    "worse" or "same", by two paired standard errors."""
    mean, square = 0.0, 0.0
    for metric in GENERAL:
        now, before = (np.array(list(items[s][metric]), float) for s in (stage, "degraded"))
        mean += (now - before).mean() / len(GENERAL)
        square += (now - before).var(ddof=1) / len(now) / len(GENERAL) ** 2
    noise = 2 * square ** 0.5
    return "better" if mean > noise else "worse" if mean < -noise else "same"


FORGETTING = [  # stage, where, its name, the paper's Tooluse, Science, CKA (Sci), CKA (Tool)
    ("base", "table1/0", "base", ""),
    ("healthy", "table1/0", "science expert", "19.6, 60.0, 1, 1"),
    ("degraded", "table1/0", "+ SFT on tool calls", "65.0, 37.9, .977, .939"),
    ("recovered_base", "table1/0", "+ recovery, t = base", "66.0, 61.5, .991, .943"),
    ("recovered_healthy", "table1/0", "+ recovery, t = expert", "57.7, 65.5, .988, .941"),
    ("healthy", "table1/1", "second run: science expert", ""),
    ("degraded", "table1/1", "+ SFT on tool calls", ""),
    ("recovered", "table1/1", "+ recovery, t = expert, bare", "")]
AT_DEFAULT_RATE = [  # the first run, from the expert on
    (stage, where.replace("table1", "table1_rate"), title, theirs)
    for stage, where, title, theirs in FORGETTING[1:5]]


def forgetting_table(folder, wanted):
    """Tables 1, 6 and 7: these rows, in FORGETTING's form, of both models."""
    rows, used = [], []
    for model, suffix in MODELS.items():
        for stage, where, title, theirs in wanted:
            runs = runs_of(folder, where, suffix)
            used.append(runs)
            if runs:
                rows.append([f"{model}, {title}", *forgetting_cells(runs, stage), number(runs),
                             verdict(runs, "science_phrasing", stage),
                             verdict(runs, "tooluse_request", stage), theirs])
    header = ["stage", "tool calls %", "science_phrasing %", "science_element %", "perplexity",
              "CKA, science samples", "CKA, tool samples", "CKA, tokens", "n", "verdict, science",
              "verdict, tools", "the paper, 3B: tools, science, CKA of science, of tools"]
    return listed(header, rows, used)


def forgetting_cells(runs, stage):
    """Performance and CKA (linear, debiased, last layer) at one stage."""
    metrics = "tooluse_request", "science_phrasing", "science_element", "perplexity"
    levels = "samples", "tooluse samples", "tokens"
    return [*(value(runs, metric, stage) for metric in metrics),
            *(likeness(runs, level, (stage,)) for level in levels)]


BOOTSTRAP_STAGES = [  # name, which of the task's two runs, stage
    ("small", 0, "healthy"), ("direct", 0, "recovered"),
    ("two-stage, after the first", 1, "healthy"), ("two-stage, at the end", 1, "recovered")]
BOOTSTRAP = {  # task -> its metric, the number of its first run, the paper's 3B at these stages
    "science": ("science_phrasing", 0, ("30.8", "54.2", "", "63.1")),
    "tooluse": ("tooluse_request", 2, ("32.0", "50.5", "", "67.0"))}


def bootstrap_table(folder):
    """Table 5: a small model, itself as teacher, and a larger one first; taught on each task."""
    rows, used = [], []
    metrics = "science_phrasing", "science_element", "tooluse_request", "perplexity"
    for model, suffix in MODELS.items():
        for task, (metric, n, theirs) in BOOTSTRAP.items():
            runs = [runs_of(folder, f"table5/{n + k}", suffix) for k in (0, 1)]
            if not all(runs):
                continue
            used += runs
            verdicts = "", "", "", f"{staged_against(*runs, metric)} direct"
            for (title, k, stage), said, paper in zip(BOOTSTRAP_STAGES, verdicts, theirs):
                rows.append([f"{model}, {task}: {title}", *(
                    value(runs[k], m, stage) for m in metrics), number(runs[k]), said, paper])
    header = ["taught on", *map(evaluate.metric_title, metrics), "n", "verdict", "the paper, 3B"]
    return listed(header, rows, used)


def staged_against(direct, staged, metric):
    """Where two stages end against one: "better than", "worse than" or "within noise of" it."""
    lead, noise = lead_of((staged, "recovered"), (direct, "recovered"), metric)
    return "within noise of" if abs(lead) <= noise else "better than" if lead > 0 else "worse than"


WAYS = ("sdft", "SDFT"), ("kd", "KD"), ("sft", "SFT")


def baselines_table(folder):
    """Damages, each brought back in three ways."""
    def cell(runs, metric, way):
        stage = f"recovered_{way}"
        said = verdict(runs, metric, stage).replace("recovers: ", "")
        return value(runs, metric, stage) + (f" ({said})" if said else "")
    rows, used = [], []
    for model, suffix in MODELS.items():
        for n in range(4):
            runs = runs_of(folder, f"baselines/{n}", suffix)
            used.append(runs)
            for metric in runs[0]["stages"]["healthy"] if runs else ():
                rows.append([f"{model}, `{runs[0]['config']['degrade']}`",
                             evaluate.metric_title(metric), value(runs, metric, "healthy"),
                             value(runs, metric, "degraded"),
                             *(cell(runs, metric, way) for way, _ in WAYS), number(runs)])
    header = ["damage", "metric", "healthy", "degraded", *(name for _, name in WAYS), "n"]
    return listed(header, rows, used)


def settings_table(folder):
    """One option changed at a time, both models."""
    rows = []
    for model, suffix in MODELS.items():
        rows += [(f"{model}, the default", runs_of(folder, f"{where}/0", suffix))
                 for where in ("default", "default-gpu")]
        for runs in each_number(folder, f"settings{suffix}"):
            config = runs[0]["config"] | {"degrade": "none", "model": ""}
            option = command_of(config).replace("python train.py --degrade none", "").strip()
            rows.append((f"{model}, `{option}`", runs))
    if not any("`" in title for title, runs in rows if runs):
        return ""
    return table(rows, [*SHORT, *LIKENESS, ("n", number), (
        "verdict, science", partial(verdict, metric="science_phrasing"))])


def read_all(folder, *experiments):
    """The runs of these experiments as tables.py has them, of those that are there."""
    there = [folder / name for name in experiments if any((folder / name).glob("*-*.json"))]
    return tables.read_runs(there) if there else []


def runs_table(folder, make, experiments, only=None):
    """One of tables.py's tables of these experiments' runs, of those alone that only() holds of."""
    runs = [run for run in read_all(folder, *experiments) if not only or only(run[-1])]
    made, results = runs and make(runs), {id(r): r for _, _, r in runs}
    return made + "\n\n" + paragraph(provenance([results.values()])) if made else ""


def on_science(results):
    """Whether a recovery of this run was measured on its way, and CKA over science."""
    return bool(results["along"]) and results["config"]["data"].startswith("science")


def along_table(folder):
    """Recoveries that were measured on their way, a row a damage: r seed by seed."""
    rows = []
    for model, suffix in MODELS.items():
        rows += rows_by_damage(folder, model, f"along{suffix}")
    return table(rows, [
        ("science_phrasing %", partial(on_the_way, metric="science_phrasing")),
        ("perplexity", partial(on_the_way, metric="perplexity")),
        ("CKA over tokens", partial(likeness, level="tokens")),
        ("CKA over samples", partial(likeness, level="samples")),
        ("r, tokens", partial(r_by_seed, level="tokens")),
        ("r, samples", partial(r_by_seed, level="samples"))])


def r_by_seed(runs, level):
    """Pearson's r of CKA (last layer, debiased) with perplexity on the way of each run."""
    found = []
    for results in runs:
        way = [point for _, *point in tables.way_of("recovered", results)]
        found.append(tables.way_r(way, level, "linear_debiased", "last", "perplexity"))
    return ", ".join(f"{r:.2f}" for r in found)


def has_unit_norm(results):
    """Whether this run compared rows of unit norm, too, of science, and is one of a sweep or one
    that was measured on its way."""
    config = results["config"]
    there = any("unit_debiased" in kinds for stages in results["cka"].values()
                for kinds in stages.values())
    return there and (config["recover"] == "none" or on_science(results))


def sweep_performance(runs):
    """The damages of a sweep: performance and CKA, a row a damage, the mildest first."""
    rows = {}
    for _, _, results in sorted(runs, key=lambda run: run[-1]["stages"]["degraded"]["perplexity"]):
        alone = results["config"] | {"model": "", "recover": "sdft", "eval_limit": 0}
        damage = command_of(alone).removeprefix("python train.py --degrade ")
        rows.setdefault(damage, []).append(results)
    metrics = list(runs[0][2]["stages"]["healthy"])
    header = ["damage", *map(evaluate.metric_title, metrics), "CKA, samples", "CKA, tokens", "n"]
    lines = [row(header), "|" + "---|" * len(header)]
    lines.append(row(["healthy", *(value([runs[0][2]], m, "healthy") for m in metrics), "1", "1",
                      ""]))
    for damage, found in rows.items():
        cka = [likeness(found, level, ("degraded",)) for level in ("samples", "tokens")]
        lines.append(row([f"`{damage}`", *(value(found, m, "degraded") for m in metrics), *cka,
                          number(found)]))
    return "\n".join(lines)


def per_model(name, make, *experiments, only=None):
    """{table's name: function of the folder}, for SmolLM2 and, with its suffix, for Qwen."""
    return {name + suffix: partial(runs_table, make=make, only=only, experiments=[
        experiment + suffix for experiment in experiments]) for suffix in MODELS.values()}


RECOVERIES = "default", "damages", "fp4", "table1", "table2", "table4", "baselines", "along"
FAIR = "fair", "fair_damaged", "fair_science"
TABLES = {  # name in <!-- table NAME --> -> function of the folder of results
    "default": default_table, "damages": damages_table, "untaught": untaught_table,
    "scales": scales_table, "rates": rates_table, "teachers": teachers_table,
    "demos": demos_table, "text": text_table, "refusals": refusals_table,
    "guard": guard_table, "lora": lora_table, "minutes": minutes_table,
    "table1": partial(forgetting_table, wanted=FORGETTING),
    "table1_rate": partial(forgetting_table, wanted=AT_DEFAULT_RATE),
    "table2": partial(compression_table, experiment="table2"),
    "table4": partial(compression_table, experiment="table4"), "kinds": kinds_table,
    "table5": bootstrap_table,
    "baselines": baselines_table, "settings": settings_table,
    **per_model("sweep", sweep_performance, "sweep"),
    **per_model("correlations", tables.correlation_table, "sweep"),
    "along": along_table, **per_model("within", tables.within_table, *RECOVERIES, only=on_science),
    **per_model("follows", tables.follows_table, "sweep", *RECOVERIES, only=has_unit_norm),
    **per_model("fair-answer", fronts.answers_table, *FAIR),
    **per_model("fair-ends", fronts.ends_table, *FAIR),
    **per_model("fair", fronts.gains_table, *FAIR),
    **per_model("fair-tuned", fronts.tuned_table, *FAIR)}


# ------------------------------------------------------------------------- README's table of claims

def claims(folder, old):
    """README's table: a row for each of CLAIMS from the files; where these are not there, the row
    of this name in the old table, as it is."""
    before = {name: line for line, name in re.findall(r"^(\| ([^|]+) \|.*)$", old, re.M)}
    lines = [row(["experiment", "the paper, Qwen2.5", "here", "verdict"]), "|---|---|---|---|"]
    for name, theirs, find in CLAIMS:
        found = find(folder)
        if found:
            lines.append(row([name, theirs, *found]))
        elif name in before:
            lines.append(before[name])
    return "\n".join(lines) + "\n"


def claimed(folder, metric, where, stage="recovered", control=""):
    """(healthy → degraded → recovered of the models that are there, the verdict on each); control:
    where the undamaged model had the same training."""
    here, verdicts = [], []
    for model, suffix in MODELS.items():
        runs = with_mean(runs_of(folder, where, suffix))
        way = runs and on_the_way(runs, metric, ("healthy", "degraded", stage))
        if way:
            sound = control and runs_of(folder, control, suffix)
            here.append(few(runs, f"{model} {way}"))
            if sound:
                seeds = f", n = {len(sound)}" * (len(sound) != 3)
                here[-1] += f" (undamaged: {value(sound, metric)}{seeds})"
            verdicts.append(f"{model}: {verdict(runs, metric, stage)}")
    alike = {said.split(": ", 1)[1] for said in verdicts}
    said = alike.pop() if len(alike) == 1 else "; ".join(verdicts)
    return ("; ".join(here), said) if here else ()


def small_claim(folder, task):
    """Table 5: the small model, direct and in two stages."""
    here, verdicts, (metric, n, _) = [], [], BOOTSTRAP[task]
    for model, suffix in MODELS.items():
        direct, staged = (runs_of(folder, f"table5/{n + k}", suffix) for k in (0, 1))
        if direct and staged:
            here.append(f"{model} {value(direct, metric, 'healthy')}, direct "
                        f"{value(direct, metric)}, two-stage {value(staged, metric)}")
            verdicts.append(f"{model}: two stages are {staged_against(direct, staged, metric)} one")
    return ("; ".join(here), "; ".join(verdicts)) if here else ()


def rising_claim(folder, forgot):
    """In how many recoveries that brought perplexity back, after a forgetting or after a
    compression, CKA of the last layer rose over samples, over tokens; a recovery that was made
    twice, to be measured otherwise, counts once."""
    here, verdicts = [], []
    for model, suffix in MODELS.items():
        found = {}
        names = (experiment + suffix for experiment in (*RECOVERIES, "table1_rate"))
        for _, stage, results in read_all(folder, *names):
            config = results["config"] | {"eval_limit": 0, "cka_samples": 64, "model": ""}
            how = [w for w in config["recover"].split(",") if w in stage.split("_")]
            config["recover"] = (how or [config["recover"]])[0]
            teacher = stage.removeprefix("recovered").replace("_" + config["recover"], "")
            better = results["change"].get(stage, {}).get("perplexity") == "better"
            if better and bool(config["forget"]) is forgot:
                which = tables.name_of(config), config["seed"], teacher
                found.setdefault(which, (stage, results["cka"]))
        rose = [sum(cka[level][stage]["linear_debiased"][-1]
                    > cka[level]["degraded"]["linear_debiased"][-1]
                    for stage, cka in found.values()) for level in ("samples", "tokens")]
        if found:
            here.append(f"{model} {rose[0]}, {rose[1]} of {len(found)}")
            words = ["yes" if n > 0.75 * len(found) else "no" if n < 0.25 * len(found) else
                     "in part" for n in rose]
            verdicts.append(f"{model}: {', '.join(words)}")
    return ("; ".join(here), "; ".join(verdicts)) if here else ()


def within_claim(folder):
    """Pearson's r of CKA (last layer, debiased) with accuracy along the steps of recoveries, its
    mean over them with the interval: over samples, over tokens."""
    here, verdicts = [], []
    for model, suffix in MODELS.items():
        runs = read_all(folder, *(experiment + suffix for experiment in RECOVERIES))
        ways = tables.ways([run for run in runs if on_science(run[-1])])
        told, words = [], []
        for level in ("samples", "tokens") if ways else ():
            r, members = tables.r_of_ways(ways, level, ["linear_debiased"], "last",
                                          "science_phrasing")
            if not len(r):
                continue
            ends = ()
            if len(members) >= 5:
                ends = tables.bounds(tables.bootstrap(members, lambda i, r=r: r[i].mean()))
            told.append(tables.in_brackets(r.mean(), ends))
            low, high = ends or (-1, 1)
            words.append("yes" if low > 0 else "no" if high < 0 else "undecided")
        if told:
            here.append(f"{model} {', '.join(told)} (n = {len(r)})")
            verdicts.append(f"{model}: {', '.join(words)}")
    return ("; ".join(here), "; ".join(verdicts)) if here else ()


def order_claim(folder):
    """Spearman's r of CKA with performance between damaged models."""
    here, low = [], []
    for model, suffix in MODELS.items():
        chosen = tables.points(read_all(folder, "sweep" + suffix), ("degraded",))
        if len(chosen) >= 5:
            x = np.array([likeness["samples"]["linear_debiased"][-1]
                          for _, _, likeness, _ in chosen])
            r = []
            for metric in ("perplexity", "science_phrasing"):
                y = np.array([tables.more_is_better(v, metric) for _, v, _, _ in chosen])
                r.append(tables.spearman(x, y))
            here.append(f"{model}: Spearman {r[0]:.2f} with perplexity, {r[1]:.2f} with accuracy")
            low += r
    word = here and ("yes" if min(low) > 0.5 else "no" if max(low) <= 0 else "in part")
    return ("; ".join(here), word) if here else ()


def fair_claim(folder):
    """The answer to the question of the fair comparison, tool calls from the healthy model."""
    here, verdicts = [], []
    for model, suffix in MODELS.items():
        for (task, _), points in fronts.scenes(read_all(folder, "fair" + suffix)).items():
            if any(len(p.seeds) > 1 for p in points):  # of one seed there is no interval
                _, apart, word = fronts.answer(points, task)
                here.append(f"{model} {apart or '–'}")
                verdicts.append(f"{model}: {word}")
    return ("; ".join(here) + " points", "; ".join(verdicts)) if here else ()


CLAIMS = [  # what, the paper's numbers, (here, verdict) from a folder or () where it has no files
    ("NF4, science (Table 2)", PAPER["table2", "science"]["science"],
     partial(claimed, metric="science_phrasing", where=COMPRESSIONS["table2"][0],
             control="control/0")),
    ("a tenth of the FFN, science (Table 4)", PAPER["table4", "science"]["science"],
     partial(claimed, metric="science_phrasing", where=COMPRESSIONS["table4"][0])),
    ("a tenth of the FFN, general ability, of 300 questions a test, taught science (Table 4)",
     PAPER["table4", "science"]["general"],
     partial(claimed, metric="general_mean", where=COMPRESSIONS["table4"][0])),
    ("NF4, tool calls (Table 2)", PAPER["table2", "tooluse"]["tooluse"],
     partial(claimed, metric="tooluse_request", where=COMPRESSIONS["table2"][1],
             control="control/1")),
    ("NF4, general ability, of Qwen 300 questions a test, taught science (Table 3)", NF4_GENERAL,
     partial(claimed, metric="general_mean", where="table2/0")),
    ("forgetting, t = base, science (Table 1)", "3B 60.0 → 37.9 → 61.5",
     partial(claimed, metric="science_phrasing", where="table1/0", stage="recovered_base")),
    ("forgetting, t = expert, science (Table 1)", "3B 60.0 → 37.9 → 65.5",
     partial(claimed, metric="science_phrasing", where="table1/0", stage="recovered_healthy")),
    ("forgetting, t = base, tool calls, which are to stay (Table 1)", "3B 19.6 → 65.0 → 66.0",
     partial(claimed, metric="tooluse_request", where="table1/0", stage="recovered_base")),
    ("forgetting, t = expert, tool calls, which are to stay (Table 1)", "3B 19.6 → 65.0 → 57.7",
     partial(claimed, metric="tooluse_request", where="table1/0", stage="recovered_healthy")),
    ("a small model, science (Table 5)", "3B 30.8, direct 54.2, two-stage 63.1",
     partial(small_claim, task="science")),
    ("a small model, tool calls (Table 5)", "3B 32.0, direct 50.5, two-stage 67.0",
     partial(small_claim, task="tooluse")),
    ("other abilities at equal gain on tool calls, half of the best: SDFT less SFT",
     "promised by SDFT (2601.19897)", fair_claim),
    ("CKA of the last layer rises as a forgetting is undone (§5.4): over samples, over tokens",
     "yes", partial(rising_claim, forgot=True)),
    ("CKA of the last layer rises after compression (§5.4): over samples, over tokens", "yes",
     partial(rising_claim, forgot=False)),
    ("CKA goes with accuracy along a recovery's steps: r over samples, over tokens", "yes",
     within_claim),
    ("CKA orders damaged models (Fig. 8b)", "yes", order_claim)]


# ----------------------------------------------------------------------------------------- Pictures

def draw(folder, out):
    """PICTURES, and the fronts of the fair comparison; of the experiments that are there. Nothing
    without matplotlib."""
    pyplot = evaluate.find_pyplot()
    if pyplot is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, draw_one, *choices in PICTURES:
        runs = next(filter(None, (read_all(folder, *both(choice)) for choice in choices)), [])
        if runs:
            runs = [(re.sub(r"--model (\S+?)-\S*", r"\1", name), *rest) for name, *rest in runs]
            pictures.save(pyplot, draw_one(pyplot, runs), out / f"{name}.png")
    for suffix in MODELS.values():
        runs = read_all(folder, *(name + suffix for name in FAIR))
        if runs:
            pictures.save(pyplot, fronts.draw(pyplot, runs), out / f"fronts{suffix}.png")


def both(experiments):
    """The names of both models' experiments."""
    return [name + suffix for name in experiments for suffix in MODELS.values()]


PICTURES = [  # file, how it is drawn, of which experiments' runs: the first that are there
    ("fig6", pictures.fig6, ["default", "damages", "fp4"]),
    ("fig8a", pictures.fig8a, ["table1"], ["default"]),
    ("fig8b", pictures.fig8b, ["sweep"], ["default", "damages"]),
    ("along", pictures.along, ["along"])]
