"""Serve a variant on vLLM: `plan` chooses the launch, `engine` runs and watches the process, `entry` is that process."""
