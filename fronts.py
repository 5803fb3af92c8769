"""A fair comparison: at equal gain on the trained task, which method keeps most of what the model
could do before?

Each recovery gives points: its end, the checkpoints on its way (--measure-every), the weights
between start and end (--interpolate). A point's gain is that of the trained task's accuracy over
the model that training began with; its retention, the change of the other accuracies against the
healthy model, their mean. A method is a run's options but for learning rate and seed; its points
are averaged over seeds. What is chosen (a learning rate, which points lie on a method's front) is
chosen on the even items of each test, and what is reported is read on the odd ones.
"""
from dataclasses import dataclass

import numpy as np

import tables
import train

SHARES = 0.25, 0.5, 0.75  # of the best gain: where retention is read
CHOSEN, SCORED = slice(0, None, 2), slice(1, None, 2)


@dataclass
class Point:
    """A model that some method made, its items averaged over seeds."""

    method: str
    rate: float       # --lr, or --lr-fraction
    step: int
    part: float       # of the way from start to end; 1 for a model as it was trained
    seeds: int
    seconds: float
    items: dict       # accuracy -> [n], 0 to 1
    healthy: dict     # the same of the healthy model
    start: dict       # and of the model that training began with
    kl: dict          # text -> KL(healthy || model), nats per token


# ---------------------------------------------------------------------------------------- Points

def scenes(runs):
    """{(data, damage): [Point, …]} of runs as tables.read_runs has them; those without items, of
    earlier versions, are left out."""
    found = {}
    for _, stage, results in runs:
        config = results["config"]
        if results["items"]:
            scene = found.setdefault((config["data"], config["degrade"] or "none"), {})
            for point in points_of(stage, results):
                key = point.method, point.rate, point.step, point.part
                scene.setdefault(key, []).append(point)
    return {key: list(map(averaged, scene.values())) for key, scene in found.items()}


def points_of(stage, results):
    """Every Point of one recovery, of one seed."""
    config, items = results["config"], results["items"]
    rate = config["lr"] or config["lr_fraction"]
    own = method_of(config, stage)
    spent = results["seconds"].get(f"{stage} training", 0.0)
    at_end = {text: of_stage.get(stage, np.nan) for text, of_stage in results["kl"].items()}
    before = [accuracies(items[name]) for name in ("healthy", "degraded")]
    found = [Point(own, rate, config["steps"], 1.0, 1, spent, accuracies(items[stage]), *before,
                   at_end)]
    for p in results["along"].get(stage, []):
        name = own if p["part"] is None else f"{own}, interpolated"
        part = 1.0 if p["part"] is None else p["part"]
        if (p["step"], part) != (config["steps"], 1.0):  # that is the end
            found.append(Point(name, rate, p["step"], part, 1, p["seconds"],
                               accuracies(p["items"]), *before, p["kl"]))
    return found


def method_of(config, stage="recovered"):
    """A run's options but for seed, learning rate, data and damage; and which of its recoveries.

    >>> method_of({"degrade": "none", "recover": "sft", "lr": 1e-4, "data": "tooluse"})
    '--recover sft'
    """
    default = train.Config()
    same = {name: getattr(default, name) for name in ("lr", "lr_fraction", "data")}
    name = tables.name_of(config | same | {"degrade": "none"}).replace("--degrade none", "")
    way = stage.removeprefix("recovered").removeprefix("_")
    return " ".join([*name.split(), *way.split()]) or "sdft"


def accuracies(items):
    """{metric: [n] of 0 and 1}, without the perplexities.

    >>> accuracies({"task": "011", "perplexity": "2.7 2.5"})
    {'task': array([0., 1., 1.])}
    """
    return {metric: np.array([float(c) for c in text]) for metric, text in items.items()
            if not metric.startswith("perplexity")}


def averaged(points):
    """One Point of those of several seeds."""
    def mean(dictionaries):
        return {key: np.mean([d[key] for d in dictionaries], 0) for key in dictionaries[0]}
    p = points[0]
    return Point(p.method, p.rate, p.step, p.part, len(points),
                 float(np.mean([q.seconds for q in points])),
                 *(mean([getattr(q, name) for q in points])
                   for name in ("items", "healthy", "start", "kl")))


