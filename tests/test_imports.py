"""What can be imported with the base dependencies alone, in a fresh process that hides all others."""

import os
import subprocess
import sys
from pathlib import Path

import raptor_hf

EXTRAS = ("accelerate", "datasets", "evaluate", "jinja2", "matplotlib", "scipy", "sklearn", "tensorboard")
# what the front row needs for its one purpose: figures to draw, evaluate modules to be some
NEEDS_AN_EXTRA = {"raptor_hf.figures", "raptor_hf.evaluate_modules"}
DRAWS = {"figures", "experiment_figures", "report"}
PACKAGE = Path(raptor_hf.__file__).parent


def import_all(names):
    script = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\nimport importlib\n"
    script += "\n".join(f"importlib.import_module({name!r})" for name in names)
    # the packages are found where this process finds them
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_the_front_row_heads_and_dynamics_import_with_the_base_dependencies_alone():
    front = {f"raptor_hf.{path.stem}" for path in PACKAGE.glob("*.py") if path.stem != "__init__"} - NEEDS_AN_EXTRA
    dynamics = {f"raptor_hf.dynamics.{path.stem}" for path in (PACKAGE / "dynamics").glob("*.py")}
    dynamics -= {f"raptor_hf.dynamics.{name}" for name in DRAWS | {"__init__"}}
    wings = {"raptor_hf.dynamics", "raptor_hf.distillation", "raptor_hf.data", "raptor_hf.recipes", "raptor_hf.hub"}
    names = sorted(front | dynamics | wings | {"raptor_hf.hub.heads", "raptor_hf.distillation.task"})
    done = import_all(names)
    assert done.returncode == 0, done.stderr
    assert "raptor_hf.tokens" in names and "raptor_hf.dynamics.basins" in names


def test_the_hiding_hides():
    done = import_all(["raptor_hf.figures"])
    assert done.returncode != 0 and "matplotlib" in done.stderr
