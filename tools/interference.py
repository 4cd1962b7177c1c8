"""`moezoo interference` from a clone: see moezoo/cli/interference.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("interference", "tools/interference.py")
