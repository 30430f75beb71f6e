#!/usr/bin/env python3
"""Sign in with ChatGPT the way OpenAI's Codex CLI does, from one file and nothing but Python.

    auth      sign in, obtain an API key, import the models for Code Puppy
    status    say who is signed in, until when, with which models
    models    list the account's models and import them again
    env       print shell code that exports the API key
    token     print an access token that is valid now
    logout    revoke the sign-in and remove what it left

`auth` shows the URL of an authorization request (RFC 6749 §4.1, with PKCE, RFC 7636) and waits
on the loopback interface (RFC 8252 §7.3) for the response; a pasted address and a device code
(RFC 8628) are two more ways to the same code.  The code is exchanged for tokens, which are on
disk before anything else is tried; then the ID token for an API key (RFC 8693), where the account
has an organization; and the models that the key or the ChatGPT plan pays for are written where
Code Puppy looks for them.

Afterwards everything asks one place, `Session.fresh`, for tokens.  It refreshes them under a lock
that all processes share, for OpenAI's refresh tokens are good for one use: of two programs that
refresh at the same moment one would be signed out.

The token file holds what its name says.  Whoever can read it can use the account; it is written
readable by its owner alone, and no command but `env` and `token` prints from it.

This is not OpenAI's software.  Licence: MIT.
"""

from __future__ import annotations

# What is heavier than these (HTTP, TLS, argparse, even base64) is imported where it is used: `env`,
# `token` and `status` run at every start of a shell and must not pay for it.
import contextlib
import errno
import json
import os
import re
import stat
import sys
import time

TYPE_CHECKING = False  # importing `typing` would cost each start some milliseconds
if TYPE_CHECKING:
    from argparse import Namespace
    from socket import socket as Socket  # noqa: N812 - a class in spite of its name
    from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional, Set, Tuple

    Fields = Dict[str, Any]  # a JSON object
    Notify = Callable[[str, str], None]  # hears a kind (see Terminal.notify) and a text

__version__ = "1.0.0"


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------

CHATGPT_OAUTH_CONFIG: Dict[str, Any] = {
    "issuer": "https://auth.openai.com",
    # The Codex CLI's client. It is public (RFC 6749 §2.1): it names the program and proves
    # nothing; what protects the sign-in is PKCE and the loopback redirect.
    "client_id": "app_EMoamEEZ73f0CkXaXp7hrann",
    "scope": "openid profile email offline_access",
    # OpenAI compares redirect URIs to the letter; these two ports are registered, no other.
    "redirect_host": "http://localhost",
    "redirect_path": "auth/callback",
    "required_port": 1455,
    "fallback_port": 1457,
    "callback_timeout": 120,  # seconds for the whole sign-in in the browser
    "api_base_url": "https://api.openai.com",
    "codex_base_url": "https://chatgpt.com/backend-api/codex",
    "codex_client_version": "0.169.0",  # the Codex backend lists models by it
    "home": None,  # $XDG_DATA_HOME/code_puppy, else ~/.code_puppy: Code Puppy's own rule
    "prefix": "chatgpt-",
    "default_context_length": 128000,  # tokens
    "model_patterns": "gpt-*,o1-*,o3-*",
    "model_excludes": "*-audio*,*-image*,*-realtime*,*-transcribe*,*-tts*",
    "model_source": "auto",
    "originator": "chatgpt_oauth",
    "request_timeout": 30,  # seconds for one whole request, the name look-up included
    "retry_window": 20,  # seconds in which another try of a refresh may start
    "lock_timeout": 60,  # seconds to wait for another process's refresh or sign-in
    "api_key_env_var": "CHATGPT_OAUTH_API_KEY",
}

SOURCES = ("auto", "api", "codex")
MODEL_ID = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
LOOPBACK = r"(?:localhost|127\.[0-9]+\.[0-9]+\.[0-9]+|\[::1\])"
# What a setting must be: a pattern (its group 1, where it has one, is what counts), how to say so,
# and for a number its type and bounds.
_URL = (
    rf"((?:https://[\w.-]+|https://\[[\w:.]+\]|http://{LOOPBACK})"
    r"(?::(?:[1-5]?[0-9]{1,4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
    r"(?:/[\w.~%/-]*?)?)/*",
    "an https URL (http is allowed for localhost only)",
)
_WORD = (r"[!-~]+", "printable ASCII characters without spaces")
_SECONDS = (
    r"[0-9]{1,9}(?:\.[0-9]{1,9})?",
    "a number of seconds from 0.001 to 86400",
    float,
    0.001,
    86400,
)
_PORT = (r"[0-9]{1,9}", "a number from 1 to 65535", int, 1, 65535)
_RULES: Fields = {
    "issuer": _URL,
    "client_id": _WORD,
    "scope": (r"[!-~][ -~]*", "a list of scopes separated by spaces"),
    "redirect_host": (r"http://(?:localhost|127\.0\.0\.1)", "http://localhost or http://127.0.0.1"),
    "redirect_path": (r"/?((?!success$)[\w.~-][\w.~/-]*)", "a path such as auth/callback"),
    "required_port": _PORT,
    "fallback_port": _PORT,
    "callback_timeout": _SECONDS,
    "api_base_url": _URL,
    "codex_base_url": _URL,
    "codex_client_version": (r"[\w.+-]{1,64}", "a version such as 0.169.0"),
    "home": (r"(?!~)[^\0]+", "a directory path (the default needs HOME to be set)"),
    "prefix": (MODEL_ID, "letters, digits and . _ : - (128 characters at most)"),
    "default_context_length": (r"[0-9]{1,9}", "a number from 1 to 1000000000", int, 1, 10**9),
    "model_patterns": (r"[!-~]+", "glob patterns separated by commas"),
    "model_excludes": (r"[!-~]*", "glob patterns separated by commas"),
    "model_source": ("|".join(SOURCES), "auto, api or codex"),
    "originator": _WORD,
    "request_timeout": _SECONDS,
    "retry_window": _SECONDS,
    "lock_timeout": _SECONDS,
    "api_key_env_var": (r"[A-Za-z_][A-Za-z0-9_]*", "a variable name (letters, digits and _)"),
}


def checked(name: str, value: object, rule: Tuple[Any, ...]) -> Any:
    """`value` as `rule` (one of _RULES) wants it. Raises UsageError naming `name`."""
    pattern, meaning, *number = rule
    found = re.fullmatch(pattern, str(value), re.ASCII)
    if found and not number:
        return found[found.lastindex or 0]
    if found and number[1] <= float(found[0]) <= number[2]:
        return number[0](found[0])
    raise UsageError(f"{name} must be {meaning}")


class Settings:
    """What one run goes by: CHATGPT_OAUTH_CONFIG, with the environment's variables over it.

    Every key of the configuration is an attribute; `environ` is the environment itself.
    Raises UsageError, naming the setting, for a value that cannot be meant.
    """

    if TYPE_CHECKING:

        def __getattr__(self, key: str) -> Any: ...

    def __init__(self, environ: Optional[Dict[str, str]] = None) -> None:
        self.environ = dict(os.environ) if environ is None else environ
        for key, rule in _RULES.items():
            name = "CHATGPT_OAUTH_" + key.upper()
            value = self.environ.get(name, CHATGPT_OAUTH_CONFIG.get(key))
            if key == "home":
                base = self.environ.get("XDG_DATA_HOME")
                usual = os.path.join(base, "code_puppy") if base else "~/.code_puppy"
                value = os.path.expanduser(usual if value is None else str(value))
            elif name not in self.environ:
                name = f'CHATGPT_OAUTH_CONFIG["{key}"]'
            vars(self)[key] = checked(name, value, rule)
        try:
            self.home = os.path.abspath(vars(self)["home"])
        except OSError:
            raise UsageError(
                "CHATGPT_OAUTH_HOME is a relative path and the current directory is gone"
            ) from None


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


def printable(text: str, limit: int = 2000) -> str:
    """`text` with whatever could steer a terminal replaced, and cut at `limit` characters.

    To str.isprintable(), control characters, escape sequences, bidirectional overrides and line
    breaks all are not; each becomes a question mark.
    """
    text = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else "?" for c in text)


class OAuthError(Exception):
    """Something that stops a command: one line that says what, `hint` the next step or None.

    `exit_code` is the command's, `reason` the server's error code that ended the sign-in,
    `untouched` whether the request that failed certainly had no effect, and `retry_after` the
    seconds for which the server asks to be left alone. No text ever holds a token, key or code.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        hint: Optional[str] = None,
        *,
        reason: str = "",
        untouched: bool = False,
        retry_after: Optional[float] = None,
    ) -> None:
        super().__init__(printable(message))
        self.hint = printable(hint) if hint else None
        self.reason, self.untouched, self.retry_after = reason, untouched, retry_after


class UsageError(OAuthError):
    """The command line or a setting is wrong."""

    exit_code = 2


class NotSignedInError(OAuthError):
    """There is no sign-in."""

    exit_code = 3


class SignInEndedError(OAuthError):
    """The sign-in cannot be continued; only a new one helps."""

    exit_code = 4


class UnavailableError(OAuthError):
    """Network, proxy, certificate or lock trouble; nothing is lost."""

    exit_code = 5


class StorageError(OAuthError):
    """A file cannot be read, is not what it should be, or cannot be written."""

    exit_code = 6


# ---------------------------------------------------------------------------------------------
# Wire: what is said to OpenAI's servers, and what is taken from their answers
# ---------------------------------------------------------------------------------------------

AGAIN = "to sign in again, run: chatgpt_oauth.py auth"
MEBIBYTE = 1 << 20
MODELS_LIMIT = 8 * MEBIBYTE  # bytes of a list of models, from a server or a file
POLL_FLOOR = 1.0  # seconds between two polls, whatever the server says
SLOW_DOWN = 5.0  # seconds more, when it says slow_down (RFC 8628 §3.5)
# The error codes with which OpenAI, or RFC 6749 §5.2, says that a refresh token is no more.
ENDING_CODES = {
    "refresh_token_reused": "its refresh token was used by another program",
    "refresh_token_expired": "it has expired",
    "refresh_token_invalidated": "it was revoked",
    "token_expired": "it has expired",
    "invalid_grant": "it has expired or was revoked",
}
_tls_contexts: List[Any] = []


def is_b64token(value: object) -> bool:
    """Whether `value` has the form of a bearer token (RFC 6750 §2.1): safe in headers, shells."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", value) is not None


def decode_claims(jwt: Optional[str]) -> Fields:
    """The claims of a JWT (RFC 7519 §3), or {} when it is none.

    The signature is not verified: the tokens came straight from the token endpoint over TLS,
    and the claims are used for display and for telling accounts apart, never as a proof.
    """
    import base64

    parts = (jwt or "").split(".")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "==")) if len(parts) == 3 else {}
    except (ValueError, RecursionError):
        claims = {}
    return claims if isinstance(claims, dict) else {}


def auth_claims(token: Optional[str]) -> Fields:
    """OpenAI's own claims in a token, or {}."""
    claims = decode_claims(token).get("https://api.openai.com/auth")
    return claims if isinstance(claims, dict) else {}


def text_or_none(value: object) -> Optional[str]:
    """`value` if it is a string with something in it, else None."""
    return value if isinstance(value, str) and value else None


class Answer:
    """A server's answer: its `status`, its `data` (parsed JSON or None), and its error.

    `code` and `text` are the error's code and description, made printable, with the secrets
    that were `sent` and whatever else looks like one taken out.
    """

    def __init__(self, sent: Set[str], status: int, body: bytes, retry_after: object) -> None:
        self.status = status
        self.html = body.lstrip()[:1] == b"<"
        self.retry_after = _delay(str(retry_after))
        try:
            self.data = json.loads(body)
        except (ValueError, RecursionError):
            self.data = None

        def public(value: object) -> str:
            text = value if isinstance(value, str) else ""
            for secret in sent:
                text = text.replace(secret, "[...]")
            return printable(re.sub(r"[A-Za-z0-9._~+/=%-]{32,}", "[...]", text), 200)

        # {"error": {"code", "message"}}, RFC 6749's pair, or the Codex backend's {"detail"}
        outer = self.data if isinstance(self.data, dict) else {}
        error = outer.get("error")
        inner = error if isinstance(error, dict) else {"code": error}
        self.code = public(inner.get("code") or inner.get("type"))
        self.text = public(
            inner.get("message") or outer.get("error_description") or outer.get("detail")
        )

    def refusal(self, what: str) -> OAuthError:
        """The error that tells a person why `what` came to nothing."""
        said = f"could not {what} (HTTP {self.status})"
        if self.status == 429 or self.status >= 500:
            busy = "too many requests" if self.status == 429 else "server error"
            return UnavailableError(
                f"{said}: {busy}",
                "try again later",
                untouched=self.status in (429, 503),
                retry_after=self.retry_after,
            )
        if self.html:
            return UnavailableError(
                f"{said}: got a web page instead of JSON, probably from a proxy, a bot check or "
                "a regional block",
                "check HTTPS_PROXY and your network, then try again",
            )
        if 300 <= self.status < 400:
            return OAuthError(f"{said}: unexpected redirect")
        return OAuthError(": ".join(part for part in (said, self.code, self.text) if part))

    def members(self, what: str) -> Fields:
        """The JSON object of a successful answer. Raises OAuthError for any other answer."""
        if not 200 <= self.status < 300 or self.html:
            raise self.refusal(what)
        if not isinstance(self.data, dict):
            raise OAuthError(f"could not {what}: the response is not a JSON object")
        return self.data


