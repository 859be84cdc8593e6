"""A campaign against the recipes: kills at random moments, damaged checkpoints, full and read-only disks, bad input.

    python -m training.benchmarks.campaign --kills 60
    python -m training.benchmarks.campaign --kills 20 --recipes distill probe

Every run is a process of its own, forked from this one, which has imported what takes long. A killed run is started
again by the same command until it ends, and its final weights must be those of a run that nothing stopped, to the bit.
Writes training/results/campaign/: table.md and results.json. Takes about a quarter of an hour on one core.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from raptor_hf.distillation import partition
from raptor_hf.probing import Probe
from raptor_hf.recipes import checkpoint
from raptor_hf.recipes.files import write_json, write_text_atomically
from raptor_hf.recipes.loop import describe_environment
from raptor_hf.recipes.session import run_program
from training import distill, probe, train_teacher

from .bad_input import BAD_INPUT

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LIMIT_S = 240
COMMON = {"dataset": "digits", "train_split": "train[:64]", "test_split": "test[:32]", "batch_size": 8}
COMMON |= {"warmup_steps": 1, "log_every": 4, "checkpoint_every": 3, "learning_rate": 0.001}
SETTINGS = {
    "distill": {"num_blocks": 2, "phase_images": 32, "num_bootstraps": 2, "stage1_steps": 12, "stage2_steps": 12}
    | {"eval_every": 6, "eval_batch_size": 16, "input_noise": 0.1, "normalize_loss": True},
    "probe": {"task": "image-classification", "variant": "digits", "augment": "crop_flip", "epochs": 3}
    | {"eval_batch_size": 16, "seeds": [0, 1], "test_split": "test[:32]"},
    "train_teacher": {"image_size": 8, "patch_size": 2, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    | {"num_registers": 2, "steps": 24, "eval_every": 8, "mixup_alpha": 0.8, "rotation_degrees": 10},
}
MAINS = {"distill": distill.main, "probe": probe.main, "train_teacher": train_teacher.main}
# where a run is when one of these functions is called
MOMENTS = {
    "distill": {
        "phases": (partition, "find_partition"),
        "a step": (distill.Run, "backward"),
        "an evaluation": (distill.Run, "evaluate"),
        "a checkpoint": (checkpoint, "save_file"),
        "the last files": (distill, "save_outputs"),
    },
    "probe": {
        "a step": (Probe, "forward"),
        "an evaluation": (probe.Run, "evaluate"),
        "a checkpoint": (checkpoint, "save_file"),
        "the last files": (probe, "save_outputs"),
    },
    "train_teacher": {
        "a step": (train_teacher, "mixup"),
        "an evaluation": (train_teacher, "evaluate"),
        "a checkpoint": (checkpoint, "save_file"),
        "the last files": (train_teacher, "save_model"),
    },
}


@dataclass
class Outcome:
    """One attempt and whether it went as it must."""

    kind: str
    name: str
    ok: bool
    detail: str = ""


@dataclass
class Campaign:
    """The place of all runs, the random numbers, and what happened so far."""

    place: Path
    draw: random.Random
    outcomes: list[Outcome] = field(default_factory=list)
    whole_runs: dict[tuple[str, int], tuple[str, dict[str, int]]] = field(default_factory=dict)

    def note(self, kind: str, name: str, ok: bool, detail: str = "") -> None:
        """Keep an outcome, and print it."""
        self.outcomes.append(Outcome(kind, name, ok, "" if ok else detail))
        print(f"{'ok  ' if ok else 'FAIL'} {kind}: {name}{'' if ok else ': ' + detail}", flush=True)


def arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as flags."""
    parts: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            parts.append(f"--{name}" if value else f"--no_{name}")
        else:
            parts += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return parts


