"""`python -m moezoo` is the command `moezoo`."""

import os
import sys

# Python looks for modules in the working directory first. That may be a stranger's folder, whose
# `json.py` nobody wants to run; the command `moezoo` does not look there either.
if sys.path and sys.path[0] in ("", os.getcwd()) and not os.path.isdir("moezoo"):
    del sys.path[0]

from moezoo.cli.entry import main  # noqa: E402

if __name__ == "__main__":
    main()
