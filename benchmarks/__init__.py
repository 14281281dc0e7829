"""Measurements of jax_flash_attn2, each a module to run: `python -m benchmarks.codegen`."""
