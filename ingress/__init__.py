"""The ingress: OpenAI's API over HTTP on the one side, Kafka on the other."""
