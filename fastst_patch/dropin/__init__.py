"""safe_open, load_file and load_model, as programs get them in place of the originals."""
