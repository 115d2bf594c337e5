"""For Python systems that publish requests to Kafka themselves (docs/publishing.md): `Publisher`, and what it gives."""

from headrace.publisher.client import Chunk, PublishedError, Publisher, Result

__all__ = ["Chunk", "PublishedError", "Publisher", "Result"]
