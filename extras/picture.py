"""report.png: the loss by step, CKA by layer and between all layers, a step token by token.

It is drawn wherever this file and matplotlib are there.
"""
import math
import warnings
from pathlib import Path


def attach(parts):
    """Draw after all else is written."""
    write = parts["write"]

    def write_and_draw(c, results, trained, students):
        write(c, results, trained, students)
        lines = [line for memory in trained.values() for line in memory["lines"]]
        draw(results, lines, Path(c.out) / "report.png")
    parts["write"] = write_and_draw


def draw(results, steps, path):
    """The picture of results.json's content and of the lines of metrics.jsonl, as a file."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    rows = step_rows(results)
    height = 0.4 * len(rows)
    figure = pyplot.figure(figsize=(16, 4 + height), layout="constrained")
    panels = figure
    if rows:
        panels, strips = figure.subfigures(2, 1, height_ratios=[4, height])
        draw_step(strips, rows)
    left, middle, right = panels.subplots(1, 3)
    draw_curves(left, [s for s in steps if s["stage"].startswith("recovered")])
    left.set(title=f"Recovery from {results['config']['degrade']}", xlabel="step", ylim=0)
    draw_cka(middle, results["cka"])
    draw_layers(panels, right, list(results["stages"])[-1], results["cka_layers"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a token may have characters that no font has
        figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


def draw_curves(axis, steps):
    """Each recovery's KL by step; its loss where it has no KL."""
    for stage in dict.fromkeys(s["stage"] for s in steps):
        mine = [s for s in steps if s["stage"] == stage]
        shown, name = ("kl", "KL") if "kl" in mine[0] else ("loss", "cross-entropy")
        axis.plot([s["step"] + 1 for s in mine], [s[shown] for s in mine], label=f"{stage}: {name}")
    axis.set(ylabel="nats per token")
    if axis.lines:
        axis.legend()


def draw_cka(axis, levels):
    """CKA with the healthy model by layer: a line a stage, dotted over tokens."""
    for level, style in (("tokens", ":"), ("samples", "-")):
        for i, (stage, kinds) in enumerate(levels.get(level, {}).items()):
            values = kinds["linear_debiased"]
            axis.plot(range(1, len(values) + 1), values, style, color=f"C{i}",
                      label=f"{stage}, {level}")
    axis.set(title="CKA with the healthy model (linear, debiased)", xlabel="layer")
    if axis.lines:
        axis.legend()


def draw_layers(figure, axis, stage, layers_of):
    """CKA of every layer of this stage's model with every layer of the healthy one, as colours."""
    if stage not in layers_of:
        return
    layers = layers_of[stage]
    edges = [0.5, len(layers) + 0.5]  # layers are counted from 1
    picture = axis.imshow(layers, origin="lower", vmin=0, vmax=1, extent=edges * 2)
    axis.set(title=f"CKA over samples, {stage} x healthy",
             xlabel="layer of the healthy model", ylabel=f"layer, {stage}")
    figure.colorbar(picture, ax=axis)


def step_rows(results):
    """[(label, tokens)] of the first recovery's trace; a prompt's heading has no tokens."""
    rows = []
    for traces in list(results.get("step", {}).values())[:1]:
        for first, last in zip(traces["first"], traces["last"]):
            rows.append((" ".join(first["prompt"].split()), []))
            rows.append(("before", first["tokens"]))
            rows.append(("after", last["tokens"]))
    return rows


def draw_step(figure, rows):
    """The student's tokens, a strip a row, coloured by KL; below them what the teacher prefers."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    axis = figure.subplots()
    colours = ScalarMappable(Normalize(0, 2, clip=True),  # the same in every run: pictures compare
                             LinearSegmentedColormap.from_list("kl", ["whitesmoke", "tomato"]))
    cells = [strip_cells(tokens) for _, tokens in rows]
    width = max(100, *(sum(len(shown) for shown, _, _ in row) for row in cells)) + 8
    size = min(9, 1600 / width)  # of the font: 16 inches hold `width` characters
    style = {"family": "monospace", "va": "center", "parse_math": False}
    for y, (label, _) in enumerate(rows):
        x = 8
        axis.text(0, y, label, size=9 if not cells[y] else size, **style)
        for (shown, below, kl) in cells[y]:
            axis.broken_barh([(x, len(shown) - 0.3)], (y - 0.45, 0.9), color=colours.to_rgba(kl))
            axis.text(x + 0.2, y - 0.15, shown.rstrip(), size=size, **style)
            axis.text(x + 0.2, y + 0.25, below, size=0.75 * size, color="dimgray", **style)
            x += len(shown)
    axis.set(xlim=(0, width), ylim=(len(rows) - 0.5, -0.5))
    axis.set_axis_off()
    axis.set_title("A step, shown: the student's tokens; below them what the teacher prefers, "
                   "where that differs", fontsize=10, loc="left")
    figure.colorbar(colours, ax=axis, extend="max", label="KL(teacher || student)", pad=0.01,
                    aspect=10)


def strip_cells(tokens):
    """(token, what the teacher prefers, KL) of each, the token padded to its cell's width."""
    cells = []
    for t in tokens:
        same = t["favourite"] == t["token"]
        shown, below = visible(t["token"])[:12], "" if same else visible(t["favourite"])[:12]
        width = max(len(shown), math.ceil(0.75 * len(below))) + 1
        cells.append((f"{shown:{width}}", below, t["kl"]))
    return cells


def visible(token):
    r"""A token as one word: blanks as dots, what has no glyph escaped.

    >>> print(visible(" is\n"))
    ·is\n
    """
    return "".join("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in token)
