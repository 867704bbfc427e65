"""Chain-of-thought chats, streamed."""

from slimserve.loadtest.user import SuiteUser, register


class ReasoningUser(SuiteUser):
    suite = "reasoning"


register(ReasoningUser)
