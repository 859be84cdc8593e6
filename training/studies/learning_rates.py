"""One learning rate for two teachers: short runs of training/distill.py over a grid, their best rates side by side.

    python -m training.studies.learning_rates training/results/learning_rates \
        --run "digits, 96 wide" "training/configs/distill/digits_k3.yaml --stage2_steps 200" \
        --run "ViT-S/14, 384 wide" "training/configs/distill/digits_k3.yaml --stage2_steps 60 --teacher path/to/vits14"

Each `--run` has a name and the arguments of training/distill.py, to which the rate and the output folder are added.
A run that diverges has no score; nor has one that ends farther from the teacher than its mean is, with a mean R^2 below
0. Gives `results.json` and `figure.png` in the folder; the best rate of each has the highest mean R^2 over layers.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from raptor_hf.figures import saved
from raptor_hf.recipes.files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--run", nargs=2, action="append", required=True, metavar=("NAME", "ARGUMENTS"))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.005, 0.01, 0.02, 0.04])
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/studies/learning_rates"))
    arguments = parser.parse_args()
    series = {
        name: [measure(flags, rate, arguments.runs_dir / f"{index}_{rate:g}") for rate in arguments.rates]
        for index, (name, flags) in enumerate(arguments.run)
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    best = {name: best_rate(arguments.rates, [score["mean_r2"] for score in scores]) for name, scores in series.items()}
    flags = {name: " ".join(without_paths(shlex.split(text))) for name, text in arguments.run}
    write_json(
        arguments.output_dir / "results.json",
        {"rates": arguments.rates, "runs": series, "best_rate": best, "arguments": flags},
    )
    plot(arguments.rates, series, arguments.output_dir / "figure.png")
    print(", ".join(f"{name}: best at {rate:g}" for name, rate in best.items()))


def measure(flags: str, rate: float, folder: Path) -> dict[str, Any]:
    """The scores of one run; None for those of one that diverged."""
    diverged = {"mean_r2": None, "last_r2": None, "seconds": None}
    try:
        scores = train([*shlex.split(flags), "--learning_rate", str(rate)], folder)
    except RuntimeError as error:
        # what the guards of raptor_hf.recipes.loop advise
        if not re.search(r"ower (the )?learning.rate", str(error)):
            raise
        return diverged
    return scores if scores["mean_r2"] >= 0 else diverged


def train(flags: list[str], folder: Path) -> dict[str, Any]:
    """The scores of one run of training/distill.py, which is not repeated if its folder has them.

    Raises:
        RuntimeError: it failed; the message has the end of what it printed.
    """
    if not (folder / "metrics.json").exists():
        command = [sys.executable, "training/distill.py", *flags, "--output_dir", str(folder), "--override"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    r2 = metrics["fidelity"]["r2"]
    return {"mean_r2": float(np.mean(r2)), "last_r2": r2[-1], "seconds": metrics["seconds"]["stage2"]}


def best_rate(rates: list[float], scores: list[float | None]) -> float:
    """The rate with the highest score.

    Raises:
        ValueError: if every run diverged.
    """
    finished = [(score, rate) for score, rate in zip(scores, rates, strict=True) if score is not None]
    if not finished:
        raise ValueError(f"rates is {rates}; every run diverged, so there must be a lower one among them")
    return max(finished)[1]


def without_paths(arguments: list[str]) -> list[str]:
    """Arguments with paths out of the working directory, those of one machine, as their last part."""
    return [Path(text).name if text.startswith(("/", "..")) else text for text in arguments]


def plot(rates: list[float], series: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """1 - mean R^2 against the learning rate, each curve over its own minimum, both axes logarithmic."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name, scores in series.items():
        points = [(rate, 1 - s["mean_r2"]) for rate, s in zip(rates, scores, strict=True) if s["mean_r2"] is not None]
        lowest = min(error for _, error in points)
        axes.plot([rate for rate, _ in points], [error / lowest for _, error in points], "o-", label=name)
    axes.set(xscale="log", xlabel="learning rate of Muon, relative to each matrix")
    axes.set_ylabel("1 - mean $R^2$, over the best one")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    saved(figure, path, dpi=150)


if __name__ == "__main__":
    main()
