"""What can be said of an optimizer: who owns what before training, and how its state is doing."""
