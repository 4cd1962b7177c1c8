"""`python -m moezoo` is the command `moezoo`."""

from moezoo.cli.entry import main

if __name__ == "__main__":
    main()