# ----------------------------------------------------------------------------- Gain and retention

def trained(point, data):
    """The metrics of the task that was trained on: those that begin with its name."""
    return [m for m in point.items if m.startswith(tuple(f"{t}_" for t in data.split(",")))]


def gain(point, data, part, draw=None):
    """Points of accuracy that the trained task gained over the start, on this part of the items.

    draw: {metric: indices into that part}, for a bootstrap; {} and None: all of it.
    """
    return float(np.mean([percent(point.items, m, part, draw) - percent(point.start, m, part, draw)
                          for m in trained(point, data)]))


def retention(point, data, part, draw=None, metric=None):
    """The mean change of the other accuracies against the healthy model, or of one of them."""
    others = [metric] if metric else retained(point, data)
    changes = [percent(point.items, m, part, draw) - percent(point.healthy, m, part, draw)
               for m in others]
    return float(np.mean(changes))


def retained(point, data):
    """The metrics of what was not trained on."""
    mine = trained(point, data)
    return [m for m in point.items if m not in mine]


def percent(items, metric, part, draw):
    """A metric's mean over a part of its items, or a draw of them, in percent."""
    values = items[metric][part]
    return 100 * (values[draw[metric]] if draw else values).mean()


def front(points, data):
    """The points that no other of their method beats in both gain and retention, on the items that
    choose; by gain, those below the start's left out."""
    scored = [(gain(p, data, CHOSEN), retention(p, data, CHOSEN), p) for p in points]
    found, best = [], -np.inf
    for g, kept, p in sorted(scored, key=lambda x: (-x[0], -x[1])):
        if g > 0 and kept > best:
            found.append(p)
            best = kept
    return found[::-1]


def read(line, wanted):
    """The value at a wanted gain along [(gain, value), …], by linear interpolation; nan beyond the
    last. Its first point is the start of training.

    >>> read([(0, 0.0), (10, -2.0), (20, -6.0)], 15.0)
    -4.0
    """
    x, y = np.array(sorted(line)).T
    return float(np.interp(wanted, x, y)) if wanted <= x[-1] + 1e-9 else float("nan")


def line_of(points, data, value, at_start, draw=None):
    """[(gain, value(point)), …] of a front on the items that score, from (0, at_start) on."""
    return [(0.0, at_start), *((gain(p, data, SCORED, draw), value(p)) for p in points)]


def retained_at(points, data, wanted, draw=None, metric=None):
    """Retention of a front at a wanted gain."""
    p = points[0]
    start = Point(p.method, 0, 0, 0, 1, 0, p.start, p.healthy, p.start, {})
    value = retention(start, data, SCORED, draw, metric)
    return read(line_of(points, data, lambda p: retention(p, data, SCORED, draw, metric), value,
                        draw), wanted)


def drawn_items(point, samples):
    """Draws of the scored items with replacement, {metric: indices}: the same for every method."""
    rng = np.random.default_rng(0)
    sizes = {metric: len(values[SCORED]) for metric, values in point.items.items()}
    for _ in range(samples):
        yield {metric: rng.integers(n, size=n) for metric, n in sizes.items()}


def difference(one, other, data, wanted, samples=1000):
    """'a - b [low, high]': retention of two fronts at a wanted gain, with the 95 % interval of a
    paired bootstrap over test items; '' where one does not get there.

    A draw in which one falls short of that gain is left out.
    """
    value = retained_at(one, data, wanted) - retained_at(other, data, wanted)
    if np.isnan(value):
        return ""
    found = [retained_at(one, data, wanted, draw) - retained_at(other, data, wanted, draw)
             for draw in drawn_items(one[0], samples)]
    low, high = tables.bounds(found)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


# ------------------------------------------------------------------------------------------ Tables

def fronts_of(points, data):
    """{method: its front}, of methods that gained anything."""
    methods = dict.fromkeys(p.method for p in points)
    found = {m: front([p for p in points if p.method == m], data) for m in methods}
    return {method: points for method, points in found.items() if points}


def reference(methods):
    """Which of the methods the others are compared with: the plainest sft, or the first.

    >>> reference(["--demo quote", "--anchor 1.0 --recover sft", "--recover sft"])
    '--recover sft'
    """
    plain = sorted((m for m in methods if m.split()[-1] == "sft"), key=len)
    return plain[0] if plain else next(iter(methods))


