"""Numbered migrations. A released one never changes: a later one amends it."""