def _delay(header: str) -> Optional[float]:
    """Retry-After in seconds from now (RFC 9110 §10.2.3), None when absent or senseless."""
    from email.utils import parsedate_to_datetime

    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError, OSError):
        return max(0.0, parsedate_to_datetime(header[:40]).timestamp() - time.time())
    return float(header[:9]) if header.isdecimal() else None


def prepare_wire() -> Any:
    """Load what the first request needs, so that no one waits for it then: the TLS context."""
    import ssl
    import urllib.request  # noqa: F401

    if not _tls_contexts:
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # as Python 3.10 and later have it
        _tls_contexts.append(context)
    return _tls_contexts[0]


def _exchange(request: Any, timeout: float, limit: int, seen: Fields) -> None:
    """One HTTP exchange: into `seen` go the socket once the server is reached, then the outcome."""
    import http.client
    import urllib.request

    secure = request.type == "https"
    options = {"context": prepare_wire()} if secure else {}
    base: Any = http.client.HTTPSConnection if secure else http.client.HTTPConnection

    class Connection(base):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            if seen.setdefault("socket", self.sock) is not self.sock:
                raise TimeoutError  # nobody waits any more: a token must not be spent in vain

    class Handler(urllib.request.AbstractHTTPHandler):
        http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

        def http_open(self, request: Any) -> Any:
            return self.do_open(Connection, request, **options)

        https_open = http_open

    # Neither a redirect handler nor an error processor: a 307 would carry the code and the
    # verifier, or the refresh token, to wherever it points.
    opener = urllib.request.OpenerDirector()
    opener.add_handler(Handler())
    opener.add_handler(urllib.request.ProxyHandler({} if is_loopback(request.full_url) else None))
    try:
        with opener.open(request, timeout=timeout) as response:
            content = response.read(limit + 1)
            seen["answer"] = response.status, content, response.headers.get("Retry-After")
    except Exception as error:
        seen["error"] = getattr(error, "reason", error)


def is_loopback(url: str) -> bool:
    """Whether `url` leads to this machine by name or address."""
    return re.match(rf"https?://{LOOPBACK}(?:[:/]|$)", url) is not None


def request_json(
    settings: Settings,
    url: str,
    what: str,
    *,
    form: Optional[Dict[str, str]] = None,
    body: Optional[Dict[str, str]] = None,
    bearer: str = "",
    headers: Optional[Dict[str, str]] = None,
    timeout: float = float("inf"),
    limit: int = MEBIBYTE,
) -> Answer:
    """GET `url`, or POST `form` (form-encoded) or `body` (JSON) to it.

    `what` names the request in errors; the settings' request_timeout, or a shorter `timeout`,
    bounds the whole of it in seconds, from the name look-up to the answer's last byte; `limit` is
    the most bytes that are read. Returns an Answer whatever its status; raises UnavailableError
    when none came and OAuthError when it was too large.
    """
    import threading
    import urllib.parse
    import urllib.request

    timeout = min(timeout, settings.request_timeout)
    sent = {**(form or {}), **(body or {})}
    head = {"User-Agent": f"chatgpt_oauth/{__version__}", "Accept": "application/json"}
    if sent:
        head["Content-Type"] = f"application/{'x-www-form-urlencoded' if form else 'json'}"
    if bearer:
        head["Authorization"] = "Bearer " + bearer
    text = urllib.parse.urlencode(sent) if form else json.dumps(sent)
    request = urllib.request.Request(  # noqa: S310 - Settings admits http and https alone
        url, text.encode() if sent else None, {**head, **(headers or {})}
    )
    # A name look-up cannot be interrupted and a socket's timeout starts anew with each byte, so
    # the exchange has a thread of its own and the clock is watched from here.
    seen: Fields = {}
    thread = threading.Thread(target=_exchange, args=(request, timeout, limit, seen), daemon=True)
    thread.start()
    deadline = time.monotonic() + timeout
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(min(0.5, max(0.0, deadline - time.monotonic())))
    if "answer" not in seen:
        raise _no_answer(request, what, timeout, seen)
    if len(seen["answer"][1]) > limit:
        raise OAuthError(f"could not {what}: the response is too large")
    private = ("code", "code_verifier", "refresh_token", "subject_token", "token")
    secrets = {bearer, *(sent.get(name, "") for name in private)} - {""}
    return Answer(secrets, *seen["answer"])


def _no_answer(request: Any, what: str, timeout: float, seen: Fields) -> UnavailableError:
    """What to tell a person about a request without an answer, of which `seen` is known."""
    import socket
    import ssl
    import urllib.request

    error, host = seen.get("error"), request.host
    reached = seen.setdefault("socket", None)  # from here on nothing is sent that was not
    if error is None and reached:  # still under way: its thread ends with its socket
        with contextlib.suppress(OSError):
            reached.shutdown(socket.SHUT_RDWR)
    proxied = "https" in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
    hint = "check your network connection, then try again"
    if proxied and not is_loopback(request.full_url):
        hint = "check HTTPS_PROXY and your network connection, then try again"
    if error is None or isinstance(error, (TimeoutError, socket.timeout)):
        fault = f"no complete response from {host} within {timeout:g} seconds"
    elif isinstance(error, ssl.SSLError):
        why = getattr(error, "verify_message", "") or type(error).__name__
        fault = f"cannot set up a trusted TLS connection to {host} ({why})"
        hint = "if your network inspects TLS, set SSL_CERT_FILE to its CA certificate file"
    elif isinstance(error, socket.gaierror):
        fault = f"could not resolve host {host}"
    elif isinstance(error, OSError):
        fault = f"connection to {host} failed ({printable(error.strerror or str(error), 100)})"
    else:
        fault = f"{host} closed the connection or did not send valid HTTP ({type(error).__name__})"
    return UnavailableError(f"could not {what}: {fault}", hint, untouched=not reached)


def authorization_url(settings: Settings, redirect_uri: str, challenge: str, state: str) -> str:
    """The authorization request as an address for the browser (RFC 6749 §4.1.1, RFC 7636 §4.3)."""
    import urllib.parse

    parameters = {
        "response_type": "code",
        "client_id": settings.client_id,
        "redirect_uri": redirect_uri,
        "scope": settings.scope,
        "code_challenge": challenge,
        "code_challenge_method": "S256",
        "state": state,
        # OpenAI's own: organizations in the ID token, and its short consent page
        "id_token_add_organizations": "true",
        "codex_cli_simplified_flow": "true",
        "originator": settings.originator,
    }
    query = urllib.parse.urlencode(parameters, quote_via=urllib.parse.quote)
    return f"{settings.issuer}/oauth/authorize?{query}"


def _tokens_of(answer: Answer, what: str) -> Fields:
    """The members of a token endpoint's answer (RFC 6749 §5.1), its tokens checked."""
    members = answer.members(what)
    for name in ("access_token", "refresh_token", "id_token"):
        value = members.get(name)
        if not is_b64token(value) and (value is not None or name == "access_token"):
            raise OAuthError(f"could not {what}: the response has no valid {name}")
    return members


def exchange_code(settings: Settings, code: str, verifier: str, redirect_uri: str) -> Fields:
    """Redeem an authorization code (RFC 6749 §4.1.3, RFC 7636 §4.5); returns the tokens' answer."""
    form = {
        "grant_type": "authorization_code",
        "client_id": settings.client_id,
        "code": code,
        "redirect_uri": redirect_uri,
        "code_verifier": verifier,
    }
    url, what = settings.issuer + "/oauth/token", "exchange the authorization code"
    return _tokens_of(request_json(settings, url, what, form=form), what)


def exchange_id_token(settings: Settings, id_token: str) -> str:
    """Exchange an ID token for an API key (a token exchange, RFC 8693 §2.1, in OpenAI's dialect).

    Raises OAuthError when the account has none to give.
    """
    form = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "client_id": settings.client_id,
        "requested_token": "openai-api-key",  # noqa: S105 - the kind, not a key
        "subject_token": id_token,
        "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",  # noqa: S105
    }
    url, what = settings.issuer + "/oauth/token", "get an API key"
    key = str(_tokens_of(request_json(settings, url, what, form=form), what)["access_token"])
    if decode_claims(key):
        raise OAuthError(f"could not {what}: the response holds an access token instead")
    return key


def ended(reason: str) -> SignInEndedError:
    """The error of a sign-in whose refresh token was refused for `reason`."""
    why = ENDING_CODES.get(reason, ENDING_CODES["invalid_grant"])
    return SignInEndedError(f"your session has ended: {why}", AGAIN, reason=reason)


def refresh_grant(settings: Settings, tokens: Tokens) -> Fields:
    """Spend the refresh token (RFC 6749 §6) at the issuer that minted it; returns the answer.

    Raises SignInEndedError with one of ENDING_CODES as its reason; UnavailableError, whose
    `untouched` is true only if the refresh token is certainly unspent; or OAuthError.
    """
    form = {
        "grant_type": "refresh_token",
        "client_id": tokens.client_id,
        "refresh_token": tokens.refresh_token or "",
    }
    what = "refresh the access token"
    answer = request_json(settings, tokens.issuer + "/oauth/token", what, form=form)
    if 400 <= answer.status < 500 and answer.code in ENDING_CODES:
        raise ended(answer.code)
    try:
        return _tokens_of(answer, what)
    except OAuthError as error:
        if 400 <= answer.status < 500 and answer.data or isinstance(error, UnavailableError):
            raise
        raise UnavailableError(str(error)) from None


def revoke(settings: Settings, tokens: Tokens) -> None:
    """Revoke the refresh token, or without one the access token (RFC 7009 §2.1)."""
    body = {"token": tokens.access_token, "token_type_hint": "access_token"}
    if tokens.refresh_token:
        body = {
            "token": tokens.refresh_token,
            "token_type_hint": "refresh_token",
            "client_id": tokens.client_id,
        }
    url, what = (
        checked("the issuer", tokens.issuer, _URL) + "/oauth/revoke",
        "revoke the refresh token",
    )
    answer = request_json(settings, url, what, body=body, timeout=10.0)  # leave without delay
    if not 200 <= answer.status < 300:
        raise answer.refusal(what)


def request_user_code(settings: Settings) -> Fields:
    """Ask for a device code (RFC 8628 §3.1, in OpenAI's dialect).

    Returns `device_auth_id`, `user_code` and `interval` (seconds between polls).
    """
    url, what = settings.issuer + "/api/accounts/deviceauth/usercode", "get a device code"
    answer = request_json(settings, url, what, body={"client_id": settings.client_id})
    if answer.status == 404:
        raise OAuthError(
            "device code sign-in is turned off for this account",
            "turn it on in ChatGPT under Settings > Security (workspaces: ask an administrator), "
            "or sign in without --device",
        )
    members = answer.members(what)
    device: Fields = {
        "device_auth_id": text_or_none(members.get("device_auth_id")),
        "user_code": text_or_none(members.get("user_code") or members.get("usercode")),
        "interval": 5.0,
    }
    if not all(device.values()):
        raise OAuthError(f"could not {what}: the response has no code")
    with contextlib.suppress(UsageError):
        interval = checked("interval", members.get("interval"), (_SECONDS[0], "", float, 0, 900))
        device["interval"] = max(POLL_FLOOR, interval)
    return device


def poll_device_token(settings: Settings, device: Fields) -> Answer:
    """Ask once whether the person has entered the user code (RFC 8628 §3.4)."""
    url = settings.issuer + "/api/accounts/deviceauth/token"
    body = {name: device[name] for name in ("device_auth_id", "user_code")}
    return request_json(settings, url, "check the device code", body=body)


# ---------------------------------------------------------------------------------------------
# Store: two files, and the lock under which they change
# ---------------------------------------------------------------------------------------------

REREAD_SECONDS = 0.5  # Code Puppy's own plugin writes in place: a torn file may be whole soon
RESERVE = 16384  # bytes beyond the present content that a refreshed token file may need
SECRET_KEYS = ("access_token", "refresh_token", "id_token", "api_key")


