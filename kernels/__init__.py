"""Triton kernels of flash attention: fwd.py, bwd.py and combine.py (the results of splits), on top of tile.py (memory),
mask.py (visibility), place.py (where a program's rows are), dropout.py, and scalar.py (what callers' functions use).

The paper's letters are used throughout: q k v o, s (logits, base 2), p (probabilities), m and l (a row's maximum
and sum), delta; M, N and D are the query rows, key rows and width of a tile. Upper case is known at compile
time: `SPEC` says what is computed, `CFG` how (jax_flash_attn2/base/spec.py).
"""
