"""Locustfiles, one per workload: `locust -f loadtest/suites/reasoning.py --host URL --model NAME` works too."""
