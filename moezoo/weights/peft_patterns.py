"""Names of layers as PEFT's `rank_pattern` and `alpha_pattern` choose them: regular expressions.

They come from outside, and Python's take exponential time where they repeat what repeats. So only
those are matched whose time is bounded: few repetitions, none of a group, few choices.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from moezoo.schema_check import Unfit, shown

PLAIN_NAME = re.compile(r"[\w.\-]+")  # "." stands for any character, as PEFT has it
REPEATED_GROUP = re.compile(r"\)\s*[*+?{]")
EXTENSION = re.compile(r"\(\?(?!:)|\\[1-9gk]")  # looking around, flags, names, back references
REPETITION = re.compile(r"(?<!\\)[*+]|(?<!\\)(?<!\()\?|(?<!\\)\{")
LONGEST, REPETITIONS, CHOICES, SECONDS = 2000, 3, 200, 5.0


class Patterns:
    """`of(name, default)` is the value of the first pattern that fits the end of a name at a dot.

    Raises Unfit for what is no regular expression, or one whose time is not bounded.
    """

    def __init__(self, values: Mapping[str, Any], field: str):
        self.field, self._spent = field, 0.0
        self._values = [(self._compiled(pattern), value) for pattern, value in values.items()]

    def of(self, name: str, default: Any) -> Any:
        """The value for a module's name; Unfit where matching takes longer than it may."""
        began = time.monotonic()
        found = next((v for pattern, v in self._values if pattern.fullmatch(name)), default)
        self._spent += time.monotonic() - began
        if self._spent > SECONDS:
            raise Unfit(f"{self.field} has patterns that take too long")
        return found

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        bare = re.sub(r"\[[^\]]*\]", "x", pattern)  # inside brackets they are characters
        odd = (
            len(pattern) > LONGEST
            or REPEATED_GROUP.search(bare)
            or EXTENSION.search(bare)
            or len(REPETITION.findall(bare)) > REPETITIONS
            or bare.count("|") > CHOICES
            or len(re.findall(r"\([^()]*\|", bare)) > REPETITIONS
        )
        if odd and not PLAIN_NAME.fullmatch(pattern):
            raise Unfit(
                f"{self.field} has the pattern {shown(pattern)}, which is too involved: name the "
                "layers instead"
            )
        try:
            return re.compile(rf"(?:.*\.)?(?:{pattern})")
        except (re.error, RecursionError, OverflowError) as error:
            raise Unfit(
                f"{self.field} has the pattern {shown(pattern)}, which is no regular expression: "
                f"{error}"
            ) from error
