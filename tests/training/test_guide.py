"""The guide of the recipes shows the settings that there are."""

import dataclasses

import pytest
from raptor_settings import guide


def test_the_tables_of_settings_are_up_to_date():
    text = guide.README.read_text(encoding="utf-8")
    assert guide.with_tables(text) == text, "run `python -m training.raptor_settings.guide`"


@pytest.mark.parametrize("recipe", guide.RECIPES)
def test_every_setting_has_one_line_with_its_help_and_default(recipe):
    settings = guide.RECIPES[recipe]
    lines = guide.table(settings).splitlines()[2:]
    fields = [field for field in dataclasses.fields(settings) if field.init]
    assert len(lines) == len(fields) > 3
    for field in fields:
        (line,) = (line for line in lines if line.startswith(f"| `{field.name}` |"))
        assert field.metadata["help"].replace("|", "\\|") in line
        assert ("**required**" in line) == (field.default is field.default_factory is dataclasses.MISSING)


def test_a_guide_without_its_comments_is_refused():
    with pytest.raises(ValueError, match="must hold the lines"):
        guide.with_tables("# Recipes")
