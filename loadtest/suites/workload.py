"""Requests of any workload: `--suite` names a built-in one or a file that defines it."""

from slimserve.loadtest.user import SuiteUser, register


class WorkloadUser(SuiteUser):
    suite = ""


register(WorkloadUser)
