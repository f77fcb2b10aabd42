"""What memory a run holds, on a real device or a simulated one."""
