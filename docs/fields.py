"""What docs/wire.md says where the code does not: fields' defaults and meanings, errors' cases.

Types and bounds come from the schemas, refusals from ``service/api/ignored.py``; a field without a
line here stops the generator, and so does a line without a field.
"""

from __future__ import annotations

from service.api.completions import DEFAULT_MAX_TOKENS
from service.api.sampling import DEFAULTS
from service.api.tools import MAX_DEPTH, MAX_TOOLS_JSON

# name: (default, meaning)
SHARED: dict[str, tuple[str, str]] = {
    "model": ("the served model", "another name than the served ones: 404 `model_not_found`"),
    "max_tokens": (
        f"{DEFAULT_MAX_TOKENS} (completions), what the context leaves (chat)",
        "a stated one that does not fit: 400 `context_length_exceeded`; a default is cut to what "
        "fits; 0 only with `echo` in completions",
    ),
    "temperature": (f"{DEFAULTS['temperature']:g} *", "0 takes the likeliest token"),
    "top_p": (f"{DEFAULTS['top_p']:g} *", "least set of tokens with this share of probability"),
    "min_p": (f"{DEFAULTS['min_p']:g} *", "least probability, relative to the likeliest token's"),
    "top_k": (f"{DEFAULTS['top_k']:g} *", "the k likeliest tokens; 0 and -1 are off"),
    "presence_penalty": (f"{DEFAULTS['presence_penalty']:g} *", "for tokens the answer has"),
    "frequency_penalty": (
        f"{DEFAULTS['frequency_penalty']:g} *",
        "for each time the answer has the token",
    ),
    "repetition_penalty": (
        f"{DEFAULTS['repetition_penalty']:g} *",
        "for tokens of prompt and answer; 1 is off",
    ),
    "n": (
        "1",
        "choices for each prompt, at most `--max-n`; all choices' tokens: `--max-request-tokens`",
    ),
    "prompt_logprobs": ("off", "log-probabilities of the prompt's tokens; not with `stream`"),
    "echo": (
        "false",
        "the prompt before the answer; in chat the assistant's last message that is continued, "
        "also before an answer that is held to a schema",
    ),
    "stop": ("none", "ends the answer; at most `--max-stop` strings of 4,096 characters"),
    "include_stop_str_in_output": ("false", "keep the stop string in the text"),
    "stop_token_ids": ("none", "ids of the vocabulary that end the answer"),
    "allowed_token_ids": ("all", "only these ids are drawn"),
    "logit_bias": ("none", "id (as a string) to what is added to its logit"),
    "bad_words": ("none", "texts whose tokens are not drawn in a row"),
    "min_tokens": ("0", "no end before so many tokens; at most `max_tokens`"),
    "ignore_eos": ("false", "go on past the model's end token"),
    "seed": ("drawn", "same seed and request, same text, alone or in a batch"),
    "stream": ("false", "server-sent events"),
    "stream_options": (
        "none",
        "`include_usage`: a last chunk with the usage; `continuous_usage_stats`: every chunk; "
        "needs `stream`",
    ),
    "user": ("none", "accepted, not used"),
    "metadata": ("none", "accepted, not used"),
    "store": ("false", "accepted; nothing is stored, and `X-Ignored-Params` says so"),
    "safety_identifier": ("none", "accepted, not used"),
    "prompt_cache_key": ("none", "accepted, not used"),
    "service_tier": ("none", "there is one tier: chat answers say `default` where it was sent"),
    "priority": ("0", "lower runs earlier, among requests of the same key"),
    "cache_salt": ("none", "cached prefixes are shared only under the same salt (and API key)"),
    "truncate_prompt_tokens": (
        "off",
        "keep so many tokens of the prompt; -1: what leaves room for the answer; not 0",
    ),
    "truncation_side": ("left", "the side that is cut"),
    "skip_special_tokens": ("true", "leave special tokens out of the text"),
    "spaces_between_special_tokens": ("true", "when special tokens are shown"),
    "add_special_tokens": (
        "true (completions), false (chat)",
        "put the begin token in front; a chat template writes its own",
    ),
    "return_token_ids": ("false", "`prompt_token_ids` and `token_ids` in the answer"),
    "return_tokens_as_token_ids": ("false", "`token_id:N` in place of texts in logprobs"),
    "response_format": (
        "text",
        "`json_object`, or `json_schema` with `name` and `schema` (any of 128 Ki characters; "
        "`strict` changes nothing): JSON without white space that satisfies the schema",
    ),
    "deadline_ms": (
        "none",
        "past it: what there is, `finish_reason: length`, `stop_reason: deadline`",
    ),
    "max_queue_ms": ("none", "the same for time spent waiting to be started"),
    "speculation": (
        "the server's",
        "pronk's own, exact whatever it says: `method` is `none`, `ngram` (what stood in the text "
        "before) or `draft` (needs `--speculative-model`), `num_tokens` how many are guessed at a "
        "time, at most `--num-speculative-tokens`",
    ),
    "strict": ("false", "refuse unknown fields with a 400, as `--strict-params` for all"),
    "best_of": (
        "n",
        "n..20: generate so many choices and show the `n` of the highest mean log-probability a "
        "token; usage counts all; not with `stream`. With beam search: the number of beams",
    ),
    "use_beam_search": (
        "false",
        "the `n` best beams, distinct, best first. Nothing is drawn: `temperature`, `top_p`, "
        "`top_k`, `min_p` and `seed` change nothing; not with `stream`, `stop`, penalties, bias, "
        "bans or structured output",
    ),
    "length_penalty": (
        "1",
        "beams are ranked by log-probability / length ^ this, prompt counted and the end token "
        "not, as vLLM does; needs `use_beam_search`",
    ),
    "structured_outputs": (
        "none",
        "vLLM's: exactly one of `json` (a schema or its text), `regex` (16 Ki characters), "
        "`choice` (1,000 texts, 64 Ki characters), `grammar` (GBNF with `root ::=` or Lark, 64 Ki) "
        "and `json_object`; what takes more than 0.8 s to compile: 400. Not beside another one of "
        "these fields or a `response_format` other than text",
    ),
    "guided_json": ("none", "older name of `structured_outputs.json`"),
    "guided_regex": ("none", "older name of `structured_outputs.regex`"),
    "guided_choice": ("none", "older name of `structured_outputs.choice`"),
    "guided_grammar": ("none", "older name of `structured_outputs.grammar`"),
}

