"""Writes the tables of settings in training/README.md from the help of each setting.

python -m training.raptor_settings.guide    # writes them anew, in seconds; for clones
"""

import dataclasses
from pathlib import Path

from .analyze import AnalyzeSettings
from .declare import GROUPS, field_types, range_words
from .distill import DistillSettings
from .explore import ExploreSettings
from .export import ExportSettings
from .parse import _choices, _shown
from .probe import ProbeSettings
from .publish import PublishSettings
from .teacher import TeacherSettings

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- settings: written by training/raptor_settings/guide.py -->", "<!-- end of settings -->"
RECIPES = {
    "distill.py": DistillSettings,
    "train_teacher.py": TeacherSettings,
    "probe.py": ProbeSettings,
    "analyze.py": AnalyzeSettings,
    "explore.py": ExploreSettings,
    "export.py": ExportSettings,
    "publish.py": PublishSettings,
}


def main() -> None:
    """Write the tables into the guide."""
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(text: str) -> str:
    """The guide with new tables between the two comments.

    Raises:
        ValueError: the comments are not there, once each and in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after:
        raise ValueError(f"the guide must hold the lines {BEGIN!r} and {END!r} once each, in this order")
    tables = [f"### `{name}`\n\n{table(settings)}" for name, settings in RECIPES.items()]
    return "\n\n".join([before + BEGIN, *tables, END + after])


def table(settings_class: type) -> str:
    """The settings of one recipe as a Markdown table, in the groups of its `--help`."""
    annotations = field_types(settings_class)
    fields = [field for field in dataclasses.fields(settings_class) if field.name in annotations]
    lines = ["| setting | what it is | values | default |", "|---|---|---|---|"]
    for field in sorted(fields, key=lambda field: GROUPS.index(field.metadata["group"])):
        choices = ", ".join(f"`{choice}`" for choice in _choices(annotations[field.name]))
        facts = ", ".join(filter(None, [choices, field.metadata["unit"], range_words(field)]))
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else default
        shown = "**required**" if default is dataclasses.MISSING else f"`{_shown(default)}`"
        cells = [f"`{field.name}`", field.metadata["help"], facts, shown]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
