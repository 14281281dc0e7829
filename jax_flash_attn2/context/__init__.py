"""Sequences that are longer than one device holds: which tokens a device has, and how partial results come together."""
