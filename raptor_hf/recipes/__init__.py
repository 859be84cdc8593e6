"""What training recipes share around their own loop.

`session`: the folder of a run, taken by one process at a time, resumed and saved. `checkpoint`: crash-safe saving and
exact resuming. `loop`: learning rate, log lines, guards. `optimizers`: AdamW and Muon. `averaging`: a running average
of the weights. `run_metrics`: the schema of metrics.json. `files`, `lock`, `fingerprints`: whole files, one writer, the
same inputs. `settings`: the folder's own.
"""
