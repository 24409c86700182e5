"""Optimizers as pure functions over named tensors. One paper a file; the contract is in `core`."""
