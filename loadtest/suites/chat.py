"""The user's own conversations, streamed; `--data` names a JSONL file."""

from slimserve.loadtest.user import SuiteUser, register


class ChatUser(SuiteUser):
    suite = "chat"


register(ChatUser)
