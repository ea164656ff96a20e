"""The image, built and run for real: what is in it, who it runs as, how it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deploy import containers
from tests.running import wait_until

pytestmark = [
    pytest.mark.container,
    pytest.mark.skipif(containers.unavailable() is not None, reason=str(containers.unavailable())),
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the image is built; the image itself stays in the local store."""
    folder = tmp_path_factory.mktemp("image")
    containers.build_base(folder)
    containers.build_image(folder)
    return folder


@pytest.fixture(scope="module")
def served(scratch: Path) -> Iterator[tuple[str, str]]:
    with containers.container(scratch, "--memory", "3g") as (name, url):
        wait_until(lambda: ready(url), f"the container\n{containers.podman('logs', name)}")
        yield name, url


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def inspect() -> dict[str, object]:
    found: list[dict[str, dict[str, object]]] = json.loads(
        containers.podman("image", "inspect", containers.IMAGE)
    )
    return found[0]["Config"] | {
        "Healthcheck": found[0].get("HealthCheck") or found[0].get("Healthcheck")
    }


def test_the_image_says_how_it_runs(scratch: Path) -> None:
    config = inspect()
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert "/livez" in json.dumps(config["Healthcheck"])
    assert config["ExposedPorts"] == {"8000/tcp": {}}
    labels = config["Labels"]
    assert isinstance(labels, dict)
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_it_answers_with_a_read_only_root_and_no_capabilities(served: tuple[str, str]) -> None:
    _, url = served
    answer = httpx.post(
        f"{url}/v1/completions", json={"prompt": "Once", "max_tokens": 8}, timeout=60
    )
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] > 0


def test_the_health_check_of_the_image_passes(served: tuple[str, str]) -> None:
    name, _ = served
    check = inspect()["Healthcheck"]
    assert isinstance(check, dict)
    containers.podman("exec", name, *check["Test"][1:])


def test_the_server_is_process_one_and_drains_on_stop(scratch: Path) -> None:
    with containers.container(scratch) as (name, url):
        wait_until(lambda: ready(url), "the container")
        assert "pronk" in containers.podman("exec", name, "cat", "/proc/1/cmdline")
        containers.podman("stop", "--time", "30", name)
        state = json.loads(containers.podman("inspect", name))[0]["State"]
        assert state["ExitCode"] == 0


def test_the_compiled_kernels_are_in_the_image(served: tuple[str, str]) -> None:
    name, _ = served
    assert "not built" not in containers.podman("exec", name, "pronk", "doctor")


def test_nothing_is_left_that_a_server_does_not_need(served: tuple[str, str]) -> None:
    name, _ = served
    script = "import os, sys; print([path for path in sys.argv[1:] if os.path.exists(path)])"
    paths = ("/src", "/root/.cache/pip", "/opt/pronk/bin/pip", "/etc/pip.conf")
    found = containers.podman("exec", name, "python3", "-c", script, *paths).strip()
    assert found in ("[]", "['/etc/pip.conf']")  # an empty mount point may stay behind
