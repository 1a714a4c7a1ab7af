"""Exports a model: compiled artifacts, verification by the foreign library, scores, model card."""
