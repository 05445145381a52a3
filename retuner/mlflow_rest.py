"""MLflow's REST API in a few lines, for what must cost milliseconds (reads) or may never block (metrics).

Importing mlflow takes about two seconds and its client waits minutes for a server that is gone.
"""

import base64
import json
import os
from typing import Any

from retuner.errors import RetunerError, Unavailable

TRY_LATER = {408, 429}


class Denied(RetunerError):
    """The server wants credentials that only mlflow itself knows how to find."""


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def call(
    uri: str, method: str, endpoint: str, fields: dict[str, Any], timeout_seconds: float = 3.0
) -> tuple[int, dict[str, Any]]:
    """The HTTP status and JSON object that `endpoint` (e.g. `model-versions/get`) answers.

    Errors: Unavailable when no answer comes or the server fails (5xx); Denied on 401 and 403.
    """
    from urllib.parse import urlencode, urlsplit

    address = f"{without_credentials(uri).rstrip('/')}/api/2.0/mlflow/{endpoint}"
    body = None
    if method == "GET":
        address += "?" + urlencode(fields)
    else:
        body = json.dumps(fields).encode()
    status, text = _answer(address, method, body, _authorization(urlsplit(uri)), timeout_seconds)
    if status in (401, 403):
        raise Denied(f"MLflow at {without_credentials(uri)} answers {status} to {endpoint}")
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise Unavailable(
            f"{without_credentials(uri)} answers {endpoint} with status {status} and no JSON",
            "the REST API of an MLflow server",
            "check the tracking URI",
        )
    return status, parsed


def check_health(uri: str) -> None:
    """Errors: Unavailable when there is no MLflow server that answers within 3 seconds."""
    from urllib.parse import urlsplit

    address = f"{without_credentials(uri).rstrip('/')}/health"
    status, _ = _answer(address, "GET", None, _authorization(urlsplit(uri)), 3.0)
    if status == 404:
        raise Unavailable(
            f"{without_credentials(uri)} answers, but has no /health",
            "an MLflow server",
            "check RETUNER_TRACKING_URI or MLFLOW_TRACKING_URI",
        )


def without_credentials(uri: str) -> str:
    """The URI as it may be shown and stored: `user:password@` left out."""
    from urllib.parse import urlsplit, urlunsplit

    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _answer(
    address: str, method: str, body: bytes | None, authorization: str | None, timeout_seconds: float
) -> tuple[int, bytes]:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

    class SameHost(HTTPRedirectHandler):
        """Credentials are for the server that was asked, wherever it points."""

        def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> Any:
            new = super().redirect_request(req, fp, code, msg, headers, newurl)
            if new and (new.type, new.host) != (req.type, req.host):
                new.remove_header("Authorization")
            return new

    # S310: the callers have seen that the scheme is http or https.
    request = Request(address, body, {"Content-Type": "application/json"}, method=method)  # noqa: S310
    if authorization:
        request.add_header("Authorization", authorization)
    try:
        opener = build_opener(SameHost, HTTPSHandler(context=_tls(address)))
        with opener.open(request, timeout=timeout_seconds) as response:
            return response.status, response.read()
    except HTTPError as error:
        if error.code < 500 and error.code not in TRY_LATER:
            return error.code, error.read()
        reason = f"status {error.code}"
    except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = str(getattr(error, "reason", error)) or type(error).__name__
    shown = address.split("?")[0].split("/api/2.0/")[0].removesuffix("/health")
    raise Unavailable(
        f"MLflow at {shown} does not answer: {reason}",
        "a running MLflow server",
        "start it, or unset RETUNER_TRACKING_URI and MLFLOW_TRACKING_URI to keep runs in a local file",
    ) from None


def _authorization(parts: Any) -> str | None:
    """As mlflow's client finds it: the user and password of the environment, or of the URI; else the token."""
    from urllib.parse import unquote

    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or unquote(parts.username or "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or unquote(parts.password or "")
    if not (user and password):
        token = os.environ.get("MLFLOW_TRACKING_TOKEN")
        return f"Bearer {token}" if token else None
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _tls(address: str) -> Any:
    if not address.startswith("https://"):
        return None
    import ssl

    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true":
        return ssl._create_unverified_context()  # noqa: S323 - asked for, as of mlflow itself
    return ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
