"""Where a safety subspace comes from."""
