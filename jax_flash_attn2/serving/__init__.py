"""Attention as a server runs it: caches in pages, sequences of many lengths in one row."""
