"""The paper's tables and figures, each with one command; and many runs' results.json as tables.

    python experiments.py table4                         # the runs of one table, then its rows
    python experiments.py table2 baselines sweep         # several, one run after the other
    python experiments.py table4 --steps 50 --model DIR  # further options are for train.py
    python experiments.py report runs/table4 --out DIR   # only the tables and figures of runs
    python experiments.py keep runs/table4               # their numbers into results/table4
    python experiments.py report results/                # what is kept into RESULTS.md, README.md

Each run is `python train.py OPTIONS --seed S --out runs/EXPERIMENT/NUMBER-S`, with S = 0, 1, 2 or
those of --seeds (and the further options in EXPERIMENT). What is done is skipped, so that a command
can be stopped and called again; so is a seed that changes nothing. What came of the runs is
printed, and drawn into runs/EXPERIMENT/report.png. The students are not kept. `report` of this
repository's own results/ writes the tables and pictures that stand on it (claims.py); of any other
folder it prints tables.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import checkpoint
import claims
import evaluate
import fronts
import kept
import pictures
import tables

LEVELS = [
    "int8", "int4", "int4 --group-size 0", "int3", "int3 --group-size 32", "int2 --group-size 32",
    "nf4", "ffn5", "ffn10", "ffn20", "ffn30", "ffn50", "magnitude10", "magnitude20", "magnitude30",
    "magnitude50", "wanda10", "wanda30", "wanda50", "wanda70", "wanda2:4", "ffn10,nf4",
    "wanda30,int4"]
WAYS = "--recover sdft,kd,sft"
VARIANTS = [
    "--loss forward_kl", "--loss reverse_kl", "--loss jsd", "--demo none", "--demo quote",
    "--lora 16", "--ema 0.01", "--cka-weight 0.3", "--cka-weight 1", "--cka-weight 3",
    "--cka-weight 1 --cka-balance", "--watch cka --patience 1"]
FRACTIONS = "5.8e-5", "1.7e-4", "5.2e-4", "1.6e-3", "4.7e-3"  # a factor of 3 apart
METHODS = [  # of a training on a new task, compared at equal gain (fronts.py)
    "--recover sft --interpolate 0.25,0.5,0.75", "--recover sft --anchor 1", "--recover kd",
    "--recover own", "--recover sdft", "--loss reverse_kl", "--skip-tokens 3", "--demo quote"]
DOUBLED = "6.5e-5", "1.3e-4", "2.6e-4", "5.2e-4", "1.04e-3", "2.08e-3", "4.16e-3"
FAIR = [f"{method} --lr-fraction {fraction} --keep last --measure-every 5 --eval-limit 192 "
        "--rollout-tokens 36 --cka-samples 4 --teacher-check 0"  # a tool call has up to 35 tokens
        for method in METHODS for fraction in DOUBLED]
SMALL = "runs/small/student"  # of Table 5: the default model without three tenths of its neurons
SEEDS = (0, 1, 2)

EXPERIMENTS = {  # name -> options of each run, made with every seed
    "table1": [f"--forget tooluse {how} --lr-fraction 2.6e-4 --eval-limit 150"
               for how in ("--teacher base,healthy", "--teacher healthy --demo none")],
    "table1_rate": ["--forget tooluse --teacher base,healthy --eval-limit 150"],
    "table2": ["--degrade nf4 --data science,text",
               "--degrade nf4 --data tooluse,text --eval science"],
    "control": ["--degrade none", "--degrade none --data tooluse,text --eval science"],
    "table4": ["--degrade ffn10 --data science,text --eval tooluse",
               "--degrade ffn10 --data tooluse,text --eval science"],
    "table5": [f"--model {SMALL} {how} --data {task},text" for task in ("science", "tooluse")
               for how in ("--degrade none --steps 50", "--bootstrap BASE")],
    "baselines": [f"--degrade {damage} {WAYS}" for damage in ("int4", "nf4", "ffn10", "wanda30")],
    "settings": [f"--degrade int4 {variant}" for variant in VARIANTS],
    "default": ["--degrade int4", "--degrade nf4", "--degrade ffn10"],
    "damages": [f"--degrade {damage}" for damage in (
        "int3", "ffn10", "ffn20", "wanda50", "ffn10,nf4", "magnitude30", "magnitude2:4")],
    "fp4": ["--degrade nvfp4", "--degrade mxfp4"],
    "rates": [f"--degrade nf4 --lr-fraction {fraction}" for fraction in FRACTIONS],
    "demos": [f"--degrade nf4 --demo {demo}" for demo in ("quote", "none")],
    "teachers": [f"--degrade none --data science,tooluse --demo {demo} --teacher-check 150 "
                 "--steps 1 --eval-limit 4" for demo in ("turn", "quote")],
    "along": [f"--degrade {damage} --measure-every 3 --eval-limit 150"
              for damage in ("int4", "nf4", "ffn10", "wanda50", "magnitude30")],
    "fair": [f"--degrade none --data tooluse --eval science,instructions {run}" for run in FAIR],
    "fair_damaged": [f"--degrade nf4 --data tooluse --eval science,instructions {run}"
                     for run in FAIR],
    "fair_science": [f"--degrade none --data science --eval tooluse,instructions {run}"
                     for run in FAIR],
    "sweep": [f"--degrade {damage} --recover none --eval-limit 150" for damage in LEVELS],
}


class RunFailed(Exception):
    """A run of train.py ended with an error."""


def main(argv=None):
    """The command line; returns the exit code: 2 for a user's mistake, 1 for a run that failed."""
    evaluate.any_terminal()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["report"]:
            asked = parse_report(argv[1:])
            report(asked.runs, asked.out)
        elif argv[:1] == ["keep"]:
            asked = parse_keep(argv[1:])
            for folder in asked.runs:
                kept.keep(Path(folder), asked.name or Path(folder).name, asked.dirty)
        else:
            asked, further = parse_experiments(argv)
            for name in asked.experiments:
                run_experiment(name, asked.seeds, further, asked.best, asked.jobs)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr)
        return 1
    return 0


