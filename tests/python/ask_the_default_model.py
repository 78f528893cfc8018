"""The README's question through the official `openai` client, streamed.

    python ask_the_default_model.py BASE_URL

BASE_URL ends in /v1. Exit status 0 when the answer has 408 in it.
"""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=60)
stream = client.chat.completions.create(
    model="dsa80-tiny",
    messages=[{"role": "user", "content": "What is 17 x 24?"}],
    max_tokens=32,
    stream=True,
)
pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
answer = "".join(pieces)
print(f"streamed in {sum(map(bool, pieces))} pieces: {answer}")
if "408" not in answer:
    sys.exit("the answer lacks 408")
