"""`python -m fastst_patch` is the `fastst-patch` command, and `run` may be left out."""

from __future__ import annotations

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main(run_is_meant=True))
