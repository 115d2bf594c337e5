"""Answers to direct publishers: what they asked for by Kafka comes back by Kafka, on their app's own topic."""
