"""Reports of a run to its user: metrics, progress, speed, traces and pictures.

Nothing in here knows what is being trained: no import of `models`, `objectives`, `data` or
`training`. Whatever is off is a null object with the same methods, so the loop has no `if`.
"""
