# Recipes for people and CI. Everything is installed into .venv; nothing needs to be on PATH.

set positional-arguments

# Compiled modules are kept, whatever the machine's habit: tests start some hundred processes, and each would compile all
# that it imports anew.
export PYTHONDONTWRITEBYTECODE := ""

python := ".venv/bin/python"
headrace := ".venv/bin/headrace"

# List the recipes
[private]
default:
    @"{{just_executable()}}" --justfile "{{justfile()}}" --list --unsorted

# Start the whole stack, send one request through it, and show its way (--keep leaves it running)
demo *ARGS: setup
    @{{headrace}} demo "$@"

# Run the whole stack in the foreground, until Ctrl-C
up *ARGS: setup
    @{{headrace}} up "$@"

# All tests on real parts, those that need a stack beside the others (-n0: one after another)
test *ARGS: setup
    @{{python}} -m pytest -n 2 --dist loadscope "$@"

# Tests without I/O
test-unit *ARGS: setup
    @{{python}} -m pytest -n 2 --dist loadscope tests/unit "$@"

# Kill each of six roles (not answers, not control) at 20 random moments under load; results as JSON in tests/results
faults *ARGS: setup
    @{{python}} -m pytest tests/faults --moments 20 "$@"

# Everything that can be checked without running it
lint: setup
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .
    {{python}} -m mypy
    {{headrace}} topics docs --check

# Put the code into its form
fmt: setup
    {{python}} -m ruff check --fix .
    {{python}} -m ruff format .

# Measure the gateway: latency, throughput, CPU and memory
bench *ARGS: setup
    @{{python}} -m bench.gateway run "$@"

# The same work on other gateways, installed from package registries
bench-peers *ARGS: setup
    @{{python}} -m bench.gateway peers "$@"

# How much load the scheduling policy bears beside Ollama's, llama-swap's and LRU, simulated
bench-scheduler *ARGS: setup
    @{{python}} -m bench.scheduler sweep "$@"

# How soon streams end when their keys are revoked: --url URL (may be repeated) --key KEY
bench-revocation *ARGS: setup
    @{{python}} -m bench.revocation "$@"

# How many changes of the control plane come into force in a second, audited, from a backlog (--changes)
bench-control *ARGS: setup
    @{{python}} -m bench.control "$@"

# How long the admission against limits takes beside a plain PING of the same Redis
bench-limits *ARGS: setup
    @{{python}} -m bench.limits "$@"

# Dashboards over 10 million usage rows (--rows), and the sink from a backlog
bench-analytics *ARGS: setup
    @{{python}} -m bench.analytics "$@"

# Tokens a second of the providers' engines, side by side: --model KIND=TAG, once for each
bench-engines *ARGS: setup
    @{{python}} -m bench.engines "$@"

# The same requests on a genuine Ollama (built with Go, once) and on Headrace, three models on memory for two
bench-ollama *ARGS: setup
    @{{python}} -m bench.side_by_side "$@"

# Install a genuine Ollama with Go (once, 3 minutes) and serve it for its provider's tests, until Ctrl-C
ollama *ARGS: setup
    @{{python}} tests/support/ollama_genuine.py "$@"

# Resolve the dependencies of pyproject.toml anew
lock: setup
    {{python}} -m uv pip compile pyproject.toml --extra embedded --extra dev --universal --python-version 3.11 --generate-hashes --no-emit-index-url -o requirements.lock
    {{python}} -m uv pip compile pyproject.toml --extra transformers --extra transformers-tests --universal --python-version 3.11 --generate-hashes --no-emit-index-url -c requirements.lock -o requirements-transformers.lock

# Tests of the extra `transformers`, which `test` leaves out where it is not installed (PyTorch: 5.6 GB)
test-extras *ARGS: setup
    @sh deploy/setup_extras.sh
    @{{python}} -m pytest tests/extras "$@"

# Install everything into .venv; does nothing when that was done
setup:
    @sh deploy/setup.sh