def parse_experiments(argv):
    """(experiments and seeds, the options that go on to train.py); ValueError for a mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("experiments", nargs="+", choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=seeds_of, default=SEEDS, help="by commas [0,1,2]")
    parser.add_argument("--best", action="store_true", help="of fair…, whose first seed is done: "
                        "of each method the run at its chosen learning rate")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once [1]; two on two cores "
                        "take four fifths of the time of one after the other")
    asked, further = parser.parse_known_args(argv)
    further = [part for word in further for part in (  # --eval=x is --eval x
        word.split("=", 1) if word.startswith("--") else [word])]
    if asked.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {asked.jobs}")
    if "table5" in asked.experiments and ("--model" in further) != ("--bootstrap" in further):
        raise ValueError("table5 makes its own small model of the default one; for others give "
                         "--model SMALL --bootstrap LARGER")
    if asked.best and not set(asked.experiments) <= set(claims.FAIR):
        raise ValueError(f"--best chooses among the learning rates of {', '.join(claims.FAIR)}")
    return asked, further


def parse_report(argv):
    """The folders to report on, and where the picture goes; ValueError for a mistake."""
    parser = argparse.ArgumentParser(
        prog="experiments.py report", description="The tables of finished runs, and their picture.")
    parser.error = refuse
    parser.add_argument("runs", nargs="+", metavar="DIR", help="folders with runs, at any depth")
    parser.add_argument("--out", default="", help="folder for report.png [out]; with it, this "
                        "repository's results/ are printed like any other runs")
    return parser.parse_args(argv)


def parse_keep(argv):
    """The folders of runs to keep, and how; ValueError for a mistake."""
    parser = argparse.ArgumentParser(
        prog="experiments.py keep", description="The numbers of finished runs, into results/.")
    parser.error = refuse
    parser.add_argument("runs", nargs="+", metavar="DIR", help="runs/EXPERIMENT, with NUMBER-SEED/")
    parser.add_argument("--name", default="", help="results/NAME, of one DIR [DIR's own name]")
    parser.add_argument("--dirty", action="store_true", help="keep those of changed code, too, "
                        "marked")
    asked = parser.parse_args(argv)
    if asked.name and len(asked.runs) > 1:
        raise ValueError("--name is of one folder: keep the others by themselves")
    return asked


def report(paths, out):
    """Write what is kept in results/ into the texts; or print the tables of the runs under these
    folders, and draw report.png into `out`."""
    if not out and [Path(path).resolve() for path in paths] == [kept.RESULTS]:
        claims.write()
        return
    runs = tables.read_runs(paths)
    print(tables.all_tables(runs))
    pictures.draw_runs(runs, Path(out or "out"))


def refuse(message):
    """ValueError, in place of argparse's usage and exit."""
    raise ValueError(f"{message} (--help lists the options)")


