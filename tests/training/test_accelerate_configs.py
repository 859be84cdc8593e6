"""The launch configurations load in Accelerate and start what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from raptor_hf.modeling_raptor import RaptorBlock

FOLDER = Path(__file__).parents[2] / "training" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_every_launch_configuration_is_there():
    assert {path.stem for path in FILES} == {"cpu", "cpu2", "gpu1", "gpu8", "gpu2x8", "fsdp"}


@pytest.mark.parametrize(
    "name, kind, num_machines, num_processes, mixed_precision, use_cpu",
    [
        ("cpu", "NO", 1, 1, "no", True),
        ("cpu2", "MULTI_GPU", 1, 2, "no", True),
        ("gpu1", "NO", 1, 1, "bf16", False),
        ("gpu8", "MULTI_GPU", 1, 8, "bf16", False),
        ("gpu2x8", "MULTI_GPU", 2, 16, "bf16", False),
        ("fsdp", "FSDP", 1, 8, "bf16", False),
    ],
)
def test_accelerate_loads_the_configuration(name, kind, num_machines, num_processes, mixed_precision, use_cpu):
    # The loader refuses keys that it does not know.
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert (config.num_machines, config.num_processes) == (num_machines, num_processes)
    assert (config.mixed_precision, config.use_cpu) == (mixed_precision, use_cpu)


def test_fsdp_settings_are_ones_the_launcher_knows_and_wrap_the_block_of_the_model():
    config = load_config_from_file(str(FOLDER / "fsdp.yaml"))
    # Unlike its own keys, Accelerate takes unknown keys of this section without a word.
    assert config.fsdp_config.keys() <= vars(launch_command_parser().parse_args(["script.py"])).keys()
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == RaptorBlock.__name__


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_configuration_says_what_it_is_for_and_how_to_launch_it(path):
    header = path.read_text().split("compute_environment")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert re.search(rf"accelerate launch --config_file training/accelerate/{path.name} ", header)


def launch(name: str, folder: Path, **environment: str) -> list[str]:
    """Launches a script; returns rank, sum of ones over processes, device and threads of each process, by rank."""
    script = folder / "script.py"
    script.write_text(
        "import accelerate, torch\n"
        "from raptor_hf.recipes.loop import precision_of\n"
        "accelerator = accelerate.Accelerator(mixed_precision=precision_of('auto'))\n"  # as the recipes do
        "total = accelerator.reduce(torch.ones(1), reduction='sum').item()\n"
        "line = f'{accelerator.process_index} {total:.0f} {accelerator.device.type} {torch.get_num_threads()}'\n"
        "with open(f'{accelerator.process_index}.txt', 'w') as file:\n"
        "    file.write(line)\n"
        "accelerator.end_training()\n"  # leaves the process group: one that is still open may abort at exit
    )
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml")]
    subprocess.run([*command, str(script)], cwd=folder, env={**inherited, **environment}, check=True, timeout=300)
    return [path.read_text() for path in sorted(folder.glob("?.txt"))]


def test_cpu_launches_one_process_with_all_physical_cores(tmp_path):
    threads = max(1, psutil.cpu_count(logical=False))
    assert launch("cpu", tmp_path) == [f"0 1 cpu {threads}"]


def test_cpu2_launches_two_processes_that_reduce_over_gloo(tmp_path):
    lines = launch("cpu2", tmp_path, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert lines == ["0 2 cpu 1", "1 2 cpu 1"]
