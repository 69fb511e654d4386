"""Numbers of classes and superclasses, by their names or numbers in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from kd_lightning.data.sources.class_names import normal_name
from kd_lightning.errors import InputError

_MOST = 20  # names in a message


class ClassNumbers:
    """Find the number of a class by a text: its name, or its number unless some names are numbers.

    Names are compared in Unicode NFC. Names that are numbers are compared by value, too, since spreadsheets write 01 as
    1. A name that two classes have is no name.

    Args:
        names: Names of the classes, by number.
        what: ``"class"`` or ``"superclass"``, for messages.
        plural: Its plural.

    >>> numbers = ClassNumbers(["cat", "dog"])
    >>> numbers.find("dog"), numbers.find("1")
    (1, 1)
    """

    def __init__(self, names: Sequence[str], what: str = "class", plural: str = "classes") -> None:
        self.names = [normal_name(name) for name in names]
        self.what = what
        self.plural = plural
        self._by_name = _unique(self.names)
        values = [number_of(name) for name in self.names]
        self._by_value = _unique(values)
        self._counted = self.names == [*map(str, range(len(names)))]  # the names are the numbers
        self._numbered = self._counted or all(value is None for value in values)

    def find(self, text: str) -> int:
        """Return the number of a class.

        Raises:
            InputError: If there is no such class.
        """
        number = self._by_name.get(normal_name(text))
        if number is None and (value := number_of(text)) is not None:
            number = self._by_value.get(value)
            if self._numbered and value == int(value) and 0 <= value < len(self.names):
                number = int(value)
        if number is None:
            numbers = map(str, range(len(self.names) if self._numbered and not self._counted else 0))
            known = ", ".join([*self._by_name, *numbers][:_MOST]) or "none: data.coarse names them"
            raise InputError(f"{text!r} is no {self.what}; there are {known}")
        return number

    def check_first_number(self, texts: Collection[str]) -> None:
        """Check that the numbers of a whole file do not count from 1.

        Args:
            texts: All names or numbers of the file.

        Raises:
            InputError: If they do: all are numbers, the highest is the number of classes, and 0 is not among them.
        """
        found = self._numbers_among(texts)
        if (
            len(found) == len({*texts})
            and found
            and min(found.values()) >= 1
            and max(found.values()) == len(self.names)
        ):
            raise InputError(
                f"{self.plural} have the numbers 0 ... {len(self.names) - 1} (0 = {self.names[0]}), got "
                f"{min(found.values())} ... {len(self.names)}, which seem to count from 1; subtract 1, or write names"
            )

    def describe(self, texts: Collection[str]) -> str:
        """Describe which classes the numbers among texts mean; empty if there are none, or if they are the names."""
        if self._counted:
            return ""
        found = sorted({n for n in self._numbers_among(texts).values() if 0 <= n < len(self.names)})
        shown = ", ".join(f"{n} = {self.names[n]}" for n in found[:_MOST])
        return f"numbers mean {self.plural}: {shown}{', ...' if len(found) > _MOST else ''}" if found else ""

    def _numbers_among(self, texts: Collection[str]) -> dict[str, int]:
        """Return the value of each text that is an integer and no name; empty if some names are numbers."""
        if not self._numbered:
            return {}
        values = {text: number_of(text) for text in texts if self._counted or normal_name(text) not in self._by_name}
        return {text: int(value) for text, value in values.items() if value is not None and value == int(value)}


def number_of(text: str) -> Decimal | None:
    """Return the value of a finite number; None for other text."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    return value if value.is_finite() and value.adjusted() < 100 and "_" not in text else None


def _unique(values: Sequence[Any]) -> dict[Any, int]:
    """Return the place of each value that comes once."""
    counts = Counter(values)
    return {value: number for number, value in enumerate(values) if value is not None and counts[value] == 1}
