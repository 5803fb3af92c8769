"""A fair comparison: at equal gain on the trained task, which method keeps most of what the model
could do before?

Each recovery gives points: its end, the checkpoints on its way (--measure-every), the weights
between start and end (--interpolate). A point's gain is that of the trained task's accuracy over
the model that training began with; its retention, the mean change of the other accuracies against
the healthy model. A method is a run's options but for learning rate and seed.

Half of each test's items choose: by the first seed a method's learning rate, and by all seeds which
of its points lie on its front. What is reported is read on the other half. Neighbours of a test ask
about one thing, so that blocks of items are what is chosen with, scored with, and drawn.
"""
import dataclasses
import re
from dataclasses import dataclass

import numpy as np

import tables
import train

SHARES = 0.25, 0.5, 0.75  # of the best gain: where retention is read
BLOCK = 8                 # items
CHOSEN, SCORED, ALL = 0, 1, 2  # the even blocks, the odd ones, both
SDFT, SFT = "sdft", "--recover sft"


@dataclass
class Point:
    """A model that some method made, of each of some seeds."""

    method: str
    rate: float       # --lr, or --lr-fraction
    step: int
    part: float       # of the way from start to end; 1 for a model as it was trained
    seeds: tuple      # their numbers
    ended: tuple      # whether the guard ended the training of each
    seconds: float    # of training up to here, the mean over seeds
    items: dict       # accuracy -> [seeds, n], 0 or 1
    healthy: dict     # the same of the healthy model
    start: dict       # and of the model that training began with
    kl: dict          # text -> KL(healthy || model), nats per token, the mean over seeds
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
    return {key: shortened(list(map(joined, scene.values()))) for key, scene in found.items()}


def shortened(points):
    """The same points, their methods named without the options that all of them have."""
    options = {p.method: re.split(" (?=--)", p.method) for p in points}
    shared = set.intersection(*map(set, options.values())) if len(options) > 1 else set()
    shared = {o for o in shared if not o.startswith("--recover")}
    for p in points:
        p.method = " ".join(o for o in options[p.method] if o not in shared) or SDFT
    return points


def points_of(stage, results):
    """Every Point of one recovery, of one seed: those on its way, or its end where there are none;
    and those between its start and its end."""
    config, items, kl = results["config"], results["items"], results["kl"]
    rate, own = config["lr"] or config["lr_fraction"], method_of(config, stage)
    ended = bool(results.get("guard", {}).get(stage, {}).get("ended"))
    before = [accuracies(items[name]) for name in ("healthy", "degraded")]
    at_start = {text: of_stage.get("degraded", 0.0) for text, of_stage in kl.items()}
    end = {"step": config["steps"], "part": None, "items": items[stage],
           "seconds": results["seconds"].get(f"{stage} training", 0.0),
           "kl": {text: of_stage.get(stage, np.nan) for text, of_stage in kl.items()}}
    between = [p for p in results["along"].get(stage, []) if p["part"] is not None]
    found = []
    for p in [*(tables.measured_on_the_way(results, stage) or [end]), *between]:
        name, part = (own, 1.0) if p["part"] is None else (f"{own} --interpolate", p["part"])
        found.append(Point(name.strip(), rate, p["step"], part, (config["seed"],), (ended,),
                           p["seconds"], accuracies(p["items"]), *before, p["kl"], at_start))
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
    """{metric: [1, n] of 0 and 1}, without the perplexities.

    >>> accuracies({"task": "011", "perplexity": "2.7 2.5"})
    {'task': array([[0., 1., 1.]])}
    """
    return {metric: np.array([[float(c) for c in text]]) for metric, text in items.items()
            if not metric.startswith("perplexity") and len(text) > 1}


def joined(points):
    """One Point of those of several seeds."""
    points = sorted(points, key=lambda p: p.seeds)
    p = points[0]

    def together(name, how):
        """{key: how(this of all points)}."""
        dictionaries = [getattr(q, name) for q in points]
        return {key: how([d[key] for d in dictionaries]) for key in dictionaries[0]}
    return Point(p.method, p.rate, p.step, p.part, sum((q.seeds for q in points), ()),
                 sum((q.ended for q in points), ()), float(np.mean([q.seconds for q in points])),
                 *(together(name, np.concatenate) for name in ("items", "healthy", "start")),
                 *(together(name, np.mean) for name in ("kl", "start_kl")))


