"""The admin API: how models, workers and leases stand, and steering them. For keys of role `admin`."""
