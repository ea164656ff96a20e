"""Every setting of the service: read once from flags, ``PRONK_*`` variables and a TOML file.

Precedence: flags, then the environment, then the file named by ``--config`` (or ``PRONK_CONFIG``),
then the defaults here. Names are vLLM's where the meaning is the same. Unknown keys are refused.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

GIB = 1 << 30
MIB = 1 << 20
ENVIRONMENT_PREFIX = "PRONK_"
NO_KEY = "names no key; leave it out for a server that is open to all"
LORA_NAME = re.compile(r"[^\s=,\x00-\x1f\x7f]{1,128}")  # labels and lists hold it as it is

Strings = Annotated[list[str], NoDecode]  # lists from the environment: JSON or comma-separated
Secrets = Annotated[list[SecretStr], NoDecode]
LoraModules = Annotated[list[str], NoDecode]  # name=folder each, once read


class TomlSettingsSource(PydanticBaseSettingsSource):
    """Reads the file named by ``config``; keys are the settings' names, with - or _."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # __call__ gives the whole file at once

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config") or os.environ.get(f"{ENVIRONMENT_PREFIX}CONFIG")
        if not path:
            return {}
        try:
            with open(path, "rb") as file:
                values = tomllib.load(file)
        except OSError as error:
            raise ValueError(f"cannot read the config file {path}: {error.strerror}") from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"the config file {path} is not TOML: {error}") from None
        return {key.replace("-", "_"): value for key, value in values.items()}


