"""The training engine: segments, the compiled step, data, checkpoints, metrics and the loop around them."""
