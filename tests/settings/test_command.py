"""Commands: help and mistakes are answered without PyTorch, and a wheel in an empty folder distils."""

import json
import os
import shutil
import signal
import site
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "training")]), "HF_HUB_OFFLINE": "1"}
SCRIPTS = ("distill", "probe", "train_teacher", "analyze", "publish", "zoo", "explore", "export")
# runs a program as `python` would, then tells what it has imported
WATCH = """
import runpy, sys
program, sys.argv = sys.argv[1], sys.argv[1:]
try:
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    run(program, run_name="__main__")
except SystemExit as stop:
    print("torch" in sys.modules, stop.code)
"""


def watched(program, *argv):
    command = [sys.executable, "-c", WATCH, program, *argv]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300)


@pytest.mark.parametrize(
    "program",
    [*(f"training/{name}.py" for name in SCRIPTS)]
    + [f"training.studies.{name}" for name in ("study", "study_teachers", "results")],
)
def test_help_is_answered_before_pytorch_is_imported(program):
    done = watched(program, "--help")
    assert done.stdout.splitlines()[-1] == "False 0" and "usage:" in done.stdout, done.stderr


@pytest.mark.parametrize("argv", [["--learning_rat", "3"], ["digits_k"], ["wrong.yaml"]])
def test_mistakes_are_answered_before_pytorch_is_imported(argv, tmp_path):
    (tmp_path / "wrong.yaml").write_text("learning_rat: 3\n")
    argv = [str(tmp_path / argv[0]) if argv[0].endswith(".yaml") else argv[0], *argv[1:]]
    for program, first in (("training/distill.py", []), ("raptor_settings.command", ["distill"])):
        done = watched(program, *first, *argv)
        assert done.stdout.split() == ["False", "2"]
        assert "did you mean" in done.stderr and len(done.stderr.splitlines()) == 1


def test_unknown_recipe_is_named_with_those_there_are():
    done = watched("raptor_settings.command", "distil")
    assert done.stdout.split() == ["False", "2"]
    assert "recipe is 'distil'; it must be one of distill, probe, analyze, train_teacher, publish" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 7), (signal.SIGINT, 7), (None, 5)])
def test_signals_reach_the_recipe_and_its_status_comes_back_without_a_traceback(number, status, tmp_path):
    script = tmp_path / "recipe.py"
    script.write_text(
        "import signal, sys, time\nfrom pathlib import Path\n"
        "for number in (signal.SIGTERM, signal.SIGINT):\n    signal.signal(number, lambda *_: sys.exit(7))\n"
        "Path(sys.argv[1]).touch()\ntime.sleep(float(sys.argv[2]))\nsys.exit(5)\n"
    )
    launcher = "import sys; from pathlib import Path; from raptor_settings.command import launch; "
    launcher += "sys.exit(launch(Path(sys.argv[1]), sys.argv[2:], one_process=True))"
    ready = tmp_path / "ready"
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, str(script), str(ready), "60" if number else "0"],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    if number:
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status and "Traceback" not in errors


@pytest.fixture(scope="module")
def wheel_environment(tmp_path_factory):
    """A fresh virtual environment with the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("raptor_hf", "training", "model_cards"):
        left_out = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip, offline = [sys.executable, "-m", "pip"], ["-q", "--no-deps", "--no-index"]
    build = ["wheel", *offline, "--no-build-isolation", "-w", str(folder), str(folder / "source")]
    subprocess.run([*pip, *build], check=True)
    shutil.rmtree(folder / "source")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", *offline, str(wheel)], check=True)
    packages = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    # folders alone: an editable installation of this package there is a .pth file, which is not read
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return python


@pytest.mark.slow
@pytest.mark.parametrize("form", ["raptor", "module"])
def test_wheel_distils_in_an_empty_folder(wheel_environment, form, tmp_path):
    commands = {
        "raptor": [wheel_environment.parent / "raptor", "distill"],
        "module": [wheel_environment, "-m", "accelerate.commands.launch", "--cpu", "-m", "raptor_hf.training.distill"],
    }
    flags = "digits_k3 --stage2_steps 3 --warmup_steps 1 --phase_images 64 --num_bootstraps 2 --eval_images 100"
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 500}
    done = subprocess.run([*commands[form], *flags.split()], **run)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "runs" / "digits_k3" / "metrics.json").read_text())
    assert metrics["teacher"]["name"] == "model_cards/digits-teacher"
    load = "import raptor_hf; from transformers import AutoModel; "
    load += "print(raptor_hf.__file__, type(AutoModel.from_pretrained('runs/digits_k3')).__name__)"
    done = subprocess.run([wheel_environment, "-c", load], **run)
    file, name = done.stdout.split()
    assert name == "RaptorModel" and str(wheel_environment.parents[1]) in file
    if form == "raptor":
        done = subprocess.run([*commands[form], "digits_k3", "--teacher", "runs/nowhere", "--output_dir", "x"], **run)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "no such folder" in done.stderr