def gains_table(runs):
    """Retention at equal gain: a row for each method and share of the best gain of all."""
    lines = []
    for (data, damage), points in scenes(runs).items():
        found = fronts_of(points, data)
        if found:
            best = max(gain(p, data, SCORED) for front in found.values() for p in front)
            lines += gain_rows(found, data, damage, best)
    return "\n".join(lines)


def gain_rows(found, data, damage, best):
    """One scene's part of `gains_table`, with a heading of its own."""
    base, first = reference(found), next(iter(found.values()))[0]
    others = retained(first, data)
    header = ["method", "at a gain of", "retention", f"less that of `{base}`", *others,
              *(f"KL, {text}" for text in first.kl), "points on the front"]
    lines = ["", f"{data}, from {damage}: the best gain is {best:.1f} points", "",
             "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for share in SHARES:
        for method, points in found.items():
            at = share * best
            each = [retained_at(points, data, at, metric=m) for m in (None, *others)]
            kl = [read(line_of(points, data, lambda p, t=text: p.kl[t], 0.0), at)
                  for text in first.kl]
            told = "" if method == base else difference(points, found[base], data, at)
            cells = [f"`{method}`", f"{at:.1f} ({share:.0%})", shown(each[0]), told,
                     *map(shown, each[1:]), *(shown(x, 3) for x in kl), str(len(points))]
            lines.append("| " + " | ".join(cells) + " |")
    return lines if damage != "none" else [line.replace(", from none", "") for line in lines]


def shown(value, digits=1):
    """A number with its sign (KL: without), or a dash where the front ends before."""
    if np.isnan(value):
        return "–"
    return f"{value:+.{digits}f}" if digits == 1 else f"{value:.{digits}f}"


def tuned_table(runs):
    """Each method at the learning rate of the best gain on the items that choose, at its end."""
    lines = ["| trained on | from | method | rate | gain | retention | KL | seconds | seeds |",
             "|" + "---|" * 9]
    for (data, damage), points in scenes(runs).items():
        ends = [p for p in points if p.part == 1 and p.step == last_step(points, p.method)]
        for method in dict.fromkeys(p.method for p in ends):
            p = max((p for p in ends if p.method == method),
                    key=lambda p: gain(p, data, CHOSEN))
            kl = next(iter(p.kl.values()), np.nan)
            cells = [data, damage, f"`{method}`", f"{p.rate:.1e}",
                     shown(gain(p, data, SCORED)), shown(retention(p, data, SCORED)), shown(kl, 3),
                     f"{p.seconds:.0f}", str(p.seeds)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def last_step(points, method):
    return max(p.step for p in points if p.method == method)


# ----------------------------------------------------------------------------------------- Picture

def draw(pyplot, runs):
    """A figure of all points and fronts, a row a scene: gain against retention, and against KL."""
    found = scenes(runs)
    figure, axes = pyplot.subplots(max(1, len(found)), 2, layout="constrained", squeeze=False,
                                   figsize=(14, 5.5 * max(1, len(found))))
    for pair, ((data, damage), points) in zip(axes, found.items()):
        fronts = fronts_of(points, data)
        for i, method in enumerate(dict.fromkeys(p.method for p in points)):
            mine = [p for p in points if p.method == method]
            draw_method(pair, mine, fronts.get(method, []), data, f"C{i}", method)
        pair[0].set(title=f"{data}, from {damage}", xlabel="gain on the task, points",
                    ylabel="change of what is retained, points")
        pair[1].set(xlabel="gain on the task, points", ylabel="KL(healthy || student), nats")
        pair[0].legend(fontsize=7)
    return figure


def draw_method(pair, points, front, data, color, label):
    """One method's points and its front in both panels."""
    values = (lambda p: retention(p, data, SCORED),
              lambda p: next(iter(p.kl.values()), np.nan))
    for axis, value in zip(pair, values):
        axis.plot([gain(p, data, SCORED) for p in points], list(map(value, points)), ".",
                  color=color, alpha=0.5)
        line = sorted((gain(p, data, SCORED), value(p)) for p in front)
        if line:
            axis.plot(*zip(*line), "-", color=color, label=label)
