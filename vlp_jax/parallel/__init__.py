"""Mesh, axis rules, batches on the mesh, and the start of several processes."""
