"""Programs of a checkout: the demo, entries of the `vlp-jax` commands, and `tools.perf`."""

from vlp_jax import signals

# Before a command imports what takes seconds.
signals.listen_if_started(__name__)
