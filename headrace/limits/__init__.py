"""Limits of keys, apps and models: requests and tokens a minute, requests at once, money a month.

`scopes`, `amounts`, `months` and `verdict` are pure; `lua` decides, atomically, in Redis; `limiter` is its client;
`restore` makes what Redis holds anew from Kafka. `docs/limits.md` says what is promised.
"""
