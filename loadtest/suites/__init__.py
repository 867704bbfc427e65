"""Locustfiles for Locust's own command line: `locust -f loadtest/suites/reasoning.py --host URL --model NAME` works too."""
