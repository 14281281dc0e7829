"""Masks as data: predicates and builders, a cache, masks of weights, maskers, and block masks that the kernels read."""
