"""`moezoo prune` from a clone: see moezoo/cli/prune.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("prune", "tools/prune.py")