class Settings(BaseSettings):
    """Serve a Llama-family model over HTTP, OpenAI-compatible.

    Each setting can also be given as PRONK_NAME in the environment or as a key of a TOML file
    (--config FILE). Precedence: flags, environment, file, default.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        extra="forbid",
        frozen=True,
        case_sensitive=False,
        protected_namespaces=(),
        hide_input_in_errors=True,  # an API key mistyped must not be printed
        validate_default=False,
    )

    # ---- the model
    model: CliPositionalArg[str | None] = Field(
        None,
        description="A folder (Hugging Face or Meta layout), a .gguf file or a hub id; "
        "omitted: the small model that ships with pronk",
    )
    served_model_name: Strings = Field(
        [], description="Names clients use for the model; the first one stands in answers"
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id")
    download_dir: Path | None = Field(None, description="Where hub downloads are kept")
    offline: bool = Field(False, description="Never touch the network, also for a hub id")
    chat_template: str | None = Field(
        None, description="A jinja file or text that replaces the checkpoint's chat template"
    )
    tool_call_parser: Literal[
        "auto", "hermes", "llama3_json", "pythonic", "llama4_pythonic", "mistral"
    ] = Field(
        "auto",
        description="How the model writes calls of functions; auto: as its chat template says",
    )
    reasoning_parser: Literal["auto", "none", "think", "deepseek_r1", "qwen3", "mistral"] = Field(
        "auto",
        description="How the model fences its reasoning; auto: as its template and tokenizer say",
    )
    seed: int | None = Field(
        None, description="Makes the seeds drawn for requests without one repeatable"
    )

    # ---- where it listens
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 in a container")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one")
    uds: Path | None = Field(None, description="Listen on this Unix socket instead")
    root_path: str = Field("", description="Path prefix when behind a proxy that strips one")
    ssl_keyfile: Path | None = Field(None, description="TLS private key (PEM)")
    ssl_certfile: Path | None = Field(None, description="TLS certificate chain (PEM)")

    # ---- the device and the cache
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float", "half"] = Field(
        "auto",
        description="Number format of weights and cache; auto: the checkpoint's, "
        "or float32 where the processor is slow at it",
    )
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = Field(
        "auto",
        description="Weights of linear layers, made while loading; auto: as the checkpoint holds "
        "them; none: widened; fp8 needs a GPU",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, description="GPUs one model is split over (only 1 in this version)"
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt + answer in tokens; default: the checkpoint's"
    )
    max_num_seqs: int | None = Field(
        None, ge=1, le=4096, description="Sequences that run together; default 64 (CPU), 256 (GPU)"
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="Token budget of one step; default 512 (CPU), 8192 (GPU)"
    )
    block_size: int = Field(256, description="Tokens in a page of the KV cache: 32, 64 ... 512")
    num_kv_blocks: int | None = Field(
        None, ge=2, description="Pages of the KV cache; default: from memory"
    )
    kv_cache_memory: int | None = Field(
        None, ge=MIB, description="Bytes for the KV cache; default: from free memory"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8", "int8"] = Field(
        "auto",
        description="Number format of the KV cache; auto: the model's. fp8 (e4m3) and int8 hold "
        "about twice the tokens of bfloat16, a little less exactly",
    )
    host_cache_memory: int = Field(
        0,
        ge=0,
        description="Bytes of host memory for computed prompts the KV cache has no more room for; "
        "0: none",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of the GPU's memory pronk may use"
    )
    enable_prefix_caching: bool = Field(
        True, description="Keep computed prompts for requests that begin alike"
    )
    attention_backend: Literal[
        "auto", "reference", "cpu", "sdpa", "triton", "varlen", "flashinfer"
    ] = Field("auto", description="Attention kernel; auto takes the best one present")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile of the layers; auto: on a GPU, where it is faster"
    )
    compile_cache: Path | None = Field(
        None,
        description="Folder that keeps compiled kernels between starts; "
        "default: pronk/compile in the user's cache folder",
    )
    async_scheduling: bool | None = Field(
        None,
        description="Launch each step while the device computes the one before it; "
        "default: on a GPU",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="Threads of the engine; default: the physical cores, "
        "less one for HTTP where there are four or more",
    )
    cpu_affinity: bool = Field(
        True,
        description="Hold engine and HTTP process to cores of their own where there are enough",
    )

    # ---- speculative decoding
    speculative_method: Literal["none", "ngram", "draft"] = Field(
        "none",
        description="Who guesses tokens ahead for requests that do not say: nobody, what stood "
        "in their text before, or a draft model",
    )
    speculative_model: str | None = Field(
        None,
        description="The draft model, as MODEL: small, with the same vocabulary; "
        "takes its part of the KV cache's memory",
    )
    num_speculative_tokens: int = Field(
        8, ge=0, le=32, description="Tokens guessed at a time, at most; 0: no request may guess"
    )
    speculative_ngram_min: int = Field(
        2, ge=1, le=8, description="Least last tokens that must have stood in the text before"
    )
    speculative_ngram_max: int = Field(
        4, ge=1, le=32, description="Last tokens compared to find the best place"
    )

    # ---- embeddings
    pooling: Literal["mean", "last"] = Field(
        "mean",
        description="What /v1/embeddings makes of a text's final hidden states where a request "
        "does not say: their mean, or the last token's",
    )

    # ---- adapters
    lora_modules: LoraModules = Field(
        [],
        description="A LoRA adapter to serve beside the model: name=folder (PEFT's layout), or "
        '{"name": ..., "path": ...}; its name selects it; give the flag once for each',
    )
    lora_root: Path | None = Field(
        None,
        description="Folder whose adapters clients with a key may load at run time "
        "(/v1/load_lora_adapter); default: none may",
    )
    max_loras: int = Field(
        8, ge=1, le=256, description="Different adapters that run together; each takes memory"
    )
    max_lora_rank: int = Field(16, ge=1, le=512, description="Largest rank an adapter may have")
    max_cpu_loras: int = Field(32, ge=1, le=4096, description="Adapters kept in memory")

    # ---- bounds
    max_queued_requests: int = Field(
        1024, ge=1, description="Sequences that may wait; past it: 429 with Retry-After"
    )
    max_queued_tokens: int = Field(1_000_000, ge=1, description="Prompt tokens that may wait")
    scheduling_policy: Literal["fair", "fcfs"] = Field(
        "fair",
        description="Who is served first: fair shares the device between API keys by their "
        "weights; fcfs is first come, first served; within a key both go by priority, then arrival",
    )
    max_body_bytes: int = Field(8 * MIB, ge=1024, description="Largest request body; past it: 413")
    max_body_memory: int = Field(
        256 * MIB,
        ge=1024,
        description="Bytes of bodies of all requests being answered; past it: 429 with Retry-After",
    )
    max_request_tokens: int = Field(
        1 << 20,
        ge=1,
        description="Tokens a request may ask for: prompts x n x max_tokens x (1 + logprobs); "
        "one choice of the whole context always may",
    )
    max_n: int = Field(128, ge=1, description="Largest n of a request")
    max_prompts: int = Field(2048, ge=1, description="Most prompts in one request")
    max_stop: int = Field(4, ge=1, description="Most stop strings in a request")
    strict_params: bool = Field(False, description="Refuse unknown request fields with a 400")
    max_connections: int | None = Field(
        None,
        ge=1,
        description="Connections held at once; past it idle ones give way, then 503; "
        "default: what file descriptors allow",
    )
    header_timeout: float = Field(
        10.0, gt=0, description="Seconds a client may take over a request's headers, or over TLS"
    )
    body_timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds a body may fail to come; after as many it must come at 4 KiB/s",
    )
    write_timeout: float = Field(
        60.0,
        gt=0,
        description="Seconds a client may take nothing of its answer, before it is cancelled",
    )

    # ---- who may call
    api_key: Secrets = Field(
        [],
        description="A key clients must send, with every right and no limit (process lists show "
        "flags: prefer PRONK_API_KEY)",
    )
    api_keys_file: Path | None = Field(
        None,
        description="A TOML file of hashed keys with their rights and limits, read again whenever "
        "it changes; `pronk keys` writes it",
    )
    allowed_origins: Strings = Field(
        [],
        description='Origins browsers may call from, e.g. ["https://example.org"]; default: none',
    )
    metrics_public: bool = Field(
        False, description="Serve /metrics without an admin key also when keys are set"
    )
    docs: bool = Field(True, description="Serve /docs and /openapi.json")
    allow_request_chat_template: bool = Field(
        False, description="Let requests bring a chat template of their own"
    )

    # ---- the usage ledger
    ledger: str | None = Field(
        None,
        description="The file that keeps a record of each request's usage (SQLite, on a local "
        "disk), or none; default: pronk/usage.db in the user's state folder, if it can be written",
    )
    ledger_records: int = Field(
        1_000_000, ge=1, description="Records kept one by one; older ones become daily sums"
    )
    ledger_days: float = Field(
        400, gt=0, description="Days for which records are kept one by one; sums are kept for 1,100"
    )

    # ---- life
    drain_delay: float = Field(
        0.0, ge=0, description="Seconds to go on serving after SIGTERM while /readyz is already 503"
    )
    drain_timeout: float = Field(30.0, ge=0, description="Seconds streams in flight get to finish")
    keep_alive: int = Field(75, ge=1, description="Seconds an idle connection is kept")
    watchdog_timeout: float = Field(
        10.0,
        ge=3,
        description="Seconds without a sign of life or a completed step (or ten times what the "
        "step should take, if that is more) after which the engine is ended and started anew",
    )
    retry_timeout: float = Field(
        300.0,
        ge=0,
        description="Seconds a request of which nothing was sent yet waits for another engine "
        "when its own died",
    )
    ping_interval: float = Field(
        5.0, gt=0, description="Seconds of silence before a stream's comment"
    )

    # ---- traces
    otlp_traces_endpoint: str | None = Field(
        None,
        description="Collector that gets OpenTelemetry traces (OTLP over HTTP), such as "
        "http://localhost:4318; needs the extra otel; the standard OTEL_* variables tune the rest",
    )

    # ---- logs
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level logged"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Lines for people or for machines"
    )
    access_log: bool = Field(
        False,
        description="Log a line for each request that has ended: key, route, status, tokens, "
        "seconds; never what was said",
    )
    log_content: bool = Field(
        False, description="Log prompts and answers (loud warning; for debugging)"
    )
    sample: bool | None = Field(
        None,
        description="Print a sample completion once ready; default: only for the bundled model",
    )
    config: Path | None = Field(None, description="A TOML file with these settings")

    @field_validator("served_model_name", "allowed_origins", "api_key", mode="before")
    @classmethod
    def split_list(cls, value: Any) -> Any:
        """Accept a JSON list or comma-separated text; a command line gives a list of either."""
        if isinstance(value, str):
            return _split(value)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return [part for item in value for part in _split(item)]
        return value

    @field_validator("api_key", mode="wrap")
    @classmethod
    def has_a_key(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        """``--api-key "$KEY"`` without a KEY must not open the server; an empty variable is no word
        about keys, as compose files leave one that nobody set."""
        keys = read(value)
        if not keys and value not in ("", []):
            raise ValueError(NO_KEY)
        return keys

    @field_validator("lora_modules", mode="before")
    @classmethod
    def read_lora_modules(cls, value: Any) -> Any:
        """``name=folder``, vLLM's JSON object, or a list or table of them."""
        if isinstance(value, dict) and not all(isinstance(one, str) for one in value.values()):
            raise ValueError("must be name=folder")
        return list(_lora_modules(value))

    @field_validator("block_size")
    @classmethod
    def known_block_size(cls, value: int) -> int:
        if value not in (32, 64, 128, 256, 512):
            raise ValueError("must be 32, 64, 128, 256 or 512")
        return value

    @field_validator("tensor_parallel_size")
    @classmethod
    def one_device(cls, value: int) -> int:
        if value != 1:
            raise ValueError("this version serves a model from one device; use 1")
        return value

    @property
    def adapters(self) -> dict[str, Path]:
        """The folders of ``lora_modules`` by name."""
        pairs = (one.partition("=") for one in self.lora_modules)
        return {name: Path(folder) for name, _, folder in pairs}

    @property
    def max_running_loras(self) -> int:
        """0 where this server is to serve none."""
        return self.max_loras if self.lora_modules or self.lora_root else 0

    @model_validator(mode="after")
    def adapters_have_one_name_each(self) -> Settings:
        if len(self.adapters) < len(self.lora_modules):
            raise ValueError("lora_modules gives one name to two adapters")
        if both := self.adapters.keys() & set(self.served_model_name):
            raise ValueError(f"{min(both)} names both the model and an adapter")
        if len(self.adapters) > self.max_cpu_loras:
            raise ValueError(f"lora_modules holds more than max_cpu_loras, {self.max_cpu_loras}")
        return self

    @model_validator(mode="after")
    def speculation_fits_together(self) -> Settings:
        if self.speculative_method == "draft" and self.speculative_model is None:
            raise ValueError("speculative_method draft needs a speculative_model")
        if self.speculative_ngram_min > self.speculative_ngram_max:
            raise ValueError("speculative_ngram_min must be at most speculative_ngram_max")
        return self

    @model_validator(mode="after")
    def tls_needs_both(self) -> Settings:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile go together: give both or neither")
        return self

    @model_validator(mode="after")
    def host_cache_needs_prefixes(self) -> Settings:
        if self.host_cache_memory and not self.enable_prefix_caching:
            raise ValueError("host_cache_memory is part of prefix caching, which is switched off")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlSettingsSource(settings_cls)


