"""Test chatgpt_oauth.py against a strict double of OpenAI's servers on this machine.

    python3 -m unittest                                  the suite
    python3 test_chatgpt_oauth.py demo                   a tour of the commands, without an account

Most tests start the program as a process, the way a person or a script does.  The tests need
neither a network nor an account, and they use only ports that are free.
"""

import argparse
import asyncio
import base64
import calendar
import collections
import concurrent.futures
import contextlib
import errno
import faulthandler
import functools
import gc
import hashlib
import html
import http.client
import importlib.util
import io
import itertools
import json
import os
import pathlib
import pickle
import py_compile
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unittest
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from unittest import mock

import chatgpt_oauth as oauth

PROGRAM = str(pathlib.Path(oauth.__file__).resolve())
TEST_FILE = str(pathlib.Path(__file__).resolve())
AUTH_CLAIM = "https://api.openai.com/auth"
POSIX = os.name == "posix"
# Start the program the way the installed command does, compiled and without site-packages. Python
# compiles a script at each start, which would double the time of most tests. Python on Windows may
# need `sitecustomize`, so site-packages stay there.
PYTHON_COMMAND = [sys.executable, "-S", "-c"] if POSIX else [sys.executable, "-c"]
PROGRAM_ARGUMENTS = [PROGRAM, os.path.dirname(PROGRAM)]
PROGRAM_COMMAND = [*PYTHON_COMMAND, oauth.LAUNCH_CODE, *PROGRAM_ARGUMENTS]
# The same as a frozen program, which can't start a child process and must do everything itself.
FROZEN_CODE = "import sys; sys.frozen = True; " + oauth.LAUNCH_CODE
FROZEN_COMMAND = [*PYTHON_COMMAND, FROZEN_CODE, *PROGRAM_ARGUMENTS]
# PATH without the directories that have an installed `chatgpt-oauth`, so that the tests never run
# that one.
PATH = os.pathsep.join(
    place
    for place in os.environ.get("PATH", os.defpath).split(os.pathsep)
    if not any(os.path.exists(os.path.join(place, name)) for name in oauth.LAUNCHERS)
)
# The ID that most systems give to a user, and to a group, without any rights.
NOBODY = 65534
# The longest wait for a process, a thread or a socket.
WAIT_LIMIT = 60  # seconds
# The number of processes that a test with many of them runs at once.
WORKERS = 4
# The whole run is ended when one test takes longer than this.
TEST_LIMIT = 300  # seconds
AUTHORIZATION_URL = r"^http\S+/(?:oauth|api/accounts)/authorize\?\S+$"
COMMANDS = ("auth", "status", "models", "env", "exec", "token", "logout", "install", "uninstall")
# An error with one of these exit codes always has a hint.
EXIT_CODES_WITH_HINT = (1, 3, 4, 5)
# Members that a token response may have besides the tokens. The last two don't belong there.
OTHER_MEMBERS = ("token_type", "expires_in", "scope", "earliest_refresh_at", "error", "unknown")
# The files that a refresh leaves in the home.
TOKEN_FILES = ["chatgpt_oauth.json", "chatgpt_oauth.json.lock"]
# The output of a sign-in begins with one of these.
SIGN_IN_MESSAGES = ("To sign in, open ", "You are signed in as ")
# The error codes of OpenAI and of RFC 6749 §5.2 for a refresh token that is no longer valid.
INVALID_GRANT_CODES = (
    *("refresh_token_reused", "refresh_token_expired", "refresh_token_invalidated"),
    *("token_expired", "invalid_grant", "invalid_refresh_token"),
)
# Shorter waits for the program when it runs in this process. No setting controls these, and tests
# that poll, reread a torn file or retry a refresh would otherwise spend most of their time waiting.
# SpecificationTest checks the shipped values of these and of all other waits that a test shortens.
SHORT_WAITS = {"POLL_FLOOR": 0.01, "SLOW_DOWN": 0.01, "REREAD_SECONDS": 0.01, "RETRY_PAUSE": 0.05}


def setUpModule():
    # A shell starts background processes with Ctrl-C ignored, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def encode_jwt(claims, algorithm="none"):
    """Return a JWT with these claims and a dummy signature."""
    parts = [json.dumps(part).encode() for part in ({"alg": algorithm}, claims)] + [b"signature"]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def timestamp(moment):
    """Return `moment`, in seconds since 1970, in the format of the token file."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def bind(address, port=0, reuse=False):
    """Return a socket bound to `port` of a loopback address.

    With `reuse`, connections left over from an earlier socket don't keep the port taken.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        # On Windows, SO_REUSEADDR would share the port with the program that holds it.
        if reuse and POSIX:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound


@contextlib.contextmanager
def free_ports(count):
    """Reserve `count` ports on 127.0.0.1 and ::1 while the block runs."""
    with contextlib.ExitStack() as held:
        ports = []
        while len(ports) < count:
            port = held.enter_context(bind("127.0.0.1")).getsockname()[1]
            try:
                held.enter_context(bind("::1", port))
            except OSError as error:
                # Any other error means that this system has no IPv6.
                if error.errno == errno.EADDRINUSE:
                    continue
            ports.append(port)
        yield ports


def wait_for(condition, seconds=WAIT_LIMIT):
    """Wait until `condition()` returns true, or raise AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {seconds} s")
        time.sleep(0.01)


def limit_file_sizes(size):
    """Return a preexec_fn that makes a process fail to write more than `size` bytes to a file."""
    import resource

    return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def run_in_parallel(function, cases):
    """Call `function` for each case, WORKERS at a time, and return the results in order."""
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as workers:
        return list(workers.map(function, cases))


def shell_line(*arguments):
    """Return `arguments` quoted as one line for a shell or for BROWSER."""
    return " ".join(shlex.quote(pathlib.Path(each).as_posix()) for each in arguments)


# The name of Python in the commands that messages suggest, and the message for a taken port.
# The command that starts Python, in hints.
WINDOWS_PYTHON = "py" if shutil.which("py", path=PATH) else "python"
PYTHON = "python3" if POSIX else WINDOWS_PYTHON
PORT_TAKEN = os.strerror(errno.EADDRINUSE) if POSIX else "cannot listen on port"


def quoted_path(path):
    """Return `path` quoted the way messages quote it in commands that people should type."""
    # A path with an apostrophe goes into double quotes, unless it has a character that is special
    # within them.
    if POSIX and not re.search(r"^[^']*$|[\"$`\\!]", str(path)):
        return f'"{path}"'
    if POSIX:
        return shlex.quote(str(path))
    return f'"{path}"' if re.search(r"[^\w.:\\/-]", str(path)) else str(path)


def bash_path(path):
    """Return `path` quoted the way messages quote it for bash, which on Windows is Git Bash."""
    return quoted_path(path) if POSIX else quoted_path(path).replace("\\", "/")


# The command line that stands in for a browser: this file visits the URL.
BROWSER = shell_line(sys.executable, TEST_FILE, "visit") + " %s"


def memory_in_kib(process_id):
    """Return the memory of a process in KiB, or 0 on a system without /proc."""
    status = pathlib.Path(f"/proc/{process_id}/status")
    return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) if status.exists() else 0


def child_of(process_id):
    """Return the ID of the first child process of another process, from Linux's /proc."""
    path = pathlib.Path(f"/proc/{process_id}/task/{process_id}/children")
    return int(path.read_text().split()[0])


def cpu_seconds(process_id):
    """Return the processor time of a process in seconds. This works only on Linux."""
    fields = pathlib.Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    # These are utime and stime (proc(5)).
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------------------------------
# The double of OpenAI's servers
# ---------------------------------------------------------------------------------------------

# Each endpoint has a path, the grant type of its requests (only at a token endpoint), the command
# that tests run for TESTED_ENDPOINTS, and whether that command fails when the endpoint does.
Endpoint = collections.namedtuple("Endpoint", "path grant_type command fatal")
ENDPOINTS = {
    "authorize": Endpoint("/oauth/authorize", None, None, True),
    "code": Endpoint("/oauth/token", "authorization_code", "auth --device", True),
    "refresh": Endpoint("/oauth/token", "refresh_token", "token", True),
    "key": Endpoint(
        "/oauth/token", "urn:ietf:params:oauth:grant-type:token-exchange", "auth --device", False
    ),
    "revoke": Endpoint("/oauth/revoke", None, "logout", False),
    "api": Endpoint("/v1/models", None, "models --source api", True),
    "codex": Endpoint("/codex-backend/models", None, "models --source codex", True),
    "usage": Endpoint("/backend-api/wham/usage", None, "status --online", False),
    "usercode": Endpoint("/api/accounts/deviceauth/usercode", None, "auth --device", True),
    "device": Endpoint("/api/accounts/deviceauth/token", None, "auth --device", True),
    # Code Puppy sends requests to this one and to plan_responses.
    "chat": Endpoint("/v1/chat/completions", None, None, True),
    # The official sign-in, which lets API requests use the ChatGPT plan of the person.
    "plan_authorize": Endpoint("/api/accounts/authorize", None, None, True),
    "plan_code": Endpoint("/api/accounts/oauth/token", "authorization_code", None, True),
    "plan_refresh": Endpoint("/api/accounts/oauth/token", "refresh_token", None, True),
    "plan_revoke": Endpoint("/api/accounts/oauth/revoke", None, None, False),
    "plan_responses": Endpoint("/v1/responses", None, None, True),
}
TESTED_ENDPOINTS = [name for name, endpoint in ENDPOINTS.items() if endpoint.command]


def endpoint_at(path, grant_type):
    """Return the name of the endpoint with this path and grant type, or None."""
    for name, endpoint in ENDPOINTS.items():
        if (endpoint.path, endpoint.grant_type) == (path, grant_type):
            return name
    return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = WAIT_LIMIT

    def do_GET(self):
        self.server.serve(self)

    do_POST = do_CONNECT = do_GET

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """An HTTP server on a free port of 127.0.0.1. It calls `serve(handler)` for each request."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, serve):
        super().__init__(("127.0.0.1", 0), Handler)
        self.serve = serve
        # Looking every 5 ms whether to shut down makes `close` fast.
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()

    # HTTPServer.server_bind looks up the host's name, which can take seconds.
    def server_bind(self):
        socket.socket.bind(self.socket, self.server_address)
        self.server_name, self.server_port = "localhost", self.socket.getsockname()[1]

    # A program that a test kills closes the connection before it has read the response.
    def handle_error(self, *_):
        pass

    def close(self):
        self.shutdown()
        self.server_close()


def bearer_token(headers):
    """Return the token in the Authorization header of a request to the double, or ""."""
    return headers.get("authorization", "")[len("Bearer ") :]


class OfficialEndpoints:
    """The endpoints of OpenAI's official sign-in (developers.openai.com/siwc).

    Each request must have exactly the documented parameters. `agents` maps each issued client ID
    to its host ID. Tests change the other attributes to choose what the person or the server does.
    """

    SCOPE = "openid profile email offline_access resource.invoke chatgpt.tokens.use.direct"
    # The fields that POST /v1/responses rejects in a request that the plan pays for.
    REFUSED = (
        "background conversation max_output_tokens max_tool_calls metadata moderation multi_agent "
        "prompt prompt_cache_retention safety_identifier temperature top_logprobs top_p truncation "
        "user previous_response_id"
    )

    def __init__(self):
        self.agents = {}
        # The authorization request of each unused code.
        self.plan_codes = {}
        # For each refresh token, its client ID (or "used") and the earliest time of its use.
        self.plan_tokens = {}
        # For each access token, its expiry and whether it may use the plan.
        self.plan_access = {}
        # The person's ID, whether they let the client use their plan, and whether they decline the
        # whole sign-in.
        self.plan_subject, self.plan_allowed, self.plan_declined = "user|ada", True, False
        # How long an access token is valid, and how soon a refresh token may be used.
        self.plan_lifetime, self.plan_refresh_after = 3600, -1  # seconds
        # The client ID that is issued next, or None for a random one.
        self.plan_issued = None
        # Changes to the authorization response and to the ID token. None removes a member.
        self.callback_changes, self.id_token_changes = {}, {}
        # When the usage limit is reached: "before" the stream, "mid" (within it), or "" (never).
        self.plan_limit = ""
        self.plan_models = [
            {"slug": "gpt-6-astra", "visibility": "list", "context_window": 272000},
            {"slug": "gpt-5.5", "visibility": "list", "context_window": 272000},
            {"slug": "gpt-5.4-secret", "visibility": "hide", "context_window": 272000},
        ]

    @staticmethod
    def with_changes(fields, changes):
        return {k: v for k, v in {**fields, **changes}.items() if v is not None}

    def _plan_authorize(self, fields, headers):
        required = {
            "response_type": "code",
            "client_id": r"dynamic_agent_client|oaiapp_\w+",
            "redirect_uri": r"http://127\.0\.0\.1:[1-9]\d*/auth/callback",
            "scope": re.escape(self.SCOPE),
            "resource": re.escape(self.url + "/v1"),
            "state": r"[\w-]{22,}",
            "nonce": r"[\w-]{22,}",
            "code_challenge": r"[\w-]{43}",
            "code_challenge_method": "S256",
            "ext_agent_host_id": r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){2}-[89ab][0-9a-f]{3}-\w{12}",
        }
        client = fields.get("client_id")
        registers = client == "dynamic_agent_client"
        if registers:
            required["agent_name_hint"] = r"\S.{0,99}"
        if not registers and "prompt" in fields:
            required["prompt"] = "consent"
        if not registers and "login_hint" in fields:
            required["login_hint"] = re.escape(self.email)
        wrong = [k for k, v in required.items() if not re.fullmatch(v, fields.get(k, ""))]
        wrong += set(fields) - set(required)
        if not registers and self.agents.get(client) != fields.get("ext_agent_host_id"):
            wrong.append("registration")
        if wrong:
            return 403, {"detail": f"wrong: {wrong}"}
        answer = {"state": fields["state"], "iss": self.url}
        if self.plan_declined:
            answer["error"] = "access_denied"
        else:
            if registers:
                client = self.plan_issued or "oaiapp_" + secrets.token_hex(8)
                self.agents[client] = fields["ext_agent_host_id"]
                answer["client_id"] = client
            answer["code"] = "ac_" + secrets.token_urlsafe(24)
            self.plan_codes[answer["code"]] = {**fields, "client_id": client}
        answer = urllib.parse.urlencode(self.with_changes(answer, self.callback_changes))
        return 302, {"location": f"{fields['redirect_uri']}?{answer}"}

    def plan_sign_in(self, client, nonce=None):
        """Issue the tokens of a new sign-in and return the token endpoint's response."""
        expiry = int(time.time()) + self.plan_lifetime
        earliest = time.time() + self.plan_refresh_after
        claims = {"iss": self.url, "aud": [client], "sub": self.plan_subject, "exp": expiry}
        claims = {**claims, "email": self.email, "name": "Ada", "nonce": nonce}
        answer = {
            "access_token": "at_" + secrets.token_urlsafe(24),
            "refresh_token": "rt_" + secrets.token_urlsafe(24),
            "id_token": encode_jwt(self.with_changes(claims, self.id_token_changes), "RS256"),
            "token_type": "Bearer",
            "expires_in": self.plan_lifetime,
            "scope": self.SCOPE if self.plan_allowed else self.SCOPE.rpartition(" ")[0],
            "earliest_refresh_at": timestamp(earliest),
        }
        with self.lock:
            self.id_tokens[answer["id_token"]] = None
            self.plan_tokens[answer["refresh_token"]] = [client, earliest]
            self.plan_access[answer["access_token"]] = (expiry, self.plan_allowed)
        return answer

    def _plan_code(self, fields, headers):
        required = {"grant_type", "client_id", "code", "code_verifier", "redirect_uri", "resource"}
        request = self.plan_codes.pop(fields.get("code"), None)
        if set(fields) != required or not request:
            return 400, {"error": "invalid_grant" if set(fields) == required else "invalid_request"}
        digest = hashlib.sha256(fields["code_verifier"].encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        compared = ("client_id", "redirect_uri", "resource")
        if challenge != request["code_challenge"] or any(fields[k] != request[k] for k in compared):
            return 400, {"error": "invalid_grant"}
        return 200, self.plan_sign_in(fields["client_id"], request["nonce"])

    def _plan_refresh(self, fields, headers):
        if set(fields) != {"grant_type", "client_id", "refresh_token", "resource"}:
            return 400, {"error": "invalid_request"}
        if fields["resource"] != self.url + "/v1":
            return 400, {"error": "invalid_target"}
        client, earliest = self.plan_tokens.get(fields["refresh_token"], (None, 0))
        if client == "used":
            return 400, {"error": "refresh_token_reused"}
        if client is None:
            return 400, {"error": "invalid_refresh_token"}
        if client != fields["client_id"]:
            return 401, {"error": "invalid_client"}
        if time.time() < earliest:
            return 400, {"error": "invalid_request", "error_description": "too early"}
        self.plan_tokens[fields["refresh_token"]][0] = "used"
        return 200, self.plan_sign_in(client)

    def _plan_revoke(self, fields, headers):
        is_form = "urlencoded" in headers.get("content-type", "")
        if not is_form or set(fields) != {"token", "token_type_hint", "client_id"}:
            return 400, {"error": "invalid_request"}
        if fields["token_type_hint"] != "refresh_token":
            return 400, {"error": "unsupported_token_type"}
        self.plan_tokens.pop(fields["token"], None)
        return 200, ""

    def plan_refusal(self, headers):
        """Return the API's refusal of an access token that can't use the plan, otherwise None."""
        expiry, allowed = self.plan_access.get(bearer_token(headers), (0, False))
        if expiry < time.time():
            return 401, {"detail": "Could not parse your authentication token."}
        return None if allowed else (403, {"detail": "The plan was not allowed."})

    def _plan_responses(self, fields, headers):
        refusal = None
        if bearer_token(headers) not in self.api_keys:
            refusal = self.plan_refusal(headers) or self.request_refusal(fields)
        code = "subscription_sharing_usage_limit_exceeded"
        limit = {"code": code, "type": code, "message": "The usage limit has been reached"}
        if not refusal and self.plan_limit == "before":
            refusal = 429, {"error": limit}
        if refusal:
            return refusal
        answer = {
            "id": "resp_" + secrets.token_hex(6),
            "object": "response",
            "created_at": int(time.time()),
            "model": fields["model"],
            "status": "in_progress",
            "output": [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }
        events = [{"type": "response.created", "response": answer}]
        if self.plan_limit:
            failed = {**answer, "status": "failed", "error": limit}
            events.append({"type": "response.failed", "response": failed})
        else:
            events += self.response_events(fields)
            usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
            usage["input_tokens_details"] = {"cached_tokens": 0}
            usage["output_tokens_details"] = {"reasoning_tokens": 0}
            # The real server leaves `output` empty here, too.
            done = {**answer, "status": "completed", "usage": usage}
            events.append({"type": "response.completed", "response": done})
        events = [{**event, "sequence_number": number} for number, event in enumerate(events)]
        return 200, "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events)

    def request_refusal(self, fields):
        """Return the API's refusal of a request that the plan can't pay for, otherwise None."""
        wrong = [name for name in self.REFUSED.split() if name in fields]
        items = fields.get("input")
        if not isinstance(items, list) or fields.get("store") is not False:
            wrong.append("input or store")
        elif any(isinstance(item, dict) and item.get("role") == "system" for item in items):
            wrong.append("system")
        if fields.get("stream") is not True or isinstance(fields.get("tool_choice"), dict):
            wrong.append("stream or tool_choice")
        # These models take tools only in an input item of type `additional_tools`.
        if fields.get("tools") and re.match(r"gpt-(5\.[6-9]|[6-9])", fields.get("model", "")):
            wrong.append("flat tools")
        if fields.get("model") not in [model["slug"] for model in self.plan_models]:
            wrong.append("model")
        code = "subscription_sharing_unsupported_capability"
        return (400, {"error": {"code": code, "message": f"{wrong}"}}) if wrong else None

    @staticmethod
    def response_events(fields):
        """Return the events of a response: a tool call if files should be listed, else a text."""
        tools = list(fields.get("tools") or [])
        for item in fields["input"]:
            tools += item.get("tools", []) if item.get("type") == "additional_tools" else []
        tool_ran = any(item.get("type") == "function_call_output" for item in fields["input"])
        names = [tool.get("name") for tool in tools]
        if (
            "list the files" in json.dumps(fields["input"])
            and "list_files" in names
            and not tool_ran
        ):
            arguments = json.dumps({"directory": "."})
            item = {"id": "fc_1", "type": "function_call", "call_id": "call_1"}
            item = {**item, "name": "list_files", "arguments": arguments, "status": "completed"}
            started = {**item, "arguments": "", "status": "in_progress"}
            place = {"item_id": "fc_1", "output_index": 0}
            event = "response.function_call_arguments."
            content = [
                {"type": event + "delta", **place, "delta": arguments},
                {"type": event + "done", **place, "name": "list_files", "arguments": arguments},
            ]
        else:
            text = "I have seen the files." if tool_ran else "Hello from the plan."
            part = {"type": "output_text", "text": text, "annotations": []}
            item = {"id": "msg_1", "type": "message", "role": "assistant", "content": [part]}
            item["status"] = "completed"
            started = {**item, "status": "in_progress", "content": []}
            place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
            whole = {"text": text, "logprobs": []}
            content = [
                {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
                {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []},
                {"type": "response.output_text.done", **place, **whole},
                {"type": "response.content_part.done", **place, "part": part},
            ]
        return [
            {"type": "response.output_item.added", "output_index": 0, "item": started},
            *content,
            {"type": "response.output_item.done", "output_index": 0, "item": item},
        ]


class Double(OfficialEndpoints):
    """OpenAI's authorization server, API and Codex backend, as strict as the real ones.

    Codes and refresh tokens work once, redirect URIs are compared exactly, and PKCE is verified.
    `faults[endpoint]` is called with the handler and the request's fields. If it returns True, it
    has answered the request itself. `requests` records every request.
    """

    def __init__(self, ports=(1455, 1457)):
        super().__init__()
        # The code challenge and the redirect URI of each code, or (None, None) after its use.
        self.codes = {}
        # The account of each refresh token, or "used".
        self.refresh_tokens = {}
        # The account of each access token, and the organization of each ID token, or None.
        self.access_tokens, self.id_tokens = {}, {}
        self.api_keys = set()
        # The number of polls that each device ID must still wait for.
        self.devices = {}
        self.requests, self.faults = [], {}
        self.lock = threading.RLock()
        self.redirect_uris = {f"http://localhost:{port}/auth/callback" for port in ports}
        self.client_id = "app_EMoamEEZ73f0CkXaXp7hrann"
        self.account, self.email, self.plan = "acct-1", "ada@example.com", "plus"
        self.organization, self.title = "org-1", None
        # The region in which a workspace's data must stay, or None.
        self.residency = None
        # What the usage endpoint says: the plan, if it differs from the tokens', and the credits.
        self.usage_plan, self.credits = None, None
        # How long an access token is valid, and how long each response takes.
        self.lifetime, self.delay = 864000, 0.0  # seconds
        # The number of polls before the person enters the user code, and the polling interval.
        self.device_polls, self.device_interval = 1, "0"
        self.rate_limit = {
            "allowed": True,
            "limit_reached": False,
            "primary_window": {
                "used_percent": 32,
                "limit_window_seconds": 604800,
                "reset_after_seconds": 86400,
                "reset_at": int(time.time()) + 86400,
            },
            "secondary_window": {
                "used_percent": 7.5,
                "limit_window_seconds": 18000,
                "reset_after_seconds": 3700,
            },
        }
        self.api_models = ["gpt-4o", "o1-mini", "gpt-4o-audio-preview", "dall-e-3", "o3-pro"]
        # The time when each model was created, in seconds since 1970, by model ID.
        self.created = {}
        # The date when each model is shut down, by model ID.
        self.shutdown_dates = {}
        self.codex_models = [
            {"slug": "gpt-5.5", "visibility": "list", "context_window": 272000},
            {"slug": "gpt-5.4-secret", "visibility": "hide", "context_window": 272000},
            {
                "slug": "gpt-5.4",
                "visibility": "list",
                "context_window": 100000,
                "effective_context_window_percent": 90,
            },
        ]
        self.server = Server(self.serve)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.redirect_uris.add(self.url + "/deviceauth/callback")

    def close(self):
        self.server.close()

    def use_tls(self, certificate, key):
        """Require a TLS handshake for every connection from now on."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)

    def environment(self):
        """Return the environment variables that point the program to this double."""
        return {
            "CHATGPT_OAUTH_ISSUER": self.url,
            "CHATGPT_OAUTH_API_BASE_URL": self.url,
            "CHATGPT_OAUTH_CODEX_BASE_URL": self.url + "/codex-backend",
            "CHATGPT_OAUTH_USAGE_URL": self.url + "/backend-api/wham/usage",
        }

    # Tokens and records -------------------------------------------------------------------

    def tokens(self, lifetime=None, account=None):
        """Issue the tokens of a new sign-in and return the token endpoint's response."""
        account = account or self.account
        claims = {"chatgpt_account_id": account, "chatgpt_plan_type": self.plan}
        if self.residency:
            claims["chatgpt_compute_residency"] = self.residency
        if self.organization:
            organization = {"id": self.organization, "is_default": True, "title": self.title}
            claims["organizations"] = [organization]
        lifetime = self.lifetime if lifetime is None else lifetime
        expiry = int(time.time()) + lifetime
        unique = secrets.token_hex(4)
        answer = {
            "access_token": encode_jwt({"exp": expiry, AUTH_CLAIM: claims, "jti": unique}),
            "id_token": encode_jwt({"email": self.email, AUTH_CLAIM: claims, "jti": unique}),
            "refresh_token": "rt_" + secrets.token_urlsafe(24),
            "token_type": "Bearer",
            "expires_in": lifetime,
        }
        with self.lock:
            self.refresh_tokens[answer["refresh_token"]] = account
            self.access_tokens[answer["access_token"]] = account
            self.id_tokens[answer["id_token"]] = self.organization
        return answer

    def secrets(self):
        """Return every code, token, key and verifier. None of them may appear in any output."""
        with self.lock:
            found = {*self.codes, *self.refresh_tokens, *self.api_keys}
            found |= {*self.access_tokens, *self.id_tokens}
            found |= {*self.plan_codes, *self.plan_tokens, *self.plan_access}
            for entry in self.requests:
                code, verifier = (entry["fields"].get(k) for k in ("code", "code_verifier"))
                # .ci/fuzz may have cut a code to a few letters, which could occur in any text.
                found |= {verifier, code if code and len(code) > 7 else None}
        return {secret for secret in found if secret}

    def requests_to(self, endpoint):
        """Return the fields of each request to `endpoint`, in order."""
        with self.lock:
            return [e["fields"] for e in self.requests if e["endpoint"] == endpoint]

    def count(self, endpoint):
        return len(self.requests_to(endpoint))

    # Endpoints ----------------------------------------------------------------------------

    def serve(self, handler):
        path, _, query = handler.path.partition("?")
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0)).decode()
        content_type = handler.headers.get("Content-Type", "")
        if handler.command == "GET":
            fields = dict(urllib.parse.parse_qsl(query))
        elif "json" in content_type:
            fields = json.loads(body)
        else:
            fields = dict(urllib.parse.parse_qsl(body, strict_parsing=True))
        grant_type = fields.get("grant_type") if "urlencoded" in content_type else None
        endpoint = endpoint_at(path, grant_type)
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self.lock:
            entry = {"endpoint": endpoint, "path": path, "fields": fields, "headers": headers}
            self.requests.append(entry)
        if self.delay:
            time.sleep(self.delay)
        fault = self.faults.get(endpoint)
        if fault and fault(handler, fields):
            return
        answer = getattr(self, "_" + str(endpoint), self._nothing)
        with self.lock:
            status, data = answer(fields, headers)
        if isinstance(data, str):
            self.reply(handler, status, data.encode(), Content_Type="text/event-stream")
            return
        extra = {"Location": data.pop("location")} if status == 302 else {}
        self.reply(handler, status, data, **extra)

    @staticmethod
    def reply(handler, status, body, **headers):
        """Send a response. A `body` that isn't bytes is sent as JSON."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        headers = {"Content_Type": "application/json", "Content_Length": len(body), **headers}
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(body)
        return True

    @staticmethod
    def refuse(code, message="", status=401):
        return status, {"error": {"message": message, "type": "x", "param": None, "code": code}}

    def _nothing(self, fields, headers):
        return 404, {"detail": "Not Found"}

    def _authorize(self, fields, headers):
        required = {
            "response_type": "code",
            "client_id": self.client_id,
            "scope": "openid profile email offline_access",
            "code_challenge_method": "S256",
            "id_token_add_organizations": "true",
            "codex_cli_simplified_flow": "true",
        }
        wrong = [name for name, value in required.items() if fields.get(name) != value]
        if wrong or fields.get("redirect_uri") not in self.redirect_uris:
            return 403, {"detail": f"wrong: {wrong} {fields.get('redirect_uri')}"}
        if not re.fullmatch(r"[\w-]{43}", fields.get("code_challenge", "")):
            return 403, {"detail": "wrong code_challenge"}
        code = "ac_" + secrets.token_urlsafe(24)
        self.codes[code] = (fields["code_challenge"], fields["redirect_uri"])
        answer = urllib.parse.urlencode({"code": code, "scope": "x", "state": fields["state"]})
        return 302, {"location": f"{fields['redirect_uri']}?{answer}"}

    def _code(self, fields, headers):
        challenge, redirect_uri = self.codes.get(fields.get("code"), (None, None))
        verifier = fields.get("code_verifier", "").encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(verifier).digest()).rstrip(b"=").decode()
        if fields.get("client_id") != self.client_id or redirect_uri != fields.get("redirect_uri"):
            return self.refuse("invalid_request", "redirect_uri", 403)
        if challenge != digest or len(verifier) < 43:
            return 400, {"error": "invalid_grant", "error_description": "PKCE"}
        self.codes[fields["code"]] = (None, None)
        return 200, self.tokens()

    def _refresh(self, fields, headers):
        account = self.refresh_tokens.get(fields.get("refresh_token"))
        if account is None:
            return self.refuse("refresh_token_invalidated")
        if account == "used":
            return self.refuse("refresh_token_reused", "Your refresh token has already been used")
        self.refresh_tokens[fields["refresh_token"]] = "used"
        return 200, self.tokens(account=account)

    def _key(self, fields, headers):
        if fields.get("requested_token") != "openai-api-key":
            return self.refuse("invalid_request")
        if not self.id_tokens.get(fields.get("subject_token")):
            return self.refuse("invalid_subject_token", "Invalid ID token: missing organization_id")
        key = "sk-" + secrets.token_urlsafe(24)
        self.api_keys.add(key)
        return 200, {"access_token": key}

    def _revoke(self, fields, headers):
        self.refresh_tokens.pop(fields.get("token"), None)
        return 200, {}

    def _api(self, fields, headers):
        if bearer_token(headers) in self.plan_access:
            if not fields.get("client_version"):
                return 400, {"detail": "client_version missing"}
            return self.plan_refusal(headers) or (200, {"models": self.plan_models})
        if bearer_token(headers) not in self.api_keys:
            return self.refuse("invalid_api_key", "Incorrect API key provided")
        models = [{"id": name, "object": "model", "owned_by": "x"} for name in self.api_models]
        for model in models:
            if model["id"] in self.created:
                model["created"] = self.created[model["id"]]
            if model["id"] in self.shutdown_dates:
                model["shutdown_date"] = self.shutdown_dates[model["id"]]
        return 200, {"object": "list", "data": models}

    def refuse_on_codex_backend(self, headers):
        """Return the refusal of a request with a rejected token or for another region, or None."""
        if bearer_token(headers) not in self.access_tokens:
            return 401, {"detail": "Unauthorized"}
        region = None if self.residency == "no_constraint" else self.residency
        if headers.get("x-openai-internal-codex-residency") != region:
            return 401, {"detail": "Workspace is not authorized in this region"}
        return None

    def _codex(self, fields, headers):
        refusal = self.refuse_on_codex_backend(headers)
        if refusal:
            return refusal
        if not fields.get("client_version") or not headers.get("chatgpt-account-id"):
            return 400, {"detail": "client_version or account missing"}
        return 200, {"models": self.codex_models}

    def _usage(self, fields, headers):
        refusal = self.refuse_on_codex_backend(headers)
        if refusal:
            return refusal
        if headers.get("chatgpt-account-id") != self.account:
            return 403, {"detail": "wrong account"}
        answer = {"plan_type": self.usage_plan or self.plan, "rate_limit": self.rate_limit}
        return 200, {**answer, "credits": self.credits}

    def _usercode(self, fields, headers):
        device, code = "dev_" + secrets.token_urlsafe(12), "ABCD-EFGH"
        self.devices[device] = self.device_polls
        return 200, {"device_auth_id": device, "user_code": code, "interval": self.device_interval}

    def _device(self, fields, headers):
        polls_left = self.devices.get(fields.get("device_auth_id"))
        if polls_left is None or fields.get("user_code") != "ABCD-EFGH":
            return 404, {"error": {"code": "deviceauth_unknown"}}
        self.devices[fields["device_auth_id"]] = polls_left - 1
        if polls_left > 0:
            return 403, {"error": {"code": "deviceauth_authorization_unknown"}}
        verifier = secrets.token_urlsafe(48)
        digest = hashlib.sha256(verifier.encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        code = "ac_" + secrets.token_urlsafe(24)
        self.codes[code] = (challenge, self.url + "/deviceauth/callback")
        names = ("authorization_code", "code_challenge", "code_verifier")
        return 200, dict(zip(names, (code, challenge, verifier)))

    def _chat(self, fields, headers):
        if bearer_token(headers) not in self.api_keys:
            return self.refuse("invalid_api_key")
        is_old = fields["model"].startswith(("gpt-3", "gpt-4"))
        if fields.get("tools") and fields.get("reasoning_effort") and not is_old:
            message = "Function tools with reasoning_effort are not supported for this model in "
            message += "/v1/chat/completions. Please use /v1/responses instead."
            return self.refuse(None, message, 400)
        message = {"role": "assistant", "content": "Hello from the double."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "x", "object": "chat.completion", "created": 1, "model": fields["model"]}
        if not fields.get("stream"):
            return 200, {**answer, "choices": [choice], "usage": usage}
        answer["object"] = "chat.completion.chunk"
        pieces = [
            {"choices": [{"index": 0, "delta": message, "finish_reason": None}]},
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": usage},
        ]
        events = [json.dumps({**answer, **piece}) for piece in pieces]
        return 200, "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])


def respond_with(status, body=b"{}", **headers):
    """Return a fault that answers every request with this response."""
    return lambda handler, _: Double.reply(handler, status, body, **headers)


class Proxy:
    """A CONNECT proxy (RFC 9110 §9.3.6) that connects every host to `port` on this machine.

    `seen` records the host and the Proxy-Authorization header of each request.
    """

    def __init__(self, port):
        self.port, self.seen = port, []
        self.server = Server(self.serve)
        self.url = f"http://user:word@127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.close()

    def serve(self, handler):
        self.seen.append((handler.path, handler.headers.get("Proxy-Authorization")))
        handler.close_connection = True
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self.port), WAIT_LIMIT) as far:
            back = threading.Thread(target=self.pump, args=(far, handler.connection), daemon=True)
            back.start()
            self.pump(handler.connection, far)
            back.join(WAIT_LIMIT)

    @staticmethod
    def pump(source, target):
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def make_certificate(folder, host, issuer=None, issuer_key=None):
    """Create an untrusted certificate for `host` and return its path and the path of its key.

    The certificate is self-signed unless the paths of an issuer and its key are given.
    """
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", f"/CN={host}"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-addext", f"subjectAltName=DNS:{host}", "-keyout", str(key)]
    command += ["-out", str(certificate)]
    command += ["-CA", issuer, "-CAkey", issuer_key] if issuer else []
    subprocess.run(command, check=True, timeout=WAIT_LIMIT, stderr=subprocess.DEVNULL)
    return str(certificate), str(key)


def visit(url, follow=True):
    """Visit `url` as a browser does and return (url, status, headers, body) of each page."""
    pages = []
    # No test needs more than nine pages. This ends a loop of redirects.
    while url and len(pages) < 9:
        parts = urllib.parse.urlsplit(url)
        # Browsers resolve localhost themselves and ignore /etc/hosts (RFC 6761 §6.3).
        host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname
        connection = http.client.HTTPConnection(host, parts.port, timeout=WAIT_LIMIT)
        target = parts.path + ("?" + parts.query if parts.query else "")
        connection.request("GET", target, headers={"Host": parts.netloc})
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        pages.append((url, response.status, headers, response.read().decode()))
        connection.close()
        location = headers.get("location")
        url = urllib.parse.urljoin(url, location) if location and follow else None
    return pages


def query(url):
    """Return the parameters of the query of `url`."""
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))


def authorization_response(url):
    """Return the authorization response for `url`: the URL that the browser is redirected to."""
    return visit(url, follow=False)[0][2]["location"]


# ---------------------------------------------------------------------------------------------
# Shared helpers
# ---------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """The exit code, standard output and standard error of a process that has ended."""

    code: int
    out: str
    err: str


class Process:
    """A running process whose output is read as it comes. Every wait has a time limit."""

    def __init__(self, command, environ, **options):
        options.setdefault("stdin", subprocess.DEVNULL)
        self.process = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )
        self.out, self.err, self.ended = b"", "", False
        self.arrived = threading.Condition()
        self.readers = [
            threading.Thread(target=each, daemon=True) for each in (self._read_out, self._read_err)
        ]
        for each in self.readers:
            each.start()

    def _read_out(self):
        self.out = self.process.stdout.read()

    def _read_err(self):
        for line in self.process.stderr:
            with self.arrived:
                self.err += line.decode("utf-8", "replace")
                self.arrived.notify_all()
        with self.arrived:
            self.ended = True
            self.arrived.notify_all()

    def wait_for_line(self, pattern, seconds=WAIT_LIMIT):
        """Wait until standard error matches `pattern`, and return the match."""
        deadline = time.monotonic() + seconds
        with self.arrived:
            while True:
                match = re.search(pattern, self.err, re.M)
                if match:
                    return match
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self.ended:
                    raise AssertionError(f"{pattern!r} did not appear: {self.err!r}")
                self.arrived.wait(remaining)

    def wait_for_url(self):
        """Wait for the URL of the authorization request, and return it."""
        return self.wait_for_line(AUTHORIZATION_URL)[0]

    def type_line(self, line):
        """Write `line` (bytes) and a newline to standard input."""
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def result(self, seconds=WAIT_LIMIT):
        """Wait for the program to end, and return its Result."""
        try:
            self.wait(seconds)
        finally:
            self.close()
        return Result(self.process.returncode, self.out.decode(), self.err)

    def wait(self, seconds=WAIT_LIMIT):
        """Wait for the program to end."""
        deadline = time.monotonic() + seconds
        # Process.wait() polls, so wait for the end of the streams first, which is seen at once.
        for each in self.readers:
            each.join(max(0, deadline - time.monotonic()))
        try:
            self.process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {seconds} s: {self.err!r}") from None

    def close(self):
        """Kill the program if it is still running, and close its streams."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(WAIT_LIMIT)
        for each, stream in zip(self.readers, (self.process.stdout, self.process.stderr)):
            each.join(5)
            # A live reader means that another process holds the stream. Closing would block then.
            if not each.is_alive():
                stream.close()
        if self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


class BrowserStream(io.StringIO):
    """A stream that calls `browser`, in a thread, with each authorization URL written to it."""

    def __init__(self, browser=None):
        super().__init__()
        self.browser, self.visits = browser, []

    def write(self, text):
        match = re.search(AUTHORIZATION_URL, text, re.M)
        if match and self.browser:
            self.visits.append(threading.Thread(target=self.browser, args=(match[0],), daemon=True))
            self.visits[-1].start()
        return super().write(text)

    def wait(self):
        """Wait until the browser has visited every URL."""
        for each in self.visits:
            each.join(WAIT_LIMIT)


def environment(folder):
    """Return the environment variables of a person whose home directory is `folder`."""
    environ = {"HOME": str(folder), "USERPROFILE": str(folder), "PATH": PATH, "LANG": "C.UTF-8"}
    if "SYSTEMROOT" in os.environ:
        environ["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
    return environ


def has_terminals():
    """Whether pseudo-terminals work. They don't on Windows or without a mounted /dev/pts."""
    try:
        for each in os.openpty():
            os.close(each)
    except (AttributeError, OSError):
        return False
    return True


# Interactive shells, with the options that keep them from reading a person's startup files.
INTERACTIVE_SHELLS = [
    ("bash", "--norc", "-i"),
    ("zsh", "-f", "-i"),
    ("fish", "--no-config", "-i"),
    ("tcsh", "-f", "-i"),
    ("sh", "-i"),
]
IN_CONTAINER = os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")

needs_signals = unittest.skipUnless(POSIX, "Windows has no POSIX signals")
needs_modes = unittest.skipUnless(POSIX, "Windows has no POSIX owners and modes")
needs_terminal = unittest.skipUnless(has_terminals(), "no pseudo-terminals here")
# Under Wine, /proc shows the processes of Linux.
needs_proc = unittest.skipUnless(POSIX and os.path.exists("/proc/self/fd"), "no /proc here")
needs_root = unittest.skipUnless(POSIX and os.geteuid() == 0, "needs root to switch users")
needs_windows = unittest.skipIf(POSIX, "only on Windows")
needs_sh = unittest.skipUnless(shutil.which("sh"), "no sh here")


def command_succeeds(*command):
    """Whether `command` is installed and succeeds."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": WAIT_LIMIT}
    return bool(shutil.which(command[0])) and subprocess.run(command, **quiet).returncode == 0


@functools.lru_cache(maxsize=None)
def can_mount():
    """Whether a process can have private mounts on this system."""
    return POSIX and command_succeeds("unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt")


@functools.lru_cache(maxsize=None)
def can_trace():
    """Whether strace can trace system calls on this system."""
    return POSIX and command_succeeds("strace", "-f", "-o", os.devnull, "true")


@functools.lru_cache(maxsize=None)
def can_inject():
    """Whether strace can make system calls fail on this system."""
    return POSIX and command_succeeds("strace", "-f", "-e", "inject=rename:error=EIO", "true")


class Case(unittest.TestCase):
    """A test with its own double, home directory and two ports."""

    def setUp(self):
        faulthandler.dump_traceback_later(TEST_LIMIT, exit=True, file=sys.__stderr__)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        # Without these hooks, Python would only print such a traceback, and the test would succeed.
        self.tracebacks = []
        self.addCleanup(self.assert_no_traceback)
        for module, name in ((threading, "excepthook"), (sys, "unraisablehook")):
            hook = mock.patch.object(module, name, self.keep_traceback)
            hook.start()
            self.addCleanup(hook.stop)
        # The ports stay reserved while the double starts, so that it can't get one of them.
        with free_ports(2) as self.ports:
            self.double = Double(self.ports)
        self.addCleanup(self.double.close)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        # The program's own directory. HOME is `folder`.
        self.home = self.folder / ".code_puppy"
        self.token_file = self.home / "chatgpt_oauth.json"
        self.models_file = self.home / "chatgpt_models.json"
        self.plan_file = self.home / "chatgpt_plan.json"
        self.agent_file = self.home / "chatgpt_agent.json"
        self.waits = dict(SHORT_WAITS)
        self.environ = {
            **environment(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CHATGPT_OAUTH_REQUIRED_PORT": str(self.ports[0]),
            "CHATGPT_OAUTH_FALLBACK_PORT": str(self.ports[1]),
            "CHATGPT_OAUTH_RETRY_WINDOW": "2",
            **self.double.environment(),
        }

    def keep_traceback(self, error):
        """Keep the traceback of an exception in a thread or a finalizer."""
        lines = traceback.format_exception(error.exc_type, error.exc_value, error.exc_traceback)
        self.tracebacks.append("".join(lines))

    def assert_no_traceback(self):
        self.assertFalse(self.tracebacks, "\n".join(self.tracebacks))

    def require(self, condition, reason):
        """Skip the rest of the test or subtest with `reason` unless `condition` is true."""
        if not condition:
            self.skipTest(reason)

    def environ_with(self, changes):
        """Return the test's environment with `changes`. A value of None removes a variable."""
        changed = {**self.environ, **(changes or {})}
        return {name: value for name, value in changed.items() if value is not None}

    def another_double(self):
        """Return a second double, which the program isn't configured to use."""
        other = Double(self.ports)
        self.addCleanup(other.close)
        return other

    def take_ports(self):
        """Listen on the callback ports, as another program would."""
        for port in self.ports:
            for address in ("127.0.0.1", "::1"):
                try:
                    listener = bind(address, port, reuse=True)
                except OSError as error:
                    if error.errno == errno.EADDRINUSE or address == "127.0.0.1":
                        raise
                    # This system has no IPv6.
                    continue
                self.addCleanup(listener.close)
                listener.listen()

    def start(self, *arguments, environ=None, frozen=False, **options):
        """Start the program with `arguments` and return the running process."""
        command = [*(FROZEN_COMMAND if frozen else PROGRAM_COMMAND), *arguments]
        running = Process(command, self.environ_with(environ), **options)
        self.addCleanup(running.close)
        return running

    def start_sign_in(self, *arguments, **options):
        """Start `auth --no-browser`. Return the process and the authorization URL."""
        running = self.start("auth", "--no-browser", *arguments, **options)
        return running, running.wait_for_url()

    def finish_sign_in(self, running, url):
        """Visit `url` as the browser would. Return the Result of `running`, which must succeed."""
        visit(url)
        return self.assert_done(running.result())

    def run_command(self, command, environ=None, **options):
        """Run `command` and return its Result."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
        options = {"stderr": subprocess.PIPE, "timeout": WAIT_LIMIT, **options}
        process = subprocess.run(command, env=self.environ_with(environ), **options)
        out = (process.stdout or b"").decode("utf-8", "replace")
        err = (process.stderr or b"").decode("utf-8", "replace")
        return Result(process.returncode, out, err)

    def run_program(self, *arguments, environ=None, **options):
        """Run the program and return its Result."""
        return self.run_command([*PROGRAM_COMMAND, *arguments], environ, **options)

    def open_terminal(self):
        """Return the two ends of a new terminal. The first one is the side of the person."""
        leader, follower = os.openpty()
        self.addCleanup(os.close, leader)
        return leader, follower

    def run_at_terminal(self, stream, *arguments, environ=None):
        """Run the program with "stdout" or "stderr" at a new terminal. Return what that shows."""
        leader, follower = self.open_terminal()
        with open(follower, "wb") as terminal:
            self.run_program(*arguments, environ=environ, **{stream: terminal})
            # The terminal passes on the output in pieces. A NUL byte marks the end.
            terminal.write(b"\0")
            terminal.flush()
            shown = b""
            while not shown.endswith(b"\0"):
                shown += os.read(leader, 65536)
            return shown[:-1].decode()

    def run_mounted(self, mounts, *arguments):
        """Run the program after the shell code `mounts`, with private mounts. Return its Result."""
        self.require(can_mount(), "no mounts here")
        start = [*PROGRAM_COMMAND, *arguments]
        return self.run_command(["unshare", "-m", "sh", "-ec", mounts + '; exec "$0" "$@"', *start])

    def require_injection(self):
        """Skip the rest of the test if strace can't make system calls fail here."""
        self.require(can_inject(), "no strace here that can inject faults")

    def run_injected(self, faults, *arguments):
        """Run the program under strace, which injects the `faults`. Return its Result."""
        self.require_injection()
        inject = [f"-einject={fault}" for fault in faults.split()]
        strace = ["strace", "-f", "-qq", "-o", os.devnull, *inject]
        return self.run_command([*strace, *PROGRAM_COMMAND, *arguments])

    def start_python(self, code, *arguments):
        """Start Python with `code`, which can import the program. Return the running process."""
        code = f"import sys; sys.path.insert(0, {str(pathlib.Path(PROGRAM).parent)!r})\n{code}"
        command = [sys.executable, "-c", code, *arguments]
        running = Process(command, self.environ, stdin=subprocess.PIPE, start_new_session=True)
        self.addCleanup(running.close)
        return running

    def run_shell(self, code, environ=None, **options):
        """Run `code` with sh and return its Result."""
        return self.run_command(["sh", "-c", code], environ, **options)

    def call(self, *arguments, environ=None, browser=None):
        """Run the program in this process and return its Result.

        This is faster than starting a process. Like a frozen program, it doesn't start a child for
        its requests, either. `browser` is called with the authorization URL as soon as the program
        prints it.
        """
        out, err = io.StringIO(), BrowserStream(browser)
        with contextlib.ExitStack() as stack:
            environ = self.environ_with(environ)
            stack.enter_context(mock.patch.dict(os.environ, environ, clear=True))
            for name, seconds in self.waits.items():
                stack.enter_context(mock.patch.object(oauth, name, seconds))
            stack.enter_context(mock.patch.object(sys, "frozen", True, create=True))
            stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO()))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            code = oauth.main(list(arguments))
            err.wait()
        return Result(code, out.getvalue(), err.getvalue())

    def call_at(self, clock, *arguments, **options):
        """Run the program in this process with `clock`, a FakeClock, and return its Result."""
        with clock.installed():
            return self.call(*arguments, **options)

    def call_with_pause(self, action, *arguments):
        """Run the program in this process and return its Result.

        `action` is called when the program pauses for the first time, which it must do. Pauses take
        no real time.
        """
        clock = FakeClock()
        move_clock = clock.sleep

        def sleep(seconds):
            move_clock(seconds)
            if len(clock.pauses) == 1:
                action()

        clock.sleep = sleep
        result = self.call_at(clock, *arguments)
        self.assertTrue(clock.pauses, result)
        return result

    def assert_fast(self, limit, action, *arguments):
        """Check that `action` takes less than `limit` seconds. Return its seconds and its result.

        The best of five tries counts, because other programs may keep this machine busy. A delay
        that the program causes is part of every try.
        """
        for _ in range(5):
            began = time.monotonic()
            result = action(*arguments)
            seconds = time.monotonic() - began
            if seconds < limit:
                return seconds, result
        self.fail(f"it took {seconds:.2f} s, not less than {limit} s")

    def interrupt(self, running):
        """Press Ctrl-C and return the Result of `running`, which must end at once.

        It may take one second longer than a Python that only sleeps, which shows how busy this
        machine is.
        """
        code = "import time; print('asleep', file=sys.stderr, flush=True); time.sleep(600)"
        sleeper = self.start_python(code)
        sleeper.wait_for_line("^asleep$")
        for each in (sleeper, running):
            each.process.send_signal(signal.SIGINT)
        sleeper.result()
        began = time.monotonic()
        result = running.result()
        self.assertLess(time.monotonic() - began, 1)
        return result

    def run_command_for(self, endpoint):
        """Run the command of `endpoint` (see ENDPOINTS) from a fresh start, and return its Result.

        Check what is true of the command whatever the endpoint answers.
        """
        if self.token_file.exists():
            self.token_file.unlink()
        if "auth" not in ENDPOINTS[endpoint].command:
            key = "sk-" + "k" * 40
            self.double.api_keys.add(key)
            self.store(lifetime=-10 if endpoint == "refresh" else None, api_key=key)
        arguments = ENDPOINTS[endpoint].command.split()
        # After some responses, the program goes on polling until its time is up.
        if endpoint == "device":
            arguments += ["--timeout", "0.15"]
        result = self.call(*arguments)
        if self.token_file.exists():
            json.loads(self.token_file.read_text())
        self.assertFalse(os.path.exists(f"{self.token_file}.tmp"))
        if result.code:
            self.assertEqual(result.out, "")
        # The output is empty, model names or the report of `status`.
        self.assert_fits(result.out + result.err)
        return result

    @contextlib.contextmanager
    def holding_lock(self, path=None):
        """Hold the lock of `path` (default: the token file), as a process that refreshes does."""
        with open(f"{path or self.token_file}.lock", "w") as held:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(held.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    @contextlib.contextmanager
    def holding_file(self):
        """Hold the token file open without write sharing, as some programs on Windows do."""
        import ctypes

        kernel = ctypes.WinDLL("kernel32")
        kernel.CreateFileW.restype = ctypes.c_void_p
        # GENERIC_READ, FILE_SHARE_READ and OPEN_EXISTING.
        read, share_read, existing = 0x80000000, 1, 3
        handle = kernel.CreateFileW(str(self.token_file), read, share_read, None, existing, 0, None)
        self.assertNotEqual(handle, ctypes.c_void_p(-1).value)
        try:
            yield
        finally:
            kernel.CloseHandle(ctypes.c_void_p(handle))

    @contextlib.contextmanager
    def as_unprivileged_user(self):
        """Switch to another user if this is root, because permissions don't stop root."""
        user, group = os.geteuid(), os.getegid()
        if user == 0:
            os.setegid(NOBODY)
            os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(user)
            os.setegid(group)

    @contextlib.contextmanager
    def as_unprivileged_owner(self):
        """Switch to another user who owns the test's files, if this is root."""
        if os.geteuid() == 0:
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        with self.as_unprivileged_user():
            yield

    def fault(self, endpoint, status, body=b"{}", **headers):
        """Answer every request to `endpoint` with this response from now on."""
        self.double.faults[endpoint] = respond_with(status, body, **headers)

    def fault_once(self, endpoint, status, body=b"{}", **headers):
        """Answer the next request to `endpoint` with this response."""

        def once(handler, _):
            del self.double.faults[endpoint]
            return self.double.reply(handler, status, body, **headers)

        self.double.faults[endpoint] = once

    def hold_response(self, endpoint):
        """Make the double hold its responses at `endpoint` until the returned event is set."""
        released = threading.Event()

        def hold(handler, _):
            released.wait(WAIT_LIMIT)

        self.double.faults[endpoint] = hold
        self.addCleanup(released.set)
        return released

    def sign_in(self, *arguments):
        """Sign in, visiting the URL as the browser would, and return standard error."""
        return self.assert_done(self.call("auth", "--no-browser", *arguments, browser=visit)).err

    def official_sign_in(self, *arguments, browser=visit, **environ):
        """Run `auth --official` while the test plays the browser, and return the Result."""
        command = ("auth", "--official", "--no-browser", *arguments)
        return self.call(*command, browser=browser, environ=environ)

    def stored(self):
        return json.loads(self.token_file.read_text())

    def stored_models(self):
        return json.loads(self.models_file.read_text())

    def store(self, fields=None, mode=0o600, **changes):
        """Write a token file with tokens of the double and return its fields.

        `changes` override fields, and None removes one. `lifetime` is in seconds.
        """
        if fields is None:
            fields = self.double.tokens(changes.pop("lifetime", None))
            del fields["token_type"], fields["expires_in"]
            fields.update(account_id=self.double.account, issuer=self.double.url)
            fields.update(client_id=self.double.client_id, last_refresh="2026-01-01T00:00:00Z")
        fields = {k: v for k, v in {**fields, **changes}.items() if v is not None}
        self.home.mkdir(mode=0o700, exist_ok=True)
        self.token_file.write_text(json.dumps(fields))
        self.token_file.chmod(mode)
        return fields

    def account_file(self, name, file="chatgpt_oauth.json"):
        """Return the path of a file of the account `name`."""
        return self.home / "accounts" / name / file

    def store_expired(self, **changes):
        """Write a token file with an expired access token, and forget the requests so far."""
        self.double.requests.clear()
        return self.store(lifetime=-10, **changes)

    def store_account(self, name, **changes):
        """Write a token file for the account `name` (see store) and return its fields."""
        path = self.account_file(name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with mock.patch.object(self, "token_file", path):
            return self.store(**changes)

    def refresh_with(self, **changes):
        """Run `token` with `changes` in the response to the refresh. Return that and the Result."""
        response = {**self.double.tokens(), **changes}
        self.fault("refresh", 200, response)
        return response, self.call("token")

    # Each of the following methods that takes a Result returns it.

    def assert_no_secret(self, *texts):
        for secret in self.double.secrets():
            for text in texts:
                self.assertNotIn(secret, text)

    def assert_nothing_lost(self):
        """Check that the server still accepts the stored refresh token."""
        token = self.stored()["refresh_token"]
        self.assertNotIn(self.double.refresh_tokens.get(token), (None, "used"))

    def assert_fresh(self, result):
        """Check that `token` printed the stored access token and lost no refresh token."""
        self.assertEqual(result.code, 0, result.err)
        self.assertEqual(result.out, self.stored()["access_token"] + "\n")
        self.assert_nothing_lost()
        return result

    def assert_refreshed_once(self, result):
        """Check that `token` printed the stored access token after exactly one refresh."""
        self.assert_fresh(result)
        self.assertEqual(self.double.count("refresh"), 1)
        return result

    def assert_quiet(self, result):
        """Check that the command succeeded and that standard error is empty."""
        self.assertEqual((result.code, result.err), (0, ""))
        return result

    def assert_done(self, result):
        """Check that the command succeeded and that standard output is empty."""
        self.assertEqual((result.code, result.out), (0, ""), result.err)
        return result

    def assert_fits(self, text):
        """Check that no line of a message is longer than 80 columns.

        URLs, paths, commands and a server's own words don't count. The host name of the double is
        as long as the longest one of OpenAI's.
        """
        text = text.replace(str(self.folder), "/").replace("issuer.example.com", "auth.openai.com")
        for pattern in (
            # The words of a server are "code: text" after the status.
            r"(?<=\(HTTP \d{3}\)): (?!too |server error|unexpected|got a |a proxy|OpenAI ).*",
            # A command comes last. The reasons of the system and of OpenSSL are in parentheses.
            r": (/\S*)?(chatgpt-oauth|py|ss -ltnp|sysctl|netstat|netsh|try \{|set-env|\$).*",
            r"(?<=bad certificate from auth.openai.com) \(.*\)",
            r" \([A-Z][A-Za-z0-9_ ]+\)",
            r"https?://\S+",
            r"/\S+",
        ):
            text = re.sub(pattern, "", text, flags=re.MULTILINE)
        for line in text.split("\n"):
            self.assertLessEqual(len(line), 80, line)

    def assert_fails(self, result, exit_code, *words, after_messages=False, one_line=False):
        """Check that the command failed and printed only an error, which contains all `words`.

        Standard output must be empty. Standard error must be the lines "error: …" and "hint: …",
        and only errors with exit code 2 or 6 may lack the hint. No line may be too long. A
        sign-in shows instructions first. `after_messages` allows other messages before the error.
        `one_line` requires a hint within the error line, as `env` prints it.
        """
        self.assertEqual(result.code, exit_code, result.err)
        self.assertEqual(result.out, "")
        for word in words:
            self.assertIn(word, result.err)
        lines = result.err.splitlines()
        if after_messages or result.err.startswith(SIGN_IN_MESSAGES):
            messages = list(itertools.takewhile(lambda line: not line.startswith("error: "), lines))
            lines = lines[len(messages) :]
        hint = r"\nhint: .+"
        if one_line:
            hint = ""
        elif exit_code not in EXIT_CODES_WITH_HINT:
            hint = f"({hint})?"
        self.assertRegex("\n".join(lines), rf"\Aerror: .+{hint}\Z", result.err)
        self.assert_fits(result.err)
        return result


def run_case(case, method, *arguments):
    """Run one method of a test case outside the suite, including set-up and clean-up."""
    test = case()
    test.setUp()
    try:
        return getattr(test, method)(*arguments)
    finally:
        test.doCleanups()


# ---------------------------------------------------------------------------------------------
# A complete run
# ---------------------------------------------------------------------------------------------


class WholeSessionTest(Case):
    def test_sign_in_use_the_key_and_models_and_sign_out(self):
        running = self.start("auth", "--no-browser")
        pages = visit(running.wait_for_url())
        err = self.assert_done(running.result()).err
        self.assertEqual([page[1] for page in pages], [302, 303, 200])
        self.assertEqual(urllib.parse.urlsplit(pages[-1][0]).path, "/success")
        self.assertEqual(urllib.parse.urlsplit(pages[-1][0]).query, "")
        self.assertIn("You're signed in", pages[-1][3])
        for words in (
            "ada@example.com",
            "API key available",
            "3 of 5",
            "API account",
            "To use the API key in " + ("this shell: eval" if POSIX else f"PowerShell: {PYTHON}"),
        ):
            self.assertIn(words, err)
        self.assertIn(str(self.token_file), err)
        self.assert_no_secret(err, *(page[3] for page in pages))

        stored = self.stored()
        self.assertIn(stored["api_key"], self.double.api_keys)
        self.assertEqual(stored["account_id"], "acct-1")
        self.assertEqual(stored["issuer"], self.double.url)
        self.assertRegex(stored["last_refresh"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")

        out = self.assert_quiet(self.run_program("status")).out
        self.assertTrue(out.startswith("ChatGPT OAuth: Authenticated\nAPI key available\n"), out)
        self.assertIn("ada@example.com", out)
        self.assertIn("in 10 days (", out)
        self.assert_no_secret(out)

        models = self.stored_models()
        self.assert_no_secret(json.dumps(models))
        self.assertEqual(
            models["chatgpt-gpt-4o"],
            {
                "type": "custom_openai",
                "name": "gpt-4o",
                "custom_endpoint": {
                    "url": self.double.url + "/v1",
                    "api_key": "$CHATGPT_OAUTH_API_KEY",
                },
                "context_length": 128000,
                "oauth_source": "chatgpt-oauth-plugin",
            },
        )
        self.assertEqual(sorted(models), ["chatgpt-gpt-4o", "chatgpt-o1-mini", "chatgpt-o3-pro"])

        out = self.assert_quiet(self.run_program("env", "--shell", "bash")).out
        self.assertEqual(out, f"export CHATGPT_OAUTH_API_KEY='{stored['api_key']}'\n")
        result = self.run_program("token")
        self.assertEqual(result, (0, stored["access_token"] + "\n", ""))
        result = self.run_program("token", "--api-key")
        self.assertEqual((result.code, result.out), (0, stored["api_key"] + "\n"))

        err = self.assert_done(self.run_program("logout")).err
        self.assertIn("platform.openai.com", err)
        self.assertFalse(self.token_file.exists())
        self.assertEqual(self.stored_models(), {})
        self.assertNotIn(stored["refresh_token"], self.double.refresh_tokens)
        err = self.assert_done(self.run_program("logout")).err
        self.assertIn("nothing to do", err)


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------


class SettingsTest(Case):
    def test_every_setting_has_a_rule(self):
        self.assertEqual(list(oauth.RULES), list(oauth.CHATGPT_OAUTH_CONFIG))

    def test_a_bad_setting_is_refused_by_name_before_any_request(self):
        # os.fsdecode() turns UTF-8 into what os.environ would contain in this locale.
        bad = {
            "issuer": (
                *("", "http://example.com", "ftp://x", "https://u:p@h", "https://h?x"),
                *("https://h:65536", "https://[zz]", "https://[:::]", "https://[1.2.3.4]"),
                *("https://a..b", "https://."),
            ),
            "client_id": ("", "a b", "a\x1b"),
            "scope": ("", "a\nb"),
            "redirect_host": ("http://0.0.0.0", "https://localhost", ""),
            "redirect_path": ("", "success", "a b", "a?b"),
            "callback_bind": ("localhost", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.4:80", "x::1"),
            "required_port": ("", "0", "65536", "x", "-1", "1.5", os.fsdecode("\u0663".encode())),
            "fallback_port": ("0",),
            "callback_timeout": ("0", "x", "inf", "nan", "-1", "1e3"),
            "api_base_url": ("http://example.com", ""),
            "codex_base_url": ("http://10.0.0.1", "https://"),
            "usage_url": ("http://10.0.0.1",),
            "codex_client_version": ("", "a b", "a&b"),
            "home": ("", "~nobody-of-this-name/x"),
            "account": ("Work", "plan", ".."),
            "prefix": ("", "-x", "a b"),
            "workspace": ("a b", "a/b", "x" * 129),
            "default_context_length": ("0", "x", "", "None", "1000000001"),
            "model_patterns": ("", "a b"),
            "model_excludes": ("a b",),
            "chat_patterns": ("a b",),
            "model_source": ("", "x"),
            "agent_name": ("", " a", "a\nb", os.fsdecode("\u00e9".encode()), "a" * 101),
            "originator": ("", "a b", "a\r\nb: c"),
            "request_timeout": ("0",),
            "retry_window": ("x",),
            "lock_timeout": ("x",),
            "api_key_env_var": ("", "1a", "a-b", "a;b"),
        }
        self.assertEqual(set(bad), set(oauth.CHATGPT_OAUTH_CONFIG))
        self.store(lifetime=-10)
        for key, values in bad.items():
            name = "CHATGPT_OAUTH_" + key.upper()
            for value in values:
                with self.subTest(name, value=value):
                    self.assert_fails(self.call("token", environ={name: value}), 2, name)
        self.assertEqual(self.double.requests, [])

    def test_the_config_dict_can_be_edited_and_is_validated(self):
        self.double.api_keys.add("sk-mine")
        self.store(api_key="sk-mine")
        with mock.patch.dict(oauth.CHATGPT_OAUTH_CONFIG, {"prefix": "mine-"}):
            out = self.call("models", "--dry-run").out
            self.assertEqual(out.split(), ["mine-gpt-4o", "mine-o1-mini", "mine-o3-pro"])
        with mock.patch.dict(oauth.CHATGPT_OAUTH_CONFIG, {"request_timeout": 0.2}):
            self.double.delay = 1
            self.assert_fails(self.call("models"), 5, "0.2 s")
        with mock.patch.dict(oauth.CHATGPT_OAUTH_CONFIG, {"issuer": "http://example.com"}):
            environ = {"CHATGPT_OAUTH_ISSUER": "x"}
            self.assert_fails(self.call("token", environ=environ), 2, "CHATGPT_OAUTH_ISSUER")
            environ = {"CHATGPT_OAUTH_ISSUER": None}
            where = 'CHATGPT_OAUTH_CONFIG["issuer"]'
            self.assert_fails(self.call("token", environ=environ), 2, where)

    def test_home_follows_xdg_data_home(self):
        base = str(self.folder / "data")
        for environ, home in (
            ({}, self.home),
            ({"XDG_DATA_HOME": base}, os.path.join(base, "code_puppy")),
            ({"XDG_DATA_HOME": ""}, self.home),
            ({"CHATGPT_OAUTH_HOME": base}, base),
        ):
            out = self.call("status", "--json", environ=environ).out
            path = os.path.join(home, "chatgpt_oauth.json")
            self.assertEqual(json.loads(out)["token_file"], path)

    def test_a_missing_home_names_the_variable_to_set(self):
        with contextlib.ExitStack() as stack:
            if POSIX:
                import pwd

                stack.enter_context(mock.patch.object(pwd, "getpwuid", side_effect=KeyError))
            unset = dict.fromkeys(("HOME", "USERPROFILE"))
            name = "HOME" if POSIX else "USERPROFILE"
            err = self.assert_fails(self.call("status", environ=unset), 2, f"{name} is not set").err
            self.assertIn(f"set {name} or CHATGPT_OAUTH_HOME", err)
            environ = {**unset, "CHATGPT_OAUTH_HOME": str(self.home)}
            self.assertEqual(self.call("status", environ=environ).code, 3)

    @unittest.skipUnless(sys.platform == "win32", "only Windows has device names")
    def test_a_windows_device_name_is_refused_as_home(self):
        for name in ("con", "nul", "com1", "aux.txt"):
            result = self.call("auth", environ={"CHATGPT_OAUTH_HOME": name})
            self.assert_fails(result, 2, "CHATGPT_OAUTH_HOME must be", "device")

    @unittest.skipUnless(POSIX, "Windows does not remove a directory in use")
    def test_a_relative_path_in_a_deleted_directory_is_refused(self):
        relative = "x is a relative path", "the current directory is gone"
        for words, environ, shown in (
            (["status"], {"CHATGPT_OAUTH_HOME": "x"}, ("CHATGPT_OAUTH_HOME",)),
            (["install", "--bin", "x"], {}, relative),
            (["uninstall", "--bin", "x"], {}, relative),
        ):
            code = "mkdir d; cd d; rmdir ../d; exec " + shlex.join([*PROGRAM_COMMAND, *words])
            self.assert_fails(self.run_shell(code, environ, cwd=str(self.folder)), 2, *shown)

    def test_a_trailing_slash_of_the_issuer_is_ignored(self):
        environ = {"CHATGPT_OAUTH_ISSUER": "https://example.com/a/"}
        out = self.call("status", "--json", environ=environ).out
        self.assertEqual(json.loads(out)["issuer"], "https://example.com/a")
        self.store(lifetime=-10)
        environ = {"CHATGPT_OAUTH_ISSUER": self.double.url + "/"}
        self.assert_fresh(self.call("token", environ=environ))


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


class ErrorsTest(Case):
    def test_an_error_is_one_line_and_its_hint_another_line(self):
        def no_refresh_token():
            self.store(lifetime=-10, refresh_token=None)

        def server_down():
            self.store(lifetime=-10)
            self.double.close()

        self.environ["CHATGPT_OAUTH_RETRY_WINDOW"] = "0.01"
        for exit_code, command, prepare in (
            (3, "token", lambda: None),
            (2, "token --refresh --api-key", lambda: None),
            (1, "token --api-key", self.store),
            (4, "token", no_refresh_token),
            (6, "token", lambda: self.token_file.write_text("{")),
            (5, "token", server_down),
        ):
            with self.subTest(exit_code):
                prepare()
                self.assert_fails(self.call(*command.split()), exit_code)

    def test_the_hint_depends_on_the_endpoint_and_its_response(self):
        refusal = b'{"error": "odd"}'
        for endpoint, code, body, hint in (
            ("usercode", 400, refusal, r"hint: to sign in without a code, run: .* auth\n"),
            ("usercode", 200, b"{}", r"hint: to sign in without a code, run: .* auth\n"),
            ("device", 400, refusal, r"hint: to try again, run: .* auth --device\n"),
            ("code", 400, refusal, r"hint: to try again, run: .* auth --device\n"),
            ("refresh", 302, b"", r"hint: try again; if that fails, sign in again with: .* auth\n"),
            ("refresh", 407, b"", r"hint: check the name and password in HTTPS_PROXY \("),
            ("api", 407, b"", r"hint: check the name and password in HTTPS_PROXY \("),
            (
                "api",
                403,
                refusal,
                r"hint: to use your plan's models, run: .* models --source codex",
            ),
        ):
            with self.subTest(endpoint, code=code, body=body):
                self.double.faults = {endpoint: respond_with(code, body)}
                self.assertRegex(self.run_command_for(endpoint).err, hint)

    def test_an_internal_error_names_a_line_of_the_program(self):
        self.store()
        code = """
import json
import chatgpt_oauth as oauth
def broken_loads(*_, **__):
    raise ZeroDivisionError
json.loads = broken_loads
sys.exit(oauth.main(["token"]))
"""
        result = self.start_python(code).result()
        pattern = r"error: internal error: ZeroDivisionError at line (\d+); this is a bug\n"
        found = re.search(pattern, result.err)
        self.assertTrue(found, result)
        program = pathlib.Path(PROGRAM).read_text(encoding="utf-8").splitlines()
        self.assertIn("json.loads(", program[int(found[1]) - 1])

    def test_short_secrets_are_removed_from_server_messages(self):
        self.store(lifetime=-10, refresh_token="rt_1")
        self.fault(
            "refresh", 400, b'{"error": "rt_1 is bad", "error_description": "rt_1 was sent"}'
        )
        err = self.assert_fails(self.call("token"), 4).err
        self.assertIn("(HTTP 400): [...] is bad: [...] was sent\n", err)

    def test_no_repr_shows_a_secret(self):
        fields = self.store(lifetime=-10, api_key="sk-1")
        reprs = {}

        def inspect_objects(handler, _):
            # A traceback with local variables could print any of these objects.
            for each in gc.get_objects():
                if type(each).__module__ == oauth.__name__:
                    reprs[type(each).__name__] = repr(each)

        self.double.faults["refresh"] = inspect_objects
        self.assert_quiet(self.call("token"))
        # At least the settings, the store, the session and the tokens must be among them.
        self.assertGreaterEqual(len(reprs), 4, reprs)
        for secret in (fields["access_token"], fields["refresh_token"], "sk-1"):
            self.assertNotIn(secret, "".join(reprs.values()))

    def test_the_process_list_shows_no_secret(self):
        self.require(command_succeeds("ps", "axww"), "no ps here, or no /proc for it")
        self.double.delay = 0.15
        running, url = self.start_sign_in()
        listings = []
        stop = threading.Event()

        def list_processes():
            while not stop.wait(0.03):
                listings.append(self.run_command(["ps", "axww"]).out)

        watcher = threading.Thread(target=list_processes, daemon=True)
        watcher.start()
        self.finish_sign_in(running, url)
        stop.set()
        watcher.join(WAIT_LIMIT)
        self.assertTrue(any(PROGRAM in each for each in listings))
        self.assert_no_secret(*listings)


# ---------------------------------------------------------------------------------------------
# Wire
# ---------------------------------------------------------------------------------------------


def send_bytes(*parts, pause=0.0):
    """Return a fault that sends each part, pauses for `pause` seconds, and finally hangs up."""

    def fault(handler, _):
        handler.close_connection = True
        with contextlib.suppress(OSError):
            for part in parts:
                handler.connection.sendall(part)
                time.sleep(pause)
            handler.connection.shutdown(socket.SHUT_RDWR)
        return True

    return fault


def echo_request(handler, fields):
    """Answer with an error that repeats everything that was sent, including the tokens."""
    sent = " ".join([*map(str, fields.values()), str(handler.headers.get("Authorization"))])
    error = {"code": sent, "message": "\x1b[31m\u202e" + sent}
    return Double.reply(handler, 401, {"error": error})


HTTP_OK = b"HTTP/1.1 200 OK\r\n"
WRONG_TYPES = dict.fromkeys(("access_token", "refresh_token", "id_token", "data", "models"), 5)
BAD_RESPONSES = {
    "empty": respond_with(200, b""),
    "no content": respond_with(204, b""),
    "a web page": respond_with(200, b"<!doctype html><title>Hello</title>"),
    "a region block": respond_with(403, b"<html>Just a moment...</html>", Content_Type="text/html"),
    "a list": respond_with(200, b"[]"),
    "null": respond_with(200, b"null"),
    "a number": respond_with(200, b"5"),
    "a string": respond_with(200, b'"x"'),
    "an empty object": respond_with(200, b"{}"),
    "wrong types": respond_with(200, WRONG_TYPES),
    "lists of wrong types": respond_with(
        200, b'{"data": [1, null, {"id": 5}], "models": [[], {}]}'
    ),
    "not a number": respond_with(200, b'{"access_token": NaN, "expires_in": Infinity}'),
    "tokens with spaces": respond_with(
        200, b'{"access_token": "a b", "authorization_code": "a b"}'
    ),
    "tokens with a newline": respond_with(200, b'{"access_token": "a\\nb"}'),
    "tokens for a shell": respond_with(200, b'{"access_token": "a\';reboot;\'"}'),
    "deep lists": respond_with(200, b"[" * 100000),
    "deep objects": respond_with(200, b'{"a":' * 100000),
    "a huge number": respond_with(200, b'{"access_token": ' + b"9" * 5000 + b"}"),
    "too much": respond_with(200, b'"' + b"x" * (9 << 20) + b'"'),
    "invalid UTF-8": respond_with(200, b'{"access_token": "\xff\xfe"}'),
    "cut off": send_bytes(HTTP_OK + b"Content-Length: 1000\r\n\r\n{"),
    "a broken chunk": send_bytes(HTTP_OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "a redirect": respond_with(302, b"", Location="http://127.0.0.1:9/"),
    "a redirect that keeps the body": respond_with(307, b"", Location="http://127.0.0.1:9/"),
    "too many requests": respond_with(429, b"{}", Retry_After="99999999999999999999999"),
    "an absurd delay": respond_with(503, b"{}", Retry_After="-1e999"),
    "an error of the server": respond_with(500, b"oops"),
    "a proxy that wants a password": respond_with(407, b"{}"),
    "slow by a byte": send_bytes(
        HTTP_OK + b"Content-Length: 100\r\n\r\n", *[b"{"] * 50, pause=0.02
    ),
    "headers slow by a byte": send_bytes(HTTP_OK, *[b"a"] * 50, pause=0.02),
    "silence": send_bytes(b"", pause=0.5),
    "hung up": send_bytes(b""),
    "no HTTP": send_bytes(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "a huge header": send_bytes(HTTP_OK + b"A: " + b"b" * 100000 + b"\r\n\r\n"),
    "a strange status": send_bytes(b"HTTP/1.1 999 \x1b[31mX\r\nContent-Length: 0\r\n\r\n"),
    "an echo of the request": echo_request,
}


class WireTest(Case):
    def test_the_authorization_request_matches_the_codex_cli(self):
        running, url = self.start_sign_in()
        fields = query(url)
        self.assertEqual(fields["originator"], "chatgpt_oauth")
        self.assertEqual(fields["redirect_uri"], f"http://localhost:{self.ports[0]}/auth/callback")
        # In base64url, 43 characters are 32 bytes, and 86 characters are 64.
        self.assertEqual(len(fields["state"]), 43)
        self.assertNotIn("+", url)
        visit(url)
        self.assertEqual(running.result().code, 0)
        sent = self.double.requests_to("code")[0]
        self.assertEqual(len(sent["code_verifier"]), 86)
        agent = f"chatgpt_oauth/{oauth.__version__}"
        for entry in self.double.requests:
            if entry["endpoint"] != "authorize":
                self.assertTrue(entry["headers"]["user-agent"].startswith(agent))

    def check_bad_response(self, answer):
        """Check that commands report BAD_RESPONSES[answer] in time, at each endpoint in turn."""
        self.environ["CHATGPT_OAUTH_REQUEST_TIMEOUT"] = "0.2"
        self.environ["CHATGPT_OAUTH_RETRY_WINDOW"] = "0.01"
        for endpoint in TESTED_ENDPOINTS:
            self.double.faults = {endpoint: BAD_RESPONSES[answer]}
            _, result = self.assert_fast(5, self.run_command_for, endpoint)
            context = (answer, endpoint, result)
            # `status` reports problems on standard output.
            text = result.out + result.err
            self.assertTrue(all(line.isprintable() for line in text.split("\n")), context)
            if result.code in EXIT_CODES_WITH_HINT and "status" not in ENDPOINTS[endpoint].command:
                self.assertRegex(result.err, r"(\A|\n)error: .+\nhint: .+\n\Z", context)
            # These two answers are valid at some endpoints.
            if answer not in ("lists of wrong types", "no content"):
                self.assertEqual(result.code in (1, 4, 5), ENDPOINTS[endpoint].fatal, context)
            for secret in self.double.secrets():
                self.assertNotIn(secret, text, context)

    def test_every_bad_response_is_reported_in_time(self):
        def run_share(answers):
            command = [sys.executable, TEST_FILE, "bad-responses", *answers]
            return self.run_command(command, timeout=TEST_LIMIT)

        shares = [list(BAD_RESPONSES)[number::WORKERS] for number in range(WORKERS)]
        for result in run_in_parallel(run_share, shares):
            self.assert_quiet(result)

    def test_an_html_error_names_the_proxy_and_the_region(self):
        self.store(api_key="sk-1")
        self.fault("api", 403, b"<html>")
        self.assert_fails(self.call("models"), 5, "proxy", "region")

    def start_proxy(self, *parts, pause=0.0):
        """Start a proxy that answers each request like send_bytes, and return its port."""
        fault = send_bytes(*parts, pause=pause)
        proxy = Server(lambda handler: fault(handler, None))
        self.addCleanup(proxy.close)
        return proxy.server_port

    def use_untrusted_issuer(self):
        """Set up a proxy and, behind it, an issuer with an untrusted certificate.

        Returns the proxy and the path of the certificate.
        """
        certificate, key = make_certificate(self.folder, "issuer.example.com")
        self.double.use_tls(certificate, key)
        proxy = Proxy(self.double.server.server_port)
        self.addCleanup(proxy.close)
        self.store(lifetime=-10, issuer="https://issuer.example.com")
        self.environ.update(CHATGPT_OAUTH_ISSUER="https://issuer.example.com")
        self.environ.update(HTTPS_PROXY=proxy.url, NO_PROXY="", CHATGPT_OAUTH_RETRY_WINDOW="0.01")
        return proxy, certificate

    @contextlib.contextmanager
    def patched_lookups(self, addresses=(), pause=0.0):
        """Make name lookups in this process take `pause` seconds and return `addresses` first.

        Each of `addresses` is the family and the address of a socket. The real ones follow.
        """
        real = socket.getaddrinfo
        found = [
            (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)
            for family, address in addresses
        ]

        def slow(*arguments, **options):
            time.sleep(pause)
            return found + real(*arguments, **options)

        with mock.patch.object(socket, "getaddrinfo", slow):
            yield

    def dead_address(self, host):
        """Return the family and the address of a socket that accepts no connection."""
        listener = bind(host)
        self.addCleanup(listener.close)
        listener.listen(0)
        # Once its queue is full, Linux ignores further connections. Other systems may refuse them.
        for _ in range(2):
            filler = socket.socket(listener.family)
            self.addCleanup(filler.close)
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        return listener.family, listener.getsockname()

    def refresh_once(self):
        """Refresh the token in this process with exactly one request."""
        self.store_expired()
        self.assert_refreshed_once(self.call("token"))

    def refresh_over_bad_networks(self, rounds):
        """Refresh with dead addresses, slow name lookups and slow answers, and lose nothing."""
        self.environ["CHATGPT_OAUTH_REQUEST_TIMEOUT"] = "1.5"
        self.environ["CHATGPT_OAUTH_RETRY_WINDOW"] = "0.01"
        dead = [self.dead_address("127.0.0.1") for _ in range(2)]
        for _ in range(rounds):
            self.store(lifetime=-10)
            # Half of the time, 0.75 seconds, is for connecting, and half for the answer.
            self.double.delay = random.uniform(0, 0.4)
            addresses = random.sample(dead, random.randint(0, 2))
            with self.patched_lookups(addresses, pause=random.uniform(0, 0.9)):
                result = self.call("token")
            if result.code:
                self.assert_fails(result, 5, "no connection to 127.0.0.1")
            self.assert_nothing_lost()

    def test_bad_networks_cost_no_token(self):
        self.refresh_over_bad_networks(2)

    def test_dead_addresses_cost_a_quarter_of_a_second_each(self):
        dead = [self.dead_address("127.0.0.1") for _ in range(2)]
        with self.patched_lookups(dead):
            seconds, _ = self.assert_fast(1, self.refresh_once)
        self.require(sys.platform == "linux", "a full queue may refuse connections here")
        self.assertGreater(seconds, 0.5)

    def test_ipv6_and_ipv4_addresses_take_turns(self):
        try:
            dead = [self.dead_address("::1") for _ in range(4)]
        except OSError:
            self.skipTest("no IPv6 here")
        # Trying all four of these first would take a second.
        with self.patched_lookups(dead):
            self.assert_fast(0.75, self.refresh_once)

    def test_an_address_that_refuses_is_skipped_at_once(self):
        with bind("127.0.0.1") as unused:
            refusing = [(unused.family, unused.getsockname())] * 20
            with self.patched_lookups(refusing):
                self.assert_fast(1, self.refresh_once)

    def test_dead_addresses_of_a_proxy_are_skipped_too(self):
        port = self.start_proxy(b"HTTP/1.1 407 No\r\n\r\n")
        dead = [self.dead_address("127.0.0.1") for _ in range(2)]
        self.environ["HTTPS_PROXY"] = f"http://127.0.0.1:{port}"
        self.environ["CHATGPT_OAUTH_ISSUER"] = "https://issuer.example.com"
        with self.patched_lookups(dead):
            _, result = self.assert_fast(1, self.call, "auth", "--device")
        self.assert_fails(result, 5, "the proxy answered HTTP 407")

    def test_connecting_may_take_half_of_the_timeout(self):
        self.environ["CHATGPT_OAUTH_REQUEST_TIMEOUT"] = "0.8"
        self.environ["CHATGPT_OAUTH_RETRY_WINDOW"] = "0.01"
        words = "no connection to 127.0.0.1", "in 0.4 s"
        self.store(lifetime=-10)
        real_lookup, given_up = socket.getaddrinfo, threading.Event()

        def look_up_late(*arguments, **options):
            given_up.wait(WAIT_LIMIT)
            return real_lookup(*arguments, **options)

        threads = set(threading.enumerate())
        with mock.patch.object(socket, "getaddrinfo", look_up_late):
            self.assert_fails(self.call("token"), 5, *words)
        # Wait until the lookup has ended, and the connection that it leads to.
        given_up.set()
        wait_for(lambda: set(threading.enumerate()) <= threads)
        with self.subTest("connecting"):
            self.require(sys.platform == "linux", "a full queue may refuse connections here")
            dead = self.dead_address("127.0.0.1")
            with mock.patch.object(socket, "getaddrinfo") as look_up:
                look_up.return_value = [
                    (dead[0], socket.SOCK_STREAM, socket.IPPROTO_TCP, "", dead[1])
                ]
                self.assert_fails(self.call("token"), 5, *words)
        self.assertEqual(self.double.requests, [])
        self.environ["CHATGPT_OAUTH_REQUEST_TIMEOUT"] = "30"
        self.assert_fresh(self.call("token"))

    def test_a_slow_proxy_spends_no_token(self):
        port = self.start_proxy(b"", b"HTTP/1.1 200 OK\r\n\r\n", pause=0.5)
        self.environ["HTTPS_PROXY"] = f"http://127.0.0.1:{port}"
        self.environ["CHATGPT_OAUTH_ISSUER"] = "https://issuer.example.com"
        self.environ["CHATGPT_OAUTH_REQUEST_TIMEOUT"] = "0.8"
        self.environ["CHATGPT_OAUTH_RETRY_WINDOW"] = "0.01"
        before = self.store(lifetime=-10, issuer="https://issuer.example.com")
        words = "no connection to issuer.example.com", "check HTTPS_PROXY"
        err = self.assert_fails(self.call("token"), 5, *words).err
        self.assertNotIn("sign in again", err)
        self.assertEqual(self.stored(), before)

    def test_a_response_may_take_the_time_that_connecting_did_not_use(self):
        self.environ["CHATGPT_OAUTH_REQUEST_TIMEOUT"] = "2"
        # This is more than half of the time, which is all that a slow connection would leave.
        self.double.delay = 1.2
        self.store(lifetime=-10)
        with self.patched_lookups(pause=0.1):
            self.assert_fresh(self.call("token"))

    def call_at_silence(self, message, *arguments):
        """Run the program. Its refresh gets `message`, and then the connection stays open.

        Time passes only once the program has read the message and wants more.
        """
        clock, wants_more = FakeClock(), threading.Event()
        real_readinto = socket.SocketIO.readinto
        arrived = b""

        def readinto(stream, buffer):
            nonlocal arrived
            if arrived.endswith(message):
                wants_more.set()
            count = real_readinto(stream, buffer)
            arrived += bytes(buffer[: count or 0])
            return count

        def fault(handler, fields):
            handler.close_connection = True
            handler.connection.sendall(message)
            return wants_more.wait(WAIT_LIMIT) and clock.silence(handler, fields)

        self.double.faults["refresh"] = fault
        with mock.patch.object(socket.SocketIO, "readinto", readinto), clock.installed():
            return self.call(*arguments)

    def test_a_complete_body_is_used_even_if_the_connection_is_reset(self):
        self.store(lifetime=-10)
        body = json.dumps(self.double.tokens()).encode()
        head = HTTP_OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body)

        def fault(handler, _):
            handler.close_connection = True
            handler.connection.sendall(head + body + b"\r\n")
            # Give the program time to read this, because some systems drop unread bytes.
            time.sleep(0.2)
            # Closing the socket without lingering resets the connection.
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            socket.close(handler.connection.detach())
            return True

        self.double.faults["refresh"] = fault
        self.assertEqual(self.assert_fresh(self.call("token", "--refresh")).err, "")

    def test_a_complete_body_is_used_even_if_the_response_has_no_end(self):
        for is_chunked, is_open in itertools.product((False, True), repeat=2):
            with self.subTest(is_chunked=is_chunked, is_open=is_open):
                self.store(lifetime=-10)
                body = json.dumps(self.double.tokens()).encode()
                head, end = HTTP_OK + b"\r\n", b""
                if is_chunked:
                    # After this chunk, the last one is missing, which would have the length 0.
                    head = HTTP_OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body)
                    end = b"\r\n"
                complete, incomplete = head + body + end, head + body[:-2]
                if is_open:
                    result = self.call_at_silence(complete, "token", "--refresh")
                    broken = self.call_at_silence(incomplete, "token", "--refresh")
                else:
                    self.double.faults["refresh"] = send_bytes(complete)
                    result = self.call("token", "--refresh")
                    self.double.faults["refresh"] = send_bytes(incomplete)
                    broken = self.call("token", "--refresh")
                self.assertEqual(self.assert_fresh(result).err, "")
                self.assert_fails(broken, 5, "no answer" if is_open else "not a JSON object")

    def test_deeply_nested_members_do_not_lose_the_tokens(self):
        for depth in (500, 1000, 50000):
            for opening, closing in ((b"[", b"]"), (b'{"]": ', b"}")):
                self.store(lifetime=-10)
                # Brackets in a string are no nesting.
                tokens = json.dumps({**self.double.tokens(), "note": '\\"[['}).encode()
                deep = opening * depth + b"1" + closing * depth
                body = b'{"first": ' + deep + b"," + tokens[1:-1] + b', "last": ' + deep + b"}"
                self.fault("refresh", 200, body)
                self.assert_fresh(self.call("token"))

    def test_a_response_that_does_not_fit_into_memory_is_an_error(self):
        self.store(lifetime=-10)
        with mock.patch.object(http.client.HTTPResponse, "read1", side_effect=MemoryError):
            self.assert_fails(self.call("token"), 5, "memory")

    def test_informational_responses_are_skipped(self):
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n"
        for informational in (
            hints,
            b"HTTP/1.1 102 Processing\r\n\r\n" * 3,
            b"HTTP/1.1 100 Continue\r\n\r\n" + hints,
        ):
            for in_one_piece in (True, False):
                self.store(lifetime=-10)
                body = json.dumps(self.double.tokens()).encode()
                head = HTTP_OK + f"Content-Length: {len(body)}\r\n\r\n".encode()
                parts = [informational, head, body]
                if in_one_piece:
                    parts = [b"".join(parts)]
                self.double.faults["refresh"] = send_bytes(*parts, pause=0.01)
                self.assertEqual(self.assert_fresh(self.call("token")).err, "")
        self.store(lifetime=-10)
        self.double.faults["refresh"] = send_bytes(*[hints] * 60, pause=0.01)
        environ = {"CHATGPT_OAUTH_REQUEST_TIMEOUT": "0.2"}
        self.assert_fails(self.call("token", environ=environ), 5, "no answer from")

    def test_redirects_are_never_followed(self):
        other = self.another_double()
        for endpoint in TESTED_ENDPOINTS:
            for status, location in ((302, other.url), (307, other.url), (308, "http://[")):
                with self.subTest(endpoint, status=status):
                    self.double.faults = {
                        endpoint: respond_with(status, b"", Location=location + "/x")
                    }
                    result = self.run_command_for(endpoint)
                    self.assertEqual(bool(result.code), ENDPOINTS[endpoint].fatal)
                    self.assertIn(f"(HTTP {status}): unexpected redirect", result.out + result.err)
        self.assertEqual(other.requests, [])

    def test_an_unreachable_server_exits_with_5_and_spends_no_token(self):
        before = self.store(lifetime=-10)
        environ = {"CHATGPT_OAUTH_RETRY_WINDOW": "0.1"}
        self.double.close()
        self.assert_fails(self.call("token", environ=environ), 5, "token: 127.0.0.1:")
        self.assertEqual(self.stored(), before)
        self.assertFalse((self.home / "chatgpt_oauth.json.tmp").exists())

    def certificate_hint(self):
        """Return the hint to expect: it depends on whether this system has CA certificates."""
        paths = ssl.get_default_verify_paths()
        places = [paths.openssl_cafile, *pathlib.Path(paths.openssl_capath).glob("*")]
        has_certificates = not POSIX or any(map(os.path.exists, places))
        return "SSL_CERT_FILE" if has_certificates else "apt install ca-certificates"

    @unittest.skipUnless(shutil.which("openssl"), "no openssl here")
    def test_an_untrusted_certificate_names_the_variable_to_set(self):
        proxy, _ = self.use_untrusted_issuer()
        before = self.stored()
        environ = {"CHATGPT_OAUTH_RETRY_WINDOW": "60"}
        self.assert_fails(self.run_program("token", environ=environ), 5, self.certificate_hint())
        # The program must not try again.
        self.assertEqual(len(proxy.seen), 1)
        self.assertEqual(self.double.requests, [])
        self.assertEqual(self.stored(), before)

    @unittest.skipUnless(shutil.which("openssl"), "no openssl here")
    def test_an_invalid_certificate_file_is_named(self):
        _, certificate = self.use_untrusted_issuer()
        (self.folder / "empty.pem").write_text("")
        (self.folder / "text.pem").write_text("hello\n")
        for name in ("missing.pem", "empty.pem", "text.pem"):
            for variable in ("SSL_CERT_FILE", "CODEX_CA_CERTIFICATE"):
                path = str(self.folder / name)
                environ = {"SSL_CERT_FILE": certificate, variable: path}
                self.assert_fails(self.call("token", environ=environ), 5, variable, path)
        self.assertEqual(self.double.requests, [])
        environ = {"CODEX_CA_CERTIFICATE": certificate, "SSL_CERT_FILE": os.devnull}
        self.assert_fresh(self.run_program("token", environ=environ))

    @unittest.skipUnless(shutil.which("openssl"), "no openssl here")
    @unittest.skipUnless(sys.implementation.name == "cpython", "PyPy does not name the file")
    def test_an_unwritable_key_log_is_named(self):
        _, certificate = self.use_untrusted_issuer()
        environ = {"SSL_CERT_FILE": certificate, "SSLKEYLOGFILE": str(self.folder / "none/keys")}
        # Python ignores the variable in a child process, so `token` must do without one.
        for command in (["token"], ["auth", "--device"]):
            result = self.run_command([*FROZEN_COMMAND, *command], environ)
            self.assert_fails(result, 5, "SSLKEYLOGFILE")
        self.assertEqual(self.double.requests, [])

    def test_certificates_that_fail_to_load_are_reported(self):
        code = """
import ssl, chatgpt_oauth
def load(*_):
    raise FileNotFoundError(2, "")  # as PyPy raises it without CA certificates
ssl.SSLContext.load_default_certs = load
chatgpt_oauth.run_program()
"""
        result = self.start_python(code, "auth", "--no-browser").result()
        err = self.assert_fails(result, 5, "TLS: CA certificates: ", "hint: ").err
        self.assertNotIn("SSLKEYLOGFILE", err)

    def test_a_refusal_by_the_proxy_shows_no_credentials(self):
        basic = base64.b64encode(b"user:hunter2").decode()
        refusal = f"HTTP/1.1 407 user:hunter2 Basic {basic} is wrong\r\n\r\n".encode()
        environ = {
            "HTTPS_PROXY": f"http://user:hunter2@127.0.0.1:{self.start_proxy(refusal)}",
            "NO_PROXY": "127.0.0.1",
            "CHATGPT_OAUTH_ISSUER": "https://issuer.example.com",
        }
        result = self.run_program("auth", "--device", environ=environ)
        err = self.assert_fails(result, 5, "the proxy answered HTTP 407", "HTTPS_PROXY").err
        self.assertNotIn("hunter2", err)
        self.assertNotIn(basic, err)

    def test_a_region_block_is_reported(self):
        error = {"code": "unsupported_country_region_territory", "message": "Not supported"}
        self.store(lifetime=-10)
        for endpoint, command in (("refresh", ["token"]), ("usercode", ["auth", "--device"])):
            self.fault(endpoint, 403, {"error": error})
            self.assert_fails(self.call(*command), 5, "region", "use a network")
        self.assert_nothing_lost()

    def exception_of(self, call, *prelude):
        """Run `call` in a new Python and return the class and text of the exception it raises.

        It starts no child process, so that the code in `prelude` takes effect on requests.
        """
        code = (
            "\n".join(prelude)
            + f"""
import chatgpt_oauth as oauth
sys.frozen = True
try:
    {call}
except oauth.OAuthError as error:
    print("OAuthError", error)
except BaseException as error:
    print(type(error).__name__, error)
"""
        )
        result = self.start_python(code).result()
        self.assertNotIn("Traceback", result.err)
        return result.out

    def test_missing_threads_or_tls_are_named_and_spend_no_token(self):
        limited = """
import threading
left, start = {0}, threading.Thread.start
def limited(self):
    global left
    if not left:
        raise RuntimeError("can't start new thread")
    left -= 1
    start(self)
threading.Thread.start = limited
"""
        no_tls = "sys.modules['_ssl'] = None"
        self.store(lifetime=-10)
        token = "oauth.get_access_token()"
        self.assertRegex(self.exception_of(token, limited.format(0)), "OAuthError.*new thread")
        sign_in = "oauth.sign_in(open_browser=False, timeout=0.3)"
        # The listener has a thread for 127.0.0.1 and, if there is IPv6, another one for ::1.
        for allowed, words in ((0, "new thread"), (1, "new thread|timed out")):
            exception = self.exception_of(sign_in, limited.format(allowed))
            self.assertRegex(exception, f"^OAuthError.*({words})")
        self.assertEqual(self.double.requests, [])
        self.assert_nothing_lost()
        self.environ["CHATGPT_OAUTH_RETRY_WINDOW"] = "0.01"
        self.double.close()
        self.assertRegex(self.exception_of(token, no_tls), "OAuthError.*127.0.0.1")
        self.store(lifetime=-10, issuer="https://127.0.0.1:9")
        self.environ["CHATGPT_OAUTH_ISSUER"] = "https://127.0.0.1:9"
        self.assertRegex(self.exception_of(token, no_tls), "OAuthError.*TLS")

    @unittest.skipUnless(shutil.which("openssl"), "no openssl here")
    def test_the_hint_for_an_untrusted_certificate_names_the_ca_certificates_in_use(self):
        self.use_untrusted_issuer()
        other = make_certificate(self.folder, "other.example.com")[0]
        for name, path in (("SSL_CERT_FILE", other), ("SSL_CERT_DIR", str(self.folder))):
            result = self.run_program("token", environ={name: path})
            self.assert_fails(result, 5, f"{name} does not include the CA")
        folder = self.folder / "none"
        folder.mkdir()
        python_org = "/Library/Frameworks/Python.framework/Versions/3.13/etc/openssl/cert.pem"
        for path, words in (
            ("/etc/ssl/cert.pem", "apt install ca-certificates"),
            (python_org, "/Install Certificates.command"),
        ):
            paths = types.SimpleNamespace(cafile=None, capath=str(folder), openssl_cafile=path)
            with mock.patch.object(ssl, "get_default_verify_paths", return_value=paths):
                words = "if your network" if sys.platform == "win32" else words
                self.assert_fails(self.call("token"), 5, words)

    def test_a_refused_certificate_has_a_hint_for_its_reason(self):
        clock = "check this computer's clock: its date is " + time.strftime("%Y-")
        network = "open a web page in a browser: this network may ask you to sign in first"
        self.store(lifetime=-10, issuer="https://issuer.example.com")
        before = self.stored()
        # In OpenSSL's x509_vfy.h, 9 means that the certificate isn't valid yet, 10 that it has
        # expired, 62 that it is for another host name, and 64 that it is for another address.
        for code, word, proxy, hint in (
            (9, "bad", "", clock),
            (10, "expired", "", clock),
            (62, "wrong", "", network),
            (62, "wrong", "http://127.0.0.1:9", "check HTTPS_PROXY: the proxy may"),
            (64, "wrong", "", network),
        ):
            refusal = ssl.SSLCertVerificationError(1, "reason")
            refusal.verify_code, refusal.verify_message = code, "reason"
            environ = {"CHATGPT_OAUTH_ISSUER": "https://issuer.example.com", "HTTPS_PROXY": proxy}
            with mock.patch.object(http.client.HTTPSConnection, "connect", side_effect=refusal):
                words = f"{word} certificate from issuer.example.com", hint
                self.assert_fails(self.call("token", environ=environ), 5, *words)
        self.assertEqual(self.stored(), before)

    @unittest.skipUnless(shutil.which("openssl"), "no openssl here")
    def test_a_certificate_for_another_name_is_reported(self):
        self.use_untrusted_issuer()
        environ = {
            "CHATGPT_OAUTH_ISSUER": "https://other.example.com",
            "SSL_CERT_FILE": str(self.folder / "certificate.pem"),
        }
        self.store(lifetime=-10, issuer="https://other.example.com")
        result = self.run_program("token", environ=environ)
        self.assert_fails(result, 5, "wrong certificate", "check HTTPS_PROXY: the proxy may")
        self.assertEqual(self.double.requests, [])

    @unittest.skipUnless(shutil.which("openssl"), "no openssl here")
    def test_an_http_proxy_in_all_proxy_is_used(self):
        proxy, certificate = self.use_untrusted_issuer()
        environ = {"HTTPS_PROXY": None, "SSL_CERT_FILE": certificate}
        socks = "socks5://127.0.0.1:9"
        for changes in (
            {"ALL_PROXY": proxy.url},
            {"all_proxy": proxy.url.replace("http://", "")},
            {"HTTPS_PROXY": proxy.url, "ALL_PROXY": socks, "all_proxy": socks},
        ):
            self.assert_quiet(
                self.run_program("token", "--refresh", environ={**environ, **changes})
            )
        basic = "Basic " + base64.b64encode(b"user:word").decode()
        self.assertEqual(proxy.seen, [("issuer.example.com:443", basic)] * 3)

    def test_a_proxy_of_another_kind_is_an_error_at_once(self):
        socks, other = "SOCKS is not supported", "it is not the URL of an HTTP proxy"
        self.environ["CHATGPT_OAUTH_ISSUER"] = "https://issuer.example.com"
        before = self.store(lifetime=-10, issuer="https://issuer.example.com")
        for proxy, fault in (
            ("socks5://u:hunter2@127.0.0.1:9", socks),
            ("SOCKS5h://127.0.0.1:9", socks),
            ("socks4://127.0.0.1:9", socks),
            ("socks://127.0.0.1:9", socks),
            ("ftp://u:hunter2@127.0.0.1:9", other),
            ("http://u:hunter2@127.0.0.1:port", other),
            ("http://[::1", other),
            ("http://", other),
        ):
            for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
                clock = FakeClock()
                result = self.call_at(clock, "token", environ={variable: proxy})
                # Windows has only upper-case variables.
                variable = variable if POSIX else variable.upper()
                # The program must not wait to try again.
                self.assertEqual(clock.elapsed, 0)
                words = f"cannot use the proxy in {variable}: {fault}", "hint: set HTTPS_PROXY to"
                err = self.assert_fails(result, 5, *words).err
                self.assertNotIn("hunter2", err)
                self.assertLessEqual(max(map(len, err.split("\n"))), 80)
        self.assertEqual(self.stored(), before)
        # The browser must not be opened for a sign-in that can't be completed.
        environ = {"ALL_PROXY": "socks5://127.0.0.1:9"}
        err = self.assert_fails(self.call("auth", "--no-browser", environ=environ), 5, socks).err
        self.assertNotIn("authorize", err)
        # This proxy isn't used for loopback or for an exempt host.
        environ["NO_PROXY"] = "issuer.example.com"
        with mock.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror):
            environ["CHATGPT_OAUTH_RETRY_WINDOW"] = "0.01"
            self.assert_fails(
                self.call("token", environ=environ), 5, "host issuer.example.com not found"
            )
            environ["HTTPS_PROXY"], environ["NO_PROXY"] = "http://proxy.example.com:3128", ""
            self.assert_fails(
                self.call("token", environ=environ), 5, "the host in HTTPS_PROXY was not found"
            )

    @unittest.skipUnless(shutil.which("openssl"), "no openssl here")
    def test_a_company_ca_without_key_usage_is_accepted(self):
        # This sets the issuer's URL. The issuer is replaced by one with a certificate from a CA.
        self.use_untrusted_issuer()
        # By default, `openssl req -x509` makes a CA certificate without a key usage.
        ca, ca_key = make_certificate(self.folder, "ca.example.com")
        folder = self.folder / "issuer"
        folder.mkdir()
        certificate, key = make_certificate(folder, "issuer.example.com", ca, ca_key)
        double = self.double = self.another_double()
        double.use_tls(certificate, key)
        proxy = Proxy(double.server.server_port)
        self.addCleanup(proxy.close)
        self.store(lifetime=-10, issuer="https://issuer.example.com")
        environ = {"HTTPS_PROXY": proxy.url, "SSL_CERT_FILE": ca}
        self.assert_quiet(self.run_program("token", environ=environ))

    @unittest.skipUnless(shutil.which("openssl"), "no openssl here")
    def test_tls_works_through_a_proxy_with_a_private_certificate(self):
        proxy, certificate = self.use_untrusted_issuer()
        trusted = {"SSL_CERT_FILE": certificate}
        out = self.assert_quiet(self.run_program("token", environ=trusted)).out
        self.assertEqual(out, self.stored()["access_token"] + "\n")
        basic = "Basic " + base64.b64encode(b"user:word").decode()
        self.assertEqual(proxy.seen, [("issuer.example.com:443", basic)])
        # Without SSL_CERT_FILE, the certificate isn't trusted.
        result = self.run_program("token", "--refresh", environ={})
        # The message must name the server, not the proxy.
        server = "untrusted certificate from issuer.example.com"
        self.assert_fails(result, 5, server, self.certificate_hint())
        self.assertEqual(self.double.count("refresh"), 1)
        self.assert_quiet(self.run_program("token", "--refresh", environ=trusted))

    @unittest.skipUnless(shutil.which("openssl"), "no openssl here")
    def test_a_tls_alert_after_the_handshake_is_reported(self):
        certificate = self.use_untrusted_issuer()[1]
        # A fatal internal_error alert (RFC 8446 §6).
        alert = b"\x15\x03\x03\x00\x02\x02\x50"

        def fault(handler, _):
            handler.close_connection = True
            os.write(handler.connection.fileno(), alert)
            return True

        self.double.faults["refresh"] = fault
        result = self.run_program("token", environ={"SSL_CERT_FILE": certificate})
        err = self.assert_fails(result, 5, "if that fails, sign in again").err
        # OpenSSL names its reasons in capital letters. PyPy may give none.
        self.assertRegex(err, r"no TLS with issuer\.example\.com \(([A-Z][A-Z0-9_]+|SSLError)\)")

    def test_loopback_is_not_proxied(self):
        self.store(lifetime=-10)
        with bind("127.0.0.1") as unused:
            proxy = f"http://127.0.0.1:{unused.getsockname()[1]}"
            environ = {"HTTPS_PROXY": proxy, "HTTP_PROXY": proxy, "NO_PROXY": ""}
            self.assert_quiet(self.run_program("token", environ=environ))

    def test_an_unreachable_proxy_is_named(self):
        self.store(lifetime=-10, issuer="https://issuer.example.com")
        with bind("127.0.0.1") as unused:
            environ = {"CHATGPT_OAUTH_RETRY_WINDOW": "0.01"}
            environ["CHATGPT_OAUTH_ISSUER"] = "https://issuer.example.com"
            environ["HTTPS_PROXY"] = f"http://user:secret@127.0.0.1:{unused.getsockname()[1]}"
            # In the second case, the proxy's own host is exempt from the proxy.
            for exempt in ("", "localhost,127.0.0.1"):
                environ["NO_PROXY"] = exempt
                result = self.run_program("token", environ=environ)
                words = "token: HTTPS_PROXY: ", "check HTTPS_PROXY"
                self.assertNotIn("secret", self.assert_fails(result, 5, *words).err)


# ---------------------------------------------------------------------------------------------
# Store
# ---------------------------------------------------------------------------------------------


class StoreTest(Case):
    @needs_modes
    def test_files_are_created_private(self):
        self.require(can_trace(), "no strace here that can trace")
        # With this umask, a file has exactly the mode that the program asks for.
        self.addCleanup(os.umask, os.umask(0))
        self.store()
        trace = self.folder / "trace"
        command = ["strace", "-f", "-e", "trace=openat,chmod,fchmod,fsync,rename"]
        command += ["-o", str(trace), *PROGRAM_COMMAND, "token", "--refresh"]
        self.assert_fresh(self.run_command(command))
        calls = [line for line in trace.read_text().splitlines() if "chatgpt_oauth" in line]
        created = [line for line in calls if "O_CREAT" in line]
        self.assertTrue(all(", 0600)" in line for line in created), created)
        self.assertTrue(any("O_EXCL" in line for line in created))
        self.assertFalse([line for line in calls if "chmod" in line])

    def test_reading_changes_no_file_and_takes_no_lock(self):
        commands = [["status"], ["env"], ["env", "--access-token"], ["token"], ["token", "--json"]]
        for command in commands:
            self.call(*command)
        self.assertFalse(self.home.exists())
        self.store(api_key="sk-1")
        self.models_file.write_text("{}")
        times = {path: path.stat().st_mtime_ns for path in (self.home, *self.home.iterdir())}
        commands.append(["exec", "--", sys.executable, "-c", "pass"])
        done = [self.run_program(*command) for command in commands]
        self.assertEqual([result.code for result in done], [0] * len(commands), done)
        self.assertEqual(self.double.requests, [])
        self.assertEqual(
            {path: path.stat().st_mtime_ns for path in (self.home, *self.home.iterdir())}, times
        )
        clock = FakeClock()
        with self.holding_lock():
            self.assert_quiet(self.call_at(clock, "token"))
            self.assert_quiet(self.call_at(clock, "env"))
        self.assertEqual(clock.elapsed, 0)

    @needs_modes
    def test_a_symbolic_link_is_kept(self):
        self.store(lifetime=-10)
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir()
        self.token_file.rename(elsewhere / "tokens.json")
        self.token_file.symlink_to(elsewhere / "tokens.json")
        self.assertEqual(self.call("token").code, 0)
        self.assertTrue(self.token_file.is_symlink())
        self.assertEqual(sorted(os.listdir(elsewhere)), ["tokens.json", "tokens.json.lock"])
        self.assertEqual(self.call("logout").code, 0)
        self.assertFalse(self.token_file.is_symlink())
        self.assertEqual(os.listdir(elsewhere), ["tokens.json.lock"])

    @needs_modes
    def test_a_file_that_others_can_read_is_made_private_with_a_warning(self):
        self.store(mode=0o644)
        result = self.call("status")
        self.assertEqual(result.code, 0)
        self.assertIn("was readable by other users; changed to 0600", result.err)
        self.assertEqual(self.token_file.stat().st_mode & 0o777, 0o600)
        self.assertEqual(self.call("status").err, "")

    def test_a_broken_token_file_exits_with_6_and_is_left_alone(self):
        def directory(path):
            path.mkdir()

        def fifo(path):
            os.mkfifo(path)

        def text(content):
            return lambda path: path.write_bytes(content)

        def huge(path):
            with path.open("wb") as file:
                file.truncate(100 << 20)

        def loop(path):
            path.symlink_to(path)

        faults = {
            "directory": directory,
            "empty": text(b""),
            "not JSON": text(b"{"),
            "a list": text(b"[]"),
            "null": text(b"null"),
            "deep": text(b"[" * 100000),
            "bytes": text(b"\xff\xfe\x00"),
            "huge": huge,
            "invalid token": text(b'{"access_token": "a b"}'),
            "number": text(b'{"access_token": 5}'),
            "invalid key": text(b'{"access_token": "a", "api_key": "\'; rm -rf ~; \'"}'),
            "newline": text(b'{"access_token": "a", "api_key": "sk-a\\n"}'),
            "FIFO": fifo,
            "loop": loop,
        }
        for name, fault in faults.items():
            with self.subTest(name), tempfile.TemporaryDirectory(dir=self.folder) as folder:
                self.require(POSIX or name not in ("FIFO", "loop"), f"no {name} on Windows")
                path = pathlib.Path(folder) / "chatgpt_oauth.json"
                fault(path)
                environ = {"CHATGPT_OAUTH_HOME": folder}
                for command in (["token"], ["env"], ["models"], ["env", "--access-token"]):
                    err = self.assert_fails(
                        self.call(*command, environ=environ), 6, str(path), after_messages=True
                    ).err
                    self.assertNotIn("rm -rf", err)
                result = self.call("status", "--json", environ=environ)
                self.assertEqual(result.code, 6)
                self.assertFalse(json.loads(result.out)["authenticated"])
                self.assertIn(str(path), json.loads(result.out)["problem"])
                self.assertTrue(os.path.lexists(path))

    def test_sign_in_keeps_a_broken_file_and_logout_removes_it(self):
        self.home.mkdir(mode=0o700)
        self.token_file.write_text("{")
        self.assertEqual(self.call("logout").code, 0)
        self.assertFalse(self.token_file.exists())
        self.token_file.write_text("{")
        self.assertIn(".bad", self.call("auth", "--no-browser", browser=visit).err)
        self.assertEqual((self.home / "chatgpt_oauth.json.bad").read_text(), "{")
        self.assertTrue(self.stored()["access_token"])
        self.assertEqual(self.call("logout").code, 0)
        left = ["chatgpt_models.json", "chatgpt_models.json.lock", "chatgpt_oauth.json.lock"]
        self.assertEqual(sorted(os.listdir(self.home)), left)
        # A sign-in that fails leaves only the copy.
        self.token_file.write_text("{")
        self.fault("code", 400, {"error": "invalid_grant"})
        self.assertEqual(self.call("auth", "--no-browser", browser=visit).code, 1)
        self.assertTrue((self.home / "chatgpt_oauth.json.bad").exists())
        self.assert_done(self.call("logout"))
        self.assertEqual(sorted(os.listdir(self.home)), left)

    def test_sign_in_does_not_move_a_file_that_it_cannot_open(self):
        before = self.store()
        open_file = os.open

        def fail(path, *arguments, **options):
            # The program has the code now and reads the file once more before it sends the code.
            if self.double.codes and str(path) == str(self.token_file):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return open_file(path, *arguments, **options)

        with mock.patch("os.open", fail):
            result = self.call("auth", "--no-browser", browser=visit)
        self.assert_fails(result, 5, "at its limits", after_messages=True)
        self.assertEqual(self.stored(), before)
        self.assertFalse((self.home / "chatgpt_oauth.json.bad").exists())

    def test_sign_in_moves_aside_a_directory_at_the_path_of_the_file(self):
        self.token_file.mkdir(parents=True)
        self.sign_in()
        self.assertTrue((self.home / "chatgpt_oauth.json.bad").is_dir())

    def test_a_half_written_file_is_read_again(self):
        fields = self.store()
        whole = self.token_file.read_text()
        self.token_file.write_text(whole[:50])
        result = self.call_with_pause(lambda: self.token_file.write_text(whole), "token")
        self.assertEqual(self.assert_quiet(result).out, fields["access_token"] + "\n")

    @needs_root
    def test_root_keeps_the_owner_of_the_files(self):
        self.store(lifetime=-10)
        os.chown(self.token_file, 12345, 12345)
        self.assertEqual(self.call("token").code, 0)
        self.assertEqual(self.token_file.stat().st_uid, 12345)
        (self.home / "chatgpt_oauth.json.lock").unlink()
        os.chown(self.home, 12345, 12345)
        self.assertEqual(self.call("token", "--refresh").code, 0)
        self.assertEqual((self.home / "chatgpt_oauth.json.lock").stat().st_uid, 12345)

    @needs_root
    def test_another_users_file_is_refused(self):
        self.store(mode=0o644)
        os.chown(self.token_file, 12345, 12345)
        for path in (self.folder, self.home):
            os.chown(path, NOBODY, NOBODY)
        with self.as_unprivileged_user():
            self.assert_fails(self.call("token"), 6, "owned by another user")
        self.token_file.chmod(0o600)
        with self.as_unprivileged_user():
            self.assert_fails(self.call("token"), 6, "Permission denied")

    def create_root_target(self):
        """Give the home to another user. Return a file of root's that a link could lead root to."""
        self.store(lifetime=-10)
        for path in (self.folder, self.home, self.token_file):
            os.chown(path, NOBODY, NOBODY)
        target = self.folder / "target"
        target.write_text(json.dumps({"access_token": "roots"}))
        target.chmod(0o644)
        return target

    def assert_untouched(self, target, content='{"access_token": "roots"}'):
        facts = target.stat()
        self.assertEqual((facts.st_uid, facts.st_mode & 0o777), (0, 0o644))
        self.assertEqual(target.read_text(), content)
        self.assertEqual(self.double.requests, [])

    def link_as_other_user(self, path, target):
        """Make `path` a symbolic link that belongs to another user."""
        path.symlink_to(target)
        os.lchown(path, NOBODY, NOBODY)

    @needs_root
    def test_root_does_not_follow_a_linked_lock_file(self):
        target = self.create_root_target()
        self.link_as_other_user(self.home / "chatgpt_oauth.json.lock", target)
        for command in (["token"], ["auth", "--device"], ["logout", "--local"]):
            self.assert_fails(self.call(*command), 6, "cannot lock")
            self.assert_untouched(target)

    @needs_root
    def test_root_does_not_follow_another_users_link(self):
        commands = (["token"], ["env"], ["logout", "--local"], ["auth", "--device"])
        for content in ('{"access_token": "roots"}', "no JSON"):
            target = self.create_root_target()
            target.write_text(content)
            self.token_file.unlink()
            self.link_as_other_user(self.token_file, target)
            for command in commands:
                with self.subTest(command, content=content):
                    self.assert_fails(self.call(*command), 6, str(self.token_file))
                    self.assert_untouched(target, content)
            self.assertEqual(self.call("status").code, 6)
            self.assert_untouched(target, content)
            self.token_file.unlink()

    @needs_root
    def test_root_does_not_follow_a_users_link_to_another_home(self):
        target = self.create_root_target()
        other = self.folder / "roots"
        other.mkdir(mode=0o700)
        target.write_text(self.token_file.read_text())
        target.rename(other / "chatgpt_oauth.json")
        shutil.rmtree(self.home)
        self.link_as_other_user(self.home, other)
        content = (other / "chatgpt_oauth.json").read_text()
        for command in (["token", "--refresh"], ["logout", "--local"], ["auth", "--device"]):
            self.assert_fails(self.call(*command), 6, str(self.home), after_messages=True)
            self.assertEqual((other / "chatgpt_oauth.json").read_text(), content)
        self.assertEqual(self.double.requests, [])

    @needs_root
    def test_a_home_that_root_creates_belongs_to_the_user(self):
        os.chown(self.folder, NOBODY, NOBODY)
        self.double.device_polls = 0
        environ = {"XDG_DATA_HOME": str(self.folder / "a" / "b")}
        self.assert_done(self.call("auth", "--device", environ=environ))
        self.assertTrue((self.folder / "a/b/code_puppy/chatgpt_oauth.json").exists())
        self.assertEqual({path.stat().st_uid for path in self.folder.rglob("*")}, {NOBODY})

    @needs_modes
    def test_a_dangling_link_creates_no_file(self):
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir()
        for name in ("chatgpt_oauth.json.lock", "chatgpt_oauth.json"):
            with self.subTest(name):
                shutil.rmtree(self.home, ignore_errors=True)
                self.home.mkdir(mode=0o700)
                (self.home / name).symlink_to(elsewhere / "new")
                self.assert_fails(self.call("auth", "--device"), 6, str(self.home / name))
                self.assertEqual(os.listdir(elsewhere), [])
        self.assertEqual(self.double.requests, [])

    def test_reading_does_not_create_a_missing_home(self):
        environ = {"CHATGPT_OAUTH_HOME": str(self.folder / "none")}
        self.assert_fails(self.call("token", environ=environ), 3, "not signed in")
        self.assertEqual(self.call("logout", environ=environ).code, 0)
        self.assertFalse((self.folder / "none").exists())

    @needs_modes
    def test_an_unreadable_home_shows_no_sign_in(self):
        self.store()
        with self.as_unprivileged_owner():
            self.home.chmod(0o000)
            result = self.call("status")
            self.home.chmod(0o700)
        self.assertEqual(result.code, 6)
        self.assertIn("Permission denied", result.out)
        self.assertNotIn("Official", result.out)

    @needs_root
    def test_the_hint_for_another_users_home_names_the_variable_to_set(self):
        theirs = self.folder / "theirs"
        theirs.mkdir(mode=0o755)
        self.folder.chmod(0o755)
        for home in (theirs, theirs / "none"):
            for variable, place, name in (
                ("HOME", home / ".code_puppy", "HOME or CHATGPT_OAUTH_HOME"),
                ("XDG_DATA_HOME", home / "code_puppy", "XDG_DATA_HOME or CHATGPT_OAUTH_HOME"),
                ("CHATGPT_OAUTH_HOME", home, "CHATGPT_OAUTH_HOME"),
            ):
                call = "write to" if place == theirs else "create"
                hint = f"hint: you cannot {call} {place}; set {name} to one of yours"
                environ = {variable: str(home)}
                with self.as_unprivileged_user():
                    token = self.call("token", environ=environ)
                    status = self.call("status", environ=environ)
                    auth = self.call("auth", "--device", environ=environ)
                missing = f"error: not signed in (no tokens in {place / 'chatgpt_oauth.json'})"
                self.assertEqual(token.err, f"{missing}\n{hint}\n")
                self.assertIn(hint[len("hint: ") :], status.out)
                self.assert_fails(auth, 6, "cannot ", hint)
        theirs.chmod(0o700)
        with self.as_unprivileged_user():
            result = self.call("token", environ={"CHATGPT_OAUTH_HOME": str(theirs)})
        self.assert_fails(result, 6, "cannot read: Permission denied", "hint: you cannot write")
        self.assertEqual(self.double.requests, [])

    def test_a_file_system_without_locks_has_a_hint(self):
        self.store()
        self.assert_quiet(self.run_injected("flock:error=ENOLCK", "token"))
        self.store(lifetime=-10)
        result = self.run_injected("flock:error=ENOLCK", "token")
        hint = "hint: this file system has no locks; set CHATGPT_OAUTH_HOME to a local directory"
        self.assert_fails(result, 6, f"cannot lock {self.token_file}.lock: No locks", hint)
        self.assertEqual(self.double.requests, [])

    def mount_secret(self, mode=0o444, **changes):
        """Store a sign-in as Kubernetes mounts a secret: root's, behind two symbolic links."""
        fields = self.store(mode=mode, **changes)
        (self.home / "..1").mkdir()
        self.token_file.rename(self.home / "..1" / "chatgpt_oauth.json")
        (self.home / "..data").symlink_to("..1")
        self.token_file.symlink_to("..data/chatgpt_oauth.json")
        for path in (self.folder, self.home, self.home / "..1"):
            path.chmod(0o755)
        return fields

    @needs_root
    def test_a_mounted_secret_is_read_while_its_token_is_valid(self):
        token = self.mount_secret(api_key="sk-1")["access_token"]
        with self.as_unprivileged_user():
            self.assertEqual(self.assert_quiet(self.call("token")).out, token + "\n")
            self.assertIn("sk-1", self.assert_quiet(self.call("env")).out)
            self.assertIn(": Authenticated\n", self.assert_quiet(self.call("status")).out)
            result = self.call("token", "--refresh")
            hint = "hint: set CHATGPT_OAUTH_HOME to a writable directory with its own sign-in"
            self.assert_fails(result, 6, f"cannot change {self.token_file}: Permission", hint)
            self.assert_fails(self.call("logout"), 6, f"cannot change {self.token_file}", hint)
        self.assertEqual(self.double.requests, [])
        for mode in (0o464, 0o446):
            self.token_file.chmod(mode)
            with self.as_unprivileged_user():
                self.assert_fails(self.call("token"), 6, "owned by another user (uid 0)")

    @needs_root
    def test_a_mounted_secret_that_expires_soon_is_still_used(self):
        token = self.mount_secret(lifetime=100)["access_token"]
        with self.as_unprivileged_user():
            result = self.call("token")
        self.assertEqual((result.code, result.out), (0, token + "\n"))
        self.assertIn("\nUsing the current token, which is still valid.", result.err)

    def test_a_read_only_mount_of_the_home_is_named(self):
        self.store(lifetime=-10)
        path = shlex.quote(str(self.home))
        mounts = f"mount --bind {path} {path}; mount -o remount,bind,ro {path}"
        hint = "hint: set CHATGPT_OAUTH_HOME to a writable directory with its own sign-in"
        result = self.run_mounted(mounts, "token")
        self.assert_fails(result, 6, f"cannot change {self.token_file}: Read-only", hint)

    def test_a_directory_that_blocks_the_temporary_file_is_named(self):
        self.store(lifetime=-10)
        temporary = self.home / "chatgpt_oauth.json.tmp"
        temporary.mkdir()
        self.assert_fails(self.call("token"), 6, f"cannot write {temporary}: ", "remove it")
        self.assert_fails(self.call("logout"), 6, f"cannot remove {temporary}: ", "remove it")
        self.assertEqual(self.double.requests, [])

    @unittest.skipUnless(POSIX, "Windows has no list of accounts and their homes")
    def test_without_HOME_the_password_database_is_used(self):
        import pwd

        account = types.SimpleNamespace(pw_dir=str(self.folder))
        with mock.patch.object(pwd, "getpwuid", return_value=account):
            out = self.call("status", "--json", environ={"HOME": None}).out
        self.assertEqual(json.loads(out)["token_file"], str(self.token_file))

    def test_a_home_that_is_not_a_directory_is_named(self):
        (self.folder / "file").write_text("")
        links = [self.folder / "file"]
        with contextlib.suppress(OSError):
            (self.folder / "link").symlink_to("nowhere")
        # Wine reports success without making a link.
        if (self.folder / "link").is_symlink():
            links.append(self.folder / "link")
        for home in links:
            hint = f"hint: {home} is not a directory; set CHATGPT_OAUTH_HOME to one of yours"
            environ = {"CHATGPT_OAUTH_HOME": str(home)}
            # Windows only reports that there is no file below the path.
            exit_code, words = (6, "Not a directory") if home.exists() and POSIX else (3, "")
            self.assert_fails(self.call("token", environ=environ), exit_code, words, hint)

    def test_an_unwritable_home_is_reported_before_the_browser_opens(self):
        (self.folder / "file").write_text("")
        environ = {"CHATGPT_OAUTH_HOME": str(self.folder / "file")}
        for options in ([], ["--no-browser"], ["--device"]):
            result = self.run_program("auth", *options, environ=environ)
            err = self.assert_fails(result, 6, "cannot lock", "CHATGPT_OAUTH_HOME").err
            self.assertNotIn("http", err)
        self.assertEqual(self.double.requests, [])

    def test_deeply_nested_json_does_not_crash(self):
        self.store(lifetime=-10)
        text = json.dumps(self.stored())[:-1] + ', "theirs": ' + "[" * 1200 + "]" * 1200 + "}"
        self.token_file.write_text(text)
        result = self.call("token")
        # Python's version decides whether this can be parsed. If it can't, no token may be spent.
        self.assertIn(result.code, (0, 6), result.err)
        self.assertEqual(self.double.count("refresh"), int(result.code == 0))

    def test_a_file_that_cannot_be_renamed_is_reported_before_the_token_is_spent(self):
        before = self.store(lifetime=-10)
        for code, hint in ((errno.EBUSY, "mount the directory"), (errno.EPERM, "writable")):
            with mock.patch.object(os, "replace", side_effect=OSError(code, "No")):
                self.assert_fails(self.call("token"), 6, f"cannot write {self.token_file}: ", hint)
            self.assertEqual(self.stored(), before)
            self.assertEqual(self.temporary_files(), [])
        self.token_file.unlink()
        with mock.patch.object(os, "replace", side_effect=OSError(errno.EBUSY, "No")):
            self.assert_fails(self.call("auth", "--device"), 6, "mount the directory")
        self.assertEqual(self.temporary_files(), [])
        self.assertFalse(self.token_file.exists())
        self.assertEqual(self.double.requests, [])

    def temporary_files(self):
        return [name for name in os.listdir(self.home) if name.endswith(".tmp")]

    def kill_at_random(self, kills):
        """Kill refreshes at random moments. None of them may lose the tokens."""
        self.store()
        rng = random.Random(7)
        for _ in range(kills):
            running = self.start("token", "--refresh")
            time.sleep(rng.uniform(0.03, 0.16))
            running.process.kill()
            running.result()
            self.assertTrue(self.stored()["access_token"])
        self.assert_quiet(self.run_program("token", "--refresh"))
        self.assertEqual(sorted(os.listdir(self.home)), TOKEN_FILES)

    def test_a_killed_refresh_leaves_a_valid_file_and_no_lock(self):
        self.kill_at_random(10)

    def kill_at(self, call, rounds):
        """Kill the child of a refresh at the system call `call`. No tokens may be lost."""
        for _ in range(rounds):
            self.store(lifetime=-10)
            result = self.run_injected(f"{call}:signal=SIGKILL:error=EIO", "token")
            self.assert_fails(result, 5, "has been killed")
            self.assertEqual(self.assert_fresh(self.run_program("token")).err, "")
            self.assertEqual(sorted(os.listdir(self.home)), TOKEN_FILES)

    def test_a_refresh_killed_at_any_step_keeps_the_sign_in(self):
        self.require_injection()
        # First, the program replaces the file with a copy, to see that this works: one rename and
        # two calls of fsync. The third fsync reserves space. The other calls store the response.
        before = ("/^rename:when=1", "fsync:when=1", "fsync:when=3", "sendto")
        after = ("ftruncate:when=3", "fsync:when=4", "/^rename:when=2", "fsync:when=5")
        for call in before + after:
            with self.subTest(call):
                self.kill_at(call, 1)

    def test_every_command_finds_a_first_sign_in_that_was_killed_at_the_rename(self):
        self.double.device_polls = 0
        # The first rename of the child proves that renaming works, before it sends the code.
        result = self.run_injected("/^rename:when=2:signal=SIGKILL:error=EIO", "auth", "--device")
        self.assert_fails(result, 5, "has been killed", after_messages=True)
        self.assertEqual(self.double.count("code"), 1)
        self.assertFalse(self.token_file.exists())
        left = (self.home / "chatgpt_oauth.json.tmp").read_text()
        for command in ("token", "status", "env --access-token", "models", "auth", "logout"):
            with self.subTest(command):
                if self.token_file.exists():
                    self.token_file.unlink()
                self.leave_temporary_file(left)
                result = self.call(*command.split(), browser=visit)
                self.assertEqual(result.code, 0, result.err)
                self.assertEqual(self.temporary_files(), [])
                if command != "auth" and command != "logout":
                    self.assertEqual(self.stored(), json.loads(left))
        self.assertFalse(self.token_file.exists())
        self.assertNotIn(json.loads(left)["refresh_token"], self.double.refresh_tokens)

    def test_a_response_that_still_cannot_be_renamed_is_kept(self):
        old = self.store()
        new = {**old, **self.double.tokens()}
        leftover = self.leave_temporary_file(new)
        with mock.patch.object(os, "replace", side_effect=OSError(errno.EBUSY, "No")):
            # The stored token is still valid.
            self.assertEqual(self.assert_quiet(self.call("token")).out, old["access_token"] + "\n")
            self.assert_fails(self.call("token", "--refresh"), 6, "mount the directory")
            self.token_file.unlink()
            for command in ("token", "env", "models", "logout"):
                self.assert_fails(self.call(command), 6, "mount the directory")
            self.assertEqual(self.call("status").code, 6)
        self.assertEqual(json.loads(leftover.read_text()), new)
        self.assertEqual(self.double.requests, [])
        self.assertEqual(self.assert_quiet(self.call("token")).out, new["access_token"] + "\n")

    def test_a_newer_response_is_used_though_the_stored_token_is_still_valid(self):
        new = {**self.store(), **self.double.tokens()}
        self.leave_temporary_file(new)
        self.assertEqual(self.assert_quiet(self.call("token")).out, new["access_token"] + "\n")
        self.assertEqual(self.stored(), new)

    def test_a_reader_leaves_the_temporary_file_of_a_running_process_alone(self):
        self.store(lifetime=100)
        released = self.hold_response("refresh")
        first = self.start("token")
        wait_for(lambda: self.double.count("refresh"))
        self.assertEqual(self.temporary_files(), ["chatgpt_oauth.json.tmp"])
        for command in ("status", "env --access-token", "token"):
            result = self.call_at(FakeClock(), *command.split())
            self.assertEqual(result.code, 0, result.err)
        self.assertEqual(self.temporary_files(), ["chatgpt_oauth.json.tmp"])
        released.set()
        self.assert_refreshed_once(first.result())

    @needs_modes
    def test_a_removed_lock_file_does_not_endanger_a_first_sign_in(self):
        self.double.device_polls = 0
        released = self.hold_response("code")
        first = self.start("auth", "--device")
        wait_for(lambda: self.double.count("code"))
        os.unlink(f"{self.token_file}.lock")
        environ = {"CHATGPT_OAUTH_LOCK_TIMEOUT": "0.2"}
        self.assert_fails(self.call("token", environ=environ), 3, "not signed in")
        self.assert_fails(self.call("auth", "--device", environ=environ), 5, "another process")
        released.set()
        self.assert_done(first.result())
        self.assert_nothing_lost()

    def test_a_file_that_another_program_has_changed_is_not_replaced(self):
        self.store(lifetime=-10)
        self.require_injection()
        theirs = {"access_token": "theirs", "refresh_token": "rt_theirs"}

        def write():
            wait_for(self.temporary_files)
            self.token_file.write_text(json.dumps(theirs))

        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        result = self.run_injected("fsync:when=1:delay_enter=500000", "token")
        writing.join(WAIT_LIMIT)
        self.assert_fails(result, 5, "another program")
        self.assertEqual(self.stored(), theirs)
        self.assertEqual(self.temporary_files(), [])
        self.assertEqual(self.double.requests, [])

    def leave_temporary_file(self, content):
        """Write the temporary file that a process leaves if it is killed before the rename."""
        leftover = self.home / "chatgpt_oauth.json.tmp"
        leftover.write_text(content if isinstance(content, str) else json.dumps(content))
        leftover.chmod(0o600)
        return leftover

    def test_the_response_of_a_killed_process_is_used(self):
        # Reserved space that the response has not used is left as spaces.
        for rest in ("", " " * 99):
            old = self.store(lifetime=-10)
            self.double.refresh_tokens[old["refresh_token"]] = "used"
            new = {**old, **self.double.tokens()}
            leftover = self.leave_temporary_file(json.dumps(new) + rest)
            self.assertEqual(self.assert_fresh(self.run_program("token")).err, "")
            self.assertEqual(self.stored(), new)
            self.assertFalse(leftover.exists())
        # Another program that writes in place and is killed leaves half a token file.
        self.token_file.write_text(json.dumps(new)[:50])
        self.leave_temporary_file(new)
        self.assert_done(self.run_program("logout"))
        self.assertNotIn(new["refresh_token"], self.double.refresh_tokens)
        # A first sign-in that is killed leaves a temporary file and no token file.
        self.leave_temporary_file({**old, **self.double.tokens()})
        self.assert_done(self.run_program("logout"))
        self.assertFalse(leftover.exists() or self.token_file.exists())

    def test_an_unfinished_temporary_file_is_removed(self):
        planted = json.dumps({**self.store(lifetime=-10), "refresh_token": "rt_planted"})
        for content in ("", "{", " " * 99, planted + "\0" * 99, "[]", '{"access_token": "a b"}'):
            with self.subTest(content):
                self.store(lifetime=-10)
                leftover = self.leave_temporary_file(content)
                self.assertEqual(self.assert_fresh(self.call("token")).err, "")
                self.assertFalse(leftover.exists())

    @needs_modes
    def test_an_old_or_foreign_temporary_file_is_not_used(self):
        elsewhere = self.folder / "elsewhere"

        def older(leftover):
            os.utime(leftover, (time.time() - 60, time.time() - 60))

        def link(leftover):
            leftover.rename(elsewhere)
            leftover.symlink_to(elsewhere)

        def somebody_elses(leftover):
            os.chown(leftover, NOBODY, NOBODY)

        for change in (older, link, somebody_elses):
            with self.subTest(change.__name__):
                if change == somebody_elses:
                    self.require(os.geteuid() == 0, "only root can change the owner")
                old = self.store(lifetime=-10)
                leftover = self.leave_temporary_file({**old, "refresh_token": "rt_planted"})
                change(leftover)
                self.assertEqual(self.assert_fresh(self.call("token")).err, "")
                self.assertFalse(os.path.lexists(leftover))
                if elsewhere.exists():
                    self.assertIn("rt_planted", elsewhere.read_text())
                    elsewhere.unlink()

    @unittest.skipUnless(POSIX, "Windows has no limit on file sizes")
    def test_a_full_disk_is_reported_before_the_token_is_spent(self):
        before = self.store(lifetime=-10)
        # The token file is smaller than this, but not with the space that new tokens may need.
        result = self.run_program("token", preexec_fn=limit_file_sizes(8192))
        self.assert_fails(result, 6, "cannot write")
        self.assertEqual(self.double.requests, [])
        self.assertEqual(self.stored(), before)
        self.assertFalse((self.home / "chatgpt_oauth.json.tmp").exists())

    @needs_modes
    def test_a_read_only_directory_is_reported_before_the_token_is_spent(self):
        self.store(lifetime=-10)
        self.home.chmod(0o500)
        self.addCleanup(self.home.chmod, 0o700)
        with self.as_unprivileged_owner():
            hint = f"hint: make {self.home} writable, or set CHATGPT_OAUTH_HOME to another"
            self.assert_fails(self.call("token"), 6, "cannot lock", hint)
        self.assertEqual(self.double.requests, [])

    def change_attribute(self, path, attribute):
        """Set an attribute of a file with chattr until the test is over."""
        if not command_succeeds("chattr", "+" + attribute, str(path)):
            self.skipTest(f"no chattr +{attribute} here")
        self.addCleanup(command_succeeds, "chattr", "-" + attribute, str(path))

    def test_a_mount_of_the_token_file_is_reported_before_the_token_is_spent(self):
        before = self.store(lifetime=-10)
        path = shlex.quote(str(self.token_file))
        mount = f"mount --bind {path} {path}"
        for mounts in (mount, f"{mount}; mount -o remount,bind,ro {path}"):
            message = f"cannot write {self.token_file}: "
            self.assert_fails(self.run_mounted(mounts, "token"), 6, message, "mount the directory")
            self.assertEqual(self.stored(), before)
            self.assertEqual(self.temporary_files(), [])
        self.assertEqual(self.double.requests, [])

    def test_an_immutable_file_is_reported_before_the_token_is_spent(self):
        self.store(lifetime=-10)
        self.change_attribute(self.token_file, "i")
        self.assert_fails(self.run_program("token"), 6, str(self.token_file))
        self.assertEqual(self.double.requests, [])

    def test_an_append_only_directory_is_reported_before_anything_is_spent(self):
        self.store(lifetime=-10)
        self.change_attribute(self.home, "a")
        # The second run finds the temporary file that the first one could not remove.
        for _ in range(2):
            self.assert_fails(self.run_program("token"), 6, str(self.token_file))
        self.assertEqual(self.double.requests, [])

    def test_an_append_only_directory_is_reported_before_a_first_sign_in(self):
        self.home.mkdir(mode=0o700)
        self.change_attribute(self.home, "a")
        for _ in range(2):
            self.assert_fails(self.run_program("auth", "--device"), 6, str(self.token_file))
        self.assertEqual(self.double.requests, [])

    def test_a_response_that_cannot_be_renamed_is_used_by_the_next_process(self):
        self.require_injection()
        for error in ("EACCES", "EIO", "EBUSY"):
            with self.subTest(error):
                self.store_expired()
                result = self.run_injected(f"/^rename:error={error}:when=2+", "token")
                self.assert_fails(result, 6, f"cannot write {self.token_file}: ")
                self.assertEqual(self.double.count("refresh"), 1)
                self.assert_refreshed_once(self.run_program("token"))
                self.assertEqual(self.temporary_files(), [])

    def test_a_first_sign_in_that_cannot_be_renamed_is_kept(self):
        self.double.device_polls = 0
        result = self.run_injected("/^rename:error=EIO:when=2+", "auth", "--device")
        self.assert_fails(result, 6, f"cannot write {self.token_file}: ")
        self.assertEqual(self.double.count("revoke"), 0)
        self.assert_fresh(self.run_program("token"))

    def test_a_response_is_stored_on_a_full_copy_on_write_file_system(self):
        self.store(lifetime=-10)
        # Such a file system may need free space even to overwrite reserved space. The child's first
        # write is to a pipe, the next two are to files, and the fourth one stores the response.
        self.assert_refreshed_once(self.run_injected("write:error=ENOSPC:when=4", "token"))

    def test_the_response_of_a_killed_process_is_used_even_if_the_disk_is_full(self):
        self.store(lifetime=-10)
        self.run_injected("/^rename:when=2:signal=SIGKILL:error=EIO", "token")
        self.assert_refreshed_once(self.run_program("token", preexec_fn=limit_file_sizes(0)))

    def test_a_failed_fsync_loses_nothing(self):
        self.require_injection()
        # Calls 1 and 3 come before the request, and call 4 stores the response. Calls 2 and 5 sync
        # the directory, which may fail.
        for when, spent in (("1", 0), ("2", 1), ("3", 0), ("4", 1), ("4+", 1), ("5", 1)):
            with self.subTest(when):
                self.store_expired()
                result = self.run_injected(f"fsync:error=EIO:when={when}", "token")
                self.assertEqual(self.double.count("refresh"), spent)
                self.assertEqual(self.temporary_files(), [])
                if spent:
                    self.assert_fresh(result)
                else:
                    self.assert_fails(result, 6, "Input/output error")
                    self.assert_nothing_lost()

    @needs_modes
    def test_a_read_only_token_file_is_replaced(self):
        self.store(lifetime=-10, mode=0o400)
        with self.as_unprivileged_owner():
            self.assert_fresh(self.call("token"))

    def another_home(self):
        """Return a second home with an empty token file that another one can be mounted on."""
        other = self.folder / "other"
        other.mkdir(mode=0o700)
        (other / "chatgpt_oauth.json").touch(mode=0o600)
        return other

    def refresh_in_two_homes(self, rounds):
        """Refresh at once in two homes that share one token file through a bind mount."""
        self.require(can_mount(), "no mounts here")
        other = self.another_home()
        script = (
            'mount --bind "$HERE/chatgpt_oauth.json" "$OTHER/chatgpt_oauth.json"\n'
            'CHATGPT_OAUTH_HOME="$FIRST" "$@" >"$OUTPUT.1" 2>&1 & one=$!\n'
            "sleep 0.2\n"
            'CHATGPT_OAUTH_HOME="$SECOND" "$@" >"$OUTPUT.2" 2>&1 & two=$!\n'
            "code=0; wait $one || code=$?; echo $code\n"
            "code=0; wait $two || code=$?; echo $code\n"
        )
        output = self.folder / "said"
        self.double.delay = 0.4
        for first, second in [(self.home, other), (other, self.home)] * rounds:
            self.store_expired()
            paths = {"HERE": self.home, "OTHER": other, "FIRST": first, "SECOND": second}
            paths["OUTPUT"] = output
            environ = {name: str(path) for name, path in paths.items()}
            command = ["unshare", "-m", "sh", "-ec", script, "sh", *PROGRAM_COMMAND, "token"]
            codes = self.run_command(command, environ).out.split()
            messages = [pathlib.Path(f"{output}.{number}").read_text() for number in (1, 2)]
            self.assertEqual(self.double.count("refresh"), 1, messages)
            self.assert_nothing_lost()
            results = dict(zip((first, second), zip(codes, messages)))
            self.assertEqual(results[self.home][0], "0", messages)
            self.assertEqual(results[other][0], "6", messages)
            self.assertIn("mount the directory", results[other][1])

    def test_a_file_mounted_in_two_homes_is_refreshed_once(self):
        self.refresh_in_two_homes(1)

    def test_a_mount_of_a_replaced_file_is_not_refreshed(self):
        self.store(lifetime=-10)
        other = self.another_home()
        path, place = (shlex.quote(f"{home}/chatgpt_oauth.json") for home in (self.home, other))
        mounts = f"mount --bind {path} {place}; cp -p {path} {path}.new; mv {path}.new {path}; "
        mounts += f"export CHATGPT_OAUTH_HOME={shlex.quote(str(other))}"
        self.assert_fails(self.run_mounted(mounts, "token"), 6, "mount the directory")
        self.assertEqual(self.double.requests, [])

    @needs_modes
    def test_a_removed_lock_file_does_not_allow_two_refreshes(self):
        self.store(lifetime=-10)
        self.double.delay = 0.4
        first = self.start("token")
        wait_for(lambda: self.double.count("refresh"))
        os.unlink(f"{self.token_file}.lock")
        second = self.start("token")
        for each in (first, second):
            self.assertEqual(self.assert_fresh(each.result()).err, "")
        self.assertEqual(self.double.count("refresh"), 1)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_a_forked_child_does_not_keep_the_lock(self):
        self.store(lifetime=-10)
        self.double.delay = 0.2
        code = """
import os, threading, time, warnings, chatgpt_oauth as oauth
warnings.simplefilter("ignore")
thread = threading.Thread(target=oauth.get_access_token)
thread.start()
sys.stdin.readline()
if os.fork() == 0:
    os.close(1)
    os.close(2)
    time.sleep(60)
    os._exit(0)
thread.join()
os._exit(0)
"""
        running = self.start_python(code)
        # The process group includes the forked child.
        self.addCleanup(os.killpg, running.process.pid, signal.SIGKILL)
        wait_for(lambda: self.double.count("refresh"))
        running.type_line(b"")
        self.assertEqual(running.result().code, 0)
        self.double.delay = 0
        environ = {"CHATGPT_OAUTH_LOCK_TIMEOUT": "1"}
        self.assertEqual(
            self.assert_fresh(self.run_program("token", "--refresh", environ=environ)).err, ""
        )

    @needs_windows
    def test_a_file_that_another_program_keeps_open_is_reported_before_the_token_is_spent(self):
        self.waits["SHARING_SECONDS"] = 0.3
        self.store(lifetime=-10)
        for keep_open in (self.token_file.open, self.holding_file):
            with keep_open():
                self.assert_fails(self.call("token"), 6, "cannot write")
            self.assertEqual(self.double.requests, [])
        self.assert_fresh(self.call("token"))

    @needs_windows
    def test_a_response_that_cannot_be_renamed_is_stored_by_the_next_process(self):
        self.waits["SHARING_SECONDS"] = 0.3
        self.store(lifetime=-10)
        with contextlib.ExitStack() as held:
            self.double.faults["refresh"] = lambda *_: held.enter_context(self.holding_file())
            self.assert_fails(self.call("token"), 6, "cannot write")
        self.assert_refreshed_once(self.call("token"))

    @needs_windows
    def test_logout_waits_for_a_program_that_has_the_file_open(self):
        self.store()
        timer = threading.Timer(0.5, self.token_file.open().close)
        timer.start()
        self.assert_done(self.call("logout"))
        timer.join(WAIT_LIMIT)
        self.assertFalse(self.token_file.exists())

    @needs_windows
    def test_a_file_can_be_read_while_it_is_replaced(self):
        fields = self.store()
        whole, successor = self.token_file.read_bytes(), self.folder / "successor"
        self.waits["REREAD_SECONDS"] = 5
        stop = threading.Event()

        def replace():
            while not stop.is_set():
                successor.write_bytes(whole)
                with contextlib.suppress(PermissionError):
                    os.replace(successor, self.token_file)

        replacing = threading.Thread(target=replace, daemon=True)
        replacing.start()
        for _ in range(100):
            self.assertEqual(
                self.assert_quiet(self.call("token")).out, fields["access_token"] + "\n"
            )
        stop.set()
        replacing.join(WAIT_LIMIT)

    def test_a_lock_that_is_never_released_exits_with_5(self):
        self.store(lifetime=-10)
        with self.holding_lock():
            environ = {"CHATGPT_OAUTH_LOCK_TIMEOUT": "0.3"}
            self.assert_fails(self.run_program("token", environ=environ), 5, "another process")
        self.assertEqual(self.double.requests, [])
        self.assert_quiet(self.run_program("token"))

    def test_a_file_system_without_stable_file_ids_does_not_hang(self):
        self.store(lifetime=-10)
        environ = {"CHATGPT_OAUTH_LOCK_TIMEOUT": "0.3"}
        with mock.patch("os.path.samestat", return_value=False):
            self.assert_fails(self.call("token", environ=environ), 5, "timed out")
        self.assertEqual(self.double.requests, [])


# ---------------------------------------------------------------------------------------------
# Session
# ---------------------------------------------------------------------------------------------


class LimitsTest(Case):
    def test_a_token_longer_than_64_kib_is_ignored(self):
        # The longest token that is accepted has 64 KiB.
        for length, good in ((65536, True), (65537, False)):
            before = self.store(lifetime=-10)
            _, result = self.refresh_with(id_token="x" * length)
            self.assertEqual(result.code, 0, result.err)
            self.assertEqual(self.stored()["id_token"] != before["id_token"], good)

    def test_a_token_file_without_room_for_new_tokens_spends_no_token(self):
        # Before a refresh, at most half of the file's limit of 1 MiB may be used.
        for size, exit_code in ((500000, 0), (530000, 6)):
            self.store(lifetime=-10, theirs="x" * size)
            result = self.call("token")
            self.assertEqual(result.code, exit_code, result.err)
            self.assert_nothing_lost()
        self.assertEqual(self.double.count("refresh"), 1)

    def test_a_models_file_larger_than_8_mib_is_not_written(self):
        self.store()
        names = [f"gpt-{number:05}" for number in range(40000)]
        self.double.codex_models = [{"slug": name, "visibility": "list"} for name in names]
        result = self.call("models", "--source", "codex")
        self.assert_fails(result, 6, "larger than 8 MiB", "--include")
        self.assertFalse(self.models_file.exists())
        self.assertEqual(self.call("status").code, 0)


class SessionTest(Case):
    def test_a_token_that_expires_soon_is_refreshed(self):
        before = self.store(lifetime=200, api_key="sk-mine", theirs={"kept": [1]})
        result = self.run_program("token")
        after = self.stored()
        self.assertEqual(result, (0, after["access_token"] + "\n", ""))
        self.assertNotEqual(after["refresh_token"], before["refresh_token"])
        self.assertEqual((after["api_key"], after["theirs"]), ("sk-mine", {"kept": [1]}))
        self.assertEqual(sorted(os.listdir(self.home)), TOKEN_FILES)
        self.require(POSIX, "Windows has no POSIX modes")
        self.assertEqual(self.token_file.stat().st_mode & 0o777, 0o600)

    def test_a_short_lived_token_is_refreshed_at_half_its_life(self):
        for lifetime in (250, 10):
            self.double.lifetime = lifetime
            self.store_expired()
            for _ in range(3):
                self.assertEqual(self.assert_fresh(self.call("token")).err, "")
            self.assertEqual(self.double.count("refresh"), 1)
        self.store(lifetime=20, last_refresh=timestamp(time.time() - 40))
        self.assertEqual(self.assert_fresh(self.call("token")).err, "")
        self.assertEqual(self.double.count("refresh"), 2)

    def test_a_wrong_clock_does_not_crash(self):
        opaque = {"access_token": "opaque", "expires_at": "0001-01-01T00:00:00+14:00"}
        code = """
import time, chatgpt_oauth as oauth
time.time = lambda: float(sys.argv[1])
for command in ("status", "token"):
    oauth.main([command])
"""
        for now in ("0", "1e13", "1e19"):
            for dates in ({}, opaque):
                with self.subTest(now=now, dates=dates):
                    self.store(**dates)
                    err = self.start_python(code, now).result().err
                    self.assertNotIn("Traceback", err)
                    self.assertNotIn("internal error", err)
                    self.assert_nothing_lost()

    def test_the_option_refresh_always_refreshes(self):
        before = self.store(lifetime=99999)
        out = self.assert_quiet(self.run_program("token", "--refresh")).out
        self.assertNotEqual(out.strip(), before["access_token"])
        self.assertEqual(out.strip(), self.stored()["access_token"])

    def test_an_opaque_token_expires_by_the_dates_in_the_file(self):
        now = time.time()
        for dates, due in (
            ({"expires_at": timestamp(now + 1000)}, False),
            ({"expires_at": timestamp(now + 100)}, True),
            # Other programs write numeric timestamps.
            ({"expires_at": now + 1000}, False),
            ({"expires_at": 20261124}, True),
            ({"last_refresh": timestamp(now - 7 * 86400)}, False),
            ({"last_refresh": timestamp(now - 9 * 86400)}, True),
            ({"last_refresh": "2026-01-01T00:00:00.123456+00:00"}, True),
            ({"expires_at": "nonsense", "last_refresh": "nonsense"}, True),
            ({}, True),
        ):
            with self.subTest(dates):
                self.double.requests.clear()
                self.store(access_token="opaque", **{"last_refresh": None, **dates})
                self.assert_quiet(self.call("token"))
                self.assertEqual(self.double.count("refresh"), int(due))

    def test_omitted_tokens_keep_their_old_value(self):
        before = self.store(lifetime=0)
        access = self.double.tokens()["access_token"]
        self.fault("refresh", 200, {"access_token": access})
        self.assertEqual(self.call("token").out, access + "\n")
        after = self.stored()
        for name in ("refresh_token", "id_token", "account_id"):
            self.assertEqual(after[name], before[name])
        self.assertNotIn("expires_at", after)

    def test_an_invalid_optional_token_does_not_discard_the_response(self):
        for name in ("id_token", "refresh_token"):
            for invalid in ("", "a b", 5, [], {}, False):
                with self.subTest(name, invalid=invalid):
                    before = self.store(lifetime=-10)
                    response, result = self.refresh_with(**{name: invalid})
                    self.assertEqual(
                        (result.code, result.out), (0, response["access_token"] + "\n"), result.err
                    )
                    self.assertEqual(
                        f"warning: ignored the {name}" in result.err, invalid != "", result.err
                    )
                    expected = {**response, name: before[name]}
                    for each in ("access_token", "refresh_token", "id_token"):
                        self.assertEqual(self.stored()[each], expected[each])

    def test_an_invalid_grant_in_a_success_response_ends_the_sign_in(self):
        for body in ({"error": "invalid_grant"}, {"error": {"code": "refresh_token_reused"}}):
            self.store_expired()
            self.fault("refresh", 200, body)
            self.assert_fails(self.call("token"), 4, "has ended")
            self.assert_fails(self.call("token"), 4, "has ended")
            self.assertEqual(self.double.count("refresh"), 1)

    def test_a_lifetime_is_a_number_or_a_string_of_digits(self):
        good, bad = ("3600", 3600, 3600.5), (True, "x", "-5", -5, 0, "\u0663", "9" * 4000, [])
        for lifetime in (*good, *bad):
            with self.subTest(lifetime):
                self.store(lifetime=-10)
                self.fault("refresh", 200, {"access_token": "opaque", "expires_in": lifetime})
                self.assertEqual(self.call("token"), (0, "opaque\n", ""))
                self.assertEqual("expires_at" in self.stored(), lifetime in good)

    def test_a_response_for_another_account_ends_the_sign_in(self):
        for names in (("access_token", "refresh_token", "id_token"), ("access_token",)):
            with self.subTest(names):
                before = self.store(lifetime=-10)
                tokens = self.double.tokens(account="acct-9")
                response = {name: tokens[name] for name in names}
                self.fault("refresh", 200, response)
                for _ in range(2):
                    words = ("another account", "to sign in again, run: ")
                    self.assert_fails(self.call("token"), 4, *words)
                after = self.stored()
                self.assertEqual(after.pop("ended")["reason"], "other_account")
                refresh_token = response.get("refresh_token", before["refresh_token"])
                self.assertEqual(after, {**before, "refresh_token": refresh_token})
        self.assertEqual(self.double.count("refresh"), 2)

    def test_tokens_of_two_accounts_in_one_file_can_be_refreshed(self):
        access = self.double.tokens(account="acct-8")["access_token"]
        fields = self.store(access_token=access, account_id="acct-8", expires_at="2026-01-01")
        response = self.double.tokens()
        response["access_token"] = self.double.tokens(account="acct-8")["access_token"]
        self.fault("refresh", 200, response)
        self.assert_quiet(self.call("token", "--refresh"))
        self.assertEqual(self.stored()["refresh_token"], response["refresh_token"])
        self.assertNotEqual(fields["id_token"], response["id_token"])

    def test_odd_members_of_a_response_do_not_lose_its_tokens(self):
        nested = json.loads("[" * 400 + "]" * 400)
        odd = ("", "x", 5, -1, True, [], {}, nested, "9" * 5000, "\u0663")
        cases = [(name, value) for name in OTHER_MEMBERS for value in odd]
        for name, value in cases:
            with self.subTest(name, value=str(value)[:20]):
                self.store(lifetime=-10)
                response, result = self.refresh_with(**{name: value})
                self.assertEqual(result.code, 0, result.err)
                self.assertNotIn("error", result.err)
                self.assertEqual(self.stored()["refresh_token"], response["refresh_token"])
                self.assertEqual(self.stored()["access_token"], response["access_token"])

    def test_a_token_type_that_is_not_bearer_is_a_warning_at_a_refresh(self):
        for kind, warned in (("DPoP", True), (5, True), ("", False), ("BEARER", False)):
            with self.subTest(kind):
                self.store(lifetime=-10)
                response, result = self.refresh_with(token_type=kind)
                self.assertEqual(result[:2], (0, response["access_token"] + "\n"))
                self.assertEqual("warning: the response has a token_type" in result.err, warned)

    def test_a_refresh_token_without_an_access_token_is_stored(self):
        before = self.store(lifetime=-10)
        for access in (None, "a b"):
            with self.subTest(access):
                response = {**self.double.tokens(), "access_token": access}
                self.fault_once("refresh", 200, response)
                result = self.call("token", environ={"CHATGPT_OAUTH_RETRY_WINDOW": "0.01"})
                self.assert_fails(result, 5, "no valid access_token", "try again")
                self.assertNotIn("sign in", result.err)
                after = self.stored()
                self.assertEqual(after["access_token"], before["access_token"])
                self.assertEqual(after["last_refresh"], before["last_refresh"])
                self.assertEqual(after["refresh_token"], response["refresh_token"])
        self.assert_fresh(self.call("token"))

    def test_an_edited_account_id_does_not_end_the_sign_in(self):
        self.store(lifetime=-10, account_id="acct-9")
        self.assertEqual(self.assert_fresh(self.call("token")).err, "")

    def test_a_file_broken_during_a_refresh_does_not_lose_the_response(self):
        self.store(lifetime=-10)

        def tear(handler, _):
            self.token_file.write_text("{")

        self.double.faults["refresh"] = tear
        result = self.call("token")
        self.assertEqual(
            (result.code, result.out), (0, self.stored()["access_token"] + "\n"), result.err
        )

    def test_a_sign_out_while_a_refresh_waits_for_the_lock_wins(self):
        self.store(lifetime=200)
        with contextlib.ExitStack() as held:
            held.enter_context(self.holding_lock())

            def sign_out():
                self.token_file.unlink()
                held.close()

            self.assert_fails(self.call_with_pause(sign_out, "token"), 3, "not signed in")
        self.assertEqual(self.double.requests, [])

    def test_an_ended_sign_in_stays_ended_until_the_next_one(self):
        for code in INVALID_GRANT_CODES:
            with self.subTest(code):
                self.store_expired()
                self.fault("refresh", 401, {"error": code})
                self.assert_fails(self.call("token"), 4, "has ended", "auth")
                self.assert_fails(self.call("token"), 4, "has ended")
                self.assertEqual(self.double.count("refresh"), 1)
                self.assertEqual(self.stored()["ended"]["reason"], code)
                result = self.call("status")
                self.assertEqual(result.code, 4)
                # Another second may have passed.
                for words in ("Not authenticated\n", "ada@example.com", "expired 10 seconds ago"):
                    self.assertIn(words, result.out.replace(" 11 ", " 10 "))
                result = self.call("status", "--json")
                self.assertEqual(result.code, 4)
                self.assertFalse(json.loads(result.out)["authenticated"])
                self.assertIn("has ended", json.loads(result.out)["problem"])
        del self.double.faults["refresh"]
        self.sign_in()
        self.assertNotIn("ended", self.stored())
        self.assertEqual(self.call("token", "--refresh").code, 0)

    def test_a_refused_refresh_suggests_the_right_next_step(self):
        # The exit code, and whether the refresh token is never sent again.
        end, again, settings, network = (4, True), (4, False), (1, False), (5, False)
        for status, body, (exit_code, is_end) in (
            (400, {"error": {"code": "APP_SESSION_EXPIRED"}}, end),
            (400, {"error": "app_session_terminated"}, end),
            (403, {"error": {"type": "x", "code": None}, "code": "app_session_expired"}, end),
            (400, {"error": "APP_SESSION_TERMINATED_BY_ADMINISTRATOR"}, end),
            (403, {"code": "Session_Revoked"}, end),
            (401, {"detail": "session_invalidated"}, end),
            (400, {"detail": {"code": "refresh_token_reused"}}, end),
            (400, {"error": {"code": "unknown"}}, again),
            (401, {"detail": "Unauthorized"}, again),
            (403, {"code": "forbidden"}, again),
            (401, "", again),
            (400, {"error": "Invalid_Request"}, settings),
            (401, {"error": {"code": "invalid_client"}}, settings),
            (400, {"error": "unauthorized_client"}, settings),
            (400, {"error": "unsupported_grant_type"}, settings),
            (400, {"error": "invalid_scope"}, settings),
            (403, {"error": {"code": "unsupported_country_region_territory"}}, network),
            (429, {"error": "token_expired"}, network),
            (500, {"error": "token_expired"}, network),
            (403, "<html>", network),
            (401, "<html>", network),
        ):
            with self.subTest(status=status, body=body):
                before = self.store_expired()
                text = body if isinstance(body, str) else json.dumps(body)
                self.fault("refresh", status, text.encode())
                environ = {"CHATGPT_OAUTH_RETRY_WINDOW": "0.01"}
                for _ in range(2):
                    result = self.assert_fails(self.call("token", environ=environ), exit_code)
                    self.assertEqual("hint: to sign in again" in result.err, exit_code == 4)
                    self.assertEqual("check the settings" in result.err, exit_code == 1)
                self.assertEqual("ended" in self.stored(), is_end)
                self.assertEqual(self.double.count("refresh"), 1 if is_end else 2)
                # Nothing that was stored before has changed.
                self.assertEqual({**self.stored(), **before}, self.stored())

    def test_an_error_code_is_read_even_if_it_contains_the_token(self):
        for token, code, exit_code in (
            ("expired", "session_expired", 4),
            ("invalid_request", "invalid_request", 1),
            ("unsupported", "unsupported_country_region_territory", 5),
        ):
            with self.subTest(code):
                self.store(lifetime=-10, refresh_token=token)
                self.fault("refresh", 403, {"error": code})
                err = self.assert_fails(self.call("token"), exit_code).err
                # The program's own message contains "expired".
                self.assertNotIn(token, err.replace("it has expired", ""))
                self.assertEqual("ended" in self.stored(), exit_code == 4)

    def test_a_failed_refresh_is_tried_and_reported_only_once_in_a_run(self):
        for status, lifetime in ((400, -10), (500, -10), (500, 200)):
            with self.subTest(status=status, lifetime=lifetime):
                self.double.requests.clear()
                self.store(lifetime=lifetime, last_refresh=timestamp(time.time() - 9000))
                self.fault("refresh", status, {"error": "unknown"})
                result = self.call("status", "--online")
                self.assertEqual(self.double.count("refresh"), 1)
                self.assertEqual(result.err.count("warning: "), int(lifetime > 0))
                self.assertEqual(self.double.count("usage"), int(lifetime > 0))

    def test_a_token_expires_at_the_earlier_of_two_dates(self):
        now = time.time()
        for dates, due in (
            ({"expires_at": timestamp(now + 100)}, True),
            ({"expires_at": timestamp(now + 9999)}, False),
            # Code Puppy's own plugin stores new tokens without changing `expires_at`.
            ({"expires_at": timestamp(now - 100), "last_refresh": timestamp(now - 50)}, False),
        ):
            with self.subTest(dates):
                self.double.requests.clear()
                self.store(lifetime=5000, **dates)
                self.assert_quiet(self.call("token"))
                self.assertEqual(self.double.count("refresh"), int(due))

    def test_a_token_that_arrives_expired_is_used_with_a_warning_about_the_clock(self):
        self.double.lifetime = -100
        warning = "warning: the new access token has expired by this computer's clock; is it right?"
        self.store(lifetime=-10, api_key=None)
        result = self.call("token")
        self.assertEqual(result, (0, self.stored()["access_token"] + "\n", warning + "\n"))
        # A run uses it for all requests, also after a sign-in.
        self.store_expired()
        self.assertEqual(self.call("status", "--online").code, 0)
        self.assertEqual(self.double.count("refresh"), 1)
        self.double.organization = None
        self.assertEqual(self.sign_in().count(warning), 1)
        self.assertEqual(self.double.count("refresh"), 1)

    def test_processes_with_a_wrong_clock_share_a_refresh(self):
        self.double.lifetime, self.double.delay = -100, 1.0
        self.store(lifetime=-10)
        results = run_in_parallel(lambda _: self.run_program("token"), range(4))
        for result in results:
            self.assertEqual(result.code, 0, result.err)
            self.assertIn("this computer's clock", result.err)
        self.assertLess(self.double.count("refresh"), 4)

    def test_a_response_with_an_unparsable_member_keeps_its_tokens(self):
        for odd in (b"9" * 5000, b"-1e999", b'"\xff"', b'"' + b"x" * 300000 + b'"'):
            with self.subTest(odd[:9]):
                self.store(lifetime=-10)
                body = json.dumps(self.double.tokens()).encode()[:-1] + b', "odd": %s}' % odd
                self.fault("refresh", 200, body)
                self.assert_fresh(self.call("token"))

    def test_a_new_refresh_token_is_used_after_an_old_one_was_refused(self):
        ended = {"reason": "refresh_token_reused", "refresh_token_sha256": "0" * 64}
        self.store(lifetime=0, ended=ended)
        self.assertEqual(self.call("token").code, 0)
        self.assertNotIn("ended", self.stored())

    def test_a_failed_refresh_is_a_warning_while_the_token_is_valid(self):
        fields = self.store(lifetime=200)
        for status, body in (
            (401, b'{"error": "invalid_grant"}'),
            (500, b""),
            (503, b""),
            (200, b"<"),
        ):
            with self.subTest(status):
                self.store(fields)
                self.double.requests.clear()
                self.fault("refresh", status, body)
                result = self.call("token")
                self.assertEqual((result.code, result.out), (0, fields["access_token"] + "\n"))
                self.assertIn("warning: ", result.err)
                # A refresh isn't retried while the access token is valid.
                self.assertEqual(self.double.count("refresh"), 1)
                environ = {"CHATGPT_OAUTH_RETRY_WINDOW": "0.1"}
                self.assertNotEqual(self.call("token", "--refresh", environ=environ).code, 0)
        self.assertEqual(self.call("status", "--json").code, 0)

    def test_only_an_unprocessed_refresh_is_retried(self):
        for status, headers, tries in (
            (503, {}, 2),
            (429, {"Retry_After": 1}, 2),
            (429, {"Retry_After": 3600}, 1),
            (429, {"Retry_After": "Wed, 21 Oct 2099 07:28:00 GMT"}, 1),
            (503, {"Retry_After": "99999999999999999999"}, 1),
            (503, {"Retry_After": "-5"}, 2),
            (503, {"Retry_After": "\xb2"}, 2),
            (503, {"Content_Type": "text/html"}, 2),
            (500, {}, 1),
            (502, {}, 1),
        ):
            with self.subTest(status=status, headers=headers):
                self.store_expired()
                body = b"<html>" if "Content_Type" in headers else b"{}"
                self.fault_once("refresh", status, body, **headers)
                result = self.call("token")
                self.assertEqual(self.double.count("refresh"), tries)
                if tries == 2:
                    self.assertEqual(result.code, 0)
                else:
                    self.assert_fails(result, 5)
                    self.assertEqual(
                        "if that fails, sign in again" in result.err, status in (500, 502)
                    )

    def test_a_retry_after_of_zero_does_not_flood_the_server(self):
        environ = {"CHATGPT_OAUTH_RETRY_WINDOW": "0.3"}
        for header in ("0", "Wed, 21 Oct 2015 07:28:00 GMT", "-5"):
            with self.subTest(header):
                self.store_expired()
                self.fault("refresh", 503, Retry_After=header)
                self.assert_fails(self.call("token", environ=environ), 5)
                self.assertIn(self.double.count("refresh"), (2, 3))

    def test_a_refresh_is_retried_until_the_server_is_back(self):
        self.store(lifetime=-10)
        port = self.double.server.server_port
        body = json.dumps(self.double.tokens()).encode()
        self.double.close()
        running = self.start("token", environ={"CHATGPT_OAUTH_RETRY_WINDOW": "10"})
        time.sleep(0.3)
        with bind("127.0.0.1", port, reuse=True) as listening:
            listening.listen()
            listening.settimeout(WAIT_LIMIT)
            connection = listening.accept()[0]
            with connection:
                connection.settimeout(WAIT_LIMIT)
                connection.recv(65536)
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                connection.sendall(head + body)
        self.assert_quiet(running.result())

    def test_a_lost_response_is_not_requested_again(self):
        self.store(lifetime=-10)
        self.double.faults["refresh"] = send_bytes(b"")
        self.assert_fails(self.call("token"), 5, "if that fails, sign in again")
        self.assertEqual(self.double.count("refresh"), 1)

    def test_a_token_is_sent_only_to_its_issuer(self):
        other = self.another_double()
        self.store(lifetime=-10)
        environ = {"CHATGPT_OAUTH_ISSUER": other.url}
        self.assert_fails(self.call("token", environ=environ), 4, "another issuer", "auth")
        self.store(lifetime=99999)
        self.assertEqual(self.call("token", environ=environ).code, 0)
        self.assert_fails(self.call("token", "--refresh", environ=environ), 4)
        result = self.call("status", "--json", environ=environ)
        self.assertEqual(result.code, 0)
        self.assertIn("another issuer", json.loads(result.out)["problem"])
        self.assertEqual(self.call("logout", environ=environ).code, 0)
        self.assertEqual(self.double.count("revoke"), 1)
        self.assertEqual(other.requests, [])

    def test_a_file_without_an_issuer_belongs_to_openai(self):
        self.store(lifetime=-10, issuer=None, client_id=None)
        self.assert_fails(self.call("token"), 4, "https://auth.openai.com")
        self.assertEqual(self.double.requests, [])

    def test_a_sign_in_during_a_refresh_wins(self):
        self.store(lifetime=-10)
        newer = {**self.stored(), **self.double.tokens()}

        for refused in (False, True):

            def change(handler, _, refused=refused):
                self.token_file.write_text(json.dumps(newer))
                return refused and self.double.reply(handler, 401, {"error": "invalid_grant"})

            self.store(lifetime=-10)
            self.double.faults["refresh"] = change
            result = self.call("token")
            self.assertEqual(
                (result.code, result.out), (0, newer["access_token"] + "\n"), result.err
            )
            self.assertEqual(self.stored(), newer)

    def test_an_access_token_stored_as_the_api_key_is_ignored(self):
        fields = self.store()
        self.store({**fields, "api_key": fields["access_token"]})
        self.assert_fails(self.call("env"), 1, "no API key", one_line=True)
        self.assertEqual(self.call("token", "--refresh").code, 0)
        self.assert_fails(self.call("env"), 1, "no API key", one_line=True)
        # The plugin may also have left an older access token there.
        self.store({**fields, "api_key": self.double.tokens()["access_token"]})
        self.assert_fails(self.call("env"), 1, "no API key", one_line=True)

    def stop_and_go(self, rounds, timeout):
        """Suspend a refresh for longer than the request timeout while its response arrives."""
        self.environ["CHATGPT_OAUTH_REQUEST_TIMEOUT"] = str(timeout)
        for number in range(rounds):
            self.store(lifetime=-10)
            released = self.hold_response("refresh")
            running = self.start("token")
            wait_for(lambda count=number + 1: self.double.count("refresh") == count)
            running.process.send_signal(signal.SIGSTOP)
            released.set()
            time.sleep(1.5 * timeout)
            running.process.send_signal(signal.SIGCONT)
            self.assertEqual(self.assert_fresh(running.result()).err, "")

    @needs_signals
    def test_suspending_a_refresh_longer_than_the_timeout_loses_no_response(self):
        self.stop_and_go(1, 0.5)

    @needs_signals
    def test_a_fatal_signal_does_not_lose_the_response(self):
        import resource

        names = ("SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGXCPU")

        # The tests may run with some of these signals ignored, for example under nohup.
        def prepare():
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for name in names:
                signal.signal(getattr(signal, name), signal.SIG_DFL)

        for frozen, name in itertools.product((False, True), names):
            with self.subTest(name, frozen=frozen):
                self.store_expired()
                released = self.hold_response("refresh")
                running = self.start("token", frozen=frozen, preexec_fn=prepare)
                wait_for(lambda: self.double.count("refresh"))
                running.process.send_signal(getattr(signal, name))
                released.set()
                self.assertEqual(running.result(), (-getattr(signal, name), "", ""))
                self.assert_refreshed_once(self.call("token"))

    def send_pairs(self, rounds, start):
        """Send each of `rounds` refreshes two signals, 0.2 to 10 ms apart.

        `start` starts a program that refreshes. Each signal goes to that process alone or to its
        process group. The first one comes at a random moment or during the request, in turns.
        """
        rng = random.Random(7)
        ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        self.double.delay = 0.1
        self.store()
        for number in range(rounds):
            self.double.requests.clear()
            running = start()
            if number % 2:
                time.sleep(rng.uniform(0.03, 0.5))
            else:
                wait_for(lambda: self.double.count("refresh"))
            for _ in range(2):
                send = rng.choice((os.kill, os.killpg))
                # A process that the first signal has ended still has its ID until it is waited for.
                send(running.process.pid, rng.choice(ending))
                time.sleep(rng.uniform(0.0002, 0.01))
            running.result()
            with self.double.lock:
                before = self.stored()["access_token"]
            # This waits for the lock.
            self.assert_fresh(self.call("token", "--refresh"))
            self.assertNotEqual(self.stored()["access_token"], before)

    def start_in_group(self, *arguments, **options):
        """Start the program in its own process group, without core dumps."""
        import resource

        def prepare():
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        return self.start(*arguments, start_new_session=True, preexec_fn=prepare, **options)

    def start_thread(self):
        """Start a program that refreshes in a thread."""
        return self.start_python("""
import resource, threading, chatgpt_oauth as oauth
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
thread = threading.Thread(target=oauth.get_access_token, kwargs={"refresh": True})
thread.start()
thread.join()
""")

    def pairs_of_signals(self, rounds):
        """Send pairs of signals to refreshes of three kinds."""
        self.send_pairs(rounds, lambda: self.start_in_group("token", "--refresh"))
        self.send_pairs(rounds, self.start_thread)
        frozen = functools.partial(self.start_in_group, "token", "--refresh", frozen=True)
        self.send_pairs(rounds, frozen)

    @needs_signals
    def test_two_signals_in_a_row_lose_no_response(self):
        self.pairs_of_signals(3)

    def close_windows(self, rounds):
        """Close the terminal window of each interactive shell while it runs `token`."""
        import fcntl
        import termios

        environ = self.environ_with({"TERM": "dumb"})
        # tcsh takes no argument with several lines, so the command is in a file.
        script = self.folder / "token.sh"
        script.write_text("exec " + shlex.join([*PROGRAM_COMMAND, "token"]))
        line = shlex.join(["sh", str(script)]) + "\n"
        self.double.delay = 0.1

        def take_terminal():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        for name, *options in INTERACTIVE_SHELLS * rounds:
            if not shutil.which(name):
                continue
            before = self.store_expired()["access_token"]
            leader, follower = os.openpty()
            window = subprocess.Popen(
                [name, *options],
                env=environ,
                stdin=follower,
                stdout=follower,
                stderr=follower,
                start_new_session=True,
                preexec_fn=take_terminal,
            )
            os.close(follower)
            os.write(leader, line.encode())
            wait_for(lambda: self.double.count("refresh"))
            # The kernel sends SIGHUP to the shell and to `token`, and then the shell sends another.
            os.close(leader)
            window.wait(WAIT_LIMIT)
            self.assert_fresh(self.call("token"))
            self.assertEqual(self.double.count("refresh"), 1, name)
            self.assertNotEqual(self.stored()["access_token"], before, name)

    @needs_terminal
    def test_a_closed_terminal_window_loses_no_response(self):
        self.close_windows(1)

    @needs_signals
    def test_the_end_of_the_main_thread_does_not_lose_a_response(self):
        code = """
import os, threading, time, chatgpt_oauth as oauth
if sys.argv[1] == "frozen":
    sys.frozen = True
threading.Thread(target=oauth.get_access_token, daemon=True).start()
sys.stdin.readline()
def fork():
    began = time.monotonic()
    if os.fork() == 0:  # A forked child doesn't have the thread, so it must not wait for it.
        sys.exit()
    os.wait()
    return time.monotonic() - began
print("waited", min(fork() for _ in range(5)), file=sys.stderr, flush=True)
time.sleep(60)
"""
        for kind in ("frozen", "other"):
            if kind == "frozen" and hasattr(sys, "pypy_version_info"):
                # PyPy runs no atexit after a Ctrl-C.
                continue
            with self.subTest(kind):
                self.store_expired()
                released = self.hold_response("refresh")
                running = self.start_python(code, kind)
                wait_for(lambda: self.double.count("refresh"))
                running.type_line(b"")
                waited = running.wait_for_line(r"^waited (.+)$")[1]
                running.process.send_signal(signal.SIGINT)
                time.sleep(0.2)
                released.set()
                running.result()
                self.assertLess(float(waited), 0.5)
                self.assert_refreshed_once(self.call("token"))

    def test_an_ending_program_does_not_wait_for_an_idle_thread(self):
        self.store(lifetime=-10)
        code = """
import atexit, threading, time, chatgpt_oauth as oauth
# This is registered first, so it runs last.
atexit.register(lambda: print("waited", time.monotonic() - began, file=sys.stderr))
paused, sleep = threading.Event(), time.sleep
def report_and_sleep(seconds):
    paused.set()
    sleep(seconds)
time.sleep = report_and_sleep
threading.Thread(target=oauth.get_access_token, daemon=True).start()
# The thread has found the lock taken when it pauses for the first time.
paused.wait()
began = time.monotonic()
"""
        with self.holding_lock():
            err = self.start_python(code).result().err
        # The thread would wait for the lock for up to 60 seconds.
        self.assertLess(float(re.search("^waited (.+)$", err, re.M)[1]), 3)

    @needs_windows
    def test_ctrl_break_does_not_lose_the_response(self):
        self.store(lifetime=-10)
        released = self.hold_response("refresh")
        pressed = self.folder / "pressed"
        code = """
import pathlib, signal, threading, chatgpt_oauth as oauth
def press():
    sys.stdin.readline()
    signal.raise_signal(signal.SIGBREAK)
    pathlib.Path(sys.argv[1]).touch()
threading.Thread(target=press, daemon=True).start()
sys.exit(oauth.main(["token"]))
"""
        running = self.start_python(code, str(pressed))
        wait_for(lambda: self.double.count("refresh"))
        running.type_line(b"")
        wait_for(pressed.exists)
        released.set()
        result = running.result()
        self.assertNotEqual(result.code, 0)
        self.assertEqual((result.out, result.err), ("", ""))
        self.assert_refreshed_once(self.call("token"))

    def interrupt_at_new_line(self, seen, each_time):
        """Run `token` and press Ctrl-C at the first line that isn't in `seen`, which is then added.

        Only lines that run after the refresh request count, those of the program and those of
        `contextlib`. A line is new if it is called from a new line of the program or, with
        `each_time`, whenever it runs. Return the line, or None if none was new, and the Result.
        """
        interrupted_at, lines_run = None, 0

        def trace(frame, event, _):
            nonlocal interrupted_at, lines_run
            code = frame.f_code
            if code.co_filename not in (oauth.__file__, contextlib.__file__):
                return None
            if event == "return" and code is oauth.main.__code__:
                sys.settrace(None)
            if event == "line" and self.double.requests:
                caller = frame.f_back
                while caller.f_code.co_filename == contextlib.__file__:
                    caller = caller.f_back
                line = code.co_filename, frame.f_lineno, caller.f_lineno
                lines_run += 1
                if each_time:
                    line = *line, lines_run
                if line not in seen:
                    seen.add(line)
                    interrupted_at = line
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGINT)
            return trace

        self.double.requests.clear()
        sys.settrace(trace)
        try:
            result = self.call("token")
        finally:
            sys.settrace(None)
        return interrupted_at, result

    @needs_signals
    def test_ctrl_c_at_any_line_loses_no_response(self):
        self.interrupt_everywhere(each_time=False)

    # The program must not register exit handlers in the process that runs the tests.
    @mock.patch("atexit.register", mock.Mock())
    def interrupt_everywhere(self, each_time):
        """Refresh again and again, pressing Ctrl-C at another line each time."""
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        seen = set()
        while True:
            # The interrupted run may still hold its lock, because this process goes on.
            shutil.rmtree(self.home, ignore_errors=True)
            self.store(lifetime=-10)
            line, result = self.interrupt_at_new_line(seen, each_time)
            if line is None:
                break
            self.assertEqual((result.code, result.err), (130, "Interrupted.\n"), line)
            self.assert_nothing_lost()
            after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            self.assertEqual(after, handlers, line)
        # With fewer lines, the trace would have missed a part of the program.
        self.assertGreater(len(seen), 300)

    @needs_signals
    def test_ctrl_c_ends_the_pause_between_two_tries(self):
        self.store(lifetime=-10)
        self.fault("refresh", 503, Retry_After="29")
        self.environ["CHATGPT_OAUTH_RETRY_WINDOW"] = "30"
        code = """
import time, chatgpt_oauth as oauth
sleep = time.sleep
def report_and_sleep(seconds):
    print("pausing", file=sys.stderr, flush=True)
    sleep(seconds)
time.sleep = report_and_sleep
sys.exit(oauth.main(["token"]))
"""
        running = self.start_python(code)
        running.wait_for_line("^pausing$")
        self.assertEqual(self.interrupt(running).code, 130)
        self.assertEqual(self.double.count("refresh"), 1)

    @needs_signals
    def test_ctrl_c_never_ends_the_wait_for_a_response(self):
        waiting = "Waiting for the response first (30 s at most)...\n"
        self.store(lifetime=-10)
        released = self.hold_response("refresh")
        running = self.start("token")
        wait_for(lambda: self.double.count("refresh"))
        for count in (1, 2, 3):
            running.process.send_signal(signal.SIGINT)
            wait_for(lambda count=count: running.err.count(waiting) == count)
        released.set()
        self.assertEqual(running.result(), (130, "", 3 * waiting + "Interrupted.\n"))
        self.assert_refreshed_once(self.call("token"))

    def test_ctrl_c_for_the_first_process_of_a_container_loses_no_response(self):
        if not can_mount():
            self.skipTest("no namespaces here")
        self.store(lifetime=-10)
        released = self.hold_response("refresh")
        running = Process(["unshare", "--pid", "--fork", *PROGRAM_COMMAND, "token"], self.environ)
        self.addCleanup(running.close)
        wait_for(lambda: self.double.count("refresh"))
        first = child_of(running.process.pid)
        for _ in range(2):
            os.kill(first, signal.SIGINT)
            time.sleep(0.4)
        released.set()
        self.assertEqual(running.result().out, "")
        self.assert_refreshed_once(self.call("token"))

    def test_a_signal_loses_no_response_in_a_container_with_an_init(self):
        self.require(can_mount(), "no namespaces here")
        # The first process of the container ends with the program, and that ends all others.
        init = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
        command = ["unshare", "--pid", "--fork", sys.executable, "-c", init]

        for number in (signal.SIGTERM, signal.SIGHUP):
            with self.subTest(number):
                self.store_expired()
                released = self.hold_response("refresh")
                running = Process([*command, *PROGRAM_COMMAND, "token"], self.environ)
                self.addCleanup(running.close)
                wait_for(lambda: self.double.count("refresh"))
                for _ in range(2):
                    os.kill(child_of(child_of(running.process.pid)), number)
                    time.sleep(0.2)
                released.set()
                self.assertEqual(running.result().out, "")
                self.assert_refreshed_once(self.call("token"))

    @needs_signals
    def test_a_signal_handler_of_the_importing_program_runs_once(self):
        code = """
import asyncio, signal, chatgpt_oauth as oauth
if sys.argv[1] == "frozen":
    sys.frozen = True
async def main():
    calls = []
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, calls.append, 1)
    oauth.get_access_token()
    await asyncio.sleep(0.1)
    print(len(calls))
asyncio.run(main())
"""
        self.double.delay = 0.3
        for kind in ("frozen", "other"):
            with self.subTest(kind):
                self.store_expired()
                running = self.start_python(code, kind)
                wait_for(lambda: self.double.count("refresh"))
                running.process.send_signal(signal.SIGTERM)
                self.assertEqual(running.result(), (0, "1\n", ""))
                self.assertEqual(self.double.count("refresh"), 1)

    def run_as(self, executable, greeting_timeout=oauth.GREETING_TIMEOUT):
        """Refresh in a program whose sys.executable is `executable`, and return its Result."""
        self.store_expired()
        code = "import chatgpt_oauth; sys.executable = sys.argv[1]; sys.argv[1:] = ['token']; "
        code += f"chatgpt_oauth.GREETING_TIMEOUT = {greeting_timeout}; chatgpt_oauth.run_program()"
        return self.start_python(code, str(executable)).result()

    @needs_sh
    @needs_modes
    def test_only_a_python_interpreter_is_started_as_a_child(self):
        mark = self.folder / "started"
        for name, is_started in (
            ("embedding-program", False),
            ("pythonista", False),
            ("python-monitor", False),
            ("python3", True),
            ("Python", True),
            ("python3.14t", True),
            ("pypy3.10-c", True),
        ):
            with contextlib.suppress(FileNotFoundError):
                mark.unlink()
            program = self.folder / name
            program.write_text(f"#!/bin/sh\necho >{shlex.quote(str(mark))}\n")
            program.chmod(0o700)
            self.assert_refreshed_once(self.run_as(program))
            self.assertEqual(mark.exists(), is_started)
        for executable in ("", self.folder / "no" / "python3"):
            self.assert_fresh(self.run_as(executable))

    @needs_sh
    @needs_modes
    def test_a_child_that_does_not_answer_does_not_hold_the_lock(self):
        # A real child first prints a greeting, its name and version. The first of these prints
        # nothing, the second only the beginning of the greeting, and the third something else.
        for code in ("", "printf chatgpt", "echo Welcome"):
            with self.subTest(code):
                program = self.folder / "python3"
                program.write_text(f"#!/bin/sh\n{code}\nexec sleep {WAIT_LIMIT}\n")
                program.chmod(0o700)
                self.assert_refreshed_once(self.run_as(program, greeting_timeout=0.2))

    @needs_proc
    def test_a_stopped_child_is_named_and_loses_no_response(self):
        self.store(lifetime=-10)
        released = self.hold_response("refresh")
        self.environ["CHATGPT_OAUTH_REQUEST_TIMEOUT"] = "1"
        code = "import chatgpt_oauth; chatgpt_oauth.CHILD_GRACE = 0.1; sys.argv[1:] = ['token']; "
        running = self.start_python(code + "chatgpt_oauth.run_program()")
        wait_for(lambda: self.double.count("refresh"))
        child = child_of(running.process.pid)
        os.kill(child, signal.SIGSTOP)
        try:
            released.set()
            self.assert_fails(running.result(), 5, f" process {child}\n", f" -CONT {child})")
            # It still holds the lock, so nobody else uses up the token.
            environ = {"CHATGPT_OAUTH_LOCK_TIMEOUT": "0.1"}
            self.assert_fails(self.call("token", environ=environ), 5, "another process")
        finally:
            os.kill(child, signal.SIGCONT)
        self.assert_refreshed_once(self.call("token"))

    @needs_proc
    def test_no_command_line_or_environment_holds_a_secret(self):
        before = self.store(lifetime=-10)
        seen = []

        def look(*_):
            for process in pathlib.Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        seen.append((process / name).read_bytes().decode("utf-8", "replace"))

        self.double.faults["refresh"] = look
        self.assert_fresh(self.run_program("token"))
        self.assertIn("module.child_main()", "".join(seen))
        self.assertNotIn(before["refresh_token"], "".join(seen))

    @needs_signals
    def test_a_refresh_imports_nothing_from_the_current_directory(self):
        self.store(lifetime=-10)
        for name in ("json.py", "sitecustomize.py", "chatgpt_oauth.py"):
            (self.folder / name).write_text("raise SystemExit('wrong module')")
        environ = {"PYTHONPATH": str(self.folder)}
        code = f"import sys; sys.path[:] = [p for p in sys.path if p]; {oauth.LAUNCH_CODE}"
        command = [sys.executable, "-I", "-S", "-c", code, *PROGRAM_ARGUMENTS, "token"]
        result = self.run_command(command, environ, cwd=self.folder)
        self.assertEqual(self.assert_fresh(result).err, "")

    def refresh_at_once(self, processes):
        self.store_expired()
        started = [self.start("token") for _ in range(processes)]
        results = {each.result() for each in started}
        self.assertEqual(results, {(0, self.stored()["access_token"] + "\n", "")})
        self.assertEqual(self.double.count("refresh"), 1)

    def test_many_processes_refresh_once(self):
        self.double.delay = 0.2
        self.refresh_at_once(20)

    def test_a_browser_sign_in_during_a_refresh_wins(self):
        for delay in (0.0, 0.1):
            self.store(lifetime=-10)
            self.double.account = "acct-1"
            signing_in, url = self.start_sign_in()
            self.double.delay = delay
            self.double.account = "acct-2"
            refreshing = self.start("token")
            visit(url)
            self.assertEqual(signing_in.result().code, 0)
            refreshing.result()
            self.assertEqual(self.stored()["account_id"], "acct-2")
            self.double.delay = 0


# ---------------------------------------------------------------------------------------------
# Callback: its port
# ---------------------------------------------------------------------------------------------


class PortTest(Case):
    def test_listening_looks_up_no_host_name(self):
        def look_up(*_):
            raise AssertionError("a name was looked up")

        with mock.patch.object(socket, "getfqdn", look_up):
            self.assert_done(self.call("auth", "--no-browser", browser=visit))

    def test_a_connection_without_a_thread_is_dropped_silently(self):
        start = threading.Thread.start
        refused = []

        def fail_once(thread):
            if "process_request" in repr(getattr(thread, "_target", None)) and not refused:
                refused.append(thread)
                raise RuntimeError("can't start new thread")
            start(thread)

        def browser(url):
            with self.assertRaises((OSError, http.client.HTTPException)):
                visit(f"http://127.0.0.1:{self.ports[0]}/")
            visit(url)

        with mock.patch.object(threading.Thread, "start", fail_once):
            err = self.assert_done(self.call("auth", "--no-browser", browser=browser)).err
        self.assertEqual(len(refused), 1)
        self.assertNotIn("Exception", err)

    @contextlib.contextmanager
    def failing_bind(self, number, *families):
        """Make `bind` fail with the error `number` for these address families.

        The block gets a list, to which each address that is bound successfully is added.
        """
        bind_to, bound = socket.socket.bind, []

        def bind_or_fail(listening, address):
            if listening.family in families:
                raise OSError(number, os.strerror(number))
            bind_to(listening, address)
            bound.append(listening.getsockname()[0])

        with mock.patch.object(socket.socket, "bind", bind_or_fail):
            yield bound

    def test_it_listens_with_ipv4_or_ipv6_alone(self):
        def visit_ipv6(url):
            visit(authorization_response(url).replace("localhost", "[::1]"))

        for number in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            with self.failing_bind(number, socket.AF_INET6) as bound:
                self.assert_done(self.call("auth", "--no-browser", browser=visit))
            self.assertEqual(bound, ["127.0.0.1"])
            with self.failing_bind(number, socket.AF_INET, socket.AF_INET6):
                result = self.call("auth", "--no-browser")
            self.assert_fails(result, 1, "cannot listen on 127.0.0.1 or ::1")
            try:
                bind("::1").close()
            except OSError:
                continue
            with self.failing_bind(number, socket.AF_INET) as bound:
                self.assert_done(self.call("auth", "--no-browser", browser=visit_ipv6))
            self.assertEqual(bound, ["::1"])

    def test_ports_that_the_system_reserves_are_explained(self):
        for families in ([socket.AF_INET], [socket.AF_INET6]):
            with self.failing_bind(errno.EACCES, *families):
                result = self.call("auth", "--no-browser")
            listing = "netsh interface ipv4 show excludedportrange protocol=tcp"
            if POSIX:
                listing = "sysctl net.ipv4.ip_unprivileged_port_start"
            words = (f"listen on port {self.ports[0]} or {self.ports[1]}", "the system reserves")
            self.assert_fails(result, 1, *words, listing, "to sign in without a port, run")

    def test_it_can_listen_on_another_address(self):
        for address, is_public in (("0.0.0.0", True), ("127.0.0.1", False), ("::1", False)):
            for option in ("--no-browser", "--official"):
                with self.subTest(address, option=option):
                    environ = {"CHATGPT_OAUTH_CALLBACK_BIND": address}
                    running = self.start("auth", "--no-browser", option, environ=environ)
                    try:
                        callback_url = authorization_response(running.wait_for_url())
                    except AssertionError:
                        self.assertIn("cannot listen on ::1", running.err)
                        continue
                    self.assertIn(f":{self.ports[0]}/", callback_url)
                    # Only a listener on all addresses can be reached on this one.
                    host = "127.0.0.2" if is_public and sys.platform == "linux" else address
                    host = host.replace("0.0.0.0", "127.0.0.1").replace("::1", "[::1]")
                    path = callback_url[callback_url.index("/auth/") :]
                    self.assertEqual(visit(f"http://{host}:{self.ports[0]}{path}")[-1][1], 200)
                    warning = f"reach this sign-in on 0.0.0.0, port {self.ports[0]}"
                    err = self.assert_done(running.result()).err
                    self.assertEqual(warning in err, is_public, err)

    def test_two_sign_ins_use_both_ports(self):
        first, url = self.start_sign_in()
        second, other = self.start_sign_in()
        self.assertIn(f"%3A{self.ports[1]}%2F", other)
        self.finish_sign_in(second, other)
        self.finish_sign_in(first, url)

    def test_a_port_taken_on_ipv4_or_ipv6_alone_is_not_used(self):
        for address in ("127.0.0.1", "::1"):
            try:
                taken = bind(address, self.ports[0], reuse=True)
            except OSError as error:
                self.skipTest(f"no IPv6 here: {error}")
            with taken:
                taken.listen()
                running = self.start("auth", "--no-browser")
                self.assertIn(f"%3A{self.ports[1]}%2F", running.wait_for_url())
                running.process.kill()
                running.result()

    @needs_signals
    def test_the_port_is_free_after_ctrl_c(self):
        running, _ = self.start_sign_in()
        result = self.interrupt(running)
        self.assertEqual((result.code, result.out), (130, ""))
        self.assertTrue(result.err.endswith("Interrupted.\n"))
        self.take_ports()


# ---------------------------------------------------------------------------------------------
# Callback: its responses
# ---------------------------------------------------------------------------------------------


class CallbackTest(Case):
    def setUp(self):
        super().setUp()
        self.running, self.url = self.start_sign_in()
        self.state = query(self.url)["state"]

    def ask(self, target, method="GET", host=None, address="127.0.0.1", extra=()):
        """Send one request to the listener and return status, headers and page."""
        connection = http.client.HTTPConnection(address, self.ports[0], timeout=10)
        connection.putrequest(method, target, skip_host=True)
        if host is None:
            host = f"localhost:{self.ports[0]}"
        if host:
            connection.putheader("Host", host)
        for name, value in extra:
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        result = response.status, dict(response.getheaders()), response.read().decode()
        connection.close()
        return result

    def finish(self):
        self.finish_sign_in(self.running, self.url)

    def test_a_response_that_names_the_right_issuer_is_accepted(self):
        own = urllib.parse.quote(self.double.url, safe="")
        self.assertEqual(visit(f"{authorization_response(self.url)}&iss={own}%2F")[-1][1], 200)
        self.assert_done(self.running.result())

    def test_a_response_from_another_issuer_ends_the_sign_in(self):
        own = urllib.parse.quote(self.double.url, safe="")
        foreign = "https%3A%2F%2Fother.example.com"
        for issuer, shown in (
            (foreign, "https://other.example.com"),
            (foreign + "&error=access_denied", "https://other.example.com"),
            ("", "an unnamed issuer"),
            (own + "%2Fx", self.double.url + "/x"),
            (own + "&iss=x", "an unnamed issuer"),
        ):
            with self.subTest(issuer):
                running = self.start("auth", "--no-browser")
                right = authorization_response(running.wait_for_url())
                # With another state, it changes nothing, like any stray request.
                self.assertEqual(visit(right.replace("state=", "state=x") + "&iss=x")[-1][1], 400)
                self.assertIsNone(running.process.poll())
                page = visit(f"{right}&iss={issuer}")[-1]
                words = f"came from {shown}, not from {self.double.url}"
                self.assertEqual(page[1], 400)
                self.assertIn(words, page[3])
                self.assert_fails(running.result(), 1, words, "to try again, run")
        self.assertEqual(self.double.count("code"), 0)
        self.finish()

    def test_stray_requests_change_nothing(self):
        good = f"/auth/callback?code=x&state={self.state}"
        for expected, target, options in (
            (404, "/success", {}),
            (404, "/cancel", {}),
            (404, "/favicon.ico", {}),
            (404, "/auth/callback/", {}),
            (404, "/x", {}),
            (400, "/auth/callback", {}),
            (400, "/auth/callback?code=x", {}),
            (400, "/auth/callback?code=x&state=wrong", {}),
            (400, "/auth/callback?error=access_denied&state=wrong", {}),
            (400, f"/auth/callback?code=x&state={self.state}&state=y", {}),
            (400, f"/auth/callback?code=x&code=y&state={self.state}", {}),
            (400, f"/auth/callback?state={self.state}", {}),
            (400, f"/auth/callback?code=%00%ff&state={self.state}", {}),
            (400, good, {"host": "evil.example.com"}),
            (400, good, {"host": f"evil.example.com:{self.ports[0]}"}),
            (400, good, {"host": ""}),
            (400, good, {"extra": [("Host", "evil.example.com")]}),
            (405, good, {"method": "POST"}),
            (405, good, {"method": "HEAD"}),
            (405, good, {"method": "OPTIONS"}),
        ):
            with self.subTest(target=target, **options):
                status, headers, page = self.ask(target, **options)
                self.assertEqual(status, expected)
                self.assertNotIn("evil", page)
                self.assertIsNone(self.running.process.poll())
        self.finish()

    def test_every_loopback_name_is_served_at_any_port(self):
        for host in ("localhost", "LOCALHOST:8080", "127.0.0.1", "127.1.2.3:1455", "[::1]:80"):
            with self.subTest(host):
                self.assertEqual(self.ask("/x", host=host)[0], 404)
        for host in (
            "localhost:",
            "localhost:1x",
            "localhost.example.com",
            "127.0.0.1.example.com",
        ):
            with self.subTest(host):
                self.assertEqual(self.ask("/x", host=host)[0], 400)
        target = authorization_response(self.url).partition("/auth")[2]
        status, _, page = self.ask("/auth" + target, host="port-1455.example.com")
        self.assertEqual(status, 400)
        self.assertNotIn("paste", page)
        # The browser leaves out port 80.
        self.assertEqual(self.ask("/auth" + target, host="localhost")[0], 303)
        self.assertEqual(self.ask("/success", host="localhost")[0], 200)
        self.assert_done(self.running.result())

    def test_a_page_at_another_host_name_suggests_pasting_its_url(self):
        self.finish()
        self.running, self.url = self.start_sign_in(stdin=subprocess.PIPE)
        target = "/auth" + authorization_response(self.url).partition("/auth")[2]
        page = self.ask(target, host="port-1455.example.com")[2]
        self.assertIn("paste this page&#x27;s URL into the terminal", page)
        self.finish()

    def test_a_tls_connection_is_closed_at_once_and_explained(self):
        context = ssl._create_unverified_context()

        def connect():
            listener = ("127.0.0.1", self.ports[0])
            with socket.create_connection(listener, WAIT_LIMIT) as plain, self.assertRaises(
                OSError
            ):
                context.wrap_socket(plain, server_hostname="localhost")

        for _ in range(2):
            self.assert_fast(2, connect)
        self.running.wait_for_line("^warning: the browser used https")
        self.running.wait_for_line("^hint: .* http://127.0.0.1$")
        self.finish()
        self.assertEqual(self.running.err.count("https for this sign-in"), 1)

    def test_the_page_has_strict_security_headers(self):
        status, headers, page = self.ask("/")
        self.assertEqual(headers["Cache-Control"], "no-store")
        self.assertEqual(headers["Referrer-Policy"], "no-referrer")
        self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
        self.assertEqual(headers["Connection"], "close")
        policy = headers["Content-Security-Policy"]
        self.assertTrue(policy.startswith("default-src 'none'; style-src 'sha256-"), policy)
        style = re.search("<style>(.*)</style>", page)[1].encode()
        digest = base64.b64encode(hashlib.sha256(style).digest()).decode()
        self.assertIn(digest, policy)
        self.assertNotIn("<script", page)
        self.finish()

    def test_large_cookies_of_other_local_sites_are_accepted(self):
        callback_url = authorization_response(self.url)
        target = callback_url[callback_url.index("/auth") :]
        cookies = [("Cookie", "x" * 60000)] + [("Cookie", "y" * 4000)] * 50
        self.assertEqual(self.ask(target, extra=cookies)[0], 303)
        self.assertEqual(self.ask("/success", extra=cookies)[0], 200)
        self.assertEqual(self.running.result().code, 0)

    def test_it_listens_on_ipv4_and_ipv6(self):
        self.assertEqual(self.ask("/x")[0], 404)
        try:
            self.assertEqual(self.ask("/x", address="::1", host=f"[::1]:{self.ports[0]}")[0], 404)
        except OSError as error:
            self.skipTest(f"no IPv6 here: {error}")
        finally:
            self.finish()

    def test_a_repeated_response_is_exchanged_once(self):
        self.double.delay = 0.1
        callback_url = authorization_response(self.url)
        first = threading.Thread(target=visit, args=(callback_url,), daemon=True)
        first.start()
        wait_for(lambda: self.double.count("code"))
        self.assertEqual([page[1] for page in visit(callback_url)], [303, 200])
        first.join(WAIT_LIMIT)
        self.assertEqual(self.running.result().code, 0)
        self.assertEqual(self.double.count("code"), 1)

    def test_a_repeated_response_shows_the_failed_exchange(self):
        self.double.delay = 0.1
        self.fault("code", 400, b"{}")
        callback_url = authorization_response(self.url)
        with concurrent.futures.ThreadPoolExecutor(3) as browsers:
            pages = list(browsers.map(visit, [callback_url] * 3))
        self.assertEqual([page[-1][1] for page in pages], [400] * 3)
        self.assertEqual({page[-1][3] for page in pages}, {pages[0][-1][3]})
        self.assertIn("Sign-in failed", pages[0][-1][3])
        self.assert_fails(self.running.result(), 1, "(HTTP 400)")
        self.assertEqual(self.double.count("code"), 1)

    def test_a_prefetch_does_not_use_up_the_response(self):
        callback_url = authorization_response(self.url)
        target = callback_url[callback_url.index("/auth") :]
        for name, value in (
            ("Sec-Purpose", "prefetch"),
            ("Sec-Purpose", "prefetch;prerender"),
            ("Sec-Fetch-Dest", "image"),
            ("Sec-Fetch-Dest", "empty"),
            ("Sec-Fetch-Dest", "script"),
        ):
            with self.subTest(value):
                self.assertEqual(self.ask(target, extra=[(name, value)])[0], 400)
                self.assertEqual(self.double.count("code"), 0)
        self.assertEqual(self.ask(target, extra=[("Sec-Fetch-Dest", "document")])[0], 303)
        self.assertEqual(self.ask("/success", extra=[("Sec-Fetch-Dest", "document")])[0], 200)
        self.assert_done(self.running.result())

    def test_an_empty_error_parameter_is_ignored(self):
        self.assertEqual(self.ask(f"/auth/callback?error=&state={self.state}")[0], 400)
        self.assertIn("/success", visit(authorization_response(self.url) + "&error=")[-1][0])
        self.assert_done(self.running.result())

    def send_raw(self, data):
        """Send `data` to the listener and return everything that comes back."""
        with socket.create_connection(("127.0.0.1", self.ports[0]), WAIT_LIMIT) as connection:
            connection.sendall(data)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def test_other_methods_are_405_and_head_has_no_body(self):
        host = f"Host: localhost:{self.ports[0]}\r\n\r\n".encode()
        for method in (b"HEAD", b"POST", b"PUT", b"OPTIONS", b"TRACE"):
            with self.subTest(method):
                head, _, body = self.send_raw(method + b" / HTTP/1.1\r\n" + host).partition(
                    b"\r\n\r\n"
                )
                self.assertTrue(head.startswith(b"HTTP/1.1 405 "), head)
                self.assertIn(b"\r\nAllow: GET", head)
                self.assertEqual(body == b"", method == b"HEAD")
        self.finish()

    def test_the_size_of_a_request_head_is_limited(self):
        host = f"Host: localhost:{self.ports[0]}\r\n".encode()
        for head, status in (
            (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n" + host, b"414"),
            # The head is cut off before its Host line.
            (b"GET / HTTP/1.1\r\nX: " + b"x" * 70000 + b"\r\n" + host, b"400"),
            (b"GET / HTTP/1.1\r\n" + host + b"X: y\r\n" * 200, b"431"),
            (b"GET / HTTP/1.1\r\n" + host + b"X: " + b"x" * 10000 + b"\r\n", b"404"),
        ):
            with self.subTest(status):
                self.assertEqual(self.send_raw(head + b"\r\n").split(b" ")[1], status)
        self.finish()

    def test_an_endless_request_head_is_disconnected(self):
        self.finish()
        self.assertEqual(oauth.HEAD_TIMEOUT, 10)
        self.waits.update(HEAD_TIMEOUT=1)
        durations = []

        def trickle(url, size, pause):
            with socket.create_connection(("127.0.0.1", self.ports[0]), 20) as slow:
                began = time.monotonic()
                # A socket timeout would start again with each byte and never run out. A byte that
                # is sent after the listener has hung up resets the connection.
                with contextlib.suppress(ConnectionError):
                    while not select.select([slow], [], [], pause)[0]:
                        slow.sendall(b"G" * size)
                        self.assertLess(time.monotonic() - began, 20)
                    self.assertEqual(slow.recv(1), b"")
                durations.append(time.monotonic() - began)
            visit(url)

        # Without a pause, there are always more bytes to read.
        for size, pause in ((1, 0.05), (1 << 20, 0)):
            with self.subTest(size):
                browser = functools.partial(trickle, size=size, pause=pause)
                sign_in = functools.partial(self.call, "auth", "--no-browser", browser=browser)
                self.assert_done(self.assert_fast(3, sign_in)[1])
                self.assertGreater(min(durations), 0.9)

    def test_the_oldest_of_more_than_64_idle_connections_is_dropped(self):
        silent = []
        for _ in range(70):
            silent.append(socket.create_connection(("127.0.0.1", self.ports[0]), WAIT_LIMIT))
            self.addCleanup(silent[-1].close)
        # Of 70 connections, the listener has closed the first 6.
        for each in silent[:6]:
            self.assertEqual(each.recv(1), b"")
        self.assertEqual(select.select(silent[6:], [], [], 0.2)[0], [])
        self.finish()

    @needs_proc
    @unittest.skipUnless(shutil.which("prlimit"), "no prlimit here")
    def test_running_out_of_file_descriptors_is_silent(self):
        # Until it prints this line, the program opens files to load modules.
        self.running.wait_for_line("auth --device$")
        time.sleep(0.1)
        pid = str(self.running.process.pid)
        used = len(os.listdir(f"/proc/{pid}/fd"))
        limit = ["prlimit", "--pid", pid, f"--nofile={used + 3}:4096"]
        subprocess.run(limit, check=True, timeout=WAIT_LIMIT)
        silent = []
        for _ in range(10):
            silent.append(socket.create_connection(("127.0.0.1", self.ports[0]), WAIT_LIMIT))
            self.addCleanup(silent[-1].close)
        time.sleep(0.2)
        before = cpu_seconds(pid)
        time.sleep(0.3)
        self.assertLess(cpu_seconds(pid) - before, 0.15)
        subprocess.run(["prlimit", "--pid", pid, "--nofile=4096"], check=True, timeout=WAIT_LIMIT)
        visit(self.url)
        self.assertNotIn("Exception", self.assert_done(self.running.result()).err)

    def test_bad_requests_do_not_delay_the_real_one(self):
        self.bombard(200, 100)

    def bombard(self, requests, idle):
        """Send bad requests of ten kinds, open silent connections, then send the real request."""
        host = f"Host: localhost:{self.ports[0]}\r\n".encode()
        rng = random.Random(5)
        good = f"/auth/callback?code=x&state={self.state}".encode()
        kinds = (
            lambda: bytes(rng.randrange(256) for _ in range(300)) + b"\r\n\r\n",
            lambda: b"GET /" + b"a" * 1000000 + b" HTTP/1.1\r\n\r\n",
            lambda: b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10000 + b"\r\n",
            lambda: b"GET /auth",
            lambda: b"GET /auth/callback?code=x&state=no HTTP/1.1\r\n" + host + b"\r\n",
            lambda: b"GET " + good + b" HTTP/1.1\r\nHost: evil.example.com\r\n\r\n",
            lambda: b"POST " + good + b" HTTP/1.1\r\n" + host + b"\r\n",
            lambda: b"GET " + good + b"&state=2 HTTP/1.1\r\n" + host + b"\r\n",
            lambda: b"GET /auth/callback?state=%ff\xff HTTP/1.1\r\n" + host + b"\r\n",
            lambda: b"GET " + good + b"\0 HTTP/1.1\r\n" + host + b"\r\n",
        )
        # The first request loads modules, which is not to be measured.
        self.ask("/warm")
        before = memory_in_kib(self.running.process.pid)
        silent = []
        for _ in range(idle):
            silent.append(socket.create_connection(("127.0.0.1", self.ports[0]), WAIT_LIMIT))
        for number in range(requests):
            bad = kinds[number % 10]()
            listener = ("127.0.0.1", self.ports[0])
            with contextlib.suppress(OSError), socket.create_connection(listener, 5) as sender:
                sender.sendall(bad)
                # Wait for every third response. The fourth kind is incomplete and gets none.
                if number % 3 == 0 and number % 10 != 3:
                    sender.recv(100)
        bound = 20 if sys.implementation.name == "cpython" else 64  # MiB
        self.assertLess(memory_in_kib(self.running.process.pid) - before, bound << 10)
        self.assert_fast(1, self.ask, "/warm")
        self.assertEqual(visit(self.url)[-1][1], 200)
        for each in silent:
            each.close()
        self.assert_done(self.running.result())


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


class ModelsTest(Case):
    def setUp(self):
        super().setUp()
        self.double.api_keys.add("sk-mine")
        self.store(api_key="sk-mine")

    def names(self, *arguments, **environ):
        """Return the names of the entries that `models` would write."""
        result = self.call("models", "--dry-run", *arguments, environ=environ)
        self.assertEqual(result.code, 0, result.err)
        return result.out.split()

    def test_patterns_filter_the_models(self):
        self.assertEqual(self.names(), ["chatgpt-gpt-4o", "chatgpt-o1-mini", "chatgpt-o3-pro"])
        self.assertEqual(self.names("--include", "dall-*"), ["chatgpt-dall-e-3"])
        self.assertEqual(self.names("--include", "*audio*"), ["chatgpt-gpt-4o-audio-preview"])
        self.assertEqual(self.names("--exclude", "o?-*"), ["chatgpt-gpt-4o"])
        self.assertEqual(len(self.names("--all")), 5)
        self.assertEqual(
            self.names("--all", "--exclude", "gpt*"),
            [f"chatgpt-{n}" for n in ("o1-mini", "dall-e-3", "o3-pro")],
        )
        self.assertEqual(self.names("--source", "codex"), ["chatgpt-gpt-5.5", "chatgpt-gpt-5.4"])
        self.assertEqual(
            self.names(CHATGPT_OAUTH_PREFIX="x-", CHATGPT_OAUTH_MODEL_PATTERNS="o3*"), ["x-o3-pro"]
        )
        self.assertEqual(len(self.names(CHATGPT_OAUTH_MODEL_EXCLUDES="")), 4)
        self.assertFalse(self.models_file.exists())

    def test_patterns_without_a_match_change_nothing(self):
        self.assertEqual(self.call("models").code, 0)
        before = self.models_file.read_text()
        for arguments in (
            ("--include", "GPT-*"),
            ("--exclude", "*"),
            ("--include", "x*", "--json"),
            ("--include", "x*", "--dry-run"),
        ):
            result = self.call("models", *arguments)
            hint = "models --source api --all --dry-run"
            self.assert_fails(result, 1, "none of the account's 5 models", hint)
            self.assertEqual(self.models_file.read_text(), before)
        err = self.sign_in("--include", "GPT-*")
        self.assertIn("warning: none of the account's 5 models match", err)
        self.assertEqual(self.models_file.read_text(), before)
        result = self.call("models", environ={"CHATGPT_OAUTH_MODEL_PATTERNS": "GPT-*"})
        self.assertEqual((result.code, result.out), (0, ""))
        self.assertIn("warning: none of the account's 5 models match", result.err)
        self.assertEqual(self.stored_models(), {})

    def test_a_changed_order_is_written(self):
        self.assertEqual(self.call("models", "--source", "codex").code, 0)
        self.double.codex_models.reverse()
        self.assertEqual(self.call("models", "--source", "codex").code, 0)
        self.assertEqual(list(self.stored_models()), ["chatgpt-gpt-5.4", "chatgpt-gpt-5.5"])

    def test_models_json_lists_the_imported_entries(self):
        out = self.call("models", "--json").out
        self.assertEqual(json.loads(out)["model_source"], "api")
        self.assertEqual(json.loads(out)["models"], list(self.stored_models()))
        self.assertEqual(
            json.loads(self.call("status", "--json").out)["models"], json.loads(out)["models"]
        )

    def entries(self, *arguments, **environ):
        """Import the models and return the content of the models file."""
        self.assertEqual(self.call("models", *arguments, environ=environ).code, 0)
        return self.stored_models()

    def plan_entry(self, **listed):
        """Return the entry in the models file of a plan model with these catalog fields."""
        self.double.codex_models = [{"slug": "gpt-6", "visibility": "list", **listed}]
        return self.entries("--source", "codex")["chatgpt-gpt-6"]

    def test_the_newest_api_model_comes_first(self):
        self.double.created = {"gpt-4o": 5, "o1-mini": "x", "o3-pro": 7}
        names = ["chatgpt-o3-pro", "chatgpt-gpt-4o", "chatgpt-o1-mini"]
        self.assertEqual(self.names(), names)
        self.assertEqual(list(self.entries()), names)
        self.double.created["gpt-4o"] = 9
        self.assertEqual(list(self.entries())[0], "chatgpt-gpt-4o")

    def test_api_models_use_the_responses_endpoint_except_chat_patterns(self):
        def types(**environ):
            entries = self.entries(**environ).items()
            return {name[len("chatgpt-") :]: entry["type"] for name, entry in entries}

        self.double.api_models = ["gpt-6-sol", "gpt-5.4", "o3-pro", "gpt-4o", "gpt-3.5-turbo"]
        responses = dict.fromkeys(("gpt-6-sol", "gpt-5.4", "o3-pro"), "custom_openai_responses")
        chat = dict.fromkeys(("gpt-4o", "gpt-3.5-turbo"), "custom_openai")
        self.assertEqual(types(), {**responses, **chat})
        self.assertEqual(
            set(types(CHATGPT_OAUTH_CHAT_PATTERNS="").values()), {"custom_openai_responses"}
        )
        self.assertEqual(set(types(CHATGPT_OAUTH_CHAT_PATTERNS="*").values()), {"custom_openai"})
        entries = self.entries().values()
        self.assertEqual({entry["context_length"] for entry in entries}, {128000})

    def test_models_past_their_shutdown_date_are_left_out(self):
        def day(days):
            return timestamp(time.time() + days * 86400)[:10]

        self.double.shutdown_dates = {"gpt-4o": day(-2), "o1-mini": day(2), "o3-pro": "soon"}
        self.assertEqual(self.names(), ["chatgpt-o1-mini", "chatgpt-o3-pro"])
        self.assertNotIn("chatgpt-gpt-4o", self.names("--all"))
        self.double.codex_models[0]["shutdown_date"] = day(-2)
        self.assertEqual(self.names("--source", "codex"), ["chatgpt-gpt-5.4"])

    def test_a_shutdown_date_ends_with_its_day(self):
        self.double.shutdown_dates = {"gpt-4o": "2026-12-11"}
        # The day ends twelve hours later in the westernmost time zone than in UTC.
        noon = calendar.timegm((2026, 12, 12, 12, 0, 0))
        for now, is_listed in ((noon - 1, True), (noon, False)):
            clock = FakeClock()
            clock.start = now
            out = self.assert_quiet(self.call_at(clock, "models", "--dry-run")).out
            self.assertEqual("chatgpt-gpt-4o\n" in out, is_listed)

    def test_effort_levels_come_from_the_catalog(self):
        levels = [{"effort": e} for e in ("max", "low", "xhigh", "ultra")]
        entry = self.plan_entry(
            supported_reasoning_levels=[*levels, "x", {"effort": []}], default_reasoning_level="low"
        )
        self.assertEqual(entry["setting_choices"], {"reasoning_effort": ["low", "xhigh", "max"]})
        self.assertEqual(entry["setting_defaults"], {"reasoning_effort": "low"})
        self.assertIs(entry["supports_xhigh_reasoning"], True)
        self.assertIs(entry["supports_max_reasoning"], True)
        entry = self.plan_entry(
            supported_reasoning_levels=[{"effort": "high"}], default_reasoning_level="ultra"
        )
        self.assertEqual(entry["setting_choices"], {"reasoning_effort": ["high"]})
        for name in ("setting_defaults", "supports_xhigh_reasoning", "supports_max_reasoning"):
            self.assertNotIn(name, entry)
        for levels in (None, "x", [], [5]):
            self.assertNotIn("setting_choices", self.plan_entry(supported_reasoning_levels=levels))

    def test_plausible_context_lengths_come_from_the_catalog(self):
        def length(**listed):
            return self.plan_entry(**listed)["context_length"]

        # Without a percentage, 95 % of the window are used, and without a window, 95 % of 272000.
        self.assertEqual(length(context_window=272000), 258400)
        self.assertEqual(length(context_window=100000, effective_context_window_percent=90), 90000)
        self.assertEqual(length(context_window=100000, effective_context_window_percent=0), 95000)
        self.assertEqual(length(max_context_window=100000), 95000)
        self.assertEqual(length(context_window=2, max_context_window=100000), 95000)
        for window in (None, "x", 2, 15999, 10**11, True, -5):
            self.assertEqual(length(context_window=window), 258400)

    def test_a_default_context_length_applies_to_both_kinds_of_models(self):
        self.double.codex_models = [{"slug": "gpt-6"}, {"slug": "gpt-7", "context_window": 100000}]

        def lengths(source, **environ):
            entries = self.entries("--source", source, **environ)
            return [entry["context_length"] for entry in entries.values()]

        self.assertEqual(set(lengths("api")), {128000})
        self.assertEqual(lengths("codex"), [258400, 95000])
        for length in (64000, 128000, 258400):
            environ = {"CHATGPT_OAUTH_DEFAULT_CONTEXT_LENGTH": str(length)}
            self.assertEqual(set(lengths("api", **environ)), {length})
            self.assertEqual(lengths("codex", **environ), [length, 95000])
            with mock.patch.dict(oauth.CHATGPT_OAUTH_CONFIG, {"default_context_length": length}):
                self.assertEqual(lengths("codex"), [length, 95000])

    def test_invalid_model_ids_are_skipped_with_one_warning(self):
        texts = ["a b", "$(x)", "\x1b[31m", "-x", "y" * 200, ""]
        models = self.double.api_models
        for invalid in (texts, [None, True, 5]):
            self.double.api_models = models + invalid
            result = self.call("models", "--all", "--dry-run")
            self.assertEqual(len(result.out.split()), 5)
            self.assertIn(f"warning: skipped {len(invalid)} models", result.err)
            self.assertNotIn("\x1b", result.out + result.err)

    def test_a_refused_api_key_has_a_hint(self):
        self.double.api_keys.clear()
        hint = "hint: to get a new API key, run: "
        self.assert_fails(self.call("models"), 1, "HTTP 401", hint, " auth\n")
        self.assertEqual(self.double.count("refresh"), 0)

    def test_an_unusable_list_of_models_has_a_hint(self):
        for status, body in ((404, b"{}"), (400, b"x"), (302, b""), (200, b"[]"), (200, b"{}")):
            for source in ("api", "codex"):
                self.fault(source, status, body)
                result = self.call("models", "--source", source)
                hint = "hint: to see what OpenAI accepts, run: ", " status --online\n"
                if status == 302:
                    hint = ("hint: check HTTPS_PROXY and your network, then try again\n",)
                self.assert_fails(result, 1, "could not list models", *hint)

    def test_a_forbidden_list_of_models_has_a_hint(self):
        self.fault("codex", 403, {"detail": "not included"})
        command = ("models", "--source", "codex")
        hint = "hint: to use another account, run: "
        self.assert_fails(self.call(*command), 1, "not included", hint, " auth\n")
        self.fault("codex", 403, {"error": {"code": "unsupported_country_region_territory"}})
        self.assert_fails(self.call(*command), 5, "supported region")
        self.assertEqual(self.double.count("refresh"), 0)

    def test_a_newer_stored_token_is_tried_after_a_401_before_a_refresh(self):
        del self.double.access_tokens[self.store()["access_token"]]

        def store_newer(*_):
            del self.double.faults["codex"]
            self.store()

        self.double.faults["codex"] = store_newer
        self.assertEqual(self.call("models", "--source", "codex", "--dry-run")[0], 0)
        self.assertEqual((self.double.count("codex"), self.double.count("refresh")), (2, 0))

    def test_a_refresh_without_account_ids_is_no_change_of_account(self):
        self.store(lifetime=-10, account_id=None, access_token="opaque", id_token=None)
        opaque = {"access_token": "new", "refresh_token": "rt_new", "expires_in": 3600}
        self.double.access_tokens["new"] = "acct-1"
        self.fault("refresh", 200, opaque)
        self.fault("codex", 200, {"models": self.double.codex_models})
        result = self.call("models", "--source", "codex")
        self.assertEqual((result.code, result.err.count("another account")), (0, 0), result.err)
        self.assertEqual(self.stored()["access_token"], "new")

    def test_a_rejected_access_token_is_refreshed_once(self):
        def counts():
            return self.double.count("refresh"), self.double.count("codex")

        command = ("models", "--source", "codex", "--dry-run")
        self.fault("codex", 401, b"<html>")
        self.assert_fails(self.call(*command), 5, "web page")
        self.assertEqual(counts(), (0, 1))
        self.fault_once("codex", 401)
        self.assertIn("gpt-5.5", self.assert_quiet(self.call(*command)).out)
        self.assertEqual(counts(), (1, 3))
        self.fault("codex", 401)
        self.assert_fails(self.call(*command), 4, "HTTP 401", "to sign in again, run: ")
        self.assertEqual(counts(), (2, 5))

    def test_many_processes_with_a_rejected_token_refresh_once(self):
        self.double.access_tokens.clear()
        processes = [self.start("models", "--source", "codex", "--dry-run") for _ in range(6)]
        for each in processes:
            self.assertIn("gpt-5.5", self.assert_quiet(each.result()).out)
        self.assertEqual(self.double.count("refresh"), 1)

    def test_a_sign_out_during_the_import_writes_no_models(self):
        def sign_out(handler, _):
            self.token_file.unlink()

        self.double.faults["api"] = sign_out
        self.assert_fails(self.call("models"), 3, "not signed in")
        self.assertFalse(self.models_file.exists())

    def test_api_models_need_an_api_key(self):
        self.store(self.stored(), api_key=None)
        self.assert_fails(self.call("models", "--source", "api"), 1, "no API key")

    def test_entries_of_other_programs_stay(self):
        others = {
            "mine": {"type": "openai"},
            "codex-gpt-6": {"oauth_source": "chatgpt-oauth-plugin"},
            "chatgpt-mine": {"type": "openai"},
            "chatgpt-gpt-4o": {"type": "mine"},
            "odd": 5,
            "chatgpt-odd": None,
        }
        ours = {"chatgpt-old": {"oauth_source": "chatgpt-oauth-plugin"}}
        self.models_file.write_text(json.dumps({**others, **ours}))
        self.assertIn("kept the entry chatgpt-gpt-4o, which another program added", self.sign_in())
        after = self.stored_models()
        self.assertEqual({k: v for k, v in after.items() if k in others}, others)
        self.assertEqual(set(after) - set(others), {"chatgpt-o1-mini", "chatgpt-o3-pro"})
        self.assertEqual(self.call("logout").code, 0)
        self.assertEqual(self.stored_models(), others)

    def test_a_broken_models_file_is_reported_and_left_alone(self):
        self.models_file.write_text("[")
        err = self.call("auth", "--no-browser", browser=visit).err
        self.assertIn("chatgpt_models.json: not valid JSON", err)
        self.assertIn("To use the API key in ", err)
        self.assert_fails(self.call("models"), 6, "chatgpt_models.json: not valid JSON")
        self.assertEqual(self.call("status").code, 6)
        self.assertEqual(self.models_file.read_text(), "[")

    def test_the_module_lists_models_unfiltered(self):
        with mock.patch.dict(os.environ, self.environ, clear=True):
            self.assertEqual(oauth.fetch_chatgpt_models(), self.double.api_models)
            self.assertEqual(oauth.fetch_chatgpt_models(source="codex"), ["gpt-5.5", "gpt-5.4"])
            with self.assertRaises(oauth.UsageError):
                oauth.fetch_chatgpt_models(source="x")


# ---------------------------------------------------------------------------------------------
# Sign-in: with a browser
# ---------------------------------------------------------------------------------------------


class SignInTest(Case):
    def test_an_account_without_an_organization_uses_its_plan(self):
        self.double.organization = None
        err = self.sign_in()
        self.assertIn("\nNo API key (this account has no organization). ", err)
        self.assertNotIn("warning", err)
        self.assertIn("your ChatGPT plan", err)
        self.assertNotIn("api_key", self.stored())
        models = self.stored_models()
        self.assertEqual(
            models["chatgpt-gpt-5.5"],
            {
                "type": "chatgpt_oauth",
                "name": "gpt-5.5",
                "custom_endpoint": {"url": self.double.url + "/codex-backend"},
                "context_length": 258400,
                "oauth_source": "chatgpt-oauth-plugin",
                "supported_settings": ["reasoning_effort", "summary", "verbosity"],
            },
        )
        self.assertEqual(models["chatgpt-gpt-5.4"]["context_length"], 90000)
        self.assertNotIn("chatgpt-gpt-5.4-secret", models)
        sent = [e for e in self.double.requests if e["endpoint"] == "codex"][0]
        self.assertEqual(sent["fields"]["client_version"], "0.171.0")
        self.assertEqual(sent["headers"]["originator"], "chatgpt_oauth")
        self.assertEqual(sent["headers"]["chatgpt-account-id"], "acct-1")
        result = self.run_program("status")
        self.assertEqual(result.code, 0)
        self.assertRegex(result.out, r"\nNo API key; to get one, create an .+, then run: .+ auth\n")
        result = self.run_program("env")
        self.assert_fails(result, 1, "no API key", "--access-token\n", one_line=True)
        result = self.run_program("env", "--shell", "fish")
        self.assert_fails(result, 1, "env --shell fish --access-token\n", one_line=True)
        self.assert_fails(self.run_program("token", "--api-key"), 1, "no API key")
        out = self.run_program("env", "--access-token", "--shell", "json").out
        stored = self.stored()
        expected = {
            "CHATGPT_OAUTH_ACCESS_TOKEN": stored["access_token"],
            "CHATGPT_OAUTH_ACCOUNT_ID": "acct-1",
        }
        self.assertEqual(json.loads(out), expected)

    def test_auth_first_names_the_sign_in_it_replaces(self):
        self.assertNotIn("replaces", self.sign_in())
        self.double.email = "bob@example.com"
        err = self.sign_in()
        self.assertTrue(err.startswith("You are signed in as ada@example.com. "), err)
        self.assertIn("Signed in as bob@example.com\n", err)
        self.store(id_token=None)
        line = "You are signed in as an unknown account. A new sign-in replaces it.\n"
        self.assertTrue(self.sign_in().startswith(line))
        # Nobody is signed in any more after the session has ended.
        for lifetime in (-10, 3600):
            self.store(lifetime=lifetime, refresh_token="rt_unknown")
            self.assert_fails(self.call("token", "--refresh"), 4, "session has ended")
            self.assertNotIn("replaces", self.sign_in())

    def test_without_a_terminal_the_official_sign_in_suggests_one(self):
        place = "with a terminal (-it)" if IN_CONTAINER else "in a terminal"
        published = f"- Open the URL on the machine that publishes port {self.ports[0]}.\n"
        for address in ("", "0.0.0.0"):
            with self.subTest(address):
                environ = {"BROWSER": "lynx", "CHATGPT_OAUTH_CALLBACK_BIND": address}
                result = self.call("auth", "--official", environ=environ, browser=visit)
                err = self.assert_done(result).err
                _, _, ways = err.partition("\nUse a browser on any machine:\n")
                self.assertIn(f"- To paste the browser's last URL, run this {place}:\n    ", ways)
                self.assertIn(" auth --official\n", ways)
                self.assertEqual(published in ways, IN_CONTAINER and bool(address))

    def test_other_ways_are_explained_if_no_browser_opens(self):
        port = self.ports[0]
        tunnel, device = f"ssh -L {port}:localhost:{port}", "auth --device"
        err = self.sign_in()
        # SSH doesn't lead into a container.
        self.assertEqual(tunnel in err, not IN_CONTAINER)
        self.assertIn(device, err)
        with mock.patch.object(subprocess, "Popen") as popen:
            popen.return_value.wait.return_value = 0
            environ = {"BROWSER": shell_line(sys.executable)}
            err = self.assert_done(self.call("auth", environ=environ, browser=visit)).err
        self.assertIn("Opening your browser", err)
        self.assertNotIn(tunnel, err)
        self.assertNotIn(device, err)

    def test_a_sign_in_to_another_workspace_is_refused(self):
        before = self.store()
        for arguments, environ in (
            (("--workspace", "acct-2"), {}),
            (("--workspace", "acct-2"), {"CHATGPT_OAUTH_WORKSPACE": "acct-1"}),
            ((), {"CHATGPT_OAUTH_WORKSPACE": "acct-2"}),
        ):
            result = self.call("auth", "--no-browser", *arguments, environ=environ, browser=visit)
            self.assert_fails(result, 1, "the wrong workspace, acct-1\nhint: choose acct-2 in")
            self.assertEqual(
                self.double.requests_to("authorize")[-1]["allowed_workspace_id"], "acct-2"
            )
            self.assertEqual(self.stored(), before)
        command = ("auth", "--device", "--workspace", "acct-2")
        result = self.call(*command)
        self.assert_fails(result, 1, "the wrong workspace, acct-1\nhint: choose acct-2 in")
        self.assertTrue(result.err.endswith(" auth --device --workspace acct-2\n"), result.err)
        self.assertEqual(self.stored(), before)
        self.fault("device", 400, {"error": "expired_token"})
        err = self.assert_fails(self.call(*command), 1, "to get a new code, run: ").err
        self.assertTrue(err.endswith(" auth --device --workspace acct-2\n"), err)
        del self.double.faults["device"]
        # A revocation could end the grant of the stored sign-in.
        self.assertEqual(self.double.count("revoke"), 0)
        self.double.account = "acct-2"
        self.sign_in("--workspace", "acct-2")
        self.assertEqual(self.stored()["account_id"], "acct-2")
        self.sign_in()
        self.assertNotIn("allowed_workspace_id", self.double.requests_to("authorize")[-1])

    def test_hints_repeat_the_workspace(self):
        arguments = ("auth", "--no-browser", "--workspace", "acct-2", "--timeout", "0.1")
        err = self.assert_fails(self.call(*arguments), 1, "auth --workspace acct-2 --timeout").err
        self.assertIn(" auth --device --workspace acct-2\n", err)
        self.take_ports()
        self.assert_fails(self.call(*arguments), 1, "run: ", "auth --device --workspace acct-2\n")

    def test_the_workspace_is_shown_after_a_sign_in(self):
        self.double.plan = "team"
        self.assertIn("Signed in as ada@example.com (workspace acct-1)\n", self.sign_in())
        self.double.plan, self.double.title = "enterprise_cbp_usage_based", "Acme \x1b[1mInc."
        err = self.sign_in()
        self.assertIn("Signed in as ada@example.com (workspace Acme ?[1mInc., acct-1)\n", err)
        for plan in ("ent26", "edu_plus", "self_serve_business_prolite"):
            self.double.plan, self.double.title = plan, None
            self.assertIn("Signed in as ada@example.com (workspace acct-1)\n", self.sign_in())
        for plan in ("pro", "promax"):
            self.double.plan = plan
            self.assertIn("Signed in as ada@example.com\n", self.sign_in())

    def test_the_success_page_comes_after_the_tokens_are_stored(self):
        seen = []

        def look(handler, fields):
            seen.append(self.token_file.exists())
            return False

        self.double.faults["key"] = look
        self.double.delay = 0.1
        running = self.start("auth", "--no-browser")
        pages = visit(authorization_response(running.wait_for_url()), follow=False)
        self.assertTrue(self.token_file.exists())
        self.assertEqual(pages[0][1], 303)
        self.finish_sign_in(running, urllib.parse.urljoin(pages[0][0], "/success"))
        self.assertEqual(seen, [True])

    def test_every_tab_that_brought_the_response_gets_the_success_page(self):
        running = self.start("auth", "--no-browser")
        callback_url = authorization_response(running.wait_for_url())
        success_url = urllib.parse.urljoin(callback_url, "/success")
        for _ in range(2):
            self.assertEqual([page[1] for page in visit(callback_url, follow=False)], [303])
        # An image on a page of another site doesn't count as a tab.
        for _ in range(3):
            request = urllib.request.Request(success_url, headers={"Sec-Fetch-Dest": "image"})
            urllib.request.urlopen(request, timeout=WAIT_LIMIT).close()
        began = time.monotonic()
        for _ in range(2):
            self.assertIn("You're signed in", visit(success_url)[0][3])
        self.assert_done(running.result())
        # After the second tab, the program doesn't wait for more, which would take five seconds.
        self.assertLess(time.monotonic() - began, 4)

    def test_a_clock_after_the_year_9999_does_not_break_the_page(self):
        code = (
            "import time, chatgpt_oauth as oauth; time.time = lambda: 1e12; "
            "sys.exit(oauth.main(['auth', '--no-browser']))"
        )
        running = self.start_python(code)
        self.assertEqual([page[1] for page in visit(running.wait_for_url())], [302, 303, 200])
        self.assert_done(running.result())

    def test_the_wait_for_the_success_page_is_short(self):
        self.assertEqual(oauth.SUCCESS_PAGE_TIMEOUT, 5)
        self.waits.update(SUCCESS_PAGE_TIMEOUT=0.3)
        redirected = []

        def leave(url):
            visit(authorization_response(url), follow=False)
            redirected.append(time.monotonic())

        err = self.assert_done(self.call("auth", "--no-browser", browser=leave)).err
        self.assertIn("To use the API key", err)
        self.assertTrue(0.2 < time.monotonic() - redirected[0] < 2.5)

    def test_an_access_token_is_not_stored_as_the_api_key(self):
        self.fault("key", 200, {"access_token": encode_jwt({"a": 1})})
        self.assertIn("warning: could not get an API key", self.sign_in())
        self.assertNotIn("api_key", self.stored())

    def test_an_unavailable_list_of_models_does_not_undo_the_sign_in(self):
        self.fault("api", 500, b"{}")
        err = self.sign_in()
        self.assertIn("warning: could not list models (HTTP 500): server error", err)
        self.assertIn("To use the API key in ", err)
        self.assertTrue(self.stored()["api_key"])
        self.assertFalse(self.models_file.exists())

    def test_a_long_refusal_still_shows_that_there_is_no_organization(self):
        message = "x " * 200 + "missing organization_id"
        self.fault("key", 401, {"error": {"message": message}})
        self.assertIn("\nNo API key (this account has no organization). ", self.sign_in())

    def test_an_api_key_is_not_stored_beside_the_tokens_of_another_person(self):
        def sign_in_another_member_of_the_workspace(*_):
            self.store(api_key="sk-1", id_token=encode_jwt({"email": "bob@example.com"}))

        self.double.faults["key"] = sign_in_another_member_of_the_workspace
        err = self.sign_in()
        self.assertRegex(err, r"\nwarning: another process .*\nhint: to try again, run: .* auth\n")
        self.assertNotIn("API key available", err)
        self.assertEqual(self.stored()["api_key"], "sk-1")

    def test_a_new_sign_in_keeps_an_accepted_api_key(self):
        self.sign_in()
        key = self.stored()["api_key"]
        self.store(self.stored(), mine="kept")
        self.sign_in()
        self.assertEqual(self.stored()["api_key"], key)
        self.assertEqual(self.stored()["mine"], "kept")
        self.assertEqual(self.double.count("key"), 1)
        # Neither response says that the key is refused.
        for status, body in ((503, b"{}"), (401, b"<html>")):
            self.fault("api", status, body)
            self.sign_in()
            self.assertEqual(self.stored()["api_key"], key)
        del self.double.faults["api"]
        self.double.api_keys.clear()
        self.sign_in()
        self.assertNotEqual(self.stored()["api_key"], key)
        self.assertEqual(self.double.count("key"), 2)
        self.assertEqual(self.double.count("revoke"), 0)

    def test_another_member_of_the_workspace_gets_their_own_api_key(self):
        self.sign_in()
        key = self.stored()["api_key"]
        self.double.email = "bob@example.com"
        self.assertNotIn("unchanged", self.sign_in())
        self.assertNotEqual(self.stored()["api_key"], key)

    def test_another_account_replaces_and_revokes_the_old_sign_in(self):
        self.sign_in()
        old = self.stored()
        self.store(old, mine="gone")
        self.double.account, self.double.organization = "acct-2", None
        self.sign_in()
        self.assertNotIn("api_key", self.stored())
        self.assertNotIn("mine", self.stored())
        self.assertEqual(self.stored()["account_id"], "acct-2")
        self.assertNotIn(old["refresh_token"], self.double.refresh_tokens)
        sent = self.double.requests_to("revoke")[0]
        self.assertEqual(sent["token_type_hint"], "refresh_token")
        self.assertEqual(sent["client_id"], self.double.client_id)

    def test_a_failed_sign_in_keeps_the_old_one(self):
        before = self.store()
        self.fault("code", 400, b"{}")
        running = self.start("auth", "--no-browser")
        page = visit(running.wait_for_url())[-1]
        self.assertEqual(page[1], 400)
        self.assertIn("Sign-in failed", page[3])
        self.assert_fails(running.result(), 1, "could not exchange the code (HTTP 400)")
        self.assertEqual(self.stored(), before)

    def test_an_invalid_optional_token_does_not_undo_a_sign_in(self):
        for name in ("id_token", "refresh_token"):
            for invalid in ("", "a b", 5):
                with self.subTest(name, invalid=invalid):
                    response = {**self.double.tokens(), name: invalid}
                    self.fault("code", 200, response)
                    err = self.sign_in()
                    self.assertEqual(self.stored()["access_token"], response["access_token"])
                    self.assertNotIn(name, self.stored())
                    self.assertEqual(f"ignored the {name}" in err, invalid != "")
                    self.assertEqual(self.call("logout", "--local").code, 0)

    def fill_the_disk(self, running):
        """Make the disk of a running sign-in full as soon as its tokens arrive."""
        import resource

        self.require(hasattr(resource, "prlimit"), "no limits of another process here")

        def fill(*_):
            resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (10, 10))

        self.double.faults["code"] = fill

    @needs_signals
    def test_a_sign_in_that_cannot_be_stored_is_revoked(self):
        self.double.device_polls = 0
        for option in ("--no-browser", "--device"):
            self.double.requests.clear()
            running = self.start("auth", option, frozen=True)
            self.fill_the_disk(running)
            if option == "--no-browser":
                self.assertEqual(visit(running.wait_for_url())[-1][1], 400)
            self.assert_fails(running.result(), 6, str(self.token_file))
            self.assertEqual(self.double.count("revoke"), 1)
            self.assertEqual(self.double.refresh_tokens, {})
            self.assertFalse(self.token_file.exists())

    @needs_signals
    def test_a_sign_in_that_cannot_be_stored_keeps_the_old_one(self):
        before = self.store()
        running = self.start("auth", "--no-browser", frozen=True)
        self.fill_the_disk(running)
        visit(running.wait_for_url())
        self.assert_fails(running.result(), 6, str(self.token_file))
        self.assertEqual(self.stored(), before)
        # A revocation could end the whole grant.
        self.assertEqual(self.double.count("revoke"), 0)
        self.assert_nothing_lost()

    def test_a_server_error_for_the_api_key_does_not_undo_the_sign_in(self):
        for status, body in ((500, b"oops"), (503, b"{}")):
            self.fault("key", status, body)
            err = self.sign_in()
            self.assertIn(f"warning: could not get an API key (HTTP {status}): server error\n", err)
            self.assertRegex(err, "(?m)^hint: to try again, run: .* auth$")
            self.assertNotIn("create an organization", err)
            self.assertIn("your ChatGPT plan", err)

    @needs_signals
    def test_a_closed_window_during_the_code_exchange_does_not_lose_the_sign_in(self):
        for flags, endpoint in (([], "code"), (["--official"], "plan_code")):
            released = self.hold_response(endpoint)
            running = self.start("auth", "--no-browser", *flags)
            response = urllib.parse.urlsplit(authorization_response(running.wait_for_url()))
            # The program ends before it answers this request.
            browser = socket.create_connection(("127.0.0.1", response.port), WAIT_LIMIT)
            self.addCleanup(browser.close)
            target = f"{response.path}?{response.query}"
            browser.sendall(f"GET {target} HTTP/1.1\r\nHost: {response.netloc}\r\n\r\n".encode())
            wait_for(lambda asked=endpoint: self.double.count(asked))
            for _ in range(2):
                running.process.send_signal(signal.SIGHUP)
            released.set()
            self.assertEqual(running.result().code, -signal.SIGHUP)
        wait_for(self.plan_file.exists)
        self.assert_fresh(self.call("token", "--refresh"))

    @needs_signals
    def test_ctrl_c_during_the_code_exchange_reports_the_sign_in(self):
        def browse(url):
            # The program may end before the browser has the whole page.
            with contextlib.suppress(OSError, http.client.HTTPException):
                visit(url)

        for flags, endpoint in (([], "code"), (["--official"], "plan_code")):
            released = self.hold_response(endpoint)
            running = self.start("auth", "--no-browser", *flags)
            threading.Thread(target=browse, args=(running.wait_for_url(),), daemon=True).start()
            wait_for(lambda asked=endpoint: self.double.count(asked))
            running.process.send_signal(signal.SIGINT)
            released.set()
            result = running.result()
            self.assertEqual((result.code, result.out), (130, ""))
            command = " ".join(["logout", *flags])
            self.assertRegex(
                result.err, f"(?m)^warning: you may be signed in anyway; .*: .* {command}$"
            )
        wait_for(self.token_file.exists)
        self.assertEqual(self.call("token").code, 0)
        wait_for(self.plan_file.exists)

    def test_only_an_unprocessed_code_exchange_is_retried(self):
        for status, headers, times in (
            (503, {}, 2),
            (429, {"Retry_After": "0"}, 2),
            (500, {}, 1),
            (502, {}, 1),
        ):
            with self.subTest(status):
                self.double.requests.clear()
                self.fault_once("code", status, **headers)
                result = self.call("auth", "--no-browser", browser=visit)
                self.assertEqual(self.double.count("code"), times)
                if times == 2:
                    err = self.assert_done(result).err
                    self.assertIn(f"(HTTP {status})", err)
                    self.assertEqual(err.count("\nStill trying...\n"), 1)
                    self.assert_nothing_lost()
                else:
                    self.assert_fails(result, 5)

    def test_a_token_of_another_type_is_refused(self):
        for kind, good in (("DPoP", False), (5, False), ("BEARER", True), (None, True)):
            with self.subTest(kind):
                self.store()
                response = {**self.double.tokens(), "token_type": kind}
                self.fault("code", 200, response)
                result = self.call("auth", "--no-browser", browser=visit)
                self.assertEqual(self.stored()["access_token"] == response["access_token"], good)
                if good:
                    self.assert_done(result)
                else:
                    self.assert_fails(result, 1, "token_type")

    def test_an_error_in_a_success_response_is_shown(self):
        body = {"error": "temporarily_blocked", "error_description": "Wait a while"}
        self.fault("code", 200, body)
        result = self.call("auth", "--no-browser", browser=visit)
        self.assert_fails(result, 1, "code: temporarily_blocked: Wait a while")

    def test_account_and_email_are_read_from_either_token(self):
        profile = {"https://api.openai.com/profile": {"email": "ada@example.com"}}
        claims = {"exp": int(time.time()) + 9999, AUTH_CLAIM: {"chatgpt_account_id": "acct-7"}}
        access = encode_jwt({**claims, **profile})
        own = {"email": "id@example.com", AUTH_CLAIM: {"chatgpt_account_id": "acct-8"}}
        for id_claims, account, email in (
            ({AUTH_CLAIM: {"chatgpt_plan_type": "plus"}}, "acct-7", "ada@example.com"),
            ({}, "acct-7", "ada@example.com"),
            (own, "acct-8", "id@example.com"),
        ):
            self.store(access_token=access, id_token=encode_jwt(id_claims), account_id=None)
            report = json.loads(self.call("status", "--json").out)
            self.assertEqual((report["account_id"], report["email"]), (account, email))

    def test_an_unchanged_refresh_token_is_not_revoked(self):
        old = self.store()
        response = {**self.double.tokens(account="acct-2"), "refresh_token": old["refresh_token"]}
        self.fault("code", 200, response)
        self.sign_in()
        self.assertEqual(self.stored()["account_id"], "acct-2")
        self.assertEqual(self.double.count("revoke"), 0)

    def test_a_declined_consent_is_explained(self):
        declined = "The <b>user</b> \x1b[31mdeclined"
        # On the page, the first word has a capital letter.
        for description, words in (
            (declined, "uthorization failed (access_denied: The"),
            ("missing_codex_entitlement", "administrator"),
        ):
            running, url = self.start_sign_in()
            sent = query(url)
            response = {"error": "access_denied", "error_description": description}
            response = urllib.parse.urlencode({**response, "state": sent["state"]})
            page = visit(f"{sent['redirect_uri']}?{response}")[-1]
            self.assertIn(words, page[3])
            self.assertNotIn("<b>user", page[3])
            err = self.assert_fails(running.result(), 1, words).err
            self.assertNotIn("\x1b", err + page[3])

    def test_the_module_refuses_an_invalid_timeout(self):
        with mock.patch.dict(os.environ, self.environ, clear=True):
            for timeout in ("x", 0, -1, float("nan")):
                with self.assertRaises(oauth.UsageError):
                    oauth.sign_in(timeout=timeout)

    def test_auth_ends_after_its_timeout(self):
        environ = {"CHATGPT_OAUTH_CALLBACK_TIMEOUT": "0.3"}
        result = self.run_program("auth", "--no-browser", environ=environ)
        # The least that is suggested is twice the default.
        self.assert_fails(
            result, 1, "timed out after 0.3 seconds waiting for you to sign in", "--timeout 240"
        )


# ---------------------------------------------------------------------------------------------
# Sign-in: with a pasted URL
# ---------------------------------------------------------------------------------------------


class PasteTest(Case):
    def test_wrong_lines_are_explained_until_the_url_is_pasted(self):
        running = self.start("auth", "--no-browser", stdin=subprocess.PIPE)
        callback_url = authorization_response(running.wait_for_url())
        code = query(callback_url)["code"]
        for line, words in (
            (code, "it is not complete; copy all of it from the address bar"),
            ("hello", "it is not complete"),
            ("", "it is not complete"),
            (callback_url[:40], "it is not complete"),
            (callback_url[:-1], "it is not complete"),
            (callback_url.partition("&state=")[0], "it has no state"),
            (callback_url.replace("code=", "kode="), "it has no authorization code"),
            (callback_url.replace("state=", "state=x"), "a different sign-in"),
            (callback_url.replace("/auth/callback", "/other"), "must contain /auth/callback"),
            (running.wait_for_url(), "must contain /auth/callback"),
        ):
            running.err = ""
            running.type_line(line.encode())
            running.wait_for_line("That URL does not work: .*" + words)
        running.type_line(callback_url.encode() + b"\r")
        running.process.stdin.close()
        self.assertNotIn(code, self.assert_done(running.result()).err)

    def paste(self, change):
        """Sign in by pasting what `change` returns for the URL that the browser ends on."""
        running = self.start("auth", "--no-browser", stdin=subprocess.PIPE)
        line = change(authorization_response(running.wait_for_url()))
        running.type_line(line.encode())
        self.assert_done(running.result())

    def test_a_pasted_url_can_be_quoted_or_lack_its_beginning(self):
        # The last form is what a terminal sends for pasted text in bracketed paste mode.
        for form in (
            "'{url}'",
            " <{url}> ",
            "{query}",
            '"{query}"',
            "?{query}",
            "callback?{query}",
            "{url}#",
            "{bare}",
            "it says {url}, what now?",
            "\x1b[200~{url}\x1b[201~",
        ):
            with self.subTest(form):
                self.paste(
                    lambda url, form=form: form.format(
                        url=url, query=url.partition("?")[2], bare=url.partition("//")[2]
                    )
                )

    def test_a_pasted_url_can_have_any_host(self):
        for start in ("https://localhost:1", "https://x-1455.app.example.com/proxy/1455"):
            with self.subTest(start):
                self.paste(lambda url, start=start: start + url[url.index("/auth/") :])

    def test_an_escaped_url_can_be_pasted(self):
        for escaped in ("&amp;", "\\u0026", "\\&"):
            with self.subTest(escaped):
                self.paste(lambda url, escaped=escaped: url.replace("&", escaped))

    def test_a_url_can_be_pasted_with_other_characters_around_it(self):
        for text in ("\u200b{}\u200b", "\u201c{}\u201d", "see:\u00a0{}\u2026"):
            with self.subTest(text):
                self.paste(text.format)

    def test_a_url_in_several_lines_can_be_pasted(self):
        for pieces in (
            lambda url: (url[:30], url[30:]),
            lambda url: (url[:50], url[50:90], "  " + url[90:] + " "),
            lambda url: (url[:-20], url[-20:]),
            lambda url: ("hello", url[:-20] + " " + url[-20:]),
            lambda url: (url[:-20], url),
        ):
            self.paste(lambda url, pieces=pieces: "\n".join(pieces(url)))

    def pipe(self):
        """Open a pipe and return its two ends as unbuffered files."""
        source, sink = os.pipe()
        ends = os.fdopen(source, "rb", 0), os.fdopen(sink, "wb", 0)
        for each in ends:
            self.addCleanup(each.close)
        return ends

    def test_a_windows_console_accepts_a_long_url(self):
        url = "http://localhost:1455/auth/callback?code=" + "a" * 600
        unread = []

        def read_console(_, size):
            # The console keeps only as much of a line as fits into 256 characters or into the
            # read's buffer, whichever is larger.
            if not unread:
                unread.append(url[: max(size, 256) - 2].encode() + b"\r\n")
            data, unread[0] = unread[0][:size], unread[0][size:]
            return data

        with mock.patch.object(sys, "platform", "win32"), mock.patch.object(
            oauth, "is_terminal", return_value=True
        ), mock.patch.object(os, "read", read_console), open(
            os.devnull
        ) as stdin, mock.patch.object(sys, "stdin", stdin):
            line = oauth.PastedInput(reading=True).line.result(WAIT_LIMIT)
        self.assertEqual(line, url + "\r\n")

    def test_input_after_the_pasted_line_is_not_read(self):
        source, sink = self.pipe()
        running = self.start("auth", "--no-browser", stdin=source)
        sink.write(
            b"hello\n" + authorization_response(running.wait_for_url()).encode() + b"\nmine\n"
        )
        sink.close()
        self.assert_done(running.result())
        self.assertEqual(source.read(), b"mine\n")

    @unittest.skipUnless(POSIX, "Windows cannot wait for a pipe")
    def test_input_after_the_browser_response_is_not_read(self):
        source, sink = self.pipe()
        running = self.start("auth", "--no-browser", stdin=source)

        def type_ahead(handler, _):
            # The reader notices within 0.1 seconds that it has to stop.
            time.sleep(0.2)
            sink.write(b"mine\n")
            # A reader that had not stopped would take the line now.
            time.sleep(0.2)

        self.double.faults["key"] = type_ahead
        self.finish_sign_in(running, running.wait_for_url())
        sink.close()
        self.assertEqual(source.read(), b"mine\n")

    def test_endless_input_takes_little_memory_and_time(self):
        for endless in (b"y\n" * 5000, b"y" * 10000):
            with self.subTest(endless[:2]):
                running = self.start("auth", "--no-browser", stdin=subprocess.PIPE)

                def pour(running=running, endless=endless):
                    with contextlib.suppress(OSError):
                        while True:
                            running.process.stdin.write(endless)

                threading.Thread(target=pour, daemon=True).start()
                url = running.wait_for_url()
                # One second is enough to read hundreds of MiB.
                time.sleep(1)
                with self.subTest("memory"):
                    self.require(POSIX, "under Wine, this would be the memory that Wine uses")
                    # PyPy takes much more memory from the start.
                    bound = 64 if sys.implementation.name == "cpython" else 256  # MiB
                    self.assertLess(memory_in_kib(running.process.pid), bound << 10)
                self.assert_fast(1, visit, f"http://127.0.0.1:{self.ports[0]}/x")
                self.assertEqual(visit(url)[-1][1], 200)
                # The program stops reading after 20 wrong lines.
                self.assertLess(self.assert_done(running.result()).err.count("does not work"), 21)

    def test_closed_input_without_a_port_is_an_error(self):
        self.take_ports()
        for typed, words in ((b"half a line", ["it is not complete"]), (b"", [])):
            running, _ = self.start_sign_in(stdin=subprocess.PIPE)
            running.process.stdin.write(typed)
            running.process.stdin.close()
            words += ["standard input is closed", "--device"]
            self.assert_fails(running.result(), 1, *words, after_messages=True)

    @needs_terminal
    def test_a_closed_terminal_does_not_end_the_sign_in(self):
        leader, follower = os.openpty()
        self.addCleanup(os.close, follower)
        running, url = self.start_sign_in(stdin=follower, start_new_session=True)
        os.close(leader)
        # The reader notices the end of its input in this time.
        time.sleep(0.2)
        err = self.finish_sign_in(running, url).err
        self.assertNotIn("Traceback", err)
        self.assertNotIn("internal error", err)

    def test_the_end_of_the_input_does_not_end_the_sign_in(self):
        running, url = self.start_sign_in(stdin=subprocess.PIPE)
        running.process.stdin.close()
        # The reader notices the end of its input in this time.
        time.sleep(0.2)
        visit(url)
        self.assertEqual(running.result().code, 0)

    def test_a_url_can_be_pasted_if_both_ports_are_taken(self):
        self.take_ports()
        running = self.start("auth", "--no-browser", stdin=subprocess.PIPE)
        callback_url = authorization_response(running.wait_for_url())
        self.assertIn(f"localhost:{self.ports[0]}/", callback_url)
        running.type_line(callback_url.encode())
        err = self.assert_done(running.result()).err
        self.assertIn(PORT_TAKEN, err)
        # A tunnel would carry the code to the program that has the port.
        self.assertNotIn("ssh -L", err)
        # The other program may be important, so nothing suggests to end it.
        self.assertNotIn("kill", err)
        self.assertIn(self.port_listing(), err)

    def test_taken_ports_and_no_input_are_an_error(self):
        self.take_ports()
        result = self.run_program("auth", "--no-browser")
        self.assert_fails(result, 1, PORT_TAKEN, "--device", self.port_listing())
        if POSIX:
            # Without the program that lists ports, its command isn't suggested.
            result = self.run_program("auth", "--no-browser", environ={"PATH": str(self.folder)})
            self.assert_fails(result, 1, f" ({PORT_TAKEN})\nhint: ")

    def port_listing(self):
        """Return the command that shows which program has the port. Skip the test without it."""
        port = self.ports[0]
        listing = {
            "win32": f"netstat -ano | findstr :{port}",
            "darwin": f"lsof -nP -iTCP:{port} -sTCP:LISTEN",
        }.get(sys.platform, f"ss -ltnp 'sport = :{port}'")
        self.require(shutil.which(listing.split()[0]), "no program here that lists ports")
        return listing

    def start_at_terminal(self, seconds, ahead=b"", environ=None):
        """Start `auth` at a terminal where `ahead` has already been typed.

        Return the terminal and the process.
        """
        leader, follower = self.open_terminal()
        self.addCleanup(os.close, follower)
        os.write(leader, ahead)
        arguments = ("auth", "--no-browser", "--timeout", seconds)
        options = {"environ": environ, "stdin": follower, "start_new_session": True}
        return leader, self.start(*arguments, **options)

    @needs_terminal
    def test_a_url_pasted_at_a_terminal_signs_in(self):
        leader, running = self.start_at_terminal("20", environ={"TERM": "xterm"})
        os.write(leader, authorization_response(running.wait_for_url()).encode() + b"\n")
        self.assert_done(running.result())
        self.assertTrue(self.stored()["access_token"])

    def start_from_pipe(self, *arguments, terminal=None):
        """Start the program as `curl ... | python3 -` does, and return the process.

        It has a session of its own, which `terminal` controls.
        """

        def take_terminal():
            import fcntl
            import termios

            os.setsid()
            if terminal is not None:
                fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        with open(PROGRAM, "rb") as source:
            inherited = [] if terminal is None else [terminal]
            options = {"stdin": source, "preexec_fn": take_terminal, "pass_fds": inherited}
            running = Process([sys.executable, "-", *arguments], self.environ, **options)
        self.addCleanup(running.close)
        return running

    @needs_terminal
    def test_a_program_from_a_pipe_reads_the_url_from_the_terminal(self):
        leader, follower = self.open_terminal()
        self.addCleanup(os.close, follower)
        running = self.start_from_pipe("auth", "--no-browser", terminal=follower)
        callback_url = authorization_response(running.wait_for_url())
        running.wait_for_line("paste its URL here")
        running.wait_for_line(
            r"^    \S+ chatgpt_oauth.py auth --device \(download that file first\)$"
        )
        os.write(leader, callback_url.encode() + b"\n")
        err = self.assert_done(running.result()).err
        self.assertRegex(
            err, r'download chatgpt_oauth.py, then run: eval "\$\(\S+ chatgpt_oauth.py env'
        )

    @needs_signals
    def test_a_program_from_a_pipe_without_a_terminal_offers_no_pasting(self):
        running = self.start_from_pipe("auth", "--no-browser")
        self.assertNotIn("paste", self.finish_sign_in(running, running.wait_for_url()).err)

    @needs_signals
    def test_hints_of_a_program_from_a_pipe_say_to_download_it(self):
        hint = r"chatgpt_oauth.py auth \(download that file first\)$"
        self.assertRegex(self.start_from_pipe("token").result().err, hint)
        self.assertRegex(self.start_from_pipe("status").result().out, "(?m)" + hint)
        # A line for the profile would need a file.
        with open(PROGRAM, "rb") as stdin:
            start = [sys.executable, "-", "env", "--help"]
            out = self.run_command(start, cwd=str(self.folder), stdin=stdin).out
        self.assertTrue(out.endswith("save this program as a file first\n"), out)
        # A shell starts the program in this way for `python3 <(curl ...)`.
        pipe = self.folder / "pipe"
        os.mkfifo(pipe)
        running = Process([sys.executable, str(pipe), "token"], self.environ)
        self.addCleanup(running.close)
        with open(pipe, "wb") as sink:
            sink.write(pathlib.Path(PROGRAM).read_bytes())
        self.assertRegex(running.result().err, hint)

    @needs_terminal
    def test_any_number_of_wrong_lines_is_read_from_a_terminal(self):
        leader, running = self.start_at_terminal("20", environ={"TERM": "xterm"})
        url = running.wait_for_url()
        # From a pipe, no more than 20 wrong lines would be read.
        for number in range(1, 26):
            os.write(leader, b"hello\n")
            wait_for(lambda number=number: running.err.count("Still waiting") == number)
        os.write(leader, b"http://localhost/auth/callback\n")
        running.wait_for_line("That URL does not work: it is not complete; copy all of it")
        os.write(leader, authorization_response(url).encode() + b"\n")
        self.assert_done(running.result())

    @needs_terminal
    def test_a_sign_in_at_a_terminal_ends_when_the_time_is_up(self):
        # Ctrl-D ends the input.
        for typed in (b"", b"\x04"):
            _, running = self.start_at_terminal("0.5", ahead=typed)
            result = running.result()
            self.assert_fails(result, 1, "timed out after 0.5 seconds", "auth --timeout 240")
            # The URL isn't repeated.
            self.assertEqual(running.err.count("/oauth/authorize?"), 1)


# ---------------------------------------------------------------------------------------------
# Sign-in: with a device code
# ---------------------------------------------------------------------------------------------


class DeviceTest(Case):
    def setUp(self):
        super().setUp()
        # A sign-in that goes wrong must not wait for the default of two minutes.
        self.environ["CHATGPT_OAUTH_CALLBACK_TIMEOUT"] = "5"

    def test_a_device_code_signs_in_without_a_port(self):
        self.take_ports()
        self.double.device_polls = 0
        err = self.assert_done(self.call("auth", "--device")).err
        self.assertIn(f"\n{self.double.url}/codex/device\n", err)
        self.assertIn("\nABCD-EFGH\n", err)
        self.assertIn("phishing", err)
        self.assertIn("Imported 3 of 5 models for Code Puppy (", err)
        self.assertEqual(self.double.count("device"), 1)
        self.assertTrue(self.stored()["api_key"])

    def test_an_unusable_device_response_has_a_hint(self):
        self.fault("device", 200, {"authorization_code": "a b"})
        self.assert_fails(self.call("auth", "--device"), 1, "to get a new code, run: ", "--device")
        del self.double.faults["device"]
        self.fault("code", 400)
        self.assert_fails(self.call("auth", "--device"), 1, "to try again, run: ", "--device")

    def test_temporary_poll_failures_do_not_end_the_sign_in(self):
        responses = [
            (500, b"oops", {}),
            (404, b"<html>", {}),
            (429, b"", {"Retry_After": 1}),
            (400, b'{"error": "authorization_pending"}', {}),
        ]

        def fault(handler, _):
            if not responses:
                return False
            status, body, headers = responses.pop(0)
            return self.double.reply(handler, status, body, **headers)

        self.double.faults["device"] = fault
        self.double.device_polls = 1
        result = self.call("auth", "--device")
        self.assertEqual((result.code, responses), (0, []), result.err)
        # Only the failures of the first two responses are reported.
        self.assertEqual(result.err.count("Still trying..."), 2, result.err)
        self.assertIn("(HTTP 500): server error\nStill trying...\n", result.err)

    def test_authorization_pending_is_accepted_with_any_status(self):
        statuses = [200, 400, 401, 403, 404, 428, 500]
        body = b'{"error": {"code": "deviceauth_authorization_pending"}}'

        def pending(handler, _):
            return bool(statuses) and Double.reply(handler, statuses.pop(0), body)

        self.double.faults["device"] = pending
        self.double.device_polls = 0
        err = self.assert_done(self.call("auth", "--device")).err
        self.assertEqual(statuses, [])
        self.assertNotIn("warning", err)

    def test_the_user_codes_lifetime_and_length_are_limited(self):
        response = {"device_auth_id": "d", "user_code": "A" * 5000, "expires_in": "0.3"}
        self.fault("usercode", 200, response)
        self.fault("device", 403)
        clock = FakeClock()
        result = self.call_at(clock, "auth", "--device")
        err = self.assert_fails(result, 1, "valid for less than 2 minutes").err
        self.assertAlmostEqual(clock.elapsed, 0.3)
        self.assertNotIn("A" * 100, err)

    def test_an_error_code_is_shown_and_a_token_is_not(self):
        code, token = "deviceauth_something_nobody_has_heard_of", "Rt9" + "kq4_x" * 8
        self.fault("device", 400, {"error": {"code": code, "message": token}})
        err = self.assert_fails(self.call("auth", "--device"), 1, code).err
        self.assertNotIn(token, err)

    def test_denied_and_expired_have_their_own_messages(self):
        for status, error, words in (
            (403, "access_denied", "denied in the browser"),
            (403, "deviceauth_access_denied", "denied in the browser"),
            (400, "expired_token", "timed out waiting for the code"),
            (400, "deviceauth_expired_token", "timed out waiting for the code"),
            (403, "device_code_expired", "timed out waiting for the code"),
            (404, "DEVICE_AUTH_EXPIRED", "timed out waiting for the code"),
            (400, "something", "something"),
        ):
            self.fault("device", status, {"error": {"code": error}})
            self.assert_fails(self.call("auth", "--device"), 1, words)
        self.fault("device", 403, b"{}")
        result = self.call("auth", "--device", "--timeout", "0.1")
        self.assert_fails(result, 1, "timed out waiting for the code")

    def test_an_invalid_authorization_code_is_refused(self):
        self.fault("device", 200, b'{"authorization_code": "\\ud800", "code_verifier": "x"}')
        self.assert_fails(self.call("auth", "--device"), 1, "has no authorization code")

    def test_disabled_device_codes_name_the_setting(self):
        self.fault("usercode", 404, b"{}")
        self.assert_fails(self.call("auth", "--device"), 1, "Security", "administrator")

    def test_an_older_device_response_is_accepted(self):
        # It has `usercode` in place of `user_code`, and the interval is a number.
        began, waited = time.monotonic(), []
        self.fault("usercode", 200, {"device_auth_id": "d", "usercode": "WXYZ", "interval": 0.2})

        def fault(handler, _):
            waited.append(time.monotonic() - began)
            return self.double.reply(handler, 400, {"error": "expired_token"})

        self.double.faults["device"] = fault
        err = self.assert_fails(self.call("auth", "--device"), 1).err
        self.assertIn("\nWXYZ\n", err)
        sent = {"device_auth_id": "d", "user_code": "WXYZ"}
        self.assertEqual(self.double.requests_to("device"), [sent])
        self.assertTrue(0.2 <= waited[0] < 4, waited)


# ---------------------------------------------------------------------------------------------
# Sign-in: OpenAI's official one
# ---------------------------------------------------------------------------------------------


class OfficialTest(Case):
    def setUp(self):
        super().setUp()
        # If the double refuses a request, the browser never comes back and the program waits for
        # all of this time.
        self.environ["CHATGPT_OAUTH_CALLBACK_TIMEOUT"] = "5"

    def stored_plan(self):
        return json.loads(self.plan_file.read_text())

    def registration(self):
        return json.loads(self.agent_file.read_text())

    def change_stored_plan(self, **changes):
        """Change members of the stored sign-in and return all members. None removes one."""
        fields = {k: v for k, v in {**self.stored_plan(), **changes}.items() if v is not None}
        self.plan_file.write_text(json.dumps(fields))
        return fields

    def expire_token(self):
        """Change the file so that the access token has expired, and return the file's members."""
        now = time.time()
        # The token was good for an hour, and the hour ended ten seconds ago.
        last = timestamp(now - 3610)
        return self.change_stored_plan(expires_at=timestamp(now - 10), last_refresh=last)

    def run_refresh(self):
        """Run a command that refreshes an expired access token, and return its Result."""
        return self.call("models", "--source", "official", "--dry-run")

    def test_scopes_that_are_not_a_list_allow_nothing(self):
        self.official_sign_in()
        for scopes in (1, "resource.invoke chatgpt.tokens.use.direct", {}):
            self.change_stored_plan(scopes=scopes)
            self.assertNotIn("internal error", self.call("status").err)
            official = json.loads(self.call("status", "--json").out)["official"]
            self.assertIs(official["plan_allowed"], False)

    def test_sign_in_sign_out_and_sign_in_again(self):
        running = self.start("auth", "--official", "--no-browser")
        pages = visit(running.wait_for_url())
        err = self.assert_done(running.result()).err
        self.assertEqual([page[1] for page in pages], [302, 303, 200])
        for words in (
            "Signed in as ada@example.com",
            "Imported 2 of 2 models for Code Puppy (covered by your ChatGPT plan)",
            f"Tokens saved in {self.plan_file}",
            "Using ChatGPT plan",
            "https://chatgpt.com/settings/usage",
            "/model NAME",
        ):
            self.assertIn(words, err)
        self.assert_no_secret(err, *(page[3] for page in pages))
        out = self.assert_quiet(self.call("status")).out
        self.assertIn(f"\nToken file:   {self.plan_file}\nModels file: ", out)
        first = self.stored_plan()
        names = (
            "access_token client_id earliest_refresh_at email expires_at id_token issuer "
            "last_refresh refresh_token scopes sub"
        )
        self.assertEqual(sorted(first), names.split())
        client = first["client_id"]
        registration = {"client_id": client, "host_id": self.double.agents[client]}
        registration = {**registration, "issuer": self.double.url, "sub": "user|ada"}
        self.assertEqual(self.registration(), registration)
        self.assertEqual(first["scopes"], self.double.SCOPE.split())
        with self.subTest("mode"):
            self.require(POSIX, "Windows has no POSIX modes")
            for path in (self.plan_file, self.agent_file):
                self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        hint = self.double.requests_to("plan_authorize")[0]["agent_name_hint"]
        self.assertEqual(hint, "Code Puppy (chatgpt_oauth)")
        self.assertFalse(self.token_file.exists())

        err = self.assert_done(self.run_program("logout")).err
        self.assertIn("Signed out of ada@example.com (official sign-in)", err)
        self.assertFalse(self.plan_file.exists())
        self.assertEqual(self.registration(), registration)
        self.assertEqual(self.stored_models(), {})
        self.assertNotIn(first["refresh_token"], self.double.plan_tokens)
        self.assertIn("nothing to do", self.assert_done(self.call("logout")).err)

        # The double checks that this is the registration from before.
        self.assert_done(self.official_sign_in())
        self.assertEqual(len(self.double.agents), 1)
        self.assertEqual(self.registration(), registration)
        self.assertEqual(self.stored_plan()["client_id"], client)

    def test_a_later_sign_in_sends_the_stored_email_address(self):
        for _ in range(2):
            self.assert_done(self.official_sign_in())
        first, second = self.double.requests_to("plan_authorize")
        self.assertNotIn("login_hint", first)
        self.assertEqual(second["login_hint"], "ada@example.com")

    def test_the_host_id_is_stored_before_the_browser_opens(self):
        seen = []

        def look(url):
            seen.append((url, self.registration()))
            visit(url)

        self.assert_done(self.official_sign_in(browser=look))
        url, registration = seen[0]
        self.assertEqual(set(registration), {"host_id", "issuer"})
        self.assertIn(urllib.parse.quote(registration["host_id"]), url)

    def test_after_a_failed_exchange_the_registration_is_used_again(self):
        for status, body in ((400, b'{"error": "invalid_grant"}'), (500, b"")):
            self.fault_once("plan_code", status, body)
            self.assertNotEqual(self.official_sign_in().code, 0)
            self.assertFalse(self.plan_file.exists())
            self.assertEqual([self.registration()["client_id"]], list(self.double.agents))
            self.assertNotIn("sub", self.registration())
        # Nobody has signed in yet, so any account may.
        self.double.plan_subject = "user|bob"
        self.assert_done(self.official_sign_in())
        self.assertEqual(len(self.double.agents), 1)
        self.assertEqual(self.registration()["sub"], "user|bob")

    def test_a_registration_of_version_1_1_0_is_moved(self):
        self.assert_done(self.official_sign_in())
        registration, stored = self.registration(), self.stored_plan()
        kept = {name: registration[name] for name in ("host_id", "client_id", "sub")}

        # Version 1.1.0 stored the registration in the file of the tokens, and kept it there after a
        # sign-out.
        for fields in ({**stored, **kept}, kept):
            for command in ("auth", "logout"):
                with self.subTest(fields=sorted(fields), command=command):
                    self.agent_file.unlink()
                    self.models_file.write_text("{}")
                    self.plan_file.write_text(json.dumps(fields))
                    if command == "auth":
                        self.assert_done(self.official_sign_in())
                        self.assertNotIn("host_id", self.stored_plan())
                    else:
                        err = self.assert_done(self.call("logout", "--official")).err
                        self.assertEqual("nothing to do" in err, fields == kept)
                        self.assertFalse(self.plan_file.exists())
                    self.assertEqual(self.registration(), registration)
                    self.assertEqual(len(self.double.agents), 1)

    def test_a_broken_registration_is_exit_6_and_left_alone(self):
        self.home.mkdir(mode=0o700)
        self.agent_file.write_text("[")
        self.assert_fails(self.official_sign_in(), 6, "chatgpt_agent.json")
        self.assertEqual(self.double.requests, [])
        self.assertEqual(self.agent_file.read_text(), "[")
        self.sign_in()

    def test_plan_models_are_imported(self):
        self.assert_done(self.official_sign_in())
        models = self.stored_models()
        self.assertEqual(list(models), ["chatgpt-plan-gpt-6-astra", "chatgpt-plan-gpt-5.5"])
        self.assertEqual(
            models["chatgpt-plan-gpt-5.5"],
            {
                "type": "chatgpt_plan",
                "name": "gpt-5.5",
                "custom_endpoint": {"url": self.double.url + "/v1"},
                "context_length": 258400,
                "oauth_source": "chatgpt-oauth-plugin",
                "supported_settings": ["reasoning_effort", "summary", "verbosity"],
            },
        )
        # Without another sign-in, `auto` chooses the official one.
        out = self.assert_quiet(self.call("models", "--dry-run")).out
        self.assertEqual(out.split(), list(models))

    def test_each_sign_in_keeps_its_own_file_and_entries(self):
        self.sign_in()
        codex, entries = self.stored(), self.stored_models()
        self.assert_done(self.official_sign_in("--include", "gpt-6*"))
        self.assertEqual(self.stored(), codex)
        models = self.stored_models()
        self.assertEqual({name: models.get(name) for name in entries}, entries)
        self.assertEqual(len(models), len(entries) + 1)
        plan = self.stored_plan()
        self.sign_in("--include", "gpt-4o")
        self.assertEqual(self.stored_plan(), plan)
        self.assertEqual(list(self.stored_models()), ["chatgpt-plan-gpt-6-astra", "chatgpt-gpt-4o"])
        facts = json.loads(self.call("status", "--json").out)
        self.assertEqual(sorted(facts["models"]), sorted(self.stored_models()))
        # With an API key, `auto` chooses the key.
        self.assertNotIn("plan-", self.call("models", "--json").out)
        self.assert_done(self.call("logout", "--official"))
        self.assertFalse(self.plan_file.exists())
        self.assertEqual(self.double.count("revoke"), 0)
        self.assertEqual(self.double.count("plan_revoke"), 1)
        self.assertTrue(self.stored()["refresh_token"])
        self.assertEqual(set(self.stored_models()), set(entries))
        self.assert_done(self.official_sign_in())
        self.assert_done(self.call("logout"))
        self.assertEqual(self.double.count("revoke"), 1)
        self.assertEqual(self.double.count("plan_revoke"), 2)
        self.assertEqual(self.stored_models(), {})

    def test_a_pasted_url_signs_in(self):
        running, url = self.start_sign_in("--official", stdin=subprocess.PIPE)
        self.assertNotIn("--device", running.err)
        running.type_line(authorization_response(url).encode())
        self.assert_done(running.result())

    def test_conflicting_options_are_a_usage_error(self):
        for options in (["--device"], ["--source", "api"], ["--workspace", "x"]):
            self.assert_fails(self.official_sign_in(*options), 2, options[0])
        self.assertEqual(self.double.requests, [])

    def test_the_workspace_setting_is_ignored(self):
        self.assert_done(self.official_sign_in(CHATGPT_OAUTH_WORKSPACE="acct-9"))

    def test_a_declined_sign_in_stores_nothing(self):
        self.double.plan_declined = True
        self.assert_fails(self.official_sign_in(), 1, "access_denied", "auth --official")
        self.assertEqual(self.double.count("plan_code"), 0)
        self.assertFalse(self.plan_file.exists())

    def test_without_plan_permission_auth_fails_but_keeps_the_sign_in(self):
        self.double.plan_allowed = False
        err = self.assert_fails(
            self.official_sign_in(), 1, "Security and login", "auth --official"
        ).err
        self.assertIn("Signed in as ada@example.com", err)
        self.assertNotIn("Using ChatGPT plan", err)
        self.assertFalse(self.models_file.exists())
        self.assertNotIn("chatgpt.tokens.use.direct", self.stored_plan()["scopes"])
        self.assert_fails(self.run_refresh(), 1, "not allowed", "Security and login")
        for arguments in (["status"], ["status", "--online"]):
            out = self.assert_quiet(self.call(*arguments)).out
            self.assertIn("ChatGPT plan not allowed", out)
            self.assertEqual(out.count("Problem: "), 1)
            # Without the permission, nothing is sent.
            self.assertNotIn("OpenAI says", out)
        official = json.loads(self.call("status", "--json").out)["official"]
        self.assertFalse(official["plan_allowed"])
        self.assertIn("auth --official", official["problem"])
        self.double.plan_allowed = True
        self.assert_done(self.official_sign_in())
        self.assertEqual(self.double.requests_to("plan_authorize")[-1]["prompt"], "consent")
        self.assertEqual(len(self.stored_models()), 2)
        self.double.plan_allowed = False
        self.assert_fails(self.official_sign_in(), 1, "not allowed")
        self.assertEqual(self.stored_models(), {})

    def test_an_id_token_for_another_request_is_rejected(self):
        for changes, words in (
            ({"nonce": "x"}, "another sign-in"),
            ({"nonce": None}, "another sign-in"),
            ({"iss": "https://evil.example.com"}, "another issuer"),
            ({"aud": ["oaiapp_other"]}, "another client"),
            ({"aud": None}, "another client"),
            ({"exp": 1}, "expired"),
            ({"sub": None}, "whose"),
        ):
            with self.subTest(changes=changes):
                self.double.id_token_changes = changes
                self.assert_fails(self.official_sign_in(), 1, "ID token", words)
                self.assertFalse(self.plan_file.exists())
                # Tokens that are not stored have been revoked.
                self.assertEqual(self.double.plan_tokens, {})
        # `aud` may also be a string (RFC 7519 §4.1.3).
        self.agent_file.unlink()
        self.double.plan_issued = "oaiapp_text"
        self.double.id_token_changes = {"aud": "oaiapp_text"}
        self.assert_done(self.official_sign_in())

    def test_a_refused_sign_in_revokes_nothing_while_one_is_stored(self):
        self.assert_done(self.official_sign_in())
        before = self.stored_plan()
        self.double.id_token_changes = {"nonce": "x"}
        self.assert_fails(self.official_sign_in(), 1, "another sign-in")
        self.store(self.double.tokens(account="acct-2"), issuer=self.double.url)
        environ = {"CHATGPT_OAUTH_WORKSPACE": "acct-9"}
        result = self.call("auth", "--no-browser", browser=visit, environ=environ)
        self.assert_fails(result, 1, "choose acct-9 in the browser")
        self.assertEqual(self.stored_plan(), before)
        self.assertEqual((self.double.count("revoke"), self.double.count("plan_revoke")), (0, 0))

    def test_an_unexpected_client_id_is_rejected(self):
        for changes in ({"client_id": None}, {"client_id": "dynamic_agent_client"}):
            self.double.callback_changes = changes
            self.assert_fails(self.official_sign_in(), 1, "client ID")
            self.assertFalse(self.plan_file.exists())
        self.double.callback_changes = {}
        self.assert_done(self.official_sign_in())
        before = self.stored_plan()
        self.double.callback_changes = {"client_id": "oaiapp_other"}
        self.assert_fails(self.official_sign_in(), 1, "another client ID")
        self.assertEqual(self.stored_plan(), before)
        self.assertEqual(self.double.count("plan_code"), 1)

    def test_an_ineligible_account_is_reported(self):
        self.fault("plan_code", 400, {"error": "invalid_grant"})
        self.assert_fails(self.official_sign_in(), 1, "is eligible", "auth --official")

    def test_an_expired_token_is_refreshed_once(self):
        self.assert_done(self.official_sign_in())
        before = self.expire_token()
        self.assert_quiet(self.run_refresh())
        after = self.stored_plan()
        self.assertEqual(self.double.plan_tokens[before["refresh_token"]][0], "used")
        self.assertNotEqual(after["refresh_token"], before["refresh_token"])
        self.assertEqual(after["client_id"], before["client_id"])
        self.assertGreater(after["expires_at"], timestamp(time.time() + 3000))
        self.assert_quiet(self.run_refresh())
        self.assertEqual(self.double.count("plan_refresh"), 1)

    def test_no_refresh_before_earliest_refresh_at(self):
        self.double.plan_refresh_after = 1000
        self.assert_done(self.official_sign_in())
        early = self.stored_plan()["earliest_refresh_at"]
        self.change_stored_plan(expires_at=timestamp(time.time() + 100))
        # The token expires soon, but it is still valid.
        self.assert_quiet(self.run_refresh())
        self.assertEqual(self.double.count("plan_refresh"), 0)
        # Once the token has expired, a refresh is tried in spite of the date. If OpenAI refuses it,
        # the session has not ended.
        self.expire_token()
        self.assert_fails(self.run_refresh(), 5, "yet", "try again after", "auth --official")
        self.assertNotIn("ended", self.stored_plan())
        self.fault_once("plan_refresh", 400, {"error": "invalid_grant"})
        self.assert_fails(self.run_refresh(), 5, early)
        self.assertNotIn("ended", self.stored_plan())
        self.fault_once("plan_refresh", 400, {"error": "refresh_token_reused"})
        self.assert_fails(self.run_refresh(), 4, "has ended")

    def test_a_far_earliest_refresh_at_locks_nobody_out(self):
        self.assert_done(self.official_sign_in())
        self.change_stored_plan(earliest_refresh_at="2999-01-01T00:00:00Z")
        self.assert_quiet(self.run_refresh())
        self.assertEqual(self.double.count("plan_refresh"), 0)
        # A 401 means that the token is not valid.
        self.double.plan_access.clear()
        self.assert_quiet(self.run_refresh())
        self.assertEqual(self.double.count("plan_refresh"), 1)
        self.change_stored_plan(earliest_refresh_at="2999-01-01T00:00:00Z")
        self.expire_token()
        self.assert_quiet(self.run_refresh())
        self.assertEqual(self.double.count("plan_refresh"), 2)

    def test_an_expiry_in_the_file_overrides_a_later_one_in_the_token(self):
        self.assert_done(self.official_sign_in())
        later = encode_jwt({"exp": int(time.time()) + 864000})
        self.double.plan_access[later] = (time.time() + 3600, True)
        self.expire_token()
        self.change_stored_plan(access_token=later)
        self.assert_quiet(self.run_refresh())
        self.assertEqual(self.double.count("plan_refresh"), 1)

    def test_invalid_grant_ends_the_session(self):
        for code in INVALID_GRANT_CODES:
            with self.subTest(code=code):
                self.assert_done(self.official_sign_in())
                self.expire_token()
                self.fault_once("plan_refresh", 400, {"error": code})
                self.assert_fails(self.run_refresh(), 4, "auth --official")
                self.double.requests.clear()
                self.assert_fails(self.run_refresh(), 4, "auth --official")
                self.assertEqual(self.double.requests, [])
                result = self.call("status")
                self.assertEqual(result.code, 4)
                self.assertIn("Not authenticated\nProblem: your session has ended", result.out)
                self.assertIn("auth --official", result.out)
                self.assertNotIn("Using ChatGPT plan", result.out)

    def test_invalid_client_does_not_end_the_session(self):
        self.assert_done(self.official_sign_in())
        self.expire_token()
        self.fault_once("plan_refresh", 401, {"error": "invalid_client"})
        self.assert_fails(self.run_refresh(), 1, "invalid_client", "check the settings")
        self.assert_quiet(self.run_refresh())

    def test_a_failed_refresh_is_not_retried_in_the_same_run(self):
        self.assert_done(self.official_sign_in())
        before = self.expire_token()
        self.fault("plan_refresh", 503, {"error": "temporarily_unavailable"})
        self.assert_fails(self.run_refresh(), 5, "auth --official")
        self.assertEqual(self.double.count("plan_refresh"), 1)
        self.assertEqual(self.stored_plan(), before)

    def refresh_plan_with(self, **changes):
        """Refresh the stored sign-in with `changes` in the response.

        Return the response and the Result. The value "nested" stands for 900 nested arrays.
        """
        response = {**self.double.plan_sign_in(self.stored_plan()["client_id"]), **changes}
        self.double.requests.clear()
        # PyPy can parse nested arrays of this depth, but it can't encode them.
        body = json.dumps(response).replace('"nested"', "[" * 900 + "]" * 900)
        self.fault_once("plan_refresh", 200, body.encode())
        return response, self.run_refresh()

    def test_a_refresh_for_another_account_ends_the_sign_in(self):
        self.assert_done(self.official_sign_in())
        before = self.expire_token()
        self.double.plan_subject = "user|bob"
        response, result = self.refresh_plan_with()
        self.assert_fails(result, 4, "another account")
        self.assert_fails(self.run_refresh(), 4, "another account")
        after = self.stored_plan()
        self.assertEqual(after.pop("ended")["reason"], "other_account")
        self.assertEqual(after, {**before, "refresh_token": response["refresh_token"]})
        self.assertEqual(self.double.count("plan_refresh"), 1)

    def test_an_invalid_id_token_at_a_refresh_is_a_warning(self):
        self.assert_done(self.official_sign_in())
        before = self.stored_plan()
        claims = {"iss": self.double.url, "aud": before["client_id"], "sub": "user|bob"}
        for id_token, words in (
            ("opaque", "another issuer"),
            (encode_jwt({**claims, "aud": [before["client_id"], "x"]}), "another client"),
            (encode_jwt({**claims, "iss": [[]]}), "another issuer"),
            (5, "not a valid token"),
        ):
            with self.subTest(id_token):
                self.expire_token()
                response, result = self.refresh_plan_with(id_token=id_token)
                self.assertEqual(result.code, 0, result.err)
                self.assertIn("warning: ignored the id_token", result.err)
                self.assertIn(words, result.err)
                after = self.stored_plan()
                self.assertEqual(after["refresh_token"], response["refresh_token"])
                self.assertEqual(after["id_token"], before["id_token"])

    def test_unexpected_members_of_a_refresh_response_do_no_harm(self):
        self.assert_done(self.official_sign_in())
        for name, value in itertools.product(OTHER_MEMBERS, ("", 5, [], "nested", "x " * 150000)):
            with self.subTest(name, value=str(value)[:20]):
                self.expire_token()
                self.change_stored_plan(earliest_refresh_at=None)
                self.change_stored_plan(scopes=self.double.SCOPE.split())
                response, result = self.refresh_plan_with(**{name: value})
                self.assertNotIn("internal error", result.err)
                after = self.stored_plan()
                self.assertEqual(after["refresh_token"], response["refresh_token"])
                self.assertLess(self.plan_file.stat().st_size, 4000)
                self.assertIsInstance(after["scopes"], list)

    def test_signing_in_as_someone_else_is_refused(self):
        self.assert_done(self.official_sign_in())
        registration, stored = self.registration(), self.stored_plan()
        self.double.plan_subject = "user|bob"
        words = ("not the account of your earlier sign-in", "auth --official --account NAME")
        self.assert_fails(self.official_sign_in(), 1, *words)
        self.assertEqual((self.registration(), self.stored_plan()), (registration, stored))
        self.assertEqual(self.double.count("plan_revoke"), 0)
        self.assert_done(self.call("logout"))
        self.assert_fails(self.official_sign_in(), 1, *words)
        self.assertEqual(self.registration(), registration)
        # Without a stored sign-in, the refused tokens are revoked.
        self.assertEqual(self.double.count("plan_revoke"), 2)
        self.assertFalse(self.plan_file.exists())

    def test_a_failed_revocation_is_retried_once_and_reported(self):
        hint = "hint: end it in ChatGPT: Settings > Security and login > Sign in with ChatGPT"
        for fault, tries, done in (
            (respond_with(500), 2, False),
            (send_bytes(b""), 2, False),
            (respond_with(400), 1, False),
            # Only the first try fails.
            (None, 2, True),
        ):
            self.assert_done(self.official_sign_in())
            self.double.requests.clear()
            if fault:
                self.double.faults["plan_revoke"] = fault
            else:
                self.fault_once("plan_revoke", 500)
            err = self.assert_done(self.call("logout", "--official")).err
            self.assertEqual(self.double.count("plan_revoke"), tries)
            self.assertEqual(hint in err.splitlines(), not done, err)
            self.assertEqual("warning: could not revoke" in err, not done)

    def test_refusals_of_the_plan_name_the_next_step(self):
        self.assert_done(self.official_sign_in())
        for code, words in (
            ("chatpass_v2_scope_not_authorized", "Security and login"),
            ("chatpass_v2_invalid_authorization_context", "to sign in again"),
        ):
            self.fault("api", 403, {"error": {"code": code}})
            self.assert_fails(self.run_refresh(), 1, words, "auth --official")

    def test_another_issuer_needs_a_new_registration(self):
        self.assert_done(self.official_sign_in())
        other = self.another_double()
        result = self.call("models", "--source", "official", environ=other.environment())
        self.assert_fails(result, 4, "come from another issuer")
        self.assert_done(self.official_sign_in(**other.environment()))
        self.assertIn(self.stored_plan()["client_id"], other.agents)

    def test_only_code_puppy_can_use_the_tokens(self):
        self.assert_done(self.official_sign_in())
        words = ("only in Code Puppy", "auth")
        for command in ("token", "token --refresh", "token --api-key", "exec -- true"):
            with self.subTest(command=command):
                self.assert_fails(self.call(*command.split()), 1, *words)
        for command in ("env", "env --access-token"):
            with self.subTest(command=command):
                self.assert_fails(self.call(*command.split()), 1, *words, one_line=True)
        with mock.patch.dict(os.environ, self.environ, clear=True):
            for function in (oauth.get_access_token, oauth.get_api_key, oauth.get_account_id):
                with self.assertRaises(oauth.OAuthError) as raised:
                    function()
                self.assertEqual(raised.exception.exit_code, 1)
            self.assertEqual(oauth.fetch_chatgpt_models(), ["gpt-6-astra", "gpt-5.5"])
            oauth.sign_out()
        self.assertTrue(self.stored_plan()["access_token"])
        self.store()
        self.assertEqual(
            self.assert_quiet(self.call("token")).out, self.stored()["access_token"] + "\n"
        )

    def test_uninstall_removes_the_registration_but_not_a_sign_in(self):
        self.assert_done(self.official_sign_in())
        stored = self.stored_plan()
        self.plan_file.write_text("[")
        self.agent_file.write_text("[")
        self.assertIn(f"Removed {self.agent_file}", self.assert_done(self.call("uninstall")).err)
        self.assertTrue(self.plan_file.exists())
        # Version 1.1.0 stored the registration there.
        self.plan_file.write_text(json.dumps({**stored, "host_id": "urn:uuid:x"}))
        self.assert_done(self.call("uninstall"))
        self.assertEqual(self.stored_plan(), stored)
        self.assertEqual(list(self.home.glob("chatgpt_agent.json*")), [])
        self.assertIn("nothing to do", self.assert_done(self.call("uninstall")).err)
        # Without the registration, the tokens can still be used and refreshed.
        self.expire_token()
        self.assert_quiet(self.run_refresh())
        self.assert_done(self.official_sign_in())
        self.assertEqual(len(self.double.agents), 2)

    def test_status_shows_the_official_sign_in(self):
        self.assertIsNone(json.loads(self.call("status", "--json").out)["official"])
        self.assert_done(self.official_sign_in())
        out = self.assert_quiet(self.call("status")).out
        self.assertTrue(out.startswith("ChatGPT OAuth: Authenticated (official sign-in)\n"), out)
        for words in ("ada@example.com", "Using ChatGPT plan", "expires in", "plan-gpt-5.5"):
            self.assertIn(words, out)
        facts = json.loads(self.assert_quiet(self.call("status", "--json")).out)
        self.assertEqual(
            facts["official"],
            {
                "email": "ada@example.com",
                "plan_allowed": True,
                "access_token_expires_at": self.stored_plan()["expires_at"],
                "problem": None,
            },
        )
        self.assertEqual((facts["authenticated"], facts["problem"]), (True, None))
        self.assertEqual(facts["model_source"], "official")
        self.store()
        out = self.assert_quiet(self.call("status")).out
        self.assertTrue(out.startswith("ChatGPT OAuth: Authenticated\nNo API key"), out)
        self.assertIn("Using ChatGPT plan", out)
        self.expire_token()
        self.change_stored_plan(refresh_token=None)
        # The Codex sign-in is valid, so the exit code is 0.
        out = self.assert_quiet(self.call("status")).out
        self.assertRegex(out, "Problem: cannot refresh .*\n.* auth --official")
        self.assert_no_secret(out)

    def test_status_is_authenticated_if_only_the_codex_session_ended(self):
        self.assert_done(self.official_sign_in())
        self.store(lifetime=-10, refresh_token=None)
        facts = json.loads(self.assert_quiet(self.call("status", "--json")).out)
        self.assertTrue(facts["authenticated"])
        self.assertIn("cannot refresh", facts["problem"])

    def test_online_status_checks_the_official_sign_in(self):
        self.assert_done(self.official_sign_in())
        out = self.assert_quiet(self.call("status", "--online")).out
        self.assertIn("OpenAI says: accepted, 2 models", out)
        self.assertNotIn("API key:", out)
        facts = json.loads(self.assert_quiet(self.call("status", "--online", "--json")).out)
        self.assertEqual(facts["online"], {"api_key": None, "access_token": None, "usage": []})
        self.fault("api", 401, {"detail": "no"})
        result = self.call("status", "--online")
        self.assertEqual((result.code, result.err), (4, ""))
        self.assertTrue(result.out.startswith("ChatGPT OAuth: Not authenticated\n"), result.out)
        self.assertIn("auth --official", result.out)
        self.fault("api", 500, b"")
        self.assertEqual(self.call("status", "--online").code, 5)
        self.store()
        result = self.call("status", "--online")
        self.assertEqual(result.code, 0)
        self.assertIn("ChatGPT plan: accepted", result.out)
        self.assertIn("OpenAI says: unreachable", result.out)

    def test_the_next_sign_in_keeps_a_broken_file_as_bad(self):
        self.home.mkdir(mode=0o700)
        self.plan_file.write_text("[")
        self.assert_fails(
            self.run_refresh(), 6, "chatgpt_plan.json", "auth --official", after_messages=True
        )
        result = self.call("status")
        self.assertEqual(result.code, 6)
        # A broken file does not say whether the plan may be used.
        self.assertNotIn("ChatGPT plan", result.out)
        # `token` needs the Codex sign-in, which does not exist.
        self.assertEqual(self.call("token").code, 3)
        self.assertIn("chatgpt_plan.json.bad", self.assert_done(self.official_sign_in()).err)
        self.assertTrue(self.stored_plan()["access_token"])
        self.plan_file.write_text("[")
        self.assert_done(self.call("logout"))
        self.assertEqual(list(self.home.glob("*.bad")), [])
        self.assertFalse(self.plan_file.exists())

    def test_logout_ends_both_sign_ins_despite_an_error(self):
        self.sign_in()
        self.assert_done(self.official_sign_in())
        self.models_file.write_text("[")
        self.assert_fails(self.call("logout"), 6, "chatgpt_models.json", after_messages=True)
        self.assertFalse(self.token_file.exists())
        self.assertFalse(self.plan_file.exists())

    def test_the_double_rejects_requests_that_the_plan_does_not_cover(self):
        """Check the double itself, because Code Puppy's requests are tested against it."""
        token = self.double.plan_sign_in("oaiapp_x")["access_token"]
        request = {"model": "gpt-5.5", "input": [], "store": False, "stream": True}

        def send(token, **changes):
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            connection = http.client.HTTPConnection("127.0.0.1", self.double.server.server_port)
            connection.request(
                "POST", "/v1/responses", json.dumps({**request, **changes}).encode(), headers
            )
            response = connection.getresponse()
            text = response.read().decode()
            connection.close()
            return response.status, text

        self.assertIn("response.completed", send(token)[1])
        for changes in (
            {"temperature": 1},
            {"store": True},
            {"stream": False},
            {"input": "hello"},
            {"input": [{"role": "system", "content": "x"}]},
            {"model": "gpt-6-astra", "tools": [{"type": "function", "name": "x"}]},
            {"tool_choice": {"type": "function", "name": "x"}},
        ):
            self.assertEqual(send(token, **changes)[0], 400, changes)
        self.assertEqual(send(token, tools=[{"type": "function", "name": "x"}])[0], 200)
        self.double.plan_limit = "mid"
        self.assertIn("response.failed", send(token)[1])
        self.double.plan_limit = "before"
        self.assertEqual(send(token)[0], 429)
        self.double.plan_access[token] = (0, True)
        self.assertEqual(send(token)[0], 401)
        self.assertEqual(send("nothing")[0], 401)


# ---------------------------------------------------------------------------------------------
# Sign-out
# ---------------------------------------------------------------------------------------------


class SignOutTest(Case):
    def test_logout_removes_models_if_the_token_file_is_a_directory(self):
        self.sign_in()
        self.token_file.unlink()
        self.token_file.mkdir()
        self.assert_fails(self.call("logout"), 6, "cannot remove", "yourself", after_messages=True)
        self.assertEqual(self.stored_models(), {})

    def test_a_broken_models_file_is_reported_once_and_logout_continues(self):
        self.store(api_key="sk-1")
        self.models_file.write_text("[")
        err = self.assert_fails(self.call("logout"), 6, "not valid JSON", after_messages=True).err
        self.assertIn("Signed out of ada@example.com\nThe API key stays valid until you", err)
        self.assertEqual(err.count("not valid JSON"), 1)
        # There was no official sign-in to end.
        self.assertNotIn("official", err)
        self.assertFalse(self.token_file.exists())
        self.assertEqual(self.models_file.read_text(), "[")

    def test_without_a_sign_in_logout_does_not_report_one(self):
        self.home.mkdir(mode=0o700)
        self.models_file.write_text("[")
        err = self.assert_fails(self.call("logout"), 6, "chatgpt_models.json: not valid JSON").err
        self.assertNotIn("Signed out", err)
        self.assertEqual(os.listdir(self.home), ["chatgpt_models.json"])

    def test_tokens_in_a_file_that_cannot_be_removed_are_not_revoked(self):
        self.store()
        path = shlex.quote(str(self.token_file))
        result = self.run_mounted(f"mount --bind {path} {path}", "logout")
        self.assert_fails(result, 6, f"cannot remove {self.token_file}: ", "mount the directory")
        with self.as_unprivileged_owner():
            self.home.chmod(0o500)
            result = self.call("logout")
            self.home.chmod(0o700)
        self.assert_fails(result, 6, "cannot remove ", "make its directory writable")
        self.assertEqual(self.double.count("revoke"), 0)

    def test_a_full_disk_does_not_stop_a_sign_out(self):
        self.store()
        with mock.patch.object(oauth, "_overwrite", side_effect=OSError(errno.ENOSPC, "full")):
            self.assert_done(self.call("logout"))
        self.assertEqual(self.double.count("revoke"), 1)
        self.assertFalse(self.token_file.exists())

    def test_logout_reports_a_directory_in_place_of_the_bad_file(self):
        self.store()
        broken = self.home / "chatgpt_oauth.json.bad"
        broken.mkdir()
        result = self.call("logout")
        self.assert_fails(result, 6, f"cannot remove {broken}: ", "yourself", after_messages=True)
        self.assertFalse(self.token_file.exists())

    def test_revoked_tokens_are_removed_while_the_models_file_is_locked(self):
        self.store()
        environ = {"CHATGPT_OAUTH_LOCK_TIMEOUT": "0.2"}
        with self.holding_lock(self.models_file):
            err = self.assert_fails(
                self.call("logout", environ=environ), 5, "models.json.lock", after_messages=True
            ).err
        self.assertEqual(self.double.count("revoke"), 1)
        self.assertIn("Signed out of ada@example.com\n", err)
        self.assertFalse(self.token_file.exists())

    def test_a_failed_revocation_is_a_warning(self):
        self.store()
        self.fault("revoke", 500, b"")
        err = self.assert_done(self.call("logout")).err
        self.assertIn("The token may still be valid at OpenAI.", err)
        self.assertFalse(self.token_file.exists())

    def test_a_local_logout_sends_nothing(self):
        self.store()
        self.assert_done(self.call("logout", "--local"))
        self.assertEqual(self.double.requests, [])
        self.assertFalse(self.token_file.exists())

    def test_without_a_refresh_token_logout_revokes_the_access_token(self):
        self.store(refresh_token=None)
        self.assert_done(self.call("logout"))
        sent = self.double.requests[-1]["fields"]
        self.assertEqual(sent["token_type_hint"], "access_token")
        self.assertNotIn("client_id", sent)


# ---------------------------------------------------------------------------------------------
# Several accounts
# ---------------------------------------------------------------------------------------------


class AccountsTest(Case):
    def change_person(self, number, organization=None):
        """Make the double sign in person `number` from now on."""
        self.double.account, self.double.email = f"acct-{number}", f"p{number}@example.com"
        self.double.organization, self.double.plan_subject = organization, f"user|{number}"

    def test_three_accounts_from_sign_in_to_sign_out(self):
        self.sign_in()
        first_entries, first_file = self.stored_models(), self.token_file.read_bytes()
        names = ["chatgpt_models.json", "chatgpt_models.json.lock", *TOKEN_FILES]
        self.assertEqual(sorted(path.name for path in self.home.iterdir()), names)
        self.change_person(2, "org-2")
        err = self.finish_sign_in(*self.start_sign_in("--account", "work")).err
        for words in (
            "Signed in as p2@example.com",
            f"Tokens saved in {self.account_file('work')}",
            " auth --account work --device\n",
            " env --account work",
        ):
            self.assertIn(words, err)
        self.assertNotIn("You are signed in as", err)
        err = self.assert_done(self.call("logout", "--account", "nobody")).err
        self.assertIn(f"(no tokens in {self.home / 'accounts' / 'nobody'})", err)
        self.change_person(3)
        self.assert_done(self.official_sign_in("--account", "my-plan"))
        entries = self.stored_models()
        self.assertEqual(list(entries.items())[:3], list(first_entries.items()))
        self.assertEqual(
            list(entries)[3:],
            [
                "chatgpt-work-gpt-4o",
                "chatgpt-work-o1-mini",
                "chatgpt-work-o3-pro",
                "chatgpt-my-plan-plan-gpt-6-astra",
                "chatgpt-my-plan-plan-gpt-5.5",
            ],
        )
        entry = first_entries["chatgpt-gpt-4o"]
        endpoint = {**entry["custom_endpoint"], "api_key": "$CHATGPT_OAUTH_API_KEY_WORK"}
        self.assertEqual(
            entries["chatgpt-work-gpt-4o"],
            {**entry, "custom_endpoint": endpoint, "account": "work"},
        )
        self.assertEqual(entries["chatgpt-my-plan-plan-gpt-5.5"]["account"], "my-plan")
        self.assertEqual(entries["chatgpt-my-plan-plan-gpt-5.5"]["type"], "chatgpt_plan")
        if POSIX:
            for directory in (self.home / "accounts", self.account_file("work").parent):
                self.assertEqual(directory.stat().st_mode & 0o777, 0o700)
            self.assertEqual(self.account_file("work").stat().st_mode & 0o777, 0o600)

        work = json.loads(self.account_file("work").read_text())
        out = self.assert_quiet(self.call("token", "--account", "work")).out
        self.assertEqual(out, work["access_token"] + "\n")
        out = self.assert_quiet(self.call("token", "--account", "work", "--json")).out
        self.assertEqual(json.loads(out)["account_id"], "acct-2")
        out = self.assert_quiet(self.call("env", "--account", "work", "--shell", "sh")).out
        self.assertEqual(out, f"export CHATGPT_OAUTH_API_KEY_WORK='{work['api_key']}'\n")
        code = "import os; print(*sorted(n for n in os.environ if n.endswith('_WORK')))"
        command = ("exec", "--account", "work", "--access-token", "--")
        out = self.assert_quiet(self.run_program(*command, sys.executable, "-c", code)).out
        names = ["CHATGPT_OAUTH_ACCESS_TOKEN_WORK", "CHATGPT_OAUTH_ACCOUNT_ID_WORK"]
        self.assertEqual(out.split(), names)
        out = self.assert_quiet(self.call("status", "--account", "work")).out
        self.assertIn("\nName:         work\nAccount:      p2@example.com\n", out)
        self.assertNotIn("chatgpt-gpt-4o", out)
        facts = json.loads(self.call("status", "--account", "work", "--json").out)
        self.assertEqual((facts["account"], len(facts["models"])), ("work", 3))
        self.assertIsNone(json.loads(self.call("status", "--json").out)["account"])
        self.double.requests.clear()
        result = self.call("models", "--account", "work", "--include", "o1*")
        self.assertEqual((result.code, result.out), (0, "chatgpt-work-o1-mini\n"))
        self.assertEqual(
            {each["headers"]["authorization"] for each in self.double.requests},
            {"Bearer " + work["api_key"]},
        )
        left = [
            name for name in entries if name not in ("chatgpt-work-gpt-4o", "chatgpt-work-o3-pro")
        ]
        self.assertEqual(sorted(self.stored_models()), sorted(left))

        err = self.assert_done(self.call("logout", "--account", "work")).err
        self.assertIn("Signed out of p2@example.com; imported models removed", err)
        self.assertNotIn(work["refresh_token"], self.double.refresh_tokens)
        self.assertEqual(os.listdir(self.account_file("work").parent), ["chatgpt_oauth.json.lock"])
        self.assertTrue(self.account_file("my-plan", "chatgpt_plan.json").exists())
        self.assert_done(self.call("logout", "--account", "my-plan"))
        self.assertTrue(self.account_file("my-plan", "chatgpt_agent.json").exists())
        self.assertEqual(self.stored_models(), first_entries)
        self.assertEqual(self.token_file.read_bytes(), first_file)

    def test_wrong_names_are_refused_and_nothing_changes(self):
        names = ("Work", "a_b", "-a", "a" * 33, "..", "a/b", "a\\b", "\u00e4", "a\n", " a")
        for name in (*names, "plan", "env-var", "con", "nul", "prn", "aux", "com1", "lpt9"):
            with self.subTest(name):
                result = self.call("auth", f"--account={name}")
                self.assert_fails(result, 2, "--account must be 1 to 32 of a-z, 0-9 and -")
                # In the C locale, os.environ can't hold "\u00e4" itself, only its bytes.
                environ = {"CHATGPT_OAUTH_ACCOUNT": os.fsdecode(name.encode())}
                self.assert_fails(self.call("token", environ=environ), 2, "CHATGPT_OAUTH_ACCOUNT")
        self.assert_fails(self.call("logout", "--account", ""), 2, "--account must be")
        self.assertFalse(self.home.exists())
        for name in ("0", "a" * 32, "plan-b", "console", "a-b"):
            result = self.call("token", "--account", name)
            self.assert_fails(result, 3, f"auth --account {name}\n")

    def test_the_account_option_overrides_the_setting(self):
        unnamed, work, home = self.store(), self.store_account("work"), self.store_account("home")
        environ = {"CHATGPT_OAUTH_ACCOUNT": "work"}
        for arguments, expected in ((("token",), work), (("token", "--account", "home"), home)):
            result = self.call(*arguments, environ=environ)
            self.assertEqual(result, (0, expected["access_token"] + "\n", ""))
        result = self.call("token", environ={"CHATGPT_OAUTH_ACCOUNT": ""})
        self.assertEqual(result, (0, unnamed["access_token"] + "\n", ""))

    def test_hints_repeat_the_account(self):
        for arguments, hint in (
            (("token",), "auth --account work"),
            (("models", "--source", "official"), "auth --account work --official"),
            (("exec", "--access-token", "--", "true"), "auth --account work"),
            (("exec",), "exec --account work -- COMMAND"),
            (("env", "--account", "work"), "auth --account work"),
        ):
            command, *rest = arguments
            result = self.call(command, "--account", "work", *rest)
            self.assertRegex(result.err, rf": .+ {hint}\n")
        self.assertIn(" auth --account work\n", self.call("status", "--account", "work").out)
        self.store_account("work", lifetime=-10)
        self.double.refresh_tokens.clear()
        result = self.call("token", "--account", "work")
        self.assert_fails(result, 4, " auth --account work\n")
        self.assertIn(" auth --account work\n", self.call("status", "--account", "work").out)
        self.store_account("work", lifetime=200)
        self.double.refresh_tokens.clear()
        result = self.call("token", "--account", "work")
        self.assertIn("hint: ", result.err)
        self.assertIn(" auth --account work\n", result.err)
        self.assertEqual(result.code, 0)

    def test_accounts_lists_every_account_and_its_problem(self):
        self.assertEqual(self.call("accounts", "--json"), (3, "[]\n", ""))
        result = self.call("accounts")
        self.assertEqual((result.code, result.err), (3, ""))
        nobody = f"No account is signed in (no tokens in {self.home}).\nTo sign in, run: "
        self.assertRegex(result.out, rf"\A{re.escape(nobody)}.+ auth\n\Z")
        self.store_account("broken")
        self.account_file("broken").write_text("[")
        result = self.call("accounts")
        self.assertEqual((result.code, result.err), (3, ""))
        self.store()
        self.store_account("ended", lifetime=-10)
        self.double.refresh_tokens.popitem()
        self.call("token", "--account", "ended")
        self.change_person(3)
        self.official_sign_in("--account", "app")
        self.account_file("empty").parent.mkdir()
        (self.home / "accounts" / "Not-A-Name").mkdir()
        result = self.assert_quiet(self.call("accounts"))
        lines = result.out.splitlines()
        self.assertEqual(
            [re.split("  +", line)[:3] for line in lines],
            [
                ["(no name)", "ada@example.com", "plus"],
                ["app", "p3@example.com", "unknown"],
                ["broken", "unknown", "unknown"],
                ["ended", "ada@example.com", "plus"],
            ],
        )
        self.assertTrue(lines[0].endswith("  expires in 10 days"), lines[0])
        self.assertIn("  expires in ", lines[1])
        self.assertTrue(lines[2].endswith("not valid JSON"), lines[2])
        self.assertIn("session has ended", lines[3])
        listed = json.loads(self.call("accounts", "--json").out)
        keys = "account email plan authenticated has_api_key access_token_expires_at official"
        self.assertEqual([set(each) for each in listed], [{*keys.split(), "problem"}] * 4)
        self.assertEqual(
            [(each["account"], each["authenticated"]) for each in listed],
            [(None, True), ("app", True), ("broken", False), ("ended", False)],
        )
        self.assertEqual(listed[1]["official"]["email"], "p3@example.com")
        self.assertIn(" auth --account ended", listed[3]["problem"])
        self.assert_no_secret(result.out, json.dumps(listed))

    def test_accounts_says_that_an_expired_token_will_be_refreshed(self):
        self.store(lifetime=-3600)
        out = self.assert_quiet(self.call("accounts")).out
        self.assertTrue(out.endswith("  expired 1 hour ago, refreshed on next use\n"), out)

    def test_accounts_online_asks_for_all_accounts_at_the_same_time(self):
        self.store()
        for name in ("a", "b"):
            self.store_account(name)
        # No request is answered before all three have arrived. The comparison is false, so the
        # double then answers.
        everyone = threading.Barrier(3)
        self.double.faults["usage"] = lambda *_: everyone.wait(WAIT_LIMIT) < 0
        result = self.assert_quiet(self.call("accounts", "--online"))
        lines = result.out.splitlines()
        self.assertEqual(len(lines), 9)
        # Each account has three lines.
        for short, long in zip(lines[1::3], lines[2::3]):
            self.assertTrue(short.startswith("    5 hours: #......... 7.5%, resets in "), short)
            self.assertTrue(long.startswith("    7 days: ###....... 32%, resets in 1 day"), long)
        listed = json.loads(self.assert_quiet(self.call("accounts", "--online", "--json")).out)
        self.assertEqual([each["usage"][1]["used_percent"] for each in listed], [32] * 3)
        self.fault("usage", 500)
        result = self.assert_quiet(self.call("accounts", "--online"))
        self.assertEqual(result.out.count("\n    usage unknown: "), 3)

    def test_each_account_changes_only_its_own_entries(self):
        self.double.organization = None
        self.store_account("work")
        self.store()
        ours = {"oauth_source": "chatgpt-oauth-plugin", "type": "chatgpt_oauth", "name": "x"}
        kept = {
            "chatgpt-work-gpt-5.5": ours,
            "chatgpt-other-x": {**ours, "account": "other"},
            "chatgpt-odd": {**ours, "account": ["work"]},
        }
        self.models_file.write_text(
            json.dumps({**kept, "chatgpt-work-old": {**ours, "account": "work"}})
        )
        result = self.call("models", "--account", "work")
        self.assertEqual(result.code, 0)
        self.assertIn("kept the entry chatgpt-work-gpt-5.5", result.err)
        self.assertEqual(list(self.stored_models()), [*kept, "chatgpt-work-gpt-5.4"])
        # The account without a name owns the entries that name no account.
        self.call("logout")
        self.assertEqual(
            list(self.stored_models()), ["chatgpt-other-x", "chatgpt-odd", "chatgpt-work-gpt-5.4"]
        )

    def test_uninstall_removes_all_registrations_and_no_sign_in(self):
        self.official_sign_in()
        self.change_person(2)
        self.official_sign_in("--account", "work")
        agents = [self.agent_file, self.account_file("work", "chatgpt_agent.json")]
        self.assertEqual([path.exists() for path in agents], [True, True])
        err = self.assert_done(self.call("uninstall")).err
        for path in agents:
            self.assertIn(f"Removed {path}\n", err)
            self.assertEqual(list(path.parent.glob("chatgpt_agent.json*")), [])
        self.assertTrue(self.plan_file.exists())
        self.assertTrue(self.account_file("work", "chatgpt_plan.json").exists())

    def test_many_processes_refresh_two_accounts_once_each(self):
        self.store(lifetime=-10)
        self.double.account = "acct-2"
        self.store_account("work", lifetime=-10)
        self.double.delay = 0.2
        unnamed_processes, work_processes = [], []
        for _ in range(10):
            unnamed_processes.append(self.start("token"))
            work_processes.append(self.start("token", "--account", "work"))
        unnamed = {each.result() for each in unnamed_processes}
        named = {each.result() for each in work_processes}
        self.assertEqual(self.double.count("refresh"), 2)
        work = json.loads(self.account_file("work").read_text())
        self.assertEqual(unnamed, {(0, self.stored()["access_token"] + "\n", "")})
        self.assertEqual(named, {(0, work["access_token"] + "\n", "")})
        self.assertEqual((self.stored()["account_id"], work["account_id"]), ("acct-1", "acct-2"))

    def test_functions_of_the_module_take_an_account(self):
        unnamed = self.store(api_key="sk-1")
        self.double.account = "acct-2"
        work = self.store_account("work", api_key="sk-2")
        code = """
import chatgpt_oauth as oauth
for account in (None, "", "work", "nobody", "No!"):
    for call in (oauth.get_access_token, oauth.get_account_id, oauth.get_api_key):
        try:
            print(call(account=account))
        except oauth.OAuthError as error:
            print(error.exit_code, error.hint)
oauth.sign_out(account="work")
"""
        lines = self.start_python(code).result().out.splitlines()
        names = ("access_token", "account_id", "api_key")
        first = [unnamed[name] for name in names]
        self.assertEqual(lines[:9], [*first, *first, *(work[name] for name in names)])
        hint = "3 to sign in, run: chatgpt_oauth.py auth --account nobody"
        self.assertEqual(lines[9:], [hint] * 3 + ["2 None"] * 3)
        self.assertFalse(self.account_file("work").exists())
        self.assertTrue(self.token_file.exists())

    def test_profile_lines_name_the_account(self):
        environ = {"CHATGPT_OAUTH_ACCOUNT": "work"}
        for shell, words in (
            ("nu", "env --account work --shell json"),
            ("elvish", "set-env CHATGPT_OAUTH_API_KEY_WORK ("),
            ("xonsh", "token --account work --api-key"),
        ):
            self.assert_fails(self.call("env", "--shell", shell, environ=environ), 2, words)

    @needs_root
    def test_a_link_of_another_user_in_place_of_the_accounts_is_refused(self):
        target = self.folder / "target"
        target.mkdir()
        self.home.mkdir()
        link = self.home / "accounts"
        link.symlink_to(target)
        os.lchown(link, NOBODY, NOBODY)
        result = self.call("auth", "--account", "work", "--no-browser")
        self.assert_fails(result, 6, f"{link}: another user")
        self.assertEqual(os.listdir(target), [])


# ---------------------------------------------------------------------------------------------
# Shells
# ---------------------------------------------------------------------------------------------


class ShellTest(Case):
    KEY = "sk-AZaz09-._~+/=="

    @needs_sh
    def test_every_shell_preserves_every_allowed_key_character(self):
        self.store(api_key=self.KEY)
        # tcsh can't have newlines between quotes, so the shells run a script.
        script = self.folder / "program"
        script.write_text(f'exec {shlex.join(PROGRAM_COMMAND)} "$@"\n')
        command = shell_line("sh", str(script), "env")
        unset, show = command + " --unset", "echo $CHATGPT_OAUTH_API_KEY"
        for shell, code in (
            (["bash", "-c"], 'eval "$({})"; {}'),
            (["zsh", "-c"], 'eval "$({})"; {}'),
            (["dash", "-c"], 'eval "$({})"; {}'),
            (["ksh", "-c"], 'eval "$({})"; {}'),
            (["mksh", "-c"], 'eval "$({})"; {}'),
            (["busybox", "sh", "-c"], 'eval "$({})"; {}'),
            (["fish", "-c"], "{} | source; {}"),
            (["tcsh", "-f", "-c"], "eval `{}`; {}"),
        ):
            with self.subTest(shell[0]):
                self.require(shutil.which(shell[0]), f"no {shell[0]} here")
                # In $SHELL, these two usually have another name.
                name = {"mksh": "ksh", "busybox": "sh"}.get(shell[0], shell[0])
                environ = {"SHELL": "/bin/" + name}
                old_environ = {**environ, "CHATGPT_OAUTH_API_KEY": "old"}
                set_command = [*shell, code.format(command, show)], environ
                unset_command = [*shell, code.format(unset, "env")], old_environ
                results = run_in_parallel(
                    lambda run: self.run_command(*run), (set_command, unset_command)
                )
                self.assertEqual(results[0].out.strip(), self.KEY)
                self.assertNotIn("CHATGPT_OAUTH_API_KEY=", results[1].out)

    @needs_sh
    def test_an_unquoted_eval_sets_both_variables(self):
        fields = self.store()
        code = f"eval $({shlex.join([*PROGRAM_COMMAND, 'env', '--access-token'])}); "
        code += "echo $CHATGPT_OAUTH_ACCESS_TOKEN $CHATGPT_OAUTH_ACCOUNT_ID"
        self.assertEqual(self.run_shell(code).out.split(), [fields["access_token"], "acct-1"])

    def test_each_shell_gets_its_own_syntax(self):
        self.store(api_key="sk-1")
        for shell, export_line, unset_line in (
            ("sh", "export V='sk-1'", "unset V"),
            ("zsh", "export V='sk-1'", "unset V"),
            ("fish", "set -gx V 'sk-1'", "set -e V"),
            ("csh", "setenv V 'sk-1'", "unsetenv V"),
            ("tcsh", "setenv V 'sk-1'", "unsetenv V"),
            ("powershell", "$env:V = 'sk-1'", "Remove-Item Env:V -ErrorAction SilentlyContinue"),
            ("cmd", 'set "V=sk-1"', 'set "V="'),
            ("dotenv", "V=sk-1", "V="),
            ("json", '{"V": "sk-1"}', '{"V": null}'),
        ):
            arguments = ("env", "--name", "V", "--shell", shell)
            self.assertEqual(self.call(*arguments), (0, export_line + "\n", ""))
            self.assertEqual(self.call(*arguments, "--unset"), (0, unset_line + "\n", ""))

    def test_invalid_names_and_unknown_shells_are_usage_errors(self):
        self.store(api_key="sk-1")
        for name in ("a;b", "", "1a", "a b", "\u00e4"):
            self.assert_fails(self.call("env", "--name", name), 2, "--name")
        twice = ("env", "--access-token", "--name", "CHATGPT_OAUTH_ACCOUNT_ID")
        self.assert_fails(self.call(*twice), 2, "--name")
        with self.subTest("$SHELL"):
            self.require(POSIX, "on Windows the default is PowerShell, and $SHELL is ignored")
            self.assert_fails(self.call("env", environ={"SHELL": "/bin/nu"}), 2, "nu", "--shell")
            shells = ("ash", "yash", "ksh93", "bash-5.2", "mksh", "mksh-R59", "posh")
            for shell in (*shells, "/opt/x/zsh-5.9"):
                result = self.call("env", environ={"SHELL": shell})
                self.assertEqual(
                    (result.code, result.out),
                    (0, "export CHATGPT_OAUTH_API_KEY='sk-1'\n"),
                    result.err,
                )
        self.assert_fails(self.call("env", "--shell", "nu"), 2, "--shell")

    def test_the_default_shell_on_windows(self):
        for environ, name in (
            ({}, "powershell"),
            ({"MSYSTEM": "MINGW64"}, "sh"),
            ({"MSYSTEM": "MINGW64", "SHELL": "/usr/bin/bash"}, "bash"),
            ({"SHELL": "/usr/bin/bash.exe"}, "bash"),
            ({"SHELL": "/usr/bin/fish"}, "fish"),
        ):
            with mock.patch.object(sys, "platform", "win32"):
                settings = types.SimpleNamespace(environ=environ)
                self.assertEqual(oauth.shell_name(settings, "auto"), name)
                self.assertEqual(oauth.shell_name(settings, "cmd"), "cmd")

    def test_unsupported_shells_get_their_own_profile_line(self):
        self.store(api_key="sk-1")
        profiles = self.assert_quiet(self.run_program("env", "--help")).out
        for shell, line in (
            ("nu", "env --shell json | from json | load-env"),
            ("elvish", "set-env CHATGPT_OAUTH_API_KEY ("),
            ("xonsh", "$CHATGPT_OAUTH_API_KEY = !("),
        ):
            self.assert_fails(self.call("env", "--shell", shell), 2, shell, line, "--shell")
            self.assertIn(f"  {shell}:\n", profiles)
            self.assertIn(line, profiles)

    @unittest.skipUnless(POSIX, "Windows doesn't allow such file names")
    @needs_sh
    def test_the_profile_lines_in_help_work_from_any_directory(self):
        self.store(api_key=self.KEY)
        names = ["it's a", 'a $HOME & \\\' (b) "c"; *?[d] {e} ~ # !', "`f`", "a\nb"]
        programs = [self.folder / name / "c.py" for name in names]
        for program in programs:
            program.parent.mkdir()
            shutil.copy(PROGRAM, program)
        lines = []
        for program in programs:
            out = self.assert_quiet(
                self.run_command([sys.executable, str(program), "env", "-h"])
            ).out
            # Each profile line comes after its shell's name. A path with a newline makes it two.
            lines.append(dict(re.findall(r"(?ms)^  (\w+):\n    (.+?)$(?=\n  \w+:\n|\n?\Z)", out)))
        echo = "echo $CHATGPT_OAUTH_API_KEY"
        for shell, row, show in (
            ("bash", "sh", echo),
            ("zsh", "sh", echo),
            ("dash", "sh", echo),
            ("fish", "fish", echo),
            ("tcsh", "csh", echo),
            ("nu", "nu", "print $env.CHATGPT_OAUTH_API_KEY"),
            ("elvish", "elvish", "echo $E:CHATGPT_OAUTH_API_KEY"),
            ("xonsh", "xonsh", echo),
        ):
            with self.subTest(shell):
                self.require(shutil.which(shell), f"no {shell} here")
                # The eval of tcsh can handle neither backquotes nor newlines in the path.
                usable = lines[:2] if shell == "tcsh" else lines
                commands = [[shell, "-c", f"{each[row]}\n{show}"] for each in usable]
                for command, result in zip(commands, run_in_parallel(self.run_command, commands)):
                    self.assertEqual(result.out.strip(), self.KEY, (command, result))

    @needs_sh
    def test_signed_out_env_prints_one_error_line_and_exports_nothing(self):
        err = self.assert_fails(
            self.run_program("env"), 3, "not signed in", "auth", one_line=True
        ).err
        self.assertEqual(err.count("\n"), 1)
        command = shlex.join([*PROGRAM_COMMAND, "env"])
        result = self.run_shell(f'eval "$({command})"; echo "<$CHATGPT_OAUTH_API_KEY>"')
        self.assertEqual(result.out, "<>\n")
        self.assertEqual(self.run_program("env", "--unset").code, 0)


# ---------------------------------------------------------------------------------------------
# Terminal
# ---------------------------------------------------------------------------------------------


class TerminalTest(Case):
    def add_programs(self, *names, code="exit 0"):
        """Add shell scripts with these names to a new directory, and return the directory."""
        directory = self.folder / "-".join(("programs", *names))
        directory.mkdir()
        for name in names:
            script = directory / name
            script.write_text(f"#!/bin/sh\n{code}\n")
            script.chmod(0o755)
        return str(directory)

    @unittest.skipUnless(POSIX, "Windows has one way to open a URL")
    def test_each_environment_opens_the_browser_or_says_why_not(self):
        display = {"DISPLAY": ":0"}
        firefox, xdg = self.add_programs("firefox"), self.add_programs("xdg-open")
        windows, termux = self.add_programs("rundll32.exe"), self.add_programs("termux-open-url")
        no_display = "(this is a container)" if IN_CONTAINER else "(there is no display)"
        for environ, program, words in (
            ({"SSH_CONNECTION": "1", **display}, None, "(this is an SSH session)"),
            ({"SSH_TTY": "/dev/pts/1"}, None, "(this is an SSH session)"),
            ({"BROWSER": "lynx", **display}, None, "needs a graphical browser)"),
            ({"BROWSER": "/usr/bin/w3m %s", **display}, None, "needs a graphical browser)"),
            ({"BROWSER": "none -x", **display}, None, "no program that is installed: none -x)"),
            ({"BROWSER": "firefox", "SSH_TTY": "x", "PATH": firefox}, f"{firefox}/firefox", ""),
            ({"BROWSER": "none:firefox &", "PATH": firefox}, f"{firefox}/firefox", ""),
            ({"WSL_DISTRO_NAME": "x", "PATH": "/none"}, None, "(no program that opens URLs"),
            ({"WSL_DISTRO_NAME": "x", "PATH": windows}, "rundll32.exe", ""),
            ({"PATH": termux}, "termux-open-url", ""),
            ({"PATH": xdg, **display}, "xdg-open", ""),
            ({"PATH": xdg, "WAYLAND_DISPLAY": "w"}, "xdg-open", ""),
            ({"PATH": xdg}, None, no_display),
        ):
            with self.subTest(environ), mock.patch.object(subprocess, "Popen") as popen:
                is_for_linux = environ.get("PATH") in (termux, xdg)
                self.require(not (is_for_linux and sys.platform == "darwin"), "only on Linux")
                popen.return_value.wait.return_value = 0
                err = self.assert_done(self.call("auth", environ=environ, browser=visit)).err
                self.assertIn(words, err)
                self.assertEqual("No browser was opened (" in err, program is None)
                if program is None:
                    popen.assert_not_called()
                    continue
                popen.assert_called_once()
                command = popen.call_args[0][0]
                url = re.search(AUTHORIZATION_URL, err, re.M)[0]
                self.assertEqual((command[0], command[-1]), (program, url))

    @unittest.skipUnless(POSIX, "Windows has one way to open a URL")
    def test_without_xdg_open_python_finds_a_browser(self):
        directory = self.add_programs("firefox", code='echo "$@" > "$HOME/arguments"')
        running = self.start("auth", environ={"DISPLAY": ":0", "PATH": directory})
        url = running.wait_for_url()
        arguments = self.folder / "arguments"
        wait_for(lambda: arguments.exists() and url in arguments.read_text())
        self.finish_sign_in(running, url)

    @unittest.skipUnless(POSIX, "Windows has one way to open a URL")
    def test_a_program_that_is_not_python_does_not_start_itself_as_a_browser(self):
        # Otherwise the program starts sys.executable to find a browser.
        self.environ.update(DISPLAY=":0", PATH="/none")
        for change in ("frozen = True", "executable = '/opt/app'", "executable = None"):
            with self.subTest(change):
                code = f"import chatgpt_oauth; sys.{change}; sys.exit(chatgpt_oauth.main(['auth']))"
                running = self.start_python(code)
                err = self.finish_sign_in(running, running.wait_for_url()).err
                self.assertIn("No browser was opened (no program that opens URLs was found)", err)

    @unittest.skipUnless(POSIX, "needs a shell script as the browser")
    def test_the_browser_variable_is_a_command_line(self):
        directory = self.add_programs("my browser", code='printf "%s\\n" "$@" > "$HOME/arguments"')
        program, arguments = f"'{directory}/my browser'", self.folder / "arguments"

        def is_complete():
            return arguments.exists() and arguments.read_text().endswith("\n")

        for value, expected in (
            (program, ["URL"]),
            (f'{program} --new-window "a b"', ["--new-window", "a b", "URL"]),
            (f"{program} --app=%s -x", ["--app=URL", "-x"]),
            (f"{program} \"it's 'quoted'\"", ["it's 'quoted'", "URL"]),
        ):
            with self.subTest(value):
                running = self.start("auth", environ={"BROWSER": value})
                url = running.wait_for_url()
                wait_for(is_complete)
                received = arguments.read_text().replace(url, "URL")
                self.assertEqual(received.splitlines(), expected)
                arguments.unlink()
                self.assertNotIn("did not open", self.finish_sign_in(running, url).err)

    @unittest.skipUnless(POSIX, "needs a shell script as the browser")
    def test_a_browser_command_that_fails_at_once_is_reported(self):
        environ = {"BROWSER": self.add_programs("broken", code="exit 3") + "/broken"}
        # The failure must be reported before this time is over.
        self.waits.update(BROWSER_WATCH=2 * WAIT_LIMIT)
        warning = "\nwarning: the browser did not open (broken: exit code 3)\n"

        def visit_after_warning(url):
            wait_for(lambda: warning in sys.stderr.getvalue())
            visit(url)

        result = self.assert_done(self.call("auth", environ=environ, browser=visit_after_warning))
        self.assertIn(f"{warning}hint: open the URL above in any browser\n", result.err)

    def test_without_a_browser_the_other_ways_are_shown(self):
        err = self.finish_sign_in(*self.start_sign_in(stdin=subprocess.PIPE)).err
        self.assertNotIn("No browser was opened", err)
        self.assertIn("paste its URL here", err)
        # SSH doesn't lead into a container.
        self.assertEqual("- Or forward the port first." in err, not IN_CONTAINER)
        self.assertEqual(f"ssh -L {self.ports[0]}:localhost" in err, not IN_CONTAINER)

    def test_the_browser_process_receives_no_secret(self):
        self.store(api_key="sk-before")
        self.store_account("work", api_key="sk-work")
        seen = self.folder / "seen.json"
        script = self.folder / "browser.py"
        script.write_text(
            "import json, os, sys\n"
            f"json.dump([sys.argv, dict(os.environ)], open({str(seen)!r}, 'w'))\n"
            f"sys.path.insert(0, {str(pathlib.Path(TEST_FILE).parent)!r})\n"
            "import test_chatgpt_oauth as tests\n"
            "print('noise from the browser'); tests.visit(sys.argv[1])\n"
        )
        environ = {
            "BROWSER": shell_line(sys.executable, script) + " %s",
            "OPENAI_API_KEY": "sk-before",
            "WORK_API_KEY": "sk-work",
            "CHATGPT_OAUTH_API_KEY": "sk-other",
        }
        err = self.assert_done(self.run_program("auth", environ=environ)).err
        self.assertNotIn("noise", err)
        arguments, inherited = json.loads(seen.read_text())
        self.assertNotIn("sk-", " ".join(arguments) + json.dumps(inherited))
        self.assertIn("PATH", inherited)

    @unittest.skipUnless(POSIX, "Windows has no process groups like these")
    def test_ctrl_c_and_the_terminal_do_not_reach_the_browser(self):
        seen, script = self.folder / "seen", self.folder / "browser.py"
        script.write_text(
            f"import os; file = open({str(seen)!r}, 'w')\n"
            "print(os.getpgid(0), os.environ.get('TERM'), file=file)\n"
        )
        environ = {"BROWSER": shell_line(sys.executable, script), "TERM": "xterm"}
        # A terminal sends Ctrl-C to a process group, which is the program's own here.
        running = self.start("auth", environ=environ, start_new_session=True)
        url = running.wait_for_url()
        wait_for(lambda: seen.exists() and seen.read_text().endswith("\n"))
        group, term = seen.read_text().split()
        self.assertNotEqual(int(group), running.process.pid)
        # With TERM, Python's `webbrowser` might start a browser in the terminal.
        self.assertEqual(term, "None")
        self.finish_sign_in(running, url)

    def test_opening_the_browser_imports_nothing_from_the_current_directory(self):
        trap = self.folder / "webbrowser.py"
        trap.write_text(f"open({str(self.folder / 'sprung')!r}, 'w')")
        result = self.run_program("auth", environ={"BROWSER": BROWSER}, cwd=str(self.folder))
        self.assertEqual(result.code, 0, result.err)
        self.assertFalse((self.folder / "sprung").exists())

    @needs_terminal
    def test_the_remaining_time_is_printed_at_four_moments(self):
        self.double.device_polls = 99
        screens, expected = {}, {}
        for way, seconds in (
            ("--device", 90),
            ("--device", 60),
            ("--device", 30),
            ("--device", 10),
            ("--no-browser", 30),
        ):
            leader, follower = self.open_terminal()
            streams = dict.fromkeys(("stdin", "stdout", "stderr"), follower)
            # The mark is reached after 0.9 seconds.
            command = [*PROGRAM_COMMAND, "auth", way, "--timeout", f"{seconds}.9"]
            environ = {**self.environ, "TERM": "xterm"}
            process = subprocess.Popen(command, env=environ, start_new_session=True, **streams)
            self.addCleanup(process.wait, WAIT_LIMIT)
            self.addCleanup(process.kill)
            os.close(follower)
            screens[leader], expected[leader] = b"", str(seconds).encode()
        deadline = time.monotonic() + WAIT_LIMIT
        waiting = list(screens)
        while waiting and time.monotonic() < deadline:
            for leader in select.select(waiting, [], [], 0.5)[0]:
                # Reading fails once the program has ended.
                with contextlib.suppress(OSError):
                    screens[leader] += os.read(leader, 65536)
            waiting = [leader for leader in waiting if b"seconds left" not in screens[leader]]
        for leader, screen in screens.items():
            moments = re.findall(rb"\n(\d+) seconds left", screen)
            self.assertEqual(moments, [expected[leader]], screen)
            self.assertNotRegex(screen, rb"\r(?!\n)")

    @needs_terminal
    def test_only_a_capable_terminal_gets_colors(self):
        for term, colored in (("xterm", True), ("dumb", False), (None, False)):
            screen = self.run_at_terminal("stderr", "token", environ={"TERM": term})
            self.assertIn("not signed in", screen)
            self.assertEqual("\x1b" in screen, colored, screen)

    @needs_terminal
    def test_the_authorization_url_is_a_hyperlink_on_a_capable_terminal(self):
        for term, is_link in (("xterm", True), ("linux", False), ("dumb", False)):
            with self.subTest(term):
                command = ("auth", "--no-browser", "--timeout", "0.2")
                screen = self.run_at_terminal("stderr", *command, environ={"TERM": term})
                screen = screen.replace("\r\n", "\n")
                # OSC 8 begins a link if it has a URL. Otherwise it ends the link.
                link = r"^\x1b\]8;;(http\S+/oauth/authorize\?\S+)\x1b\\\1\x1b\]8;;\x1b\\$"
                self.assertEqual(bool(re.search(link, screen, re.M)), is_link, screen)
                self.assertEqual("\x1b]" in screen, is_link)

    def test_a_limited_encoding_does_not_crash(self):
        # The last character reverses the direction of the text after it.
        self.double.email = "\u00e4d\u00e4\u202e@example.com"
        for encoding in ("ascii", "cp1252", "utf-8"):
            environ = {"PYTHONIOENCODING": encoding}
            running = self.start("auth", "--no-browser", environ=environ)
            visit(running.wait_for_url())
            self.assertEqual(running.result().code, 0)
            out = self.assert_quiet(self.run_program("status", environ=environ)).out
            self.assertNotIn("\u202e", out)

    def test_a_program_path_with_a_space_keeps_json_valid(self):
        program = self.folder / "my folder" / "c.py"
        program.parent.mkdir()
        shutil.copy(PROGRAM, program)
        out = self.run_command([sys.executable, str(program), "status", "--json"]).out
        self.assertIn(f"{PYTHON} {quoted_path(program)} auth", json.loads(out)["problem"])


# ---------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------


class CommandsTest(Case):
    @needs_sh
    def test_a_profile_line_quotes_a_launcher_if_necessary(self):
        for directory, fish, nu in (
            ("plain", "{0} env --shell fish | source", "try {{ {0} env --shell json"),
            ("a b", "'{0}' env --shell fish | source", 'try {{ ^"{0}" env --shell json'),
        ):
            with self.subTest(directory):
                launcher = self.folder / directory / "chatgpt-oauth"
                launcher.parent.mkdir()
                launcher.symlink_to(PROGRAM)
                result = self.run_command([sys.executable, str(launcher), "env", "-h"])
                lines = self.assert_quiet(result).out
                self.assertIn("    " + fish.format(launcher), lines)
                self.assertIn("    " + nu.format(launcher), lines)

    def test_an_unknown_shell_does_not_fail_a_sign_in(self):
        result = self.call("auth", "--no-browser", environ={"SHELL": "/usr/bin/nu"}, browser=visit)
        err = self.assert_done(result).err
        self.assert_quiet(self.call("status"))
        self.require(POSIX, "on Windows the default is PowerShell, and $SHELL is ignored")
        self.assertRegex(err, "To use the API key in a shell, see: .* env -")

    def test_signed_out_commands_exit_with_3(self):
        for command in ("token", "models", "env"):
            self.assert_fails(
                self.call(command), 3, "not signed in", "auth", one_line=command == "env"
            )
        result = self.call("status")
        self.assertEqual(result.code, 3)
        self.assertTrue(result.out.startswith("ChatGPT OAuth: Not authenticated\n"))
        facts = json.loads(self.call("status", "--json").out)
        self.assertEqual(facts["authenticated"], False)
        self.assertEqual(facts["email"], None)

    def test_json_status_has_exactly_the_documented_keys(self):
        self.sign_in()
        out = self.call("status", "--json").out
        facts = json.loads(out)
        keys = (
            "account authenticated email plan account_id organization_id has_api_key "
            "has_refresh_token access_token_expires_at last_refresh models token_file models_file "
            "model_source issuer client_id problem official"
        )
        self.assertEqual(set(facts), set(keys.split()))
        self.assertEqual((facts["plan"], facts["organization_id"]), ("plus", "org-1"))
        self.assertEqual(facts["last_refresh"], self.stored()["last_refresh"])
        self.assertIs(facts["has_refresh_token"], True)
        self.assertIsNone(facts["problem"])
        self.assert_no_secret(out)

    def test_status_says_whether_the_token_refreshes_automatically(self):
        for changes, refreshes in (({}, True), ({"refresh_token": None}, False)):
            self.store(**changes)
            out = self.assert_quiet(self.call("status")).out
            self.assertEqual("refreshes automatically" in out, refreshes)

    def test_status_shows_the_default_organization(self):
        first, second = {"id": "org-1"}, {"id": "org-2"}
        default = {"id": "org-3", "is_default": True}
        for organizations, shown in (
            ([first, second], "org-1"),
            ([first, default, second], "org-3"),
            ([5, {**first, "is_default": "yes"}, default], "org-3"),
            ([5, second], "org-2"),
            ([], None),
            ("org-1", None),
            (None, None),
        ):
            with self.subTest(organizations):
                self.store(id_token=encode_jwt({AUTH_CLAIM: {"organizations": organizations}}))
                # The access token of the double names an organization, too.
                access = encode_jwt({"exp": int(time.time()) + 9999})
                self.store({**self.stored(), "access_token": access})
                report = json.loads(self.call("status", "--json").out)
                self.assertEqual(report["organization_id"], shown)

    def test_a_broken_models_file_does_not_affect_the_token_status(self):
        self.store()
        self.models_file.write_text("[")
        out = self.call("status").out
        self.assertIn("models.json: not valid JSON", out)
        self.assertIn("\n              refreshes automatically\n", out)

    def test_a_file_with_only_an_access_token_is_a_sign_in(self):
        self.store({"access_token": "opaque"})
        result = self.call("status", "--json")
        facts = json.loads(result.out)
        self.assertEqual((result.code, facts["authenticated"], facts["email"]), (0, True, None))
        self.assertIn("come from another issuer", facts["problem"])
        self.assertEqual((facts["has_refresh_token"], facts["last_refresh"]), (False, None))
        self.assertEqual(self.call("token").out, "opaque\n")
        self.assertIn("unknown", self.call("status").out)


class TokenTest(Case):
    def test_json_has_the_token_the_account_and_the_expiry(self):
        fields = self.store(lifetime=9000)
        out = self.assert_quiet(self.call("token", "--json")).out
        self.assertEqual(out.count("\n"), 1)
        expiry = time.time() + 9000
        facts = json.loads(out)
        self.assertEqual(set(facts), {"access_token", "account_id", "expires_at"})
        self.assertEqual(facts["access_token"], fields["access_token"])
        self.assertEqual(facts["account_id"], "acct-1")
        # The test may have taken a few seconds until here.
        self.assertIn(facts["expires_at"], [timestamp(expiry - late) for late in range(9)])
        self.store({"access_token": "opaque"})
        facts = json.loads(self.call("token", "--json").out)
        self.assertEqual(facts, {"access_token": "opaque", "account_id": None, "expires_at": None})

    def test_json_refreshes_an_expired_token(self):
        self.store(lifetime=-10)
        facts = json.loads(self.assert_quiet(self.call("token", "--json")).out)
        self.assertEqual(facts["access_token"], self.stored()["access_token"])
        self.assertEqual(self.double.count("refresh"), 1)


class ExecTest(Case):
    def setUp(self):
        super().setUp()
        self.inspect = [
            sys.executable,
            "-c",
            "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))",
        ]

    def run_and_inspect(self, *arguments, environ=None):
        """Return the arguments and the environment that `exec` passed to the command."""
        return json.loads(self.assert_quiet(self.run_program(*arguments, environ=environ)).out)

    def test_only_the_command_receives_the_key(self):
        self.store(api_key="sk-1")
        environ = {"MINE": "kept", "CHATGPT_OAUTH_API_KEY": "old"}
        unusual = ["--", "-h", "a b", "it's", "", "--name"]
        arguments, received = self.run_and_inspect(
            "exec", "--", *self.inspect, *unusual, environ=environ
        )
        self.assertEqual(arguments, unusual)
        self.assertEqual(received["CHATGPT_OAUTH_API_KEY"], "sk-1")
        self.assertEqual(received["MINE"], "kept")
        received = self.run_and_inspect("exec", "--name", "OPENAI_API_KEY", "--", *self.inspect)[1]
        self.assertEqual(received["OPENAI_API_KEY"], "sk-1")
        self.assertNotIn("CHATGPT_OAUTH_API_KEY", received)

    @needs_signals
    def test_an_environment_variable_without_a_name_does_no_harm(self):
        self.store(lifetime=-10, api_key="sk-1")
        # Only the system call itself can make such an environment.
        code = """
import ctypes, os
def array(texts):
    return (ctypes.c_char_p * (len(texts) + 1))(*texts)
variables = [os.fsencode(f"{name}={value}") for name, value in os.environ.items()]
arguments = [os.fsencode(each) for each in sys.argv[1:]]
ctypes.CDLL(None).execve(arguments[0], array(arguments), array([*variables, b"=x"]))
"""
        for command in (["exec", "--", "true"], ["token"]):
            running = self.start_python(code, *PROGRAM_COMMAND, *command)
            self.assertEqual((running.result().code, running.err), (0, ""))

    @needs_sh
    @unittest.skipUnless(POSIX, "Python on Windows adds no locale")
    def test_the_command_does_not_inherit_a_locale_that_python_added(self):
        self.store(api_key="sk-1")
        for variables in (
            {},
            {"LANG": "C"},
            {"LC_CTYPE": "C.UTF-8"},
            {"LC_CTYPE": "POSIX"},
            {"LC_ALL": "C"},
            {"LC_CTYPE": "C.UTF-8", "LC_ALL": "C"},
        ):
            environ = dict.fromkeys(("LANG", "LC_CTYPE", "LC_ALL"), None)
            with self.subTest(variables):
                result = self.run_program("exec", "--", "env", environ={**environ, **variables})
                found = dict(re.findall("^(LANG|LC_[A-Z]+)=(.*)$", result.out, re.M))
                self.assertEqual((result.code, found), (0, variables))

    def test_the_access_token_is_refreshed_and_comes_with_its_account_id(self):
        self.store(lifetime=-10)
        received = self.run_and_inspect("exec", "--access-token", "--", *self.inspect)[1]
        self.assertEqual(received["CHATGPT_OAUTH_ACCESS_TOKEN"], self.stored()["access_token"])
        self.assertEqual(received["CHATGPT_OAUTH_ACCOUNT_ID"], "acct-1")
        self.assertNotIn("CHATGPT_OAUTH_API_KEY", received)
        self.store({"access_token": "opaque"})
        environ = {"CHATGPT_OAUTH_ACCOUNT_ID": "another"}
        out = self.run_program("exec", "--access-token", "--", *self.inspect, environ=environ).out
        self.assertNotIn("CHATGPT_OAUTH_ACCOUNT_ID", json.loads(out)[1])

    def test_the_exit_code_and_streams_come_from_the_command(self):
        self.store(api_key="sk-1")
        code = "import sys; sys.stderr.write(sys.stdin.read()); print('out'); sys.exit(77)"
        with tempfile.TemporaryFile() as stdin:
            stdin.write(b"in")
            stdin.seek(0)
            result = self.run_program("exec", "--", sys.executable, "-c", code, stdin=stdin)
        self.assertEqual((result.code, result.out.split(), result.err), (77, ["out"], "in"))

    def test_without_a_key_nothing_runs(self):
        marker = self.folder / "ran"
        command = [sys.executable, "-c", f"open({str(marker)!r}, 'w')"]
        self.assert_fails(self.run_program("exec", "--", *command), 3, "not signed in")
        self.store()
        words = ("no API key", "exec --access-token -- COMMAND")
        self.assert_fails(self.run_program("exec", "--", *command), 1, *words)
        self.store(lifetime=-10, refresh_token=None)
        result = self.run_program("exec", "--access-token", "--", *command)
        self.assert_fails(result, 4, "sign in again")
        self.assertFalse(marker.exists())

    def test_a_command_that_cannot_run_is_named(self):
        self.store(api_key="sk-1")
        words = ["check the spelling and PATH", "no-such-xyzzy" if POSIX else "cmd /c"]
        self.assert_fails(self.run_program("exec", "--", "no-such-xyzzy"), 127, *words)
        self.assert_fails(self.run_program("exec", "--", "/no/such/xyzzy"), 127, "/no/such/xyzzy")
        self.require(POSIX, "Windows has no permission to run a file")
        plain = self.folder / "plain"
        plain.write_text("x")
        self.assert_fails(self.run_program("exec", "--", str(plain)), 126, "Permission denied")

    def test_a_missing_command_is_a_usage_error(self):
        self.store(api_key="sk-1")
        cases = (
            ([], ("no command", "exec -- COMMAND")),
            (["--"], ("no command",)),
            (["--", "", "x"], ("no command",)),
            (["ls"], ("ls", "exec -- COMMAND")),
            (["--nam", "X", "--", "ls"], ("--name",)),
            (["--name", "1x", "--", "ls"], ("--name",)),
        )
        processes = [(self.start("exec", *arguments), words) for arguments, words in cases]
        for running, words in processes:
            self.assert_fails(running.result(), 2, *words)

    @needs_signals
    def test_the_command_replaces_the_process(self):
        self.store(api_key="sk-1")
        running = self.start("exec", "--", sys.executable, "-c", "import os; print(os.getpid())")
        self.assertEqual(running.result().out, f"{running.process.pid}\n")

    @needs_sh
    @needs_signals
    def test_a_broken_pipe_ends_the_command(self):
        self.store(api_key="sk-1")
        # A shell reports the end by SIGPIPE as 128 + 13.
        line = shlex.join(PROGRAM_COMMAND) + " exec -- sh -c 'yes; echo $? >&2' | head -n 1"
        self.assertEqual(self.run_shell(line), (0, "y\n", "141\n"))


class OnlineStatusTest(Case):
    def setUp(self):
        super().setUp()
        self.double.api_keys.add("sk-mine")
        self.store(api_key="sk-mine")

    def online_status(self, exit_code=0, **options):
        """Return the members `online` and `problem` from `status --online --json`."""
        result = self.call("status", "--online", "--json", **options)
        self.assertEqual((result.code, result.err), (exit_code, ""))
        self.assert_no_secret(result.out)
        facts = json.loads(result.out)
        return facts["online"], facts["problem"]

    def test_an_accepted_sign_in_and_its_usage_are_shown(self):
        online, problem = self.online_status()
        self.assertIsNone(problem)
        self.assertEqual((online["api_key"], online["access_token"]), ("accepted", "accepted"))
        short, long = online["usage"]
        self.assertEqual((short["window_seconds"], short["used_percent"]), (18000, 7.5))
        self.assertEqual((long["window_seconds"], long["used_percent"]), (604800, 32))
        for window in online["usage"]:
            self.assertRegex(window["resets_at"], r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        out = self.assert_quiet(self.call("status", "--online")).out
        self.assertTrue(out.startswith("ChatGPT OAuth: Authenticated\nAPI key available\n"))
        self.assertIn("API key:      accepted, 5 models\n", out)
        self.assertIn("ChatGPT plan: accepted, 2 models\n", out)
        self.assertIn("Usage:        5 hours: 7.5% used, resets in 1 hour 2 minutes\n", out)
        self.assertIn("\n              7 days: 32% used, resets in 1 day\n", out)
        self.assert_no_secret(out)

    def test_without_online_nothing_is_sent(self):
        self.assertNotIn("online", json.loads(self.assert_quiet(self.call("status", "--json")).out))
        self.assertEqual(self.double.requests, [])

    def test_an_expired_token_is_refreshed_first(self):
        self.store(lifetime=-10, api_key="sk-mine")
        self.assertEqual(self.online_status()[0]["access_token"], "accepted")
        self.assertEqual(self.double.count("refresh"), 1)

    def test_one_model_is_not_plural(self):
        self.double.api_models = ["gpt-4o"]
        self.assertIn("API key:      accepted, 1 model\n", self.call("status", "--online").out)

    def test_without_a_key_the_api_is_not_asked(self):
        self.store()
        online, problem = self.online_status()
        self.assertEqual((online["api_key"], online["access_token"]), (None, "accepted"))
        self.assertEqual(self.double.count("api"), 0)
        self.assertIn("API key:      none\n", self.call("status", "--online").out)

    def test_signed_out_nothing_is_sent(self):
        self.token_file.unlink()
        online, problem = self.online_status(3)
        self.assertEqual(online, {"api_key": None, "access_token": None, "usage": []})
        self.assertIn("not signed in", problem)
        self.assertEqual(self.call("status", "--online"), self.call("status"))
        self.assertEqual(self.double.requests, [])

    def test_a_refused_key_does_not_hide_the_rest(self):
        self.double.api_keys.clear()
        online, problem = self.online_status()
        self.assertEqual((online["api_key"], online["access_token"]), ("refused", "accepted"))
        self.assertEqual(len(online["usage"]), 2)
        out = self.call("status", "--online").out
        self.assertIn("API key:      refused\n              could not list models (HTTP 401)", out)
        self.assertRegex(out, r"\n {14}to get a new API key, run: .+ auth\nChatGPT plan: accepted")

    def test_requests_name_the_residency_of_the_workspace(self):
        for residency in ("eu", "no_constraint"):
            self.double.residency = residency
            self.store(api_key=None)
            online, problem = self.online_status()
            self.assertEqual((online["access_token"], len(online["usage"])), ("accepted", 2))
        self.assertEqual(self.double.count("refresh"), 0)

    def test_a_withdrawn_token_is_refreshed(self):
        self.double.access_tokens.clear()
        online, problem = self.online_status()
        self.assertEqual(online["access_token"], "accepted")
        self.assertEqual(len(online["usage"]), 2)
        self.assertEqual(self.double.count("refresh"), 1)

    def test_a_token_that_only_the_usage_endpoint_refuses_is_refreshed(self):
        self.fault_once("usage", 401)
        self.assertEqual(len(self.online_status()[0]["usage"]), 2)
        self.assertEqual((self.double.count("refresh"), self.double.count("usage")), (1, 2))

    def test_a_refused_sign_in_is_exit_4(self):
        for endpoint in ("codex", "usage"):
            self.fault(endpoint, 401, {"detail": "Unauthorized"})
        online, problem = self.online_status(4)
        self.assertEqual((self.double.count("refresh"), self.double.count("usage")), (1, 1))
        self.assertEqual((online["api_key"], online["access_token"]), ("accepted", "refused"))
        self.assertEqual(online["usage"], [])
        self.assertIn("to sign in again, run: ", problem)
        result = self.call("status", "--online")
        self.assertEqual((result.code, result.err), (4, ""))
        self.assertIn("ChatGPT OAuth: Not authenticated\n", result.out)
        self.assertIn("\nProblem: ", result.out)

    def test_a_broken_models_file_does_not_hide_a_refused_sign_in(self):
        self.models_file.write_text("[")
        self.fault("codex", 401)
        self.assertEqual(self.online_status(exit_code=4)[0]["access_token"], "refused")
        del self.double.faults["codex"]
        self.assertEqual(self.online_status(exit_code=6)[0]["access_token"], "accepted")

    def test_a_sign_in_that_has_ended_is_refused(self):
        self.store(lifetime=-10, refresh_token="rt_gone")
        online, problem = self.online_status(4)
        self.assertEqual((online["api_key"], online["access_token"]), (None, "refused"))
        self.assertIn("your session has ended", problem)

    def test_the_reason_of_an_end_fits_in_80_columns(self):
        for code in INVALID_GRANT_CODES:
            self.store(lifetime=-10)
            self.fault("refresh", 400, {"error": code})
            out = self.call("status", "--online").out
            self.assertIn("\n              your session has ended: ", out)
            self.assert_fits(out)

    def test_a_web_page_counts_as_unreachable(self):
        for endpoint in ("api", "codex", "usage"):
            self.fault(endpoint, 403, b"<html>", Content_Type="text/html")
        online, problem = self.online_status(5)
        expected = {"api_key": "unreachable", "access_token": "unreachable", "usage": []}
        self.assertEqual(online, expected)
        self.assertIn("got a web page, not JSON", problem)
        result = self.call("status", "--online")
        self.assertEqual((result.code, result.err), (5, ""))
        self.assertIn("ChatGPT OAuth: Authenticated\n", result.out)
        self.assertIn(
            "Usage:        unknown\n              could not get the usage (HTTP 403)", result.out
        )

    def test_missing_usage_is_shown_as_unknown(self):
        self.fault("usage", 404, b"{}")
        self.assertEqual(self.online_status()[0]["usage"], [])
        out = self.assert_quiet(self.call("status", "--online")).out
        self.assertIn(
            "Usage:        unknown\n              could not get the usage (HTTP 404)\n", out
        )
        for answer, shown in (
            (b"[]", "unknown"),
            (b"{}", "OpenAI reports no limits"),
            (b'{"rate_limit": null}', "OpenAI reports no limits"),
            (b'{"rate_limit": {}}', "OpenAI reports no limits"),
        ):
            self.fault("usage", 200, answer)
            self.assertEqual(self.online_status()[0]["usage"], [])
            self.assertIn(f"Usage:        {shown}\n", self.call("status", "--online").out)

    def test_invalid_usage_windows_are_left_out(self):
        self.double.rate_limit = {
            "primary_window": {"used_percent": 101, "limit_window_seconds": 90, "reset_at": "soon"},
            "secondary_window": {"used_percent": True, "limit_window_seconds": 1e99},
        }
        window = {"window_seconds": 90, "used_percent": 101, "resets_at": None}
        self.assertEqual(self.online_status()[0]["usage"], [window])
        out = self.call("status", "--online").out
        self.assertIn("Usage:        1 minute 30 seconds: 101% used\n", out)

    def test_a_wrong_clock_does_not_change_when_usage_resets(self):
        for reset_at in (time.time() - 7200, time.time() + 86400):
            self.double.rate_limit["primary_window"].update(
                reset_after_seconds=125, reset_at=int(reset_at)
            )
            self.assertIn("used, resets in 2 minutes ", self.call("status", "--online").out)

    def test_online_status_shows_the_current_plan(self):
        self.double.usage_plan = "promax"
        self.assertIn("\nPlan:         promax\n", self.call("status", "--online").out)
        facts = json.loads(self.call("status", "--online", "--json").out)
        self.assertEqual(facts["plan"], "promax")
        self.assertEqual(json.loads(self.call("status", "--json").out)["plan"], "plus")
        self.fault("usage", 500)
        self.assertIn("\nPlan:         plus\n", self.call("status", "--online").out)

    def test_credits_are_shown_if_there_are_any(self):
        for listed, text in (
            ({"has_credits": True, "unlimited": False, "balance": "12.50"}, "12.50"),
            ({"has_credits": True, "balance": 7}, "7"),
            ({"has_credits": True, "balance": "\x1b[31m"}, "available"),
            ({"has_credits": False, "unlimited": True, "balance": None}, "unlimited"),
            ({"has_credits": False, "unlimited": False, "balance": "0"}, None),
            ([], None),
            (None, None),
        ):
            self.double.credits = listed
            shown = re.search("^Credits: +(.*)$", self.call("status", "--online").out, re.M)
            self.assertEqual(shown and shown[1], text)

    def test_one_unreachable_service_is_not_an_error(self):
        self.fault("codex", 500)
        online, problem = self.online_status()
        self.assertEqual((online["api_key"], online["access_token"]), ("accepted", "unreachable"))
        self.assertEqual(len(online["usage"]), 2)

    @needs_terminal
    def test_usage_bars_are_shown_only_on_a_terminal(self):
        output = self.run_at_terminal("stdout", "status", "--online")
        self.assertIn("5 hours: #......... 7.5%, resets in 1 hour 2 minutes\r\n", output)
        self.assertIn("7 days: ###....... 32%, resets in 1 day\r\n", output)
        lines = [line for line in output.splitlines() if str(self.folder) not in line]
        self.assertLessEqual(max(map(len, lines)), 80)
        self.assertNotIn("##", self.run_program("status", "--online").out)


# ---------------------------------------------------------------------------------------------
# Functions for other programs
# ---------------------------------------------------------------------------------------------


class ModuleTest(Case):
    def test_module_functions_raise_only_oauth_errors(self):
        before = self.store(lifetime=-10)
        error = OSError(errno.EMFILE, "Too many open files")
        frozen = mock.patch.object(sys, "frozen", True, create=True)
        with frozen, mock.patch.dict(os.environ, self.environ, clear=True):
            for fault, words in (
                (mock.patch.dict(sys.modules, {"urllib.request": None}), "no module urllib"),
                (mock.patch.object(os, "open", side_effect=error), "Too many open files"),
            ):
                with fault, self.assertRaisesRegex(oauth.OAuthError, words):
                    oauth.get_access_token()
        self.assertEqual(self.stored(), before)
        self.assertEqual(self.double.count("refresh"), 0)

    def test_a_refresh_while_python_shuts_down_is_an_oauth_error(self):
        self.store(lifetime=-10)
        # While Python shuts down, sys.meta_path is None, and every import fails.
        running = self.start_python("""
import chatgpt_oauth as oauth
sys.meta_path = None
try:
    oauth.get_access_token()
except oauth.OAuthError as error:
    print(error)
""")
        self.assertEqual(running.result(), (0, "Python is shutting down" + os.linesep, ""))

    @unittest.skipUnless(POSIX, "Windows has no limit on file descriptors")
    def test_without_file_descriptors_no_token_is_used_up(self):
        code = """
import resource, chatgpt_oauth as oauth
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(oauth.main(["token"]))
"""
        # The last run has just enough of them.
        for limit in range(3, 64):
            with self.subTest(limit):
                self.store(lifetime=-10)
                result = self.start_python(code, str(limit)).result()
                self.assertNotIn("Traceback", result.err)
                self.assertNotIn("standard output", result.err)
                self.assertNotIn("internal error", result.err)
                self.assertEqual(bool(result.out), result.code == 0, result.err)
                self.assert_nothing_lost()
                if "Too many open files" in result.err:
                    self.assertIn("hint: close some programs", result.err)
            if result.code == 0:
                break
        self.assertEqual(result.code, 0)

    def test_importing_has_no_effect(self):
        code = (
            "import sys; before = set(sys.modules); import chatgpt_oauth, threading; "
            "heavy = {'ssl', 'urllib.request', 'http.server', 'argparse', 'logging'}; "
            "print(sorted(heavy & set(sys.modules) - before), threading.active_count())"
        )
        environ = {"PYTHONPATH": str(pathlib.Path(PROGRAM).parent)}
        result = self.run_command([sys.executable, "-c", code], environ)
        self.assertEqual(self.assert_quiet(result).out.split("\n")[0].rstrip(), "[] 1")
        self.assertFalse(self.home.exists())

    def test_commands_in_a_shell_profile_import_nothing_heavy(self):
        self.store(api_key="sk-mine")
        code = """
import io, chatgpt_oauth as oauth
for command in (["env", "--shell", "sh"], ["token", "--json"], ["status", "--json"]):
    stdout, sys.stdout = sys.stdout, io.StringIO()
    code = oauth.main(command)
    sys.stdout = stdout
    print(code, *sorted({"argparse", "ssl", "urllib.request", "http.server"} & set(sys.modules)))
"""
        result = self.start_python(code).result()
        self.assertEqual(self.assert_quiet(result).out.split(), ["0"] * 3)

    def test_module_functions_read_refresh_and_sign_out(self):
        with mock.patch.dict(os.environ, self.environ, clear=True):
            with self.assertRaises(oauth.NotSignedInError) as caught:
                oauth.get_access_token()
            self.assertEqual(caught.exception.hint, "to sign in, run: chatgpt_oauth.py auth")
            self.assertEqual(caught.exception.exit_code, 3)
            self.store(lifetime=-10, api_key="sk-1")
            self.assertEqual(oauth.get_access_token(), self.stored()["access_token"])
            self.assertEqual(oauth.get_access_token(refresh=True), self.stored()["access_token"])
            self.assertEqual(self.double.count("refresh"), 2)
            self.assertEqual(oauth.get_api_key(), "sk-1")
            self.assertEqual(oauth.get_account_id(), "acct-1")
            oauth.sign_out()
            self.assertEqual(self.double.count("revoke"), 1)
            self.assertFalse(self.token_file.exists())

    def test_python_code_can_sign_in(self):
        with mock.patch.dict(os.environ, self.environ, clear=True):
            with self.assertLogs("chatgpt_oauth", "WARNING") as logged:

                def browse():
                    wait_for(lambda: logged.records)
                    visit(logged.records[0].getMessage())

                visitor = threading.Thread(target=browse, daemon=True)
                visitor.start()
                facts = oauth.sign_in(open_browser=False, timeout=10)
            visitor.join(WAIT_LIMIT)
            self.assertTrue(facts["authenticated"])
            shorter = mock.patch.multiple(oauth, **self.waits)
            with shorter, self.assertLogs("chatgpt_oauth", "WARNING") as logged:
                self.assertTrue(oauth.sign_in(device=True)["has_api_key"])
            self.assertIn("ABCD-EFGH", "\n".join(logged.output))

    def test_warnings_are_logged(self):
        self.store(lifetime=200)
        self.fault("refresh", 500, b"")
        environ = mock.patch.dict(os.environ, self.environ, clear=True)
        with environ, self.assertLogs("chatgpt_oauth", "WARNING"):
            oauth.get_access_token()


# ---------------------------------------------------------------------------------------------
# Install
# ---------------------------------------------------------------------------------------------


class InstallTest(Case):
    def setUp(self):
        super().setUp()
        self.use_home(self.folder)

    def use_home(self, home):
        """Make `home` the home directory of the person."""
        home.mkdir(exist_ok=True)
        if POSIX:
            self.data, self.bin = home / ".local/share", home / ".local/bin"
        else:
            self.data = home / "AppData" / "Local"
            self.bin = self.data / "Programs" / "chatgpt_oauth"
        self.program = self.data / "chatgpt_oauth" / "chatgpt_oauth.py"
        self.launcher = self.bin / ("chatgpt-oauth" if POSIX else "chatgpt-oauth.cmd")
        self.plugin = home / ".code_puppy/plugins/chatgpt_oauth_file/register_callbacks.py"
        path = os.pathsep.join((str(self.bin), PATH))
        self.environ.update(HOME=str(home), USERPROFILE=str(home), PATH=path, SHELL="/bin/bash")

    def install(self, *arguments, **options):
        """Run `install` and return its messages."""
        return self.assert_done(self.run_program("install", *arguments, **options)).err

    def run_installed(self, *arguments, **options):
        """Run the installed command and return its Result."""
        return self.run_command([str(self.launcher), *arguments], **options)

    def assert_installed_command_works(self):
        """Check that the installed command runs without an error."""
        result = self.run_installed("--version")
        self.assertEqual((result.code, result.err), (0, ""))

    def read_files(self):
        """Return the contents of each file in the test's directory by path, without .pyc files."""
        found = (path for path in self.folder.rglob("*") if not path.is_dir())
        return {str(path): path.read_bytes() for path in found if path.suffix != ".pyc"}

    def prepare_for_another_user(self):
        """Make `install` work for a user who can't read Python's files. Return the program's copy.

        The first run imports every module.
        """
        self.folder.chmod(0o755)
        source = self.folder / "chatgpt_oauth.py"
        shutil.copy(PROGRAM, source)
        patch = mock.patch.object(oauth, "__file__", str(source))
        patch.start()
        self.addCleanup(patch.stop)
        # `install` changes sys.argv[0].
        with mock.patch.object(sys, "argv", list(sys.argv)):
            self.assertEqual(self.call("install", "--code-puppy").code, 0)
        return source

    def test_install_creates_a_command(self):
        self.store(api_key="sk-1")
        messages = self.install("--no-code-puppy")
        self.assertIn(f"Installed the command {self.launcher}\n", messages)
        self.assertTrue(messages.endswith(f"in, run:\n    {self.launcher.name} status\n"))
        # A profile may run before PATH is complete, as ~/.bashrc does on Debian.
        self.assertIn(f"{bash_path(self.launcher)} env --shell ", messages)
        self.assertEqual(self.program.read_bytes(), pathlib.Path(PROGRAM).read_bytes())
        self.assertTrue(list(self.program.parent.glob("__pycache__/chatgpt_oauth.*.pyc")))
        out = self.assert_quiet(self.run_installed("env", "--shell", "sh")).out
        self.assertEqual(out, "export CHATGPT_OAUTH_API_KEY='sk-1'\n")
        self.assertFalse(self.plugin.exists())

    def test_hints_name_the_command_that_was_started(self):
        self.install()
        hint = f"hint: to sign in, run: {self.launcher.name} auth\n"
        self.assert_fails(self.run_installed("token"), 3, hint)
        self.assertIn(
            f"usage: {self.launcher.name} status ", self.run_installed("status", "-h").out
        )
        # Without the directory on PATH, the name alone would not be found.
        environ = {"PATH": PATH}
        hint = f"hint: to sign in, run: {bash_path(self.launcher)} auth\n"
        self.assert_fails(self.run_installed("token", environ=environ), 3, hint)

    def test_the_launcher_imports_nothing_from_elsewhere(self):
        self.store(api_key="sk-1")
        self.install()
        trap = self.folder / "trap"
        trap.mkdir()
        for name in ("json", "contextlib", "chatgpt_oauth", "sitecustomize"):
            (trap / f"{name}.py").write_text(f"open({str(self.folder / 'sprung')!r}, 'w')")
        environ = {"PYTHONPATH": str(trap), "PYTHONHOME": str(trap), "PYTHONSTARTUP": str(trap)}
        result = self.run_installed("env", environ=environ, cwd=str(trap))
        self.assertIn("sk-1", self.assert_quiet(result).out)
        self.assertFalse((self.folder / "sprung").exists())

    def test_a_script_imports_nothing_from_its_own_directory(self):
        self.store(api_key="sk-1")
        downloads = self.folder / "downloads"
        downloads.mkdir()
        script = downloads / "chatgpt_oauth.py"
        shutil.copy(PROGRAM, script)
        for name in ("json", "argparse", "base64", "hashlib"):
            (downloads / f"{name}.py").write_text(f"open({str(self.folder / 'sprung')!r}, 'w')")
        for words in ([str(script)], ["-m", "chatgpt_oauth"], ["-"], ["-S", "chatgpt_oauth.py"]):
            for command in ("env", "status"):
                with self.subTest(words=words, command=command), open(script, "rb") as stdin:
                    start = [sys.executable, *words, command]
                    result = self.run_command(start, cwd=str(downloads), stdin=stdin)
                    self.assertIn("sk-1" if command == "env" else "API key", result.out)
        self.assertFalse((self.folder / "sprung").exists())

    def test_a_profile_line_names_an_absolute_path(self):
        self.store(api_key="sk-1")
        folder = os.path.realpath(self.folder)
        shutil.copy(PROGRAM, folder)
        source = os.path.join(folder, "chatgpt_oauth.py")
        for words in (["-m", "chatgpt_oauth"], ["chatgpt_oauth.py"], ["-"]):
            with self.subTest(words), open(source, "rb") as stdin:
                start = [sys.executable, *words, "env", "-h"]
                lines = self.run_command(start, cwd=folder, stdin=stdin).out
                self.assertIn(f'eval "$({PYTHON} {bash_path(source)} env --shell sh)"', lines)
        start = [sys.executable, "-m", "chatgpt_oauth", "install"]
        messages = self.assert_done(self.run_command(start, cwd=folder)).err
        self.assertIn(f"{bash_path(self.launcher)} env --shell ", messages)

    def test_an_empty_bin_is_a_usage_error(self):
        for command in ("install", "uninstall"):
            for words in (["--bin", ""], ["--bin="]):
                self.assert_fails(self.call(command, *words), 2, "--bin must be ")
        self.assertEqual(self.read_files(), {})

    @needs_sh
    def test_install_works_in_any_path(self):
        for name in (
            'it\'s a "home"',
            "a $HOME `id` %PATH% \\x",
            # fsdecode makes this a valid path in the C locale as well.
            os.fsdecode("\u00e4 \u20ac".encode()),
            "new\nline",
            "-n",
        ):
            with self.subTest(name):
                self.use_home(self.folder / name)
                self.install("--code-puppy")
                self.assertEqual(self.run_installed("status").code, 3)
                self.assert_installed_command_works()
                self.assertTrue(self.plugin.exists())
                self.assert_done(self.run_installed("uninstall"))
                self.assertFalse(self.launcher.exists())

    @needs_sh
    def test_the_launcher_does_not_change_the_environment(self):
        self.store(api_key="sk-1")
        self.install()
        code = (
            "import os; shells = ('PWD', 'OLDPWD', 'SHLVL', '_'); "
            "print(sorted(each for each in os.environ.items() if each[0] not in shells))"
        )
        show = [sys.executable, "-c", code]
        # The launcher is a shell script, which uses names like these itself.
        variables = {
            "python": "1",
            "directory": "2",
            "program": "3",
            "file": "4",
            "PYTHONPATH": "/x",
        }
        environ = {"CHATGPT_OAUTH_API_KEY": "sk-1", **variables}
        out = self.assert_quiet(self.run_installed("exec", "--", *show, environ=environ)).out
        self.assertEqual(out, self.run_command(show, environ).out)

    def test_the_command_outlives_the_virtual_environment(self):
        venv = self.folder / "venv"
        result = self.run_command([sys.executable, "-m", "venv", "--without-pip", str(venv)])
        if result.code and not POSIX:
            self.skipTest("the embeddable Python for Windows makes no virtual environments")
        self.assertEqual(result.code, 0, result.err)
        python = venv / ("bin/python" if POSIX else "Scripts/python.exe")
        self.assert_done(self.run_command([str(python), PROGRAM, "install"]))
        shutil.rmtree(venv)
        self.assert_installed_command_works()

    @needs_sh
    def test_a_missing_python_is_named(self):
        python = self.folder / "a python"
        python.symlink_to(sys.executable)
        self.assert_done(self.run_command([str(python), PROGRAM, "install"]))
        self.assertEqual(self.run_installed("--version").code, 0)
        python.unlink()
        err = self.assert_fails(self.run_installed("token"), 6, f"error: {python} is gone\n").err
        self.assertIn("hint: to install it again, run: python3 chatgpt_oauth.py install\n", err)
        self.install()
        shutil.rmtree(self.program.parent)
        self.assert_fails(self.run_installed("token"), 6, f"error: {self.program} is gone\n")

    def test_files_of_others_are_left_alone(self):
        for path, ways in (
            (self.launcher, ", or use --bin DIR"),
            (self.program, ""),
            (self.plugin, ", or use --no-code-puppy"),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("#!/bin/sh\nmine\n")
            hint = f"hint: rename or remove it{ways}\n"
            before = self.read_files()
            for command in ("install", "uninstall"):
                result = self.call(command, "--code-puppy")
                self.assert_fails(result, 6, f"{path}: not made by chatgpt_oauth", hint)
                self.assertEqual(self.read_files(), before)
            path.unlink()
            path.mkdir()
            self.assert_fails(self.call("install", "--code-puppy"), 6, str(path))
            path.rmdir()
        elsewhere = self.folder / "bin"
        self.launcher.write_text("mine")
        self.install("--bin", str(elsewhere))
        self.assertEqual(self.launcher.read_text(), "mine")
        self.assertTrue((elsewhere / self.launcher.name).exists())

    @needs_modes
    def test_install_does_not_write_through_a_symlink(self):
        source = self.folder / "chatgpt_oauth.py"
        shutil.copy(PROGRAM, source)
        self.bin.mkdir(parents=True)
        self.launcher.symlink_to(source)
        self.assert_fails(self.run_program("install"), 6, str(self.launcher))
        self.assertEqual(source.read_bytes(), pathlib.Path(PROGRAM).read_bytes())

    def test_install_replaces_itself_and_an_older_copy(self):
        older = pathlib.Path(PROGRAM).read_bytes().replace(oauth.__version__.encode(), b"0.0.1")
        old = self.folder / "old" / "chatgpt_oauth.py"
        old.parent.mkdir()
        old.write_bytes(older)
        self.assert_done(self.run_command([sys.executable, str(old), "install", "--code-puppy"]))
        self.assertEqual(self.run_installed("-V").out, "chatgpt_oauth 0.0.1\n")
        self.assert_done(self.run_installed("install", "--code-puppy"))
        self.assertEqual(self.run_installed("-V").out, "chatgpt_oauth 0.0.1\n")
        self.install()
        self.assertEqual(self.run_installed("-V").out, f"chatgpt_oauth {oauth.__version__}\n")
        self.assertEqual(self.plugin.read_bytes(), pathlib.Path(PROGRAM).read_bytes())

    @needs_modes
    def test_the_umask_limits_the_permissions(self):
        for umask, modes in ((0o022, (0o755, 0o644)), (0o077, (0o700, 0o600)), (0, (0o755, 0o644))):
            self.assert_done(
                self.run_shell(f"umask {umask:o}; exec {self.shell_command('install')}")
            )
            places = self.launcher, self.program
            self.assertEqual(tuple(p.stat().st_mode & 0o777 for p in places), modes)

    def shell_command(self, *arguments):
        """Return a shell command that runs the program with `arguments`."""
        return shlex.join([*PROGRAM_COMMAND, *arguments])

    @needs_modes
    def test_an_unwritable_directory_changes_nothing(self):
        source = self.prepare_for_another_user()
        for unwritable in (self.bin, self.data, self.plugin.parent):
            shutil.rmtree(self.folder / ".local", ignore_errors=True)
            shutil.rmtree(self.home, ignore_errors=True)
            for each in (self.bin, self.data, self.plugin.parent):
                each.mkdir(parents=True, exist_ok=True)
            for each in self.folder.rglob("*"):
                each.chmod(0o777)
                if os.geteuid() == 0:
                    os.chown(each, NOBODY, NOBODY)
            unwritable.chmod(0o555)
            with self.as_unprivileged_user():
                result = self.call("install", "--code-puppy")
            self.assert_fails(result, 6, f"cannot write {unwritable}", "directory writable")
            remaining = {path for path in self.read_files() if not path.endswith(".lock")}
            self.assertEqual(remaining, {str(source)}, unwritable)
            unwritable.chmod(0o755)

    @needs_signals
    def test_killing_install_leaves_a_working_command_or_none(self):
        self.install()
        start = time.monotonic()
        self.install()
        duration = time.monotonic() - start
        worked = 0
        # The first six runs replace a command that works, the other six start without one. They are
        # killed at different tenths of the time that `install` takes.
        for tenth in range(12):
            if tenth == 6:
                self.assert_done(self.run_program("uninstall"))
            running = self.start("install")
            time.sleep(duration * tenth / 10)
            running.process.kill()
            running.result()
            if self.launcher.exists():
                worked += 1
                self.assert_installed_command_works()
        self.assertGreaterEqual(worked, 6)
        self.install()
        self.assertEqual([p for p in self.read_files() if p.endswith(".tmp")], [])

    def test_parallel_installs_succeed(self):
        running = [self.start("install", "--code-puppy") for _ in range(6)]
        for each in running:
            self.assert_done(each.result())
        self.assert_installed_command_works()
        self.assertEqual([p for p in self.read_files() if p.endswith(".tmp")], [])

    @needs_modes
    def test_with_the_suggested_lines_every_new_bash_has_the_key(self):
        self.require(shutil.which("bash"), "no bash here")
        self.store(api_key="sk-1")
        self.environ["CHATGPT_OAUTH_HOME"] = str(self.home)
        # A login shell reads one of these instead of ~/.bashrc.
        logins = [
            (None, None, "~/.bashrc and ~/.profile"),
            (".profile", "[ -f ~/.bashrc ] && . ~/.bashrc\n", "~/.bashrc"),
            (".bash_profile", "true\n", "~/.bashrc and ~/.bash_profile"),
            (".bash_login", "true\n", "~/.bashrc and ~/.bash_login"),
        ]
        for login, content, profile in logins:
            with self.subTest(login):
                home = self.folder / (login or "none")
                self.use_home(home)
                if login:
                    (home / login).write_text(content)
                messages = self.install(environ={"PATH": PATH})
                lines = re.findall(f"add this line to {re.escape(profile)}:\n    (.+)\n", messages)
                self.assertEqual(len(lines), 2)
                for name in profile.split(" and "):
                    with open(home / name[2:], "a") as file:
                        file.write("\n".join([*lines, ""]))
                for option in ("-lc", "-ic"):
                    command = ["bash", option, "chatgpt-oauth token --api-key; echo $?"]
                    environ = {"PATH": PATH}
                    self.assertEqual(self.run_command(command, environ).out, "sk-1\n0\n")

    @needs_modes
    def test_without_the_shell_variable_the_login_shell_decides(self):
        import pwd

        shell = pwd.getpwuid(os.getuid()).pw_shell
        expected = self.install(environ={"PATH": PATH, "SHELL": shell})
        self.assertEqual(self.install(environ={"PATH": PATH, "SHELL": ""}), expected)

    def test_install_from_standard_input_is_a_usage_error(self):
        with open(PROGRAM, "rb") as stdin:
            result = self.run_command([sys.executable, "-", "install"], stdin=stdin)
        hint = f"download chatgpt_oauth.py, then run: {PYTHON}"
        self.assert_fails(result, 2, "not started from a file", hint)
        self.assertEqual(self.read_files(), {})

    def test_install_from_a_pyc_file_is_a_usage_error(self):
        compiled = self.folder / "c.pyc"
        py_compile.compile(PROGRAM, cfile=str(compiled), doraise=True)
        result = self.run_command([sys.executable, str(compiled), "install"])
        self.assert_fails(result, 2, "download chatgpt_oauth.py")
        self.assertEqual(self.read_files(), {})

    def test_the_plugin_is_installed_if_code_puppy_exists(self):
        # None of these means that Code Puppy is installed.
        self.store()
        (self.home / "plugins" / "empty").mkdir(parents=True)
        (self.home / "accounts" / "work").mkdir(parents=True)
        for name in ("chatgpt_models.json.lock", "accounts/work/chatgpt_plan.json"):
            (self.home / name).touch()
        self.assertNotIn("Code Puppy", self.install())
        self.assertFalse(self.plugin.exists())
        (self.home / "puppy.cfg").touch()
        self.assertNotIn("Code Puppy", self.install("--no-code-puppy"))
        self.assertFalse(self.plugin.exists())
        messages = self.install()
        self.assertIn(f"Installed the Code Puppy plugin {self.plugin}\n", messages)
        self.assertIn("If Code Puppy is running, restart it.\n", messages)
        self.assertEqual(self.plugin.read_bytes(), pathlib.Path(PROGRAM).read_bytes())
        both = self.run_program("install", "--code-puppy", "--no-code-puppy")
        self.assert_fails(both, 2, "--no-code-puppy")
        # From now on the plugin is updated with the program.
        (self.home / "puppy.cfg").unlink()
        self.plugin.write_bytes(self.plugin.read_bytes() + b"# old\n")
        self.install()
        self.assertEqual(self.plugin.read_bytes(), pathlib.Path(PROGRAM).read_bytes())
        self.assertIn("running, restart it.\n", self.assert_done(self.run_program("uninstall")).err)

    def test_the_plugin_is_installed_if_the_command_code_puppy_exists(self):
        command = self.folder / ("code-puppy" if POSIX else "code-puppy.exe")
        command.touch(mode=0o755)
        self.install(environ={"PATH": os.pathsep.join((str(self.bin), str(self.folder), PATH))})
        self.assertTrue(self.plugin.exists())

    @needs_modes
    def test_a_new_code_puppy_directory_is_private(self):
        self.install("--code-puppy")
        self.assertEqual(self.home.stat().st_mode & 0o777, 0o700)

    def test_options_and_environment_choose_the_directories(self):
        data = self.folder / "data"
        name = "XDG_DATA_HOME" if POSIX else "LOCALAPPDATA"
        bin_folder = self.folder / "x y"
        self.install("--bin", "x y", environ={name: str(data)}, cwd=str(self.folder))
        self.assertTrue((data / "chatgpt_oauth" / "chatgpt_oauth.py").exists())
        self.assertEqual(self.run_command([str(bin_folder / self.launcher.name), "-V"]).code, 0)
        self.assertFalse(self.program.exists())
        self.require(POSIX, "only XDG_DATA_HOME is ignored if it is a relative path")
        self.install(environ={name: "data"}, cwd=str(self.folder))
        self.assertTrue(self.program.exists())

    def test_uninstall_removes_everything_except_the_sign_in(self):
        before = self.store(api_key="sk-1")
        self.install("--code-puppy")
        self.run_installed("status", environ={"PYTHONDONTWRITEBYTECODE": None})
        (self.plugin.parent / "__pycache__").mkdir()
        (self.plugin.parent / "__pycache__" / "register_callbacks.cpython-312.pyc").touch()
        messages = self.assert_done(self.run_installed("uninstall")).err
        self.assertIn(f"Removed {self.launcher}\n", messages)
        self.assertIn(f"Your sign-in stays in {self.token_file}\n", messages)
        self.assertEqual(list(self.read_files()), [str(self.token_file)])
        self.assertEqual(self.stored(), before)
        self.assertFalse(self.plugin.parent.exists())
        self.assertFalse(self.program.parent.exists())
        messages = self.assert_done(self.run_program("uninstall")).err
        self.assertEqual(messages, "Not installed; nothing to do.\n")

    def test_uninstall_finds_its_own_launcher(self):
        elsewhere = self.folder / "bin"
        self.install("--bin", str(elsewhere))
        launcher = started = elsewhere / self.launcher.name
        if POSIX:
            started = self.folder / "link"
            started.symlink_to(launcher)
        messages = self.assert_done(self.run_command([str(started), "uninstall"])).err
        self.assertEqual(messages.count(str(launcher)), 1, messages)
        self.assertFalse(launcher.exists() or self.program.exists())

    @needs_modes
    def test_the_home_directory_can_be_a_symlink(self):
        real, link = self.folder / "real", self.folder / "link"
        real.mkdir()
        link.symlink_to(real)
        self.use_home(link)
        for folder in (self.bin, link / "bin"):
            self.install("--bin", str(folder))
        messages = self.assert_done(self.run_installed("uninstall")).err
        self.assertEqual(len(re.findall("Removed .*/chatgpt-oauth\n", messages)), 2, messages)
        self.assertEqual(self.paths(), {str(real), str(link)})

    def test_uninstall_with_a_wrong_bin_removes_nothing(self):
        self.install()
        before = list(self.read_files())
        result = self.run_program("uninstall", "--bin", str(self.folder))
        self.assert_fails(result, 2, str(self.folder / self.launcher.name), "given to install")
        self.assertEqual(list(self.read_files()), before)

    def test_uninstall_keeps_files_of_others(self):
        self.install("--code-puppy")
        mine = [self.program.parent / "mine", self.plugin.parent / "mine", self.bin / "mine"]
        for each in mine:
            each.touch()
        self.assert_done(self.run_program("uninstall", "--no-code-puppy"))
        self.assertTrue(self.plugin.exists())
        self.assert_done(self.run_program("uninstall"))
        self.assertEqual(set(self.read_files()), set(map(str, mine)))

    def paths(self):
        """Return the paths of all files and directories in the test's directory."""
        return {str(path) for path in self.folder.rglob("*")}

    def test_uninstall_removes_the_directories_that_install_made(self):
        before = self.paths()
        self.install("--code-puppy", "--bin", str(self.folder / "a" / "b"))
        self.assert_done(self.run_program("uninstall"))
        self.assertEqual(self.paths(), before)
        (self.home / "plugins").mkdir(parents=True)
        self.bin.mkdir(parents=True)
        before = self.paths() - {str(self.home / "plugins")}
        self.install("--code-puppy")
        self.assert_done(self.run_installed("uninstall"))
        self.assertEqual(self.paths(), before)

    def test_uninstall_removes_each_command_of_the_program(self):
        first, second = self.folder / "first", self.folder / "second"
        launchers = [folder / self.launcher.name for folder in (first, second)]
        before = self.paths()
        registration = self.home / "chatgpt_agent.json"
        self.home.mkdir()
        registration.touch()
        for folder in (first, second, self.bin):
            self.install("--bin", str(folder))
        # With --bin, the other commands keep working.
        messages = self.assert_done(self.run_program("uninstall", "--bin", str(second))).err
        self.assertIn(f"Removed {launchers[1]}\n", messages)
        self.assertFalse(second.exists())
        self.assertTrue(registration.exists())
        self.assertEqual(self.run_command([str(launchers[0]), "-V"]).code, 0)
        self.assertEqual(self.run_installed("-V").code, 0)
        # The person's own program is left alone.
        launchers[0].write_text("#!/bin/sh\n")
        # Wine keeps a running launcher open, so its directory can't be removed.
        uninstall = self.run_installed if POSIX else self.run_program
        self.assert_done(uninstall("uninstall"))
        self.assertFalse(registration.exists())
        shutil.rmtree(self.home)
        self.assertEqual(self.paths() - before, {str(first), str(launchers[0])})

    def test_uninstall_finds_the_program_in_another_data_directory(self):
        name = "XDG_DATA_HOME" if POSIX else "LOCALAPPDATA"
        before = self.paths()
        for data in ("it's %PATH% data", "data", '"$HOME\'s"' if POSIX else "c d"):
            with self.subTest(data):
                environ = {name: str(self.folder / data)}
                self.install("--bin", str(self.bin), environ=environ)
                self.assertFalse(self.program.exists())
                self.assert_done(self.run_program("uninstall", "--bin", str(self.bin)))
                self.assertEqual(self.paths(), before)

    def test_an_edited_configuration_is_kept(self):
        source = pathlib.Path(PROGRAM).read_text(encoding="utf-8")
        edited = self.folder / "edited.py"
        version = oauth.CHATGPT_OAUTH_CONFIG["codex_client_version"]
        # Values of earlier releases aren't edits.
        older = source.replace(f'_version": "{version}"', '_version": "0.169.0"')
        older = older.replace('"default_context_length": None', '"default_context_length": 128000')
        for text, names in (
            (source, ""),
            (older, ""),
            (older.replace('"home": None', '"home": "/h"'), "home"),
            (source.replace('"prefix": "chatgpt-"', '"prefix": "x" + "y"'), "CHATGPT_OAUTH_CONFIG"),
        ):
            with self.subTest(names):
                edited.write_text(text, encoding="utf-8")
                self.run_command([sys.executable, str(edited), "install", "--code-puppy"])
                self.assertEqual(self.program.read_text(encoding="utf-8"), text)
                messages = self.install()
                for place in (self.program, self.plugin):
                    kept = pathlib.Path(f"{place}.old")
                    self.assertEqual(kept.exists(), bool(names))
                    if names:
                        warning = f"warning: the installed copy had edited settings: {names}\n"
                        self.assertIn(f"{warning}That copy is kept as {kept}\n", messages)
                        self.assertEqual(kept.read_text(encoding="utf-8"), text)
                self.assert_done(self.run_program("uninstall"))
                self.assertEqual(self.paths(), {str(edited)})

    def test_install_and_uninstall_at_once_leave_all_or_nothing(self):
        for _ in range(2):
            commands = ["install", "uninstall"] * 3
            running = [self.start(command, "--code-puppy") for command in commands]
            for each in running:
                result = each.result()
                # A launcher that is removed before its first run makes its `install` fail.
                self.assertIn(result.code, (0, 6), result.err)
                self.assertNotIn("internal error", result.err)
            files = [self.launcher.exists(), self.program.exists(), self.plugin.exists()]
            self.assertEqual(len(set(files)), 1, files)
            if self.launcher.exists():
                self.assertEqual(self.run_installed("-V").code, 0)
        self.run_program("uninstall")
        # These stay if one process made them and another one found them there.
        self.assertLessEqual(self.paths(), {str(self.data), str(self.data.parent)})

    def test_damaged_compiled_code_is_ignored_and_replaced(self):
        self.install()
        (compiled,) = self.program.parent.glob("__pycache__/*.pyc")
        content = compiled.read_bytes()
        # The first 16 bytes of such a file are its header.
        for damaged in (content[:-9999], content[:16], content[:16] + bytes(99), b""):
            compiled.write_bytes(damaged)
            self.assert_installed_command_works()
            # The first run repairs the file, and this one uses it.
            self.assert_installed_command_works()
            self.assertGreater(compiled.stat().st_size, len(content) - 1000)
        # A directory in its place can't be repaired.
        compiled.unlink()
        compiled.mkdir()
        self.assert_installed_command_works()

    def run_in_mount(self, options, code):
        """Run shell code with a new file system mounted at the test's directory.

        `install` in the code runs the program's command of that name. Return the Result.
        """
        self.require(can_mount(), "no mounts here")
        start = " ".join(map(shlex.quote, [*PROGRAM_COMMAND, "install"]))
        folder = shlex.quote(str(self.folder))
        mount = f"mount -t tmpfs -o {options} none {folder} && cd /"
        code = f"{mount}; install() {{ {start}; }}; {code}"
        return self.run_command(["unshare", "-m", "sh", "-c", code])

    def test_a_directory_without_programs_is_an_error(self):
        folder = shlex.quote(str(self.folder))
        code = f"install || code=$?; find {folder} -mindepth 1; exit $code"
        result = self.run_in_mount("noexec", code)
        hint = "hint: to use another directory, run: "
        self.assert_fails(result, 6, f"{self.bin} does not allow programs", hint)
        self.assertIn("install --bin DIR\n", result.err)

    def test_a_full_disk_leaves_a_working_command_or_nothing(self):
        folder, launcher = shlex.quote(str(self.folder)), shlex.quote(str(self.launcher))
        code = f"if install; then {launcher} -V; else find {folder} -mindepth 1; exit 6; fi"
        codes = set()
        for size in (300, 500, 1000):
            result = self.run_in_mount(f"size={size}k", code)
            codes.add(result.code)
            if result.code:
                self.assert_fails(result, 6, "cannot write ", "No space left")
            else:
                self.assertEqual(result.out, f"chatgpt_oauth {oauth.__version__}\n")
        self.assertEqual(codes, {0, 6})

    @needs_modes
    def test_nothing_that_install_makes_is_writable_by_others(self):
        for umask in (0, 0o002):
            self.assert_done(
                self.run_shell(
                    f"umask {umask:o}; exec {self.shell_command('install', '--code-puppy')}"
                )
            )
            for path in (self.program.parent, *self.folder.rglob("*")):
                self.assertFalse(path.stat().st_mode & 0o022, path)
            self.assert_done(self.run_program("uninstall"))
        # Existing directories lose the permission, and compiled code in them is removed, because
        # someone else may have put it there.
        cache = self.program.parent / "__pycache__"
        cache.mkdir(parents=True)
        planted = cache / "chatgpt_oauth.cpython-399.pyc"
        planted.touch()
        for path in (cache, cache.parent):
            path.chmod(0o777)
        self.install()
        for path in (cache.parent, *cache.parent.rglob("*")):
            self.assertFalse(path.stat().st_mode & 0o022, path)
        self.assertFalse(planted.exists())

    @needs_root
    def test_root_installs_for_the_owner_of_the_home_directory(self):
        self.install("--code-puppy")
        # This imports every module, because the other user may not be able to read them.
        self.assertEqual(self.call("uninstall").code, 0)
        os.chown(self.folder, NOBODY, NOBODY)
        self.install("--code-puppy")
        self.assertEqual({path.stat().st_uid for path in self.folder.rglob("*")}, {NOBODY})
        with self.as_unprivileged_user():
            self.assertEqual(self.call("uninstall").code, 0)
        self.assertEqual(self.paths(), set())

    @needs_root
    def test_directories_and_files_of_another_user_are_refused(self):
        cache = self.program.parent / "__pycache__"
        for path in (self.program.parent, cache):
            cache.mkdir(parents=True)
            os.chown(path, NOBODY, NOBODY)
            before = self.paths()
            self.assert_fails(
                self.call("install"), 6, f"{path}: owned by another user (uid {NOBODY})"
            )
            self.assertEqual(self.paths(), before)
            shutil.rmtree(self.folder / ".local")
        for path in (self.launcher, self.program):
            self.install()
            os.chown(path, NOBODY, NOBODY)
            self.assert_fails(self.call("install"), 6, f"{path}: owned by another user")
            self.assert_done(self.call("uninstall"))

    @needs_proc
    def test_a_directory_that_cannot_exist_is_reported_at_once(self):
        start = time.monotonic()
        result = self.call("install", environ={"HOME": "/proc"})
        self.assert_fails(result, 6, "cannot write /proc/.local: No such file")
        self.assertLess(time.monotonic() - start, 30)

    @needs_root
    def test_root_gives_away_no_file_that_is_linked_elsewhere(self):
        os.chown(self.folder, NOBODY, NOBODY)
        self.install()
        ours = self.folder / "ours"
        ours.touch()
        os.link(ours, self.program.parent / "__pycache__" / "theirs")
        self.install()
        self.assertEqual(ours.stat().st_uid, 0)

    @needs_root
    def test_a_directory_of_another_user_has_a_hint_for_its_option(self):
        self.prepare_for_another_user()
        theirs, ours = self.folder / "theirs", self.folder / "ours"
        theirs.mkdir()
        ours.mkdir()
        os.chown(ours, NOBODY, NOBODY)
        for home, option, hint in (
            (theirs, ours, "hint: set HOME or XDG_DATA_HOME to a directory of yours\n"),
            (ours, theirs, "hint: use --bin with a directory of yours\n"),
            (ours, theirs / "new" / "bin", "hint: use --bin with a directory of yours\n"),
        ):
            with self.as_unprivileged_user():
                environ = {"HOME": str(home)}
                result = self.call("install", "--bin", str(option), environ=environ)
            self.assert_fails(result, 6, f"cannot write {theirs}/", hint)
        (ours / ".code_puppy").mkdir()
        with self.as_unprivileged_user():
            environ = {"HOME": str(ours)}
            result = self.call("install", "--code-puppy", environ=environ)
        self.assert_fails(result, 6, f"cannot write {ours}/.code_puppy/", "--no-code-puppy")

    @needs_root
    def test_root_does_not_follow_a_link_to_another_directory(self):
        target = self.folder / "target"
        target.mkdir(mode=0o777)
        self.data.mkdir(parents=True)
        self.program.parent.symlink_to(target)
        self.assert_fails(self.call("install"), 6, f"cannot write {self.program.parent}")
        self.assertEqual(list(target.iterdir()), [])

    def test_there_is_no_profile_line_without_an_api_key(self):
        for case in ("signed out", "no key", "broken"):
            with self.subTest(case):
                if case == "no key":
                    self.store()
                elif case == "broken":
                    self.token_file.write_text("{")
                command = "auth" if case == "signed out" else "status"
                messages = self.install()
                self.assertNotIn(" env ", messages)
                self.assertTrue(messages.endswith(f", run:\n    {self.launcher.name} {command}\n"))
                messages = self.install(environ={"PATH": PATH})
                command = f"{bash_path(self.launcher)} {command}"
                self.assertTrue(messages.endswith(f", run:\n    {command}\n"))

    @unittest.skipIf(POSIX, "only Windows has Git Bash, PowerShell and cmd")
    def test_the_suggested_lines_suit_git_bash_or_powershell(self):
        self.store(api_key="sk-1")
        launcher, environ = str(self.launcher), {"SHELL": ""}
        usage = self.run_program("--help", environ=environ).out
        self.assertRegex(usage, rf"\n  {PYTHON} .+ env \| iex\n")
        messages = self.install(environ={"PATH": PATH, "SHELL": ""})
        self.assertIn(f"    {launcher} env --shell powershell | iex\n", messages)
        self.assertTrue(messages.endswith(f"    {launcher} status\n"), messages)
        messages = self.install(environ=environ)
        self.assertTrue(messages.endswith("    chatgpt-oauth status\n"), messages)
        # Git Bash sets both variables.
        environ = {"PATH": PATH, "MSYSTEM": "MINGW64", "SHELL": "/usr/bin/bash"}
        messages = self.install(environ=environ)
        self.assertIn(f'    export PATH="$(cygpath {bash_path(self.bin)})":"$PATH"\n', messages)
        line = f'eval "$({bash_path(launcher)} env --shell sh)"'
        self.assertIn(f"    {line}\n", messages)
        self.assertTrue(messages.endswith(f"    {bash_path(launcher)} status\n"), messages)
        # Git Bash doesn't find a .cmd file without its suffix.
        messages = self.install(environ={"MSYSTEM": "MINGW64"})
        self.assertTrue(messages.endswith("    chatgpt-oauth.cmd status\n"), messages)

    @unittest.skipIf(POSIX, "only Windows has the Microsoft Store")
    def test_python_from_the_microsoft_store_installs_outside_appdata(self):
        lines = [
            "import runpy, sys",
            r"sys.prefix = sys.base_prefix = r'C:\Program Files\WindowsApps\Python'",
            f"sys.argv = [{PROGRAM!r}, 'install']",
            "runpy.run_path(sys.argv[0], run_name='__main__')",
        ]
        self.assert_done(self.run_command([sys.executable, "-c", "\n".join(lines)]))
        self.assertFalse(self.data.exists())
        self.launcher = self.folder / ".local" / "Programs" / "chatgpt_oauth" / self.launcher.name
        self.assert_installed_command_works()

    @unittest.skipIf(POSIX, "only cmd decodes scripts with a code page")
    def test_the_launcher_works_for_every_user_name_and_code_page(self):
        for name in ("Zo\u00eb", "\u0141ucja \u0436 & it's me"):
            for variable in ("USERPROFILE", "LOCALAPPDATA"):
                with self.subTest(name=name, variable=variable):
                    self.use_home(self.folder / name)
                    if variable == "LOCALAPPDATA":
                        self.environ[variable] = str(self.data)
                    self.install()
                    self.assertTrue(self.launcher.read_bytes().isascii())
                    self.assert_installed_command_works()
                    self.assert_done(self.run_program("uninstall"))
                    self.environ.pop("LOCALAPPDATA", None)
                    self.assertFalse(self.program.exists())

    def test_another_command_with_the_name_is_a_warning(self):
        first = self.folder / "first"
        first.mkdir()
        other = first / self.launcher.name
        other.write_text("#!/bin/sh\n")
        other.chmod(0o755)
        path = os.pathsep.join((str(first), self.environ["PATH"]))
        messages = self.install(environ={"PATH": path})
        warning = f"warning: another chatgpt-oauth comes first on your PATH: {other}\n"
        # On Windows the suffix comes from PATHEXT, which is in capitals.
        self.assertIn(warning.lower(), messages.lower())

    def test_the_suggested_powershell_lines_fit_every_system(self):
        self.store(api_key="sk-1")
        messages = self.install(environ={"PATH": PATH, "SHELL": "pwsh"})
        self.assertEqual(messages.count(" add this line to PowerShell's $PROFILE:\n"), 2)
        # Windows separates paths with a semicolon, other systems with a colon.
        self.assertRegex(messages, r"(?m)^    \$env:PATH = '.+' \+ \[IO.Path\]::PathSeparator \+")
        # An empty string, which Out-String returns without input, is an error to iex.
        self.assertRegex(messages, r"(?m)^    .+ env --shell powershell \| iex$")

    @needs_sh
    def test_the_suggested_profile_lines_work(self):
        self.use_home(self.folder / "it's a home")
        self.home = self.folder / "it's a home" / ".code_puppy"
        self.token_file = self.home / "chatgpt_oauth.json"
        self.store(api_key="sk-1")
        profiles = {
            "bash": "~/.bashrc and ~/.profile",
            "zsh": "~/.zshrc",
            "fish": "~/.config/fish/config.fish",
            "tcsh": "~/.tcshrc",
            "dash": "~/.profile",
            "nu": "$nu.config-path",
            "elvish": "~/.config/elvish/rc.elv",
            "xonsh": "~/.xonshrc",
            "unknown": "~/.profile",
        }
        show = {
            "nu": "print $env.CHATGPT_OAUTH_API_KEY?",
            "elvish": "echo $E:CHATGPT_OAUTH_API_KEY",
        }
        for name, profile in profiles.items():
            with self.subTest(name):
                shell = shutil.which("sh" if name == "unknown" else name)
                self.require(shell, f"no {name} here")
                environ = {"PATH": PATH, "SHELL": f"/usr/bin/{name}"}
                messages = self.install(environ=environ)
                self.assertIn(f"warning: {self.bin} is not on your PATH\n", messages)
                self.assertEqual(messages.count(f" add this line to {profile}:\n"), 2)
                *lines, next_command = re.findall(r"(?m)^    (.+)$", messages)
                # The suggested next command works in a shell that hasn't read the new lines.
                out = self.run_command([shell, "-c", next_command], environ).out
                self.assertIn("ChatGPT OAuth: Authenticated", out)
                lines += [show.get(name, "echo $CHATGPT_OAUTH_API_KEY"), "chatgpt-oauth --version"]
                command = [shell, "-c", "\n".join(lines)]
                out = self.assert_quiet(self.run_command(command, environ)).out
                self.assertEqual(out.split(), ["sk-1", "chatgpt_oauth", oauth.__version__])
                environ["CHATGPT_OAUTH_HOME"] = str(self.folder / "none")
                # In tcsh an unset variable would be an error.
                if name == "tcsh":
                    environ["CHATGPT_OAUTH_API_KEY"] = ""
                result = self.run_command(command, environ)
                self.assertEqual(
                    (result.code, result.out.split()), (0, ["chatgpt_oauth", oauth.__version__])
                )
                # The `!()` of xonsh captures standard error.
                if name != "xonsh":
                    self.assertIn("error: not signed in", result.err)


# ---------------------------------------------------------------------------------------------
# Code Puppy
# ---------------------------------------------------------------------------------------------


class ModelHTTPError(Exception):
    """A stand-in for the exception of pydantic-ai."""

    def __init__(self, status_code, model_name, body=None):
        super().__init__(status_code, model_name, body)
        self.status_code, self.body = status_code, body


class AsyncByteStream:
    """A stand-in for the base class of httpx's streams."""


class ByteStream(AsyncByteStream):
    """A stand-in for httpx's stream of a body. Each of `chunks` arrives on its own."""

    def __init__(self, *chunks):
        self.chunks = chunks

    async def __aiter__(self):
        for chunk in self.chunks:
            yield chunk


class HttpMessage:
    """A stand-in for httpx's requests and responses."""

    def __init__(self, **members):
        vars(self).update(members)


def events(*fields):
    """Return the events of a response as bytes (server-sent events)."""
    return b"".join(b"event: x\ndata: " + json.dumps(each).encode() + b"\n\n" for each in fields)


HELLO = events({"type": "response.output_text.delta", "delta": "Hello"})
COMPLETED = events({"type": "response.completed", "response": {"error": None}})


class ResponsesModel:
    """A stand-in for pydantic-ai's OpenAIResponsesModel. `backend` replaces the server."""

    backend = None

    def __init__(self, name, provider, profile=None):
        self.name, self.provider, self.profile = name, provider, profile

    @contextlib.asynccontextmanager
    async def request_stream(self, messages, model_settings, parameters, run_context=None):
        hooks = self.provider["openai_client"]["http_client"]["event_hooks"]
        body = json.dumps({"model": self.name, **(parameters or {})}).encode()
        request = HttpMessage(method="POST", content=body, headers={}, stream=ByteStream(body))
        for hook in hooks["request"]:
            await hook(request)
        chunks = ResponsesModel.backend(model_settings["extra_headers"])
        response = HttpMessage(
            request=request, status_code=200, headers={}, stream=ByteStream(*chunks)
        )
        for hook in hooks["response"]:
            await hook(response)
        self.settings = model_settings
        self.sent = b"".join([chunk async for chunk in request.stream])
        yield Streamed(response.stream)


class Streamed:
    """A stand-in for pydantic-ai's reader of a stream, which ignores every failure."""

    def __init__(self, stream):
        self.stream, self.text = stream, ""

    async def __aiter__(self):
        async for chunk in self.stream:
            for delta in re.findall(rb'"delta": "(.*?)"', chunk):
                self.text += delta.decode()
            yield chunk

    def get(self):
        return self.text


class PlainText(str):
    """A stand-in for rich's Text."""


class Host:
    """A stand-in for Code Puppy's modules and its built-in plugin for ChatGPT.

    The `release` "new" is 0.0.946. "old" is 0.0.229, which lacks much of what the plugin can use.
    """

    BUILTIN = "code_puppy_core_plugins.chatgpt_oauth"

    def __init__(self, home, release="new", builtin=True):
        self.home, self.release = home, release
        self.phases = {"custom_command": [], "custom_command_help": [], "startup": []}
        if release == "new":
            self.phases["register_model_type"] = []
        # The name of the plugin that is being loaded, the plugin that registered each callback, and
        # the disabled plugins.
        self.context, self.owners, self.disabled = None, {}, set()
        self.messages, self.settings, self.model, self.reloads = [], {}, None, 0
        self.agent = types.SimpleNamespace(reload_code_generation_agent=self.count_reload)
        self.is_paused = False
        self.modules = {}
        for name in ("code_puppy", "code_puppy.messaging", "code_puppy.tools", "pydantic_ai"):
            self.add_module(name)
        self.callbacks = self.add_module("code_puppy.callbacks")
        self.add_module("code_puppy.agents", get_current_agent=lambda: self.agent)
        self.add_module("rich", text=self.add_module("rich.text", Text=PlainText))
        self.config = self.add_module(
            "code_puppy.config",
            CONFIG_DIR=str(home),
            get_value=self.settings.get,
            get_global_model_name=lambda: self.model,
            clear_model_cache=lambda: None,
        )
        self.factory = self.add_module(
            "code_puppy.model_factory", ModelFactory=types.SimpleNamespace(load_config=self.models)
        )
        self.common = self.add_module("code_puppy.tools.common")
        for kind in ("info", "success", "warning", "error"):
            emit = functools.partial(self.keep_message, kind)
            setattr(self.modules["code_puppy.messaging"], "emit_" + kind, emit)
        self.callbacks.register_callback = self.register
        self.callbacks.unregister_callback = lambda phase, f: self.phases[phase].remove(f)
        self.callbacks.get_callbacks = lambda phase: list(self.phases.get(phase, ()))
        if release == "new":
            self.add_new_features()
        if builtin:
            self.load_builtin()

    def add_module(self, name, **contents):
        module = self.modules[name] = types.ModuleType(name)
        vars(module).update(contents)
        return module

    def add_new_features(self):
        """Add what the new release has and the old one doesn't have."""
        self.callbacks.get_callbacks = self.enabled_callbacks
        self.callbacks.get_loading_context = lambda: self.context
        self.callbacks.set_loading_context = self.switch_context
        self.callbacks.clear_loading_context = self.switch_context
        self.callbacks.get_callback_owner = self.owners.get
        self.callbacks.is_callback_owner_enabled = lambda owner: owner not in self.disabled
        self.config.DATA_DIR = str(self.home)
        self.common.should_suppress_browser = lambda: False
        self.factory._CUSTOM_OPENAI_MODEL_TYPES = {"custom_openai", "custom_openai_responses"}
        self.factory.get_api_key = os.environ.get
        self.add_module("code_puppy.shared_credentials")
        self.factory._thinking_tags_profile = lambda name, entry: f"profile of {entry['name']}"
        pausing = types.SimpleNamespace(is_paused=lambda: self.is_paused)
        self.add_module(
            "code_puppy.messaging.pause_controller", get_pause_controller=lambda: pausing
        )
        # A client or a provider is a dictionary of its options, so that tests can look at them.
        make = lambda **options: options  # noqa: E731
        self.add_module("code_puppy.chatgpt_codex_client", create_codex_async_client=make)
        self.add_module("code_puppy.http_utils", get_cert_bundle_path=lambda: "/bundle.pem")
        self.add_module("openai", AsyncOpenAI=make)
        self.add_module("pydantic_ai.exceptions", ModelHTTPError=ModelHTTPError)
        self.add_module("pydantic_ai.models", Model=object)
        self.add_module("pydantic_ai.models.openai", OpenAIResponsesModel=ResponsesModel)
        self.add_module("pydantic_ai.providers.openai", OpenAIProvider=make)

    def load_builtin(self):
        # The plugin recognizes the built-in one by the module that its functions belong to.
        code = (
            "def on_command(command, name):\n"
            "    return f'built-in {name}' if name[:5] in ('chatg', 'codex') else None\n"
            "def on_help():\n"
            "    return [(n, 'old') for n in ('chatgpt-auth', 'codex-status', 'codex-imagegen')]\n"
            "def model_types():\n"
            "    return [{'type': 'chatgpt_oauth', 'handler': 'built-in'}]\n"
        )
        self.builtin = self.add_module(self.BUILTIN + ".register_callbacks")
        exec(code, vars(self.builtin))
        before = self.switch_context("chatgpt_oauth")
        self.register("custom_command", self.builtin.on_command)
        self.register("custom_command_help", self.builtin.on_help)
        if self.release == "new":
            self.register("register_model_type", self.builtin.model_types)
        self.switch_context(before)

    def keep_message(self, kind, text):
        if not isinstance(text, PlainText):
            raise AssertionError(f"the host would interpret {text!r} as markup")
        self.messages.append((kind, str(text)))

    def count_reload(self):
        self.reloads += 1

    def switch_context(self, context):
        before, self.context = self.context, context
        return before

    def register(self, phase, function):
        if phase not in self.phases:
            raise ValueError(f"Unsupported phase: {phase}")
        self.phases[phase].append(function)
        self.owners[function] = self.context

    def enabled_callbacks(self, phase, include_disabled=False):
        callbacks = self.phases.get(phase, ())
        return [f for f in callbacks if include_disabled or self.owners[f] not in self.disabled]

    def models(self):
        """Return the models that the host offers, including those in the models file."""
        path = self.home / "chatgpt_models.json"
        return {"synthetic": {}, **(json.loads(path.read_text()) if path.exists() else {})}

    def model_handler(self, kind="chatgpt_oauth"):
        """Return the function that builds models of type `kind`. The first one registered wins."""
        offered = [t for f in self.callbacks.get_callbacks("register_model_type") for t in f()]
        return next(t["handler"] for t in offered if t["type"] == kind)


class PuppyCase(Case):
    """A test case that loads the program as a plugin of a stand-in for Code Puppy."""

    def setUp(self):
        super().setUp()
        self.stdin = io.StringIO()
        self.installed = contextlib.ExitStack()
        self.addCleanup(self.installed.close)

    def start_host(self, release="new", builtin=True):
        """Start a new stand-in for Code Puppy and put its modules in place of the real ones."""
        self.puppy = Host(self.home, release, builtin)
        self.messages = self.puppy.messages
        self.installed.close()
        self.installed.enter_context(mock.patch.dict(sys.modules, self.puppy.modules))
        self.installed.enter_context(mock.patch.dict(os.environ, self.environ, clear=True))

    def load_plugin(self, name="chatgpt_oauth_file.register_callbacks"):
        """Load the program as the module `name`, by default the one that Code Puppy would use."""
        spec = importlib.util.spec_from_file_location(name, PROGRAM)
        module = importlib.util.module_from_spec(spec)
        before = self.puppy.switch_context("mine" if name.endswith("register_callbacks") else None)
        spec.loader.exec_module(module)
        self.plugin = module
        self.puppy.switch_context(before)
        short_waits = mock.patch.multiple(module, MESSAGE_PAUSE=0, **self.waits)
        short_waits.start()
        self.addCleanup(short_waits.stop)

    def start_plugin(self, release="new", builtin=True):
        """Start a new stand-in for Code Puppy and load the program as its plugin."""
        self.start_host(release, builtin)
        self.load_plugin()

    def dispatch(self, text, browser=visit):
        """Run a typed command as the host does. Return the first answer and the printed text."""
        name = text[1:].split()[0]
        out = BrowserStream(browser)
        self.messages.clear()
        with contextlib.redirect_stdout(out), mock.patch.object(sys, "stdin", self.stdin):
            registered = self.puppy.callbacks.get_callbacks("custom_command")
            answers = [each(command=text, name=name) for each in registered]
        out.wait()
        return next((a for a in answers if a is not None), None), out.getvalue()

    def message_text(self):
        return "\n".join(text for _, text in self.messages)

    def exported_key(self):
        """Return the API key that the host uses, or None."""
        return os.environ.get("CHATGPT_OAUTH_API_KEY")

    def switch_account(self, organization=None):
        """Make the double sign in another account from now on."""
        self.double.account, self.double.email = "acct-2", "bob@example.com"
        self.double.organization = organization


class PuppyTest(PuppyCase):
    """The Code Puppy plugin, tested against a stand-in for the modules of Code Puppy."""

    # Registering ----------------------------------------------------------------------------

    def test_a_plain_import_registers_nothing(self):
        self.start_host()
        for name in ("chatgpt_oauth", "some.chatgpt_oauth", "__main__x"):
            self.load_plugin(name)
        self.assertEqual(len(self.puppy.phases["custom_command"]), 1)
        with mock.patch.dict(sys.modules):
            for name in list(sys.modules):
                if name.startswith("code_puppy"):
                    del sys.modules[name]
            self.load_plugin()
        self.assertEqual(len(self.puppy.phases["custom_command"]), 1)

    def test_loading_the_program_as_a_plugin_registers_it(self):
        for name in ("x.register_callbacks", "code_puppy.plugins.chatgpt_oauth_file"):
            self.start_host(builtin=False)
            self.load_plugin(name)
            self.assertEqual(len(self.puppy.phases["custom_command"]), 1)
        # Under another name, the host's loading context shows that this is a plugin.
        self.start_host(builtin=False)
        self.puppy.context = "mine"
        self.puppy.switch_context = lambda context: None
        self.load_plugin("whatever")
        self.assertEqual(len(self.puppy.phases["custom_command"]), 1)

    def test_each_account_has_its_own_key_and_models(self):
        self.store(api_key="sk-1")
        self.store_account("home", api_key="sk-2")
        self.start_plugin()

        def exported():
            """Return the exported keys by the suffix of their variables."""
            start = "CHATGPT_OAUTH_API_KEY"
            return {k[len(start) :]: v for k, v in os.environ.items() if k.startswith(start)}

        self.assertEqual(exported(), {"": "sk-1", "_HOME": "sk-2"})
        self.dispatch("/chatgpt-auth --account work")
        self.assertIn("/model chatgpt-work-gpt-4o", self.message_text())
        work = json.loads(self.account_file("work").read_text())["api_key"]
        self.assertEqual(exported(), {"": "sk-1", "_HOME": "sk-2", "_WORK": work})
        self.dispatch("/chatgpt-status --account work")
        self.assertIn("\nName:         work\n", self.message_text())
        self.dispatch("/chatgpt-logout --account work")
        self.assertEqual(exported(), {"": "sk-1", "_HOME": "sk-2"})
        self.assertEqual(self.puppy.models(), {"synthetic": {}})
        self.dispatch("/chatgpt-logout")
        self.assertEqual(exported(), {"_HOME": "sk-2"})
        self.store_account("home", api_key="sk-3")
        self.dispatch("/codex-status --account home")
        self.assertEqual(exported(), {"_HOME": "sk-3"})
        self.account_file("home").unlink()
        self.dispatch("/chatgpt-status --account home")
        self.assertIn("To sign in, run: /chatgpt-auth --account home", self.message_text())
        self.assertEqual(exported(), {})
        self.dispatch("/chatgpt-auth --account Home")
        self.assertIn("--account must be", self.message_text())

    def test_other_commands_of_the_builtin_plugin_keep_working(self):
        self.start_plugin()
        for name in ("/codex-status", "/chatgpt-status"):
            self.assertEqual(self.dispatch(name), (True, ""))
            self.assertIn("ChatGPT OAuth: Not authenticated", self.message_text())
        self.assertEqual(self.dispatch("/codex-imagegen"), ("built-in codex-imagegen", ""))
        self.assertEqual(self.dispatch("/codex-auth --help")[0], True)
        self.assertIn("\nexamples:\n  /chatgpt-auth\n  /chatgpt-auth --device", self.message_text())
        self.assertIsNone(self.dispatch("/other")[0])
        help_lines = [e for f in self.puppy.enabled_callbacks("custom_command_help") for e in f()]
        self.assertIn("--official", dict(help_lines)["chatgpt-auth"])
        names = sorted(name for name, _ in help_lines)
        commands = [f"{a}-{b}" for a in ("chatgpt", "codex") for b in ("auth", "logout", "status")]
        self.assertEqual(names, sorted([*commands, "codex-imagegen", "models"]))

    def test_a_disabled_plugin_leaves_everything_to_the_builtin(self):
        self.start_host()
        self.store(api_key="sk-1")
        self.puppy.disabled.add("mine")
        self.load_plugin()
        for _ in range(2):
            self.assertIsNone(self.exported_key())
            self.assertEqual(self.dispatch("/chatgpt-status")[0], "built-in chatgpt-status")
            self.assertEqual(self.puppy.model_handler(), "built-in")
            help_lines = [
                n for f in self.puppy.enabled_callbacks("custom_command_help") for n, _ in f()
            ]
            self.assertEqual(help_lines, ["chatgpt-auth", "codex-status", "codex-imagegen"])
            # A plugin that is enabled later works from the host's next start on.
            self.puppy.disabled.discard("mine")

    def test_the_builtin_plugin_can_be_disabled(self):
        self.start_host()
        self.puppy.disabled.add("chatgpt_oauth")
        self.load_plugin()
        self.assertIsNone(self.dispatch("/codex-imagegen")[0])
        self.puppy.disabled.discard("chatgpt_oauth")
        self.assertEqual(self.dispatch("/codex-status"), (True, ""))
        self.assertNotEqual(self.puppy.model_handler(), "built-in")
        self.assertEqual(len(self.puppy.phases["custom_command"]), 1)

    def test_the_builtin_plugin_is_found_by_its_name_too(self):
        self.start_host()
        (theirs,) = self.puppy.phases["custom_command"]
        self.puppy.phases["custom_command"].clear()
        self.puppy.context = "chatgpt_oauth"
        self.puppy.register("custom_command", functools.partial(theirs))
        self.load_plugin()
        self.assertEqual(self.dispatch("/chatgpt-status"), (True, ""))
        self.assertNotIn("built-in", self.message_text())
        self.assertEqual(self.dispatch("/codex-imagegen"), ("built-in codex-imagegen", ""))

    def test_releases_with_other_loading_contexts_work(self):
        # 0.0.552 to 0.0.848: clear_loading_context takes no argument.
        self.start_host()
        self.puppy.callbacks.clear_loading_context = lambda: None
        del self.puppy.callbacks.get_loading_context
        del self.puppy.callbacks.is_callback_owner_enabled
        self.load_plugin()
        self.assertEqual(self.dispatch("/chatgpt-status"), (True, ""))
        self.assertNotEqual(self.puppy.model_handler(), "built-in")

    def test_a_release_that_does_not_fit_keeps_the_builtin_plugin(self):
        def refuse(*_):
            # A missing function raises the same exception.
            raise AttributeError

        for name in ("unregister_callback", "get_callback_owner", "register_callback"):
            self.start_host()
            setattr(self.puppy.callbacks, name, refuse)
            self.load_plugin()
            self.assertEqual([kind for kind, _ in self.messages], ["warning"])
            self.assertIn("does not fit this release of Code Puppy", self.message_text())
            self.assertEqual(self.dispatch("/chatgpt-status")[0], "built-in chatgpt-status")
            self.assertEqual(self.puppy.model_handler(), "built-in")
            help_lines = [
                e for f in self.puppy.callbacks.get_callbacks("custom_command_help") for e in f()
            ]
            self.assertEqual([text for _, text in help_lines], ["old"] * 3)

    def test_the_builtin_plugin_finds_a_valid_token(self):
        self.store(lifetime=-10)
        self.start_plugin()
        self.dispatch("/other")
        self.assertEqual(self.double.count("refresh"), 0)
        for _ in range(2):
            self.assertEqual(self.dispatch("/codex-imagegen")[0], "built-in codex-imagegen")
            self.assertEqual(self.double.count("refresh"), 1)

    # Signing in and out ---------------------------------------------------------------------

    def test_signing_in_and_out(self):
        self.start_plugin()
        self.dispatch("/chatgpt-status")
        self.assertIn("/chatgpt-auth", self.message_text())
        answer, output = self.dispatch("/chatgpt-auth")
        self.assertTrue(answer)
        # Only the URL is printed, on one line.
        self.assertRegex(output.strip(), r"^http\S+$")
        self.assertIn(("success", "Signed in as ada@example.com"), self.messages)
        self.assertEqual(
            self.messages[-1][1], "To use one of the models, type: /model chatgpt-gpt-4o"
        )
        self.assertEqual(self.puppy.reloads, 1)
        self.assertEqual(self.exported_key(), self.stored()["api_key"])
        self.assert_no_secret(self.message_text(), output)
        self.dispatch("/chatgpt-status")
        self.assertIn("API key available", self.message_text())
        self.dispatch("/chatgpt-logout")
        self.assertIsNone(self.exported_key())
        self.assertFalse(self.token_file.exists())

    def test_a_failed_import_suggests_no_model(self):
        self.start_plugin()
        self.dispatch("/chatgpt-auth")
        self.fault("api", 500)
        self.dispatch("/chatgpt-auth")
        self.assertIn("could not list models (HTTP 500)", self.message_text())
        self.assertNotIn("/model ", self.message_text())

    def test_a_broken_token_file_is_reported_once(self):
        self.store()
        self.token_file.write_text("{broken")
        self.start_plugin()
        self.assertEqual(self.messages, [])
        self.dispatch("/chatgpt-status")
        self.assertEqual(self.message_text().count("not valid JSON"), 1)

    def test_hints_name_code_puppy_commands(self):
        self.start_plugin()
        self.double.faults["code"] = respond_with(400, b"{}")
        self.dispatch("/chatgpt-auth")
        self.assertIn("hint: to try again, run: /chatgpt-auth", self.message_text())
        self.dispatch("/chatgpt-auth --timeout 0.1", browser=None)
        self.assertIn("run: /chatgpt-auth --timeout 240", self.message_text())
        self.dispatch("/chatgpt-auth --tiemout 5")
        self.assertIn("did you mean: /chatgpt-auth --timeout", self.message_text())
        del self.double.faults["code"]
        self.fault("key", 403)
        self.dispatch("/chatgpt-auth")
        self.assertIn("then run: /chatgpt-auth", self.message_text())
        self.dispatch("/chatgpt-status")
        self.assertNotIn("chatgpt_oauth.py", self.message_text())

    def test_commands_accept_options(self):
        self.start_plugin()
        self.dispatch("/chatgpt-auth --device --include gpt-4?")
        self.assertIn("Signed in", self.message_text())
        self.assertEqual(list(self.stored_models()), ["chatgpt-gpt-4o"])
        self.dispatch("/chatgpt-auth --nonsense")
        self.assertIn(("error", "unknown option or argument: --nonsense"), self.messages)
        self.dispatch("/chatgpt-status --json")
        self.assertTrue(json.loads(self.message_text())["authenticated"])
        self.dispatch("/chatgpt-auth --device --source 'nonsense'")
        self.assertIn("--source must be auto, api, codex or official", self.message_text())

    def test_ctrl_c_returns_to_the_prompt(self):
        self.start_plugin()
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))

        def interrupt(_):
            time.sleep(0.1)
            # The system may deliver a signal to any thread. Python would handle one that another
            # thread received only when the main thread next wakes up.
            if POSIX:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            else:
                signal.raise_signal(signal.SIGINT)

        self.assertEqual(self.dispatch("/chatgpt-auth", browser=interrupt)[0], True)
        # The newline ends the line on which the terminal echoed ^C.
        self.assertEqual(self.messages[-1], ("warning", "\nInterrupted."))
        self.assertEqual(signal.getsignal(signal.SIGINT), signal.SIG_IGN)

    @needs_terminal
    def test_typed_lines_are_answered_and_not_echoed(self):
        import termios

        self.start_plugin()
        leader, follower = self.open_terminal()
        self.stdin = os.fdopen(follower)
        self.addCleanup(self.stdin.close)

        def local_flags():
            return termios.tcgetattr(follower)[3]

        before, urls = local_flags(), []
        for seconds in ("90", "60", "30"):
            arguments = (f"/chatgpt-auth --timeout {seconds}.3", urls.append)
            waiting = threading.Thread(target=self.dispatch, args=arguments, daemon=True)
            waiting.start()
            wait_for(lambda: "Ctrl-C to cancel" in self.message_text())
            wait_for(lambda: local_flags() == before & ~termios.ECHO)
            # After this pause, fewer than `seconds` are left. A typed line makes the plugin check.
            time.sleep(0.4)
            for line, answer in (
                ("/model gpt", "press Ctrl-C first to use another command"),
                ("hello", "only the URL that the browser ends on helps here"),
                ("http://localhost/?code=1", "That URL does not work: it must contain"),
            ):
                os.write(leader, line.encode() + b"\n")
                wait_for(lambda text=answer: text in self.message_text())
            self.assertEqual(re.findall(r"(\d+) seconds left", self.message_text()), [seconds])
            os.write(leader, authorization_response(urls[-1]).encode() + b"\n")
            waiting.join(WAIT_LIMIT)
            self.assertIn("Signed in", self.message_text())
            self.assertEqual(local_flags(), before)

    # The API key ----------------------------------------------------------------------------

    def test_the_stored_key_is_exported_unless_a_valid_one_is_set(self):
        for own_key, expected in (
            (None, "sk-1"),
            ("", "sk-1"),
            ("null", "sk-1"),
            (encode_jwt({"exp": 1}), "sk-1"),
            ("not a key", "sk-1"),
            ("sk-mine", "sk-mine"),
        ):
            with self.subTest(own_key):
                self.start_host()
                self.store(api_key="sk-1")
                if own_key is not None:
                    os.environ["CHATGPT_OAUTH_API_KEY"] = own_key
                self.load_plugin()
                self.assertEqual(self.exported_key(), expected)

    def test_signed_out_an_invalid_key_is_removed(self):
        self.start_host()
        os.environ["CHATGPT_OAUTH_API_KEY"] = "null"
        self.load_plugin()
        self.assertIsNone(self.exported_key())

    def test_the_key_follows_the_sign_in(self):
        self.start_plugin()
        os.environ["CHATGPT_OAUTH_API_KEY"] = "sk-mine"
        self.dispatch("/chatgpt-auth --timeout 0.1", browser=None)
        # The sign-in failed, so the key stays.
        self.assertEqual(self.exported_key(), "sk-mine")
        self.dispatch("/chatgpt-auth")
        self.assertEqual(self.exported_key(), self.stored()["api_key"])
        self.switch_account()
        self.dispatch("/chatgpt-auth")
        self.assertIsNone(self.exported_key())
        os.environ["CHATGPT_OAUTH_API_KEY"] = "sk-mine"
        self.dispatch("/chatgpt-status")
        self.assertEqual(self.exported_key(), "sk-mine")
        self.dispatch("/chatgpt-logout")
        self.assertIsNone(self.exported_key())

    def test_the_official_sign_in_leaves_the_key_alone(self):
        self.store(api_key="sk-1")
        self.start_plugin()
        self.puppy.settings["chatgpt_oauth_api_key"] = "sk-1"
        self.dispatch("/chatgpt-auth --official")
        self.assertNotIn("overrides", self.message_text())
        self.dispatch("/chatgpt-logout --official")
        self.assertIn("Signed out", self.message_text())
        self.assertEqual(self.exported_key(), "sk-1")

    def test_logout_removes_the_key_despite_a_broken_models_file(self):
        self.store(api_key="sk-1")
        self.models_file.write_text("[")
        self.start_plugin()
        self.dispatch("/chatgpt-logout")
        self.assertIn("not valid JSON", self.message_text())
        self.assertIsNone(self.exported_key())

    def test_status_picks_up_changes_by_another_program(self):
        self.store(api_key="sk-1")
        self.start_plugin()
        self.store(api_key="sk-2")
        self.dispatch("/chatgpt-status")
        self.assertEqual(self.exported_key(), "sk-2")
        # The replaced key came from the earlier sign-in.
        self.assertNotIn("another API key", self.message_text())
        self.assertEqual(self.puppy.reloads, 1)
        os.environ["CHATGPT_OAUTH_API_KEY"] = "sk-mine"
        self.dispatch("/codex-status")
        self.assertEqual(self.exported_key(), "sk-2")
        self.assertIn("CHATGPT_OAUTH_API_KEY held another API key", self.message_text())
        self.token_file.unlink()
        self.dispatch("/chatgpt-status")
        self.assertIsNone(self.exported_key())

    def test_a_host_setting_that_overrides_the_key_is_reported(self):
        for has_credentials, remedy in (
            (True, "run: code-puppy --setup auth logout CHATGPT_OAUTH_API_KEY"),
            (False, "type: /set chatgpt_oauth_api_key="),
        ):
            self.start_host()
            # Older releases don't have shared credentials.
            if not has_credentials:
                sys.modules["code_puppy.shared_credentials"] = None
            self.store(api_key="sk-1")
            self.load_plugin()
            self.puppy.settings["chatgpt_oauth_api_key"] = "sk-stale"
            for command in ("/chatgpt-status", "/chatgpt-auth"):
                self.dispatch(command)
                self.assertIn("setting chatgpt_oauth_api_key overrides", self.message_text())
                self.assertIn(remedy, self.message_text())
            self.puppy.settings["chatgpt_oauth_api_key"] = self.stored()["api_key"]
            self.dispatch("/chatgpt-status")
            self.assertNotIn("overrides", self.message_text())

    def test_an_old_release_ignores_the_key_setting(self):
        self.environ["CHATGPT_OAUTH_API_KEY"] = "sk-own"
        self.store(api_key="sk-1")
        self.start_plugin("old")
        self.puppy.settings["chatgpt_oauth_api_key"] = "sk-stale"
        self.dispatch("/chatgpt-status")
        self.assertNotIn("overrides", self.message_text())
        self.assertIn("held another API key", self.message_text())
        self.assertEqual(self.exported_key(), "sk-1")

    # Models ---------------------------------------------------------------------------------

    def test_models_lists_every_model(self):
        self.start_plugin()
        self.dispatch("/chatgpt-auth")
        self.puppy.model = "chatgpt-o3-pro"
        self.assertEqual(self.dispatch("/models")[0], True)
        names = ["synthetic", "chatgpt-gpt-4o", "chatgpt-o1-mini", "chatgpt-o3-pro (in use)"]
        self.assertEqual(self.message_text().split("\n"), names)

    def test_models_says_if_there_are_none(self):
        self.start_plugin()
        self.puppy.factory.ModelFactory.load_config = lambda: {}
        self.dispatch("/models")
        self.assertEqual(self.messages, [("info", "There are no models.")])

    def test_a_removed_model_that_is_in_use_is_reported(self):
        self.start_plugin()
        self.dispatch("/chatgpt-auth")
        self.puppy.model = "chatgpt-gpt-4o"
        self.switch_account()
        self.dispatch("/chatgpt-auth")
        self.assertIn("the model in use, chatgpt-gpt-4o, is no longer there", self.message_text())
        self.assertEqual(
            self.messages[-1][1], "hint: to choose another model, type: /model chatgpt-gpt-5.5"
        )
        self.puppy.model = "chatgpt-gpt-5.5"
        self.dispatch("/chatgpt-logout")
        self.assertIn("the model in use, chatgpt-gpt-5.5, is no longer there", self.message_text())
        self.assertIn("type: /model NAME", self.message_text())
        self.puppy.model = "synthetic"
        self.dispatch("/chatgpt-auth")
        self.dispatch("/chatgpt-logout")
        self.assertNotIn("/model", self.message_text())

    def test_a_chosen_model_that_is_gone_is_reported_at_startup(self):
        self.start_plugin()
        self.dispatch("/chatgpt-auth")
        self.messages.clear()
        on_startup = self.puppy.phases["startup"][0]
        for chosen in ("chatgpt-gpt-4o", "synthetic", None):
            self.puppy.settings["model"] = chosen
            on_startup()
            self.assertEqual(self.messages, [])
        # Another program replaces the entries. At its next start, the host chooses another model.
        self.puppy.model, self.puppy.settings["model"] = "synthetic", "chatgpt-gpt-4o"
        self.switch_account()
        self.assert_done(self.call("auth", "--no-browser", browser=visit))
        on_startup()
        self.assertIn("the model in use, chatgpt-gpt-4o, is no longer there", self.message_text())
        self.assertIn("That model may cost money.", self.message_text())
        self.assertIn("type: /model chatgpt-gpt-5.5", self.message_text())

    def test_an_old_release_refuses_the_official_sign_in(self):
        self.start_plugin("old")
        # The URL of a sign-in would be printed.
        self.assertEqual(self.dispatch("/chatgpt-auth --official"), (True, ""))
        self.assertIn("cannot use models that a ChatGPT plan pays for", self.message_text())
        self.assertIn("pip install --upgrade code-puppy", self.message_text())
        self.assertFalse((self.home / "chatgpt_plan.json").exists())

    def test_an_old_release_cannot_use_plan_models(self):
        self.start_plugin("old")
        self.double.organization = None
        self.dispatch("/chatgpt-auth")
        self.assertIn("cannot use models that a ChatGPT plan pays for", self.message_text())
        self.assertIn("pip install --upgrade code-puppy", self.message_text())
        self.assertNotIn("/model ", self.message_text())
        self.puppy.model = "chatgpt-gpt-5.5"
        self.dispatch("/chatgpt-logout")
        self.assertIn("the model in use, chatgpt-gpt-5.5, is no longer there", self.message_text())
        self.puppy.model = None
        self.start_plugin("new")
        self.dispatch("/chatgpt-auth")
        self.assertNotIn("pip", self.message_text())

    def test_an_old_release_has_no_responses_model_type(self):
        for release, kind in (("old", "custom_openai"), ("new", "custom_openai_responses")):
            self.start_plugin(release)
            self.dispatch("/chatgpt-auth")
            self.assertEqual(self.stored_models()["chatgpt-o3-pro"]["type"], kind)

    def test_an_old_release_can_use_the_models_that_another_program_imported(self):
        for account in ((), ("--account", "work")):
            self.assert_done(self.call("auth", "--no-browser", *account, browser=visit))
        theirs = {"chatgpt-theirs": {"type": "custom_openai_responses"}}
        stored = {**theirs, **self.stored_models()}
        self.models_file.write_text(json.dumps(stored))
        self.assertEqual(stored["chatgpt-work-o3-pro"]["type"], "custom_openai_responses")
        self.start_plugin("new")
        self.assertEqual(self.puppy.models(), {"synthetic": {}, **stored})
        for entry in stored.values():
            if "oauth_source" in entry:
                entry["type"] = "custom_openai"
        self.start_plugin("old")
        self.assertEqual(self.puppy.models(), {"synthetic": {}, **stored})
        self.call("models", "--account", "work")
        self.assertNotEqual(self.puppy.models(), {"synthetic": {}, **stored})
        self.dispatch("/chatgpt-status")
        self.assertEqual(self.puppy.models(), {"synthetic": {}, **stored})
        self.assertEqual([kind for kind, _ in self.messages], ["info"])

    def test_an_old_release_reports_entries_that_it_cannot_change(self):
        self.assert_done(self.call("auth", "--no-browser", browser=visit))
        before = self.models_file.read_bytes()
        (self.home / "chatgpt_models.json.lock").unlink()
        (self.home / "chatgpt_models.json.lock").mkdir()
        self.start_plugin("old")
        self.assertEqual([kind for kind, _ in self.messages], ["warning", "info"])
        self.assertIn("cannot lock ", self.message_text())
        self.assertEqual(self.models_file.read_bytes(), before)

    def test_files_are_in_the_directory_of_the_host(self):
        elsewhere = str(self.folder / "elsewhere")
        for release, name in (("old", "CONFIG_DIR"), ("new", "DATA_DIR")):
            self.start_host(release)
            setattr(self.puppy.config, name, f"{elsewhere}-{release}")
            os.environ["XDG_DATA_HOME"] = str(self.folder / "xdg")
            self.load_plugin()
            self.dispatch("/chatgpt-status")
            self.assertIn(f"{elsewhere}-{release}{os.sep}chatgpt_oauth.json", self.message_text())

    def test_a_model_that_another_program_removed_is_reported(self):
        self.start_plugin()
        self.dispatch("/chatgpt-auth")
        self.puppy.model = "chatgpt-gpt-4o"
        self.dispatch("/chatgpt-status")
        self.assertNotIn("no longer there", self.message_text())
        self.switch_account()
        self.call("auth", "--no-browser", browser=visit)
        self.dispatch("/chatgpt-status")
        self.assertIn("in use, chatgpt-gpt-4o, is no longer there", self.message_text())
        self.assertIn("That model may cost money", self.message_text())
        self.assertIn("type: /model chatgpt-gpt-5.5", self.message_text())

    # Places without a prompt -----------------------------------------------------------------

    def test_hints_name_the_installed_command(self):
        self.start_plugin()
        bin_directory = self.folder / "bin"
        bin_directory.mkdir()
        name = "chatgpt-oauth.cmd" if sys.platform == "win32" else "chatgpt-oauth"
        (bin_directory / name).write_text("")
        (bin_directory / name).chmod(0o755)
        plugin = self.plugin.CodePuppyPlugin(None)
        self.assertEqual(plugin.typed("auth --device"), "/chatgpt-auth --device")
        with mock.patch.object(sys, "orig_argv", ["/bin/python"], create=True):
            self.assertRegex(plugin.typed("models"), f"^{PYTHON} .*chatgpt_oauth.py.? models$")
        os.environ["PATH"] = str(bin_directory)
        self.assertEqual(plugin.typed("models"), "chatgpt-oauth models")
        for option in ("-p", "--prompt", "--prompt=hi", "--setup"):
            with mock.patch.object(sys, "argv", ["code-puppy", option, "x"]):
                plugin = self.plugin.CodePuppyPlugin(None)
            self.assertEqual(plugin.typed("auth --device"), "chatgpt-oauth auth --device")

    def test_nothing_is_printed_into_the_protocol_of_an_editor(self):
        with mock.patch.object(sys, "argv", ["code-puppy", "--acp"]):
            self.start_plugin()
        self.assertEqual(self.dispatch("/chatgpt-auth --timeout 0.1", browser=None), (True, ""))
        self.assertIn(self.double.url, self.message_text())
        for option in ("--device", "--no-browser"):
            self.assertEqual(self.dispatch(f"/chatgpt-auth {option}"), (True, ""))
            self.assertIn("an editor shows messages only after", self.message_text())
            self.assertIn("auth --device", self.message_text())
        self.puppy.common.should_suppress_browser = lambda: True
        self.assertEqual(self.dispatch("/chatgpt-auth"), (True, ""))
        self.assertIn("an editor shows messages only after", self.message_text())
        self.assertFalse(self.token_file.exists())

    def test_no_sign_in_begins_while_a_prompt_is_answered(self):
        self.start_plugin()
        self.puppy.is_paused = True
        self.assertEqual(self.dispatch("/chatgpt-auth"), (True, ""))
        self.assertIn("a prompt is being answered", self.message_text())
        self.assertIn("hint: when the answer is complete, run: /chatgpt-auth", self.message_text())
        self.dispatch("/chatgpt-status")
        self.assertIn("Not authenticated", self.message_text())

    def test_missing_host_functions_are_tolerated(self):
        self.start_host("old", builtin=False)
        del self.puppy.callbacks.unregister_callback
        del self.puppy.modules["code_puppy.agents"].get_current_agent
        self.load_plugin()
        self.assertEqual(self.dispatch("/chatgpt-status")[0], True)
        self.assertIn("Not authenticated", self.message_text())
        self.assertEqual(self.dispatch("/chatgpt-auth")[0], True)
        self.assertIn("Signed in", self.message_text())


class PuppyModelTest(PuppyCase):
    """Models that the ChatGPT plan pays for, built and called the way Code Puppy does it."""

    def setUp(self):
        super().setUp()
        self.start_host()
        self.headers = []
        patched = mock.patch.object(ResponsesModel, "backend", self.backend)
        patched.start()
        self.addCleanup(patched.stop)

    def backend(self, headers):
        """Answer like the Codex backend, which refuses a token that has expired or ended."""
        self.headers.append(headers)
        token = headers["Authorization"][7:]
        expiry = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))["exp"]
        if expiry < time.time() or token not in self.double.access_tokens:
            raise ModelHTTPError(401, "gpt-6", {"detail": "Unauthorized"})
        return [HELLO, COMPLETED]

    def answer_with(self, *answers):
        """Answer the next requests with `answers`: lists of chunks, or exceptions."""
        return mock.patch.object(ResponsesModel, "backend", mock.Mock(side_effect=answers))

    def build_model(self, **changes):
        """Load the plugin and return the model that the host builds for one of our entries."""
        self.load_plugin()
        entry = {"name": "gpt-6", "custom_endpoint": {"url": self.double.url + "/codex"}}
        entry = {"type": "chatgpt_oauth", **entry, **changes}
        entry = {name: value for name, value in entry.items() if value is not None}
        return self.puppy.model_handler()("chatgpt-gpt-6", entry, {})

    def send_requests(self, model, count=1, parameters=None):
        """Send `count` requests at the same time and return their results."""

        async def send_all():
            requests = (model.request([], None, parameters) for _ in range(count))
            return await asyncio.gather(*requests)

        return asyncio.run(send_all())

    def test_each_request_has_a_valid_token_of_the_current_account(self):
        self.store()
        model = self.build_model()
        self.assertEqual(self.send_requests(model), ["Hello"])
        self.store(lifetime=-10)
        self.assertEqual(self.send_requests(model, 3), ["Hello"] * 3)
        self.assertEqual(self.double.count("refresh"), 1)
        self.switch_account()
        self.double.residency = "eu"
        self.store()
        self.assertEqual(self.send_requests(model), ["Hello"])
        self.assertEqual(
            [h["ChatGPT-Account-Id"] for h in self.headers], ["acct-1"] * 4 + ["acct-2"]
        )
        residencies = [h.get("x-openai-internal-codex-residency") for h in self.headers]
        self.assertEqual(residencies, [None] * 4 + ["eu"])
        self.assertEqual(len({h["Authorization"] for h in self.headers}), 3)
        client = model.provider["openai_client"]
        # The host repeats failed requests itself.
        self.assertEqual(client["max_retries"], 0)
        self.assertEqual(client["http_client"]["verify"], "/bundle.pem")
        sent = client["http_client"]["headers"]
        self.assertEqual(sent["originator"], "codex_cli_rs")
        # A compressed answer could not be checked while it arrives.
        self.assertEqual(sent["Accept-Encoding"], "identity")
        self.assertEqual(
            sent["User-Agent"], f"codex_cli_rs/{oauth.CHATGPT_OAUTH_CONFIG['codex_client_version']}"
        )

    def test_the_exception_that_ends_a_prompt_can_be_pickled(self):
        # The host's DBOS plugin pickles exceptions.
        with self.assertRaises(Exception) as caught:
            self.send_requests(self.build_model())
        copy = pickle.loads(pickle.dumps(caught.exception))
        self.assertIsInstance(copy, InterruptedError)
        self.assertIn("not signed in (no tokens in ", str(copy))

    def test_a_401_leads_to_one_refresh_and_one_more_try(self):
        self.store()
        model = self.build_model()
        self.double.access_tokens.clear()
        self.assertEqual(self.send_requests(model, 3), ["Hello"] * 3)
        self.assertEqual(self.double.count("refresh"), 1)
        self.assertEqual(self.messages, [])

    def test_a_newer_stored_token_is_tried_after_a_401_before_a_refresh(self):
        self.store()
        model = self.build_model()

        def refuse_first_request(headers):
            if self.headers:
                return self.backend(headers)
            self.headers.append(headers)
            self.double.access_tokens.clear()
            # Another process stores a new token.
            self.store()
            raise ModelHTTPError(401, "gpt-6", None)

        with mock.patch.object(ResponsesModel, "backend", refuse_first_request):
            self.assertEqual(self.send_requests(model), ["Hello"])
        self.assertEqual((len(self.headers), self.double.count("refresh")), (2, 0))

    def test_a_second_401_ends_the_prompt_without_another_refresh(self):
        self.store()
        model = self.build_model()
        refused = ModelHTTPError(401, "gpt-6", {"detail": "no"})
        with self.answer_with(refused, refused, refused):
            self.assert_request_stops(model, "does not accept this sign-in", "/chatgpt-auth")
            self.assertEqual(self.double.count("refresh"), 1)
            self.assert_request_stops(model, "does not accept this sign-in")
        self.assertEqual(self.double.count("refresh"), 1)
        self.assertEqual(self.send_requests(model), ["Hello"])

    def test_a_refused_token_is_not_sent_again(self):
        self.store()
        model = self.build_model()
        self.double.access_tokens.clear()
        self.fault("refresh", 400, {"error": "unheard_of"})
        for refreshes in (1, 2):
            self.assert_request_stops(model, "unheard_of", "/chatgpt-auth")
            self.assertEqual((len(self.headers), self.double.count("refresh")), (1, refreshes))
        del self.double.faults["refresh"]
        self.assertEqual(self.send_requests(model), ["Hello"])
        self.assertEqual(len(self.headers), 2)

    def test_a_refresh_that_fails_before_a_401_is_reported_once(self):
        self.store(lifetime=200)
        model = self.build_model()
        self.double.access_tokens.clear()
        self.fault("refresh", 400, {"error": "unheard_of"})
        self.assert_request_stops(model, "unheard_of", "/chatgpt-auth")
        self.assertEqual(self.message_text().count("unheard_of"), 1)
        self.assertNotIn("still valid", self.message_text())
        self.assertEqual(self.double.count("refresh"), 1)

    def test_two_processes_do_not_refresh_in_turns_after_401s(self):
        self.store()
        model = self.build_model()
        refused = ModelHTTPError(401, "gpt-6", {"detail": "no"})
        with self.answer_with(refused, refused, refused):
            self.assert_request_stops(model, "does not accept this sign-in")
            # Another process refreshes after a 401, too.
            self.assertEqual(self.call("token", "--refresh").code, 0)
            self.assert_request_stops(model, "does not accept this sign-in")
        self.assertEqual(self.double.count("refresh"), 2)
        # As soon as a request is accepted, a 401 leads to a refresh again.
        self.assertEqual(self.send_requests(model), ["Hello"])
        self.double.access_tokens.clear()
        self.assertEqual(self.send_requests(model), ["Hello"])
        self.assertEqual(self.double.count("refresh"), 3)

    def test_a_refusal_names_the_command_for_its_own_sign_in(self):
        for options in ("", "--account work", "--official", "--account work --official"):
            arguments = ("auth", "--no-browser", *options.split())
            self.assert_done(self.call(*arguments, browser=visit))
        refused = ModelHTTPError(401, "gpt-6", {"detail": "no"})
        for build, account, command in (
            (self.build_model, None, "/chatgpt-auth"),
            (self.build_model, "work", "/chatgpt-auth --account work"),
            (self.build_official_model, None, "/chatgpt-auth --official"),
            (self.build_official_model, "work", "/chatgpt-auth --account work --official"),
        ):
            model = build(account=account)
            invalid = [events({"type": "error", "error": {"code": "user_invalid_user"}})]
            for answers in ((refused, refused), (invalid,)):
                answering = self.answer_with(*answers)
                with self.subTest(command), answering:
                    self.assert_request_stops(model, f"to sign in again, run: {command}")
                    self.assertEqual(self.message_text().splitlines()[-1].split(": ")[-1], command)

    def test_a_401_with_a_web_page_does_not_lead_to_a_refresh(self):
        self.store()
        model = self.build_model()
        with self.answer_with(ModelHTTPError(401, "gpt-6", "<html>sign in to the proxy")):
            self.assert_request_stops(model, "refused this request (HTTP 401)")
        self.assertEqual(self.double.count("refresh"), 0)

    def assert_request_stops(self, model, *words):
        """Check that a request shows one error and makes the host stop without a retry."""
        self.messages.clear()
        with self.assertRaises(Exception) as caught:
            self.send_requests(model)
        stop = caught.exception
        self.assertNotIsInstance(stop.__cause__ or stop.__context__, ModelHTTPError)
        self.assertEqual(type(stop).__name__, "PromptEnded")
        # Since Python 3.11 the exception is a group, and the host shows the text of the group.
        if hasattr(stop, "exceptions"):
            self.assertIsInstance(stop.exceptions[0], InterruptedError)
            self.assertEqual(str(stop.derive(stop.exceptions)), "see the error above")
        self.assertEqual([kind for kind, _ in self.messages].count("error"), 1)
        for word in words:
            self.assertIn(word, self.message_text())

    def test_each_prompt_has_the_token_of_its_entrys_account(self):
        stored = {"": self.store()}
        for number, name in enumerate(("a", "b"), 2):
            self.double.account = f"acct-{number}"
            stored[name] = self.store_account(name, lifetime=-10)
        self.environ["CHATGPT_OAUTH_ACCOUNT"] = "b"
        self.start_host()
        models = [self.build_model(account=name or None) for name in stored]
        for model in models * 2:
            self.assertEqual(self.send_requests(model), ["Hello"])
        sent = [each["ChatGPT-Account-Id"] for each in self.headers]
        self.assertEqual(sent, ["acct-1", "acct-2", "acct-3"] * 2)
        self.assertEqual(self.double.count("refresh"), 2)
        self.assertEqual(len({each["Authorization"] for each in self.headers}), 3)
        self.assertEqual(self.headers[0]["Authorization"][7:], stored[""]["access_token"])
        self.account_file("a").unlink()
        self.assert_request_stops(models[1], "not signed in", "run: /chatgpt-auth --account a")
        model = self.build_model(account="../a")
        self.assert_request_stops(model, "account must be 1 to 32 of a-z")

    def test_signed_out_nothing_is_sent(self):
        model = self.build_model()
        self.assert_request_stops(model, "not signed in (no tokens in ", "/chatgpt-auth")
        self.assertEqual(self.headers, [])

    def build_official_model(self, name="gpt-6-astra", account=None):
        """Return the host's model for an entry of the official sign-in."""
        self.load_plugin()
        entry = {"type": "chatgpt_plan", "name": name, "custom_endpoint": {"url": "https://x/v1"}}
        if account:
            entry["account"] = account
        return self.puppy.model_handler("chatgpt_plan")("chatgpt-plan-" + name, entry, {})

    def test_official_models_have_a_valid_token_at_each_request(self):
        err = self.assert_done(self.call("auth", "--official", "--no-browser", browser=visit)).err
        self.assertIn("Using ChatGPT plan", err)
        plan_file = self.home / "chatgpt_plan.json"
        model = self.build_official_model("gpt-6-astra")
        headers_sent = []

        def answer(headers):
            headers_sent.append(headers)
            return [COMPLETED]

        with mock.patch.object(ResponsesModel, "backend", answer):
            self.send_requests(model)
            first = json.loads(plan_file.read_text())
            expired = {"last_refresh": timestamp(0), "expires_at": timestamp(3600)}
            plan_file.write_text(json.dumps({**first, **expired, "earliest_refresh_at": ""}))
            self.send_requests(model, 3)
        renewed = json.loads(plan_file.read_text())
        tokens = [first["access_token"], *[renewed["access_token"]] * 3]
        self.assertEqual(headers_sent, [{"Authorization": f"Bearer {token}"} for token in tokens])
        self.assertNotEqual(first["access_token"], renewed["access_token"])
        self.assert_done(self.call("logout", "--official"))
        self.assert_request_stops(model, "not signed in (no tokens in ", "/chatgpt-auth --official")

    def test_plan_requests_are_adapted_to_the_api(self):
        tool = {"type": "function", "name": "list_files", "parameters": {}}
        search = {"type": "web_search"}
        refused = [*self.double.REFUSED.split(), "prompt_cache_options"]
        request = {
            **dict.fromkeys(refused, "x"),
            "input": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
            "tools": [tool, search, {"type": "code_interpreter"}],
            "tool_choice": {"type": "function", "name": "list_files"},
            "reasoning": {"effort": "low"},
        }
        tools_message = {"type": "additional_tools", "role": "developer", "tools": [tool]}
        self.assert_done(self.call("auth", "--official", "--no-browser", browser=visit))
        for name, moved_tools, tools in (
            ("gpt-5.5", [], [tool, search]),
            ("gpt-5", [], [tool, search]),
            ("gpt-4.1", [], [tool, search]),
            ("o3", [], [tool, search]),
            ("gpt-5.6", [tools_message], [search]),
            ("gpt-5.10", [tools_message], [search]),
            ("gpt-6-astra", [tools_message], [search]),
        ):
            answering = self.answer_with([COMPLETED])
            with self.subTest(name), answering:
                model = self.build_official_model(name)
                self.send_requests(model, parameters=request)
                sent = json.loads(model.sent)
                self.assertEqual(sent.pop("tools", None), tools)
                self.assertEqual(
                    sent,
                    {
                        "model": name,
                        "input": [
                            *moved_tools,
                            {"role": "developer", "content": "a"},
                            {"role": "user", "content": "b"},
                        ],
                        "tool_choice": "auto",
                        "reasoning": {"effort": "low"},
                        "store": False,
                        "stream": True,
                    },
                )
                # The host sends these two only for the types that it knows.
                self.assertEqual(model.settings["openai_reasoning_summary"], "auto")
                self.assertEqual(model.settings["openai_text_verbosity"], "medium")

    def test_a_chosen_summary_and_verbosity_are_sent(self):
        self.assert_done(self.call("auth", "--official", "--no-browser", browser=visit))
        model = self.build_official_model()
        chosen = {"summary": "detailed", "verbosity": "low"}
        with self.answer_with([COMPLETED]):
            asyncio.run(model.request([], chosen, None))
        self.assertEqual(model.settings["openai_reasoning_summary"], "detailed")
        self.assertEqual(model.settings["openai_text_verbosity"], "low")

    def test_an_invalid_setting_is_reported_at_the_request(self):
        os.environ["CHATGPT_OAUTH_CODEX_CLIENT_VERSION"] = "a b"
        self.assert_request_stops(self.build_model(), "CHATGPT_OAUTH_CODEX_CLIENT_VERSION must be")

    def test_final_refusals_are_reported_once_and_not_retried(self):
        self.store()
        model = self.build_model()
        resets = {"resets_in_seconds": 7300}
        for fault, words in (
            ({"code": "usage_limit_reached"}, ("usage limit is reached\n", "settings/usage")),
            ({"type": "usage_limit_reached", **resets}, ("; it resets in 2 hours 2 minutes (",)),
            # With a wrong clock, the distance to `resets_at` would be wrong.
            (
                {"code": "usage_limit_reached", "resets_at": 4, **resets},
                ("; it resets in 2 hours 2 minutes (",),
            ),
            ({"code": "usage_not_included"}, ("does not include this model", "another model")),
            (
                {"message": "The 'gpt-5.5' model is not supported when using Codex."},
                ("does not include this model", "choose another model"),
            ),
            ({"code": "credits_depleted"}, ("no credits left",)),
            ({"code": "insufficient_quota"}, ("no credits left",)),
            ({"code": "context_length_exceeded"}, ("too long for this model", "/compact")),
            ({"message": "It exceeds the context window."}, ("too long", "/clear")),
            ({"code": "subscription_sharing_user_not_eligible"}, ("does not let this",)),
            ({"code": "subscription_sharing_route_not_supported"}, ("pay for this request",)),
            ({"code": "subscription_sharing_unsupported_capability"}, ("pay for this request",)),
            ({"code": "subscription_sharing_usage_unavailable"}, ("cannot check your", "later")),
            ({"code": "subscription_sharing_user_unavailable"}, ("cannot use your", "later")),
            (
                {"code": "subscription_sharing_workplace_individual_usage_limit_exceeded"},
                ("usage limit for you", "ask your workspace administrator"),
            ),
            ({"code": "invalid_prompt"}, ("refused this prompt", "rephrase it")),
            ({"code": "subscription_sharing_invalid_user"}, ("to sign in again", "/chatgpt-auth")),
            (
                {"code": "chatpass_v2_invalid_authorization_context"},
                ("to sign in again", "/chatgpt-auth"),
            ),
            ({"code": "chatpass_v2_scope_not_authorized"}, ("Security and login",)),
        ):
            failed = {"type": "response.failed", "response": {"error": fault}}
            for answer in (
                ModelHTTPError(429, "gpt-6", fault),
                [HELLO, events(failed)],
                [HELLO, events({"type": "error", "error": fault})],
                [HELLO, events({**fault, "type": "error", "code": fault.get("code")})],
            ):
                # In a stream, `type` is the type of the event.
                if isinstance(answer, list) and "type" in fault:
                    continue
                answering = self.answer_with(answer)
                with self.subTest(fault), answering:
                    self.assert_request_stops(model, *words)

    def test_the_host_gets_a_503_after_a_temporary_failure(self):
        self.store()
        model = self.build_model()
        overloaded = {"code": "server_is_overloaded", "message": "We are overloaded."}
        split = HELLO + events({"type": "response.failed", "response": {"error": overloaded}})
        for chunks, reason in (
            ([split[:70], split[70:]], "We are overloaded."),
            ([events({"type": "error", "error": {"code": "server_error"}})], "server_error"),
            ([events({"type": "error", "message": "Slow down."})], "Slow down."),
            ([HELLO], "the connection ended early"),
            ([HELLO, b"data: [DONE]\n\n"], "the answer ended early"),
            ([], "the connection ended early"),
        ):
            self.messages.clear()
            answering = self.answer_with(chunks)
            with self.subTest(reason), answering:
                with self.assertRaises(ModelHTTPError) as caught:
                    self.send_requests(model)
                self.assertEqual(caught.exception.status_code, 503)
                expected = [("warning", f"the answer is incomplete: {reason}")]
                self.assertEqual(self.messages, expected)

    def test_an_answer_that_openai_cuts_short_is_reported(self):
        self.store()
        model = self.build_model()
        for reason, words in (
            ("max_output_tokens", "it reached the maximum length"),
            ("content_filter", "OpenAI's content filter ended it"),
            ("new_reason", "the answer is incomplete: new_reason"),
        ):
            response = {"incomplete_details": {"reason": reason}}
            event = {"type": "response.incomplete", "response": response}
            answering = self.answer_with([HELLO, events(event)])
            with self.subTest(reason), answering:
                self.assert_request_stops(model, words)

    def test_an_answer_can_mention_errors(self):
        self.store()
        model = self.build_model()
        part = {"type": "response.output_text.delta", "delta": 'say "error" or "response.failed"'}
        done = events(part) + b"data: not JSON\r\n\r\n" + COMPLETED.strip()
        with self.answer_with([done]):
            self.assertEqual(len(self.send_requests(model)), 1)

    def test_a_failure_after_the_completion_is_ignored(self):
        self.store()
        model = self.build_model()
        failed = events({"type": "response.failed", "response": {"error": {"code": "x"}}})
        with self.answer_with([HELLO, COMPLETED + failed]):
            self.assertEqual(self.send_requests(model), ["Hello"])
        self.assertEqual(self.messages, [])

    def test_a_refused_request_is_reported_with_its_reason_and_a_hint(self):
        self.store()
        model = self.build_model()
        for status, hint in (
            (403, "/chatgpt-status --online"),
            (400, "hint: try again later; if that does not help, "),
        ):
            for body, reason in (
                ({"message": "Unsupported: x"}, "Unsupported: x"),
                ({"detail": "Not here."}, "Not here."),
                ({"message": "<html>"}, f"HTTP {status}"),
                ("<html>", f"HTTP {status}"),
                (None, f"HTTP {status}"),
            ):
                answering = self.answer_with(ModelHTTPError(status, "gpt-6", body))
                with self.subTest(status=status, body=body), answering:
                    shown = f"OpenAI refused this request ({reason})\n"
                    self.assert_request_stops(model, shown, hint)

    def test_a_model_that_cannot_be_built_refuses_at_the_request(self):
        self.store()
        for changes in ({"custom_endpoint": None}, {"name": None}, {"custom_endpoint": "x"}):
            model = self.build_model(**changes)
            self.assertIsNotNone(model)
            self.assert_request_stops(model, "chatgpt-gpt-6 cannot be used here", " models")
        del self.puppy.modules["code_puppy.chatgpt_codex_client"].create_codex_async_client
        model = self.build_model()
        self.assert_request_stops(model, "cannot be used here", "create_codex_async_client")
        self.assertEqual(self.headers, [])

    def test_no_token_goes_to_an_endpoint_without_tls(self):
        self.store()
        model = self.build_model(custom_endpoint={"url": "http://example.com/codex"})
        reason = "the custom_endpoint of chatgpt-gpt-6 must be an https URL"
        self.assert_request_stops(model, reason)
        self.assertEqual(self.headers, [])

    def test_plan_models_use_the_profile_of_the_host(self):
        self.store()
        self.assertEqual(self.build_model().profile, "profile of gpt-6")
        self.assertEqual(self.messages, [])
        del self.puppy.factory._thinking_tags_profile
        model = self.build_model()
        self.assertIn("may forget its reasoning", self.message_text())
        self.assertEqual(self.send_requests(model), ["Hello"])

    def test_an_editor_gets_the_refusal_as_an_error_text(self):
        with mock.patch.object(sys, "argv", ["code-puppy", "--acp"]):
            model = self.build_model()
            with self.assertRaises(RuntimeError) as caught:
                self.send_requests(model)
        self.assertIn("not signed in", str(caught.exception))
        self.assertIn("/chatgpt-auth", str(caught.exception))
        self.assertEqual(self.messages, [])

    def test_a_failed_refresh_is_tried_again_after_30_seconds(self):
        self.store(lifetime=200)
        model = self.build_model()
        self.fault("refresh", 503)
        start = time.monotonic()
        for seconds, refreshes in ((0, 1), (29, 1), (31, 2), (59, 2), (62, 3)):
            with mock.patch("time.monotonic", lambda now=start + seconds: now):
                self.assertEqual(self.send_requests(model), ["Hello"])
            self.assertEqual(self.double.count("refresh"), refreshes)
        self.assertEqual(len(self.messages), 2)
        # Without a valid token, each prompt tries a refresh.
        self.double.access_tokens.clear()
        self.fault("refresh", 400, {"error": "unheard_of"})
        for refreshes in (4, 5):
            self.assert_request_stops(model, "unheard_of")
            self.assertEqual(self.double.count("refresh"), refreshes)

    def test_a_failed_refresh_is_reported_once_until_one_succeeds(self):
        model = self.build_model()
        self.plugin.REFRESH_PAUSE = 0
        for _ in range(2):
            self.store(lifetime=200)
            self.fault("refresh", 503)
            self.messages.clear()
            for _ in range(2):
                self.assertEqual(self.send_requests(model), ["Hello"])
            using = ("info", "Using the current token, which is still valid.")
            self.assertEqual([self.messages[0][0], *self.messages[1:]], ["warning", using])
            del self.double.faults["refresh"]
            self.assertEqual(self.send_requests(model), ["Hello"])

    def test_a_failed_refresh_is_reported_once_for_each_account(self):
        self.store(lifetime=200)
        self.store_account("work", lifetime=200)
        models = [self.build_model(), self.build_model(account="work")]
        self.double.faults["refresh"] = respond_with(503)
        for _ in range(2):
            for model in models:
                self.assertEqual(self.send_requests(model), ["Hello"])
        self.assertEqual([kind for kind, _ in self.messages], ["warning", "info"] * 2)

    def test_a_prompt_that_waits_for_a_refresh_says_so(self):
        self.store(lifetime=-10)
        model = self.build_model()
        self.double.delay = 1.0
        with mock.patch.object(self.plugin, "SILENT_WAIT", 0.1):
            self.assertEqual(self.send_requests(model), ["Hello"])
        self.assertEqual(self.messages, [("info", "Waiting for OpenAI to refresh the sign-in...")])

    def test_without_plan_permission_nothing_is_sent(self):
        self.double.plan_allowed = False
        err = self.call("auth", "--official", "--no-browser", browser=visit).err
        self.assertIn("Signed in as ada@example.com", err)
        model = self.build_official_model("gpt-6-astra")
        self.assert_request_stops(model, "was not allowed", "/chatgpt-auth --official")
        self.assertEqual(self.headers, [])

    def test_408_409_425_429_and_5xx_are_left_to_the_host(self):
        self.store()
        model = self.build_model()
        for status in (408, 409, 425, 429, 500):
            for body in (None, {"code": "rate_limit"}):
                error = ModelHTTPError(status, "gpt-6", body)
                answering = self.answer_with(error)
                with self.subTest(status=status, body=body), answering:
                    with self.assertRaises(ModelHTTPError) as caught:
                        self.send_requests(model)
                    self.assertIs(caught.exception, error)
        self.assertEqual(self.messages, [])

    def test_every_other_4xx_status_ends_the_prompt(self):
        self.store()
        model = self.build_model()
        for status in (400, 402, 403, 404, 407, 410, 424, 426, 428, 430, 499):
            answering = self.answer_with(ModelHTTPError(status, "gpt-6", None))
            with self.subTest(status), answering:
                self.assert_request_stops(model, "OpenAI refused this request")


# ---------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------


class MainTest(Case):
    def test_every_command_has_help(self):
        result = self.run_program()
        self.assertEqual((result.code, result.out), (2, ""))
        self.assertIn("examples:", result.err)
        text = self.assert_quiet(self.run_program("-h")).out
        # The path has a percent sign, which argparse would interpret.
        program = self.folder / "100% ours" / "c.py"
        program.parent.mkdir()
        shutil.copy(PROGRAM, program)
        start = [sys.executable, str(program)]
        helps = run_in_parallel(lambda each: self.run_command([*start, each, "-h"]), COMMANDS)
        for aliases in ("login, signin", "whoami", "signout"):
            self.assertIn(f" (also: {aliases})\n", text)
        for command, result in zip(COMMANDS, helps):
            self.assertIn(f"  {command}", text)
            output = self.assert_quiet(result).out
            usage = f"usage: {PYTHON} {quoted_path(program)} {command} [options]"
            self.assertEqual(output[: len(usage)], usage)
            self.assertRegex(output, "examples:|profile")
            lines = [line for line in output.splitlines() if self.folder.name not in line]
            self.assertLessEqual(max(map(len, lines)), 80)
        self.assertEqual(self.run_program("--version").out, f"chatgpt_oauth {oauth.__version__}\n")

    def test_bad_settings_do_not_stop_the_help(self):
        self.environ.update(CHATGPT_OAUTH_ISSUER="nonsense", CHATGPT_OAUTH_API_KEY_ENV_VAR="1 2")
        for arguments in (["-h"], ["help", "env"], *([command, "-h"] for command in COMMANDS)):
            with self.subTest(arguments):
                self.assertIn("usage: ", self.assert_quiet(self.call(*arguments)).out)
        self.assert_fails(self.call("env"), 2, "CHATGPT_OAUTH_ISSUER")

    def test_a_missing_standard_module_is_named(self):
        code = """
import runpy
sys.frozen = True
sys.modules["{0}"] = None
runpy.run_path({1!r}, run_name="__main__")
"""
        self.store(lifetime=-10)
        for module, command in (
            ("json", "status"),
            ("urllib.request", "token"),
            ("http.server", "auth"),
        ):
            with self.subTest(module):
                running = self.start_python(code.format(module, PROGRAM), command)
                result = running.result()
                self.assertEqual((result.code, result.out), (1, ""), result.err)
                error, hint = result.err.splitlines()[-2:]
                self.assertEqual(error, f"error: this Python has no module {module}")
                self.assertIn("hint: install a complete Python", hint)

    def test_missing_original_arguments_do_not_crash(self):
        code = "import chatgpt_oauth; sys.orig_argv = []; sys.argv[1:] = ['env']; "
        result = self.start_python(code + "chatgpt_oauth.run_program()").result()
        self.assert_fails(result, 3, "not signed in", one_line=True)

    def test_a_hint_needs_no_further_import(self):
        code = """
import chatgpt_oauth
class NoModules:
    def find_spec(self, name, *_):
        raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, NoModules())
sys.argv[0] = "a folder/c.py"
chatgpt_oauth.run_program()
"""
        result = self.start_python(code, "token").result()
        self.assert_fails(
            result, 3, f"to sign in, run: {PYTHON} {quoted_path('a folder/c.py')} auth\n"
        )

    def test_an_old_python_reports_the_required_version(self):
        found = [
            path
            for version in ("2.7", "3.6", "3.7")
            for path in pathlib.Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
        ]
        if not found:
            self.skipTest("there is no older Python here")
        for python in found:
            result = self.run_command([str(python), PROGRAM, "status"])
            self.assertEqual((result.code, result.out), (1, ""))
            self.assertIn("PYTHON_3_8_OR_LATER_IS_NEEDED", result.err)

    def test_usage_errors_name_the_mistake(self):
        self.assert_fails(self.call("stauts"), 2, "stauts", "status")
        self.assert_fails(self.call("xyzzy"), 2, "--help")
        self.assert_fails(
            self.call("auth", "--devise"), 2, "--devise", "did you mean: ", "--device"
        )
        self.assert_fails(self.call("status", "--jsn"), 2, "--jsn", "did you mean: ", "--json")
        # --local is the only option with a similar spelling, but it does something else.
        err = self.assert_fails(self.call("logout", "--all"), 2, "logout --help").err
        self.assertNotIn("--local", err)
        self.assert_fails(self.call("auth", "--dev"), 2, "unknown option or argument: --dev")
        self.assert_fails(self.call("auth", "xyzzy"), 2, "xyzzy", "auth --help")
        self.assert_fails(self.call("auth", "--timeout"), 2, "--timeout", "auth --help")
        self.assert_fails(self.call("auth", "--timeout", "--device"), 2, "--timeout", "auth --help")
        for seconds in ("x", "", "0", "inf"):
            self.assert_fails(self.call("auth", "--timeout", seconds), 2, "--timeout")
        self.assert_fails(self.call("models", "--source", "x"), 2, "--source")
        self.assert_fails(self.call("token", "--api-key", "--refresh"), 2, "--api-key")
        self.assert_fails(self.call("token", "--api-key", "--json"), 2, "--api-key")

    def test_aliases_work(self):
        self.assertEqual(self.call("whoami"), self.call("status"))
        self.assertEqual(self.call("login", "--no-browser", browser=visit).code, 0)
        self.assertEqual(self.call("signin", "--no-browser", browser=visit).code, 0)
        self.assertEqual(self.call("signout").code, 0)
        self.assertFalse(self.token_file.exists())
        self.assertEqual(self.call("-V"), self.call("--version"))
        for arguments in (["help"], ["help", "help"], ["--help"]):
            self.assertEqual(self.call(*arguments), self.call("-h"))
        self.assertEqual(self.call("help", "login"), self.call("auth", "-h"))
        self.assert_fails(self.call("help", "stauts"), 2, "did you mean: ", "status")

    def test_an_option_can_have_an_equals_sign(self):
        self.store(api_key="sk-1")
        self.assertEqual(self.call("env", "--shell=fish"), self.call("env", "--shell", "fish"))
        self.assertIn("set -gx", self.call("env", "--shell=fish").out)

    @needs_sh
    def test_a_closed_or_full_output_does_not_crash(self):
        fields = self.store(api_key="sk-1")
        line = shlex.join(PROGRAM_COMMAND)
        token = fields["access_token"] + "\n"
        cases = {
            f"{line} token 2>&-": token + "0\n",
            f"{line} token 2>/dev/full": token + "0\n",
            f"{line} token >&-": "0\n",
            f"{line} token >&- 2>&-": "0\n",
            f"HOME=/none {line} token 2>/dev/full": "3\n",
        }
        for code, result in zip(
            cases, run_in_parallel(lambda c: self.run_shell(c + "; echo $?"), cases)
        ):
            with self.subTest(code):
                has_device = os.path.exists("/dev/full")
                self.require(has_device or "/dev/full" not in code, "no /dev/full here")
                self.assertEqual(result.out, cases[code])
        self.assertNotIn("Traceback", self.run_shell(f"{line} status | true").err)
        self.require(os.path.exists("/dev/full"), "no /dev/full here")
        with open("/dev/full", "w") as full:
            result = self.run_program("env", stdout=full)
        self.assertEqual(result.code, 6)
        self.assertNotIn("Traceback", result.err)

    @unittest.skipUnless(hasattr(sys, "orig_argv"), "needs Python 3.10 with sys.orig_argv")
    @unittest.skipUnless(POSIX, "Windows doesn't run a symlink as a program")
    def test_a_hint_names_the_python_that_was_started(self):
        (self.folder / "python3.99").symlink_to(sys.executable)
        environ = {"PATH": str(self.folder) + os.pathsep + PATH}
        err = self.run_command(["python3.99", PROGRAM, "token"], environ).err
        self.assertIn(f"run: python3.99 {quoted_path(PROGRAM)} auth", err)

    @unittest.skipIf(POSIX, "only Windows has the launcher py")
    def test_a_hint_names_py_if_it_is_there(self):
        (self.folder / "py.exe").touch()
        environ = {"PATH": str(self.folder) + os.pathsep + PATH}
        err = self.run_command([sys.executable, PROGRAM, "token"], environ).err
        self.assertIn(f"run: py {quoted_path(PROGRAM)} auth", err)

    def test_the_program_runs_as_a_module_a_zip_a_copy_and_from_a_pipe(self):
        import zipfile

        self.store(api_key="sk-1")
        archive = self.folder / "x.zip"
        with zipfile.ZipFile(archive, "w") as packed:
            packed.write(PROGRAM, "__main__.py")
        renamed = self.folder / "my oauth"
        shutil.copy(PROGRAM, renamed)
        self.environ["PYTHONPATH"] = str(pathlib.Path(PROGRAM).parent)
        for command, stdin, name in (
            (["-m", "chatgpt_oauth"], None, f"{PYTHON} -m chatgpt_oauth"),
            ([str(archive)], None, f"{PYTHON} {quoted_path(archive)}"),
            ([str(renamed)], None, f"{PYTHON} {quoted_path(renamed)}"),
            (["-"], PROGRAM, f"{PYTHON} chatgpt_oauth.py"),
        ):
            with self.subTest(name), open(stdin or os.devnull) as source:
                out = self.run_command([sys.executable, *command, "env"], stdin=source).out
                self.assertIn("sk-1", out)
                source.seek(0)
                err = self.run_command([sys.executable, *command], stdin=source).err
                self.assertIn(f"{name} auth", err)
        with zipfile.ZipFile(archive, "w") as packed:
            packed.write(PROGRAM, "chatgpt_oauth.py")
        start = [sys.executable, "-m", "chatgpt_oauth", "logot"]
        environ = {"PYTHONPATH": str(archive)}
        err = self.run_command(start, environ, cwd=str(self.folder)).err
        self.assertTrue(err.endswith(f"did you mean: {PYTHON} -m chatgpt_oauth logout\n"), err)


# ---------------------------------------------------------------------------------------------
# The numbers: every limit, time and default of the program
# ---------------------------------------------------------------------------------------------


class FakeClock:
    """A stand-in for the `time` module. Its clock moves only when the program waits.

    A call of sleep() moves the clock and returns at once. `pauses` lists the seconds of these
    calls, and `elapsed` is the sum of all waits in seconds.

    A wait for a future takes real time, except while `silence` holds a request. Then it moves the
    clock by its timeout. With `skips_waits`, every wait for a future does that, and the clock moves
    `speed` times as far.
    """

    def __init__(self, skips_waits=False, speed=1):
        self.start, self.elapsed, self.pauses = int(time.time()), 0.0, []
        self.skips_waits, self.speed, self.is_silent = skips_waits, speed, False

    def __getattr__(self, name):
        return getattr(time, name)

    def time(self):
        return self.start + self.elapsed

    def monotonic(self):
        return 1000.0 + self.elapsed

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.elapsed += seconds
        # Wait for the end of the held request. Otherwise the next one would time out, too.
        wait_for(lambda: not self.is_silent)

    def wait(self, futures, timeout=None, return_when=concurrent.futures.ALL_COMPLETED):
        """Wait for futures, in place of concurrent.futures.wait()."""
        real_timeout = timeout
        if self.is_silent:
            real_timeout = 0
        if self.skips_waits:
            # This is long enough for a response that is on its way.
            real_timeout = 0.0005
        done = WAIT_FOR_FUTURES(futures, real_timeout, return_when)
        if done.not_done and (self.skips_waits or self.is_silent):
            self.elapsed += timeout * self.speed
        return done

    def silence(self, handler, _):
        """Keep a client waiting until it hangs up. This is a fault for the double."""
        self.is_silent = True
        handler.connection.recv(1)
        self.is_silent = False
        return True

    @contextlib.contextmanager
    def installed(self):
        """Make the program in this process use this clock."""
        waiting = mock.patch.object(concurrent.futures, "wait", self.wait)
        with mock.patch.object(oauth, "time", self), waiting:
            yield


# The real function, which FakeClock.installed() replaces.
WAIT_FOR_FUTURES = concurrent.futures.wait


class SpecificationTest(Case):
    """The numbers that users, servers and other programs can observe, with their shipped values."""

    # The contract's table of settings. `home` and `account` have no fixed default.
    DEFAULTS = {
        "issuer": "https://auth.openai.com",
        "client_id": "app_EMoamEEZ73f0CkXaXp7hrann",
        "scope": "openid profile email offline_access",
        "redirect_host": "http://localhost",
        "redirect_path": "auth/callback",
        "required_port": 1455,
        "fallback_port": 1457,
        "callback_bind": "",
        "callback_timeout": 120,
        "api_base_url": "https://api.openai.com",
        "codex_base_url": "https://chatgpt.com/backend-api/codex",
        "usage_url": "https://chatgpt.com/backend-api/wham/usage",
        "codex_client_version": "0.171.0",
        "home": None,
        "account": "",
        "prefix": "chatgpt-",
        "default_context_length": None,
        "model_patterns": "gpt-*,o1-*,o3-*",
        "model_excludes": "*-audio*,*-image*,*-realtime*,*-transcribe*,*-tts*",
        "chat_patterns": "gpt-3*,gpt-4*",
        "model_source": "auto",
        "workspace": "",
        "agent_name": "Code Puppy (chatgpt_oauth)",
        "originator": "chatgpt_oauth",
        "request_timeout": 30,
        "retry_window": 20,
        "lock_timeout": 60,
        "api_key_env_var": "CHATGPT_OAUTH_API_KEY",
    }

    # The shipped values of constants whose effect a test could see only on some systems or after a
    # long time.
    CONSTANTS = {
        # A browser command that fails later isn't reported.
        "BROWSER_WATCH": 2.0,
        # A connection that sends no complete request is closed after this time.
        "HEAD_TIMEOUT": 10.0,
        # At exit, the program waits for a refresh in a thread: the request timeout and this.
        "EXIT_GRACE": 5.0,
        # A child process that doesn't greet is replaced after this time.
        "GREETING_TIMEOUT": 10.0,
        # Only Windows denies access to a file that another program has open.
        "SHARING_SECONDS": 5.0,
        # Code Puppy needs this long to show a message.
        "MESSAGE_PAUSE": 0.05,
        # On Windows, Ctrl-C may take this long, because nothing can interrupt a wait there.
        "WAIT_SLICE": 0.05,
        # If an address of a host does not answer, the next one is tried after this time.
        "ATTEMPT_DELAY": 0.25,
        # The bit in the mode of a Windows console that turns on escape sequences.
        "ESCAPES": 4,
        # Code Puppy says that it waits for a refresh after this time.
        "SILENT_WAIT": 2.0,
    }

    def setUp(self):
        super().setUp()
        # The fake clock skips waits, so nothing has to be shortened.
        self.waits = {}
        del self.environ["CHATGPT_OAUTH_RETRY_WINDOW"]

    def store_expiring(self, clock, left, life=864000, **changes):
        """Store an access token with a life of `life` seconds, of which `left` remain."""
        access = encode_jwt({"exp": clock.start + left, "jti": secrets.token_hex(4)})
        refreshed = timestamp(clock.start + left - life)
        return self.store(access_token=access, last_refresh=refreshed, **changes)

    def refreshes(self, clock):
        """Run `token` and return how many refresh requests it made."""
        before = self.double.count("refresh")
        self.assert_quiet(self.call_at(clock, "token"))
        return self.double.count("refresh") - before

    # Settings -----------------------------------------------------------------------------

    def test_every_setting_has_its_documented_default(self):
        code = "import json, chatgpt_oauth; print(json.dumps(chatgpt_oauth.CHATGPT_OAUTH_CONFIG))"
        out = self.assert_quiet(self.start_python(code).result()).out
        self.assertEqual(json.loads(out), self.DEFAULTS)

    def test_constants_have_their_shipped_values(self):
        code = (
            "import json, chatgpt_oauth as oauth; "
            "print(json.dumps([getattr(oauth, name) for name in sys.argv[1:]]))"
        )
        out = self.assert_quiet(self.start_python(code, *self.CONSTANTS).result()).out
        self.assertEqual(json.loads(out), list(self.CONSTANTS.values()))

    def test_a_setting_beyond_its_bounds_is_refused(self):
        seconds = (
            ("0.001", "86400", "0.123456789", "000000030"),
            ("0.0009", "0", "86400.1", "0.1234567890", "0000000030"),
        )
        port = ("1", "65535"), ("0", "65536")
        # Each setting has values that are accepted and values that are refused.
        for key, (accepted, refused) in {
            "callback_timeout": seconds,
            "request_timeout": seconds,
            "retry_window": seconds,
            "lock_timeout": seconds,
            "required_port": port,
            "fallback_port": port,
            "issuer": (
                ("https://a:65535", f"https://{'a' * 63}.b", "https://[::1]:1", "http://[::1]:1"),
                ("https://a:65536", "https://a:0", f"https://{'a' * 64}.b"),
            ),
            "prefix": (("p" * 128,), ("", "p" * 129)),
            "codex_client_version": (("1", "1" * 64), ("", "1" * 65)),
            "default_context_length": (("1", "1000000000"), ("0", "1000000001")),
            "workspace": (("", "w" * 128), ("w" * 129,)),
            "agent_name": (("a", "a" * 100), ("", "a" * 101)),
        }.items():
            name = "CHATGPT_OAUTH_" + key.upper()
            for value, exit_code in (*((v, 3) for v in accepted), *((v, 2) for v in refused)):
                with self.subTest(key, value=value):
                    result = self.call("status", environ={name: value})
                    self.assertEqual(result.code, exit_code, result.err)
                    refusal = f"error: {name} must be"
                    self.assertEqual(refusal in result.err, exit_code == 2, result.err)

    # Tokens -------------------------------------------------------------------------------

    def test_a_refresh_is_due_300_seconds_before_the_end_or_at_half_the_life(self):
        for life, left, due in (
            (864000, 301, 0),
            (864000, 300, 1),
            (600, 301, 0),
            (600, 300, 1),
            (598, 300, 0),
            (598, 299, 1),
            (400, 201, 0),
            (400, 200, 1),
            (10, 6, 0),
            (10, 5, 1),
        ):
            with self.subTest(life=life, left=left):
                clock = FakeClock()
                self.store_expiring(clock, left, life)
                self.assertEqual(self.refreshes(clock), due)

    def test_a_token_without_a_date_expires_eight_days_after_the_last_refresh(self):
        for age, due in ((8 * 86400 - 301, 0), (8 * 86400 - 300, 1)):
            with self.subTest(age):
                clock = FakeClock()
                self.store(access_token="opaque", last_refresh=timestamp(clock.start - age))
                self.assertEqual(self.refreshes(clock), due)

    def test_a_token_is_valid_until_the_second_it_expires(self):
        self.fault("refresh", 500)
        for left, exit_code in ((1, 0), (0, 5)):
            with self.subTest(left):
                clock = FakeClock()
                self.store_expiring(clock, left)
                self.assertEqual(self.call_at(clock, "token").code, exit_code)

    def test_dates_end_with_the_year_3000(self):
        self.store(access_token=encode_jwt({"exp": 99999999999}))
        report = json.loads(self.call("status", "--json").out)
        self.assertEqual(report["access_token_expires_at"], "3000-12-31T23:59:59Z")

    def test_the_largest_time_in_a_token_is_eleven_digits(self):
        # An expiry that isn't plausible is unknown, and the token is refreshed.
        for expiry, due in ((99999999999, 0), (100000000000, 1)):
            with self.subTest(expiry):
                clock = FakeClock()
                access = encode_jwt({"exp": expiry, "jti": str(expiry)})
                self.store(access_token=access, last_refresh=None)
                self.assertEqual(self.refreshes(clock), due)

    def test_an_id_token_can_have_expired_300_seconds_ago(self):
        self.environ["CHATGPT_OAUTH_CALLBACK_TIMEOUT"] = "5"
        for ago, exit_code in ((300, 0), (301, 1)):
            with self.subTest(ago):
                clock = FakeClock()
                self.double.id_token_changes = {"exp": clock.start - ago}
                result = self.call_at(clock, "auth", "--official", "--no-browser", browser=visit)
                self.assertEqual(result.code, exit_code, result.err)
                self.assertEqual("hint: check this computer's clock" in result.err, exit_code == 1)

    def test_a_claim_that_is_not_text_is_unknown(self):
        for claim in (5, True, "", [], ["x"], {"x": 1}, None):
            with self.subTest(claim):
                auth = {"chatgpt_plan_type": claim, "organizations": [{"id": claim}]}
                access = encode_jwt({"exp": int(time.time()) + 9999})
                claims = {"email": claim, AUTH_CLAIM: auth}
                self.store(access_token=access, id_token=encode_jwt(claims))
                report = json.loads(self.call("status", "--json").out)
                for name in ("email", "plan", "organization_id"):
                    self.assertIsNone(report[name])

    # Requests -----------------------------------------------------------------------------

    def test_a_request_takes_30_seconds_and_a_revocation_10(self):
        clock = FakeClock()
        self.store_expiring(clock, 0)
        self.double.faults["refresh"] = self.double.faults["revoke"] = clock.silence
        self.assert_fails(self.call_at(clock, "token"), 5, " in 30 s\n")
        # The program waits in slices of 0.05 seconds and notices the deadline after the last one.
        self.assertAlmostEqual(clock.elapsed, 30.05)
        self.assertIn(" in 10 s\n", self.call_at(clock, "logout").err)

    def test_retries_wait_longer_each_time_or_as_long_as_retry_after(self):
        for header, code, pauses in (
            ({}, 5, [0.5, 1, 2, 4, 4, 4, 4]),
            ({"Retry_After": 3}, 5, [3, 3, 3, 4, 4]),
            ({"Retry_After": 20}, 5, [20]),
            ({"Retry_After": 21}, 5, []),
            ({"Retry_After": 999999999}, 5, []),
        ):
            with self.subTest(header):
                clock = FakeClock()
                self.store_expiring(clock, 0)
                self.fault("refresh", 503, **header)
                self.double.requests.clear()
                self.assert_fails(self.call_at(clock, "token"), code)
                self.assertEqual(clock.pauses, pauses)
                self.assertEqual(self.double.count("refresh"), len(pauses) + 1)

    def test_the_sizes_of_responses_are_limited(self):
        mebibyte = 1048576
        tokens = json.dumps({"access_token": "opaque"}).encode()
        for limit, endpoint, body, command in (
            (mebibyte, "refresh", tokens, ("token", "--refresh")),
            (8 * mebibyte, "api", b'{"data": []}', ("models", "--source", "api", "--all")),
        ):
            for size in (limit, limit + 1):
                with self.subTest(endpoint, size=size):
                    self.store(api_key="sk-mine")
                    self.fault(endpoint, 200, body.ljust(size))
                    err = self.call(*command).err
                    self.assertEqual("the response is too large" in err, size > limit, err)

    def test_the_length_of_a_servers_text_is_limited(self):
        for sent, shown in (
            ("word " * 40, "word " * 40),
            ("word " * 40 + "x", "word " * 40 + "..."),
            ("Ab1" * 10 + "x", "Ab1" * 10 + "x"),
            # A longer word may be a secret.
            ("Ab1" * 10 + "xy", "[...]"),
        ):
            with self.subTest(sent):
                self.store(lifetime=-10)
                self.fault("refresh", 400, {"error_description": sent})
                err = self.assert_fails(self.call("token"), 4).err
                self.assertIn(f"(HTTP 400): {shown}\n", err)

    def test_an_error_is_cut_after_2000_characters(self):
        start = "the stored tokens come from another issuer, https://"
        for length, end in ((2000, ""), (2001, "...")):
            with self.subTest(length):
                name = "a" * (length - len(start))
                self.store(lifetime=-10, issuer="https://" + name)
                err = self.assert_fails(self.call("token"), 4).err
                shown = (start + name)[:2000] + end
                self.assertEqual(err.splitlines()[0], f"error: {shown}")

    def test_a_message_is_cut_after_5000_characters(self):
        clock = FakeClock(skips_waits=True)
        environ = {"CHATGPT_OAUTH_SCOPE": "s" * 6000}
        result = self.call_at(clock, "auth", "--no-browser", "--timeout", "1", environ=environ)
        self.assert_fails(result, 1)
        url = next(line for line in result.err.splitlines() if line.startswith("http"))
        self.assertEqual((len(url), url[-4:]), (5003, "s..."))

    def test_the_status_of_a_response_decides_the_exit_code(self):
        server_error = "server error"
        for status, exit_code, text in (
            (200, 0, ""),
            (299, 0, ""),
            (300, 1, "unexpected redirect"),
            (399, 1, "unexpected redirect"),
            (400, 1, "(HTTP 400)\n"),
            (428, 1, "(HTTP 428)\n"),
            (429, 5, "too many requests"),
            (430, 1, "(HTTP 430)\n"),
            (499, 1, "(HTTP 499)\n"),
            (500, 5, server_error),
            (503, 5, server_error),
            (599, 5, server_error),
        ):
            with self.subTest(status):
                self.store(api_key="sk-mine")
                self.fault("api", status, {"data": [{"id": "gpt-4o"}]})
                result = self.call_at(FakeClock(), "models", "--source", "api", "--all")
                self.assertEqual(result.code, exit_code, result.err)
                self.assertIn(text, result.err)

    def test_online_status_shows_what_an_http_status_means(self):
        for status, answer in (
            (200, "accepted"),
            (401, "refused"),
            (402, "unreachable"),
            (403, "refused"),
            (404, "unreachable"),
            (429, "unreachable"),
            (500, "unreachable"),
        ):
            with self.subTest(status):
                self.store(api_key="sk-mine")
                self.fault("api", status, {"data": []})
                result = self.call_at(FakeClock(), "status", "--online", "--json")
                self.assertEqual(json.loads(result.out)["online"]["api_key"], answer)

    def test_a_5xx_does_not_end_a_sign_in(self):
        for status, exit_code in ((200, 4), (400, 4), (499, 4), (500, 5), (503, 5)):
            with self.subTest(status):
                clock = FakeClock()
                self.store_expiring(clock, 0)
                self.fault("refresh", status, {"error": "refresh_token_reused"})
                self.assert_fails(self.call_at(clock, "token"), exit_code)
                self.assertEqual("ended" in self.stored(), exit_code == 4)

    def test_only_403_404_and_429_keep_polling(self):
        for status in (400, 401, 402, 403, 404, 405, 428, 429, 430):
            is_pending = status in (403, 404, 429)
            with self.subTest(status):
                fault = self.answer_polls(1, status, "odd")
                times, err = self.poll_times(FakeClock(), fault)
                self.assertEqual(len(times), 2 if is_pending else 1)
                self.assertEqual(f"(HTTP {status}): odd" in err, not is_pending)

    # Files --------------------------------------------------------------------------------

    def test_the_lock_is_waited_for_60_seconds_or_2_while_the_token_is_valid(self):
        for left, seconds in ((-10, 60), (60, 60), (61, 2), (200, 2)):
            with self.subTest(left):
                clock = FakeClock()
                stored = self.store_expiring(clock, left)
                with self.holding_lock():
                    result = self.call_at(clock, "token")
                if left > 60:
                    expected = (0, stored["access_token"] + "\n")
                    self.assertEqual((result.code, result.out), expected, result.err)
                    self.assertIn("still valid", result.err)
                self.assertAlmostEqual(clock.elapsed, seconds, delta=0.05)
                self.assertEqual(set(clock.pauses), {0.01})

    def test_a_broken_file_is_read_again_for_half_a_second(self):
        self.store()
        self.token_file.write_text("{")
        clock = FakeClock()
        self.assert_fails(self.call_at(clock, "token"), 6, "not valid JSON")
        self.assertAlmostEqual(clock.elapsed, 0.5, delta=0.05)
        self.assertEqual(set(clock.pauses), {0.02})

    @needs_modes
    def test_a_file_that_cannot_be_read_is_reported_at_once(self):
        self.store()
        clock = FakeClock()
        self.token_file.chmod(0)
        with self.as_unprivileged_owner():
            self.assert_fails(self.call_at(clock, "token"), 6, "Permission denied")
        self.assertEqual(clock.elapsed, 0)

    def test_the_sizes_of_files_are_limited(self):
        mebibyte = 1048576
        self.sign_in()
        for path, limit, command in (
            (self.token_file, mebibyte, "token"),
            (self.models_file, 8 * mebibyte, "models"),
        ):
            content = path.read_bytes()
            for size, exit_code in ((limit, 0), (limit + 1, 6)):
                with self.subTest(path.name, size=size):
                    path.write_bytes(content.ljust(size))
                    self.assertEqual(self.call(command).code, exit_code)
            path.write_bytes(content)

    @unittest.skipUnless(POSIX, "Windows has no limit on file sizes")
    def test_16_kib_more_than_the_token_file_are_reserved(self):
        import resource

        for missing in (0, 1):
            with self.subTest(missing):
                self.store(lifetime=-10)
                # A stored file has the size that the program reserves for its contents.
                self.token_file.write_text(json.dumps(self.stored(), indent=2) + "\n")
                size = self.token_file.stat().st_size + 16384 - missing

                def limit(size=size):
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

                code = self.run_program("token", preexec_fn=limit).code
                self.assertEqual(code, 6 if missing else 0)

    # The callback -------------------------------------------------------------------------

    def test_the_page_has_this_content_security_policy(self):
        running, url = self.start_sign_in()
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[0], timeout=10)
        connection.request("GET", "/", headers={"Host": f"localhost:{self.ports[0]}"})
        response = connection.getresponse()
        style = re.search("<style>(.*)</style>", response.read().decode())[1].encode()
        digest = base64.b64encode(hashlib.sha256(style).digest()).decode()
        self.assertEqual(
            response.headers["Content-Security-Policy"],
            f"default-src 'none'; style-src 'sha256-{digest}'; frame-ancestors 'none'",
        )
        connection.close()
        self.finish_sign_in(running, url)

    def ask_listener(self, head):
        """Send the bytes of a request head to the listener and return the status."""
        with socket.create_connection(("127.0.0.1", self.ports[0]), WAIT_LIMIT) as connection:
            connection.sendall(head)
            response = b"".join(iter(lambda: connection.recv(65536), b""))
        return int(response.split(b" ")[1])

    def test_64_kib_of_a_request_head_are_read(self):
        running, url = self.start_sign_in()
        host = b"Host: localhost"
        # The program reads one byte more, so that http.server can reject a request line that is too
        # long. The Host line comes last. Without its last letter, it names another host.
        before = b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 40000 + b"\r\nY: "
        for size, status in ((65537, 404), (65538, 400)):
            filler = b"y" * (size - len(before) - len(b"\r\n") - len(host))
            head = before + filler + b"\r\n" + host + b"\r\n\r\n"
            with self.subTest(size):
                self.assertEqual(self.ask_listener(head), status)
        self.finish_sign_in(running, url)

    def test_the_authorization_response_is_limited(self):
        running, url = self.start_sign_in()
        callback_url = authorization_response(url)
        state = query(url)["state"]
        start = callback_url.partition("?")[0]
        # The double's response has three fields, and 50 are allowed.
        self.assertEqual(visit(callback_url + "&x=1" * 48)[-1][1], 400)
        self.assertEqual(visit(f"{start}?state={state}&code={'x' * 4097}")[-1][1], 400)
        self.assertIsNone(running.process.poll())
        self.assertEqual(visit(callback_url + "&x=1" * 47)[-1][1], 200)
        self.assert_done(running.result())

    def test_an_authorization_code_can_have_4096_characters(self):
        running, url = self.start_sign_in()
        state = query(url)["state"]
        start = authorization_response(url).partition("?")[0]
        self.assertIn("Sign-in failed", visit(f"{start}?state={state}&code={'x' * 4096}")[-1][3])
        self.assert_fails(running.result(), 1)

    def test_the_secrets_of_a_sign_in_are_long(self):
        self.sign_in()
        fields = self.double.requests_to("authorize")[0]
        self.assertEqual(len(fields["state"]), 43)
        # RFC 7636 §4.1 allows 43 to 128 characters.
        self.assertEqual(len(self.double.requests_to("code")[0]["code_verifier"]), 86)
        self.assert_done(self.call("auth", "--official", "--no-browser", browser=visit))
        self.assertEqual(len(self.double.requests_to("plan_authorize")[0]["nonce"]), 43)

    def test_the_browser_has_5_seconds_for_the_last_page_and_2_for_an_error(self):
        waits = []

        # The program waits on a condition until the tabs have their page. Nothing waits here.
        def recorded(condition, predicate, timeout=None):
            waits.append(timeout)
            return predicate()

        for status, seconds in ((200, 5.0), (400, 2.0)):
            with self.subTest(status):
                clock = FakeClock()
                body = json.dumps(self.double.tokens()).encode() if status == 200 else b"{}"
                self.fault("code", status, body)
                with mock.patch.object(threading.Condition, "wait_for", recorded):
                    self.call_at(clock, "auth", "--no-browser", browser=leave_at_once)
                self.assertIn(seconds, waits)
                waits.clear()

    # Signing in ---------------------------------------------------------------------------

    def test_a_timeout_suggests_twice_the_time(self):
        for timeout, suggested in (
            ("0.3", "240"),
            ("120", "240"),
            ("121", "242"),
            ("86000", "86400"),
        ):
            with self.subTest(timeout):
                clock = FakeClock(skips_waits=True, speed=1000)
                result = self.call_at(clock, "auth", "--no-browser", "--timeout", timeout)
                self.assert_fails(result, 1, f"--timeout {suggested}\n")

    def test_a_browser_sign_in_takes_120_seconds(self):
        clock = FakeClock(skips_waits=True)
        result = self.call_at(clock, "auth", "--no-browser")
        self.assert_fails(result, 1, "timed out after 120 seconds")
        self.assertEqual(re.findall(r"(\d+) seconds left", result.err), ["90", "60", "30", "10"])
        self.assertAlmostEqual(clock.elapsed, 120, delta=0.1)

    def poll_times(self, clock, fault, **usercode):
        """Sign in with a device code. Return when each poll came, in seconds, and the output.

        `fault` answers each poll. `usercode` changes the response that has the code.
        """
        times = []
        self.fault("usercode", 200, {"device_auth_id": "dev_0", "user_code": "ABCD", **usercode})

        def poll(handler, fields):
            times.append(clock.elapsed)
            return fault(handler, fields)

        self.double.faults["device"] = poll
        return times, self.assert_fails(self.call_at(clock, "auth", "--device"), 1).err

    def answer_polls(self, count, status, error, **headers):
        """Return a fault that answers `count` polls this way and then ends the sign-in."""
        answers = [(status, error, headers)] * count + [(400, "expired_token", {})]

        def fault(handler, _):
            status, error, headers = answers.pop(0)
            return self.double.reply(handler, status, {"error": error}, **headers)

        return fault

    def test_polls_wait_for_an_interval_of_1_to_60_seconds(self):
        pending = "authorization_pending"
        for interval, wanted in ((None, 5), (0, 1), (0.9, 1), (7, 7), ("8", 8), (60, 60), (61, 60)):
            with self.subTest(interval):
                fault = self.answer_polls(1, 403, pending)
                times, _ = self.poll_times(FakeClock(), fault, interval=interval)
                self.assertEqual(times, [wanted, 2 * wanted])

    def test_slow_down_adds_5_seconds_for_good(self):
        # "slow" is replaced in messages as a secret, but the error code is still understood.
        times, _ = self.poll_times(
            FakeClock(), self.answer_polls(2, 400, "slow_down"), device_auth_id="slow"
        )
        self.assertEqual(times, [5, 15, 30])

    def test_a_poll_respects_retry_after_up_to_60_seconds(self):
        for header, pause in ((3, 5), (59, 59), (61, 60)):
            with self.subTest(header):
                fault = self.answer_polls(1, 429, "authorization_pending", Retry_After=header)
                self.assertEqual(self.poll_times(FakeClock(), fault)[0], [5, 5 + pause])

    def test_a_poll_without_a_response_doubles_the_interval_up_to_60_seconds(self):
        clock, ended = FakeClock(), self.answer_polls(0, 400, "")
        faults = [clock.silence] * 5 + [ended]
        times, _ = self.poll_times(clock, lambda *request: faults.pop(0)(*request))
        pauses = [later - earlier for earlier, later in zip(times, times[1:])]
        self.assertEqual(len(pauses), 5)
        for pause, interval in zip(pauses, (10, 20, 40, 60, 60)):
            # Each poll takes the request timeout of 30 seconds and a slice of 0.05 seconds.
            self.assertAlmostEqual(pause, interval + 30.05)

    def test_a_device_code_lives_15_minutes_at_most(self):
        self.double.device_polls = 10**9
        for lifetime, seconds, shown in (
            (None, 900, "15 minutes"),
            (901, 900, "15 minutes"),
            (899, 899, "14 minutes"),
            (120, 120, "2 minutes"),
            (119, 119, "less than 2 minutes"),
        ):
            with self.subTest(lifetime):
                clock = FakeClock()
                fault = respond_with(403, b"{}")
                _, err = self.poll_times(clock, fault, expires_in=lifetime, interval=60)
                self.assertIn(f"valid for {shown})", err)
                self.assertIn("timed out waiting for the code", err)
                self.assertAlmostEqual(clock.elapsed, seconds, places=3)
                self.assertEqual(re.findall(r"(\d+) seconds left", err), ["90", "60", "30", "10"])
                # The time that is left is checked every second.
                self.assertEqual(max(clock.pauses), 1)

    def test_64_characters_of_a_user_code_are_shown(self):
        for length, shown in ((64, "A" * 64), (65, "A" * 64 + "...")):
            fault = self.answer_polls(0, 400, "")
            _, err = self.poll_times(FakeClock(), fault, user_code="A" * length)
            self.assertIn(f"\n{shown}\n", err)

    def test_20_pasted_lines_of_8192_bytes_are_read(self):
        running, url = self.start_sign_in(stdin=subprocess.PIPE)
        callback_url = authorization_response(url)
        # One more byte cuts off the last character of the URL, which then becomes the next line.
        running.type_line(b" " * (8193 - len(callback_url)) + callback_url.encode())
        self.assertIn("it is not complete", self.assert_done(running.result()).err)
        running, url = self.start_sign_in(stdin=subprocess.PIPE)
        running.process.stdin.write(b"hello\n" * 25)
        running.process.stdin.close()
        time.sleep(0.5)
        self.assertEqual(self.finish_sign_in(running, url).err.count("does not work"), 20)

    # Models -------------------------------------------------------------------------------

    def context_length(self, **listed):
        self.store()
        self.double.codex_models = [{"slug": "gpt-6", "visibility": "list", **listed}]
        self.assertEqual(self.call("models", "--source", "codex").code, 0)
        return self.stored_models()["chatgpt-gpt-6"]["context_length"]

    def test_a_context_length_is_95_percent_of_the_window_by_default(self):
        for listed, length in (
            # The default is 95 % of 272000.
            ({}, 258400),
            ({"context_window": 100000}, 95000),
            ({"context_window": 16000, "effective_context_window_percent": 100}, 16000),
            ({"context_window": 15999, "effective_context_window_percent": 100}, 258400),
            ({"context_window": 100000, "effective_context_window_percent": 1}, 258400),
            ({"context_window": 100000, "effective_context_window_percent": 101}, 95000),
            ({"context_window": 10**9, "effective_context_window_percent": 100}, 10**9),
            ({"context_window": 10**9 + 1, "effective_context_window_percent": 100}, 258400),
        ):
            with self.subTest(listed):
                self.assertEqual(self.context_length(**listed), length)

    def test_a_model_id_has_128_characters_at_most(self):
        self.double.api_keys.add("sk-mine")
        self.store(api_key="sk-mine")
        self.double.api_models = ["y" * 128, "z" * 129]
        out = self.call("models", "--all", "--dry-run").out
        self.assertEqual(out, "chatgpt-" + "y" * 128 + "\n")

    def test_status_shows_ten_models(self):
        self.double.api_keys.add("sk-mine")
        self.store(api_key="sk-mine")
        for count, hidden in ((10, []), (11, ["1"])):
            self.double.api_models = [f"gpt-{number}" for number in range(count)]
            self.assertEqual(self.call("models").code, 0)
            out = self.call("status").out
            self.assertEqual(out.count("chatgpt-gpt-"), 10)
            self.assertEqual(re.findall(r"(\d+) more", out), hidden)

    # Output -------------------------------------------------------------------------------

    def test_durations_are_shown_in_words(self):
        self.store()
        self.assertEqual(oauth.duration(0), "0 seconds")
        for seconds, exact, rounded in (
            (1, "1 second", "1 second"),
            (59, "59 seconds", "59 seconds"),
            (60, "1 minute", "1 minute"),
            (61, "1 minute 1 second", "1 minute 1 second"),
            (3599, "59 minutes 59 seconds", "59 minutes 59 seconds"),
            (3600, "1 hour", "1 hour"),
            (5400, "1 hour 30 minutes", "1 hour 30 minutes"),
            (7140, "1 hour 59 minutes", "1 hour 59 minutes"),
            (7199, "1 hour 59 minutes 59 seconds", "2 hours"),
            (7229, "2 hours 29 seconds", "2 hours"),
            (7230, "2 hours 30 seconds", "2 hours 1 minute"),
            (86399, "23 hours 59 minutes 59 seconds", "1 day"),
            (86400, "1 day", "1 day"),
            (90061, "1 day 1 hour 1 minute 1 second", "1 day 1 hour"),
            (174599, "2 days 29 minutes 59 seconds", "2 days"),
            (174600, "2 days 30 minutes", "2 days 1 hour"),
            (604800, "7 days", "7 days"),
            (863999, "9 days 23 hours 59 minutes 59 seconds", "10 days"),
        ):
            with self.subTest(seconds):
                window = {"used_percent": 5, "limit_window_seconds": seconds}
                window["reset_after_seconds"] = seconds
                self.double.rate_limit = {"primary_window": window}
                out = self.call_at(FakeClock(), "status", "--online").out
                self.assertIn(f"Usage:        {exact}: 5% used, resets in {rounded}\n", out)

    @needs_terminal
    def test_a_usage_bar_has_ten_characters(self):
        self.store()
        names = ("primary_window", "secondary_window")
        for percentages, bars in (
            ((0, 4), ["..........", ".........."]),
            ((6, 94), ["#.........", "#########."]),
            ((96, 130), ["##########", "##########"]),
        ):
            self.double.rate_limit = {
                name: {"used_percent": percent, "limit_window_seconds": 60}
                for name, percent in zip(names, percentages)
            }
            screen = self.run_at_terminal("stdout", "status", "--online")
            self.assertEqual(re.findall(r"1 minute: ([#.]+) ", screen), bars)

    @needs_terminal
    def test_errors_are_red_warnings_yellow_and_successes_green(self):
        self.fault("revoke", 500)
        for command, signed_in, shown in (
            ("token", False, "\x1b[31merror:"),
            ("logout", True, "\x1b[33mwarning:"),
            ("logout", True, "\x1b[32m"),
        ):
            with self.subTest(shown):
                if signed_in:
                    self.store()
                screen = self.run_at_terminal("stderr", command, environ={"TERM": "xterm"})
                self.assertIn(shown, screen)

    # Permissions --------------------------------------------------------------------------

    @needs_modes
    def test_files_have_mode_600_and_directories_700(self):
        self.double.device_polls = 0
        for umask in (0o000, 0o022, 0o077):
            with self.subTest(oct(umask)):
                shutil.rmtree(self.home, ignore_errors=True)
                previous = os.umask(umask)
                try:
                    self.assert_done(self.call_at(FakeClock(), "auth", "--device"))
                finally:
                    os.umask(previous)
                modes = {path.name: path.stat().st_mode & 0o777 for path in self.home.iterdir()}
                names = ("chatgpt_oauth.json", "chatgpt_oauth.json.lock", "chatgpt_models.json")
                for name in names:
                    self.assertEqual(oct(modes[name]), oct(0o600), name)
                self.assertEqual(oct(self.home.stat().st_mode & 0o777), oct(0o700))


def leave_at_once(url):
    """Send the authorization response as a browser does, and hang up before the page arrives."""
    target = authorization_response(url).partition("//")[2]
    host, _, path = target.partition("/")
    with socket.create_connection(
        ("127.0.0.1", int(host.rpartition(":")[2])), WAIT_LIMIT
    ) as browser:
        browser.sendall(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())


# ---------------------------------------------------------------------------------------------
# Longer runs
# ---------------------------------------------------------------------------------------------


class LongRunsTest(unittest.TestCase):
    def run_script(self, name, *arguments):
        """Run a script in .ci and return its output. Skip the test if there is no such script.

        People who download only the program and this file don't have the scripts.
        """
        script = pathlib.Path(TEST_FILE).with_name(".ci") / name
        if not script.exists():
            self.skipTest(f"there is no {script}")
        result = subprocess.run(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=WAIT_LIMIT,
        )
        self.assertEqual(result.returncode, 0, result.stdout)
        return result.stdout

    def test_random_input_keeps_the_contract(self):
        self.assertRegex(self.run_script("fuzz", "--cases", "12", "--seed", "1"), r"^12 cases")

    def test_the_stress_run_starts(self):
        self.run_script("stress", "--help")


# ---------------------------------------------------------------------------------------------
# Demo
# ---------------------------------------------------------------------------------------------


class DemoTest(unittest.TestCase):
    def test_the_demo_runs_every_command(self):
        with tempfile.TemporaryDirectory() as home:
            result = subprocess.run(
                [sys.executable, TEST_FILE, "demo", "--simulate"],
                env=environment(home),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                timeout=DEMO_SECONDS + WAIT_LIMIT,
            )
        self.assertEqual(result.returncode, 0, result.stdout)
        signing_in = ["auth", "status", "models", "logout"]
        for command in [*signing_in, "env", "exec", "token", "install", "uninstall"]:
            self.assertRegex(result.stdout, rf"(?m)^\$ \S.*\b{command}\b")
        for shown in ("chatgpt-oauth status --online", "auth --official", "then you see:\n You're"):
            self.assertIn(shown, result.stdout)
        self.assertNotIn("put this line into", result.stdout)


# ---------------------------------------------------------------------------------------------
# All tests
# ---------------------------------------------------------------------------------------------


# The environment variable that names the directory of claimed tests. Only the processes that a
# ParallelSuite starts have it.
CLAIMS = "TESTS_CLAIMED_IN"


class ParallelSuite(unittest.TestSuite):
    """All tests, in several processes, because most tests spend most of their time waiting.

    Each process goes through all tests. It claims a test by creating the file with the test's
    number, and runs only those that it claims. So no process ends long before the others.
    """

    PROCESSES = 4

    def run(self, result, debug=False):
        claims = os.environ.get(CLAIMS)
        if claims:
            self.run_claimed(claims, result)
            return result
        with contextlib.ExitStack() as stack:
            claims = stack.enter_context(tempfile.TemporaryDirectory())
            others = [self.start_process(stack, claims, result) for _ in range(self.PROCESSES - 1)]
            self.run_claimed(claims, result)
            for process, output in others:
                process.wait(TEST_LIMIT)
                output.seek(0)
                text = output.read().decode("utf-8", "replace").replace("\r\n", "\n")
                self.add_output(result, text, process.returncode)
        return result

    def start_process(self, stack, claims, result):
        """Start another process. Return it and the file that receives its output.

        `stack` ends the process and closes the file.
        """
        flags = ["-v"] if getattr(result, "showAll", False) else []
        warnings = [f"-W{each}" for each in sys.warnoptions]
        module = pathlib.Path(TEST_FILE).stem
        output = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, *warnings, "-m", "unittest", *flags, module],
            env={**os.environ, CLAIMS: claims},
            cwd=os.path.dirname(TEST_FILE),
            stdin=subprocess.DEVNULL,
            stderr=output,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        return process, output

    def run_claimed(self, claims, result):
        """Run each test that no other process has claimed in the directory `claims`."""
        tests = [test for suite in self for test in suite]
        for number, test in enumerate(tests):
            if result.shouldStop:
                break
            try:
                open(os.path.join(claims, str(number)), "x").close()
            except FileExistsError:
                continue
            unittest.TestSuite([test]).run(result)

    def add_output(self, result, text, exit_code):
        """Add the output `text` of unittest in another process to `result`."""
        listed, _, details = re.split(r"\n+([=-]{70}\n)", text + "\n" + "-" * 70 + "\n", maxsplit=1)
        # With -v, the list has a line for each test.
        end = "\n" if "... " in listed else ""
        result.stream.write(listed + end)
        result.testsRun += sum(map(int, re.findall(r"(?m)^Ran (\d+) test", details)))
        skipped = sum(map(int, re.findall(r"skipped=(\d+)", details)))
        result.skipped += [(self, "skipped in another process")] * skipped
        if exit_code:
            source = unittest.FunctionTestCase(self.add_output, description="another process")
            result.failures.append((source, details))


def load_tests(loader, tests, _):
    """Return the tests that unittest runs, in parallel unless -k selects some of them."""
    return tests if loader.testNamePatterns else ParallelSuite(tests)


# ---------------------------------------------------------------------------------------------
# Demo and command line
# ---------------------------------------------------------------------------------------------


# This is enough time for a person to sign in with a real browser.
DEMO_SECONDS = 120  # seconds
# Each step has a description and the command that is typed.
DEMO = (
    ("Sign in (the stand-in approves at once)", "python3 chatgpt_oauth.py auth"),
    ("Show who is signed in", "python3 chatgpt_oauth.py status"),
    ("Make the file a command", "python3 chatgpt_oauth.py install --bin BIN"),
    ("Ask the server, too (what is accepted, what is used)", "chatgpt-oauth status --online"),
    ("List the models without importing them", "chatgpt-oauth models --dry-run"),
    ("Print the API key for the shell (a fake one)", "chatgpt-oauth env"),
    (
        "Give the API key to one program only",
        "chatgpt-oauth exec -- python3 -c "
        """'import os; print(os.environ["CHATGPT_OAUTH_API_KEY"])'""",
    ),
    ("Print an access token (a fake one, cut here)", "chatgpt-oauth token"),
    ("Sign in for Code Puppy by OpenAI's official sign-in", "chatgpt-oauth auth --official"),
    ("Show both sign-ins", "chatgpt-oauth status"),
    ("Sign out of both", "chatgpt-oauth logout"),
    ("Remove the command", "chatgpt-oauth uninstall --bin BIN"),
)


def list_current_models(double):
    """Make `double` list models that exist in 2027, because the README shows them."""
    families = ("sol", "terra", "luna")
    double.api_models = [f"gpt-5.6-{each}" for each in families]
    double.api_models += ["gpt-4o-mini-tts", "text-embedding-3-small"]
    double.codex_models = [{"slug": slug, "visibility": "list"} for slug in double.api_models[:2]]
    double.plan_models = double.codex_models


def demo(simulate):
    """Run each step of the demo against the double and return the exit code."""
    deadline = time.monotonic() + DEMO_SECONDS
    with free_ports(2) as ports:
        double = Double(ports)
    list_current_models(double)
    with contextlib.closing(double), tempfile.TemporaryDirectory() as home:
        page = os.path.join(home, "page.html")
        environ = demo_environment(home, double, ports)
        print(f"Using a local stand-in for OpenAI's servers at {double.url}; no account needed.")
        print("All files are in a temporary home directory, which is removed at the end.")
        can_open = {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"} & set(environ)
        if simulate or (not can_open and sys.platform not in ("win32", "darwin")):
            environ["BROWSER"] = (
                shell_line(sys.executable, TEST_FILE, "visit", "--save", page) + " %s"
            )
            print("The demo simulates a browser.")
        for title, command in DEMO:
            print(f"\n# {title}\n$ {command.replace('BIN', '~/bin')}", flush=True)
            try:
                code = demo_command(command, environ, deadline - time.monotonic())
            except subprocess.TimeoutExpired:
                print(f"The demo ends: {DEMO_SECONDS} seconds are over.", file=sys.stderr)
                return 1
            if code:
                return code
            if os.path.exists(page):
                print("\n(In a browser you sign in at OpenAI, then you see:")
                print(f" {page_text(page)})")
                os.remove(page)
    return 0


def demo_environment(home, double, ports):
    """Return an environment with the home, the double's addresses and the terminal's variables."""
    keep = ("TERM", "LANG", "DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "NO_COLOR")
    environ = {name: os.environ[name] for name in keep if name in os.environ}
    environ = {**environment(home), **environ, **double.environment(), "SHELL": "/bin/sh"}
    environ["PATH"] = os.pathsep.join((os.path.join(home, "bin"), environ.get("PATH", "")))
    environ["CHATGPT_OAUTH_REQUIRED_PORT"] = str(ports[0])
    environ["CHATGPT_OAUTH_FALLBACK_PORT"] = str(ports[1])
    return environ


def demo_command(command_line, environ, seconds):
    """Run one command of the demo in the program's directory and return its exit code."""
    names = {"BIN": os.path.join(environ["HOME"], "bin"), "python3": sys.executable}
    name, *arguments = [names.get(word, word) for word in shlex.split(command_line)]
    command = [shutil.which(name, path=environ["PATH"])]
    options = {"env": environ, "cwd": os.path.dirname(PROGRAM), "timeout": max(seconds, 0.1)}
    if "token" not in arguments:
        return subprocess.call(command + arguments, **options)
    result = subprocess.run(
        command + arguments, **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in result.stdout.splitlines():
        print(line if len(line) <= 76 else f"{line[:76]}...")
    return result.returncode


def page_text(page):
    """Return the heading and the paragraphs of a saved page as one line."""
    parts = re.findall(r"<(?:h1|p)>(.*?)</(?:h1|p)>", pathlib.Path(page).read_text("utf-8"))
    return " ".join(f"{html.unescape(part).rstrip('.')}." for part in parts)


def main():
    parser = argparse.ArgumentParser(description="Tests and a demo of chatgpt_oauth.py.")
    commands = parser.add_subparsers(dest="command")
    demo_parser = commands.add_parser("demo", help="a tour of the commands, without an account")
    demo_parser.add_argument(
        "--simulate", action="store_true", help="simulate a browser instead of opening one"
    )
    answers_parser = commands.add_parser(
        "bad-responses", help="check bad responses (used by the suite)"
    )
    answers_parser.add_argument("answers", nargs="+")
    visit_parser = commands.add_parser("visit", help="act as the browser (used by the demo)")
    visit_parser.add_argument("--save", metavar="FILE", help="where to keep the last page")
    visit_parser.add_argument("url")
    options = parser.parse_args()
    if options.command == "demo":
        return demo(options.simulate)
    if options.command == "bad-responses":
        for answer in options.answers:
            run_case(WireTest, "check_bad_response", answer)
        return 0
    if options.command == "visit":
        _, status, _, page = visit(options.url)[-1]
        if options.save:
            pathlib.Path(options.save).write_text(page, "utf-8")
        return 0 if status == 200 else 1
    return unittest.main(argv=sys.argv[:1])


if __name__ == "__main__":
    sys.exit(main())
