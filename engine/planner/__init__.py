"""The memory of a run before it runs: the real step on fake tensors, counted. Imported only when it is asked for."""