def of_first_seed(p):
    """The same of its first seed alone."""
    first = {name: {m: x[:1] for m, x in getattr(p, name).items()}
             for name in ("items", "healthy", "start")}
    return dataclasses.replace(p, seeds=p.seeds[:1], ended=p.ended[:1], **first)


# ----------------------------------------------------------------------------- Gain and retention

def trained(point, data):
    """The metrics of the task that was trained on: those that begin with its name."""
    return [m for m in point.items if m.startswith(tuple(f"{t}_" for t in data.split(",")))]


def retained(point, data):
    """The metrics of what was not trained on."""
    mine = trained(point, data)
    return [m for m in point.items if m not in mine]


def weights_of(point, part, samples=0):
    """({metric: [n, 1 + samples]}, [seeds, 1]): how much each item and each seed counts, each
    column's sum 1. In the first column all items of the part count alike; in the others its blocks
    as often as they are drawn, with replacement (seed 0)."""
    rng, found, seeds = np.random.default_rng(0), {}, len(point.seeds)
    for metric, values in point.items.items():
        block = np.arange(values.shape[1]) // max(1, min(BLOCK, values.shape[1] // 2))
        mine = np.flatnonzero((block % 2 == part) | (part == ALL))
        names, its_own = np.unique(block[mine], return_inverse=True)
        n = len(names)
        draws = rng.multinomial(n, np.full(n, 1 / n), size=samples)
        counts = np.vstack([np.ones(n), draws]).T[its_own]
        found[metric] = np.zeros((len(block), 1 + samples))
        found[metric][mine] = counts / counts.sum(0)
    return found, np.full((seeds, 1), 1 / seeds)


def change(items, before, metrics, weights):
    """Points of accuracy, the mean over metrics, from one model's items to another's: [columns] of
    the weights.

    >>> once = {"a": np.full((2, 1), 0.5)}, np.ones((1, 1))
    >>> change({"a": np.array([[1, 1]])}, {"a": np.array([[0, 1]])}, ["a"], once)
    array([50.])
    """
    of_items, of_seeds = weights
    found = [100 * ((items[m] - before[m]) @ of_items[m] * of_seeds).sum(0) for m in metrics]
    return np.mean(found, 0)


def gain(point, data, part):
    """What the trained task gained over the start, on this part of the items."""
    once = weights_of(point, part)
    return float(change(point.items, point.start, trained(point, data), once)[0])


def retention(point, data, part):
    """The mean change of the other accuracies against the healthy model."""
    once = weights_of(point, part)
    return float(change(point.items, point.healthy, retained(point, data), once)[0])


def front(points, data):
    """The corners of the upper hull of the start and those of these points that gained something,
    by gain and retention on the items that choose: a straight line between two points is what a
    coin thrown between the two models gives, and one that lies below it is of no use."""
    scored = [(gain(p, data, CHOSEN), retention(p, data, CHOSEN), p) for p in points]
    hull = [(0.0, kept_at_start(points[0], data, CHOSEN), None)] if points else []
    for x, y, p in sorted(scored, key=lambda point: point[:2]):
        if x > 0:
            while len(hull) > 1 and not_above(hull[-1], hull[-2], (x, y)):
                hull.pop()
            hull.append((x, y, p))
    return [p for *_, p in hull[1:]]


def not_above(point, before, after):
    """Whether a point (x, y, …) lies on the line from one before it to one after it, or below.

    >>> [not_above((1, 1), (0, 0), after) for after in ((2, 3), (2, 2), (2, 1), (1, 2))]
    [True, True, False, True]
    """
    rise, whole = point[1] - before[1], after[1] - before[1]
    return rise * (after[0] - before[0]) <= whole * (point[0] - before[0]) + 1e-9


def kept_at_start(point, data, part):
    """The retention of the model that training began with."""
    once = weights_of(point, part)
    return float(change(point.start, point.healthy, retained(point, data), once)[0])


def at_chosen_rate(points, data, wanted):
    """A method's points at one learning rate: that which retains most at the wanted gain, or where
    none gets there, that gains most, by the first seed on the items that choose; none whose
    training the guard ended at that seed. [] where there is no such rate."""
    rates, first = {}, min(p.seeds[0] for p in points)
    for p in points:
        rates.setdefault(p.rate, []).append(p)
    by_first = {rate: [of_first_seed(p) for p in found if p.seeds[0] == first]
                for rate, found in rates.items()}  # a seed that ended early has points of its own

    def merit(rate):
        """(retention at the wanted gain, -inf beyond the front; the greatest gain)."""
        found = by_first[rate]
        line, gains = front(found, data), [gain(p, data, CHOSEN) for p in found]
        others, once = retained(found[0], data), weights_of(found[0], CHOSEN)
        kept = retained_at(line, data, wanted, others, once)[0] if line else np.nan
        return -np.inf if np.isnan(kept) else kept, max(gains)
    whole = [rate for rate, found in by_first.items() if found and not found[0].ended[0]]
    found = rates[max(whole, key=merit)] if whole else []
    most = max((p.seeds for p in found), key=len, default=())
    return [p for p in found if p.seeds == most]  # without the late ones where a seed ended early


