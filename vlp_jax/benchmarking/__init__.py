"""How fast a training step is on the devices that are here, beside the same step of others."""
