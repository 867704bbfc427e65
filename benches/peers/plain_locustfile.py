"""Plain Locust, as its own documentation writes it: users who ask about five times a second and wait for the answer.

locust -f benches/peers/plain_locustfile.py --headless --users 4 --host URL
"""

from locust import HttpUser, constant_throughput, task


class PlainUser(HttpUser):
    wait_time = constant_throughput(5)

    @task
    def ask(self) -> None:
        body = {"model": "truth", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        self.client.post("/v1/chat/completions", json=body)
