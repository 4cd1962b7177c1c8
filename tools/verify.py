"""`moezoo verify` from a clone: see moezoo/cli/verify.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("verify", "tools/verify.py")
