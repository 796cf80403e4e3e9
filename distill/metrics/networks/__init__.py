"""Feature networks of published metrics."""
