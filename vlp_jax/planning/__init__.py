"""What a training step will need and take on devices that are not here: memory, traffic, time."""
