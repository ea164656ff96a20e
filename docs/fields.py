"""What docs/wire.md says where the code does not: fields' defaults and meanings, errors' cases.

Types and bounds come from the schemas, refusals from ``service/api/ignored.py``; a field without a
line here stops the generator, and so does a line without a field.
"""

from __future__ import annotations

from service.api.completions import DEFAULT_MAX_TOKENS
from service.api.sampling import DEFAULTS

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
    "n": ("1", "choices for each prompt, at most `--max-n`"),
    "prompt_logprobs": ("off", "log-probabilities of the prompt's tokens; not with `stream`"),
    "echo": (
        "false",
        "the prompt before the answer; in chat the assistant's last message that is continued",
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
    "priority": ("0", "lower runs earlier"),
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
    "response_format": ("text", "`json_object` and `json_schema` are refused for now"),
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
    "best_of": ("n", "more than `n` is refused for now"),
    "use_beam_search": ("false", ""),
    "length_penalty": ("1", "of beam search: another value is refused for now"),
    "structured_outputs": ("none", ""),
    "guided_json": ("none", ""),
    "guided_regex": ("none", ""),
    "guided_choice": ("none", ""),
    "guided_grammar": ("none", ""),
}

COMPLETIONS: dict[str, tuple[str, str]] = {
    "prompt": (
        "required",
        "one prompt or many, as text or token ids, none empty; at most `--max-prompts`; one choice "
        "for each prompt and `n`, prompt by prompt",
    ),
    "logprobs": ("off", "alternatives beside each token's own; 0 is on, with none"),
    "suffix": ("none", ""),
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
    "tools": ("none", ""),
    "tool_choice": ("none", ""),
    "parallel_tool_calls": ("none", ""),
    "functions": ("none", ""),
    "function_call": ("none", ""),
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
    "ContextLengthExceeded": "prompt and answer are longer than the context",
    "NotSupportedYet": "a field the wire knows and this version does not serve",
    "RequestTimeout": "the body came too slowly (`--body-timeout`)",
    "RequestTooLarge": "the body is larger than `--max-body-bytes`",
    "UnsupportedMediaType": "the content type is not JSON",
    "MethodNotAllowed": "wrong method; `Allow` names the right ones",
    "AuthenticationFailed": "no key or a wrong one; with `WWW-Authenticate: Bearer`",
    "PermissionDenied": "the server does not let requests do this",
    "NotFound": "there is nothing at this address",
    "ModelNotFound": "no model of this name is served",
    "Overloaded": "the queue is full; `Retry-After` from the measured drain rate",
    "Unavailable": "not now; with `Retry-After`",
    "EngineFailure": "the engine failed on this request, or died under it",
    "PronkError": "the server failed on this request",
}
