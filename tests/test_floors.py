"""Imports only go down the floors of the house, no recipe imports another, and there is no cycle."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# folder of each of our packages
PACKAGES = {"raptor_settings": "training/raptor_settings", "raptor_hf": "raptor_hf", "training": "training"}
# from the ground up; a name stands for a module, or for a package with all that is in it
FLOORS = (
    ("raptor_settings",),
    ("raptor_hf.configuration_raptor",),
    (
        "raptor_hf.image_processing_raptor",
        "raptor_hf.modeling_raptor",
        "raptor_hf.tokens",
        "raptor_hf.accumulators",
        "raptor_hf.families",
    ),
    (
        "raptor_hf",
        "raptor_hf.teacher",
        "raptor_hf.elastic",
        "raptor_hf.steps",
        "raptor_hf.similarity",
        "raptor_hf.metrics",
        "raptor_hf.patch_metrics",
    ),
    (
        "raptor_hf.phases",
        "raptor_hf.conversion",
        "raptor_hf.research_checkpoints",
        "raptor_hf.two_towers",
        "raptor_hf.evaluate_modules",
    ),
    (
        "raptor_hf.data",
        "raptor_hf.distillation",
        "raptor_hf.dynamics",
        "raptor_hf.export",
        "raptor_hf.figures",
        "raptor_hf.hub",
        "raptor_hf.probing",
        "raptor_hf.recipes",
    ),
    ("training",),
    ("training.benchmarks", "training.studies"),
)
# what the three files that travel with the weights may import; huggingface_hub comes with transformers
PORTABLE = {"torch", "numpy", "PIL", "transformers", "huggingface_hub"}


def modules() -> dict[str, Path]:
    """All modules of ours by name, packages by that of the package."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if package == "training" and "raptor_settings" in path.parts:
                continue
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """Names of the modules that a module imports, wherever in its code, ours in full."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            inside = {f"{module}.{alias.name}" for alias in node.names} & set(MODULES)
            names |= inside or {module}
    return names


GRAPH = {name: {other for other in imported(name) if other in MODULES} - {name} for name in MODULES}


def floor_of(module: str) -> int:
    """Number of the floor of a module; that of the package nearest to it which has one."""
    floors = {name: number for number, names in enumerate(FLOORS) for name in names}
    if module == "raptor_hf":
        return floors[module]
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in floors and prefix != "raptor_hf":
            return floors[prefix]
    raise KeyError(f"{module} has no floor; give it one in FLOORS and in raptor_hf/README.md")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_or_stay_on_the_floor(module):
    upward = {other for other in GRAPH[module] if floor_of(other) > floor_of(module)}
    assert upward == set()


def test_there_is_no_cycle():
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(MODULES) > 70


def test_no_recipe_imports_another():
    recipes = {name for name, path in MODULES.items() if path.parent == ROOT / "training"}
    assert {"training.distill", "training.probe", "training.raptor_minimal"} < recipes
    assert {name: GRAPH[name] & recipes for name in recipes if GRAPH[name] & recipes} == {}


@pytest.mark.parametrize("name", ["configuration_raptor", "modeling_raptor", "image_processing_raptor"])
def test_files_that_travel_with_the_weights_import_only_each_other_and_libraries_of_the_hub(name):
    others = imported(f"raptor_hf.{name}")
    ours = {other for other in others if other.startswith("raptor_hf.")}
    assert ours < {"raptor_hf.configuration_raptor", "raptor_hf.modeling_raptor", "raptor_hf.image_processing_raptor"}
    assert {other.split(".")[0] for other in others - ours} <= PORTABLE | sys.stdlib_module_names
