"""What a run tells its user: metrics, progress, speed, traces and figures.

Nothing in here knows what is being trained: no import of `models`, `objectives`, `data` or
`training`. Whatever is off is a null object with the same methods, so the loop has no `if`.
"""
