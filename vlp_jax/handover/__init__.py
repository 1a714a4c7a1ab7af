"""Handing a model over: compiled artifacts, proofs that others load it, and what is said of it."""
