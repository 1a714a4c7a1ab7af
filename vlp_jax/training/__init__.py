"""State, optimizer, step, checkpoints and the one loop."""
