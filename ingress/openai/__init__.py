"""OpenAI's endpoints, one module a family."""
