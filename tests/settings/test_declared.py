"""Declared settings: each has its help and its range, and impossible values pass nowhere."""

import dataclasses
import math
import sys
import typing
from pathlib import Path

import pytest
from raptor_settings import analyze
from raptor_settings.analyze import AnalyzeSettings
from raptor_settings.declare import GROUPS, TOO_MANY, check_settings, field_types, setting
from raptor_settings.distill import DistillSettings
from raptor_settings.explore import ExploreSettings
from raptor_settings.parse import parse_settings
from raptor_settings.probe import ProbeSettings
from raptor_settings.publish import PublishSettings
from raptor_settings.resources import shipped_configs
from raptor_settings.teacher import TeacherSettings
from raptor_settings.zoo import ZooSettings

from raptor_hf.dynamics.figures import STYLES
from training.benchmarks.benchmark import BenchmarkSettings
from training.studies.settings import (
    DenseGapSettings,
    ElasticSettings,
    ResultsSettings,
    StudySettings,
    TeacherStudySettings,
)

# what each needs besides its defaults
NEEDED = {
    DistillSettings: {"teacher": "t", "dataset": "d", "output_dir": "o", "num_blocks": 2},
    ProbeSettings: {"model": "m", "task": "image-classification", "dataset": "d", "variant": "v", "output_dir": "o"},
    TeacherSettings: {"dataset": "d", "output_dir": "o"},
    AnalyzeSettings: {"model": "m", "dataset": "d", "output_dir": "o"},
    PublishSettings: {"run_folder": ".", "repo_id": "a/b"},
    ExploreSettings: {"teacher": "t"},
    ZooSettings: {},
    BenchmarkSettings: {},
    StudySettings: {"title": "t", "base": "b", "variants": ["a", "b"], "output_dir": "o", "runs_dir": "r"}
    | {"figure": "convergence"},
    TeacherStudySettings: {"title": "t", "study": "stochastic_depth", "teacher_base": "b", "student_base": "b"}
    | {"variants": ["a"], "output_dir": "o", "teachers_dir": "t", "runs_dir": "r"},
    ResultsSettings: {"title": "t", "rows": ["a = b"], "output_dir": "o"},
}
CLASSES = {
    "distill": DistillSettings,
    "probe": ProbeSettings,
    "teacher": TeacherSettings,
    "analyze": AnalyzeSettings,
    "results": ResultsSettings,
}


def kinds(annotation):
    """The plain types in an annotation: int for `list[int] | None`."""
    arguments = typing.get_args(annotation)
    return {kind for argument in arguments for kind in kinds(argument)} if arguments else {annotation}


def fields_of(kind):
    """Class, name and whether it is a list, of all settings with numbers of a kind."""
    return [
        pytest.param(
            settings_class,
            name,
            list in {typing.get_origin(part) for part in (annotation, *typing.get_args(annotation))},
            id=f"{settings_class.__name__}-{name}",
        )
        for settings_class in NEEDED
        for name, annotation in field_types(settings_class).items()
        if kind in kinds(annotation)
    ]


@pytest.mark.parametrize("settings_class", NEEDED)
def test_every_setting_has_one_line_of_help_and_a_group(settings_class):
    for field in dataclasses.fields(settings_class):
        words = field.metadata.get("help", "")
        assert len(words) > 3 and "\n" not in words and not words.endswith("."), field.name
        assert field.metadata.get("group") in GROUPS, field.name


@pytest.mark.parametrize("settings_class", NEEDED)
def test_every_setting_is_on_the_page_of_help_with_its_default(settings_class, capsys):
    with pytest.raises(SystemExit):
        parse_settings(settings_class, ["--help"], exit_on_error=False)
    shown = capsys.readouterr().out
    for field in dataclasses.fields(settings_class):
        names = [f"--{field.name}"], [f"--[no_]{field.name}"]
        (line,) = [line for line in shown.splitlines() if line.split()[:1] in names]
        assert field.metadata["help"] in line and line.endswith((", built in)", "(required)"))
    assert f"example: {settings_class.command}" in shown


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("settings_class", "name", "is_list"), fields_of(float))
def test_nan_and_infinity_pass_nowhere(settings_class, name, is_list, value):
    with pytest.raises(ValueError, match=name):
        settings_class(**NEEDED[settings_class] | {name: [value] if is_list else value})


