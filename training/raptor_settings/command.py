"""The console command, which starts a recipe in processes of its own, as `accelerate launch` does.

    raptor distill digits_k3 --output_dir runs/mine

Settings are checked before anything heavy is imported. The recipe runs on all GPUs, or on the CPU if there is none;
other configurations of a machine are for `accelerate launch` on a recipe's file. Signals go on to the recipe, and its
exit status comes back.
"""

import contextlib
import importlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .parse import parse_settings
from .resources import TRAINING

# file in training/, module of raptor_settings and class there
RECIPES = {
    "distill": ("distill", "distill", "DistillSettings"),
    "probe": ("probe", "probe", "ProbeSettings"),
    "analyze": ("analyze", "analyze", "AnalyzeSettings"),
    "train_teacher": ("train_teacher", "teacher", "TeacherSettings"),
    "publish": ("publish", "publish", "PublishSettings"),
    "explore": ("explore", "explore", "ExploreSettings"),
    "export": ("export", "export", "ExportSettings"),
}


def main() -> None:
    """Run the recipe that the command line names."""
    usage = f"usage: raptor RECIPE [CONFIG.yaml | NAME] [--flag value ...]\nrecipes: {', '.join(RECIPES)}"
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print(f"{usage}\nhelp on one: raptor RECIPE --help")
        raise SystemExit(0 if sys.argv[1:] else 2)
    recipe, *argv = sys.argv[1:]
    if recipe not in RECIPES:
        print(f"raptor: error: recipe is {recipe!r}; it must be one of {', '.join(RECIPES)}", file=sys.stderr)
        raise SystemExit(2)
    script, module, name = RECIPES[recipe]
    module = importlib.import_module(f"raptor_settings.{module}")
    flags = module.with_folder_first(argv) if recipe == "publish" else argv
    parse_settings(getattr(module, name), flags, command=f"raptor {recipe}")
    raise SystemExit(launch(TRAINING / f"{script}.py", argv, one_process=recipe in ("publish", "explore", "export")))


def launch(script: Path, argv: list[str], *, one_process: bool = False) -> int:
    """Start a recipe as `accelerate launch` does, and wait for it.

    Args:
        script: file of the recipe.
        argv: its arguments.
        one_process: start one process, whatever the machine has.

    Returns:
        Its exit status; 128 plus the number of the signal that ended it.
    """
    # here, for they take seconds
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    on_cpu = one_process or not torch.accelerator.is_available()
    options = ["--config_file", str(TRAINING / "accelerate" / "cpu.yaml")] if on_cpu else []
    with _signals_passed_on():
        try:
            launch_command(launch_command_parser().parse_args([*options, str(script), *argv]))
        except subprocess.CalledProcessError as error:
            status = error.returncode
        except ChildFailedError as error:
            status = error.get_first_failure()[1].exitcode
        else:
            status = 0
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Send SIGTERM and SIGINT on to the processes started here, which end by themselves, and go on waiting for them."""
    import psutil

    def pass_on(number: int, frame: object) -> None:
        if number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty():
            return  # the terminal has sent it to all of its processes
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
