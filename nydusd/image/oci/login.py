"""What a registry wants to see before it gives or takes an image. Runs in the process of the command and in its workers.

Credentials come from docker's configuration, as for the daemon. They are sent to the registry that they are for, or to the
token server that it names, if nobody can listen on the way there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from urllib.parse import urlencode, urlsplit

import urllib3

from nydusd.image.errors import ImageError
from nydusd.image.oci.names import ImageName
from nydusd.image.oci.reply import Reply, whole
from nydusd.image.oci.trouble import reason
from nydusd.storage.backend.registry.challenge import parse_challenges
from nydusd.storage.backend.registry.credentials import Credentials, CredentialSource

_LOG_IN = "log in with docker (or podman) first"


class Login:
    """The `header` (Authorization) for one repository; empty until the registry has asked for something."""

    def __init__(self, http: urllib3.PoolManager, name: ImageName, *, push: bool) -> None:
        self._http = http
        self._name = name
        self._own_scope = f"repository:{name.repo}:{'pull,push' if push else 'pull'}"
        self._source = CredentialSource(name.server, "")
        self.header = ""

    def take(self, challenges: str) -> None:
        """Do what the registry has asked for in WWW-Authenticate. Raises `ImageError`."""
        credentials = self._source.current()
        for challenge in parse_challenges(challenges):
            if challenge.scheme == "basic" and credentials.basic:
                self.header = f"Basic {credentials.basic}"
                return
            if challenge.scheme == "bearer" and challenge.params.get("realm"):
                self.header = f"Bearer {self._token(challenge.params, credentials)}"
                return
        raise ImageError(f"{self._name.text}: it wants credentials; {_LOG_IN}")

    def _scope(self, asked: str) -> str:
        """What the registry asks for, and nothing more: who may only read gets no token for more.

        A target is written to later: then both at once, or the token would change back and forth.
        """
        return self._own_scope if asked in ("", f"repository:{self._name.repo}:pull") else asked

    def _token(self, params: Mapping[str, str], credentials: Credentials) -> str:
        realm = params["realm"]
        try:
            parts = urlsplit(realm)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
        except ValueError:
            usable = False
        if not usable:
            raise ImageError(f"{self._name.server}: it names a token server by no usable URL")
        safe = parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
        form = {"service": params.get("service", ""), "scope": self._scope(params.get("scope", ""))}
        try:
            answer = self._ask(realm, form, credentials if safe else Credentials())
            found = json.loads(answer.data) if answer.status == 200 else {}
        except urllib3.exceptions.HTTPError as error:
            raise ImageError(f"{parts.netloc}: it gives no token: {reason(error)}") from error
        except (ValueError, RecursionError) as error:
            raise ImageError(f"{parts.netloc}: it gives no token: the answer is no JSON") from error
        token = found.get("token") or found.get("access_token") if isinstance(found, dict) else None
        if isinstance(token, str) and token.isascii() and token.isprintable():
            return token
        why = f"{parts.netloc}: it gives no token (status {answer.status}) for {form['scope']}"
        if not credentials:
            raise ImageError(f"{why}: docker has no credentials for {self._name.host}; {_LOG_IN}")
        if not safe:
            raise ImageError(f"{why}: it has no TLS, so that the credentials were not sent")
        raise ImageError(f"{why}: docker's credentials for {self._name.host} are not taken; {_LOG_IN}")

    def _ask(self, realm: str, form: dict[str, str], credentials: Credentials) -> Reply:
        """An identity token (of a login by a browser, or from a credential helper) is exchanged by POST."""
        if credentials.identity:
            fields = form | {"grant_type": "refresh_token", "client_id": "nydus-image"}
            body = urlencode(fields | {"refresh_token": credentials.identity})
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            return self._send("POST", realm, headers, body)
        headers = {"Authorization": f"Basic {credentials.basic}"} if credentials.basic else {}
        url = f"{realm}{'&' if urlsplit(realm).query else '?'}{urlencode(form)}"
        return self._send("GET", url, headers)

    def _send(self, method: str, url: str, headers: dict[str, str], body: str | None = None) -> Reply:
        return whole(self._http.request(method, url, headers=headers, body=body, preload_content=False, redirect=False))