COMPLETIONS: dict[str, tuple[str, str]] = {
    "prompt": (
        "required",
        "one prompt or many, as text or token ids, none empty; at most `--max-prompts`; one choice "
        "for each prompt and `n`, prompt by prompt",
    ),
    "logprobs": ("off", "alternatives beside each token's own; 0 is on, with none"),
    "suffix": (
        "none",
        "what follows the text to be filled in; only models with fill-in-the-middle tokens "
        "(Code Llama, Qwen-Coder, StarCoder, DeepSeek, Codestral), else 400; not with `echo`. "
        "Under `truncate_prompt_tokens` both keep what is next to the gap",
    ),
    "parse_special_tokens": ("true", "false: a special token's spelling stays text"),
}

CHAT: dict[str, tuple[str, str]] = {
    "messages": (
        "required",
        "`role` and `content` (text, or parts of type `text`); content may be missing only beside "
        "calls; image and audio parts: 400; a special token's spelling stays text",
    ),
    "max_completion_tokens": ("`max_tokens`", "the newer name; it wins where both are given"),
    "logprobs": ("false", "each token's log-probability"),
    "top_logprobs": ("0", "alternatives beside it; needs `logprobs`"),
    "reasoning_effort": ("none", "handed to the chat template"),
    "add_generation_prompt": ("true", "false where `continue_final_message` is set"),
    "continue_final_message": ("false", "go on with the last message in place of a new one"),
    "chat_template": (
        "the checkpoint's",
        "403 unless the server has `--allow-request-chat-template`",
    ),
    "chat_template_kwargs": ("none", "more variables for the chat template"),
    "tools": (
        "none",
        "functions the model may call: names of `[A-Za-z0-9_-]{1,64}`, each once; `parameters` a "
        f"schema of an object; at most {MAX_TOOLS_JSON:,} characters in all, "
        f"nested at most {MAX_DEPTH} deep. A chat template that "
        "knows no tools gets them in the system message. Beside a schema or grammar of the answer "
        "no call is possible, unless it is forced: `X-Ignored-Params` says `tools`",
    ),
    "tool_choice": (
        "`auto` with tools, else `none`",
        "`none` (tools are kept from the model), `auto` (calls are read as `--tool-call-parser` "
        "says; what is malformed is content), `required`, `{type: function, function: {name}}`, or "
        "`{type: allowed_tools, allowed_tools: {mode, tools}}`. Required and named: `content` is "
        "null, `finish_reason` is `tool_calls`, arguments always satisfy their schema; `stop` and "
        "`stop_token_ids` cut no such call (`X-Ignored-Params` names them), `echo`: 400",
    ),
    "parallel_tool_calls": ("true", "false: at most one call"),
    "functions": ("none", "400: send `tools`; in histories the older form is read"),
    "function_call": ("none", "400: send `tool_choice`"),
}

