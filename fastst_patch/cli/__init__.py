"""The command fastst-patch."""
