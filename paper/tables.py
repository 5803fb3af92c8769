"""Runs as tables: what each recovery brought back, and how CKA goes with performance.

A run is a results.json of train.py; kept ones are paper/results/EXPERIMENT/NUMBER-SEED.json. Sums
are `math.fsum` of stored numbers and cells are rounded in decimal, so every processor prints the
same text.
"""
import json
import math
import random
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DEFAULTS = json.loads((HERE / "options.json").read_text())  # those of the kept runs' code
SILENT = {"out", "seed", "device", "dtype", "save_every", "resume", "model", "plain", "dry_run"}


def read(*folders):
    """[(experiment, number, seed, results)] of the runs in these folders, in order."""
    runs = []
    for folder in map(Path, folders):
        for path in sorted([*folder.glob("*-*.json"), *folder.glob("*-*/results.json")]):
            name = path.stem if path.suffix == ".json" and path.stem != "results" \
                else path.parent.name
            if match := re.fullmatch(r"(\d+)-(\d+)", name):
                runs.append((folder.name, int(match[1]), int(match[2]),
                             json.loads(path.read_text(encoding="utf-8"))))
    return sorted(runs, key=lambda run: run[:3])


def options_of(results):
    """A run's options that are not the defaults, as they are typed.

    >>> options_of({"config": {"degrade": "nf4", "data": "science,text", "symmetric": False}})
    '--degrade nf4 --no-symmetric'
    """
    words = []
    for name, value in results["config"].items():
        if name in SILENT or value == DEFAULTS.get(name, ""):
            continue
        flag = name.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool)
                     else f"--{flag} {value}")
    return " ".join(words)


