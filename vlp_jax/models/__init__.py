"""Flax Linen modules, written for one device: no mesh, no data, no loss.

Parameters and activations carry logical axis names; `vlp_jax.parallel.rules` maps those to a mesh.
"""
