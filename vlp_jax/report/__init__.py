"""HTML pages of what came of a run, and of several runs side by side. See docs/report.md."""
