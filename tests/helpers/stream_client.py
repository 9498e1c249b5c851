"""Clients of one front door, as a process that can be started inside a network namespace.

Standard input is `{"url": …, "requests": [{field: value, …}, …]}`; all are streamed at once. Standard output is for each its
text, why it ended, and the longest time without more of it: `[[text, reason, seconds], …]`, after a line that says that the
first token of any has come.
"""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai

_begun = threading.Event()


def streamed(client: openai.OpenAI, given: dict) -> list:
    text, reason, pause, last = "", None, 0.0, None
    for chunk in client.completions.create(stream=True, **given):
        _begun.set()
        now = time.monotonic()
        pause, last = max(pause, now - (last or now)), now
        text += chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
    return [text, reason, pause]


def main() -> None:
    asked = json.load(sys.stdin)
    client = openai.OpenAI(base_url=asked["url"], api_key="none", max_retries=0, timeout=600)
    with client, ThreadPoolExecutor(len(asked["requests"])) as pool:
        running = [pool.submit(streamed, client, given) for given in asked["requests"]]
        _begun.wait(300)
        print("begun", flush=True)
        print(json.dumps([one.result() for one in running]))


if __name__ == "__main__":
    main()
