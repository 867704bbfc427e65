"""Slates of candidates behind a member's history, scored in one request each."""

from slimserve.loadtest.user import SuiteUser, register


class RecommendationUser(SuiteUser):
    suite = "recommendation"


register(RecommendationUser)