def _split(text: str) -> list[str]:
    text = text.strip()
    if text.startswith("["):
        import json

        values = json.loads(text)
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise ValueError("must be a JSON list of strings")
        return values
    return [part.strip() for part in text.split(",") if part.strip()]


def _lora_modules(value: Any) -> Iterator[str]:
    """Every adapter of what a flag, a variable or a file gave, as name=folder."""
    if isinstance(value, str):
        yield from _lora_modules_in(value.strip())
    elif isinstance(value, dict):
        if value.keys() & {"name", "path"}:
            yield _lora_module(value.get("name"), value.get("path"))
        else:
            for name, folder in value.items():
                yield _lora_module(name, folder)
    elif isinstance(value, list):
        for one in value:
            yield from _lora_modules(one)
    else:
        raise ValueError("must be name=folder")


def _lora_modules_in(text: str) -> Iterator[str]:
    """Of a command line whose flags were joined by commas, JSON among them."""
    while text:
        if text[0] in "[{":
            import json

            found, end = json.JSONDecoder().raw_decode(text)
            yield from _lora_modules(found)
        else:
            end = text.find(",") if "," in text else len(text)
            name, _, folder = text[:end].partition("=")
            yield _lora_module(name.strip(), folder.strip())
        text = text[end:].lstrip(", ")


