"""Chats that are answered with a chain of thought, streamed."""

from slimserve.loadtest.user import SuiteUser, register


class ReasoningUser(SuiteUser):
    suite = "reasoning"


register(ReasoningUser)
