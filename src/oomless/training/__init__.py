"""One optimizer step, the loop around it, and what makes a run safe to leave alone."""
