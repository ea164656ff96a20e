"""Build and run the Dockerfile without a Docker daemon or an image registry: buildah and podman.

The base image the Dockerfile asks for is made from Debian packages (debootstrap) under the same
name, so the Dockerfile is built unmodified. The machine's own pip settings and certificates are
mounted while building, so that an installation behind a proxy or a mirror works too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.running import ROOT, free_port

NEEDED = ("buildah", "podman", "runc", "debootstrap")
BASE = "docker.io/library/python:3.11-slim"
IMAGE = "localhost/pronk-test:latest"
CONF = """
[containers]
netns = "host"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def unavailable() -> str | None:
    """Why containers cannot be built here; None where they can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian packages of these names)"
    return None if os.geteuid() == 0 else "building images this way needs root"


def run(*command: str, folder: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, errors="replace"
    )
    assert done.returncode == 0, f"{' '.join(command[:4])} failed:\n{done.stderr[-3000:]}"
    return done.stdout


def build_base(scratch: Path) -> None:
    """Debian's Python under the name the Dockerfile's FROM asks for."""
    if (
        subprocess.run(["buildah", "inspect", BASE], capture_output=True, check=False).returncode
        == 0
    ):
        return
    root = scratch / "root"
    packages = "python3,python3-venv,ca-certificates,gcc,libc6-dev"
    run(
        "debootstrap",
        "--variant=minbase",
        f"--include={packages}",
        "bookworm",
        str(root),
        _mirror(),
    )
    for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        marker.unlink()
    shutil.rmtree(root / "var/cache/apt/archives", ignore_errors=True)
    container = run("buildah", "from", "scratch").strip()
    run("buildah", "add", "-q", container, str(root), "/")
    run("buildah", "commit", "-q", container, BASE)
    run("buildah", "rm", container)


def _mirror() -> str:
    """The Debian mirror this machine itself uses."""
    sources = [*Path("/etc/apt").glob("sources.list"), *Path("/etc/apt/sources.list.d").iterdir()]
    for source in sources:
        lines = source.read_text(errors="replace").splitlines()
        text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        if found := re.search(r"https?://\S+/debian(?=[\s/])", text):
            return found.group()
    raise AssertionError("no Debian mirror in apt's sources")


def build_image(scratch: Path) -> None:
    pip = scratch / "pip.conf"
    pip.write_text(_pip_settings())
    mounts = ["-v", f"{pip}:/etc/pip.conf:ro", "-v", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    for folder in _local_wheels():
        mounts += ["-v", f"{folder}:{folder}:ro"]
    options = ["--isolation", "chroot", "--pull-never", "--format", "docker"]
    run("buildah", "bud", *options, *mounts, "-t", IMAGE, ".", folder=ROOT)


def _pip_config() -> dict[str, str]:
    lines = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    pairs = (line.partition("=") for line in lines)
    return {key.rpartition(".")[2]: value.strip("'\"") for key, _, value in pairs}


def _local_wheels() -> list[str]:
    words = _pip_config().get("find-links", "").split()
    return [word for word in words if Path(word).is_dir()]


def _pip_settings() -> str:
    kept = ("index-url", "find-links", "cert", "default-timeout")
    values = _pip_config()
    lines = [f"{key} = {values[key]}" for key in kept if key in values]
    return "\n".join(["[global]", *lines]) + "\n"


def podman(*arguments: str) -> str:
    return run("podman", *arguments)


@contextmanager
def container(
    scratch: Path, *flags: str, command: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Run the image as the README says, on the host's network; gives its name and its address."""
    settings = scratch / "containers.conf"
    settings.write_text(CONF)
    os.environ["CONTAINERS_CONF"] = str(settings)
    port = free_port()
    name = f"pronk-test-{port}"
    flags = ("--read-only", "--tmpfs", "/tmp", "--cap-drop=all", "--pids-limit=512", *flags)
    flags = (*flags, "--env", f"PRONK_PORT={port}", "--no-healthcheck", "--pull=never")
    podman("run", "--detach", "--name", name, *flags, IMAGE, *command)
    try:
        yield name, f"http://127.0.0.1:{port}"
    finally:
        subprocess.run(["podman", "rm", "--force", name], capture_output=True, check=False)
