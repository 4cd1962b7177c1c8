"""The lines of a text that a user gives, which Python's `splitlines` would cut elsewhere, too."""

from __future__ import annotations


def lines(content: bytes) -> list[str]:
    """The lines of a text in UTF-8, with or without a byte order mark.

    A line ends at a line feed, with a carriage return before it or not, and nowhere else: form feed
    and U+2028 are part of it, so that the numbers of all behind it stay. Raises UnicodeDecodeError.
    """
    return [line.removesuffix("\r") for line in content.decode("utf-8-sig").split("\n")]
