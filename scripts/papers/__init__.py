"""What `scripts/experiments.py` runs and writes."""
