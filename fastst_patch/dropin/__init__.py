"""safe_open, load_file and load_model: what programs get in place of the originals."""
