"""`moezoo evaluate` from a clone: see moezoo/cli/evaluate.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("evaluate", "tools/evaluate.py")
