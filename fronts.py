"""A fair comparison: at equal gain on the trained task, which method keeps most of what the model
could do before?

Each recovery gives points: its end, the checkpoints on its way (--measure-every), the weights
between start and end (--interpolate). A point's gain is that of the trained task's accuracy over
the model that training began with; its retention, the change of the other accuracies against the
healthy model, their mean. A method is a run's options but for learning rate and seed; its points
are averaged over seeds. What is chosen (a learning rate, which points lie on a method's front) is
chosen on the even items of each test, and what is reported is read on the odd ones.
"""
import re
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
    start_kl: dict    # the same of the model that training began with


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
    return {key: shortened(list(map(averaged, scene.values()))) for key, scene in found.items()}


def shortened(points):
    """The same points, their methods named without the options that all of them have."""
    options = {p.method: re.split(" (?=--)", p.method) for p in points}
    shared = set.intersection(*map(set, options.values())) if len(options) > 1 else set()
    for p in points:
        p.method = " ".join(o for o in options[p.method] if o not in shared) or "sdft"
    return points


def points_of(stage, results):
    """Every Point of one recovery, of one seed: those on its way, or its end where there are none;
    and those between its start and its end."""
    config, items, kl = results["config"], results["items"], results["kl"]
    rate, own = config["lr"] or config["lr_fraction"], method_of(config, stage)
    before = [accuracies(items[name]) for name in ("healthy", "degraded")]
    at_start = {text: of_stage.get("degraded", 0.0) for text, of_stage in kl.items()}
    end = {"step": config["steps"], "part": None, "items": items[stage],
           "seconds": results["seconds"].get(f"{stage} training", 0.0),
           "kl": {text: of_stage.get(stage, np.nan) for text, of_stage in kl.items()}}
    between = [p for p in results["along"].get(stage, []) if p["part"] is not None]
    found = []
    for p in [*(tables.measured_on_the_way(results, stage) or [end]), *between]:
        name, part = (own, 1.0) if p["part"] is None else (f"{own} --interpolate", p["part"])
        found.append(Point(name.strip(), rate, p["step"], part, 1, p["seconds"],
                           accuracies(p["items"]), *before, p["kl"], at_start))
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
    return " ".join([*name.split(), *way.split()])


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
                   for name in ("items", "healthy", "start", "kl", "start_kl")))


# ----------------------------------------------------------------------------- Gain and retention

def trained(point, data):
    """The metrics of the task that was trained on: those that begin with its name."""
    return [m for m in point.items if m.startswith(tuple(f"{t}_" for t in data.split(",")))]


def retained(point, data):
    """The metrics of what was not trained on."""
    mine = trained(point, data)
    return [m for m in point.items if m not in mine]


def weights_of(point, part, samples=0):
    """{metric: [n, 1 + samples]}: how much each item of a part counts, all alike in the first
    column, and as often as it is drawn, with replacement, in the others (seed 0)."""
    rng, found = np.random.default_rng(0), {}
    for metric, values in point.items.items():
        n = len(values[part])
        draws = rng.multinomial(n, np.full(n, 1 / n), size=samples)
        found[metric] = np.vstack([np.ones((1, n)), draws]).T / n
    return found


def change(items, before, metrics, part, weights):
    """Points of accuracy, the mean over metrics, from one model's items to another's, by weights:
    [columns].

    >>> once = {"a": np.full((2, 1), 0.5)}
    >>> change({"a": np.array([1, 0, 1, 1])}, {"a": np.zeros(4)}, ["a"], SCORED, once)
    array([50.])
    """
    found = [100 * (items[m][part] - before[m][part]) @ weights[m] for m in metrics]
    return np.mean(found, 0)


def gain(point, data, part):
    """What the trained task gained over the start, on this part of the items."""
    metrics, weights = trained(point, data), weights_of(point, part)
    return float(change(point.items, point.start, metrics, part, weights)[0])


def retention(point, data, part):
    """The mean change of the other accuracies against the healthy model."""
    metrics, weights = retained(point, data), weights_of(point, part)
    return float(change(point.items, point.healthy, metrics, part, weights)[0])


def front(points, data):
    """The points that no other of their method beats in both gain and retention, on the items that
    choose; without those that gained nothing."""
    scored = [(gain(p, data, CHOSEN), retention(p, data, CHOSEN), p) for p in points]
    found, best = [], -np.inf
    for gained, kept, p in sorted(scored, key=lambda x: (-x[0], -x[1])):
        if gained > 0 and kept > best:
            found.append(p)
            best = kept
    return found[::-1]


def read(gains, values, wanted):
    """The value at a wanted gain along points of a front, by linear interpolation; nan beyond the
    greatest gain.

    >>> read([20, 0, 10], [-6.0, 0.0, -2.0], 15.0)
    -4.0
    """
    x, y = np.array(sorted(zip(gains, values))).T
    return float(np.interp(wanted, x, y)) if wanted <= x[-1] + 1e-9 else float("nan")


def retained_at(points, data, wanted, metrics, weights):
    """Retention (of these metrics) of a front at a wanted gain, on the items that score: [columns].
    A front begins at (0, what the start retains)."""
    first, mine = points[0], trained(points[0], data)
    x = [change(p.items, p.start, mine, SCORED, weights) for p in points]
    y = [change(p.items, p.healthy, metrics, SCORED, weights) for p in points]
    x.append(np.zeros_like(x[0]))
    y.append(change(first.start, first.healthy, metrics, SCORED, weights))
    return np.array([read(*xy, wanted) for xy in zip(np.array(x).T, np.array(y).T)])


