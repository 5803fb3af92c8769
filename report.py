"""Runs in words and pictures: one run as it ends, and many runs' results.json as tables and figures (Tables 1-7, Figs. 6, 8)."""
import json
import math
from pathlib import Path
from textwrap import fill

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# One run

def text(results, answers):
    """The run as text: metrics, sample answers {stage: [(prompt, answer)]}, CKA by layer."""
    values, fractions = results["stages"], recovered_fractions(results)
    width = max(len(stage) for stage in values) + 2
    lines = ["", f"{'':24}" + "".join(f"{stage:>{width}}" for stage in values) + "  recovered fraction"]
    for metric in values["healthy"]:
        row = "".join(f"{values[stage][metric]:{width}.2f}" for stage in values)
        shown = ", ".join("not damaged" if f[metric] is None else f"{f[metric]:.2f}" for f in fractions.values())
        lines.append(f"{_title(metric):24}{row}  {shown:>18}")
    for i, (prompt, _) in enumerate(answers["healthy"]):
        lines += ["", f"> {prompt}"] + [f"  {name:{width}}{' '.join(a[i][1].split())}" for name, a in answers.items()]
    for level, by_stage in results["cka"].items():
        lines += ["", f"CKA with the healthy model over {level}, by layer"]
        for kind in ("linear", "linear_debiased"):
            least = min((x for v in by_stage.values() for x in v[kind] if not math.isnan(x)), default=0)
            for stage in by_stage:
                v = by_stage[stage][kind]
                lines.append(f"  {kind:16}{stage:{width}}{chart(v, least)}  last {v[-1]:.4f}  mean {sum(v) / len(v):.4f}")
    e, s = results["environment"], results["seconds"]
    damage = ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in e["damage"].items())
    lines += ["", f"damage {results['config']['degrade']}: {damage or 'no weight of it by our hand'}",
              f"perplexity of {e['text_tokens']} tokens in windows of {e['text_window']} (text {e['text_sha256']}); "
              f"train data {e['data_sha256']}; eval data {e['eval_sha256']} {e['eval_examples']}",
              f"seed {results['config']['seed']}; {sum(s.values()) / 60:.1f} minutes "
              f"({', '.join(f'{name} {value:.0f} s' for name, value in s.items())}), "
              f"peak memory {e.get('peak_gpu_memory_gib', e['peak_memory_gib']):.1f} GiB, "
              f"{results['config']['dtype']}, {e['processor']}, {e['processes']} x {e['threads']} threads"]
    return "\n".join(lines)


def to_json(value, **layout):
    """json.dumps, where null stands for what JSON has no word for: the infinities and nan of a model that training broke."""
    finite = _each(value, lambda x: None if isinstance(x, float) and not math.isfinite(x) else x)
    return json.dumps(finite, allow_nan=False, **layout)


def _each(x, change):
    """The same structure of dicts and lists, with every leaf changed."""
    if isinstance(x, dict):
        return {k: _each(v, change) for k, v in x.items()}
    return [_each(v, change) for v in x] if isinstance(x, (list, tuple)) else change(x)


def recovered_fractions(results):
    """{stage: {metric: fraction or None}}, of one recovery or several."""
    found = results["recovered_fraction"]
    return found if isinstance(next(iter(found.values())), dict) else {"recovered": found}


def chart(values, least):
    """One character a layer, from ▁ at `least` to █ at 1; ? is not a number."""
    return "".join("?" if math.isnan(v) else "▁▂▃▄▅▆▇█"[min(7, max(0, int(8 * (v - least) / max(1e-9, 1 - least))))]
                   for v in values)


