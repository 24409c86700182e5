"""What can be trained: one kind of task a file."""