@pytest.mark.parametrize(("settings_class", "name", "is_list"), fields_of(int))
def test_counts_and_sizes_have_upper_bounds(settings_class, name, is_list):
    with pytest.raises(ValueError, match=name):
        value = 2**32 if "seed" in name else TOO_MANY
        settings_class(**NEEDED[settings_class] | {name: [value] if is_list else value})


@pytest.mark.parametrize("settings_class", [c for c in NEEDED if "output_dir" in field_types(c)])
@pytest.mark.parametrize("value", ["", " "])
def test_empty_output_dir_is_refused(settings_class, value):
    with pytest.raises(ValueError, match="output_dir is '.*'; it must not be empty"):
        settings_class(**NEEDED[settings_class] | {"output_dir": value})


@pytest.mark.parametrize(
    ("bounds", "value", "message"),
    [
        ({"above": 0}, 0.0, "x is 0.0; it must be above 0"),
        ({"at_least": 1}, 0.5, "x is 0.5; it must be at least 1"),
        ({"at_most": 1024}, 1025.0, "x is 1025.0; it must be at most 1,024"),
        ({"below": 1}, 1.0, "x is 1.0; it must be below 1"),
        ({}, math.nan, "x is nan; it must be finite"),
        ({"at_least": 0}, [1.0, -1.0], r"x is \[1.0, -1.0\]; each must be at least 0"),
    ],
)
def test_value_outside_its_range_is_named_with_the_bound(bounds, value, message):
    settings = dataclasses.make_dataclass("S", [("x", float, setting(0.5, help="x", group="run", **bounds))])(value)
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_settings(settings)


def test_value_on_a_bound_that_is_allowed_passes():
    field = setting(0.5, help="x", group="run", at_least=0, at_most=1)
    for value in (0.0, 1.0, 1, None, "text", True):
        check_settings(dataclasses.make_dataclass("S", [("x", float, field)])(value))


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in (*CLASSES, "study") for name in shipped_configs(kind)])
def test_every_shipped_configuration_is_found_by_name_from_any_folder(kind, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings_class = CLASSES.get(kind)
    if kind == "study":
        text = shipped_configs(kind)[name].read_text()
        own = {"\nteacher_base:": TeacherStudySettings, "\nprobes:": DenseGapSettings, "\nrivals:": ElasticSettings}
        settings_class = next((found for key, found in own.items() if key in text), StudySettings)
    by_name = parse_settings(settings_class, [name], exit_on_error=False)
    by_path = parse_settings(settings_class, [f"training/configs/{kind}/{name}.yaml"], exit_on_error=False)
    assert by_name == by_path == parse_settings(settings_class, [str(shipped_configs(kind)[name])], exit_on_error=False)


def test_file_here_wins_over_a_shipped_configuration_and_a_misspelled_name_gets_the_right_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="'digit_k3' does not exist; did you mean digits_k3"):
        parse_settings(DistillSettings, ["digit_k3"], exit_on_error=False)
    with pytest.raises(FileNotFoundError, match="must be a YAML file or one of .*digits_k3"):
        parse_settings(DistillSettings, ["zzz"], exit_on_error=False)
    Path("digits_k3").write_text("teacher: mine\ndataset: d\noutput_dir: o\nnum_blocks: 2\n")
    assert parse_settings(DistillSettings, ["digits_k3"], exit_on_error=False).teacher == "mine"


def test_key_that_is_given_twice_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("teacher: t\ndataset: d\noutput_dir: o\nnum_blocks: 2\nseed: 1\nseed: 2\n")
    with pytest.raises(ValueError, match="config.yaml.*seed is given twice"):
        parse_settings(DistillSettings, [str(path)], exit_on_error=False)


def test_as_many_models_can_be_analysed_as_the_figures_have_styles_for():
    assert analyze.MAX_MODELS == len(STYLES)


def test_settings_are_declared_without_the_package_that_they_are_for():
    assert "raptor_hf" in sys.modules  # this test has it; the modules of the settings import nothing of it
    for path in Path(analyze.__file__).parent.glob("*.py"):
        assert "import raptor_hf" not in path.read_text() and "from raptor_hf" not in path.read_text()
