"""Triton kernels of flash attention: fwd.py and bwd.py, on top of tile.py (memory) and mask.py (visibility).

The paper's letters are used throughout: q k v o, s (logits, base 2), p (probabilities), m and l (a row's maximum
and sum), delta; M, N and D are the query rows, key rows and width of a tile. Upper case is known at compile
time: `SPEC` says what is computed, `CFG` how (jax_flash_attn2/base/spec.py).
"""
