"""Programs around training: the demo, benchmarks, inspectors."""
