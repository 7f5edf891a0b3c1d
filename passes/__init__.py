"""The passes, one a file, and the pipelines that list them. Each is pure; if nothing changed, it returns its input."""
