"""Patterns of active neurons: collected, compared and clustered (METHODS 2.3 and 3)."""