class Run:
    """A recipe in processes of its own.

    Args:
        recipe: name of its file.
        argv: its arguments.
        log: file of all that it prints.
        num_processes: ranks of one run, connected as torchrun connects them.
    """

    def __init__(self, recipe: str, argv: Sequence[str], log: Path, num_processes: int = 1) -> None:
        self.log, self._marks = log, b""
        self._names = list(MOMENTS[recipe])
        self._reader, writer = os.pipe()
        port = free_port()
        sys.stdout.flush()
        self.pids = []
        for rank in range(num_processes):
            pid = os.fork()
            if pid == 0:
                world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
                world |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
                if num_processes > 1:
                    os.environ |= {name: str(value) for name, value in world.items()}
                self._be(recipe, argv, writer if rank == 0 else None)
            self.pids.append(pid)
        os.close(writer)
        self.statuses: list[int] = []

    def _be(self, recipe: str, argv: Sequence[str], writer: int | None) -> None:
        """The child: run the recipe, and end without what this process has open."""
        status = 1
        try:
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            torch.set_num_threads(1)
            sys.argv = [f"training/{recipe}.py", *argv]
            if writer is not None:
                for index, (owner, name) in enumerate(MOMENTS[recipe].values()):
                    announce(owner, name, writer, bytes([index]))
            run_program(MAINS[recipe])
            status = 0
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
            if isinstance(stopped.code, str):
                print(stopped.code, file=sys.stderr)
        except BaseException:  # a child must never go on in the code of its parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def moments(self) -> Iterator[str]:
        """Names of the moments that the run comes to, as it comes to them."""
        while mark := os.read(self._reader, 1):
            yield self._names[mark[0]]

    def stop(self, number: int) -> None:
        """Send a signal to all processes of the run."""
        for pid in self.pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def wait(self) -> list[int]:
        """Exit statuses, negative for signals; what goes on too long, or whose other rank has failed, is killed."""
        deadline, waiting, statuses = time.monotonic() + LIMIT_S, set(self.pids), {}
        while waiting:
            for pid in list(waiting):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    waiting.discard(pid)
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                    if statuses[pid]:  # as torchrun does
                        deadline = min(deadline, time.monotonic() + 2)
            if waiting and time.monotonic() > deadline:
                for pid in waiting:
                    os.kill(pid, signal.SIGKILL)
                deadline = time.monotonic() + LIMIT_S
            time.sleep(0.01)
        os.close(self._reader)
        return [statuses[pid] for pid in self.pids]


def announce(owner: Any, name: str, writer: int, mark: bytes) -> None:
    """Have a function write a mark whenever it is called."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        os.write(writer, mark)
        return function(*args, **kwargs)

    setattr(owner, name, marked)


def free_port() -> int:
    """A port that no process listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def make_teacher(folder: Path) -> Path:
    """A small teacher with random weights, of 8 x 8 images."""
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        image_size=8,
        patch_size=2,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_register_tokens=2,
        id2label={digit: str(digit) for digit in range(10)},
    )
    Dinov2WithRegistersForImageClassification(config).save_pretrained(folder)
    half, size = [0.5, 0.5, 0.5], {"height": 8, "width": 8}
    processor = BitImageProcessorPil(size={"shortest_edge": 8}, crop_size=size, image_mean=half, image_std=half)
    processor.save_pretrained(folder)
    return folder


def settings_of(campaign: Campaign, recipe: str, folder: Path, **changes: Any) -> list[str]:
    """The arguments of a short run."""
    settings = COMMON | SETTINGS[recipe] | {"output_dir": folder}
    if recipe == "distill":
        settings["teacher"] = campaign.place / "teacher"
    if recipe == "probe":
        settings["model"] = campaign.place / "teacher"
    return arguments(settings | changes)


