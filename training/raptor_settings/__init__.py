"""What the recipes are told: settings, the parser of files and flags, shipped files by name, and the command `raptor`.

A package beside raptor_hf, because importing that one takes seconds: help and mistakes are answered without it.
`declare`: how a setting is declared and checked. `parse`: YAML files and flags. `resources`: shipped files and models.
`command`: the console command. `distill`, `probe`, `teacher`, `analyze`, `publish`: the settings of each recipe.
"""