def timestamp(moment: float) -> str:
    """`moment`, in seconds since 1970, as UTC in ISO 8601 with a Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def parse_timestamp(value: object) -> Optional[float]:
    """Seconds since 1970 of an ISO 8601 time (UTC where it names no zone), else None."""
    from datetime import datetime, timezone

    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    return None


class Tokens:
    """A sign-in as the token file holds it; `fields` keeps every key, known or not.

    Raises ValueError, naming the key, when a token or key is no RFC 6750 b64token.
    """

    access_token: str
    refresh_token: Optional[str]
    id_token: Optional[str]
    api_key: Optional[str]

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        for name in SECRET_KEYS:
            value = fields.get(name) or None
            if value is not None and not is_b64token(value):
                raise ValueError(f"{name} is not a valid token")
            setattr(self, name, value)
        # Code Puppy's own plugin stores the access token as `api_key`, and leaves it there when
        # it refreshes: a JWT in that place is an old access token.
        if self.api_key == self.access_token or decode_claims(self.api_key):
            self.api_key = None
        account = fields.get("account_id") or self.auth_claims().get("chatgpt_account_id")
        self.account_id = account if is_b64token(account) else None
        issuer, client_id = (
            text_or_none(fields.get(name)) or CHATGPT_OAUTH_CONFIG[name]
            for name in ("issuer", "client_id")
        )
        self.issuer, self.client_id = issuer.rstrip("/"), printable(client_id)
        self.owner = self.issuer, self.account_id or self.access_token  # of one account: equal

    def auth_claims(self) -> Fields:
        """OpenAI's own claims, from the ID token or the access token."""
        return auth_claims(self.id_token) or auth_claims(self.access_token)

    def expires_at(self) -> Optional[float]:
        """When the access token expires, in seconds since 1970; None when nothing tells."""
        expiry = decode_claims(self.access_token).get("exp")
        if isinstance(expiry, (int, float)) and 0 < expiry < 1e11:
            return float(expiry)
        expiry = parse_timestamp(self.fields.get("expires_at"))
        refreshed = parse_timestamp(self.fields.get("last_refresh"))
        # A token without dates is renewed eight days after its refresh.
        return refreshed + 8 * 86400 if expiry is None and refreshed is not None else expiry

    def outlives(self, seconds: float, unknown: bool) -> bool:
        """Whether the access token has more than `seconds` left; `unknown` when nothing tells."""
        expiry = self.expires_at()
        return unknown if expiry is None else expiry - time.time() > seconds

    def fingerprint(self) -> str:
        """The SHA-256 of the refresh token, in hexadecimal."""
        import hashlib

        return hashlib.sha256((self.refresh_token or "").encode()).hexdigest()


@contextlib.contextmanager
def replacing(path: str, reserve: bytes = b"") -> Iterator[Callable[[Fields], None]]:
    """A function that puts its argument, as JSON, durably in place of the file: all or nothing.

    The new file is readable by its owner alone from the first byte, in the same folder, and
    never chmod-ed. With `reserve` it has been written once before it is needed, so that a full
    disk shows itself while there is nothing to lose. The caller holds the lock, so a temporary
    file that is there already was left by a killed process. Raises StorageError.
    """
    path = os.path.realpath(path)  # a symbolic link stays one
    temporary = path + ".tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(temporary, flags, 0o600), "r+b") as file:
            _belongs_to(file.fileno(), path)

            def commit(value: Fields) -> None:
                _overwrite(file, encode(value))
                file.close()
                try:
                    _replace(temporary, path)
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                    # A container's mount of the file itself: it can only be written in place.
                    with os.fdopen(os.open(path, os.O_RDWR), "r+b") as mounted:
                        _overwrite(mounted, encode(value))

            _overwrite(file, reserve)
            yield commit
    except OSError as error:
        hint = "check the free space and the permissions, then try again"
        raise StorageError(f"cannot write {path}: {error.strerror}", hint) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def encode(value: Fields) -> bytes:
    """`value` as the JSON of our files."""
    try:
        return json.dumps(value, indent=2).encode() + b"\n"
    except RecursionError:
        raise StorageError(
            "the file holds another program's entry that is nested too deeply to keep"
        ) from None


def _overwrite(file: Any, data: bytes) -> None:
    file.seek(0)
    file.write(data)
    file.truncate()  # flushes, too
    os.fsync(file.fileno())


def _belongs_to(descriptor: int, path: str) -> None:
    """Give a new file of root's to the owner of `path`, or of its folder where there is none.

    Root in a container must not lock out the owner of the home that is mounted there.
    """
    if sys.platform != "win32" and os.geteuid() == 0:
        owner = os.stat(path if os.path.exists(path) else os.path.dirname(path))
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _replace(source: str, target: str) -> None:
    """Rename durably. All that Windows needs otherwise stands here and in `_try_lock`."""
    deadline = time.monotonic() + 5.0
    while sys.platform == "win32" and time.monotonic() < deadline:
        with contextlib.suppress(PermissionError):  # a reader or a virus scanner may hold it open
            return os.replace(source, target)
        time.sleep(0.05)
    os.replace(source, target)
    if sys.platform != "win32":
        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems cannot; it is renamed
            os.fsync(folder)
        os.close(folder)
    return None


def _try_lock(descriptor: int) -> bool:
    """Take the exclusive lock if it is free; the system releases it when the file is closed."""
    with contextlib.suppress(BlockingIOError, PermissionError):
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


