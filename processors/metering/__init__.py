"""Metering: every terminal of the request log becomes exactly one usage, whether the caller stayed or not."""
