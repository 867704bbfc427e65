"""Locustfiles, which also run with plain Locust: `locust -f loadtest/suites/reasoning.py --host URL --model NAME`."""