class Store:
    """The token file and the models file in `home`. Every method may raise StorageError."""

    def __init__(self, settings: Settings, notify: Notify) -> None:
        self.settings, self.notify = settings, notify
        self.token_file = os.path.join(settings.home, "chatgpt_oauth.json")
        self.models_file = os.path.join(settings.home, "chatgpt_models.json")
        leftover = os.path.realpath(self.token_file) + ".tmp"
        if os.path.lexists(leftover):
            # Of a killed process, unless somebody else is writing it now and so holds the lock.
            with contextlib.suppress(OAuthError, OSError), self.lock(timeout=0):
                os.unlink(leftover)

    def prepare(self) -> None:
        """Make sure that tokens can be stored, before anybody goes to fetch them."""
        with self.lock(), replacing(self.token_file, bytes(RESERVE)):
            pass

    def load_tokens(self) -> Optional[Tokens]:
        """The stored sign-in, None when there is none."""
        fields = self.read(self.token_file)
        try:
            return Tokens(fields) if fields.get("access_token") else None
        except ValueError as error:
            raise self._broken(self.token_file, str(error)) from None

    def _broken(self, path: str, fault: str) -> StorageError:
        hint = (
            "to start over, run: chatgpt_oauth.py auth (the file is kept as chatgpt_oauth.json.bad)"
        )
        if path == self.models_file:
            hint = "fix or delete the file, then try again"
        return StorageError(f"{path}: {fault}", hint)

    def read(self, path: str) -> Fields:
        """The JSON object in the file at `path`, {} where there is no file."""
        deadline = time.monotonic() + REREAD_SECONDS
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # or a FIFO would keep us waiting
        while True:
            try:
                with os.fdopen(os.open(path, flags), "rb") as file:
                    self._admit(path, file.fileno())
                    value = json.loads(file.read(MODELS_LIMIT))
                if isinstance(value, dict):
                    return value
                raise self._broken(path, "not a JSON object")
            except FileNotFoundError:
                return {}
            except OSError as error:
                raise self._broken(path, f"cannot read: {error.strerror}") from None
            except (ValueError, RecursionError):
                if time.monotonic() > deadline:
                    raise self._broken(path, "not valid JSON") from None
                time.sleep(0.05)

    def _admit(self, path: str, descriptor: int) -> None:
        """Refuse what is no plain file of ours; take others' access to the tokens away."""
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise self._broken(path, "not a regular file")
        limit = MEBIBYTE if path == self.token_file else MODELS_LIMIT
        if facts.st_size > limit:
            raise self._broken(path, f"larger than {limit // MEBIBYTE} MiB")
        private = path == self.token_file and sys.platform != "win32"
        if private and facts.st_uid != os.geteuid() != 0:
            raise self._broken(path, f"owned by another user (uid {facts.st_uid})")
        if private and facts.st_mode & 0o077:
            # Where a chmod is refused or changes nothing, as on some mounts, be silent.
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, 0o600)
                if not os.fstat(descriptor).st_mode & 0o077:
                    self.notify("warning", f"{path} was readable by other users; changed to 0600")

    @contextlib.contextmanager
    def lock(self, timeout: Optional[float] = None) -> Iterator[None]:
        """Hold the lock that whoever writes in `home` holds, waiting `timeout` seconds at most.

        Raises UnavailableError when somebody else has it all that time.
        """
        deadline = time.monotonic() + (self.settings.lock_timeout if timeout is None else timeout)
        path = os.path.realpath(self.token_file) + ".lock"
        with contextlib.ExitStack() as stack:
            try:
                os.makedirs(self.settings.home, mode=0o700, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                stack.callback(os.close, descriptor)
                _belongs_to(descriptor, os.path.dirname(path))
                while not _try_lock(descriptor):
                    if time.monotonic() >= deadline:
                        raise UnavailableError(
                            f"timed out waiting for another process to release {path}",
                            "try again; if it keeps happening, stop the process that has this file open",
                        )
                    time.sleep(0.01)
            except OSError as error:
                hint = "make the directory writable, or set CHATGPT_OAUTH_HOME to another one"
                raise StorageError(f"cannot lock {path}: {error.strerror}", hint) from None
            yield

    def save(self, path: str, value: Fields) -> None:
        """Put `value` into the file at `path`. The caller holds the lock."""
        with replacing(path) as commit:
            commit(value)

    def move_away(self, target: Optional[str]) -> None:
        """Rename the token file to `target`, or with None remove it. The caller holds the lock."""
        path = os.path.realpath(self.token_file)
        try:
            if target:
                return os.replace(path, target)
            for name in (self.token_file, path, path + ".tmp", path + ".bad"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
        except OSError as error:
            hint = "remove it yourself, then try again"
            raise StorageError(f"cannot remove {path}: {error.strerror}", hint) from None


# ---------------------------------------------------------------------------------------------
# Session: the one place that decides to refresh
# ---------------------------------------------------------------------------------------------

RETRY_PAUSE = 0.5  # seconds before the second try of a refresh; doubled for each further one
REFRESH_MARGIN = 300  # seconds an access token must still be valid to be handed out as it is


def to_log(kind: str, text: str) -> None:
    """Tell users of the module, through the logger `chatgpt_oauth`."""
    import logging

    # An address that must be visited is a warning too, or Python's default would hide it.
    level = logging.WARNING if kind in ("warning", "verbatim") else logging.DEBUG
    logging.getLogger("chatgpt_oauth").log(level, "%s", printable(text))


class Session:
    """The stored sign-in, kept fresh. `notify(kind, text)` hears what a person should know."""

    def __init__(self, settings: Optional[Settings] = None, notify: Notify = to_log) -> None:
        self.settings, self.notify = settings or Settings(), notify
        self.store = Store(self.settings, self.notify)

    def tokens(self) -> Tokens:
        """The stored tokens as they are. Raises NotSignedInError."""
        tokens = self.store.load_tokens()
        if tokens is None:
            raise NotSignedInError(
                "not signed in to ChatGPT", "to sign in, run: chatgpt_oauth.py auth"
            )
        return tokens

    def fresh(self, force: bool = False) -> Tokens:
        """Tokens whose access token is good for REFRESH_MARGIN seconds (`force`: a new one).

        A failed refresh is a warning while the access token has not expired, unless forced.
        """
        seen = self.tokens()
        if not force and seen.outlives(REFRESH_MARGIN, unknown=False):
            return seen
        usable = not force and seen.outlives(0, unknown=True)
        try:
            with self.store.lock():
                tokens = self.tokens()
                waited = tokens.access_token != seen.access_token
                if (waited or not force) and tokens.outlives(REFRESH_MARGIN, unknown=False):
                    return tokens  # somebody else fetched it while we waited
                self.require_renewable(tokens)
                # The refresh token is good for one use: have a place for its successor first.
                reserve = encode(tokens.fields) + bytes(RESERVE)
                with replacing(self.store.token_file, reserve) as commit:
                    return self._renew(tokens, commit, patient=not usable)
        except OAuthError as error:
            if not usable or isinstance(error, NotSignedInError):
                raise
            self.notify("warning", f"{error}; using the current one, which is still valid")
            return seen

    def require_renewable(self, tokens: Tokens) -> None:
        """Raise SignInEndedError if the next refresh will fail without asking anybody."""
        mark = tokens.fields.get("ended")
        if isinstance(mark, dict) and mark.get("refresh_token_sha256") == tokens.fingerprint():
            raise ended(str(mark.get("reason")))
        if tokens.issuer != self.settings.issuer:
            raise SignInEndedError(
                f"the stored tokens come from another issuer, {tokens.issuer}", AGAIN
            )
        if not tokens.refresh_token:
            raise SignInEndedError(
                "cannot refresh the access token: there is no refresh token", AGAIN
            )

    def _renew(self, spent: Tokens, commit: Callable[..., None], patient: bool) -> Tokens:
        """Refresh, and try again (if `patient`) while the refresh token is certainly unspent."""
        deadline = time.monotonic() + self.settings.retry_window
        pause = RETRY_PAUSE
        while True:
            try:
                with signals_deferred():  # none may come between the answer and the disk
                    return self._spend(spent, commit)
            except UnavailableError as error:
                if not error.untouched:
                    raise UnavailableError(
                        f"{error}; you may have to sign in again",
                        "try again; if that fails, run: chatgpt_oauth.py auth",
                    ) from None
                wait = pause if error.retry_after is None else error.retry_after
                if not patient or time.monotonic() + wait > deadline:
                    raise
            time.sleep(wait)
            pause = min(pause * 2, 4.0)

    def _spend(self, spent: Tokens, commit: Callable[..., None]) -> Tokens:
        """One try: store what came, unless the file changed hands meanwhile."""
        ending: Optional[OAuthError] = None
        try:
            answer = refresh_grant(self.settings, spent)
        except SignInEndedError as error:
            answer, ending = {}, error
        try:
            current = self.tokens()
        except StorageError:
            current = spent  # torn by somebody who writes in place; what we got must not be lost
        if current.refresh_token != spent.refresh_token:
            if current.outlives(0, unknown=True):
                return current
            raise ending or OAuthError("another process changed the stored tokens", "try again")
        if ending:
            mark = {"reason": ending.reason, "refresh_token_sha256": spent.fingerprint()}
            commit({**current.fields, "ended": mark})
            raise ending
        for token in (answer["access_token"], answer.get("id_token")):
            account = auth_claims(token).get("chatgpt_account_id")
            if account and spent.account_id and account != spent.account_id:
                raise OAuthError(
                    "could not refresh the access token: the response is for another account"
                )
        fields = merged(current.fields, answer)
        if fields.get("api_key") == current.access_token:
            fields["api_key"] = answer["access_token"]  # no API key: see Tokens
        commit(fields)
        return Tokens(fields)


def merged(fields: Fields, answer: Fields) -> Fields:
    """`fields` with what a token endpoint answered; what it omits stays as it was."""
    kept = {k: value for k, value in fields.items() if k not in ("expires_at", "ended")}
    came = {k: answer[k] for k in ("access_token", "refresh_token", "id_token") if answer.get(k)}
    lifetime = answer.get("expires_in")
    if isinstance(lifetime, (int, float)) and 0 < lifetime < 1e9:
        came["expires_at"] = timestamp(time.time() + lifetime)
    return {**kept, **came, "last_refresh": timestamp(time.time())}


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP until the block is done; a second one acts at once."""
    import signal

    before: Dict[int, Any] = {}
    held: List[int] = []

    def hold(number: int, _: object) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        held.append(number)

    with contextlib.suppress(ValueError):  # only the main thread is asked and may choose
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, hold)
    try:
        yield
    finally:
        hold(0, None)
        if held[0]:
            signal.raise_signal(held[0])


def get_access_token(*, refresh: bool = False) -> str:
    """An access token that is valid now, renewed first when due (`refresh`: in any case).

    Raises OAuthError: NotSignedInError, SignInEndedError, UnavailableError or StorageError.
    """
    return Session().fresh(refresh).access_token


def get_api_key() -> Optional[str]:
    """The stored API key, None when the account has none. Raises NotSignedInError, StorageError."""
    return Session().tokens().api_key


# ---------------------------------------------------------------------------------------------
# Callback: the loopback listener; it yields an authorization response and knows no tokens
# ---------------------------------------------------------------------------------------------

MAX_CONNECTIONS = 64  # that have not sent a whole request yet
HEAD_TIMEOUT = 10.0  # seconds for a request line and its headers
HEAD_LIMIT = 65536  # bytes of them that are looked at; other local sites' cookies come last
LINGER = 5.0  # seconds for the browser to fetch the success page
STYLE = (
    ":root{color-scheme:light dark}"
    "body{margin:0;min-height:100vh;display:grid;place-items:center;background:#f6f7f8;"
    "color:#1b1f24;font:1.0625rem/1.5 system-ui,sans-serif}"
    "main{box-sizing:border-box;width:min(100vw - 2rem,28rem);padding:2.5rem 2rem;"
    "background:#fff;border:1px solid #dfe3e8;border-radius:1rem;text-align:center;"
    "overflow-wrap:anywhere}"
    "b{display:grid;place-items:center;width:3.5rem;height:3.5rem;margin:0 auto 1.25rem;"
    "border-radius:50%;font-size:1.75rem;background:#0a7d5c;color:#fff}"
    "b.no{background:#b3261e}b.note{background:#5b6470}"
    "h1{font-size:1.5rem;line-height:1.25;margin:0 0 .75rem}p{margin:0 0 .75rem}"
    "small{display:block;margin-top:1.75rem;color:#5b6470}"
    "@media(prefers-color-scheme:dark){body{background:#0e1116;color:#e8eaed}"
    "main{background:#171b22;border-color:#2d333d}small{color:#9aa4b2}}"
)


def render_page(title: str, *paragraphs: str, kind: str = "no") -> bytes:
    """A self-contained page (`kind`: yes, no or note); everything in it is escaped here."""
    import html

    mark = {"yes": "&#10003;", "no": "&#10005;", "note": "i"}[kind]
    text = "".join(f"<p>{html.escape(printable(line))}</p>" for line in paragraphs)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title} - chatgpt_oauth</title><style>{STYLE}</style>"
        f'<main><b class="{kind}" aria-hidden="true">{mark}</b><h1>{title}</h1>{text}'
        "<small>chatgpt_oauth on this computer</small></main></html>"
    ).encode()


class Attempt:
    """One authorization request: its URL, and what its response is checked against."""

    def __init__(self, settings: Settings, port: int) -> None:
        import hashlib
        import secrets
        from base64 import urlsafe_b64encode

        # RFC 6749 §10.12: the state ties the response to this request. RFC 7636 §4.1 and §4.2.
        self.state = secrets.token_urlsafe(32)
        self.verifier = secrets.token_urlsafe(64)
        digest = hashlib.sha256(self.verifier.encode()).digest()
        challenge = urlsafe_b64encode(digest).rstrip(b"=").decode()
        self.port = port
        self.path = "/" + settings.redirect_path
        self.redirect_uri = f"{settings.redirect_host}:{port}{self.path}"
        self.url = authorization_url(settings, self.redirect_uri, challenge, self.state)

    def response(self, query: str) -> Dict[str, str]:
        """The authorization response (RFC 6749 §4.1.2) in `query`, the state compared first.

        Raises ValueError for what is not the answer to this request.
        """
        import hmac
        import urllib.parse

        fields = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=50)
        single = {name: values[0] for name, values in fields.items() if len(values) == 1}
        state = single.get("state", "").encode("utf-8", "replace")
        if not hmac.compare_digest(state, self.state.encode()):
            raise ValueError("it belongs to a different sign-in")
        if "error" not in single and not re.fullmatch("[!-~]{1,4096}", single.get("code", "")):
            raise ValueError("it has no authorization code")
        return single

    def pasted(self, line: str) -> Dict[str, str]:
        """The authorization response in a pasted address. Raises ValueError as `response` does."""
        address, _, query = line.strip().partition("?")
        if not query:
            raise ValueError("it is not complete; copy all of it from the address bar")
        address = address if "://" in address else "http://" + address
        if not is_loopback(address) or not address.endswith(self.path):
            raise ValueError(f"it must start with {self.redirect_uri}?code=")
        return self.response(query.partition("#")[0])


def bind_loopback(port: int) -> List[Socket]:
    """Listen on `port` of 127.0.0.1 and, where there is one, of ::1 (RFC 8252 §7.3 and §8.3).

    Raises OSError when either is taken: the browser's `localhost` could reach the other program.
    """
    import socket

    bound: List[Socket] = []
    # Past connections in TIME_WAIT must not count; a listener does, on Windows too.
    option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            bound.append(socket.socket(family, socket.SOCK_STREAM))
            bound[-1].setsockopt(socket.SOL_SOCKET, option, 1)
            bound[-1].bind((address, port))
            bound[-1].listen(128)
        except OSError as error:
            no_ipv6 = error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
            kept = bound[:1] if family == socket.AF_INET6 and no_ipv6 else []
            for each in bound[len(kept) :]:
                each.close()
            if not kept:
                raise
            return kept
    return bound


class Listener:
    """Serves the redirect URI until one authorization response has come, and tells its verdict.

    The response goes to the queue `events`; the browser that brought it waits for `settle`.
    Nothing ends the waiting but a response that carries the attempt's state. One thread a
    connection; closing is the caller's.
    """

    def __init__(self, sockets: List[Socket], attempt: Attempt, events: Any) -> None:
        import threading

        self.sockets, self.attempt, self.events = sockets, attempt, events
        self.guard = threading.Lock()
        self.incomplete: List[Socket] = []  # in the order in which they came
        self.claimed = self.closed = False
        self.verdict: Tuple[int, bytes] = (
            400,
            render_page("Sign-in stopped", "Return to your terminal and start again."),
        )
        self.settled, self.delivered = threading.Event(), threading.Event()
        for listening in sockets:
            threading.Thread(target=self._accept, args=(listening,), daemon=True).start()

    def settle(self, error: Optional[OAuthError] = None) -> None:
        """Tell the waiting browser: success, or what failed and what to do."""
        self.verdict = 303, b""
        if error:
            text, hint = str(error), error.hint or ""
            if not hint or "chatgpt_oauth.py" in hint:  # the terminal says it as it is typed there
                hint = "return to your terminal and try again"
            lines = (f"{line[:1].upper()}{line[1:]}." for line in (text, hint))
            self.verdict = 400, render_page("Sign-in failed", *lines)
        self.settled.set()
        if error and self.claimed:
            self.delivered.wait(2.0)

    def close(self) -> None:
        """Free the port at once."""
        import socket

        self.closed = True
        self.settled.set()
        with self.guard:
            for each in (*self.sockets, *self.incomplete):
                # A thread that waits in accept() or recv() would keep a closed socket alive.
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for listening in self.sockets:
            listening.close()

    def _accept(self, listening: Socket) -> None:
        import socket
        import threading

        while not self.closed:
            try:
                connection = listening.accept()[0]
                with self.guard:
                    self.incomplete.append(connection)
                    threading.Thread(target=_serve, args=(self, connection), daemon=True).start()
                    if len(self.incomplete) > MAX_CONNECTIONS:
                        self.incomplete.pop(0).shutdown(socket.SHUT_RDWR)
            except OSError:
                time.sleep(0.01)  # closed, a client that went away, or no free descriptor

    def read_head(self, connection: Socket) -> bytes:
        """The beginning of a request, b"" when its head does not come to an end in time."""
        head = tail = b""
        deadline = time.monotonic() + HEAD_TIMEOUT
        try:
            while b"\n\r\n" not in tail and b"\n\n" not in tail:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                part = connection.recv(16384)
                if not part:
                    return b""
                tail = tail[-2:] + part
                head = (head + part)[:HEAD_LIMIT]
            connection.settimeout(HEAD_TIMEOUT)
            return head
        finally:
            with self.guard, contextlib.suppress(ValueError):  # as one of too many it is gone
                self.incomplete.remove(connection)

    def respond(self, target: str, hosts: List[str]) -> Tuple[int, bytes]:
        """Status and page for a GET of `target`, blocking while a true response is redeemed."""
        path, _, query = target.partition("?")
        own = [f"{name}:{self.attempt.port}" for name in ("localhost", "127.0.0.1", "[::1]")]
        if len(hosts) != 1 or hosts[0].lower() not in own:
            return 400, _stray_page("This host name is not served here.")
        if path == "/success" and self.verdict[0] == 303:
            text = "You can close this tab and return to your terminal."
            return 200, render_page("You're signed in", text, kind="yes")
        if path != self.attempt.path:
            return 404, _stray_page("There is no page at this URL.")
        try:
            response = self.attempt.response(query)
            with self.guard:
                if self.claimed or self.settled.is_set():
                    raise ValueError("the sign-in has already been completed")
                self.claimed = True
        except ValueError as error:
            return 400, _stray_page(f"This request was ignored: {error}.")
        self.events.put(("response", response))
        self.settled.wait()
        return self.verdict


def _stray_page(text: str) -> bytes:
    hint = "If you are signing in, continue in the other tab."
    return render_page("Nothing to do here", text, hint, kind="note")


def _serve(listener: Listener, connection: Socket) -> None:
    """One connection, one request, one answer."""
    import hashlib
    import io
    from base64 import b64encode
    from http.server import BaseHTTPRequestHandler

    style = b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style}'; frame-ancestors 'none'"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            self.rfile = io.BytesIO(listener.read_head(connection))

        def do_GET(self) -> None:  # noqa: N802 - http.server looks for this name
            status, page = listener.respond(self.path, self.headers.get_all("Host") or [])
            self._answer(status, page)
            if status == 200 or (page and page is listener.verdict[1]):
                listener.delivered.set()

        def send_error(self, code: int, *_: Any) -> None:
            self._answer(405 if code == 501 else code, _stray_page("This request is not valid."))

        def log_message(self, *_: Any) -> None:
            """Print nothing of what comes in."""

        def _answer(self, status: int, page: bytes) -> None:
            headers = {
                "Server": "chatgpt_oauth",
                "Date": self.date_time_string(),
                "Content-Type": "text/html; charset=utf-8",
                "Content-Length": str(len(page)),
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "Content-Security-Policy": policy,
                "X-Content-Type-Options": "nosniff",
                "Connection": "close",
                **({"Location": "/success"} if status == 303 else {}),
                **({"Allow": "GET"} if status == 405 else {}),
            }
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(page)

    with connection, contextlib.suppress(OSError):
        Handler(connection, None, listener)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# Models: what the account can use, and Code Puppy's entries for it
# ---------------------------------------------------------------------------------------------

OAUTH_SOURCE = "chatgpt-oauth-plugin"
PAYERS = {"api": "billed to your OpenAI API account", "codex": "covered by your ChatGPT plan"}
NO_API_KEY = "this account has no API key"
ORGANIZATION_HINT = (
    "to get one, create an organization and a project at https://platform.openai.com, then run: "
    "chatgpt_oauth.py auth"
)


class Choice:
    """Which models are wanted: patterns to include and exclude, and the source that lists them."""

    def __init__(self, settings: Settings, options: Optional[Namespace] = None) -> None:
        given = vars(options) if options else {}
        include = ["*"] if given.get("all") else given.get("include")
        excludes = "" if include else settings.model_excludes
        self.include = include or settings.model_patterns.split(",")
        self.exclude = excludes.split(",") + (given.get("exclude") or [])
        self.source = given.get("source") or settings.model_source

    def wants(self, name: str) -> bool:
        """Whether the whole id `name` matches, case-sensitively."""
        from fnmatch import fnmatchcase

        wanted = any(fnmatchcase(name, glob) for glob in self.include)
        return wanted and not any(fnmatchcase(name, glob) for glob in self.exclude)


def list_api_models(settings: Settings, api_key: str) -> Answer:
    """Ask what the API key may use."""
    url, what = settings.api_base_url + "/v1/models", "list the API models"
    return request_json(settings, url, what, bearer=api_key, limit=MODELS_LIMIT)


def list_models(session: Session, source: str) -> Tuple[str, Dict[str, int]]:
    """The source that `source` comes to, and its models with their context lengths in tokens.

    Raises OAuthError, too where an API key is asked of an account without one.
    """
    settings, tokens, what = session.settings, session.tokens(), "list the models"
    source = ("api" if tokens.api_key else "codex") if source == "auto" else source
    if source == "codex":
        tokens = session.fresh()
        headers = {"originator": settings.originator}
        if tokens.account_id:
            headers["chatgpt-account-id"] = tokens.account_id
        answer = request_json(
            settings,
            f"{settings.codex_base_url}/models?client_version={settings.codex_client_version}",
            "list the ChatGPT plan's models",
            bearer=tokens.access_token,
            headers=headers,
            limit=MODELS_LIMIT,
        )
        key, name = "models", "slug"
    elif tokens.api_key:
        answer, key, name = list_api_models(settings, tokens.api_key), "data", "id"
    else:
        raise OAuthError(NO_API_KEY, ORGANIZATION_HINT)
    if answer.status == 401:
        error = answer.refusal(what)
        error.hint = AGAIN
        raise error
    listed = answer.members(what).get(key)
    if not isinstance(listed, list):
        raise OAuthError(f"could not {what}: the response has no list of models")
    shown = [e for e in listed if isinstance(e, dict) and e.get("visibility") != "hide"]
    good = [e for e in shown if isinstance(e.get(name), str) and re.fullmatch(MODEL_ID, e[name])]
    if len(good) < len(shown):
        odd = len(shown) - len(good)
        session.notify("warning", f"skipped {odd} model{'s' * (odd > 1)} with unsupported names")
    lengths = {entry[name]: _context_length(settings, entry) for entry in good}
    return source, dict(sorted(lengths.items()))


def _context_length(settings: Settings, entry: Fields) -> int:
    """The window to budget with; the API's list has none, the Codex backend's the whole one."""
    window, percent = entry.get("context_window"), entry.get("effective_context_window_percent")
    if not isinstance(percent, (int, float)) or not 0 < percent <= 100:
        percent = 95
    known = isinstance(window, (int, float)) and 2 <= window < 1e10
    return int(window * percent / 100) if known and window else settings.default_context_length


def is_ours(settings: Settings, name: str, entry: object) -> bool:
    """Whether an entry of the models file was written by this program."""
    marked = isinstance(entry, dict) and entry.get("oauth_source") == OAUTH_SOURCE
    return marked and name.startswith(settings.prefix)


def registered_models(session: Session) -> List[str]:
    """The names of our entries in the models file."""
    entries = session.store.read(session.store.models_file)
    return [name for name, entry in entries.items() if is_ours(session.settings, name, entry)]


def register_models(session: Session, entries: Dict[str, Fields]) -> List[str]:
    """Put `entries` in the place of ours in the models file; returns the names that got there.

    The caller holds the lock. Somebody else's entry of the same name stays.
    """
    settings, store = session.settings, session.store
    before = store.read(store.models_file)
    others = {k: entry for k, entry in before.items() if not is_ours(settings, k, entry)}
    for name in others.keys() & entries.keys():
        session.notify(
            "warning", f"kept the existing entry {name}, which was added by another program"
        )
    after = {**others, **entries, **others}  # in this order, and whose name it is keeps it
    if after != before:
        store.save(store.models_file, after)
    return [name for name in entries if name not in others]


def model_entry(settings: Settings, source: str, model: str, length: int) -> Fields:
    """Code Puppy's entry for `model` (its model_factory.py; type `openai` would ignore the URL)."""
    entry = {
        "type": "custom_openai",
        "name": model,
        "custom_endpoint": {
            "url": settings.api_base_url + "/v1",
            "api_key": "$" + settings.api_key_env_var,
        },
        "context_length": length,
        "oauth_source": OAUTH_SOURCE,
    }
    if source == "codex":
        entry.update(
            type="chatgpt_oauth",
            custom_endpoint={"url": settings.codex_base_url},
            supported_settings=["reasoning_effort", "summary", "verbosity"],
        )
    return entry


def import_models(session: Session, choice: Choice, keep: bool = True) -> Tuple[str, List[str]]:
    """List the models, take those that `choice` wants, and (`keep`) register them.

    Returns the source, and the names with the prefix. Raises OAuthError.
    """
    settings, tokens = session.settings, session.tokens()
    source, models = list_models(session, choice.source)
    entries = {
        settings.prefix + name: model_entry(settings, source, name, length)
        for name, length in models.items()
        if choice.wants(name)
    }
    names = list(entries)
    if not names:
        session.notify("warning", f"none of the account's {len(models)} models match the filter")
        session.notify(
            "info", "hint: to see them all, run: chatgpt_oauth.py models --all --dry-run"
        )
    if keep:
        with session.store.lock():
            if session.tokens().owner != tokens.owner:
                raise OAuthError("another account has signed in meanwhile", "try again")
            names = register_models(session, entries)
        session.notify("done", f"{len(names)} of {len(models)} models imported, {PAYERS[source]}")
    return source, names


def fetch_chatgpt_models(*, source: str = "auto") -> List[str]:
    """The ids of the account's models, unfiltered.

    `source` is "api" (what the API key pays for), "codex" (what the ChatGPT plan pays for) or
    "auto" ("api" when there is a key). Raises OAuthError.
    """
    return list(list_models(Session(), checked("source", source, _RULES["model_source"]))[1])


# ---------------------------------------------------------------------------------------------
# Sign-in: browser, paste and device code, each ending in `complete_sign_in`
# ---------------------------------------------------------------------------------------------

DEVICE_CODE_LIFETIME = 900.0  # seconds
RETRY_OFFER = 60.0  # seconds to press Enter after the time was up
COUNTDOWN_MARKS = (90, 60, 30, 10)  # seconds left that are worth a line


def keep_tokens(session: Session, code: str, verifier: str, redirect_uri: str) -> Optional[Tokens]:
    """Redeem the code and store the tokens; returns those stored before. Raises OAuthError.

    The same account keeps, for now, its API key.
    """
    settings, store = session.settings, session.store
    answer = exchange_code(settings, code, verifier, redirect_uri)
    fields = merged({"issuer": settings.issuer, "client_id": settings.client_id}, answer)
    tokens = Tokens(fields)
    if tokens.account_id:
        fields["account_id"] = tokens.account_id
    old = None
    with store.lock():
        try:
            old = store.load_tokens()
        except StorageError as error:
            aside = os.path.realpath(store.token_file) + ".bad"
            store.move_away(aside)
            session.notify("warning", f"{error}; moved to {aside}")
        if old and tokens.owner == old.owner:
            known = {*SECRET_KEYS, "ended", "expires_at"}
            kept = {k: value for k, value in old.fields.items() if k not in known}
            fields = {**kept, **({"api_key": old.api_key} if old.api_key else {}), **fields}
        store.save(store.token_file, fields)
    return old


def complete_sign_in(session: Session, choice: Choice, old: Optional[Tokens]) -> None:
    """With the tokens stored: API key, models, the end of another account's `old`, summary.

    What fails is a warning.
    """
    tokens = session.tokens()
    who = identity(tokens)["email"]
    session.notify("done", f"Signed in as {who}" if who else "Signed in")
    for step in (obtain_api_key, import_models):
        try:
            step(session, choice)
        except OAuthError as error:
            session.notify("warning", str(error))
            if error.hint:
                session.notify("info", f"hint: {error.hint}")
    if old and old.refresh_token and len({tokens.account_id, old.account_id} - {None}) == 2:
        # Of the same account it stays: both may belong to one grant, and RFC 7009 §2.1 lets
        # the server end the whole of it.
        session.notify("info", f"Signed out of {identity(old)['email'] or 'the previous account'}")
        revoke_quietly(session, old)
    session.notify("info", f"Tokens saved in {session.store.token_file}")
    step = "To get an access token, run: chatgpt_oauth.py token"
    if session.tokens().api_key:
        step = 'To use the API key in this shell: eval "$(chatgpt_oauth.py env)"'
    session.notify("info", step)


def revoke_quietly(session: Session, tokens: Tokens) -> None:
    """Revoke as best as we can: a failure is a warning."""
    try:
        revoke(session.settings, tokens)
    except OAuthError as error:
        session.notify("warning", f"{error}; it may still be valid at OpenAI")


def obtain_api_key(session: Session, _: object = None) -> None:
    """Keep the stored API key while the API accepts it, else exchange the ID token for one.

    Raises OAuthError when there is none to be had.
    """
    settings, store, tokens = session.settings, session.store, session.tokens()
    if tokens.api_key:
        refused = False
        with contextlib.suppress(OAuthError):  # what is not refused stays
            refused = list_api_models(settings, tokens.api_key).status == 401
        if not refused:
            session.notify("done", "API key available (unchanged)")
            return
    obtained = {}
    try:
        obtained["api_key"] = exchange_id_token(settings, tokens.id_token or "")
        session.notify("done", "API key available")
    except OAuthError as error:
        reason = str(error)
        if "missing organization_id" in reason:
            reason = "this account has no organization (missing organization_id)"
        raise OAuthError(f"no API key: {reason}", ORGANIZATION_HINT) from None
    finally:
        with store.lock():
            current = store.load_tokens()
            if current and tokens.owner == current.owner:
                fields = {k: value for k, value in current.fields.items() if k != "api_key"}
                store.save(store.token_file, {**fields, **obtained})


def identity(tokens: Tokens) -> Dict[str, Optional[str]]:
    """`email`, `plan` and `organization_id` from the claims, None where unknown."""
    auth = tokens.auth_claims()
    organization, listed = auth.get("organization_id"), auth.get("organizations")
    if not organization and isinstance(listed, list):
        known: Iterator[Fields] = (entry for entry in listed if isinstance(entry, dict))
        first = min(known, key=lambda entry: entry.get("is_default") is not True, default={})
        organization = first.get("id")
    return {
        "email": text_or_none(decode_claims(tokens.id_token).get("email")),
        "plan": text_or_none(auth.get("chatgpt_plan_type")),
        "organization_id": text_or_none(organization),
    }


def arriving(events: Any, deadline: float) -> Iterator[Tuple[str, Any]]:
    """What comes until time.monotonic() reaches `deadline`; before each second's wait a tick."""
    import queue

    while time.monotonic() < deadline:
        yield "tick", ""
        with contextlib.suppress(queue.Empty):
            yield events.get(timeout=max(0.0, min(1.0, deadline - time.monotonic())))


class Lines:
    """Lines of standard input as events, read by a thread (Windows knows no other way to wait).

    `usable` says whether anything can come, `terminal` whether a person types there (neither
    unless `reading`); once `closed`, standard input is left to whoever reads it next.
    """

    def __init__(self, events: Any, reading: bool) -> None:
        import threading

        self.events = events
        self.usable = self.terminal = self.closed = False
        with contextlib.suppress(AttributeError, ValueError, OSError):
            self.descriptor = sys.stdin.fileno()
            self.terminal = reading and os.isatty(self.descriptor)
            # /dev/null has nothing to say; a background job that reads its terminal is stopped.
            device = stat.S_ISCHR(os.fstat(self.descriptor).st_mode)
            self.usable = self.terminal or (reading and not device)
            if self.terminal and sys.platform != "win32":
                self.usable = self.terminal = os.tcgetpgrp(self.descriptor) == os.getpgrp()
        if self.usable:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        import select

        part, pending = b"-", b""
        with contextlib.suppress(OSError):
            while part and not self.closed:
                ready = sys.platform == "win32" or select.select([self.descriptor], [], [], 0.1)[0]
                if ready and not self.closed:
                    part = os.read(self.descriptor, 65536)
                    *lines, pending = (pending[-65536:] + part).split(b"\n")
                    for line in lines:
                        self.events.put(("line", line.decode("utf-8", "replace")))
        self.events.put(("eof", ""))


class BrowserSignIn:
    """The authorization code flow over the loopback redirect or a pasted address.

    `options` are those of `auth`.
    """

    latest: Optional[Attempt] = None  # of this process; its address may be pasted later

    def __init__(self, session: Session, options: Namespace) -> None:
        self.session, self.options = session, options
        self.timeout = options.timeout or session.settings.callback_timeout

    def run(self, reading: bool) -> None:
        """Sign in, or raise OAuthError; `reading` allows pasting into standard input."""
        import queue

        self.events: Any = queue.SimpleQueue()
        self.lines = Lines(self.events, reading)
        try:
            while not self._try():
                if not (self.lines.terminal and self._asked_again()):
                    raise OAuthError(
                        f"timed out after {self.timeout:g} seconds waiting for you to sign in",
                        "to try again with more time, run: chatgpt_oauth.py auth --timeout 240",
                    )
        finally:
            self.lines.closed = True

    def _asked_again(self) -> bool:
        self.session.notify(
            "warning", f"timed out; press Enter within {RETRY_OFFER:g} seconds to get a new URL"
        )
        events = arriving(self.events, time.monotonic() + RETRY_OFFER)
        return next((kind for kind, _ in events if kind != "tick"), "") == "line"

    def _try(self) -> bool:
        """Whether somebody signed in before the time was up."""
        notify = self.session.notify
        port, sockets, fault = open_port(self.session.settings)
        if fault and not self.lines.usable:
            raise OAuthError(
                fault, "to sign in without a port, run: chatgpt_oauth.py auth --device"
            )
        attempt = BrowserSignIn.latest = Attempt(self.session.settings, port)
        listener = Listener(sockets, attempt, self.events)
        try:
            if fault:
                notify("warning", fault)
            deadline = time.monotonic() + self.timeout
            obstacle = open_browser(self.session, attempt.url, not self.options.no_browser)
            lead = (
                "To sign in, open" if obstacle else "Opening your browser. If nothing opens, visit"
            )
            notify("info", f"{lead} this URL within {self.timeout:g} seconds:")
            notify("verbatim", attempt.url)
            if obstacle or fault:
                self._show_ways(obstacle, listener)
            elif self.lines.terminal:
                notify("info", "If the browser ends on an error page, paste that page's URL here.")
            if self.lines.terminal:
                notify("info", "Waiting for you to sign in... (Ctrl-C to cancel)")
            prepare_wire()
            response = self._await(listener, deadline)
            if response:
                self.redeem(response, listener)
            return bool(response)
        finally:
            listener.close()

    def _show_ways(self, obstacle: Optional[str], listener: Listener) -> None:
        """How to go on where the browser is elsewhere."""
        pasting, listening, port = self.lines.usable, listener.sockets, listener.attempt.port
        for offered, line in (
            (obstacle, f"No browser was opened: {obstacle}. Any browser will do:"),
            (pasting, "- If the browser ends on a page that does not load, paste its URL here."),
            (listening, "- To let it reach this machine, first run this where the browser is:"),
            (listening, f"    ssh -L {port}:localhost:{port} USER@THIS-MACHINE"),
            (True, "- To sign in with a code instead, press Ctrl-C and run:"),
            (True, "    chatgpt_oauth.py auth --device"),
        ):
            if offered:
                self.session.notify("info", line)

    def _await(self, listener: Listener, deadline: float) -> Optional[Dict[str, str]]:
        """The response that comes first, by browser or by paste; None when the time is up."""
        seconds = 0
        for kind, value in arriving(self.events, deadline):
            if kind == "response":
                return dict(value)
            if kind == "line":
                try:
                    return listener.attempt.pasted(value)
                except ValueError as error:
                    self.session.notify("info", f"That URL does not work: {error}")
            elif kind == "eof" and not listener.sockets:
                raise OAuthError(
                    "cannot listen on a port, and standard input is closed",
                    "to sign in with a code, run: chatgpt_oauth.py auth --device",
                )
            before, seconds = seconds, int(deadline - time.monotonic() + 0.999)
            if not self.lines.terminal:  # it must not write over what somebody is pasting
                self.session.notify("countdown", str(seconds))
            elif any(seconds <= mark < before for mark in COUNTDOWN_MARKS):
                self.session.notify("info", f"{seconds} seconds left")
        return None

    def redeem(self, response: Dict[str, str], listener: Listener) -> None:
        """Finish with an authorization response, telling the browser what became of it."""
        attempt = listener.attempt
        try:
            if "error" in response:
                raise denial(response)
            old = keep_tokens(
                self.session, response["code"], attempt.verifier, attempt.redirect_uri
            )
        except OAuthError as error:
            error.hint = error.hint or "to try again, run: chatgpt_oauth.py auth"
            listener.settle(error)
            raise
        listener.settle()
        deadline = time.monotonic() + LINGER
        complete_sign_in(self.session, Choice(self.session.settings, self.options), old)
        if listener.claimed:
            listener.delivered.wait(max(0.0, deadline - time.monotonic()))


def denial(response: Dict[str, str]) -> OAuthError:
    """What an error response (RFC 6749 §4.1.2.1) means to a person."""
    description = response.get("error_description", "")
    if "missing_codex_entitlement" in description:
        return OAuthError(
            "Codex is not enabled for this workspace",
            "ask your workspace administrator to enable Codex, or choose another workspace",
        )
    said = printable(": ".join(filter(None, (response["error"], description))), 200)
    return OAuthError(f"authorization failed ({said})", "to try again, run: chatgpt_oauth.py auth")


def open_port(settings: Settings) -> Tuple[int, List[Socket], str]:
    """A registered port with its listening sockets; or none of them, and why."""
    ports, reason = (settings.required_port, settings.fallback_port), ""
    for port in ports:
        try:
            return port, bind_loopback(port), ""
        except OSError as error:
            reason = reason or error.strerror or "error"
    return (
        ports[0],
        [],
        f"cannot listen on port {ports[0]} or {ports[1]} ({reason}); "
        f"to see what uses them, run: {who_listens(ports[0])}",
    )


def who_listens(port: int) -> str:
    """The system's own command that tells which program listens on `port`."""
    if sys.platform == "win32":
        return f"netstat -ano | findstr :{port}"
    macos = f"lsof -nP -iTCP:{port} -sTCP:LISTEN"
    return macos if sys.platform == "darwin" else f"ss -ltnp 'sport = :{port}'"


def sign_in_with_device(session: Session, choice: Choice, timeout: Optional[float]) -> None:
    """The device code flow (RFC 8628): no listener, any browser anywhere. Raises OAuthError."""
    settings = session.settings
    device = request_user_code(settings)
    for kind, line in (
        ("info", "To sign in, open this page in any browser:"),
        ("verbatim", settings.issuer + "/codex/device"),
        ("info", "Then enter this one-time code (valid for 15 minutes):"),
        ("verbatim", device["user_code"]),
        ("info", "Beware of phishing: use this code only if you started this sign-in yourself."),
        ("info", "Waiting for you to enter the code... (Ctrl-C to cancel)"),
    ):
        session.notify(kind, line)
    deadline = time.monotonic() + min(timeout or DEVICE_CODE_LIFETIME, DEVICE_CODE_LIFETIME)
    members = await_device_token(session, device, deadline)
    code, verifier = (members.get(key, "") for key in ("authorization_code", "code_verifier"))
    if not is_b64token(code) or not is_b64token(verifier):
        raise OAuthError("could not use the device code: the response has no authorization code")
    old = keep_tokens(session, code, verifier, settings.issuer + "/deviceauth/callback")
    complete_sign_in(session, choice, old)


def await_device_token(session: Session, device: Fields, deadline: float) -> Fields:
    """Poll until the code was entered or refused, or time.monotonic() reaches `deadline`."""
    retry, what = "to get a new code, run: chatgpt_oauth.py auth --device", "check the device code"
    expired = OAuthError("timed out waiting for the code to be entered", retry)
    interval = wait = device["interval"]
    told = ""
    while True:
        until = min(time.monotonic() + wait, deadline)
        while time.monotonic() < until:
            session.notify("countdown", str(int(deadline - time.monotonic() + 0.999)))
            time.sleep(max(0.0, min(1.0, until - time.monotonic())))
        if until == deadline:
            raise expired
        wait = interval
        try:
            answer = poll_device_token(session.settings, device)
            if answer.html:
                raise answer.refusal(what)
        except UnavailableError as error:
            if str(error) != told:
                told = str(error)
                session.notify("warning", f"{told}; still trying")
            continue
        if 200 <= answer.status < 300:
            return answer.members(what)
        if answer.code == "slow_down":
            interval = wait = interval + SLOW_DOWN
        elif answer.code == "expired_token":
            raise expired
        elif answer.code == "access_denied":
            raise OAuthError("the sign-in was denied in the browser", retry)
        elif answer.status in (403, 404, 429) or answer.status >= 500:
            wait = max(interval, min(answer.retry_after or 0.0, 60.0))
        elif answer.code != "authorization_pending":
            raise answer.refusal(what)


def end_sign_in(session: Session, revoking: bool) -> bool:
    """Revoke the sign-in (best effort), remove its file and our entries; False: nothing was there.

    A broken token file is removed too; a broken models file raises, after that.
    """
    store = session.store
    with contextlib.suppress(StorageError):
        if not os.path.lexists(store.token_file) and not registered_models(session):
            return False
    with store.lock():
        tokens = None
        try:
            tokens = store.load_tokens()
        except StorageError as error:
            session.notify("warning", f"{error}; removing it anyway")
        if tokens and revoking:
            revoke_quietly(session, tokens)
        try:
            store.move_away(None)
        finally:
            register_models(session, {})
    who = identity(tokens)["email"] if tokens else None
    session.notify("done", f"Signed out{f' of {who}' if who else ''}; imported models removed")
    if tokens and tokens.api_key:
        url = "https://platform.openai.com/api-keys"
        session.notify("info", f"The API key stays valid; delete it at {url}")
    return True


# ---------------------------------------------------------------------------------------------
# Shells: how each sets, unsets and separates
# ---------------------------------------------------------------------------------------------

# Only b64tokens and identifiers get here, so these quotes cannot be broken out of. The fourth
# is a line for the shell's profile.
SHELLS = {
    "sh": ("export {0}='{1}'", "unset {0}", ";\n", 'eval "$(chatgpt_oauth.py env --shell sh)"'),
    "fish": (
        "set -gx {0} '{1}'",
        "set -e {0}",
        ";\n",
        "chatgpt_oauth.py env --shell fish | source",
    ),
    "csh": ("setenv {0} '{1}'", "unsetenv {0}", ";\n", "eval `chatgpt_oauth.py env --shell csh`"),
    "powershell": (
        "$env:{0} = '{1}'",
        "Remove-Item Env:{0} -ErrorAction SilentlyContinue",
        ";\n",
        "chatgpt_oauth.py env --shell powershell | Out-String | iex",
    ),
    "cmd": (
        'set "{0}={1}"',
        'set "{0}="',
        "\n",
        "for /f \"delims=\" %i in ('chatgpt_oauth.py env --shell cmd') do @%i",
    ),
    "dotenv": ("{0}={1}", "{0}=", "\n", ""),
    "json": ("", "", "", ""),
}
SHELL_ALIASES = {
    **dict.fromkeys(("bash", "zsh", "ksh", "dash"), "sh"),
    "tcsh": "csh",
    "pwsh": "powershell",
}


def find_shell(settings: Settings, name: str) -> str:
    """The table's name for the shell `name`; "auto" goes by $SHELL. Raises UsageError."""
    if name == "auto":
        usual = os.path.basename(settings.environ.get("SHELL") or "sh")
        name = "powershell" if sys.platform == "win32" else usual
    shell = SHELL_ALIASES.get(name, name)
    if shell not in SHELLS:
        raise UsageError(f"unknown shell: {name}", f"use --shell with one of: {', '.join(SHELLS)}")
    return shell


def shell_code(shell: str, variables: Dict[str, Optional[str]]) -> str:
    """Code that sets the `variables` in `shell`; those that are None are unset."""
    if shell == "json":
        return json.dumps(variables)
    setting, unsetting, between, _ = SHELLS[shell]
    return between.join(
        (unsetting if value is None else setting).format(name, value)
        for name, value in variables.items()
    )


# ---------------------------------------------------------------------------------------------
# Terminal: the one object that talks to a person
# ---------------------------------------------------------------------------------------------

TERMINAL_BROWSERS = {"lynx", "w3m", "links", "links2", "elinks", "www-browser", "browsh"}


def program_name() -> str:
    """How this program was started, for people who shall start it again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec and spec.name != "__main__":
        return f"python3 -m {spec.name}"
    name = (sys.argv or [""])[0]
    name = "chatgpt_oauth.py" if name in ("", "-", "-c") else name
    folder, base = os.path.split(name)
    if os.access(name, os.X_OK) and folder in os.environ.get("PATH", "").split(os.pathsep):
        return base
    python = "python" if sys.platform == "win32" else "python3"
    return f'{python} "{name}"' if " " in name else f"{python} {name}"


def as_started(text: str) -> str:
    """`text` with the commands in it as one would type them here."""
    return text.replace("chatgpt_oauth.py ", program_name() + " ")


class Terminal:
    """Tells a person on standard error what happens."""

    def __init__(self, environ: Dict[str, str]) -> None:
        self.live = sys.stderr.isatty() and environ.get("TERM") != "dumb"
        self.colour = self.live and not environ.get("NO_COLOR")
        self.counting = False
        tick = "\u2713".encode(sys.stderr.encoding or "ascii", "ignore")  # b"" where there is none
        self.tick = "\u2713 " if self.live and tick else ""

    def notify(self, kind: str, text: str) -> None:
        """Say `text`: info, done, warning, error, verbatim (whole and alone) or countdown."""
        if kind == "countdown":
            if self.live:
                minutes, seconds = divmod(int(text), 60)
                left = f"\r{minutes}:{seconds:02} left "
                print(left, end="", file=sys.stderr, flush=True)
                self.counting = True
            return
        lead, colour = {
            "done": (self.tick, "32"),
            "warning": ("warning: ", "33"),
            "error": ("error: ", "31"),
        }.get(kind, ("", ""))
        if self.colour and lead:
            lead = f"\033[{colour}m{lead}\033[0m"
        clear = "\r\033[K" if self.counting else ""
        self.counting = False
        text = printable(as_started(text), 5000)
        if kind == "verbatim":
            text = f"\n{text}\n"
        with contextlib.suppress(OSError):  # nobody is left to be told
            print(clear + lead + text, file=sys.stderr, flush=True)


def open_browser(session: Session, url: str, wanted: bool) -> Optional[str]:
    """Open `url` in the person's browser, if `wanted`; returns why it was not, or None."""
    import subprocess
    import threading

    settings, secrets = session.settings, set()
    command, obstacle = (
        browser_command(settings.environ) if wanted else ([], "--no-browser was given")
    )
    if not command:
        return obstacle
    # The browser sees none of our keys, whatever they are exported as, and no TERM, without
    # which `webbrowser` starts no terminal browser.
    with contextlib.suppress(OAuthError):
        secrets = {getattr(session.tokens(), key) for key in SECRET_KEYS}
    environ = {
        name: value
        for name, value in settings.environ.items()
        if name not in ("TERM", settings.api_key_env_var)
        and not name.startswith("CHATGPT_OAUTH_")
        and value not in secrets
    }
    try:
        process = subprocess.Popen(  # noqa: S603 - a list of arguments, no shell
            [*command, url],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,
        )
    except OSError as error:
        return f"it could not be started ({error.strerror})"
    threading.Thread(target=process.wait, daemon=True).start()
    return None


def browser_command(environ: Dict[str, str]) -> Tuple[List[str], str]:
    """What opens a URL here; or nothing, and why."""
    named = [part for part in environ.get("BROWSER", "").split(os.pathsep) if part.strip()]
    if {os.path.basename(part.split()[0]) for part in named} & TERMINAL_BROWSERS:
        return [], "BROWSER is a text browser, which cannot show OpenAI's page"
    if not named and ("WSL_DISTRO_NAME" in environ or "WSL_INTEROP" in environ):
        import shutil

        for command in (["wslview"], ["rundll32.exe", "url.dll,FileProtocolHandler"]):
            if shutil.which(command[0], path=environ.get("PATH")):
                return command, ""
        return [], "WSL without wslview or rundll32.exe in PATH"
    if not named and ("SSH_CONNECTION" in environ or "SSH_TTY" in environ):
        return [], "this is an SSH session"
    display = environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY")
    if not (named or display or sys.platform in ("win32", "darwin", "cygwin")):
        inside = os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")
        return [], "this is a container" if inside else "there is no display"
    if not sys.executable:
        return [], "Python cannot find its own executable"
    return [sys.executable, "-I", "-m", "webbrowser"], ""  # -I: no code of the current folder


# ---------------------------------------------------------------------------------------------
# Commands: settings in, exit code out
# ---------------------------------------------------------------------------------------------


def describe(session: Session) -> Tuple[Fields, int]:
    """What `status --json` prints, and its exit code. Offline; holds no secret."""
    settings, store = session.settings, session.store
    trouble: Optional[OAuthError] = None
    tokens = names = None
    try:
        tokens = session.tokens()
        session.require_renewable(tokens)
    except OAuthError as error:
        trouble = error
    usable = tokens is not None and (trouble is None or tokens.outlives(0, unknown=True))
    code = trouble.exit_code if trouble and not usable else 0
    try:
        names = registered_models(session)
    except StorageError as error:
        trouble, code = trouble or error, code or error.exit_code
    who = tokens or Tokens({"issuer": settings.issuer, "client_id": settings.client_id})
    expiry = who.expires_at()
    refreshed = parse_timestamp(who.fields.get("last_refresh"))
    source = settings.model_source
    if tokens and source == "auto":
        source = "api" if who.api_key else "codex"
    return {
        "authenticated": usable,
        **dict(identity(who), account_id=who.account_id),
        "has_api_key": bool(who.api_key),
        "has_refresh_token": bool(who.refresh_token),
        "access_token_expires_at": None if expiry is None else timestamp(expiry),
        "last_refresh": None if refreshed is None else timestamp(refreshed),
        "models": names,
        "token_file": store.token_file,
        "models_file": store.models_file,
        "model_source": source,
        "issuer": who.issuer,
        "client_id": who.client_id,
        "problem": f"{trouble}; {trouble.hint}" if trouble else None,
    }, code


SHOWN_MODELS = 10  # in `status`, one a line


def status_lines(facts: Fields) -> List[str]:
    """`facts`, as `describe` gives them, for people; the first two as the setup guide has them."""
    good, expiry = facts["authenticated"], facts["access_token_expires_at"]
    lines = ["ChatGPT OAuth: " + ("Authenticated" if good else "Not authenticated")]
    rows: List[Tuple[str, str]] = []
    if good or expiry or facts["email"]:
        lines.append(
            "API key available" if facts["has_api_key"] else f"No API key; {ORGANIZATION_HINT}"
        )
        life = life_left(expiry) if expiry else "expiry unknown"
        if not facts["problem"]:
            late = life.startswith("expired")
            life += ", refreshed on next use" if late else ", auto-refreshed"
        rows = [
            ("Account", facts["email"] or "unknown"),
            ("Plan", facts["plan"] or "unknown"),
            ("Access token", life),
        ]
    if facts["problem"]:
        missing = facts["problem"].startswith("not signed in")
        lines.append(
            "To sign in, run: chatgpt_oauth.py auth" if missing else f"Problem: {facts['problem']}"
        )
    names = facts["models"]
    listed = ["unknown"] if names is None else names[:SHOWN_MODELS] or ["none imported"]
    if names and len(names) > SHOWN_MODELS:
        listed.append(f"and {len(names) - SHOWN_MODELS} more: chatgpt_oauth.py status --json")
    rows += [("Models" if name is listed[0] else "", name) for name in listed]
    rows += [("Token file", facts["token_file"]), ("Models file", facts["models_file"])]
    return [*lines, "", *(f"{label + ':' if label else '':14}{text}" for label, text in rows)]


def life_left(when: str) -> str:
    """An expiry as `timestamp` writes it, as people say it, and itself."""
    seconds = int((parse_timestamp(when) or 0.0) - time.time())
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    unit, size = next((u, s) for u, s in units if abs(seconds) >= s or s == 1)
    count = abs(seconds) // size
    words = f"{count} {unit}{'' if count == 1 else 's'}"
    return f"expires in {words} ({when})" if seconds >= 0 else f"expired {words} ago ({when})"


def sign_in(
    *, device: bool = False, open_browser: bool = True, timeout: Optional[float] = None
) -> Dict[str, Any]:
    """Sign in, obtain the API key, import the models; returns what `status --json` prints.

    `device`: with a device code; `open_browser`: False only shows the address (as a logged
    warning); `timeout`: in seconds, default `callback_timeout`. Raises OAuthError.
    """
    session = Session()
    options = parse("auth", [], "")
    if timeout is not None:
        timeout = checked("timeout", timeout, _SECONDS)
    vars(options).update(device=device, no_browser=not open_browser, timeout=timeout)
    command_auth(session, options, reading=False)
    return describe(session)[0]


def sign_out(*, revoke: bool = True) -> None:
    """Revoke the sign-in (best effort), remove its file and our models. Raises OAuthError."""
    end_sign_in(Session(), revoke)


def command_auth(session: Session, options: Namespace, reading: bool = True) -> None:
    """Sign in; `reading` allows pasting into standard input."""
    session.store.prepare()
    if options.device:
        sign_in_with_device(session, Choice(session.settings, options), options.timeout)
    else:
        BrowserSignIn(session, options).run(reading)


def command_status(session: Session, options: Namespace) -> int:
    """Say who is signed in."""
    facts, code = describe(session)
    if options.json:
        problem = facts["problem"] and as_started(facts["problem"])
        print(json.dumps({**facts, "problem": problem}, indent=2))
    else:
        print("\n".join(printable(as_started(line)) for line in status_lines(facts)))
    return code


def command_models(session: Session, options: Namespace) -> None:
    """List, filter and import the account's models."""
    source, names = import_models(
        session, Choice(session.settings, options), keep=not options.dry_run
    )
    facts = {"model_source": source, "models": names}
    text = json.dumps(facts, indent=2) if options.json else "\n".join(names)
    if text:
        print(text)


def command_env(session: Session, options: Namespace) -> None:
    """Print shell code that exports the API key, or the access token and the account id."""
    shell = find_shell(session.settings, options.shell)
    usual, account = session.settings.api_key_env_var, "CHATGPT_OAUTH_ACCOUNT_ID"
    usual = "CHATGPT_OAUTH_ACCESS_TOKEN" if options.access_token else usual
    name = checked(
        "--name", usual if options.name is None else options.name, _RULES["api_key_env_var"]
    )
    if name == account:
        raise UsageError(f"--name cannot be {account}", "choose another name")
    names = [name, account] if options.access_token else [name]
    values: List[Optional[str]] = [None, None]
    if not options.unset:
        try:
            tokens = session.fresh() if options.access_token else session.tokens()
        except NotSignedInError as error:  # each new shell of somebody signed out says it: one line
            raise NotSignedInError(f"{error}; {error.hint}") from None
        both = [tokens.access_token, tokens.account_id]
        values = both if options.access_token else [tokens.api_key]
        if not values[0]:
            raise OAuthError(
                NO_API_KEY,
                f"{ORGANIZATION_HINT}; to do without, run: chatgpt_oauth.py env --access-token",
            )
    print(shell_code(shell, dict(zip(names, values))))


def command_token(session: Session, options: Namespace) -> None:
    """Print an access token that is valid now, or the API key."""
    if options.api_key and options.refresh:
        raise UsageError("--refresh and --api-key cannot be used together", "leave one of them out")
    tokens = session.tokens() if options.api_key else session.fresh(options.refresh)
    value = tokens.api_key if options.api_key else tokens.access_token
    if not value:
        raise OAuthError(NO_API_KEY, ORGANIZATION_HINT)
    print(value)


def command_logout(session: Session, options: Namespace) -> None:
    """Revoke the sign-in and remove what it left."""
    if not end_sign_in(session, not options.local):
        session.notify("info", "Not signed in; nothing to do.")


# ---------------------------------------------------------------------------------------------
# Code Puppy: the same commands through its plugin interface (code_puppy/callbacks.py)
# ---------------------------------------------------------------------------------------------

PUPPY_PAUSE = 0.05  # seconds; two threads of the host show its messages, one must be done
BUILTIN = ("code_puppy_core_plugins.chatgpt_oauth", "code_puppy.plugins.chatgpt_oauth")
PUPPY_COMMANDS = {
    "chatgpt-auth": "Sign in with ChatGPT and import its models (options: --device, a pasted URL)",
    "chatgpt-status": "Show the ChatGPT account and the imported models",
    "chatgpt-logout": "Sign out of ChatGPT and remove its models",
}


class Puppy:
    """Stands between Code Puppy and the commands: nothing comes out but messages."""

    def __init__(self) -> None:
        self.inherited: Dict[str, List[Any]] = {"custom_command": [], "custom_command_help": []}
        self.exported: Optional[str] = None

    def notify(self, kind: str, *lines: str) -> None:
        """Say `lines` through the host's emitters (kinds as in Terminal.notify)."""
        from code_puppy import messaging  # type: ignore[import-not-found, unused-ignore]

        text = "\n".join(printable(line, 5000) for line in lines)
        text = re.sub(r"(?m)^To (use|get) .*", "To use one of the models: /model NAME", text)
        text = re.sub(r"chatgpt_oauth\.py (auth|status|logout)\b", r"/chatgpt-\1", text)
        text = text.replace("chatgpt_oauth.py ", f"python3 {__file__} ")
        if kind == "countdown":  # it would be a message a second
            return
        if kind == "verbatim":  # the emitters would break it into lines
            print(f"\n{text}\n", flush=True)
            return
        from rich.text import Text  # type: ignore[import-not-found, unused-ignore]

        name = {"done": "success", "warning": "warning", "error": "error"}.get(kind, "info")
        getattr(messaging, "emit_" + name)(Text(text))  # plain strings would be read as markup
        time.sleep(PUPPY_PAUSE)

    def on_help(self) -> List[Tuple[str, str]]:
        """Our commands, and those of the built-in plugin that are not ours."""
        entries = [entry for old in self.inherited["custom_command_help"] for entry in old() or []]
        return [*PUPPY_COMMANDS.items(), *(e for e in entries if e[0] not in PUPPY_COMMANDS)]

    def on_command(self, command: str, name: str) -> Any:
        """Carry out one of our commands; hand on what is not ours."""
        if name not in PUPPY_COMMANDS:
            answers = (old(command=command, name=name) for old in self.inherited["custom_command"])
            return next((answer for answer in answers if answer is not None), None)
        import io
        import signal
        import threading

        said = io.StringIO()
        try:
            with contextlib.ExitStack() as stack:
                if threading.current_thread() is threading.main_thread():
                    # The host swallows Ctrl-C; while we wait it means what it says.
                    before = signal.signal(signal.SIGINT, signal.default_int_handler)
                    stack.callback(signal.signal, signal.SIGINT, before or signal.SIG_DFL)
                self._run(name[len("chatgpt-") :], command, said)
        except OAuthError as error:
            self.notify("error", str(error))
            if error.hint:
                self.notify("info", f"hint: {error.hint}")
        except KeyboardInterrupt:
            self.notify("warning", "Interrupted.")
        except SystemExit:  # --help
            self.notify("info", *said.getvalue().splitlines())
        return True

    def _run(self, name: str, command: str, said: Any) -> None:
        words = [word.strip("'\"") for word in command.split()[1:]]
        with contextlib.redirect_stdout(said):
            options = parse(name, [w for w in words if "?" not in w], "/chatgpt-" + name)
        session = Session(notify=self.notify)
        if name == "status":
            self._status(session, options)
            return
        if name == "auth":
            self._sign_in(session, options, [word for word in words if "?" in word])
            self.export()
        else:
            command_logout(session, options)
            variable = session.settings.api_key_env_var
            if self.exported and os.environ.get(variable) == self.exported:
                del os.environ[variable]
        try:  # the agent at work goes on with the key that it began with; a new one is built anew
            from code_puppy import agents  # type: ignore[import-not-found, unused-ignore]

            agents.get_current_agent()._code_generation_agent = None
        except Exception as error:
            to_log("info", f"Code Puppy: {type(error).__name__}: {error}")

    def _status(self, session: Session, options: Namespace) -> None:
        facts = describe(session)[0]
        whole = json.dumps(facts, indent=2).splitlines()
        self.notify("info", *(whole if options.json else status_lines(facts)))
        from code_puppy import config  # type: ignore[import-not-found, unused-ignore]

        tokens, variable = session.store.load_tokens(), session.settings.api_key_env_var.lower()
        stored = getattr(config, "get_value", lambda _: None)(variable)
        if stored and (tokens is None or stored != tokens.api_key):
            self.notify("warning", f"the Code Puppy setting {variable} overrides this API key")

    def _sign_in(self, session: Session, options: Namespace, pasted: List[str]) -> None:
        with contextlib.suppress(ImportError):  # a release without it has no such wish
            from code_puppy.tools.common import (  # type: ignore[import-not-found, unused-ignore]
                should_suppress_browser,
            )

            options.no_browser = options.no_browser or should_suppress_browser()
        if options.device or not pasted:
            command_auth(session, options, sys.stdin is not None and sys.stdin.isatty())
            return
        attempt = BrowserSignIn.latest
        if not attempt:
            raise UsageError(
                "no sign-in is in progress", "to start one, run: chatgpt_oauth.py auth"
            )
        try:
            response = attempt.pasted(pasted[0])
        except ValueError as error:
            raise UsageError(f"that URL does not work: {error}") from None
        BrowserSignIn.latest = None
        BrowserSignIn(session, options).redeem(response, Listener([], attempt, None))

    def export(self) -> None:
        """Give the host the API key, which it looks for in the environment."""
        session = Session(notify=self.notify)
        tokens, variable = session.store.load_tokens(), session.settings.api_key_env_var
        if tokens and tokens.api_key and os.environ.get(variable) in (None, "", self.exported):
            self.exported = os.environ[variable] = tokens.api_key

    def take_over(self) -> None:
        """Take the built-in plugin's commands, and let it fetch its tokens through us."""
        from code_puppy import callbacks  # type: ignore[import-not-found, unused-ignore]

        for phase, inherited in self.inherited.items():
            for callback in callbacks.get_callbacks(phase):
                theirs = getattr(callback, "__module__", "").startswith(BUILTIN)
                if theirs and getattr(callback, "__self__", None) is not self:
                    callbacks.unregister_callback(phase, callback)
                    inherited.append(callback)

        def token(**options: bool) -> Optional[str]:
            try:
                return get_access_token(**options)
            except OAuthError as error:
                self.notify("warning", str(error))
                return None

        ours = {
            "get_valid_access_token": token,
            "refresh_access_token": lambda: token(refresh=True),
        }
        for name, module in list(sys.modules.items()):
            if name.startswith(BUILTIN):
                vars(module).update({k: f for k, f in ours.items() if hasattr(module, k)})


def register_callbacks() -> None:
    """Put the three commands into the running Code Puppy, in place of the built-in plugin's."""
    from code_puppy import callbacks  # type: ignore[import-not-found, unused-ignore]

    puppy = Puppy()
    for step in (
        lambda: callbacks.register_callback("custom_command", puppy.on_command),
        lambda: callbacks.register_callback("custom_command_help", puppy.on_help),
        lambda: callbacks.register_callback("startup", puppy.take_over),
        puppy.take_over,
        puppy.export,
    ):
        try:
            step()
        except Exception as error:  # what a release lacks is done without
            to_log("info", f"Code Puppy: {type(error).__name__}: {error}")


def is_plugin() -> bool:
    """Whether Code Puppy is loading this file as a plugin."""
    if __name__ == "__main__" or "code_puppy" not in sys.modules:
        return False
    loading = getattr(sys.modules.get("code_puppy.callbacks"), "get_loading_context", None)
    named = __name__.endswith("register_callbacks") or __name__.startswith("code_puppy.plugins.")
    return named or bool(loading and loading())


# ---------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------

_FLAG: Fields = {"action": "store_true", "default": False}
_GLOBS: Fields = {"action": "append", "metavar": "GLOB"}
OPTIONS: Dict[str, Tuple[str, Fields]] = {
    "--device": ("sign in with a one-time code, in a browser on any machine", _FLAG),
    "--no-browser": ("print the URL instead of opening a browser", _FLAG),
    "--timeout": (
        "how long to wait (default: 120; with --device: 900)",
        {"metavar": "SECONDS", "type": lambda text: checked("--timeout", text, _SECONDS)},
    ),
    "--include": ("import models that match, instead of the defaults (repeatable)", _GLOBS),
    "--exclude": ("skip models that match (repeatable)", _GLOBS),
    "--source": (
        "api (billed to the API account), codex (covered by the plan) or auto",
        {
            "metavar": "SOURCE",
            "type": lambda text: checked("--source", text, _RULES["model_source"]),
        },
    ),
    "--all": ("import every model", _FLAG),
    "--dry-run": ("print the models without importing them", _FLAG),
    "--json": ("output as JSON", _FLAG),
    "--shell": (
        "sh (also bash, zsh, ksh, dash), fish, csh (also tcsh), powershell, cmd, dotenv, json "
        "or auto (default: from $SHELL)",
        {"metavar": "NAME", "default": "auto"},
    ),
    "--name": ("variable to set (default: CHATGPT_OAUTH_API_KEY)", {"metavar": "VAR"}),
    "--access-token": ("export the access token and account ID instead", _FLAG),
    "--unset": ("print code that unsets the variables", _FLAG),
    "--refresh": ("refresh it first, even if it is still valid", _FLAG),
    "--api-key": ("print the API key instead", _FLAG),
    "--local": ("do not revoke the tokens at OpenAI", _FLAG),
}
# command: what runs it, what it does, an example (with its -h), its options
COMMANDS: Dict[str, Tuple[Callable[..., Optional[int]], str, str, str]] = {
    "auth": (
        command_auth,
        "sign in with ChatGPT and import its models",
        "chatgpt_oauth.py auth\n  chatgpt_oauth.py auth --device",
        "--device --no-browser --timeout --include --exclude --source",
    ),
    "status": (
        command_status,
        "show the account, the API key and the imported models",
        "chatgpt_oauth.py status\n  chatgpt_oauth.py status --json",
        "--json",
    ),
    "models": (
        command_models,
        "list the account's models and import them into Code Puppy",
        "chatgpt_oauth.py models --all --dry-run\n"
        "  chatgpt_oauth.py models --include 'gpt-5*' --exclude '*-mini'",
        "--include --exclude --all --source --dry-run --json",
    ),
    "env": (
        command_env,
        "print shell code that exports the API key",
        "",
        "--shell --name --access-token --unset",
    ),
    "token": (
        command_token,
        "print a valid access token, refreshed if needed",
        'curl -H "Authorization: Bearer $(chatgpt_oauth.py token)" https://...\n'
        "  chatgpt_oauth.py token --api-key",
        "--refresh --api-key",
    ),
    "logout": (
        command_logout,
        "sign out and remove the tokens and imported models",
        "chatgpt_oauth.py logout\n  chatgpt_oauth.py logout --local",
        "--local",
    ),
}


def parse(name: str, arguments: List[str], prog: str) -> Any:
    """The options of the command `name`. Raises UsageError; -h ends in SystemExit."""
    _, what, example, flags = COMMANDS[name]
    options = {flag: OPTIONS[flag] for flag in flags.split()}
    if not arguments:  # as scripts and shell profiles call: argparse would cost them its import
        import types

        return types.SimpleNamespace(
            **{
                flag[2:].replace("-", "_"): details.get("default")
                for flag, (_, details) in options.items()
            }
        )
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            message = message.replace("unrecognized arguments", "unknown option or argument")
            raise UsageError(message, f"to see the options, run: chatgpt_oauth.py {name} --help")

    start, lines = prog, ["examples:", f"  {example}"]
    if name == "env":
        profiles = (f"  {shell}:\n    {row[3]}" for shell, row in SHELLS.items() if row[3])
        lines = ["add one of these to your shell's profile:", *profiles]
        path = os.path.abspath((sys.argv or [""])[0])
        if program_name() == f"python3 {(sys.argv or [''])[0]}" and os.path.isfile(path):
            start = f"python3 {path} env"  # a profile runs in any folder
    parser = Parser(
        prog=prog,
        usage=f"{prog} [options]",
        description=f"{what[0].upper()}{what[1:]}.",
        epilog="\n".join(lines).replace(f"chatgpt_oauth.py {name}", start),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser._optionals.title = "options"  # "optional arguments" before Python 3.10
    for flag, (explained, details) in options.items():
        parser.add_argument(flag, help=explained, **details)
    return parser.parse_args(arguments)


USAGE = (
    """
options:
  -h, --help     show help (after a command: for that command)
  -V, --version  show the version

examples:
  chatgpt_oauth.py auth
  eval "$(chatgpt_oauth.py env)"
  chatgpt_oauth.py auth --device""",
    """
environment:
  CHATGPT_OAUTH_<SETTING> overrides one setting of CHATGPT_OAUTH_CONFIG, at the
  top of the file, for one run: CHATGPT_OAUTH_CALLBACK_TIMEOUT=240
  Also read: BROWSER, NO_COLOR, HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE""",
)


ALIASES = {"login": "auth", "signin": "auth", "signout": "logout", "whoami": "status"}


def run(arguments: List[str], notify: Notify) -> int:
    """Do what the command line says; returns the exit code. Raises OAuthError."""
    name = arguments[0] if arguments else ""
    if name == "help":
        arguments = [*arguments[1:2], "--help"]
        name = arguments[0]
    name = ALIASES.get(name, name)
    if name in ("", "-h", "--help"):
        commands = (f"  {command:8}{row[1]}" for command, row in COMMANDS.items())
        parts = (
            "usage: chatgpt_oauth.py COMMAND [options]",
            "",
            "Sign in with ChatGPT and use it from the command line.",
            "",
            "commands:",
            *commands,
            *USAGE[: 1 + bool(name)],
        )
        print(as_started("\n".join(parts)), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name in ("-V", "--version"):
        print(f"chatgpt_oauth {__version__}")
        return 0
    if name not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS, 1) or ["--help"]
        hint = "did you mean" if near[0] in COMMANDS else "to see the commands, run"
        kind = "option" if name.startswith("-") else "command"
        raise UsageError(f"unknown {kind}: {name}", f"{hint}: chatgpt_oauth.py {near[0]}")
    try:
        options = parse(name, arguments[1:], f"{program_name()} {name}")
    except SystemExit:  # after --help
        return 0
    return COMMANDS[name][0](Session(notify=notify), options) or 0


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    terminal = Terminal(dict(os.environ))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = run(sys.argv[1:] if argv is None else list(argv), terminal.notify)
        sys.stdout.flush()
        return code
    except OAuthError as error:
        terminal.notify("error", str(error))
        if error.hint:
            terminal.notify("info", f"hint: {error.hint}")
        return error.exit_code
    except KeyboardInterrupt:
        terminal.notify("info", "Interrupted.")
        return 130
    except OSError as error:  # standard output is closed or full
        terminal.notify("error", f"cannot write to standard output: {error.strerror}")
        return StorageError.exit_code
    except Exception as error:
        import traceback

        *_, (_, line) = traceback.walk_tb(error.__traceback__)  # the text could hold a secret
        terminal.notify(
            "error", f"internal error: {type(error).__name__} at line {line}; this is a bug"
        )
        return OAuthError.exit_code


if __name__ == "__main__":
    exit_code = main()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # Not sys.exit(): no waiting for a connection's thread, no taking apart of what ends anyway.
    os._exit(exit_code)
if is_plugin():
    register_callbacks()
