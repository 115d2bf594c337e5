"""The router: a stateless agent that turns requests into routed requests, or into refusals."""
