"""What training recipes share around their own loop.

`settings`: YAML files and flags. `loop`: learning rate, log lines, guards. `checkpoint`: crash-safe saving and exact
resuming. `optimizers`: AdamW and Muon. `files`: atomic writes.
"""
