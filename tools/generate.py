"""`moezoo generate` from a clone: see moezoo/cli/generate.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("generate", "tools/generate.py")
