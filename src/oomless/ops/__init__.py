"""Memory-lean autograd functions; torch only."""
