"""Programs of a checkout: the demo, entries of the `vlp-jax` commands, results, `tools.perf`."""

import os

from vlp_jax import signals

# Before a command imports what takes seconds.
signals.listen_if_started(__name__)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow reads it when it is imported
