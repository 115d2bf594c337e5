"""The stream's contracts: catalogue of topics, envelope, frames, request log, clients, dead letters."""