def read(gains, values, wanted):
    """The value at a wanted gain along points of a front, by linear interpolation; nan beyond the
    greatest gain.

    >>> read([20, 0, 10], [-6.0, 0.0, -2.0], 15.0)
    -4.0
    """
    x, y = np.array(sorted(zip(gains, values))).T
    return float(np.interp(wanted, x, y)) if wanted <= x[-1] + 1e-9 else float("nan")


def retained_at(points, data, wanted, metrics, weights):
    """Retention (of these metrics) of a front at a wanted gain: [columns] of the weights. A front
    begins at (0, what the start retains)."""
    first, mine = points[0], trained(points[0], data)
    x = [change(p.items, p.start, mine, weights) for p in points]
    y = [change(p.items, p.healthy, metrics, weights) for p in points]
    x.append(np.zeros_like(x[0]))
    y.append(change(first.start, first.healthy, metrics, weights))
    return np.array([read(*xy, wanted) for xy in zip(np.array(x).T, np.array(y).T)])


def kl_at(points, data, wanted, text):
    """KL(healthy || student) on a text, of a front at a wanted gain."""
    gains = [0.0, *(gain(p, data, SCORED) for p in points)]
    return read(gains, [points[0].start_kl[text], *(p.kl[text] for p in points)], wanted)


def first_kl(point):
    """KL(healthy || student) on the first text; nan where there is none."""
    return next(iter(point.kl.values()), np.nan)


def after(points, data, seconds):
    """(gain, retention) after so many seconds of training, between a way's points in time."""
    way = sorted((p.seconds, gain(p, data, SCORED), retention(p, data, SCORED)) for p in points)
    x, *ys = np.array([(0.0, 0.0, kept_at_start(points[0], data, SCORED)), *way]).T
    return [float(np.interp(seconds, x, y)) for y in ys]


# ------------------------------------------------------------------------------------- The question

def chosen(points, data):
    """{method: its points at its chosen rate}: chosen at half of the best gain of all."""
    first = [gain(of_first_seed(p), data, CHOSEN) for p in points if not p.ended[0]]
    found = {}
    for method in dict.fromkeys(p.method for p in points):
        mine = [p for p in points if p.method == method]
        found[method] = at_chosen_rate(mine, data, max(first, default=0.0) / 2)
    return {method: way for method, way in found.items() if way}


def lines_of(points, data):
    """{method: the front of its points at its chosen rate}, of methods that gain anything."""
    found = {method: front(way, data) for method, way in chosen(points, data).items()}
    return {method: line for method, line in found.items() if line}


def best_gain(lines, data):
    """The greatest gain of any method, on the items that score."""
    return max(gain(p, data, SCORED) for line in lines.values() for p in line)


def difference(one, other, data, wanted, samples=1000):
    """(a - b, low, high): retention of two fronts at a wanted gain, the mean over the seeds, which
    are the same, with its 95 % interval; () where one of the two does not get there at some seed.

    The interval is that of a bootstrap over blocks of the retained tests' items, drawn alike for
    the two, and that of the seeds' mean by Student's t, the two widths added in square. The gain is
    that on all of the trained task's items, in each draw. Of one seed the interval is not known.
    """
    metrics, n = retained(one[0], data), len(one[0].seeds)
    items, _ = weights_of(one[0], SCORED, samples)
    for m in trained(one[0], data):
        items[m] = items[m][:, :1].repeat(1 + samples, 1)
    drawn = np.array([np.subtract(*(  # [seeds, 1 + samples]
        retained_at(points, data, wanted, metrics, (items, np.eye(n)[:, [k]]))
        for points in (one, other))) for k in range(n)])
    if np.isnan(drawn).any():
        return ()
    value, *draws = drawn.mean(0)
    low, high = np.array(tables.bounds(draws)) - value
    seeds = tables.of_seeds(drawn[:, 0]) if n > 1 else np.nan
    return tuple(float(value + x) for x in (0, -np.hypot(low, seeds), np.hypot(high, seeds)))


