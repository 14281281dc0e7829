"""Which tiles of the logits a block meets: spans of them (bounds, segments, lengths, masks), or lists (block masks)."""
