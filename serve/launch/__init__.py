"""The start of an engine: the serve config, the launch plan with its reasons, tuning, and the child process."""
