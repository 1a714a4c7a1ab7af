"""Programs around training: the demo, benchmarks, inspectors."""

from vlp_jax import signals

# Before a command imports what takes seconds.
signals.listen_if_started(__name__)
