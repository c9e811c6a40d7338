"""Remote files: the interface in `base`, one module for each way to reach them."""