def seeds_of(text):
    """'0,1' -> (0, 1)."""
    return tuple(int(seed) for seed in text.split(","))


# ------------------------------------------------------------------------------------- Making runs

def run_experiment(name, seeds, further, best=False, jobs=1):
    """Make the runs that are not there yet, then print and draw what came of all of them."""
    folder = Path("runs", "".join([name, *further]).replace("/", "-"))
    runs, further = runs_of(name, further)
    wanted = fronts.best_runs(folder, len(runs)) if best else range(len(runs))
    if SMALL in runs[0]:
        small = "--degrade ffn30 --recover none --eval-limit 1"
        all_done([partial(run, small, Path(SMALL).parent, [], keep=True)], jobs)
    all_done([partial(run, f"{runs[number]} --seed {seed}", folder / f"{number}-{seed}", further,
                      jobs=jobs)
              for seed in seeds for number in wanted
              if seed == seeds[0] or depends_on_seed(runs[number], further)], jobs)
    report([folder], str(folder))


def all_done(calls, jobs):
    """Call all of these, so many at once. After a Ctrl-C, or one that fails, none begins any more;
    what has begun ends, or saves itself."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            made, _ = wait(map(pool.submit, calls), return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
    for one in made:
        one.result()


def depends_on_seed(options, further=()):
    """Whether a run's numbers do: it trains, or its damage looks at training examples.

    >>> [depends_on_seed(f"--degrade {how} --recover none") for how in ("nf4", "ffn10", "wanda2:4")]
    [False, True, True]
    """
    options = " ".join(with_options(options.split(), list(further)))
    ways = re.findall(r"--recover (\S+)", options)
    return ways[-1:] != ["none"] or bool(re.search("ffn|wanda|forget|bootstrap", options))


def runs_of(name, further):
    """(the options of an experiment's runs, those that go to all of them). table5 with a model of
    one's own has no small one to make, and its larger teacher teaches where the default one did."""
    if name != "table5" or "--model" not in further:
        return EXPERIMENTS[name], further
    at = further.index("--bootstrap")
    larger, rest = further[at + 1], further[:at] + further[at + 2:]
    return [options.replace(f"--model {SMALL} ", "").replace("BASE", larger)
            for options in EXPERIMENTS[name]], rest


def run(options, out, further, keep=False, jobs=1):
    """One run of train.py, unless it is done, one of so many at once, which share the cores; its
    students are deleted but for keep."""
    if (out / "results.json").exists() and (not keep or (out / "student").exists()):
        return
    if "BASE" in options:
        options = options.replace("BASE", str(checkpoint.default_model()))
    command = with_options(options.split(), further)
    print(f"python train.py {' '.join(command)}\n", end="", flush=True)  # whole, of several at once
    out.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, str(Path(__file__).parent / "train.py")]
    cores = str(max(1, os.cpu_count() // jobs))
    env = None if jobs == 1 else {"OMP_NUM_THREADS": cores} | os.environ
    with open(out / "log.txt", "w") as log:
        done = subprocess.run([*program, *command, "--out", str(out)], stdout=log, stderr=log,
                              env=env)
    if done.returncode and not (out / "results.json").exists():  # 1 with it: the guard ended it
        raise RunFailed(f"this run failed (exit code {done.returncode}); see {out}/log.txt")
    if not keep:
        for student in out.glob("student*"):
            shutil.rmtree(student)


def with_options(options, further):
    """Both, as one command line: what comes later wins, but everything in --eval is measured, once.

    >>> with_options(["--eval", "a", "--steps", "9"], ["--eval", "b,a"])
    ['--eval', 'a,b', '--steps', '9']
    """
    both = [*options, *further]
    asked = [i for i, word in enumerate(both) if word == "--eval"]
    for i in asked[:0:-1]:
        names = f"{both[asked[0] + 1]},{both[i + 1]}".split(",")
        both[asked[0] + 1] = ",".join(dict.fromkeys(names))
        del both[i:i + 2]
    return both


if __name__ == "__main__":
    sys.exit(main())
