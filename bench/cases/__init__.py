"""One file per op; each holds an `Op` as OP. A new file is found by itself."""
