"""`moezoo export` from a clone: see moezoo/cli/export.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("export", "tools/export.py")
