"""Which tiles of keys a device's rows visit, and when: the rule of `jax_flash_attn2.tiles.spans`, which compares the
least and the largest position (and document) of a block of rows and of a tile, as arithmetic for millions of tokens.

Tiles are counted in one head; a test compares them with the package's own tables.
"""

import functools

import numpy as np

from jax_flash_attn2.context.orders import sequence_order

from .cases import Case, first_seen

TILE = 128
"""Rows, and keys, of a tile: near what is tuned for an H100 at head dimension 128."""


@functools.lru_cache(256)
def whole(case: Case, tile: int = TILE) -> np.ndarray:
    """int64 `[devices]`: tiles that each device's rows visit of all keys, in the order of the tokens (all_gather)."""
    first, last = _rows(case, tile)
    return (last // tile + 1 - first // tile).sum(1)


def one_device(case: Case, tile: int = TILE) -> int:
    """Tiles that a single device would visit, and so each head of ulysses."""
    alone = Case(**{**vars(case), "devices": 1, "order": "contiguous"})
    return int(whole(alone, tile).sum())


@functools.lru_cache(256)
def by_hop(case: Case, tile: int = TILE) -> np.ndarray:
    """int64 `[hops, devices]`: tiles that each device visits in each step of a ring."""
    least, largest = _ends(case, tile)
    first, last = _rows(case, tile)
    n, piece = case.devices, case.share // (2 if case.order == "zigzag" else 1)
    striped = case.order == "striped"
    stride = tile * (n if striped else 1)
    first, before = (x.astype(np.int32) for x in np.divmod(first + n - 1 if striped else first, stride))
    last = (last // stride).astype(np.int32)
    alike = case.order != "zigzag" and case.document is None and piece % tile == 0
    some = np.array([0, n - 1]) if alike else np.arange(n)

    def visited(hop: int) -> np.ndarray:
        source = ((some[:, None] - hop) % n).astype(np.int32)
        if piece % tile:  # tiles that are cut short, or that two pieces share
            return _compared(*_rows(case, tile), least[source[:, 0]], largest[source[:, 0]])
        begin, end = first[some], last[some]
        if striped:  # the tile j of a device has the tokens from source + n * tile * j, every nth
            made = _count(begin - (before[some] < source), end + 1, piece // tile)
        else:
            places = (source, 2 * n - 1 - source) if case.order == "zigzag" else (source,)
            starts = (place * (piece // tile) for place in places)
            made = sum(_count(begin - start, end + 1 - start, piece // tile) for start in starts)
        # Only how far apart two devices are matters: those that meet later keys do as the first, others as the last.
        return np.where(np.arange(n) < hop % n, *made) if alike else made

    return np.stack([visited(run.first + run.step * i) for run in case.runs for i in range(run.count)])


def _compared(first: np.ndarray, last: np.ndarray, least: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """By every block of rows and every tile: `[devices]`."""
    return ((largest[:, None] >= first[:, :, None]) & (least[:, None] <= last[:, :, None])).sum((1, 2))


def _rows(case: Case, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each block of rows the first token that it sees, and its last own: `[devices, blocks]`."""
    least, largest = _ends(case, tile)
    last = largest if case.causal else np.full_like(largest, case.tokens - 1)
    return first_seen(case.tokens, case.window, case.document)[least], last


@functools.lru_cache(4)
def _ends(case: Case, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest token of each block: `[devices, blocks]`."""
    n, share = case.devices, case.share
    if (share // 2 if case.order == "zigzag" else share) % tile == 0:  # the first and the last of each
        device, place = np.arange(n)[:, None], np.arange(0, share, tile)
        if case.order == "striped":
            return device + n * place, device + n * (place + tile - 1)
        first = device * share + place
        if case.order == "zigzag":
            half = share // 2
            late = (2 * n - 1 - device) * half + place - half
            first = np.where(place < half, device * half + place, late)
        return first, first + tile - 1
    tokens = sequence_order(case.tokens, n, case.order).reshape(n, -1)
    blocks = np.pad(tokens, ((0, 0), (0, -share % tile)), mode="edge").reshape(n, -1, tile)
    return blocks.min(2), blocks.max(2)


def _count(begin: np.ndarray, end: np.ndarray, tiles: int) -> np.ndarray:
    return np.maximum(np.minimum(end, tiles) - np.maximum(begin, 0), 0).sum(1)
