"""Settings of the recipes, the parser of files and flags, shipped files by name, and the command `raptor`.

It is a package beside raptor_hf, because importing raptor_hf takes seconds: help and mistakes are answered without it.
`declare` declares and checks a setting. `parse` reads YAML files and flags. `resources` finds shipped files and models.
`command` is the console command. `guide` writes the tables of training/README.md. `run` has the settings that recipes
share; `distill`, `probe`, `teacher`, `analyze`, `explore`, `export`, `publish` and `zoo` have those of each recipe.
"""