def kl_at(points, data, wanted, text):
    """KL(healthy || student) on a text, of a front at a wanted gain."""
    gains = [0.0, *(gain(p, data, SCORED) for p in points)]
    return read(gains, [points[0].start_kl[text], *(p.kl[text] for p in points)], wanted)


def difference(one, other, data, wanted, samples=1000):
    """(a - b, low, high): retention of two fronts at a wanted gain, with the 95 % interval of a
    paired bootstrap over test items; () where one does not get there.

    A draw in which one falls short of that gain is left out.
    """
    weights, metrics = weights_of(one[0], SCORED, samples), retained(one[0], data)
    a, b = (retained_at(points, data, wanted, metrics, weights) for points in (one, other))
    if np.isnan(a[0] - b[0]):
        return ()
    return float(a[0] - b[0]), *tables.bounds(list((a - b)[1:]))


def told(found):
    """'a - b [low, high]' of a `difference`, '' of none.

    >>> told((1.25, -0.5, 3.0))
    '+1.2 [-0.5, +3.0]'
    """
    value, *ends = (tables.rounded(x, 1, "+") for x in found or [0])
    return f"{value} [{', '.join(ends)}]" if found else ""


def answer(points, data):
    """(SDFT's retention less SFT's, where both have half of the best gain of any method, as text;
    which of them keeps more, by whether the interval is off 0): the question of RESULTS.md, and the
    rule that was written down there before the first run."""
    found = fronts_of(points, data)
    best = max(gain(p, data, SCORED) for line in found.values() for p in line) if found else 0
    both = [found.get(method) for method in ("sdft", "--recover sft")]
    apart = difference(*both, data, best / 2) if all(both) else ()
    if not apart:
        return "", "not known: one of them does not gain so much"
    _, low, high = apart
    word = "SDFT keeps more" if low > 0 else "SFT keeps more" if high < 0 else "not decided"
    return told(apart), word


# ------------------------------------------------------------------------------------------ Tables

def fronts_of(points, data):
    """{method: its front}, of methods that gained anything."""
    methods = dict.fromkeys(p.method for p in points)
    found = {m: front([p for p in points if p.method == m], data) for m in methods}
    return {method: points for method, points in found.items() if points}


def reference(methods):
    """Which of the methods the others are compared with: the plainest sft, or the first.

    >>> reference(["--demo quote", "--recover sft --anchor 1.0", "--recover sft"])
    '--recover sft'
    """
    plain = sorted((m for m in methods if re.search(r"--recover sft(?!\S)", m)), key=len)
    return plain[0] if plain else next(iter(methods))


def gains_table(runs):
    """Retention at equal gain: a table for each task and damage, a row for each method and share of
    the best gain of all methods."""
    lines = []
    for (data, damage), points in scenes(runs).items():
        found = fronts_of(points, data) if retained(points[0], data) else {}
        if found:
            origin = "the healthy model" if damage == "none" else f"`{damage}`"
            lines += ["", f"Trained on {data}, from {origin}: {len(points)} points of "
                      f"{len(found)} methods.", "", *gain_rows(found, data)]
    return "\n".join(lines).lstrip()


def answers_table(runs):
    """The answer to the question, a row for each task and damage. '' where nothing is retained."""
    lines = ["| trained on | from | retention, SDFT less SFT, at half of the best gain | answer |",
             "|---|---|---|---|"]
    for (data, damage), points in scenes(runs).items():
        if retained(points[0], data):
            lines.append("| " + " | ".join([data, damage, *answer(points, data)]) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def gain_rows(found, data):
    """One table of `gains_table`."""
    base, first = reference(found), next(iter(found.values()))[0]
    best = max(gain(p, data, SCORED) for points in found.values() for p in points)
    others, once = retained(first, data), weights_of(first, SCORED)
    header = ["method", "at a gain of", "retention", f"less that of `{base}`", *others,
              *(f"KL, {text}" for text in first.kl), "points on the front"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for share in SHARES:
        for method, points in found.items():
            at = share * best
            each = [retained_at(points, data, at, metrics, once)[0]
                    for metrics in (others, *([m] for m in others))]
            kl = [kl_at(points, data, at, text) for text in first.kl]
            apart = () if method == base else difference(points, found[base], data, at)
            cells = [f"`{method}`", f"{at:.1f} ({share:.0%})", shown(each[0]), told(apart),
                     *map(shown, each[1:]), *(shown(x, 3) for x in kl), str(len(points))]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def shown(value, digits=1):
    """A number with its sign (KL: without), or a dash where the front ends before."""
    if np.isnan(value):
        return "–"
    return tables.rounded(value, digits, "+" if digits == 1 else "")


def tuned_table(runs):
    """Each method at the learning rate of the best gain on the items that choose, at its last
    step."""
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


def best_runs(folder):
    """Numbers of the runs folder/NUMBER-0 of each method whose learning rate gained most at its
    end, on the items that choose. ValueError where there are none."""
    found = {}
    for file in sorted(folder.glob("*-0/results.json")):
        results = tables.read_results(file)
        ends = [p for p in points_of("recovered", results) if p.part == 1]
        last = max(ends, key=lambda p: p.step)
        mine = gain(last, results["config"]["data"], CHOSEN), int(file.parent.name.split("-")[0])
        found[last.method] = max(found.get(last.method, mine), mine)
    if not found:
        raise ValueError(f"{folder}: --best chooses by the runs of seed 0, and none is done")
    return sorted(number for _, number in found.values())


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
