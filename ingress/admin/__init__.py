"""The admin API: keys, users, apps, models and prices; how workers and leases stand, and steering them."""
