"""`moezoo bench` from a clone: see moezoo/cli/bench.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("bench", "tools/bench.py")
