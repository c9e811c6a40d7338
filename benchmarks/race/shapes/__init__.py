"""True names, shapes and dtypes of published checkpoints, in the order they were saved in."""