TOKENIZE: dict[str, tuple[str, str]] = {
    "model": SHARED["model"],
    "prompt": ("none", "either this or `messages`"),
    "messages": ("none", "rendered by the chat template, as chat does"),
    "add_special_tokens": ("true (prompt), false (messages)", "put the begin token in front"),
    "parse_special_tokens": COMPLETIONS["parse_special_tokens"],
    "return_token_strs": ("false", "each token's text in `token_strs`"),
    "strict": SHARED["strict"],
    **{
        name: CHAT[name]
        for name in (
            "add_generation_prompt",
            "continue_final_message",
            "chat_template",
            "chat_template_kwargs",
            "tools",
        )
    },
}

DETOKENIZE: dict[str, tuple[str, str]] = {
    "model": SHARED["model"],
    "tokens": ("required", "ids of the vocabulary"),
    "strict": SHARED["strict"],
}

OWN: dict[str, tuple[str, str]] = {
    name: SHARED[name]
    for name in (
        "min_p",
        "seed",
        "priority",
        "cache_salt",
        "deadline_ms",
        "max_queue_ms",
        "strict",
    )
}

RESPONSES: dict[str, tuple[str, str]] = {
    "model": SHARED["model"],
    "input": (
        "required",
        "a text, or items: messages (parts `input_text` and `output_text`), `function_call`, "
        "`function_call_output` (its call must stand before it), `reasoning`; other items, images "
        "and files: 400",
    ),
    "instructions": ("none", "the system message, before one that `input` opens with"),
    "max_output_tokens": (
        "what the context leaves",
        "a stated one that does not fit: 400 `context_length_exceeded`",
    ),
    "temperature": SHARED["temperature"],
    "top_p": SHARED["top_p"],
    "top_k": SHARED["top_k"],
    "top_logprobs": ("0", "alternatives beside each token; more than 0 turns logprobs on"),
    "include": (
        "none",
        "`message.output_text.logprobs`; others are named in `X-Ignored-Params`",
    ),
    "text": (
        "text",
        "`format`: `text`, `json_object` or `json_schema`, as chat's `response_format`",
    ),
    "tools": ("none", "functions alone; tools that OpenAI's servers run: 400"),
    "tool_choice": ("auto", "`allowed_tools` shows the model those alone"),
    "parallel_tool_calls": ("true", "as in chat"),
    "max_tool_calls": ("none", "accepted: it bounds tools that a server runs, and there are none"),
    "reasoning": ("none", "`effort`, handed to the chat template"),
    "truncation": ("disabled", "`auto` leaves the oldest turns out until the rest fits"),
    "stream": SHARED["stream"],
    "stream_options": ("none", "no `include_obfuscation`: `X-Ignored-Params` says so"),
    "metadata": ("none", "at most 16 texts; echoed"),
    "user": ("none", "echoed, not used"),
    "safety_identifier": ("none", "echoed, not used"),
    "prompt_cache_key": ("none", "echoed, not used"),
    "service_tier": ("none", "accepted; the answer says `default`"),
    "store": SHARED["store"],
    "previous_response_id": ("none", "400: nothing is stored; send the conversation in `input`"),
    "conversation": ("none", "400: nothing is stored"),
    "background": ("false", "true: 400"),
    "prompt": ("none", "400: nothing is stored"),
    **OWN,
}

CONVERSATION: dict[str, tuple[str, str]] = {
    "model": SHARED["model"],
    "messages": (
        "required",
        "of `user`, `assistant` and `system`: a text, or blocks `text`, `tool_use`, `tool_result` "
        "(its call must stand before it), `thinking`; images and documents: 400. A last message of "
        "the assistant's is gone on with",
    ),
    "system": ("none", "a text or `text` blocks"),
    "tools": ("none", "with an `input_schema`; Anthropic's own tools: 400"),
    "tool_choice": (
        "auto",
        "`type` is `auto`, `any`, `tool` (with `name`) or `none`; `disable_parallel_tool_use`",
    ),
    "thinking": (
        "the template's",
        "`type`: handed to the chat template as `enable_thinking`; nothing bounds the thinking, "
        "`budget_tokens` is named in `X-Ignored-Params`",
    ),
    "output_config": (
        "none",
        "`effort`, handed to the chat template; `format`: `json_schema` with its `schema`",
    ),
    "cache_control": ("none", "accepted, here and in blocks: every prefix is cached anyway"),
    **OWN,
}

MESSAGES: dict[str, tuple[str, str]] = {
    "max_tokens": ("required", "one that does not fit into the context: 400"),
    "temperature": SHARED["temperature"],
    "top_p": SHARED["top_p"],
    "top_k": SHARED["top_k"],
    "stop_sequences": ("none", "as chat's `stop`"),
    "stream": SHARED["stream"],
    "metadata": ("none", "`user_id`: accepted, not used"),
    "service_tier": ("none", "accepted, not used"),
}


