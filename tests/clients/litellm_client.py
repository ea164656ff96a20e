"""litellm: chat and text completion of an OpenAI-compatible server, whole, streamed, refused."""

import asyncio
import json
import sys

import litellm

litellm.telemetry = False
common = {"model": "openai/tiny", "api_base": sys.argv[1], "num_retries": 0}
messages = [{"role": "user", "content": "Hi"}]
answer = litellm.completion(messages=messages, **common)
pieces = [
    chunk.choices[0].delta.content or ""
    for chunk in litellm.completion(messages=messages, stream=True, **common)
]
text = litellm.text_completion(
    model="text-completion-openai/tiny", api_base=sys.argv[1], prompt="Hi", num_retries=0
)
try:
    litellm.completion(messages=messages, temperature=3, **common)
    refused = None
except litellm.BadRequestError as error:
    refused = error.status_code


async def many() -> list[str]:
    answers = [litellm.acompletion(messages=messages, **common) for _ in range(8)]
    return [one.choices[0].message.content for one in await asyncio.gather(*answers)]


print(
    json.dumps(
        {
            "answer": answer.choices[0].message.content,
            "tokens": answer.usage.total_tokens,
            "pieces": pieces,
            "text": text.choices[0].text,
            "refused": refused,
            "many": asyncio.run(many()),
        }
    )
)
