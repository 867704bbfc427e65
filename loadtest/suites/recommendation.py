"""Candidate lists after a user's history; each request scores one list."""

from slimserve.loadtest.user import SuiteUser, register


class RecommendationUser(SuiteUser):
    suite = "recommendation"


register(RecommendationUser)
