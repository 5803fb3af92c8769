"""The paper's tables, each with one command; and finished runs as tables.

    python paper/experiments.py table4                         # the runs of a table, then its rows
    python paper/experiments.py table2 sweep --seeds 0         # several, one run after the other
    python paper/experiments.py table4 --steps 50 --model DIR  # further options are train.py's
    python paper/experiments.py report runs/table4             # the rows of these runs
    python paper/experiments.py keep runs/table4 --name mine   # their numbers: paper/results/mine
    python paper/experiments.py report                         # what is kept into RESULTS.md

Each run is `python train.py OPTIONS --seed S --out runs/EXPERIMENT/NUMBER-S`. What is done is
skipped, so the same command goes on after an interruption. Students are not kept.
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "paper")]

import tables

import model
import train

LEVELS = (
    "int8", "int4", "int4 --group-size 0", "int3", "int3 --group-size 32", "int2 --group-size 32",
    "nf4", "ffn5", "ffn10", "ffn20", "ffn30", "ffn50", "magnitude10", "magnitude20", "magnitude30",
    "magnitude50", "wanda10", "wanda30", "wanda50", "wanda70", "wanda2:4", "ffn10,nf4",
    "wanda30,int4")
VARIANTS = (
    "--loss forward_kl", "--loss reverse_kl", "--loss jsd", "--demo none", "--demo quote",
    "--lora 16", "--recover ema", "--recover cka --cka-weight 0.3", "--recover cka",
    "--recover cka --cka-weight 3", "--recover cka --cka-balance", "--recover stop",
    "--recover anchor", "--recover own")
SMALL = "runs/small/student"  # Table 5's small model: the default one, less 3/10 of its neurons
EXPERIMENTS = {  # name -> options of each run, which every seed gets; BASE is the larger teacher
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
                  for damage in ("int4", "nf4", "ffn10", "wanda30")],
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
METRICS = tables.SCIENCE, "science_element", tables.TOOLS, "perplexity"


def main(argv=None):
    """The command line; returns the exit code: 2 for a mistake, 1 for a run that failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = partial(train.require, False)  # a ValueError: one line
    try:
        if argv[:1] == ["report"]:
            report(argv[1:])
        elif argv[:1] == ["keep"]:
            parser.add_argument("folder", type=Path)
            parser.add_argument("--name", default="", help="in paper/results [the folder's]")
            asked = parser.parse_args(argv[1:])
            keep(asked.folder, asked.name or asked.folder.name)
        else:
            parser.add_argument("experiments", nargs="+", choices=list(EXPERIMENTS))
            parser.add_argument("--seeds", default="0,1,2", help="by commas [0,1,2]")
            parser.add_argument("--bootstrap", default="", help="table5's larger teacher")
            asked, further = parser.parse_known_args(argv)
            seeds = [int(seed) for seed in asked.seeds.split(",")]
            for name in asked.experiments:
                run_all(name, seeds, asked.bootstrap, further)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (subprocess.CalledProcessError, KeyboardInterrupt) as error:
        print(f"error: {error or 'interrupted'}; the same command goes on", file=sys.stderr)
        return 1
    return 0


def run_all(name, seeds, larger, further):
    """Make an experiment's runs that are not there yet, then print their rows."""
    folder = Path("runs", "".join([name, *further]).replace("/", "-"))
    if name == "table5" and "--model" not in further:
        run("--degrade ffn30 --recover none --eval-limit 1".split(), Path(SMALL).parent, keep=True)
    for seed in seeds:
        for number, options in enumerate(EXPERIMENTS[name]):
            if "BASE" in options:
                options = options.replace("BASE", larger or str(model.default_model()))
            if seed != seeds[0] and "--recover none" in options \
                    and not re.search("ffn|wanda", options):
                continue  # nothing in it is drawn
            run([*options.split(), *further, "--seed", str(seed)], folder / f"{number}-{seed}")
    print(tables.table_of(folder, METRICS))


def run(options, out, keep=False):
    """One run of train.py, unless it is done; CalledProcessError if it leaves no results."""
    if (out / "results.json").exists() and (not keep or (out / "student").exists()):
        return
    print("python train.py", *options, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *options, "--out", str(out)]
    with open(out / "log.txt", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    if not (out / "results.json").exists():  # with them, code 1 says that the training was ended
        last = (out / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        raise subprocess.CalledProcessError(code, "".join(last) or " ".join(options))
    for student in out.glob("student*") if not keep else ():
        shutil.rmtree(student)


def keep(folder, name):
    """The numbers of a folder's runs as paper/results/NAME/NUMBER-SEED.json.

    They are kept without what no table needs and without this machine's paths. ValueError for runs
    whose code no commit has.
    """
    runs = tables.read(folder)
    if not runs:
        raise ValueError(f"{folder}: no NUMBER-SEED/results.json in it")
    for number, seed, results in runs:
        if not re.fullmatch("[0-9a-f]{40}", results["environment"]["revision"]):
            raise ValueError(f"{folder}/{number}-{seed}: no commit has its code: run it again")
    for number, seed, results in runs:
        results = {part: values for part, values in results.items()
                   if part not in ("step", "cka_layers", "answers", "items")}
        for facts in (results["config"], results["environment"]):
            for key, value in facts.items():
                if isinstance(value, str):  # of a path from the root its last part
                    facts[key] = re.sub(r"(?<![^\s,])[/~][^\s,]*/(?=[^\s,])", "", value)
        results["environment"]["commit"] = results["environment"]["revision"][:7]
        text = json.dumps(json.loads(
            json.dumps(results), parse_float=lambda x: float(f"{float(x):.8g}")))
        path = tables.RESULTS / name / f"{number}-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace('}, "', '},\n"') + "\n", encoding="utf-8")
        print(f"{path}: {tables.options_of(results)}")


def report(folders):
    """The rows of the runs in these folders; without folders RESULTS.md's tables and figures."""
    for folder in folders:
        if not tables.read(folder):
            raise ValueError(f"{folder}: no NUMBER-SEED/results.json in it")
        print(tables.table_of(folder, METRICS))
    if not folders:
        import figures
        tables.write()
        figures.draw_all()


if __name__ == "__main__":
    sys.exit(main())
