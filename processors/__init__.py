"""One folder a role. A processor never imports another; they meet in topics."""