def weights_of(recipe: str, folder: Path) -> str:
    """Digest of the bytes of the final weights."""
    files = sorted((folder / "heads").glob("*.safetensors")) if recipe == "probe" else [folder / "model.safetensors"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() if files else "none"


def last_line(log: Path) -> str:
    """Of what a run printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else ""


def whole_run(campaign: Campaign, recipe: str, num_processes: int) -> tuple[str, dict[str, int]]:
    """Weights of a run that nothing stops, and how often it comes to each moment."""
    if (recipe, num_processes) in campaign.whole_runs:
        return campaign.whole_runs[recipe, num_processes]
    folder = campaign.place / f"{recipe}-{num_processes}-whole"
    run = Run(recipe, settings_of(campaign, recipe, folder), folder.with_suffix(".log"), num_processes)
    counts: dict[str, int] = {}
    for moment in run.moments():
        counts[moment] = counts.get(moment, 0) + 1
    if any(statuses := run.wait()):
        raise RuntimeError(f"{recipe} ended with {statuses}: {last_line(folder.with_suffix('.log'))}")
    campaign.whole_runs[recipe, num_processes] = weights_of(recipe, folder), counts
    return campaign.whole_runs[recipe, num_processes]


def kill_runs(campaign: Campaign, recipe: str, num_processes: int, num_kills: int, kills_per_run: int = 4) -> None:
    """Kill runs at random moments, each several times, and compare their weights with those of a whole run."""
    expected, counts = whole_run(campaign, recipe, num_processes)
    done = number = 0
    while done < num_kills:
        number += 1
        folder = campaign.place / f"{recipe}-{num_processes}-killed-{number}"
        log, argv, kills = folder.with_suffix(".log"), settings_of(campaign, recipe, folder), []
        for _ in range(min(kills_per_run, num_kills - done)):
            wanted = campaign.draw.choice(list(counts))
            countdown, chosen = campaign.draw.randint(1, counts[wanted]), campaign.draw.choice(SIGNALS)
            run = Run(recipe, argv, log, num_processes)
            for moment in run.moments():
                countdown -= moment == wanted
                if countdown == 0:
                    time.sleep(campaign.draw.uniform(0, 0.02))
                    run.stop(chosen)
                    kills.append(f"{chosen.name} in {wanted}")
                    break
            run.wait()
            if countdown:  # it had so little left to do that it came to its end
                break
        done += max(1, len(kills))
        statuses = Run(recipe, argv, log, num_processes).wait()
        same = not any(statuses) and weights_of(recipe, folder) == expected
        ranks = f"{num_processes} process{'es' if num_processes > 1 else ''}"
        for kill in kills:
            campaign.note("kill", f"{recipe}, {ranks}, {kill}", same, f"ended with {statuses}: {last_line(log)}")
        shutil.rmtree(folder, ignore_errors=True)


def damage_checkpoints(campaign: Campaign, recipe: str = "distill") -> None:
    """Damage the newest checkpoint in every way: the one before must be used, and the damaged one named."""
    expected, counts = whole_run(campaign, recipe, 1)
    ways: dict[str, Callable[[bytes], bytes]] = {
        "a flipped byte in": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "half of": lambda content: content[: len(content) // 2],
        "nothing in": lambda content: b"",
    }
    for name in ("state.safetensors", "info.json", "manifest.json"):
        for way, change in ways.items():
            folder = campaign.place / f"damaged-{name}-{len(way)}"
            log, argv = folder.with_suffix(".log"), settings_of(campaign, recipe, folder)
            run, countdown = Run(recipe, argv, log), counts["a step"] // 2
            for moment in run.moments():
                countdown -= moment == "a step"
                if countdown == 0:
                    run.stop(signal.SIGKILL)
                    break
            run.wait()
            newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
            (newest / name).write_bytes(change((newest / name).read_bytes()))
            status = Run(recipe, argv, log).wait()
            is_named = f"passed over: {newest}" in log.read_text(encoding="utf-8")
            same = weights_of(recipe, folder) == expected if status == [0] else False
            detail = f"ended with {status}, named: {is_named}: {last_line(log)}"
            campaign.note("damage", f"{way} {name}", same and is_named, detail)


def bad_disks(campaign: Campaign) -> None:
    """A disk that fills up in a run, and a folder that is read-only, on a small file system of their own."""
    for kind, size in (("full disk", "12m"), ("read-only folder", "64m")):
        mount = campaign.place / kind.replace(" ", "-")
        mount.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], capture_output=True)
        if made.returncode:
            print(f"left out: {kind}, which needs the right to mount a file system")
            continue
        try:
            log = campaign.place / f"{mount.name}.log"
            argv = settings_of(campaign, "distill", mount / "run")
            if kind == "full disk":
                run = Run("distill", argv, log)
                for moment in run.moments():
                    if moment == "a checkpoint":
                        fill(mount / "filling")
                        break
                statuses = run.wait()
                text = log.read_text(encoding="utf-8")
                is_told = "could not be written" in text or "No space left" in text
                (mount / "filling").unlink(missing_ok=True)
                again = Run("distill", argv, log).wait()
                ok = any(statuses) and is_told and again == [0]
                detail = f"ended with {statuses}, told: {is_told}, again with {again}: {last_line(log)}"
                campaign.note("disk", kind, ok, detail)
            else:
                subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
                statuses, line = Run("distill", argv, log).wait(), last_line(log)
                campaign.note("disk", kind, statuses == [2] and "output_dir=" in line, line)
        finally:
            subprocess.run(["umount", mount], check=False)


def fill(path: Path) -> None:
    """Take all that is left of a disk."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return


def try_bad_input(campaign: Campaign) -> None:
    """Every bad input must end its recipe with one line that says what is wrong, and status 2, or 1 once work began."""
    for number, (recipe, changes, words) in enumerate(BAD_INPUT):
        log = campaign.place / f"bad-{number}.log"
        changes = {name: prepare(campaign, number, value) for name, value in changes.items()}
        argv = settings_of(campaign, recipe, campaign.place / f"bad-{number}", **changes)
        status = Run(recipe, argv, log).wait()
        text, line = log.read_text(encoding="utf-8", errors="replace"), last_line(log)
        named = line.startswith(f"{recipe}.py: error: ") and all(word in line for word in words)
        shown = " ".join(arguments({name: value for name, value in changes.items()})).replace(str(campaign.place), "")
        campaign.note(
            "bad input", f"{recipe} {shown}", status in ([1], [2]) and named and "Traceback" not in text, line
        )


def prepare(campaign: Campaign, number: int, value: Any) -> Any:
    """A setting's value; of a function, what it makes in a folder of its own."""
    if not callable(value):
        return value
    folder = campaign.place / f"made-{number}"
    folder.mkdir()
    return value(folder, campaign.place / "teacher")


def write_results(campaign: Campaign, folder: Path, command: str) -> None:
    """table.md and results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Outcome]] = {}
    for outcome in campaign.outcomes:
        group = outcome.name.rpartition(", ")[0] if outcome.kind == "kill" else ""
        group = group or (outcome.name.split(" ")[0] if outcome.kind == "bad input" else "")
        groups.setdefault(f"{outcome.kind}{': ' + group if group else ''}", []).append(outcome)
    facts = describe_environment(torch.device("cpu"))
    rows = [f"| {name} | {len(tried)} | {sum(one.ok for one in tried)} |" for name, tried in groups.items()]
    failed = [f"- {one.kind}: {one.name}: {one.detail}" for one in campaign.outcomes if not one.ok]
    lines = ["# The campaign against the recipes", "", f"    {command}", ""]
    lines += [f"On {facts['device']}, with torch {facts['versions']['torch']}.", ""]
    lines += [
        "A kill holds if the same command, given again, ends with the weights of a run that nothing stopped, to the "
        "bit; damage, if the checkpoint before is used and the damaged one named; bad input, if the run "
        "ends with an error status and one line that names it.",
        "",
        "| tried | number | held |",
        "|---|---|---|",
        *rows,
        "",
        *(["What did not hold:", "", *failed] if failed else ["All held."]),
    ]
    write_text_atomically(folder / "table.md", "\n".join(lines) + "\n")
    record = {"command": command, **facts, "outcomes": [vars(outcome) for outcome in campaign.outcomes]}
    write_json(folder / "results.json", json.loads(json.dumps(record).replace(str(campaign.place), "PLACE")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="number of kills over all recipes")
    parser.add_argument("--recipes", nargs="+", default=list(MAINS), choices=list(MAINS), help="recipes to kill")
    parser.add_argument("--two_share", type=float, default=0.25, help="share of the kills in runs of two processes")
    parser.add_argument("--no_damage", action="store_true", help="leave damaged checkpoints and disks out")
    parser.add_argument("--no_bad_input", action="store_true", help="leave bad input out")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "training" / "results" / "campaign")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as place:
        campaign = Campaign(Path(place), random.Random(options.seed))
        make_teacher(campaign.place / "teacher")
        if not options.no_bad_input:
            try_bad_input(campaign)
        if not options.no_damage:
            damage_checkpoints(campaign)
            bad_disks(campaign)
        for number, recipe in enumerate(options.recipes):
            kills = options.kills // len(options.recipes) + (number < options.kills % len(options.recipes))
            of_two = round(options.two_share * kills)
            kill_runs(campaign, recipe, 1, kills - of_two)
            if of_two:
                kill_runs(campaign, recipe, 2, of_two, kills_per_run=2)
        command = " ".join(["python -m training.benchmarks.campaign", *sys.argv[1:]])
        write_results(campaign, options.output_dir, command)
    held = sum(outcome.ok for outcome in campaign.outcomes)
    print(f"{held} of {len(campaign.outcomes)} held; saved to {options.output_dir}")
    raise SystemExit(held < len(campaign.outcomes))


if __name__ == "__main__":
    main()
