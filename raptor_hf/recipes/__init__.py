"""The code that training recipes share around their own loops.

`session` takes the folder of a run for one process at a time, resumes and saves. `checkpoint` saves without harm from a
crash, and resumes exactly. `loop` has the learning rate, log lines and guards. `optimizers` has AdamW and Muon.
`averaging` keeps a running average of the weights. `run_metrics` is the schema of metrics.json. `files` writes whole
files, `lock` admits one writer, `fingerprints` tells inputs apart. `settings` keeps a run's settings in its folder.
`probe_inputs` opens what a probe needs.
"""
