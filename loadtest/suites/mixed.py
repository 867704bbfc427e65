"""Slates and chats in one stream of requests; --share says how many of them are slates."""

from slimserve.loadtest.user import SuiteUser, register


class MixedUser(SuiteUser):
    suite = "mixed"


register(MixedUser)
