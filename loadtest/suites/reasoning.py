"""Chain-of-thought chats, streamed; each user asks the next problem when the last is answered."""

from typing import cast

from locust import task

from loadtest.user import WorkloadUser, register
from workloads.interface import ChatPrompt


class ReasoningUser(WorkloadUser):
    workload = "reasoning"

    @task
    def ask(self) -> None:
        prompt = cast("ChatPrompt", self.run_state.next_prompt())
        body = {
            "model": self.run_state.model,
            "messages": prompt.messages,
            "max_tokens": prompt.max_tokens,
            "temperature": 0,
        }
        self.report("/v1/chat/completions", self.client.stream_chat(body))


register(ReasoningUser)
