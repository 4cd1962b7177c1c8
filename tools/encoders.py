"""`moezoo encoders` from a clone: see moezoo/cli/encoders.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("encoders", "tools/encoders.py")
