"""Signing in: access tokens, sessions, lockout, and the routes under `/auth`."""