def told(found):
    """'a - b [low, high]' of a `difference`, 'a - b' of one seed, '' of none.

    >>> told((1.25, -0.5, 3.0)), told((1.25, np.nan, np.nan))
    ('+1.2 [-0.5, +3.0]', '+1.2')
    """
    if not found:
        return ""
    value, *ends = (tables.rounded(x, 1, "+") for x in found)
    return value if "+nan" in ends else f"{value} [{', '.join(ends)}]"


def answer(points, data):
    """(seeds; SDFT's retention less SFT's at half of the best gain, or at a quarter if one of them
    does not get as far, as text; which of them keeps more, by whether the interval is off 0): the
    question of RESULTS.md, and the rule that was written down there before the first run."""
    lines = lines_of(points, data)
    if not {SDFT, SFT} <= set(lines):
        return "", "", "not known: both must be there, and gain"
    one, other = lines[SDFT], lines[SFT]
    if one[0].seeds != other[0].seeds or any(one[0].ended + other[0].ended):
        return "", "", "not known: not the same seeds, or the guard ended one"
    best = best_gain(lines, data)
    half, quarter = (difference(one, other, data, share * best) for share in (0.5, 0.25))
    if best <= 0 or not (half or quarter):
        return "", "", "not known: one of them does not gain so much"
    _, low, high = found = half or quarter
    word = "SDFT keeps more" if low > 0 else "SFT keeps more" if high < 0 else "not decided"
    word = word if len(one[0].seeds) > 1 else "not known: one seed"
    word += "" if half else ", at a quarter: one does not gain half"
    return ", ".join(map(str, one[0].seeds)), told(found), word


# ------------------------------------------------------------------------------------------ Tables

def answers_table(runs):
    """The answer to the question, a row for each task and damage. '' where nothing is retained."""
    rows = ["| trained on | from | seeds | retention, SDFT less SFT, at half of the best gain | "
            "answer |", "|---|---|---|---|---|"]
    for (data, damage), points in scenes(runs).items():
        if retained(points[0], data):
            rows.append("| " + " | ".join([data, damage, *answer(points, data)]) + " |")
    return "\n".join(rows) if len(rows) > 2 else ""


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
    text = []
    for (data, damage), points in scenes(runs).items():
        lines = lines_of(points, data) if retained(points[0], data) else {}
        if lines:
            origin = "the healthy model" if damage == "none" else f"`{damage}`"
            text += ["", f"Trained on {data}, from {origin}: {len(points)} points of "
                     f"{len({p.method for p in points})} methods.", "", *gain_rows(lines, data)]
    return "\n".join(text).lstrip()


def gain_rows(lines, data):
    """One table of `gains_table`."""
    base, first = reference(lines), next(iter(lines.values()))[0]
    others, once = retained(first, data), {
        method: weights_of(line[0], SCORED) for method, line in lines.items()}
    header = ["method", "rate", "seeds", "at a gain of", "retention", f"less that of `{base}`",
              *others, *(f"KL, {text}" for text in first.kl)]
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for share in SHARES:
        at = share * best_gain(lines, data)
        for method, line in lines.items():
            each = [retained_at(line, data, at, metrics, once[method])[0]
                    for metrics in (others, *([m] for m in others))]
            kl = [kl_at(line, data, at, text) for text in first.kl]
            alike = method != base and line[0].seeds == lines[base][0].seeds
            apart = difference(line, lines[base], data, at) if alike else ()
            cells = [f"`{method}`", f"{line[0].rate:.1e}", str(len(line[0].seeds)),
                     f"{at:.1f} ({share:.0%})", shown(each[0]), told(apart),
                     *map(shown, each[1:]), *(shown(x, 3) for x in kl)]
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def shown(value, digits=1):
    """A number with its sign (KL: without), or a dash where the front ends before."""
    if np.isnan(value):
        return "–"
    return tables.rounded(value, digits, "+" if digits == 1 else "")


def ends_table(runs):
    """The last step at each learning rate: gain and retention on all of the items, and KL(healthy
    || student) on the first text; a row for each method and part of the way. It chooses nothing."""
    text = []
    for (data, damage), points in scenes(runs).items():
        ends = {}  # method and part -> rate -> the last of its points
        for p in sorted(points, key=lambda p: (p.step, len(p.seeds))):
            name = f"`{p.method}`" + (f" {p.part:g}" if p.part < 1 else "")
            ends.setdefault(name, {})[p.rate] = p
        rates = sorted({p.rate for p in points})
        header = [f"{data}, from {damage}", *(f"{rate:.1e}" for rate in rates)]
        text += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for name, by_rate in ends.items():
            cells = [told_end(by_rate[rate], data) if rate in by_rate else "" for rate in rates]
            text.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(text).lstrip()


