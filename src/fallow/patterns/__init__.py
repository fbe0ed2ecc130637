"""Patterns of active neurons: collected, compared and clustered (docs/methods.md)."""
