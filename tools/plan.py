"""`moezoo plan` from a clone: see moezoo/cli/plan.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("plan", "tools/plan.py")
