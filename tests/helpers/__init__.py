"""What several test files share: texts to train on, small models and their batches, whole runs and what they leave."""
