"""What is measured by hand: `python -m benchmarks.run`, or one benchmark by its name."""
