"""What the engine process is told at its start: a plain struct, JSON on its standard input."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

# Exit codes of an engine that cannot go on: a fresh one is the better hope.
BEYOND_USE, OUT_OF_MEMORY = 4, 5
SOCKET_FOLDER_PREFIX = "pronk-engine-"  # a folder of this name is removed with its socket


class EngineOptions(Struct, frozen=True):
    model: str  # a local folder or a .gguf file: hub ids are resolved before the engine starts
    socket: str  # path of the Unix socket the engine listens on
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    quantization: str = "auto"  # auto, none, int8, int4, fp8
    max_model_len: int | None = None  # None: the checkpoint's
    max_num_seqs: int | None = None  # None: 64 on a CPU, 256 on a GPU
    max_num_batched_tokens: int | None = None  # None: 512 on a CPU, 8192 on a GPU
    block_size: int = 256
    num_kv_blocks: int | None = None  # None: from memory
    kv_cache_memory: int | None = None  # bytes; None: from free memory
    kv_cache_dtype: str = "auto"  # auto, bfloat16, float16, float32, fp8, int8
    host_cache_memory: int = 0  # bytes for pages evicted from the KV cache; 0: none are kept
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    max_queued_requests: int = 1024  # sequences
    max_queued_tokens: int = 1_000_000
    scheduling_policy: Literal["fair", "fcfs"] = "fair"
    async_scheduling: bool | None = None  # None: on a GPU
    threads: int | None = None  # None: the cores this process may use
    cpus: tuple[int, ...] = ()  # what it is held to; none: the system decides
    attention_backend: str = "auto"
    speculative_model: str | None = None  # as ``model``: proposes tokens
    num_speculative_tokens: int = 0  # a sequence may have proposed at a time; 0: no speculation
    speculative_ngram_min: int = 2  # tokens prompt lookup compares
    speculative_ngram_max: int = 4
    compile: str = "auto"  # auto (on a GPU, where it is faster), on, off
    compile_cache: str | None = None  # None: under the user's cache folder
    max_loras: int = 0  # different adapters in one step; 0: none at all
    max_lora_rank: int = 16
    max_cpu_loras: int = 32  # adapters in memory
    adapters: dict[str, str] = {}  # name: folder, to be loaded at the start
    skip_bad_adapters: bool = False  # a restart: serve without what can no longer be read
    log_level: str = "info"
    log_format: str = "text"
    log_content: bool = False  # exceptions' own words may be logged
    parent: int | None = None  # process id to die with
    recorder: int | None = None  # file descriptor inherited, see flight_recorder
