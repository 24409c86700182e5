"""Sets of labelled images, whatever form they are published in, and what is drawn of them for training."""
