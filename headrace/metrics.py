"""Every metric of every role, on one page: names, types, labels and meanings. Durations are in seconds."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

# ingress
HTTP_REQUESTS = Counter("headrace_http_requests_total", "HTTP answers by route and status.", ["route", "status"])
ACCEPTED = Counter("headrace_requests_accepted_total", "Requests acknowledged by the brokers.", ["model"])
REFUSED = Counter("headrace_requests_refused_total", "Requests refused before they were published.", ["code"])
TTFT = Histogram("headrace_ttft_seconds", "From acceptance to the first token sent to the caller.", buckets=_LATENCY)
REQUEST_SECONDS = Histogram(
    "headrace_request_seconds", "From acceptance to the terminal.", ["status"], buckets=_LATENCY
)
OPEN_STREAMS = Gauge("headrace_open_streams", "Callers attached to this ingress.")
TOKENS_OUT = Counter("headrace_tokens_streamed_total", "Tokens written to callers.")
CALLERS_DROPPED = Counter("headrace_callers_dropped_total", "Callers dropped because they read too slowly.")
CALLERS_LEFT = Counter("headrace_callers_left_total", "Callers that left before the end of their answer.")
ANSWERS_REVOKED = Counter("headrace_answers_revoked_total", "Answers ended because their key, user or app was.")
REPLY_LAG = Gauge("headrace_reply_lag_frames", "Records of this ingress's reply partition not yet read.")

# agents
EVENTS_IN = Counter("headrace_agent_events_total", "Events that an agent has finished.", ["role", "topic"])
DEAD_LETTERS = Counter("headrace_dead_letters_total", "Messages put into dead.letters.", ["role", "topic"])
TERMINALS = Counter("headrace_terminals_total", "Terminals written, by who wrote them.", ["role", "status"])

# limits
LIMIT_REFUSALS = Counter(
    "headrace_limit_refusals_total",
    "Requests refused by a limit: requests, tokens, concurrency or budget, of a key, app or model.",
    ["limit", "scope"],
)
LIMITS_BYPASSED = Counter(
    "headrace_limits_bypassed_total", "Requests let through while their limits could not be asked; charged later."
)
RESERVATIONS = Gauge("headrace_limit_reservations", "Reservations not given back: pending or bound.", ["state"])
RESERVATIONS_SETTLED = Counter("headrace_limit_settled_total", "Reservations given back by their terminal.")
RESERVATIONS_REAPED = Counter(
    "headrace_limit_reaped_total", "Reservations made after their request had its terminal, and given back."
)

# router
NOT_AUTHENTIC = Counter("headrace_not_authentic_total", "Records of inference.requests that nobody we know wrote.")
PUBLISHED = Counter(
    "headrace_published_messages_total", "Messages of direct publishers, by what became of them.", ["outcome"]
)

# scheduler
POOL_QUEUED = Gauge("headrace_pool_queued", "Requests waiting in a pool.", ["pool"])
POOL_RUNNING = Gauge("headrace_pool_running", "Requests assigned in a pool.", ["pool"])
QUEUE_SECONDS = Histogram("headrace_queue_seconds", "From arrival at the scheduler to assignment.", buckets=_LATENCY)
DUPLICATES = Counter("headrace_duplicate_requests_total", "Requests that came again and were dropped.")
ATTEMPTS_LOST = Counter("headrace_attempts_lost_total", "Attempts whose worker was lost.", ["outcome"])
WORKERS = Gauge("headrace_workers", "Live workers of a pool.", ["pool"])

# worker
GENERATING = Gauge("headrace_generating", "Generations running on this worker.")
GENERATED_TOKENS = Counter("headrace_generated_tokens_total", "Completion tokens generated.", ["model"])
PROVIDER_ERRORS = Counter("headrace_provider_errors_total", "Generations that a provider failed.", ["provider", "code"])
BREAKER_OPEN = Gauge(
    "headrace_provider_breaker_open",
    "1 while a provider takes no work on this worker: its breaker is open.",
    ["provider"],
)
FRAMES = Counter("headrace_frames_total", "Frame records written to inference.replies.")
MODEL_LOAD_SECONDS = Histogram("headrace_model_load_seconds", "Time to load a model.", ["model"], buckets=_LATENCY)

# answers
ANSWERS = Counter("headrace_published_answers_total", "Results written for direct publishers, by status.", ["status"])
CHUNKS = Counter("headrace_published_chunks_total", "Chunks written for direct publishers.")
CHUNKS_MISSED = Counter("headrace_published_chunks_missed_total", "Streams whose frames were not all found.")

# metering
USAGE_EVENTS = Counter("headrace_usage_events_total", "Usage events written.", ["status"])
USAGE_TOKENS = Counter("headrace_usage_tokens_total", "Tokens metered.", ["model", "kind"])

# sink
SINK_ROWS = Counter("headrace_sink_rows_total", "Rows inserted into ClickHouse, replays included.", ["table"])
SINK_VOID = Counter("headrace_sink_void_terminals_total", "Terminals of fenced attempts, which become no rows.")
SINK_REFUSED = Counter("headrace_sink_refused_total", "Records that can be no row and were dead-lettered.", ["topic"])
SINK_RETRIES = Counter("headrace_sink_retries_total", "Inserts tried again, by ClickHouse's error code.", ["code"])
SINK_BATCH_ROWS = Histogram("headrace_sink_batch_rows", "Records of a batch.", buckets=(1, 10, 100, 1e3, 1e4, 5e4, 1e5))
SINK_INSERT_SECONDS = Histogram(
    "headrace_sink_insert_seconds", "Time to write a batch into all tables.", buckets=_LATENCY
)
SINK_DELAY_SECONDS = Histogram(
    "headrace_sink_delay_seconds", "From a record to its row, the oldest of a batch.", buckets=_LATENCY
)
SINK_LAG = Gauge("headrace_sink_lag_records", "Records of a partition that are not rows yet.", ["topic", "partition"])