def draw(results, steps, path):
    """report.png: the recovery curve, CKA by layer, and between all layers. Nothing without matplotlib."""
    pyplot = _pyplot()
    if pyplot is None:
        return
    last, steps = list(results["stages"])[-1], [s for s in steps if s["stage"].startswith("recovered")]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 4), layout="constrained")
    shown = "kl" if steps and "kl" in steps[0] else "loss"
    for stage in dict.fromkeys(s["stage"] for s in steps):
        points = [(s["step"] + 1, s[shown]) for s in steps if s["stage"] == stage and shown in s]
        left.plot(*zip(*points) if points else ([], []), label=stage)
    left.set(title=f"Recovery from {results['config']['degrade']}", xlabel="step", ylabel=f"{shown}, nats per token", ylim=0)
    if left.lines:
        left.legend()
    for level, style in (("tokens", ":"), ("samples", "-")):
        for i, (stage, kinds) in enumerate(results["cka"].get(level, {}).items()):
            values = kinds["linear_debiased"]
            middle.plot(range(1, len(values) + 1), values, style, color=f"C{i}", label=f"{stage}, {level}")
    middle.set(title="CKA with the healthy model (linear, debiased)", xlabel="layer")
    middle.legend()
    if last in results["cka_layers"]:
        layers = results["cka_layers"][last]
        picture = right.imshow(layers, origin="lower", vmin=0, vmax=1, extent=[0.5, len(layers) + 0.5] * 2)  # layers from 1 on
        right.set(title=f"CKA over samples, {last} x healthy", xlabel="layer of the healthy model", ylabel=f"layer, {last}")
        figure.colorbar(picture)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def _title(metric):
    return metric if metric.startswith("perplexity") else metric + " %"


# ---------------------------------------------------------------------------------------------------------------------
# Many runs

LAYERS = {"last": lambda v: v[-1], "mean": lambda v: sum(v) / len(v)}  # of a model's CKA, one value a layer
IGNORED = {"seed", "out", "report", "device", "dtype", "micro_batch", "eval"}  # of the options, in a run's name


def read_runs(paths, defaults):
    """The results under these folders as (name, stage, results): the run's options that are not defaults; a stage of recovery.

    A run with several recoveries counts as several. ValueError for a folder without any, or a file that is none.
    """
    runs, seen = [], set()
    for path in paths:
        files = {file.resolve() for file in Path(path).rglob("results.json")}
        if not files:
            raise ValueError(f"--report {path}: no results.json in it")
        for file in sorted(files - seen):
            try:
                results = json.loads(file.read_text(encoding="utf-8"))
                results |= {key: _each(results[key], lambda x: math.nan if x is None else x) for key in ("stages", "cka")}
                stages = [stage for stage in results["stages"] if stage.startswith("recovered")]
                name = _name(results["config"], defaults)
                if "healthy" not in results["stages"]:
                    raise KeyError("healthy")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: not the results of a run ({type(error).__name__}: {error})") from None
            runs += [(" ".join([name, *stage.split("_", 1)[1:]]), stage, results) for stage in stages]
        seen |= files
    if not runs:
        raise ValueError(f"--report {' '.join(map(str, paths))}: no run in it has a recovery")
    return runs


def _name(config, defaults):
    words = []
    for option, default in defaults.items():
        value = config.get(option, default)
        if option not in IGNORED and (value != default or option == "degrade"):
            flag = option.replace("_", "-")
            value = "/".join(value.split("/")[-2:]) if isinstance(value, str) else value  # of a folder the last two steps
            words.append(("--" if value else "--no-") + flag if isinstance(default, bool) else f"--{flag} {value}")
    return " ".join(words)


def tables(runs):
    """Markdown: performance, CKA, and how the two go together; mean ± standard error over the runs of one name."""
    return "\n\n".join(filter(None, [performance_table(runs), cka_table(runs), correlation_table(runs)]))


def _groups(runs):
    groups = {}
    for name, stage, results in runs:
        groups.setdefault(name, []).append((stage, results))
    return groups.items()


