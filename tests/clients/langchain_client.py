"""langchain-openai: a chat model and a completion model, whole, streamed, in a batch."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAI

common = {"base_url": sys.argv[1], "model": "tiny", "max_retries": 0}
chat = ChatOpenAI(**common, stream_usage=True)
answer = chat.invoke([("system", "Be brief."), ("human", "Hi")])
pieces = list(chat.stream("Hi"))
whole = pieces[0]
for piece in pieces[1:]:
    whole += piece
print(
    json.dumps(
        {
            "answer": answer.content,
            "tokens": answer.usage_metadata["total_tokens"],
            "finish": answer.response_metadata["finish_reason"],
            "streamed": whole.content,
            "num_pieces": len(pieces),
            "streamed_tokens": whole.usage_metadata["output_tokens"],
            "batch": [one.content for one in chat.batch(["a", "b", "c"])],
            "logprobs": len(
                chat.bind(logprobs=True).invoke("Hi").response_metadata["logprobs"]["content"]
            ),
            "completion": OpenAI(**common).invoke("Hi"),
        }
    )
)
