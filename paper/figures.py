"""Figs. 6, 8a and 8b from what is kept, into paper/figures/: a panel a model."""
import importlib.util

import tables
from tables import SCIENCE, kept, mean_and_error

MODELS = {"SmolLM2-135M": ("default", "damages", "fp4"),
          "Qwen2.5-Coder-0.5B": ("default-qwen", "damages-qwen", "fp4-qwen")}
SWEEPS = {"SmolLM2-135M": "sweep", "Qwen2.5-Coder-0.5B": "sweep-qwen"}
STAGES = {"healthy": "C7", "degraded": "C3", "recovered": "C0"}  # a colour each, everywhere


def by_damage(model):
    """{damage: runs} of the default recovery, by what the damage leaves of science, most first."""
    groups = {}
    for experiment in MODELS[model]:
        for number in range(8):  # the same damage of two experiments counts once
            runs = kept(f"{experiment}/{number}")
            if runs:
                groups.setdefault(runs[0]["config"]["degrade"], runs)
    return dict(sorted(groups.items(), key=lambda item: -mean_and_error(
        [r["stages"]["degraded"][SCIENCE] for r in item[1]])[0]))


def fig6(axis, model):
    """Fig. 6: science by damage, with standard errors over seeds."""
    groups = by_damage(model)
    for n, (stage, colour) in enumerate(STAGES.items()):
        bars = [mean_and_error([r["stages"][stage][SCIENCE] for r in runs])
                for runs in groups.values()]
        axis.barh([row + 0.27 * (n - 1) for row in range(len(bars))], [mean for mean, _ in bars],
                  0.27, xerr=[error for _, error in bars], color=colour, label=stage)
    axis.set_yticks(range(len(groups)), list(groups))
    axis.invert_yaxis()
    axis.set(title=model, xlabel="science, right answers in %")
    axis.legend()


def fig8a(axis, model):
    """Fig. 8a: CKA over samples from healthy to degraded to recovered, a line a damage."""
    names = sorted({name for other in MODELS for name in by_damage(other)})
    for name, runs in by_damage(model).items():
        line = [1] + [mean_and_error([r["cka"]["samples"][stage]["linear_debiased"][-1]
                                      for r in runs])[0] for stage in ("degraded", "recovered")]
        n = names.index(name)  # a damage has one colour and style in both panels
        axis.plot(list(STAGES), line, marker=".", color=f"C{n % 10}", label=name,
                  linestyle=("-", "--")[n // 10])
    axis.set(title=model, ylabel="CKA with the healthy model, last layer, over samples")
    axis.legend(fontsize=8, loc="lower left")


def fig8b(axis, model):
    """Fig. 8b: CKA over samples against science, a point a damage."""
    for r in kept(SWEEPS[model]):
        axis.plot(*tables.damaged(r, "samples", SCIENCE), "o", color=STAGES["degraded"])
    axis.set(title=model, xlabel="CKA with the healthy model, last layer, over samples",
             ylabel="science, right answers in %")


def draw_all(folder=tables.HERE / "figures"):
    """fig6.png, fig8a.png and fig8b.png; without matplotlib nothing."""
    if not importlib.util.find_spec("matplotlib"):
        return
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    folder.mkdir(exist_ok=True)
    for draw in (fig6, fig8a, fig8b):
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
        for axis, model in zip(axes, MODELS):
            draw(axis, model)
        figure.savefig(folder / f"{draw.__name__}.png", dpi=80, metadata={"Software": None})
        pyplot.close(figure)
