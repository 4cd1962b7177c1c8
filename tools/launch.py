"""`moezoo launch` from a clone: see moezoo/cli/launch.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("launch", "tools/launch.py")
