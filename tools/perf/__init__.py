"""Measurements: benchmarks, readings of compiled programs, and tables that docs show.

Each is a command, `python -m tools.perf.NAME --help`, on the harness in `harness.py`.
"""

from vlp_jax import signals

# Before a command imports what takes seconds.
signals.listen_if_started(__name__)
