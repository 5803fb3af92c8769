"""Figs. 6, 8a and 8b from what is kept, into paper/figures/; nothing without matplotlib."""
import importlib.util

import tables
from tables import RESULTS, SCIENCE, mean_and_error, read

MODELS = {"SmolLM2-135M": ("default", "damages", "fp4"),
          "Qwen2.5-0.5B": ("default-qwen-cpu", "damages-qwen", "fp4-qwen")}
STAGES = {"healthy": "C7", "degraded": "C3", "recovered": "C0"}  # a colour each, everywhere


def by_damage(folders):
    """[(damage, runs)] of the defaults with other damages, sorted by what they cost."""
    groups = {}
    for *_, r in read(*(RESULTS / folder for folder in folders)):
        if "recovered" in r["stages"]:
            groups.setdefault(r["config"]["degrade"], []).append(r)

    def cost(group):
        return mean_and_error([r["stages"]["degraded"][SCIENCE] for r in group])[0]
    return sorted(groups.items(), key=lambda item: -cost(item[1]))


def fig6(axis, model):
    """Fig. 6: science by damage, with standard errors over seeds."""
    groups = by_damage(MODELS[model])
    for n, (stage, colour) in enumerate(STAGES.items()):
        both = [mean_and_error([r["stages"][stage][SCIENCE] for r in g]) for _, g in groups]
        axis.barh([i + 0.27 * (1 - n) for i in range(len(groups))], [m for m, _ in both], 0.27,
                  xerr=[e for _, e in both], color=colour, label=stage)
    axis.set_yticks(range(len(groups)), [name for name, _ in groups])
    axis.set(title=model, xlabel="science, right answers in %")


def fig8a(axis, model):
    """Fig. 8a: CKA over samples from healthy to degraded to recovered, a line a damage."""
    for name, group in by_damage(MODELS[model]):
        heights = [1] + [mean_and_error([r["cka"]["samples"][s]["linear_debiased"][-1]
                                         for r in group])[0] for s in ("degraded", "recovered")]
        axis.plot(list(STAGES), heights, marker=".", label=name)
    axis.set(title=model, ylabel="CKA with the healthy model, last layer")


def fig8b(axis, model):
    """Fig. 8b: CKA over samples against science, a point a damage."""
    runs = read(RESULTS / ("sweep" if model.startswith("Smol") else "sweep-qwen"))
    found = tables.points(runs)
    axis.plot([p[2] for p in found], [p[3][SCIENCE] for p in found], "o", color=STAGES["degraded"])
    axis.set(title=model, xlabel="CKA with the healthy model, last layer",
             ylabel="science, right answers in %")


def draw_all():
    """Each figure with a panel a model."""
    if not importlib.util.find_spec("matplotlib"):
        return
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    folder = tables.HERE / "figures"
    folder.mkdir(exist_ok=True)
    for draw in (fig6, fig8a, fig8b):
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
        for axis, model in zip(axes, MODELS):
            draw(axis, model)
        if draw is not fig8b:
            axes[1].legend(fontsize=8)
        figure.savefig(folder / f"{draw.__name__}.png", dpi=80, metadata={"Software": None})
        pyplot.close(figure)
