"""Turns captioned images into shuffled shards that training reads: see docs/data_prepare.md."""
