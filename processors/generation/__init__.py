"""The worker: loads models through providers, generates, writes frames and one terminal a request."""
