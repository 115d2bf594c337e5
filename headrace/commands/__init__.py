"""Commands of the `headrace` command line, a module a subject; each has `register(app)`."""
