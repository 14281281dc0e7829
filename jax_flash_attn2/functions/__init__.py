"""Functions of one logit and its place, (score, b, h, i, j), that a caller wrote in JAX: traced, and what follows."""
