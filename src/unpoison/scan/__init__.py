"""Which images are poisoned? Every method gives the same kind of result."""
