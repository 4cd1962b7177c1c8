"""`moezoo library` from a clone: see moezoo/cli/library.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("library", "tools/library.py")
