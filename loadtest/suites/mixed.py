"""Scoring requests and chats in one stream; `--share` is the fraction of scoring requests."""

from slimserve.loadtest.user import SuiteUser, register


class MixedUser(SuiteUser):
    suite = "mixed"


register(MixedUser)