def performance_table(runs):
    """A row for each name and metric: every stage, the recovered values run by run, and the recovered fraction."""
    lines = ["| options | metric | base | healthy | degraded | recovered | run by run | recovered fraction |", "|" + "---|" * 8]
    for name, group in _groups(runs):
        for metric in [m for m in group[0][1]["stages"]["healthy"] if all(m in r["stages"]["healthy"] for _, r in group)]:
            def values(stage, group=group, metric=metric):
                return [r["stages"][stage or own][metric] for own, r in group if (stage or own) in r["stages"]]
            broken = [any(math.isnan(r["stages"][stage][metric]) for stage in ("healthy", "degraded", own)) for own, r in group]
            fractions = [math.nan if b else recovered_fractions(r)[own][metric] for b, (own, r) in zip(broken, group)]
            digits = 2 if metric.startswith("perplexity") else 1
            shown = [mean_and_error(values(stage), digits) for stage in ("base", "healthy", "degraded", "")]
            each = ", ".join(f"{v:.{digits}f}" for v in values(""))
            spared, n = fractions.count(None), len(fractions)
            shown += [each, f"not damaged{f' in {spared} of {n}' * (spared < n)}" if spared else mean_and_error(fractions, 2)]
            lines.append(f"| `{name}` | {_title(metric)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def cka_table(runs, kinds=("linear", "linear_debiased")):
    """A row for each name and level: CKA with the healthy model before and after recovery, last layer and mean of layers."""
    lines = ["| options | CKA over | kind | last layer: degraded | recovered | mean of layers: degraded | recovered |",
             "|" + "---|" * 7]
    for name, group in _groups(runs):
        for level in group[0][1]["cka"]:
            for kind in kinds:
                cells = []
                for layers in LAYERS.values():
                    for stage in ("degraded", ""):
                        found = [r["cka"].get(level, {}).get(stage or own) for own, r in group]
                        cells.append(mean_and_error([layers(f[kind]) for f in found if f], 3))
                lines.append(f"| `{name}` | {level} | {kind.replace('_', ', ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_error(values, digits):
    """'mean ± standard error' (the error where there are two or more that differ), '' of nothing."""
    if not values:
        return ""
    mean, n = sum(values) / len(values), len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else 0
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error > 1e-9 else "")


def points(runs, stages=("degraded", "recovered")):
    """A point for each model measured against its healthy one, none twice: (stage, its performance, its CKA, the damage)."""
    found = {}
    for name, own, results in runs:
        for stage in stages:
            key = own if stage == "recovered" else stage
            cka = {level: by_stage[key] for level, by_stage in results["cka"].items() if key in by_stage}
            nobody_taught = stage == "recovered" and "none" in (results["config"]["recover"], *own.split("_")[1:2])
            which = f"{name} {results['config']['seed']}" if stage == "recovered" else str(results["stages"]["degraded"])
            if cka and not nobody_taught:
                found.setdefault((stage, which), (stage, results["stages"][key], cka, results["config"]["degrade"]))
    return list(found.values())


def correlation_table(runs):
    """Pearson and Spearman r, with 95 % bootstrap intervals, of CKA with each metric (perplexity: with minus its logarithm).

    Over the damaged models, over the recovered ones, and over both together. '' for fewer than 5 models.
    """
    lines = ["| models | CKA over | kind | layers | metric | n | Pearson r | Spearman r |", "|" + "---|" * 8]
    for stages in (("degraded",), ("recovered",), ("degraded", "recovered")):
        chosen = points(runs, stages)
        if len(chosen) < 5 or {stage for stage, *_ in chosen} != set(stages):
            continue
        metrics = [m for m in chosen[0][1] if all(m in p[1] for p in chosen)]
        for level in ("samples", "tokens"):
            for kind in ("linear", "linear_debiased", "rbf_debiased"):
                for layers, reduce in LAYERS.items():
                    for metric in metrics:
                        x = np.array([reduce(cka[level][kind]) for _, _, cka, _ in chosen])
                        y = np.array([_score(values, metric) for _, values, _, _ in chosen])
                        damages = [damage for *_, damage in chosen]
                        r = [interval(x, y, damages, pearson), interval(x, y, damages, spearman)]
                        lines.append(f"| {' and '.join(stages)} | {level} | {kind.replace('_', ', ')} | {layers} | {metric} | "
                                     f"{len(x)} | {r[0]} | {r[1]} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _score(values, metric):
    return -math.log(values[metric]) if metric.startswith("perplexity") else values[metric]


def pearson(x, y):
    """Pearson's r of two vectors; nan where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / size if size > 1e-12 else math.nan


def _ranks(x):
    """Ranks, those of equals averaged: Pearson's r of ranks is Spearman's."""
    return np.array([((x < v).sum() + (x <= v).sum() + 1) / 2 for v in x])


def spearman(x, y):
    """Pearson's r of the ranks."""
    return pearson(_ranks(x), _ranks(y))


def interval(x, y, damages, statistic, samples=1000):
    """'r [low, high]': the statistic and its 95 % percentile bootstrap interval (seed 0).

    Whole damages are drawn, with all their points: the seeds of one are not independent. Fewer than 5 damages tell nothing of
    an interval, and get none.
    """
    if len(set(damages)) < 5:
        return f"{statistic(x, y):.2f}"
    rng, damages = np.random.default_rng(0), np.array(damages)
    members = [np.flatnonzero(damages == d) for d in sorted(set(damages))]
    drawn = [np.concatenate([members[j] for j in rng.integers(len(members), size=len(members))]) for _ in range(samples)]
    drawn = [statistic(x[i], y[i]) for i in drawn]
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if not np.isnan(drawn).all() else (math.nan, math.nan)
    return f"{statistic(x, y):.2f} [{low:.2f}, {high:.2f}]"


def draw_runs(runs, out):
    """report.png in `out`: Fig. 6, performance by kind of damage; Fig. 8, CKA along the way (a) and against performance (b)."""
    pyplot = _pyplot()
    if pyplot is None:
        return
    groups = list(_groups(runs))
    metrics = [m for m in runs[0][2]["stages"]["healthy"] if all(m in r["stages"]["healthy"] for _, _, r in runs)]
    columns = max(2, len(metrics))
    figure, axes = pyplot.subplots(2, columns, figsize=(5.5 * columns, 9), layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], metrics):
        for i, stage in enumerate(("healthy", "degraded", "")):
            heights = [np.mean([r["stages"][stage or own][metric] for own, r in group]) for _, group in groups]
            axis.barh(np.arange(len(groups)) + 0.27 * (1 - i), heights, 0.27, label=stage or "recovered")
        axis.set(title=_title(metric))
        axis.set_yticks(range(len(groups)), [fill(name, 36) for name, _ in groups] if metric == metrics[0] else [], fontsize=7)
    axes[0, 0].legend()
    along, against = axes[1, 0], axes[1, 1]
    for i, (name, group) in enumerate(groups):
        for level, style in (("samples", "-"), ("tokens", ":")):
            heights = [np.mean([r["cka"][level][stage or own]["linear_debiased"][-1] for own, r in group
                                if (stage or own) in r["cka"].get(level, {})] or [math.nan]) for stage in ("degraded", "")]
            label = name if style == "-" else None
            along.plot(["healthy", "degraded", "recovered"], [1, *heights], style, color=f"C{i}", label=label)
    along.set(title="CKA with the healthy model (last layer, linear, debiased; dotted: tokens)")
    along.legend(fontsize=7)
    for stage, marker in (("degraded", "x"), ("recovered", "o")):
        chosen = points(runs, (stage,))
        against.plot([cka["samples"]["linear_debiased"][-1] for _, _, cka, _ in chosen],
                     [values[metrics[0]] for _, values, _, _ in chosen], marker, label=stage)
    against.set(title="CKA (samples, last layer) against performance", xlabel="CKA", ylabel=_title(metrics[0]))
    against.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "report.png", dpi=100)
    pyplot.close(figure)
