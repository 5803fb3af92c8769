"""The paper's tables, each with one command; and finished runs as tables.

    python paper/experiments.py table4                      # the runs of one table, then its rows
    python paper/experiments.py table2 sweep --seeds 0         # several, one run after the other
    python paper/experiments.py table4 --steps 50 --model DIR  # further options are train.py's
    python paper/experiments.py keep runs/table4               # their numbers into paper/results/
    python paper/experiments.py report                         # what is kept into RESULTS.md
    python paper/experiments.py report runs/table4             # the rows of these runs

Each run is `python train.py OPTIONS --seed S --out runs/EXPERIMENT/NUMBER-S`. What is done is
skipped, so the same command goes on after an interruption. Students are not kept.
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "paper")]

import tables

import model

LEVELS = [
    "int8", "int4", "int4 --group-size 0", "int3", "int3 --group-size 32", "int2 --group-size 32",
    "nf4", "ffn5", "ffn10", "ffn20", "ffn30", "ffn50", "magnitude10", "magnitude20", "magnitude30",
    "magnitude50", "wanda10", "wanda30", "wanda50", "wanda70", "wanda2:4", "ffn10,nf4",
    "wanda30,int4"]
VARIANTS = [
    "--loss forward_kl", "--loss reverse_kl", "--loss jsd", "--demo none", "--demo quote",
    "--lora 16", "--recover ema", "--recover cka --cka-weight 0.3", "--recover cka",
    "--recover cka --cka-weight 3", "--recover cka --cka-balance", "--recover stop"]
SMALL = "runs/small/student"  # of Table 5: the default model without three tenths of its neurons
EXPERIMENTS = {  # name -> options of each run, made with every seed
    "table1": [f"--forget tooluse {how} --lr-fraction 2.6e-4 --eval-limit 150"
               for how in ("--teacher base,healthy", "--teacher healthy --demo none")],
    "table1_rate": ["--forget tooluse --teacher base,healthy --eval-limit 150"],
    "table2": ["--degrade nf4", "--degrade nf4 --data tooluse,text --eval science"],
    "control": ["--degrade none", "--degrade none --data tooluse,text --eval science"],
    "table4": ["--degrade ffn10 --eval tooluse",
               "--degrade ffn10 --data tooluse,text --eval science"],
    "table5": [f"--model {SMALL} {how} --data {task},text" for task in ("science", "tooluse")
               for how in ("--degrade none --steps 50", "--bootstrap BASE")],
    "baselines": [f"--degrade {damage} --recover sdft,kd,sft"
                  for damage in ("int4", "nf4", "ffn10", "wanda50")],
    "settings": [f"--degrade int4 {variant}" for variant in VARIANTS],
    "default": ["--degrade int4", "--degrade nf4", "--degrade ffn10"],
    "damages": [f"--degrade {damage}" for damage in (
        "int3", "ffn10", "ffn20", "wanda50", "ffn10,nf4", "magnitude30", "magnitude2:4")],
    "fp4": ["--degrade nvfp4", "--degrade mxfp4"],
    "rates": [f"--degrade nf4 --lr-fraction {fraction}"
              for fraction in ("5.8e-5", "1.7e-4", "5.2e-4", "1.6e-3", "4.7e-3")],
    "demos": [f"--degrade nf4 --demo {demo}" for demo in ("quote", "none")],
    "teachers": [f"--degrade none --data science,tooluse --demo {demo} --teacher-check 150 "
                 "--steps 1 --eval-limit 4" for demo in ("turn", "quote")],
    "sweep": [f"--degrade {damage} --recover none --eval-limit 150" for damage in LEVELS]}
METRICS = "science_phrasing", "science_element", "tooluse_request", "perplexity"


def main(argv=None):
    """The command line; returns the exit code: 2 for a mistake, 1 for a run that failed."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["report"]:
            report(argv[1:])
        elif argv[:1] == ["keep"]:
            for folder in argv[1:]:
                keep(Path(folder))
        else:
            parser = argparse.ArgumentParser(
                description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
            parser.add_argument("experiments", nargs="+", choices=list(EXPERIMENTS))
            parser.add_argument("--seeds", default="0,1,2", help="by commas [0,1,2]")
            asked, further = parser.parse_known_args(argv)
            for name in asked.experiments:
                run_all(name, [int(seed) for seed in asked.seeds.split(",")], further)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (subprocess.CalledProcessError, KeyboardInterrupt) as error:
        print(f"error: {error or 'interrupted'}; the same command goes on", file=sys.stderr)
        return 1
    return 0


def run_all(name, seeds, further):
    """Make an experiment's runs that are not there yet, then print their rows."""
    folder = Path("runs", "".join([name, *further]).replace("/", "-"))
    if SMALL in EXPERIMENTS[name][0] and "--model" not in further:
        run("--degrade ffn30 --recover none --eval-limit 1".split(), Path(SMALL).parent, keep=True)
    for seed in seeds:
        for number, options in enumerate(EXPERIMENTS[name]):
            words = options.replace("BASE", str(model.default_model())).split()
            run([*words, *further, "--seed", str(seed)], folder / f"{number}-{seed}")
    print(tables.table(tables.read(folder), METRICS))


def run(options, out, keep=False):
    """One run of train.py, unless it is done; CalledProcessError if it leaves no results."""
    if (out / "results.json").exists() and (not keep or (out / "student").exists()):
        return
    print("python train.py", *options, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *options, "--out", str(out)]
    with open(out / "log.txt", "w") as log:
        done = subprocess.run(command, stdout=log, stderr=log)
    if not (out / "results.json").exists():  # exit code 1 with results: the training was ended
        raise subprocess.CalledProcessError(done.returncode, " ".join(options))
    for student in out.glob("student*") if not keep else ():
        shutil.rmtree(student)


def keep(folder):
    """The numbers of runs/NAME as paper/results/NAME/NUMBER-SEED.json, without what no table needs.

    ValueError for runs whose code no commit has.
    """
    runs = tables.read(folder)
    if not runs:
        raise ValueError(f"keep {folder}: no NUMBER-SEED/results.json in it")
    for _, number, seed, results in runs:
        if not re.fullmatch("[0-9a-f]{40}", results["environment"]["revision"]):
            raise ValueError(f"{folder}/{number}-{seed}: no commit has its code: run it again")
        for part in ("step", "cka_layers", "answers", "items"):
            results.pop(part, None)
        results["environment"]["model"] = Path(results["environment"]["model"]).name
        text = json.dumps(json.loads(json.dumps(results), parse_float=lambda x: round(float(x), 6)))
        path = tables.RESULTS / folder.name / f"{number}-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace('}, "', '},\n"') + "\n", encoding="utf-8")
        print(path)


def report(folders):
    """RESULTS.md's tables and the figures from what is kept; or the rows of the runs in folders."""
    if folders:
        print(tables.table(tables.read(*folders), METRICS))
        return
    tables.write()
    import figures
    figures.draw_all()


if __name__ == "__main__":
    sys.exit(main())
