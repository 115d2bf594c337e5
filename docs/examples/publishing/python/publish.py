"""Publishes a chat request to Headrace by Kafka and prints the streamed answer. Needs confluent-kafka and cryptography.

HEADRACE_APP=shop HEADRACE_PUBLISHER=orders-1 HEADRACE_PRIVATE_KEY=<base64> python publish.py smollm2 "Hello"
"""

import base64
import hashlib
import json
import os
import secrets
import sys
import time
from datetime import UTC, datetime

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TOPIC = "inference.requests"


def new_id(app: str, now_ms: int) -> str:
    """A UUID of version 7 that ends with the app's tag."""
    tag = hashlib.sha256(f"headrace-tenant:{app}".encode()).hexdigest()[:12]
    random = secrets.randbits(26)
    return f"{now_ms:012x}7{random >> 14:03x}{0x8000 | random & 0x3FFF:04x}{tag}"


def canonical(topic: str, headers: dict[str, str], body: bytes) -> bytes:
    """What is signed: netstrings of a fixed word, the topic, each header in order of its name, and the body's hash."""
    covered = sorted((name, value) for name, value in headers.items() if name.startswith(("ce_", "hr-")))
    parts = ["headrace-signature-1", topic, *(part for pair in covered for part in pair)]
    parts.append(hashlib.sha256(body).hexdigest())
    return b"".join(b"%d:%b," % (len(part.encode()), part.encode()) for part in parts)


def sign(private_key: str, form: bytes) -> str:
    """The value of hr-signature."""
    key = Ed25519PrivateKey.from_private_bytes(base64.b64decode(private_key))
    return base64.b64encode(key.sign(form)).decode()


def request(app: str, publisher: str, private_key: str, body: bytes, **wishes: str) -> tuple[str, list]:
    """The key and the headers of a request."""
    now_ms = time.time_ns() // 1_000_000
    request_id = new_id(app, now_ms)
    headers = {
        "ce_specversion": "1.0",
        "ce_id": request_id,
        "ce_type": "headrace.inference.request.v1",
        "ce_source": "/examples/python",
        "ce_time": datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        "hr-tenant": app,
        "hr-key-id": publisher,
        **{name.replace("_", "-"): value for name, value in wishes.items()},
    }
    headers["hr-signature"] = sign(private_key, canonical(TOPIC, headers, body))
    return request_id, [(name, value.encode()) for name, value in headers.items()]


def kafka() -> dict[str, str]:
    """Where the brokers are, and how to be let in."""
    found = {"bootstrap.servers": os.environ.get("KAFKA_BOOTSTRAP", "127.0.0.1:9092")}
    if user := os.environ.get("KAFKA_USERNAME"):
        found |= {"security.protocol": "SASL_SSL", "sasl.mechanism": "SCRAM-SHA-512", "sasl.username": user}
        found |= {"sasl.password": os.environ["KAFKA_PASSWORD"]}
    if ca := os.environ.get("KAFKA_CA"):
        found["ssl.ca.location"] = ca
    return found


def main(model: str, prompt: str) -> int:
    app, publisher = os.environ["HEADRACE_APP"], os.environ["HEADRACE_PUBLISHER"]
    answers = Consumer({**kafka(), "group.id": f"publisher/{app}/example", "enable.auto.commit": False})
    topic = f"replies.{app}"
    partitions = [TopicPartition(topic, number) for number in answers.list_topics(topic).topics[topic].partitions]
    for partition in partitions:  # listen first: the answer must not come before
        partition.offset = answers.get_watermark_offsets(partition)[1]
    answers.assign(partitions)

    body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]}).encode()
    request_id, headers = request(app, publisher, os.environ["HEADRACE_PRIVATE_KEY"], body, hr_stream="true")
    failures = []
    producer = Producer({**kafka(), "enable.idempotence": True, "partitioner": "murmur2_random"})
    producer.produce(TOPIC, body, request_id, headers=headers, on_delivery=lambda error, _: failures.append(error))
    producer.flush()
    if failures != [None]:
        raise KafkaException(failures[0])

    seen = 0
    while True:
        record = answers.poll(60)
        if record is None:
            raise TimeoutError("no answer within 60 s")
        if record.error() is not None:
            if record.error().code() != KafkaError._PARTITION_EOF:
                raise KafkaException(record.error())
            continue
        if record.key() != request_id.encode():
            continue
        told = {name: value.decode() for name, value in record.headers()}
        answer = json.loads(record.value())
        if told["ce_type"] == "headrace.inference.result.v1":
            break
        if int(told["hr-seq"]) > seen:  # records may come twice
            seen = int(told["hr-seq"])
            print(answer["choices"][0]["delta"].get("content") or "", end="", flush=True)
    print()
    print(json.dumps(answer.get("usage") or answer["error"]))
    return 0 if told["hr-status"] == "completed" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
