"""How rows lie in memory, and which of their columns a tile has."""

import dataclasses


def next_power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of an array `[B, S, heads, width]` lie in memory, and how wide a tile of them is."""

    heads: int
    width: int
    packed: int = 1
    """Consecutive rows of a tile that are the same query row, of `packed` query heads of one group: a power of two."""
    heads_packed: int = 1
    """How many heads these are; the last of them may be there more than once."""
    page: int = 0
    """How many rows a page has, if they lie in pages."""
    first: int = 0
    """The first of the columns that a tile has."""
    columns: int = 0
    """How many it has; 0: all."""

    @property
    def taken(self) -> int:
        """How many columns of a row a tile has."""
        return self.columns or self.width

    @property
    def cols(self) -> int:
        """The width of a tile: a power of two, at least 16 (`tl.dot`)."""
        return max(16, next_power_of_two(self.taken))

    @property
    def stride(self) -> int:
        """Elements from one row to the next."""
        return self.heads * self.width
