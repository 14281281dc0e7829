"""What each provider looks like: one colour and one marker, on every panel of every section.

Who does the same has the same colour wherever it is measured: ours, as one calls it, is blue; `jax.nn` on XLA is
orange. A name that is not here gets a look of its own, the same in each run. All colours stand out from white and from
near black, 3 to 1 or more, and the markers tell them apart where colours do not.
"""

import zlib

BLUE, ORANGE, GREEN, PURPLE, RED = "#2a7fd4", "#d9731a", "#2e9950", "#9a5fc4", "#d6403c"
GREY, TEAL, OLIVE, PINK, BROWN = "#77808a", "#17929e", "#9a8311", "#d0519a", "#a06a43"
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
"""Of matplotlib, and the characters of text that look like them."""

_TOGETHER: dict[tuple[str, str], tuple[str, ...]] = {
    (BLUE, "o"): ("ours", "flash-tuned", "tuned", "attention-flash", "eager-flash", "block-mask"),
    (GREEN, "^"): ("block-ptr", "triton-block-ptr", "paged", "paged-64", "option", "eager-cached", "mask-cached"),
    (TEAL, "v"): ("ptr-block", "triton-ptr-block", "paged-16"),
    (PURPLE, "P"): ("flash-xla", "paged-256"),
    (ORANGE, "s"): ("jax", "xla", "jax.nn"),
    (RED, "D"): ("jax-cudnn", "cudnn"),
    (GREY, "X"): ("naive", "plain", "attention", "causal", "eager-built", "mask-built"),
    # Masks: how they are made, how they are held.
    (BLUE, "D"): ("make_causal_mask", "dense"),
    (ORANGE, "D"): ("naive_tril", "sparse"),
    (GREEN, "D"): ("naive_comparison", "broadcast"),
    (PURPLE, "D"): ("triangle",),
    # Stages of a layer.
    (BLUE, "s"): ("projection",),
    (TEAL, "P"): ("rope",),
    (RED, "v"): ("scores",),
    (OLIVE, "X"): ("mask",),
    (PURPLE, "^"): ("softmax",),
    (PINK, "o"): ("output",),
    (GREY, "D"): ("layer",),
    # Results whose errors are shown.
    (BLUE, "^"): ("o",),
    (ORANGE, "v"): ("dq",),
    (GREEN, "P"): ("dk",),
    (PURPLE, "s"): ("dv",),
    # One of our optimisations switched off, or another way to decode.
    (GREEN, "s"): ("fixed-tiles", "splits-1"),
    (OLIVE, "^"): ("dense-bias", "splits-4"),
    (PINK, "v"): ("eager", "splits-16"),
    (TEAL, "o"): ("no-skip", "splits-64"),
    (BROWN, "D"): ("all-masked", "int8"),
    (PURPLE, "o"): ("no-whole-rows",),
    (BROWN, "s"): ("one-stage",),
    (OLIVE, "s"): ("other-memory",),
}
_LOOKS = {name: look for look, names in _TOGETHER.items() for name in names}
_SPARE = [(colour, marker) for marker in "PvXs" for colour in (BROWN, PINK, OLIVE)]


def look(name: str) -> tuple[str, str]:
    """The colour ("#rrggbb") and the marker (of matplotlib) of a provider."""
    return _LOOKS.get(name) or _SPARE[zlib.crc32(name.encode()) % len(_SPARE)]
