"""The scheduler: one writer a pool. The policy is pure; the agent around it does the I/O."""
