"""`moezoo adapter` from a clone: see moezoo/cli/adapter.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("adapter", "tools/adapter.py")
