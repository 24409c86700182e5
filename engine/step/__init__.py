"""One optimizer step: the model in segments, forward and backward in two orders, the compiled update."""
