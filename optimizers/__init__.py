"""Optimizers as pure functions over named tensors. `contract` says what a rule and an optimizer are."""
