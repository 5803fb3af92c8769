"""Runs as tables: what each recovery brought back, and how CKA goes with performance.

A run is a results.json of train.py. Kept ones are paper/results/EXPERIMENT/NUMBER-SEED.json. Sums
are `math.fsum` of the stored numbers and cells are rounded in decimal, so that every processor
prints the same text.
"""
import json
import math
import random
import re
import textwrap
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DEFAULTS = json.loads((HERE / "options.json").read_text())  # those of a6e4aea, which made the runs
SILENT = {"seed", "device", "dtype", "out", "save_every", "resume", "dry_run", "plain"}
SCIENCE, TOOLS = "science_phrasing", "tooluse_request"
HEADINGS = {SCIENCE: "science %", "science_element": "elements %", TOOLS: "tool calls %",
            "instructions_all": "instructions %", "general": "general ability %",
            "blimp_all": "BLiMP %"}
GENERAL = "blimp_all", "arc_easy_all", "winogrande_all"  # "general" is their mean


# ---------------------------------------------------------------------------------- reading runs

def read(folder):
    """[(NUMBER, SEED, results)] of the runs in a folder, sorted: kept ones, or train.py's own."""
    runs = []
    for path in [*Path(folder).glob("*-*.json"), *Path(folder).glob("*-*/results.json")]:
        name = path.parent.name if path.name == "results.json" else path.stem
        if match := re.fullmatch(r"(\d+)-(\d+)", name):
            results = json.loads(path.read_text(encoding="utf-8"))
            for values in results["stages"].values():
                if all(metric in values for metric in GENERAL):
                    values["general"] = math.fsum(values[metric] for metric in GENERAL) / 3
            runs.append((int(match[1]), int(match[2]), results))
    return sorted(runs, key=lambda run: run[:2])


def kept(where):
    """The kept results of "EXPERIMENT/NUMBER", one a seed; of "EXPERIMENT" all."""
    experiment, _, wanted = where.partition("/")
    return [results for number, _, results in read(RESULTS / experiment)
            if wanted in ("", str(number))]


def options_of(results):
    """A run's options that are not the defaults of the code that made the kept runs, as typed.

    >>> options_of({"config": {"degrade": "nf4", "data": "science,text", "symmetric": False}})
    '--degrade nf4 --no-symmetric'
    """
    words = []
    for name, value in results["config"].items():
        if name in SILENT or value == DEFAULTS.get(name):
            continue
        flag = name.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool)
                     else f"--{flag} {value}")
    return " ".join(words)


def recoveries(results):
    """The stages of a run that are recoveries."""
    return [stage for stage in results["stages"] if stage.startswith("recovered")]


# ---------------------------------------------------------------------------------------- numbers

def mean_and_error(values):
    """(the mean, its standard error; 0 for a single value).

    >>> mean_and_error([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896257)
    """
    mean = math.fsum(values) / len(values)
    square = math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(square / len(values))


def rounded(value, digits=1):
    """A number as text, halves away from zero, whatever the last bits say; "–" for none.

    >>> rounded(2.25), rounded(-6.249999999999), rounded(0.30000000000000004, 2), rounded(-0.01)
    ('2.3', '-6.3', '0.30', '0.0')
    """
    if value is None or not math.isfinite(value):
        return "–"
    text = str(Decimal(f"{value:.9g}").quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))
    return text.removeprefix("-") if not float(text) else text


def cell(values, digits=1):
    """The mean ± its standard error, which is left out where it is 0.

    >>> cell([1.0, 2.0, 3.0]), cell([4.0])
    ('2.0 ± 0.6', '4.0')
    """
    mean, error = mean_and_error(values)
    shown = rounded(error, digits)
    return rounded(mean, digits) + (f" ± {shown}" if float(shown) else "")


def verdict(runs, stage, metric):
    """"better", "worse" or "same": what most seeds say of recovered against degraded.

    A seed's word is by two paired standard errors over the test's items (train.change).
    """
    words = Counter(r["change"].get(stage, {}).get(metric, "") for r in runs)
    word, seeds = words.most_common(1)[0]
    return word if 2 * seeds > len(runs) else "seeds differ"


def was_damaged(runs, stage, metric):
    """Whether degraded is worse than healthy at most seeds, by two paired standard errors."""
    spared = 0
    for r in runs:
        fractions = r["recovered_fraction"]
        spared += fractions.get(stage, fractions)[metric] is None
    return 2 * spared < len(runs)