def _lora_module(name: Any, folder: Any) -> str:
    if not isinstance(name, str) or not isinstance(folder, str) or not name or not folder:
        raise ValueError("must be name=folder")
    if not LORA_NAME.fullmatch(name):
        raise ValueError(f"{name!r:.80} is no name: up to 128 characters, no spaces, no =")
    return f"{name}={folder}"


def read_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from ``arguments`` (flags of ``pronk serve``), the environment and the file.

    Raises ``SettingsProblem`` with one readable line a mistake; ``--help`` exits by itself.
    """
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            Settings,
            cli_parse_args=arguments or [],
            cli_prog_name="pronk serve",
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_hide_none_type=True,
            cli_avoid_json=True,
            cli_exit_on_error=False,
        )
        settings = Settings(_cli_settings_source=source)  # type: ignore[call-arg]
    except ValidationError as error:
        raise SettingsProblem("\n".join(_explain(problem) for problem in error.errors())) from None
    except (SettingsError, ValueError) as error:
        raise SettingsProblem(str(error).removeprefix("error parsing CLI: ")) from None
    if not settings.api_key and any(
        one.partition("=")[0] == "--api-key" for one in arguments or []
    ):
        raise SettingsProblem(f"api-key: {NO_KEY}")
    if unknown := unknown_environment(dict(os.environ)):
        raise SettingsProblem(f"unknown setting in the environment: {', '.join(unknown)}")
    return settings


class SettingsProblem(ValueError):
    """A setting is unknown or out of bounds; the text says which and what would do."""


def _explain(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"]) or "settings"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, Settings.model_fields, n=1)
        return f"unknown setting {name}" + (f": did you mean {close[0]}?" if close else "")
    return f"{name.replace('_', '-')}: {problem['msg'].removeprefix('Value error, ')}"


def unknown_environment(environment: dict[str, str]) -> list[str]:
    """``PRONK_*`` variables no setting answers to: a typo there would otherwise be silent."""
    known = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(
        key for key in environment if key.startswith(ENVIRONMENT_PREFIX) and key not in known
    )