def told_end(point, data):
    """Gain, retention and KL of a point, on all of the items."""
    return (f"{gain(point, data, ALL):.0f}, {shown(retention(point, data, ALL))}, "
            f"{shown(first_kl(point), 3)}")


def tuned_table(runs):
    """Each method at its chosen learning rate (an asterisk: the lowest or the highest): at its last
    step, and in as many seconds of training as the fastest method takes for all of its steps; a
    step takes what it took at the least up to any of the way's points, since other work slows some.
    """
    rows = ["| trained on | from | method | rate | seeds | gain | retention | KL | seconds | in | "
            "gain then | retention then |", "|" + "---|" * 12]
    for (data, damage), points in scenes(runs).items():
        ways = {m: timed([p for p in way if p.part == 1])
                for m, way in chosen(points, data).items() if any(p.part == 1 for p in way)}
        rates = {m: {p.rate for p in points if p.method == m} for m in ways}
        ends = {m: max(way, key=lambda p: p.step) for m, way in ways.items()}
        seconds = min((p.seconds for p in ends.values()), default=0.0)
        for method, p in ends.items():
            edge = len(rates[method]) > 1 and p.rate in (min(rates[method]), max(rates[method]))
            cells = [data, damage, f"`{method}`", f"{p.rate:.1e}{'*' * edge}", str(len(p.seeds)),
                     shown(gain(p, data, SCORED)), shown(retention(p, data, SCORED)),
                     shown(first_kl(p), 3), f"{p.seconds:.0f}",
                     f"{seconds:.0f} s", *map(shown, after(ways[method], data, seconds))]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) if len(rows) > 2 else ""


def timed(way):
    """The points of a way, each with the seconds that so many steps take at the least, by these
    points."""
    least = min((p.seconds / p.step for p in way if p.step), default=0.0)
    return [dataclasses.replace(p, seconds=p.step * least) for p in way]


def best_runs(folder, n):
    """Numbers of the runs folder/NUMBER-0, NUMBER < n, of each method the one at its chosen
    learning rate. ValueError unless all of them are done."""
    found, points = {}, []
    for file in sorted(folder.glob("*-0/results.json")):
        results, number = tables.read_results(file), int(file.parent.name.split("-")[0])
        data = results["config"]["data"]
        for point in points_of("recovered", results):
            found[point.method, point.rate] = number
            points.append(point)
    done = set(found.values())
    if done != set(range(n)):
        raise ValueError(f"{folder}: --best chooses by the runs of seed 0, and {len(done)} of {n} "
                         "are done")
    lines = lines_of(points, data)
    return sorted({found[method, line[0].rate] for method, line in lines.items()})


# ----------------------------------------------------------------------------------------- Picture

def draw(pyplot, runs):
    """A figure of all points and fronts, a row a scene: gain against retention, and against KL."""
    found = scenes(runs)
    figure, axes = pyplot.subplots(max(1, len(found)), 2, layout="constrained", squeeze=False,
                                   figsize=(14, 5.5 * max(1, len(found))))
    for pair, ((data, damage), points) in zip(axes, found.items()):
        lines = lines_of(points, data)
        for i, method in enumerate(dict.fromkeys(p.method for p in points)):
            mine = [p for p in points if p.method == method]
            draw_method(pair, mine, lines.get(method, []), data, f"C{i}", method)
        pair[0].set(title=f"{data}, from {damage}", xlabel="gain on the task, points",
                    ylabel="change of what is retained, points")
        pair[1].set(xlabel="gain on the task, points", ylabel="KL(healthy || student), nats")
        pair[0].legend(fontsize=7)
    return figure


def draw_method(pair, points, front, data, color, label):
    """One method's points and its front in both panels."""
    values = (lambda p: retention(p, data, SCORED)), first_kl
    for axis, value in zip(pair, values):
        axis.plot([gain(p, data, SCORED) for p in points], list(map(value, points)), ".",
                  color=color, alpha=0.5)
        line = sorted((gain(p, data, SCORED), value(p)) for p in front)
        if line:
            axis.plot(*zip(*line), "-", color=color, label=label)