# ------------------------------------------------------------------------------- the generic table

def stages_of(runs, stage):
    """The stages on the way to a recovery: base only where it is not the healthy model, degraded
    only where something was damaged."""
    known = {"base": "base" in runs[0]["stages"], "healthy": True,
             "degraded": "degraded" in runs[0]["cka"]["tokens"], stage: True}
    return [name for name, there in known.items() if there]


def way(runs, stages, metric):
    """'healthy → degraded → recovered': means with their standard errors. '' without the metric."""
    if any(metric not in r["stages"][name] for r in runs for name in stages):
        return ""
    digits = 2 if metric.startswith("perplexity") else 1
    return " → ".join(cell([r["stages"][name][metric] for r in runs], digits) for name in stages)


def likeness(runs, stage, level):
    """'degraded → recovered' of CKA with the healthy model: the last layer, linear, debiased.

    Runs with fewer samples than the others are left out, since they give another CKA.
    """
    most = max(r["config"]["cka_samples"] for r in runs)
    stages = [r["cka"].get(level, {}) for r in runs if r["config"]["cka_samples"] == most]
    return " → ".join(cell([kinds[name]["linear_debiased"][-1] for kinds in stages], 3)
                      for name in ("degraded", stage) if name in stages[0])


def table(rows, metrics, levels=("tokens", "samples")):
    """Markdown: a row for each (name, runs that differ in their seed, stage)."""
    head = ["run", "n", *(HEADINGS.get(metric, metric) for metric in metrics),
            *(f"CKA, {level.replace('tooluse', 'tool')}" for level in levels)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, runs, stage in rows:
        cells = []
        for metric in metrics:
            word = verdict(runs, stage, metric)
            cells.append(way(runs, stages_of(runs, stage), metric) + (f" ({word})" if word else ""))
        cells += [likeness(runs, stage, level) for level in levels]
        lines.append(f"| {' | '.join([name, str(len(runs)), *cells])} |")
    return "\n".join(lines)


def table_of(folder, metrics):
    """The table of a folder's runs, a row for each NUMBER and recovery, named by its options."""
    groups = {}
    for number, _, results in read(folder):
        for stage in recoveries(results):
            groups.setdefault((number, stage), []).append(results)
    rows = [(f"`{options_of(runs[0])}` {stage.removeprefix('recovered').replace('_', ' ')}".strip(),
             runs, stage) for (_, stage), runs in groups.items()]
    return table(rows, [m for m in metrics if any(m in r["stages"]["healthy"]
                                                  for _, runs, _ in rows for r in runs)])


# ----------------------------------------------------------------------------- CKA and performance

def ranks(values):
    """Ranks from 1; equals share their mean rank.

    >>> ranks([3.0, 1.0, 3.0])
    [2.5, 1.0, 2.5]
    """
    return [(sum(x < v for x in values) + sum(x <= v for x in values) + 1) / 2 for v in values]


def pearson(pairs):
    """Pearson's r of [(x, y)]; nan where one of the two does not vary.

    >>> round(pearson([(1.0, 1.0), (2.0, 2.0), (3.0, 4.0)]), 4)
    0.982
    """
    mx, my = (math.fsum(values) / len(pairs) for values in zip(*pairs))
    xy = math.fsum((x - mx) * (y - my) for x, y in pairs)
    xx, yy = math.fsum((x - mx) ** 2 for x, _ in pairs), math.fsum((y - my) ** 2 for _, y in pairs)
    return xy / math.sqrt(xx * yy) if xx * yy > 1e-24 else math.nan


def spearman(pairs):
    """Spearman's r: Pearson's of the ranks."""
    return pearson(list(zip(*map(ranks, zip(*pairs)))))


def with_interval(statistic, clusters, draws=1000):
    """'r [low, high]': the statistic of all items, and 95 % of a bootstrap over clusters of them.

    clusters: {damage: [items]}. Whole damages are drawn: the points of one are not independent.
    """
    rng, lists, found = random.Random(0), list(clusters.values()), []
    for _ in range(draws):
        value = statistic([item for _ in lists for item in lists[rng.randrange(len(lists))]])
        found += [] if math.isnan(value) else [value]
    found.sort()
    low, high = (found[round(q * (len(found) - 1))] for q in (0.025, 0.975))
    all_of_them = statistic([item for items in clusters.values() for item in items])
    return f"{rounded(all_of_them, 2)} [{rounded(low, 2)}, {rounded(high, 2)}]"


def performance(values, metric):
    """A metric of a stage; of a perplexity minus its logarithm, so that more is better."""
    return -math.log(values[metric]) if metric.startswith("perplexity") else values[metric]


def damaged(r, level, metric):
    """(CKA of the last layer, performance) of a run's degraded model."""
    return (r["cka"][level]["degraded"]["linear_debiased"][-1],
            performance(r["stages"]["degraded"], metric))


def correlation_table(runs, metrics):
    """How CKA goes with performance over damaged models (Fig. 8b): r with its interval."""
    lines = ["| CKA over | performance | models | Pearson | Spearman |", "|---|---|---|---|---|"]
    for level in ("tokens", "samples"):
        for metric in metrics:
            clusters = {}
            for r in runs:
                pair = damaged(r, level, metric)
                clusters.setdefault(r["config"]["degrade"], []).append(pair)
            r = [with_interval(statistic, clusters) for statistic in (pearson, spearman)]
            lines.append(f"| {level} | {HEADINGS.get(metric, metric)} | {len(runs)} | {r[0]} "
                         f"| {r[1]} |")
    return "\n".join(lines)


def along_table(runs, metrics):
    """How CKA goes with performance along recoveries (§5.4): the mean over them of Pearson's r."""
    lines = ["| CKA over | performance | recoveries | mean of Pearson's r |", "|---|---|---|---|"]
    for level in ("tokens", "samples"):
        for metric in metrics:
            clusters = {}
            for r in runs:
                pairs = [damaged(r, level, metric)]
                for p in r["along"]["recovered"]:  # its CKA: of the last layer, the mean of layers
                    last, *_ = p["cka"][level]["linear_debiased"]
                    pairs.append((last, performance(p["values"], metric)))
                clusters.setdefault(r["config"]["degrade"], []).append(pearson(pairs))
            r = with_interval(lambda found: math.fsum(found) / len(found), clusters)
            lines.append(f"| {level} | {HEADINGS.get(metric, metric)} | {len(runs)} | {r} |")
    return "\n".join(lines)


def rises(experiments, level):
    """(recoveries that raise CKA of the last layer above the degraded model's, all of them)."""
    found = []
    for r in (r for experiment in experiments for r in kept(experiment)):
        cka = {stage: kinds["linear_debiased"][-1] for stage, kinds in r["cka"][level].items()}
        found += [cka[stage] > cka["degraded"] for stage in recoveries(r)]
    return sum(found), len(found)


COMPRESSED = {"SmolLM2": ("default", "table2", "table4", "damages", "fp4"),
              "Qwen": ("default-qwen", "table2-qwen", "table4-qwen", "damages-qwen", "fp4-qwen")}
FORGOTTEN = {"SmolLM2": ("table1",), "Qwen": ("table1-qwen",)}


def rises_table():
    """How often CKA rises from the degraded to the recovered model."""
    lines = ["| CKA of the last layer rises | over tokens | over samples |", "|---|---|---|"]
    for title, experiments in (("forgetting", FORGOTTEN), ("compression", COMPRESSED)):
        for model, folders in experiments.items():
            counts = ["{} of {}".format(*rises(folders, level)) for level in ("tokens", "samples")]
            lines.append(f"| {model}, after {title} | {counts[0]} | {counts[1]} |")
    return "\n".join(lines)


def teachers_table():
    """How many training prompts the healthy model answers rightly, by the form that it sees."""
    lines = ["| the teacher sees | SmolLM2, science % | SmolLM2, tool calls % | Qwen, science % "
             "| Qwen, tool calls % |", "|---|---|---|---|---|"]
    for title, where, part in (("the bare prompt", "0", "bare"), ("`--demo quote`", "1", "shown"),
                               ("`--demo turn`", "0", "shown")):
        asked = [kept(f"{experiment}/{where}")[0]["teacher"]["healthy"][task][part]
                 for experiment in ("teachers", "teachers-qwen") for task in ("science", "tooluse")]
        lines.append(f"| {title} | {' | '.join(rounded(x, 0) for x in asked)} |")
    return "\n".join(lines)


def claims_table():
    """The five rows of README: the control first.

    A sign a model: ✓ what was damaged came back, beyond noise at most seeds; ✗ it did not; – the
    damage was within noise. CKA: ✓ it rises in two of three recoveries, ✗ in less than one of
    three.
    """
    lines = ["| | the paper, Qwen2.5 | SmolLM2-135M | Qwen2.5-Coder-0.5B | |",
             "|---|---|---|---|---|"]
    for title, paper, where in (
            ("the undamaged model, trained alike: the control", "–", "control{}/0 recovered"),
            ("science after NF4 (Table 2)", "3B: 31.8 → 30.4 → 45.4", "table2{}/0 recovered"),
            ("science, a tenth of the FFN removed (Table 4)", "7B: 38.8 → 33.7 → 43.4",
             "table4{}/0 recovered"),
            ("science, forgotten for tool calls (Table 1)", "3B: 60.0 → 37.9 → 65.5",
             "table1{}/0 recovered_healthy")):
        cells, signs = [], []
        for suffix in ("", "-qwen"):
            place, stage = where.format(suffix).split()
            runs = kept(place)
            shown = [name for name in stages_of(runs, stage) if name != "base"]
            cells.append(way(runs, shown, SCIENCE))
            better = verdict(runs, stage, SCIENCE) == "better"
            signs.append("✓✗"[not better] if was_damaged(runs, stage, SCIENCE) else "–")
        lines.append(f"| {title} | {paper} | {' | '.join(cells)} | {' '.join(signs)} |")
    cells, signs = [], []
    for model in COMPRESSED:
        (a, n), (b, m) = (rises(which[model], "samples") for which in (FORGOTTEN, COMPRESSED))
        cells.append(f"{a} of {n} after forgetting, {b} of {m} after compression")
        signs.append("✓" if 3 * (a + b) >= 2 * (n + m) else "✗" if 3 * (a + b) < n + m else "–")
    lines.append(f"| CKA over samples rises with it (§5.4) | yes | {' | '.join(cells)} | "
                 f"{' '.join(signs)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- RESULTS.md

TABLES = {  # mark in RESULTS.md -> (metrics, rows: NAME = EXPERIMENT/NUMBER, and which recovery)
    "default": (f"{SCIENCE} science_element perplexity", """
        SmolLM2, int4 = default/0
        SmolLM2, nf4 = default/1
        Qwen, int4 = damages-qwen/0
        Qwen, nf4 = default-qwen/1
        Qwen, ffn10 = default-qwen/2"""),
    "table2": (f"{SCIENCE} science_element {TOOLS} perplexity", """
        SmolLM2, taught science = table2/0
        SmolLM2, the control, science = control/0
        SmolLM2, taught tool calls = table2/1
        SmolLM2, the control, tool calls = control/1
        Qwen, taught science = table2-qwen/0
        Qwen, the control, science = control-qwen/0
        Qwen, taught tool calls = table2-qwen/1"""),
    "table4": (f"{SCIENCE} science_element {TOOLS} perplexity", """
        SmolLM2, taught science = table4/0
        SmolLM2, taught tool calls = table4/1
        Qwen, taught science = table4-qwen/0
        Qwen, taught tool calls = table4-qwen/1"""),
    "table1": (f"{SCIENCE} {TOOLS}", """
        SmolLM2, by the base = table1/0 base
        SmolLM2, by the expert = table1/0 healthy
        SmolLM2, by the expert, bare = table1/1
        Qwen, by the base = table1-qwen/0 base
        Qwen, by the expert = table1-qwen/0 healthy
        Qwen, by the expert, bare = table1-qwen/1
        SmolLM2, double rate, by the expert = table1_rate/0 healthy"""),
    "table5": (f"{SCIENCE} {TOOLS} perplexity", """
        SmolLM2, direct = table5/0
        SmolLM2, two stages = table5/1
        SmolLM2, direct, tool calls = table5/2
        SmolLM2, two stages, tool calls = table5/3
        Qwen, direct = table5-qwen/0
        Qwen, two stages = table5-qwen/1
        Qwen, direct, tool calls = table5-qwen/2
        Qwen, two stages, tool calls = table5-qwen/3"""),
    "general": ("general blimp_all", """
        SmolLM2, nf4, taught science = table2/0
        SmolLM2, nf4, taught tool calls = table2/1
        SmolLM2, ffn10, taught science = table4/0
        SmolLM2, ffn10, taught tool calls = table4/1
        Qwen, nf4, taught science = table2-qwen/0
        Qwen, ffn10, taught science = table4-qwen/0
        Qwen, ffn10, taught tool calls = table4-qwen/1"""),
    "untaught": (f"{SCIENCE} instructions_all {TOOLS}", """
        SmolLM2 = untaught/1
        Qwen = untaught-qwen/1
        Qwen, a third of the step = untaught-qwen/2"""),
    "damages": (f"{SCIENCE} perplexity", "".join(
        f"{model}, {damage} = {folder}{suffix}/{n}\n" for model, suffix in (
            ("SmolLM2", ""), ("Qwen", "-qwen")) for folder, n, damage in (
            ("damages", 2, "ffn20"), ("fp4", 0, "nvfp4"), ("fp4", 1, "mxfp4"),
            ("damages", 5, "magnitude30"), ("damages", 4, "ffn10,nf4"), ("damages", 3, "wanda50"),
            ("damages", 1 if suffix else 0, "int3"), ("damages", 6, "magnitude2:4")))),
    "steps": (f"{SCIENCE} perplexity", "".join(
        f"{model}, {rate} = {folder}\n" for model, rate, folder in (
            ("SmolLM2", "5.8e-5", "rates/0"), ("SmolLM2", "1.7e-4", "rates/1"),
            ("SmolLM2", "5.2e-4, the default", "default/1"), ("SmolLM2", "1.6e-3", "rates/3"),
            ("SmolLM2", "4.7e-3", "rates/4"), ("Qwen", "5.8e-5", "rates-qwen/0"),
            ("Qwen", "1.7e-4", "rates-qwen/1"), ("Qwen", "5.2e-4, the default", "default-qwen/1"),
            ("Qwen", "1.6e-3", "rates-qwen/3"), ("Qwen", "4.7e-3", "rates-qwen/4")))),
    "demos": (f"{SCIENCE} science_element", """
        SmolLM2, turn = default/1
        SmolLM2, quote = demos/0
        Qwen, turn = default-qwen/1
        Qwen, quote = demos-qwen/0"""),
    "settings": (SCIENCE, """
        int4, the default = default/0
        `--loss reverse_kl` = settings/1
        `--loss jsd` = settings/2
        `--lora 16` = lora/0
        the default on the H200 = default-gpu/0
        CKA in the loss, weight 0.3 = settings/7
        CKA in the loss, weight 1 = settings/8
        CKA in the loss, weight 3 = settings/9""")}
MADE = {  # the tables that are not of that form
    "claims": claims_table, "rises": rises_table, "teachers": teachers_table,
    "sweep": lambda: correlation_table(kept("sweep"), (SCIENCE, "perplexity")),
    "sweep-qwen": lambda: correlation_table(kept("sweep-qwen"), (SCIENCE, "perplexity")),
    "along": lambda: along_table(kept("along"), (SCIENCE, "perplexity"))}


def generated(name):
    """The text that stands at a mark of RESULTS.md: a table, and below it where its files are."""
    if name in MADE:
        return MADE[name]()
    metrics, text = TABLES[name]
    rows, processors = [], {}
    for line in text.strip().splitlines():
        title, where = line.strip().split(" = ")
        where, _, teacher = where.partition(" ")
        rows.append((title, kept(where), f"recovered_{teacher}" if teacher else "recovered"))
        for r in rows[-1][1]:
            known = re.search("H200|EPYC|Xeon|$", r["environment"]["processor"])[0]
            processors.setdefault(where.split("/")[0], {})[known] = None
    links = [f"[{folder}](results/{folder}) ({', '.join(names)})"
             for folder, names in processors.items()]
    levels = ("tokens",) if name == "steps" else ("tokens", "samples")
    levels += ("tooluse samples",) if name == "table1" else ()
    levels = () if name in ("table5", "general", "untaught", "demos") else levels
    files = textwrap.fill(f"Files: {', '.join(links)}.", 108, break_on_hyphens=False)
    return f"{table(rows, metrics.split(), levels)}\n\n{files}"


def fill(text):
    """A text with every generated table in its place: <!-- table NAME -->, <!-- end -->."""
    return re.sub(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)",
                  lambda mark: f"{mark[1]}{generated(mark[2])}\n{mark[3]}", text, flags=re.S)


def write(paths=(HERE / "RESULTS.md", HERE.parent / "README.md")):
    """Put today's tables into RESULTS.md and, where it has marks, README.md."""
    for path in paths:
        before = path.read_text(encoding="utf-8")
        if (after := fill(before)) != before:
            path.write_text(after, encoding="utf-8")
