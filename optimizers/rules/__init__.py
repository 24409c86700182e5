"""How one tensor moves: a paper or a baseline a file."""
