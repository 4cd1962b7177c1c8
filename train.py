"""Train a system: `python train.py [CONFIG] [--section.option VALUE ...]`.

Without arguments it trains configs/rooms/m3vit_tiny.py. It is `moezoo train`: see
moezoo/cli/train.py.
"""

from moezoo.cli.entry import run

if __name__ == "__main__":
    run("train", "train.py")
