"""GET /docs: the one page for browsers, and so the one that says what they may do with it."""

from __future__ import annotations

import base64
import hashlib
import re

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

PATH = "/docs"
SCRIPTS = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/"
INLINE = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


async def docs(request: Request) -> Response:
    """Swagger's page over /openapi.json. The browser fetches its script, this server does not."""
    root = request.scope.get("root_path", "")
    page = get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title="pronk",
        swagger_js_url=f"{SCRIPTS}swagger-ui-bundle.js",
        swagger_css_url=f"{SCRIPTS}swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    return HTMLResponse(page.body, headers=_headers(bytes(page.body)))


def _headers(page: bytes) -> dict[str, str]:
    """Nothing runs in it but that script and its own, which is named by its hash."""
    digests = [hashlib.sha256(script).digest() for script in INLINE.findall(page)]
    own = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    policy = {
        "default-src": "'none'",
        "script-src": f"{SCRIPTS} {own}",
        "style-src": f"{SCRIPTS} 'unsafe-inline'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }
