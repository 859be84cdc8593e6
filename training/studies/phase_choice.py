"""Compare searches for phases by the students that they give, each distilled for the same number of steps.

    python -m training.studies.phase_choice training/results/phase_choice/digits --name "digits, 96 wide" \
        --run "training/configs/distill/digits_k3.yaml --stage2_steps 200"

`--run` gives the arguments of training/distill.py, with num_blocks. The study takes the partitions that all searches
find, and random contiguous ones. For each it computes what two searches minimise, distances between states
(`normalized`) and the costs of tying (`fitted`); then it trains a student, which shows which of them predicts fidelity.
Writes results.json, table.md and figure.png into the folder. A run whose folder has its numbers is not repeated.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from raptor_hf.figures import saved
from raptor_hf.phases import (
    Partition,
    cheapest_phases,
    find_phases,
    partition_objective,
    phases_cost,
    random_contiguous,
)
from raptor_hf.recipes.files import write_json, write_text_atomically

from .conclusions import markdown_table
from .learning_rates import train, without_paths

JUDGES = {"distance": "distance within phases", "cost": "cost of tying"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--name", required=True, help="of the teacher, on the page")
    parser.add_argument("--run", required=True, metavar="ARGUMENTS")
    parser.add_argument("--num_random", type=int, default=5)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/studies/phase_choice"))
    arguments = parser.parse_args()
    flags = shlex.split(arguments.run)
    # with fitted phases a run keeps both the distances and the costs of tying
    fitted = train([*flags, "--partition", "fitted"], arguments.runs_dir / "fitted_0")
    phases = json.loads((arguments.runs_dir / "fitted_0" / "phases.json").read_text(encoding="utf-8"))
    distance, costs = np.array(phases["distance"]), square(phases["costs"])
    num_blocks = len(phases["blocks"])
    rows = []
    for partition, names in searches(distance, costs, num_blocks, arguments.num_random).items():
        repeats = list(map(str, partition.block_repeats))
        choice = ["--partition", "fitted"] if "fitted" in names else ["--block_repeats", *repeats]
        scores = [
            fitted
            if "fitted" in names and seed == 0
            else train([*flags, *choice, "--seed", str(seed)], arguments.runs_dir / f"{'-'.join(repeats)}_{seed}")
            for seed in arguments.seeds
        ]
        rows.append(
            {"phases": str(partition), "found_by": names, "scores": scores}
            | {"distance": partition_objective(distance, partition), "cost": phases_cost(costs, partition)}
            | {name: float(np.mean([score[name] for score in scores])) for name in ("mean_r2", "last_r2")}
        )
    rows.sort(key=lambda row: -row["mean_r2"])
    ranks = {
        judge: float(spearmanr([-row[judge] for row in rows], [r["mean_r2"] for r in rows])[0]) for judge in JUDGES
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "training.studies.phase_choice", *without_paths(sys.argv[1:])])
    write_json(
        arguments.output_dir / "results.json",
        {"name": arguments.name, "command": command, "rank_correlation": ranks, "partitions": rows},
    )
    plot(rows, ranks, arguments.output_dir / "figure.png")
    write_text_atomically(arguments.output_dir / "table.md", page(arguments.name, command, rows, ranks))
    print(f"saved to {arguments.output_dir}: results.json, table.md and figure.png")


def square(rows: list[list[float]]) -> np.ndarray:
    """(L, L) from the rows of its upper triangle, infinite below."""
    costs = np.full((len(rows), len(rows)), np.inf)
    for start, row in enumerate(rows):
        costs[start, start:] = row
    return costs


def searches(distance: np.ndarray, costs: np.ndarray, num_blocks: int, num_random: int) -> dict[Partition, list[str]]:
    """Contiguous partitions, with the names of the searches that find them."""
    found = {"fitted": cheapest_phases(costs, num_blocks), "normalized": find_phases(distance, num_blocks)}
    found["normalized, min_size 1"] = find_phases(distance, num_blocks, min_size=1)
    found |= {method: find_phases(distance, num_blocks, method) for method in ("cut", "bisection")}
    found |= {f"random {seed}": random_contiguous(len(distance), num_blocks, seed) for seed in range(num_random)}
    names: dict[Partition, list[str]] = {}
    for name, partition in found.items():
        if partition.is_contiguous:
            names.setdefault(Partition(partition.blocks), []).append(name)
    return names


def page(name: str, command: str, rows: list[dict[str, Any]], ranks: dict[str, float]) -> str:
    """The Markdown page."""
    seeds = len(rows[0]["scores"])
    table = markdown_table(
        ("phases", "found by", "distance within", "cost of tying", "R² mean", "R² last layer"),
        [
            (row["phases"], ", ".join(row["found_by"]), *(f"{row[key]:.3f}" for key in (*JUDGES, "mean_r2", "last_r2")))
            for row in rows
        ],
        text_columns=2,
    )
    sentences = (
        f"Every partition was trained for as many steps, with {seeds} seed{'s' * (seeds > 1)}; R² is of test images. "
        f"The rank correlation with the mean R² is {ranks['distance']:.2f} for the distance between states within "
        f"phases, and {ranks['cost']:.2f} for the cost of tying, both taken so that 1 is a perfect prediction."
    )
    title = f"# Which phases make a faithful student: {name}"
    figure = "![R² against what is minimised](figure.png)"
    return "\n\n".join((title, f"    {command}", sentences, table, figure)) + "\n"


def plot(rows: list[dict[str, Any]], ranks: dict[str, float], path: Path) -> None:
    """Mean R^2 against what each of the two searches minimises; random partitions are grey."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, (judge, label) in zip(figure.subplots(1, 2, sharey=True), JUDGES.items(), strict=True):
        for row in rows:
            search = next((name for name in row["found_by"] if not name.startswith("random")), None)
            style = {"color": "0.7"} if search is None else {"label": search, "zorder": 3}
            axes.plot(row[judge], row["mean_r2"], "o", **style)
        axes.set(xlabel=label, title=f"rank correlation {ranks[judge]:.2f}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean $R^2$ after training")
    figure.axes[0].legend(fontsize=8)
    saved(figure, path, dpi=150)


if __name__ == "__main__":
    main()
