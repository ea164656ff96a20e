"""A model's name to a local path: as it is, or downloaded from the Hugging Face hub by its id.

huggingface_hub is imported only for a hub id, and only the files that serve are fetched: never
Python code, never pickled .bin weights.
"""

from __future__ import annotations

import glob
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from model.checkpoint.errors import CheckpointError, some_names

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?::(?P<variant>[\w.-]+))?")
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_GGUF_PART = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")


@dataclass(frozen=True)
class Selection:
    """The files of a repository to fetch, and where among them the checkpoint is."""

    files: tuple[str, ...]
    checkpoint: str  # below the repository: "." or a folder or a file


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    offline: bool = False,
    token: str | None = None,
    progress: bool = True,
) -> Path:
    """The local folder or file of a model; downloads it if it is a hub id and not a local path.

    A hub id is "organisation/name"; ":variant" picks one of several GGUF files by a part of its
    name. ``token`` defaults to HF_TOKEN. ``offline`` takes what earlier downloads left.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path.absolute()  # not resolve(): the hub's cache links names to nameless blobs
    match = _HUB_ID.fullmatch(str(model))
    if match is None or not is_hub_id(str(model)):
        raise CheckpointError(
            f"{model}: no such file or folder (a hub id would be written organisation/name)"
        )
    hub = _Hub(match["repo"], match["variant"], revision, download_dir, token)
    return hub.cached() if offline else hub.download(progress)


def is_hub_id(model: str) -> bool:
    """Whether this is written like a hub id; whether it exists there only the hub can tell."""
    return bool(_HUB_ID.fullmatch(model)) and not model.endswith((".gguf", ".safetensors"))


def select(names: list[str], repo: str, variant: str | None) -> Selection:
    """Which files serve: safetensors first, then Meta's shards, then GGUF."""
    top = [name for name in names if "/" not in name]
    small = [name for name in top if name in _SMALL_FILES]
    safetensors = [
        name
        for name in top
        if name.endswith(".safetensors") and not name.startswith("consolidated")
    ]
    if variant is None and safetensors:
        return Selection((*small, *safetensors), ".")
    for folder in ("", "original/"):
        shards = re.compile(re.escape(folder) + r"consolidated\.\d+\.pth")
        if variant is None and any(map(shards.fullmatch, names)):
            wanted = [n for n in names if shards.fullmatch(n)] + [
                folder + name
                for name in ("params.json", "tokenizer.model")
                if folder + name in names
            ]
            return Selection(tuple(wanted), folder.rstrip("/") or ".")
    return _select_gguf(names, repo, variant)


def _select_gguf(names: list[str], repo: str, variant: str | None) -> Selection:
    ggufs = sorted(name for name in names if name.endswith(".gguf") and "mmproj" not in name)
    if not ggufs:
        what = "no GGUF files" if variant else "no safetensors, consolidated.*.pth or GGUF files"
        raise CheckpointError(f"{repo} on the hub holds {what}")
    fitting = [name for name in ggufs if variant is None or _is_variant(name, variant)]
    models = {_GGUF_PART.sub(r"\1", name) for name in fitting}
    if len(models) != 1:
        raise CheckpointError(
            f"{repo} holds {len(models)} GGUF models named like {variant or 'nothing'}: "
            f"write {repo}:VARIANT to pick one of {some_names(fitting or ggufs, 8)}"
        )
    return Selection(tuple(fitting), fitting[0])


def _is_variant(name: str, variant: str) -> bool:
    """Whether the name has the variant as a word: F16 is not in BF16, nor Q4_K in Q4_K_M."""
    return bool(re.search(rf"(^|[._/-]){re.escape(variant)}[./-]", name, re.IGNORECASE))


class _Hub:
    """One repository on the hub."""

    def __init__(
        self,
        repo: str,
        variant: str | None,
        revision: str | None,
        download_dir: str | Path | None,
        token: str | None,
    ) -> None:
        self.repo, self.variant, self.revision = repo, variant, revision
        self.download_dir, self.token = download_dir, token

    def download(self, progress: bool) -> Path:
        """Fetches what is not here yet; an unreachable hub falls back on earlier downloads."""
        from huggingface_hub import HfApi, errors
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        if not progress:
            disable_progress_bars()
        try:
            info = HfApi(token=self.token).model_info(self.repo, revision=self.revision)
            names = [file.rfilename for file in info.siblings or []]
            selection = select(names, self.repo, self.variant)
            patterns = [glob.escape(name) for name in selection.files]
            return self._snapshot(patterns, offline=False) / selection.checkpoint
        except CheckpointError:
            raise
        except errors.HfHubHTTPError as error:
            raise self._refused(error) from error
        except Exception as error:  # connection failures come as several libraries' classes
            return self._without_network(error)

    def cached(self) -> Path:
        """What an earlier download left, without touching the network."""
        try:
            folder = self._snapshot(list(_SMALL_FILES), offline=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.repo} is neither a local path nor in the download folder, "
                "and downloading is switched off"
            ) from error
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
        return folder / select(names, self.repo, self.variant).checkpoint

    def _snapshot(self, patterns: list[str], offline: bool) -> Path:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            self.repo,
            revision=self.revision,
            cache_dir=self.download_dir,
            token=self.token,
            allow_patterns=patterns,
            local_files_only=offline,
        )
        return Path(folder)

    def _without_network(self, error: Exception) -> Path:
        try:
            path = self.cached()
        except CheckpointError:
            raise CheckpointError(
                f"cannot download {self.repo}: {type(error).__name__}: {_first_line(error)}"
            ) from error
        log.warning("the hub cannot be reached; using the earlier download of %s", self.repo)
        return path

    def _refused(self, error: Exception) -> CheckpointError:
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return CheckpointError(
                f"{self.repo} is gated: accept its terms on its hub page, then set HF_TOKEN"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return CheckpointError(
                f"{self.repo} is neither a local path nor a model on the hub "
                "(a private one needs HF_TOKEN)"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return CheckpointError(f"{self.repo} has no revision {self.revision!r}")
        return CheckpointError(f"the hub refused {self.repo}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
