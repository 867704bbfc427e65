"""Serve a variant on vLLM: `plan` chooses the launch, `engine` runs the process, `entry` is that process."""
