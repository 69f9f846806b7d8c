"""Side-by-side measurements. Each module is a command; none is a timed test."""
