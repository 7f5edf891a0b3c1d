"""The passes, one a file, and the pipelines that list them. Each is pure: it returns the same object if nothing changed."""
