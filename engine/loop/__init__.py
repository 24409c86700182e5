"""The parts of the training loop, each a file: what a step's numbers say, what an evaluation finds, what is shown."""