def mean_and_error(values):
    """(mean, standard error of the mean; 0 for a single value).

    >>> mean_and_error([1.0, 2.0, 3.0])
    (2.0, 0.5773502691896257)
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    square = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(square / len(values))


def rounded(value, digits=1):
    """A number as text, halves away from zero, whatever the last bit says.

    >>> rounded(2.25), rounded(-6.249999999999), rounded(0.30000000000000004, 2)
    ('2.3', '-6.3', '0.30')
    """
    if value is None or not math.isfinite(value):
        return "–"
    exact = Decimal(repr(float(f"{value:.9g}")))
    return str(exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def cell(values, digits=1):
    """mean ± standard error; the error is left out where all values are one.

    >>> cell([1.0, 2.0, 3.0]), cell([4.0])
    ('2.0 ± 0.6', '4.0')
    """
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    shown = rounded(error, digits)
    return rounded(mean, digits) + (f" ± {shown}" if float(shown) else "")


def verdict(runs, stage, metric):
    """What most seeds say, by two paired standard errors."""
    words = [r["change"].get(stage, {}).get(metric) for r in runs]
    words = [word for word in words if word]
    return max(set(words), key=lambda word: (words.count(word), word)) if words else "–"


def recovered_stages(results):
    return [name for name in results["stages"] if name.startswith("recovered")]


def table(runs, metrics, labels=None):
    """Rows, a run's options and a recovery each: healthy → degraded → recovered of these metrics.

    runs: from `read`. labels: {(experiment, number): the row's name}. Means over seeds.
    """
    head = ["run", "n", *metrics, "CKA tokens, samples (degraded → recovered)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    groups = {}
    for experiment, number, _, results in runs:
        for stage in recovered_stages(results):
            groups.setdefault((experiment, number, stage), []).append(results)
    for (experiment, number, stage), group in groups.items():
        name = (labels or {}).get((experiment, number)) or options_of(group[0]) or "the defaults"
        name += stage.removeprefix("recovered").replace("_", " ")
        cells = [name, str(len(group))]
        for metric in metrics:
            digits = 2 if metric.startswith("perplexity") else 1
            if metric not in group[0]["stages"][stage]:
                cells.append("–")
                continue
            values = [cell([r["stages"][s].get(metric) for r in group if s in r["stages"]], digits)
                      for s in ("healthy", "degraded", stage)]
            cells.append(" → ".join(values) + f" ({verdict(group, stage, metric)})")
        likeness = []
        for level in ("tokens", "samples"):
            of = [r["cka"].get(level, {}) for r in group]
            both = [cell([x[s]["linear_debiased"][-1] for x in of if s in x], 3)
                    for s in ("degraded", stage)]
            likeness.append(" → ".join(both))
        lines.append("| " + " | ".join([*cells, ", ".join(likeness)]) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- CKA, correlations

def points(runs, stages=("degraded",)):
    """[(experiment, number), CKA over tokens, over samples, {metric: value}] of these stages."""
    found = []
    for experiment, number, _, r in runs:
        for stage in stages:
            if stage in r["cka"].get("tokens", {}):
                likeness = [r["cka"][level][stage]["linear_debiased"][-1]
                            for level in ("tokens", "samples")]
                found.append(((experiment, number), *likeness, r["stages"][stage]))
    return found


def ranks(values):
    """Ranks from 1; equals share their mean rank.

    >>> ranks([3.0, 1.0, 3.0])
    [2.5, 1.0, 2.5]
    """
    order = sorted(values)
    return [(2 * order.index(v) + order.count(v) + 1) / 2 for v in values]


def correlation(x, y):
    """Pearson's r; nan where one does not vary.

    >>> round(correlation([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]), 4)
    0.982
    """
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    xy = math.fsum((a - mx) * (b - my) for a, b in zip(x, y))
    xx, yy = math.fsum((a - mx) ** 2 for a in x), math.fsum((b - my) ** 2 for b in y)
    return xy / math.sqrt(xx * yy) if xx * yy else math.nan


def interval(x, y, draws=2000):
    """(low, high): 95 % of Spearman's correlation when the points are drawn anew."""
    rng, found, n = random.Random(0), [], len(x)
    for _ in range(draws):
        chosen = [rng.randrange(n) for _ in range(n)]
        r = correlation(ranks([x[i] for i in chosen]), ranks([y[i] for i in chosen]))
        if not math.isnan(r):
            found.append(r)
    found.sort()
    return found[int(0.025 * len(found))], found[int(0.975 * len(found)) - 1]


def correlation_table(runs, metrics):
    """Spearman's correlation of CKA (last layer, debiased) with these metrics, over damages."""
    lines = ["| CKA over | metric | n | Spearman | 95 % |", "|---|---|---|---|---|"]
    found = points(runs)
    for level, at in (("tokens", 1), ("samples", 2)):
        for metric in metrics:
            pairs = [(p[at], p[3][metric]) for p in found if p[3].get(metric) is not None]
            x, y = [a for a, _ in pairs], [b for _, b in pairs]
            r, (low, high) = correlation(ranks(x), ranks(y)), interval(x, y)
            lines.append(f"| {level} | {metric} | {len(pairs)} | {rounded(r, 2)} | "
                         f"{rounded(low, 2)} to {rounded(high, 2)} |")
    return "\n".join(lines)


def cka_rises(runs):
    """How often CKA of the last layer rises from degraded to recovered: (tokens, samples, n)."""
    tokens = samples = n = 0
    for *_, r in runs:
        for stage in recovered_stages(r):
            levels = [r["cka"].get(level, {}) for level in ("tokens", "samples")]
            if all("degraded" in of and stage in of for of in levels):
                rises = [of[stage]["linear_debiased"][-1] > of["degraded"]["linear_debiased"][-1]
                         for of in levels]
                tokens, samples, n = tokens + rises[0], samples + rises[1], n + 1
    return tokens, samples, n


# ------------------------------------------------------------------------------------- RESULTS.md

SCIENCE, TOOLS = "science_phrasing", "tooluse_request"
NAMED = {  # mark in RESULTS.md -> (experiments, metrics); one generic table each
    "default": (("default", "default-qwen-cpu"), (SCIENCE, "science_element", "perplexity")),
    "nf4": (("table2", "table2-qwen"), (SCIENCE, TOOLS)),
    "control": (("control", "untaught-qwen", "control-qwen"), (SCIENCE, TOOLS)),
    "ffn": (("table4", "table4-qwen"), (SCIENCE, TOOLS)),
    "forgetting": (("table1", "table1-qwen"), (SCIENCE, TOOLS)),
    "bootstrap": (("table5", "table5-qwen"), (SCIENCE, TOOLS)),
    "damages": (("damages", "fp4"), (SCIENCE, "perplexity")),
    "damages-qwen": (("damages-qwen", "fp4-qwen"), (SCIENCE, "perplexity")),
    "rates": (("rates", "rates-qwen"), (SCIENCE, "perplexity")),
    "demos": (("demos", "demos-qwen"), (SCIENCE,)),
    "settings": (("settings",), (SCIENCE, "perplexity"))}


def generated(name):
    """The text that stands at a mark of RESULTS.md."""
    if name.startswith("correlations"):
        return correlation_table(read(RESULTS / name.replace("correlations", "sweep")),
                                 (SCIENCE, "perplexity"))
    if name == "rises":
        lines = ["| recoveries after | tokens | samples |", "|---|---|---|"]
        for title, folders in (("forgetting", ("table1", "table1-qwen")),
                               ("compression", ("default", "table2", "table4", "damages",
                                                "table2-qwen", "table4-qwen", "damages-qwen"))):
            tokens, samples, n = cka_rises(read(*(RESULTS / folder for folder in folders)))
            lines.append(f"| {title} | {tokens} of {n} | {samples} of {n} |")
        return "\n".join(lines)
    experiments, metrics = NAMED[name]
    links = ", ".join(f"[{folder}](results/{folder})" for folder in experiments)
    runs = read(*(RESULTS / folder for folder in experiments))
    labels = {}
    for experiment, number, _, results in runs:
        model = "Qwen: " if "qwen" in experiment else ""
        words = re.sub(r"--(eval|text|eval-limit|cka-samples) \S+ ?", "", options_of(results))
        labels[experiment, number] = model + (words.strip() or "the defaults")
    return table(runs, metrics, labels) + f"\n\nFiles: {links}."


def write(path=HERE / "RESULTS.md"):
    """Put every generated table into its place, between <!-- table NAME --> and <!-- end -->."""
    text = re.sub(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)",
                  lambda m: f"{m[1]}{generated(m[2])}\n{m[3]}", path.read_text(encoding="utf-8"),
                  flags=re.S)
    path.write_text(text, encoding="utf-8")
