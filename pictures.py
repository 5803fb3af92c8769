"""Pictures of many runs, in the paper's manner: performance by damage (Fig. 6), CKA along the way
(Fig. 8a) and against performance (Fig. 8b), and both along the steps of a recovery."""
import itertools
import math
from textwrap import fill

import numpy as np

import evaluate
import tables


def draw_runs(runs, out):
    """report.png in `out`: Fig. 6, performance by kind of damage; Fig. 8, CKA along the way (a) and
    against performance (b). Nothing without matplotlib."""
    pyplot = evaluate.find_pyplot()
    if pyplot is None:
        return
    groups = tables.by_name(runs)
    metrics = tables.common_metrics([(stage, results) for _, stage, results in runs])
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
        heights = [np.mean(tables.values_of(group, stage, metric)) for _, group in groups]
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
                found = tables.cka_of(group, stage, level)
                last = [kinds["linear_debiased"][-1] for kinds in found]
                heights.append(np.mean(last or [math.nan]))
            axis.plot(["healthy", "degraded", "recovered"], heights, style, color=f"C{i}",
                      label=label)
    axis.set(title="CKA with the healthy model (last layer, linear, debiased; dotted: tokens)")
    axis.legend(fontsize=7)


def draw_against(axis, runs, metric):
    """Fig. 8b: a point a model, CKA over samples against performance; a colour for each stage of
    each model that was damaged."""
    models = {}
    for run in runs:
        models.setdefault(run[-1]["environment"].get("model"), []).append(run)
    for model, own in models.items():
        for stage, marker in (("degraded", "x"), ("recovered", "o")):
            chosen = tables.points(own, (stage,))
            x = [likeness["samples"]["linear_debiased"][-1] for _, _, likeness, _ in chosen]
            y = [values[metric] for _, values, _, _ in chosen]
            if chosen:
                axis.plot(x, y, marker, label=f"{model}, {stage}" if len(models) > 1 else stage)
    axis.set(title="CKA (samples, last layer) against performance", xlabel="CKA",
             ylabel=evaluate.metric_title(metric))
    axis.legend()


def fig6(pyplot, runs):
    """Fig. 6: performance by damage, healthy, degraded, recovered."""
    groups = tables.by_name(runs)
    metrics = tables.common_metrics([(stage, results) for _, stage, results in runs])[:3]
    figure, axes = pyplot.subplots(1, len(metrics), layout="constrained", squeeze=False,
                                   figsize=(3 + 4 * len(metrics), 1 + 0.35 * len(groups)))
    for axis, metric in zip(axes[0], metrics):
        draw_performance(axis, groups, metric)
    axes[0, -1].set_xscale("log")
    axes[0, 0].set_yticks(range(len(groups)), [name for name, _ in groups], fontsize=7)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def fig8a(pyplot, runs):
    """Fig. 8a: CKA from healthy to degraded to recovered."""
    figure, axis = pyplot.subplots(figsize=(10, 7), layout="constrained")
    draw_along(axis, tables.by_name(runs))
    return figure


def fig8b(pyplot, runs):
    """Fig. 8b: CKA against the first accuracy, both models."""
    figure, axis = pyplot.subplots(figsize=(8, 6), layout="constrained")
    draw_against(axis, runs, "science_phrasing")
    return figure


def along(pyplot, runs):
    """On the way of recoveries, a column a name, a line a seed: performance above; below CKA with
    the healthy model (last layer, debiased), over rows as they are and over rows of unit norm."""
    groups = tables.by_name(runs)
    figure, axes = pyplot.subplots(2, len(groups), layout="constrained", squeeze=False,
                                   sharex=True, figsize=(4.5 * len(groups), 7))
    kinds = {"linear_debiased": "", "unit_debiased": ", unit norm"}
    for (above, below), (name, group) in zip(axes.T, groups):
        first, *_ = tables.common_metrics(group)
        ways, right = [list(zip(*tables.way_of(*one))) for one in group], above.twinx()
        for steps, values, likeness in ways:
            for axis, metric, color in ((above, first, "C0"), (right, "perplexity", "C1")):
                axis.plot(steps, [v[metric] for v in values], color=color)
                axis.set_ylabel(evaluate.metric_title(metric), color=color)
            for i, (level, kind) in enumerate(itertools.product(("tokens", "samples"), kinds)):
                below.plot(steps, [x[level][kind][0] for x in likeness], color=f"C{i + 2}",
                           label=f"{level}{kinds[kind]}" if steps is ways[0][0] else None)
        above.set_title(fill(name, 40), fontsize=9)
        below.set(xlabel="step", ylabel="CKA with the healthy model")
    axes[1, 0].legend(fontsize=8)
    return figure


def save(pyplot, figure, path):
    """The figure as a file, without the version of what drew it."""
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)
    print(path)
