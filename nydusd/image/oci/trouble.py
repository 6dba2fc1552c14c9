"""What a registry's failures are called: what happened, and what to try. Pure."""

from __future__ import annotations

import json
import re
import ssl

from urllib3 import exceptions

from nydusd.image.oci.reply import Reply

_CODE = re.compile(r"[A-Z][A-Z_]{1,40}")


def reason(error: exceptions.HTTPError) -> str:
    """Why there was no answer, or no whole one."""
    cause: BaseException = error
    if isinstance(error, exceptions.MaxRetryError) and error.reason is not None:
        cause = error.reason
    if isinstance(cause, exceptions.NameResolutionError):
        return "this host name is not known here: is it right, and does DNS work?"
    if isinstance(cause, exceptions.SSLError):
        inner = cause.args[0] if cause.args else None
        if isinstance(inner, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not trusted ({inner.verify_message}): $SSL_CERT_FILE may name another authority,"
                " --insecure checks nothing"
            )
        return "it does not speak TLS as we do: --plain-http is for registries without"
    if isinstance(cause, exceptions.NewConnectionError):
        happened = getattr(cause.__cause__, "strerror", None) or "no connection"
        return f"{happened.lower()}: does a registry listen there, and may it be reached from here?"
    if isinstance(cause, exceptions.TimeoutError):
        return "no answer in time: may it be reached from here?"
    if isinstance(cause, exceptions.ProtocolError):
        return "the connection ended in the middle: try again"
    return type(cause).__name__


def refusal(answer: Reply, host: str, *, push: bool, plain_http: bool) -> str:
    """What a status that is none of the good ones says: the number, the registry's own words for it, and what to try."""
    status = answer.status
    hint = ""
    if status == 400 and plain_http:
        hint = "it may want TLS: try without --plain-http"
    elif status == 401:
        hint = f"it takes no credentials that docker has for {host}, or has no such image: `docker login {host}`"
    elif status == 403:
        hint = f"whoever docker is logged in as at {host} may not {'write' if push else 'read'} this repository"
    elif status == 404:
        hint = "there is nothing of that name: are repository and tag right?"
    elif status == 429:
        hint = "too many requests: wait, or log in, which often allows more"
    elif status in (405, 501) and push:
        hint = "it takes no images"
    elif status >= 500:
        hint = "the registry itself has failed: try again later"
    codes = _codes(answer)
    return f"status {status}{f' ({codes})' if codes else ''}{f': {hint}' if hint else ''}"


def _codes(answer: Reply) -> str:
    """The registry's names for what is wrong, as the distribution API defines them; never its free text."""
    try:
        codes = [one["code"] for one in json.loads(answer.data)["errors"][:3]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return ", ".join(code for code in codes if isinstance(code, str) and _CODE.fullmatch(code))