TEXTS: dict[str, tuple[str, str]] = {
    "model": SHARED["model"],
    "truncate_prompt_tokens": ("off", "keep so many tokens of each; -1: what fits; not 0"),
    "truncation_side": ("right", "the side that is cut"),
    "add_special_tokens": ("true", "put the begin token in front"),
    "parse_special_tokens": COMPLETIONS["parse_special_tokens"],
    "priority": SHARED["priority"],
    "cache_salt": SHARED["cache_salt"],
    "user": SHARED["user"],
    "strict": SHARED["strict"],
}

EMBEDDINGS: dict[str, tuple[str, str]] = {
    "input": (
        "required",
        "one text or many, as text or token ids, none empty; at most `--max-prompts`",
    ),
    "encoding_format": ("float", "base64: float32 in little-endian order"),
    "dimensions": ("all", "the first so many components, of length 1 again"),
    "pooling": (
        "`--pooling`",
        "`mean`: the mean of the final hidden states of all tokens; `last`: those of the last one",
    ),
    **TEXTS,
}

JUDGED = ("off", "keep so many tokens of both together; only the first text is cut; -1: what fits")

SCORE: dict[str, tuple[str, str]] = {
    "text_1": ("required", "one text or many, none empty"),
    "text_2": (
        "required",
        "what is judged: one text or many; one `text_1` goes with each, else as many as there are. "
        "Nothing is put between the two",
    ),
    **TEXTS,
    "truncate_prompt_tokens": JUDGED,
}

RERANK: dict[str, tuple[str, str]] = {
    "query": ("required", "judged after each document and a line break"),
    "documents": ("required", "texts, or objects of which `text` counts; at most `--max-prompts`"),
    "top_n": ("all", "only the first so many"),
    "return_documents": ("true", "repeat the texts in the answer"),
    **TEXTS,
    "truncate_prompt_tokens": JUDGED,
}

LOAD_ADAPTER: dict[str, tuple[str, str]] = {
    "lora_name": ("required", "the name that selects it, as a model's does; no spaces, `=` or `,`"),
    "lora_path": ("required", "its folder below `--lora-root`"),
    "load_inplace": ("false", "replace one of that name: requests that run keep the old one"),
    "strict": SHARED["strict"],
}

UNLOAD_ADAPTER: dict[str, tuple[str, str]] = {
    "lora_name": ("required", "requests that run go on, new ones get a 404"),
    "lora_int_id": ("none", "vLLM's number; not looked at"),
    "strict": SHARED["strict"],
}

ROUTES = {  # whose handlers say nothing
    "/version": "The version.",
}

ERRORS = {  # class: when
    "InvalidRequest": "bad JSON, wrong type, missing field, out of bounds; `param` is its path. "
    "`code` is `unknown_parameter` for fields that `strict` refuses",
    "GrammarRefused": "a schema, pattern or grammar that is none, that nothing satisfies, or that "
    "takes too much to compile or to follow",
    "ContextLengthExceeded": "prompt and answer are longer than the context",
    "NotSupported": "a field that a newer one replaced, or that would need something stored",
    "PoisonRequest": "the request ended the engine twice while it was computed; refused, by a hash "
    "of what it asks for and of the account, for ten minutes",
    "RequestTimeout": "the body came too slowly (`--body-timeout`)",
    "RequestTooLarge": "the body is larger than `--max-body-bytes`",
    "HeadersTooLarge": "the request's headers are longer than 64 KiB, or more than 128; the "
    "connection ends",
    "UnsupportedMediaType": "the content type is not JSON",
    "MethodNotAllowed": "wrong method; `Allow` names the right ones",
    "AuthenticationFailed": "no key, or one that is wrong, revoked or expired; with "
    "`WWW-Authenticate: Bearer`",
    "PermissionDenied": "the server does not let requests do this",
    "AdminRequired": "the key has no admin rights",
    "ModelNotAllowed": "the key may not use this model; also where there is none of that name",
    "NotFound": "there is nothing at this address",
    "ModelNotFound": "no model of this name is served",
    "LimitReached": "the key is over its rate or its requests at a time; `Retry-After` says when "
    "this request would be let in",
    "QuotaSpent": "the key's tokens of this day or month do not suffice; `Retry-After` is when the "
    "next one begins",
    "Overloaded": "the queue is full; `Retry-After` from the measured drain rate",
    "BodiesFull": "the requests being answered have brought `--max-body-memory` bytes",
    "Unavailable": "not now; with `Retry-After`",
    "TooManyConnections": "all of `--max-connections` are being answered; health checks still get "
    "through",
    "EngineFailure": "the engine failed on this request, or died under it",
    "EngineLost": "the engine died under a request that had been answered in part",
    "PronkError": "the server failed on this request",
}
