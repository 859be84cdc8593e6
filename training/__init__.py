"""The recipes: one readable file each, run by `accelerate launch` or by the command `raptor`; none imports another."""
