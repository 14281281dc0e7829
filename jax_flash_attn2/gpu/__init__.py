"""The GPU side: which kernel with which operands and configuration, and how it is launched or interpreted."""
