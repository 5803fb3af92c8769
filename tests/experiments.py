"""The paper's tables and figures, each with one command; what is done is skipped, so that it can be stopped and called again.

    python tests/experiments.py table4                         # the runs of one table, then its rows
    python tests/experiments.py table2 baselines sweep         # several, one run after the other
    python tests/experiments.py table4 --steps 50 --model DIR  # further options go to every run of train.py

Each run is `python train.py OPTIONS --seed S --out runs/EXPERIMENT/NUMBER-S`, with S = 0, 1, 2 or those of --seeds (and
the further options in EXPERIMENT). What came of them is printed, and drawn into runs/EXPERIMENT/report.png, by
`python train.py --report runs/EXPERIMENT`. The students are not kept.
"""
import argparse
import shutil
import subprocess
import sys
from pathlib import Path

TRAIN = [sys.executable, str(Path(__file__).parent.parent / "train.py")]
LEVELS = ["int8", "int4", "int4 --group-size 0", "int3", "int3 --group-size 32", "int2 --group-size 32", "nf4", "ffn5", "ffn10",
          "ffn20", "ffn30", "ffn50", "magnitude10", "magnitude20", "magnitude30", "magnitude50", "wanda10", "wanda30", "wanda50",
          "wanda70", "wanda2:4", "ffn10,nf4", "wanda30,int4"]
WAYS = "--recover sdft,kd,sft"
VARIANTS = ["--loss forward_kl", "--loss reverse_kl", "--loss jsd", "--no-demo", "--lr 5e-5", "--lr 2e-4",
            "--train lora --lr 1e-3", "--ema 0.01", "--cka-weight 1", "--cka-weight 1 --cka-balance", "--stop-after 1"]
SMALL = "runs/small/student"  # of Table 5: the default model without three tenths of its neurons

EXPERIMENTS = {  # name -> (options of each run, seeds)
    "table1": ([f"--degrade forget {how} --lr 5e-5 --eval-limit 150" for how in
                ("--teacher base,healthy", "--teacher healthy --no-demo")], (0, 1, 2)),
    "table2": (["--degrade nf4 --data science,text", "--degrade nf4 --data tooluse,text --eval science"], (0, 1, 2)),
    "table4": (["--degrade ffn10 --data science,text", "--degrade ffn10 --data tooluse,text --eval science"], (0, 1, 2)),
    "table5": ([f"--model {SMALL} --degrade none --steps 50", f"--model {SMALL} --degrade none --bootstrap BASE"], (0, 1, 2)),
    "baselines": ([f"--degrade {damage} {WAYS}" for damage in ("int4", "nf4", "ffn10", "wanda30")], (0, 1, 2)),
    "settings": ([f"--degrade int4 {variant}" for variant in VARIANTS], (0, 1, 2)),
    "sweep": ([f"--degrade {damage} --recover none --eval-limit 150" for damage in LEVELS], (0, 1, 2)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), help="instead of the experiment's own")
    chosen, further = parser.parse_known_args()
    if "table5" in chosen.experiments and "--model" in further:
        sys.exit("error: table5 makes its own small model of the default one; for others see --bootstrap of train.py")
    for experiment in chosen.experiments:
        runs, seeds = EXPERIMENTS[experiment]
        seeds = chosen.seeds or seeds
        experiment = "".join([experiment, *further]).replace("/", "-")
        if experiment.startswith("table5"):
            run("--degrade ffn30 --recover none --eval-limit 1", Path("runs/small"), [], keep=True)
        for seed in seeds:
            for number, options in enumerate(runs):
                run(f"{options} --seed {seed}", Path("runs", experiment, f"{number}-{seed}"), further)
        subprocess.run([*TRAIN, "--report", f"runs/{experiment}", "--out", f"runs/{experiment}"], check=True)


def with_options(options, further):
    """Both, as one command line: what comes later wins, but for --eval, of which everything is measured."""
    both = [*options, *further]
    asked = [i for i, word in enumerate(both) if word == "--eval"]
    for i in asked[:0:-1]:
        both[asked[0] + 1] += "," + both[i + 1]
        del both[i:i + 2]
    return both


def run(options, out, further, keep=False):
    """One run of train.py, unless it is done; its models are deleted but for keep."""
    if (out / "results.json").exists():
        return
    if "BASE" in options:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        import fetch
        options = options.replace("BASE", str(fetch.default_model()))
    command = with_options(options.split(), further)
    print(f"python train.py {' '.join(command)}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "w") as log:
        done = subprocess.run([*TRAIN, *command, "--out", str(out)], stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"error: this run failed (exit code {done.returncode}); see {out}/log.txt")
    for folder in out.glob("student*") if not keep else ():
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
