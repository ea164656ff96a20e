"""``POST /v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``: adapters that come and go.

Only where the operator named a folder to load from, only for callers with an admin key, and only
from below that folder: a client must not make the server read what it pleases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from service.api.body import read_body
from service.api.exchange import exchange_of
from service.api.ignored import ignored_headers
from service.api.openapi import documented
from service.api.schemas.adapters import LoadAdapterRequest, UnloadAdapterRequest
from service.api.server import Server, server_of
from service.errors import InvalidRequest, ModelNotFound, NotFound, PermissionDenied, PronkError
from service.registry import ServedAdapter, ServedModel, adapter_fingerprint
from service.settings import LORA_NAME

logger = logging.getLogger("pronk.api")

router = APIRouter()
FILES = ("adapter_config.json", "adapter_model.safetensors")


@router.post("/v1/load_lora_adapter", **documented(LoadAdapterRequest, None))
async def load_lora_adapter(request: Request) -> Response:
    """Serve one more LoRA adapter; 403 without `--lora-root` or an admin key."""
    server = server_of(request)
    root = may_change(request, server)
    fields = await read_body(request, LoadAdapterRequest)
    headers = ignored_headers(fields, server.settings.strict_params)
    async with server.adapters_lock:
        check_name(fields, server)
        folder = await asyncio.to_thread(find_folder, root, fields.lora_path)
        model = server.models.models[0]
        await load_everywhere(model, fields.lora_name, str(folder))
        own = await asyncio.to_thread(adapter_fingerprint, model, folder)
        model.adapters[fields.lora_name] = ServedAdapter(fields.lora_name, folder, own)
    logger.info("adapter %s is served", fields.lora_name)
    text = f"Success: LoRA adapter '{fields.lora_name}' added successfully."
    return PlainTextResponse(text, headers=headers)


@router.post("/v1/unload_lora_adapter", **documented(UnloadAdapterRequest, None))
async def unload_lora_adapter(request: Request) -> Response:
    """Serve an adapter no longer; what it answers now is finished."""
    server = server_of(request)
    may_change(request, server)
    fields = await read_body(request, UnloadAdapterRequest)
    headers = ignored_headers(fields, server.settings.strict_params)
    async with server.adapters_lock:
        model, adapter = server.models.find(fields.lora_name, None)
        if adapter is None:
            raise ModelNotFound(f"{fields.lora_name!r} is no adapter.", param="lora_name")
        del model.adapters[adapter.name]
        for engine in model.engines:
            await unload_quietly(engine.unload_adapter(adapter.name))
    logger.info("adapter %s is served no longer", adapter.name)
    text = f"Success: LoRA adapter '{adapter.name}' removed successfully."
    return PlainTextResponse(text, headers=headers)


def may_change(request: Request, server: Server) -> Path:
    """The folder adapters are loaded from. Raises ``PermissionDenied``."""
    server.require_admin(request)
    root = server.settings.lora_root
    if root is None:
        raise PermissionDenied(
            "This server changes its adapters for nobody; its operator allows it by --lora-root."
        )
    if not exchange_of(request.scope).caller.id:
        raise PermissionDenied(
            "Adapters are changed by callers with an admin key; this server has none."
        )
    return root


def check_name(fields: LoadAdapterRequest, server: Server) -> None:
    name = fields.lora_name
    if not LORA_NAME.fullmatch(name):
        raise InvalidRequest("lora_name: takes no spaces, = or ,", param="lora_name")
    served = {known for known, _ in server.models.names()}
    loaded = {adapter.name for adapter, _ in server.models.adapters()}
    if name in served or (name in loaded and not fields.load_inplace):
        raise InvalidRequest(
            f"lora_name: {name!r} is served already"
            + ("." if name in served else "; load_inplace replaces it."),
            param="lora_name",
        )


def find_folder(root: Path, path: str) -> Path:
    """Links are followed before it is asked where they lead: the folder and both of its files.

    Raises ``PermissionDenied`` for what lies outside, there or not, ``NotFound`` for what is not.
    """
    top = root.expanduser().resolve()
    try:
        folder = (top / path).resolve()
        places = [folder, *((folder / name).resolve() for name in FILES)]
        if not all(place.is_relative_to(top) for place in places):
            raise PermissionDenied(
                "lora_path: adapters are loaded from below the operator's folder only.",
                param="lora_path",
            )
        is_there = folder.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, links in a ring
        raise InvalidRequest("lora_path: is no path", param="lora_path") from None
    if not is_there:
        raise NotFound("lora_path: there is no such folder.", param="lora_path")
    return folder


async def load_everywhere(model: ServedModel, name: str, folder: str) -> None:
    """In every engine, or in none."""
    model.pick()  # raises where none is ready
    for number, engine in enumerate(model.engines):
        try:
            await engine.load_adapter(name, folder)
        except PronkError:
            for loaded in model.engines[:number]:
                await unload_quietly(loaded.unload_adapter(name))
            raise


async def unload_quietly(unloading: Coroutine[None, None, None]) -> None:
    """An engine that is gone or being started has nothing to unload."""
    try:
        await unloading
    except PronkError as error:
        logger.info("while an adapter was unloaded: %s", error.message)
