"""`moezoo predict` from a clone: see moezoo/cli/predict.py."""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("predict", "tools/predict.py")
