"""``pronk top``: what running servers do, in the terminal, from their own metrics."""
