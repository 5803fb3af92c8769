"""What --degrade may say, and what does it (§5.2): neurons removed, weights held at zero, grids."""
import math
import re
from pathlib import Path

from tqdm import tqdm

import parallel
import prune
import quant
from files import require


def remove_neurons(student, match, c, sequences):
    """ffn10: of each block's hidden neurons, for good; what was done, in numbers."""
    norms = activations(student, sequences) if c.importance == "activation" else None
    before = student.config.d_ff * student.config.n_layer
    fraction, multiple = int(match["percent"] or 10) / 100, check_groups(student.config, c)
    removed = prune.prune_ffn_(student, fraction, norms, multiple)
    return {"neurons": before, "neurons_removed": removed}


def hold_at_zero(student, match, c, sequences):
    """wanda30, magnitude2:4: single weights, while the student trains; how many."""
    norms = activations(student, sequences) if match["method"] == "wanda" else None
    n, m = (int(match["n"]), int(match["m"])) if match["m"] else (None, None)
    sparsity = int(match["percent"] or 30) / 100
    zeros = prune.prune_(student, match["method"], sparsity, n, m, norms)
    return {"weights_held_at_zero": zeros}


def put_on_grid(student, match, c, sequences):
    """int4, nf4, nvfp4: every linear of the blocks; how many weights."""
    group_size = c.group_size or None
    n = quant.quantize_(student, match["scheme"], group_size, c.symmetric, c.double_quant)
    return {"weights_quantized": n}


# What --degrade may say -> what does it: a function of (student, the match, Config, ids to take
# activations from), which returns what it did, in numbers.
DAMAGES = {
    r"ffn(?P<percent>\d+)?": remove_neurons,
    r"(?P<method>magnitude|wanda)((?P<n>\d+):(?P<m>\d+)|(?P<percent>\d+))?": hold_at_zero,
    r"(?P<scheme>int[2-8]|nf4|nvfp4|mxfp4)": put_on_grid,
}


def parse_damage(text):
    """'int4,ffn10' -> [(function, match), …] of DAMAGES; ValueError for others.

    They are in the order in which they are done: neurons and what a fork adds, masks, grids.
    """
    found = {}
    for scheme in text.split(",") if text != "none" else []:
        matches = {pattern: re.fullmatch(pattern, scheme) for pattern in DAMAGES}
        pattern = next((pattern for pattern, match in matches.items() if match), None)
        require(pattern, f"--degrade: unknown damage {scheme!r}: {_hint(scheme)}")
        twice = f"{found[pattern][0]} and {scheme}" if pattern in found else ""
        require(not twice, f"--degrade: {twice} cannot both be done to one weight")
        found[pattern], said = matches[pattern], matches[pattern].groupdict()
        require(int(said.get("percent") or 0) < 100, f"--degrade: {scheme} would leave nothing")
        n, m = int(said.get("n") or 1), int(said.get("m") or 1)
        require(0 < n <= m, f"--degrade: {scheme} keeps {n} of {m}: it must keep 1 at least")
    last = {hold_at_zero: 1, put_on_grid: 2}  # then linear.weight is computed anew at each use
    chosen = [(DAMAGES[pattern], match) for pattern, match in found.items()]
    return sorted(chosen, key=lambda pair: last.get(pair[0], 0))


def _hint(scheme):
    if scheme == "forget":
        return "it is now --forget TASK"
    if scheme and Path(scheme).is_dir():
        return "a damaged model is now --student DIR"
    return "choose of ffn10, magnitude30, wanda30, wanda2:4, int4, nf4, nvfp4, mxfp4, or none"


def check_groups(config, c):
    """The number that the neurons kept in a block must be a multiple of.

    ValueError if the groups of what comes after neurons, n:m or a quantization's, do not fit the
    linears of a GPTConfig.
    """
    sizes, damages = {}, parse_damage(c.degrade)
    for what, match in damages:
        if what is hold_at_zero and match["m"]:
            sizes[f"{match[0]}: its groups of {match['m']} do"] = int(match["m"])
        scheme = match["scheme"] if what is put_on_grid else ""
        if scheme in quant.FP4_BLOCK:
            sizes[f"{scheme}: its blocks of {quant.FP4_BLOCK[scheme]} do"] = quant.FP4_BLOCK[scheme]
        if scheme.startswith("int") and c.group_size:
            sizes[f"group_size {c.group_size} does"] = c.group_size
    multiple, d_ff = math.lcm(*sizes.values()), config.d_ff
    if any(what is remove_neurons for what, _ in damages):
        require(multiple <= d_ff, f"--degrade: groups of {multiple} cannot be made of a block's "
                                  f"{d_ff} neurons")
        d_ff = multiple  # a multiple of it will be left, no more is known here
    for name, size in sizes.items():
        for inputs in (config.d_model, config.n_head * config.head_dim, d_ff):
            require(inputs % size == 0, f"{name} not divide the {inputs} inputs of a linear layer")
    return multiple


def activations(student, sequences):
    """`prune.input_norms`, with a progress bar."""
    quiet = parallel.rank() > 0
    with tqdm(total=len(sequences), desc="calibrate", unit="row", disable=quiet) as bar:
        return prune.input_norms(student, sequences, bar.update)


def damage_(student, c, sequences):
    """Do all that --degrade says, in place; what was done, in numbers."""
    done = {}
    for what, match in parse_damage(c.degrade):
        done |= what(student, match, c, sequences)
    return done
