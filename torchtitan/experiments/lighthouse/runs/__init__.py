"""A run on disk: find its checkpoints, read its settings and metrics, load its model, launch it, continue it."""
