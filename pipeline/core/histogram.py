"""How numbers spread: counts in bins that double, the same bins for every run."""

from collections import Counter
from collections.abc import Iterable


class Histogram:
    """Counts non-negative integers in the bins 0, 1, 2-3, 4-7, ..."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()

    def add(self, numbers: Iterable[int]) -> None:
        """Count each number."""
        self._bins.update(number.bit_length() for number in numbers)

    def summary(self) -> dict[str, int]:
        """Bin (as `first-last`) -> count, without gaps up to the last bin that holds something."""
        return {_name(bits): self._bins[bits] for bits in range(max(self._bins, default=-1) + 1)}


def _name(bits: int) -> str:
    first, last = (1 << bits) >> 1, (1 << bits) - 1
    return str(first) if first == last else f"{first}-{last}"
