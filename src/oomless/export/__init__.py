"""What was trained, out of the run folder: files that other programs load."""
