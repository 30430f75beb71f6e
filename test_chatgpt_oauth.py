"""Tests of chatgpt_oauth.py, against a strict double of OpenAI's servers on this machine.

    python3 -m unittest                                  the suite, in under 45 seconds
    python3 test_chatgpt_oauth.py demo                   the whole story, told, without an account
    python3 test_chatgpt_oauth.py stress                 the long rounds of the refresh tests
    python3 test_chatgpt_oauth.py fuzz --seconds 600     random answers, requests and files
    python3 test_chatgpt_oauth.py bench                  what the commands cost

The program runs as a process wherever a person or a script would run it.  No network is needed,
no account, and no port that something else may hold.
"""

import argparse
import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import pathlib
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import chatgpt_oauth as oauth

PROGRAM = str(pathlib.Path(oauth.__file__).resolve())
HERE = str(pathlib.Path(__file__).resolve())
AUTH = "https://api.openai.com/auth"
POSIX = os.name == "posix"


def encode_jwt(claims):
    """A JWT with these claims and a signature that nobody looks at."""
    parts = [json.dumps(part).encode() for part in ({"alg": "none"}, claims)] + [b"signature"]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def free_ports(count):
    """Ports that are free on 127.0.0.1 and ::1 now."""
    held, ports = [], []
    while len(ports) < count:
        four = socket.socket()
        held.append(four)
        four.bind(("127.0.0.1", 0))
        port = four.getsockname()[1]
        with contextlib.suppress(OSError):
            six = socket.socket(socket.AF_INET6)
            held.append(six)
            six.bind(("::1", port))
        ports.append(port)
    for each in held:
        each.close()
    return ports


# ---------------------------------------------------------------------------------------------
# The double of OpenAI's servers
# ---------------------------------------------------------------------------------------------


class Double:
    """OpenAI's authorization server, API and Codex backend, as strict as the real ones.

    Codes and refresh tokens are good for one use, redirect URIs are compared to the letter, PKCE
    is verified. `faults[endpoint]`, a function of the handler and the request's fields, may
    answer in the place of the double (returning True). `requests` holds all that came.
    """

    def __init__(self, ports=(1455, 1457)):
        self.codes, self.refresh_tokens, self.api_keys, self.devices = {}, {}, set(), {}
        self.access_tokens, self.id_tokens = {}, {}
        self.requests, self.faults = [], {}
        self.guard = threading.RLock()
        self.redirect_uris = {f"http://localhost:{port}/auth/callback" for port in ports}
        self.client_id = "app_EMoamEEZ73f0CkXaXp7hrann"
        self.account, self.email, self.plan = "acct-1", "ada@example.com", "plus"
        self.organization = "org-1"
        self.lifetime, self.delay = 864000, 0.0
        self.device_polls, self.device_interval = 1, "0"
        self.api_models = ["gpt-4o", "o1-mini", "gpt-4o-audio-preview", "dall-e-3", "o3-pro"]
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
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                double.serve(self)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def server_bind(self):  # HTTPServer's own asks the resolver for a name
                socket.socket.bind(self.socket, ("127.0.0.1", 0))
                self.server_name, self.server_port = "localhost", self.socket.getsockname()[1]

            def handle_error(self, *_):  # a program that was killed goes away while it is told
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.redirect_uris.add(self.url + "/deviceauth/callback")
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def environment(self):
        """The settings that lead the program here."""
        return {
            "CHATGPT_OAUTH_ISSUER": self.url,
            "CHATGPT_OAUTH_API_BASE_URL": self.url,
            "CHATGPT_OAUTH_CODEX_BASE_URL": self.url + "/codex-backend",
        }

    # What it gives away -------------------------------------------------------------------

    def tokens(self, lifetime=None, account=None):
        """A new sign-in's tokens, as the token endpoint answers them."""
        account = account or self.account
        claims = {"chatgpt_account_id": account, "chatgpt_plan_type": self.plan}
        if self.organization:
            claims["organizations"] = [{"id": self.organization, "is_default": True}]
        lifetime = self.lifetime if lifetime is None else lifetime
        expiry = int(time.time()) + lifetime
        unique = secrets.token_hex(4)
        answer = {
            "access_token": encode_jwt({"exp": expiry, AUTH: claims, "jti": unique}),
            "id_token": encode_jwt({"email": self.email, AUTH: claims, "jti": unique}),
            "refresh_token": "rt_" + secrets.token_urlsafe(24),
            "token_type": "Bearer",
            "expires_in": lifetime,
        }
        with self.guard:
            self.refresh_tokens[answer["refresh_token"]] = account
            self.access_tokens[answer["access_token"]] = account
            self.id_tokens[answer["id_token"]] = self.organization
        return answer

    def secrets(self):
        """Everything that must show nowhere."""
        with self.guard:
            found = {*self.codes, *self.refresh_tokens, *self.api_keys}
            found |= {*self.access_tokens, *self.id_tokens}
            for entry in self.requests:
                found |= {entry["fields"].get(k) for k in ("code", "code_verifier")}
        return {secret for secret in found if secret}

    def count(self, grant):
        with self.guard:
            return sum(entry["grant"] == grant for entry in self.requests)

    # What it answers ----------------------------------------------------------------------

    def serve(self, handler):
        path, _, query = handler.path.partition("?")
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0)).decode()
        kind = handler.headers.get("Content-Type", "")
        if handler.command == "GET":
            fields = dict(urllib.parse.parse_qsl(query))
        elif "json" in kind:
            fields = json.loads(body)
        else:
            fields = dict(urllib.parse.parse_qsl(body, strict_parsing=True))
        grants = {
            "authorization_code": "code",
            "refresh_token": "refresh",
            "urn:ietf:params:oauth:grant-type:token-exchange": "key",
        }
        endpoints = {
            "/oauth/authorize": "authorize",
            "/oauth/revoke": "revoke",
            "/v1/models": "api",
            "/codex-backend/models": "codex",
            "/api/accounts/deviceauth/usercode": "usercode",
            "/api/accounts/deviceauth/token": "device",
            "/v1/chat/completions": "chat",
        }
        grant = endpoints.get(path)
        if path == "/oauth/token":
            grant = grants.get(fields.get("grant_type")) if "urlencoded" in kind else None
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self.guard:
            entry = {"grant": grant, "path": path, "fields": fields, "headers": headers}
            self.requests.append(entry)
        if self.delay:
            time.sleep(self.delay)
        fault = self.faults.get(grant)
        if fault and fault(handler, fields):
            return
        answer = getattr(self, "_" + str(grant), self._nothing)
        with self.guard:
            status, data = answer(fields, headers)
        extra = {"Location": data.pop("location")} if status == 302 else {}
        self.reply(handler, status, json.dumps(data).encode(), **extra)

    @staticmethod
    def reply(handler, status, body, **headers):
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
        wanted = {
            "response_type": "code",
            "client_id": self.client_id,
            "scope": "openid profile email offline_access",
            "code_challenge_method": "S256",
            "id_token_add_organizations": "true",
            "codex_cli_simplified_flow": "true",
        }
        wrong = [name for name, value in wanted.items() if fields.get(name) != value]
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
            message = "Invalid ID token: missing organization_id"
            return self.refuse("invalid_subject_token", message)
        key = "sk-" + secrets.token_urlsafe(24)
        self.api_keys.add(key)
        return 200, {"access_token": key}

    def _revoke(self, fields, headers):
        self.refresh_tokens.pop(fields.get("token"), None)
        return 200, {}

    def _api(self, fields, headers):
        if headers.get("authorization", "")[7:] not in self.api_keys:
            return self.refuse("invalid_api_key", "Incorrect API key provided")
        models = [{"id": name, "object": "model", "owned_by": "x"} for name in self.api_models]
        return 200, {"object": "list", "data": models}

    def _codex(self, fields, headers):
        if headers.get("authorization", "")[7:] not in self.access_tokens:
            return 401, {"detail": "Unauthorized"}
        if not fields.get("client_version") or not headers.get("chatgpt-account-id"):
            return 400, {"detail": "client_version or account missing"}
        return 200, {"models": self.codex_models}

    def _usercode(self, fields, headers):
        device, code = "dev_" + secrets.token_urlsafe(12), "ABCD-EFGH"
        self.devices[device] = self.device_polls
        answer = {"device_auth_id": device, "user_code": code, "interval": self.device_interval}
        return 200, answer

    def _device(self, fields, headers):
        left = self.devices.get(fields.get("device_auth_id"))
        if left is None or fields.get("user_code") != "ABCD-EFGH":
            return 404, {"error": {"code": "deviceauth_unknown"}}
        self.devices[fields["device_auth_id"]] = left - 1
        if left > 0:
            return 403, {"error": {"code": "deviceauth_authorization_unknown"}}
        verifier = secrets.token_urlsafe(48)
        digest = hashlib.sha256(verifier.encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        code = "ac_" + secrets.token_urlsafe(24)
        self.codes[code] = (challenge, self.url + "/deviceauth/callback")
        names = ("authorization_code", "code_challenge", "code_verifier")
        return 200, dict(zip(names, (code, challenge, verifier)))

    def _chat(self, fields, headers):
        if headers.get("authorization", "")[7:] not in self.api_keys:
            return self.refuse("invalid_api_key")
        message = {"role": "assistant", "content": "Hello from the double."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "x", "object": "chat.completion", "created": 1, "model": fields["model"]}
        return 200, {**answer, "choices": [choice], "usage": usage}


def visit(url, follow=True):
    """What a browser does with `url`: a list of (url, status, headers, body) to the last page."""
    seen = []
    while url and len(seen) < 9:
        parts = urllib.parse.urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
        connection.request("GET", parts.path + ("?" + parts.query if parts.query else ""))
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        seen.append((url, response.status, headers, response.read().decode()))
        connection.close()
        place = headers.get("location")
        url = urllib.parse.urljoin(url, place) if place and follow else None
    return seen


# ---------------------------------------------------------------------------------------------
# What the tests share
# ---------------------------------------------------------------------------------------------


class Running:
    """The program at work: its standard error is read as it comes, `url()` waits for an address."""

    def __init__(self, arguments, environ, **options):
        options.setdefault("stdin", subprocess.DEVNULL)
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, *arguments],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )
        self.err = ""
        self.arrived = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            with self.arrived:
                self.err += line.decode("utf-8", "replace")
                self.arrived.notify_all()
        with self.arrived:
            self.err += "\0"  # the end
            self.arrived.notify_all()

    def saying(self, pattern, timeout=15):
        """Wait for a line on standard error; returns the match."""
        deadline = time.monotonic() + timeout
        with self.arrived:
            while True:
                found = re.search(pattern, self.err, re.M)
                if found:
                    return found
                left = deadline - time.monotonic()
                if left <= 0 or self.err.endswith("\0"):
                    raise AssertionError(f"{pattern!r} was not said: {self.err!r}")
                self.arrived.wait(left)

    def url(self):
        return self.saying(r"^http\S+/oauth/authorize\?\S+$")[0]

    def end(self, timeout=30):
        """Wait for the program to end; returns (exit code, standard output, standard error)."""
        try:
            out = self.process.stdout.read().decode()
            code = self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.reader.join(5)
            self.process.stdout.close()
            self.process.stderr.close()
            if self.process.stdin:
                with contextlib.suppress(OSError):
                    self.process.stdin.close()
        return code, out, self.err.rstrip("\0")


class Case(unittest.TestCase):
    """A double, a home and two ports for each test."""

    def setUp(self):
        self.ports = free_ports(2)
        self.double = Double(self.ports)
        self.addCleanup(self.double.close)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.home = self.folder / ".code_puppy"
        self.token_file = self.home / "chatgpt_oauth.json"
        self.models_file = self.home / "chatgpt_models.json"
        self.environ = {
            "HOME": folder.name,
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CHATGPT_OAUTH_REQUIRED_PORT": str(self.ports[0]),
            "CHATGPT_OAUTH_FALLBACK_PORT": str(self.ports[1]),
            "CHATGPT_OAUTH_RETRY_WINDOW": "2",
            **self.double.environment(),
        }

    def start(self, *arguments, environ=None, **options):
        running = Running(arguments, {**self.environ, **(environ or {})}, **options)
        self.addCleanup(lambda: running.process.poll() is None and running.process.kill())
        return running

    def run_program(self, *arguments, environ=None, **options):
        """(exit code, standard output, standard error) of the program as a process."""
        done = subprocess.run(
            [sys.executable, PROGRAM, *arguments],
            env={**self.environ, **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=60,
            **{"stdin": subprocess.DEVNULL, **options},
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def call(self, *arguments, environ=None):
        """The same in this process, where only what is said and returned matters."""
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.dict(os.environ, {**self.environ, **(environ or {})}, clear=True):
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                with mock.patch.object(sys, "stdin", io.StringIO()):
                    code = oauth.main(list(arguments))
        return code, out.getvalue(), err.getvalue()

    def sign_in(self, *arguments, environ=None):
        """A whole sign-in, the test playing the browser; returns its standard error."""
        running = self.start("auth", "--no-browser", *arguments, environ=environ)
        visit(running.url())
        code, out, err = running.end()
        self.assertEqual((code, out), (0, ""), err)
        return err

    def stored(self):
        return json.loads(self.token_file.read_text())

    def store(self, fields=None, mode=0o600, **changes):
        """Write a token file: a sign-in at the double, with `changes` (None removes)."""
        if fields is None:
            lifetime = changes.pop("lifetime", None)
            fields = self.double.tokens(lifetime)
            del fields["token_type"], fields["expires_in"]
            fields.update(account_id=self.double.account, issuer=self.double.url)
            fields.update(client_id=self.double.client_id, last_refresh="2026-01-01T00:00:00Z")
        fields = {k: v for k, v in {**fields, **changes}.items() if v is not None}
        self.home.mkdir(mode=0o700, exist_ok=True)
        self.token_file.write_text(json.dumps(fields))
        self.token_file.chmod(mode)
        return fields

    def assert_no_secret(self, *texts):
        for secret in self.double.secrets():
            for text in texts:
                self.assertNotIn(secret, text)

    def assert_fails(self, result, exit_code, *words):
        """The command failed as the contract has it: two lines at most, nothing on stdout."""
        code, out, err = result
        self.assertEqual(code, exit_code, err)
        self.assertEqual(out, "")
        self.assertNotIn("Traceback", err)
        self.assertRegex(err, r"(?m)^error: ")
        for word in words:
            self.assertIn(word, err)
        return err


# ---------------------------------------------------------------------------------------------
# The story
# ---------------------------------------------------------------------------------------------


class StoryTest(Case):
    def test_a_person_signs_in_and_uses_the_key_and_the_models(self):
        running = self.start("auth", "--no-browser")
        url = running.url()
        pages = visit(url)
        code, out, err = running.end()
        self.assertEqual((code, out), (0, ""), err)
        self.assertEqual([page[1] for page in pages], [302, 303, 200])
        self.assertEqual(urllib.parse.urlsplit(pages[-1][0]).path, "/success")
        self.assertEqual(urllib.parse.urlsplit(pages[-1][0]).query, "")
        self.assertIn("You are signed in", pages[-1][3])
        for words in ("ada@example.com", "API key available", "3 of 5", "API account", "Next: eval"):
            self.assertIn(words, err)
        self.assertIn(str(self.token_file), err)
        self.assert_no_secret(err, *(page[3] for page in pages))

        stored = self.stored()
        self.assertIn(stored["api_key"], self.double.api_keys)
        self.assertEqual(stored["account_id"], "acct-1")
        self.assertEqual(stored["issuer"], self.double.url)
        self.assertRegex(stored["last_refresh"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")

        code, out, err = self.run_program("status")
        self.assertEqual((code, err), (0, ""))
        self.assertTrue(out.startswith("ChatGPT OAuth: Authenticated\nAPI key available\n"), out)
        self.assertIn("ada@example.com", out)
        self.assertIn("in 9 days", out)
        self.assert_no_secret(out)

        models = json.loads(self.models_file.read_text())
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

        code, out, err = self.run_program("env", "--shell", "bash")
        self.assertEqual((code, err), (0, ""))
        self.assertEqual(out, f"export CHATGPT_OAUTH_API_KEY='{stored['api_key']}'\n")
        code, out, err = self.run_program("token")
        self.assertEqual((code, out, err), (0, stored["access_token"] + "\n", ""))
        code, out, err = self.run_program("token", "--api-key")
        self.assertEqual((code, out), (0, stored["api_key"] + "\n"))

        code, out, err = self.run_program("logout")
        self.assertEqual((code, out), (0, ""), err)
        self.assertIn("platform.openai.com", err)
        self.assertFalse(self.token_file.exists())
        self.assertEqual(json.loads(self.models_file.read_text()), {})
        self.assertNotIn(stored["refresh_token"], self.double.refresh_tokens)
        code, out, err = self.run_program("logout")
        self.assertEqual((code, out), (0, ""))
        self.assertIn("nothing to do", err)

    def test_the_authorization_url_has_what_the_codex_cli_sends(self):
        running = self.start("auth", "--no-browser")
        url = running.url()
        fields = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
        self.assertEqual(fields["originator"], ["chatgpt_oauth"])
        self.assertEqual(fields["redirect_uri"], [f"http://localhost:{self.ports[0]}/auth/callback"])
        self.assertEqual(len(fields["state"][0]), 43)
        self.assertNotIn("+", url)
        visit(url)
        self.assertEqual(running.end()[0], 0)
        sent = [e for e in self.double.requests if e["grant"] == "code"][0]["fields"]
        self.assertEqual(len(sent["code_verifier"]), 86)
        for entry in self.double.requests:
            if entry["grant"] != "authorize":
                self.assertTrue(entry["headers"]["user-agent"].startswith("chatgpt_oauth/1.0.0"))

    def test_an_account_without_an_organization_uses_its_plan(self):
        self.double.organization = None
        err = self.sign_in()
        self.assertIn("missing organization_id", err)
        self.assertIn("https://platform.openai.com", err)
        self.assertIn("your ChatGPT plan", err)
        self.assertNotIn("api_key", self.stored())
        models = json.loads(self.models_file.read_text())
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
        sent = [e for e in self.double.requests if e["grant"] == "codex"][0]
        self.assertEqual(sent["fields"]["client_version"], "0.169.0")
        self.assertEqual(sent["headers"]["originator"], "chatgpt_oauth")
        self.assertEqual(sent["headers"]["chatgpt-account-id"], "acct-1")
        code, out, err = self.run_program("status")
        self.assertEqual(code, 0)
        self.assertIn("\nNo API key", out)
        self.assert_fails(self.run_program("env"), 1, "no API key", "--access-token")
        self.assert_fails(self.run_program("token", "--api-key"), 1, "no API key")
        code, out, err = self.run_program("env", "--access-token", "--shell", "json")
        stored = self.stored()
        expected = {
            "CHATGPT_OAUTH_ACCESS_TOKEN": stored["access_token"],
            "CHATGPT_OAUTH_ACCOUNT_ID": "acct-1",
        }
        self.assertEqual(json.loads(out), expected)

    def test_the_browser_is_told_only_when_the_tokens_are_on_disk(self):
        seen = []

        def look(handler, fields):
            seen.append(self.token_file.exists())
            return False

        self.double.faults["key"] = look
        self.double.delay = 0.1
        running = self.start("auth", "--no-browser")
        pages = visit(visit(running.url(), follow=False)[0][2]["location"], follow=False)
        self.assertTrue(self.token_file.exists())
        self.assertEqual(pages[0][1], 303)
        visit(urllib.parse.urljoin(pages[0][0], "/success"))
        self.assertEqual(running.end()[0], 0)
        self.assertEqual(seen, [True])

    def test_the_program_waits_for_the_success_page_five_seconds_at_most(self):
        running = self.start("auth", "--no-browser")
        visit(visit(running.url(), follow=False)[0][2]["location"], follow=False)
        began = time.monotonic()
        running.saying("Next: ")
        self.assertLess(time.monotonic() - began, 3)
        self.assertEqual(running.end()[0], 0)
        self.assertLess(4, time.monotonic() - began)
        self.assertLess(time.monotonic() - began, 7)

    def test_the_browser_opens_by_itself_and_sees_no_secret(self):
        self.store(api_key="sk-before")
        seen = self.folder / "seen.json"
        script = self.folder / "browser.py"
        script.write_text(
            "import json, os, sys\n"
            f"json.dump([sys.argv, dict(os.environ)], open({str(seen)!r}, 'w'))\n"
            f"sys.path.insert(0, {str(pathlib.Path(HERE).parent)!r})\n"
            "import test_chatgpt_oauth as tests\n"
            "print('noise from the browser'); tests.visit(sys.argv[1])\n"
        )
        environ = {
            "BROWSER": f"{sys.executable} {script} %s",
            "OPENAI_API_KEY": "sk-before",
            "CHATGPT_OAUTH_API_KEY": "sk-other",
        }
        code, out, err = self.run_program("auth", environ=environ)
        self.assertEqual((code, out), (0, ""), err)
        self.assertNotIn("noise", err)
        arguments, inherited = json.loads(seen.read_text())
        self.assertNotIn("sk-", " ".join(arguments) + json.dumps(inherited))
        self.assertIn("PATH", inherited)

    def test_a_catalogue_that_cannot_be_had_does_not_undo_the_sign_in(self):
        self.double.faults["api"] = lambda handler, _: self.double.reply(handler, 500, b"{}")
        err = self.sign_in()
        self.assertIn("warning: listing the models failed (HTTP 500)", err)
        self.assertIn("Next: ", err)
        self.assertTrue(self.stored()["api_key"])
        self.assertFalse(self.models_file.exists())

    def test_a_failed_key_exchange_does_not_undo_the_sign_in(self):
        self.double.faults["key"] = lambda handler, _: self.double.reply(handler, 500, b"oops")
        err = self.sign_in()
        self.assertIn("warning: no API key", err)
        self.assertIn("your ChatGPT plan", err)

    def test_the_same_account_keeps_its_api_key_while_it_is_accepted(self):
        self.sign_in()
        key = self.stored()["api_key"]
        self.store(self.stored(), mine="kept")
        self.sign_in()
        self.assertEqual(self.stored()["api_key"], key)
        self.assertEqual(self.stored()["mine"], "kept")
        self.assertEqual(self.double.count("key"), 1)
        self.double.faults["api"] = lambda handler, _: self.double.reply(handler, 503, b"{}")
        self.sign_in()
        self.assertEqual(self.stored()["api_key"], key)
        del self.double.faults["api"]
        self.double.api_keys.clear()
        self.sign_in()
        self.assertNotEqual(self.stored()["api_key"], key)
        self.assertEqual(self.double.count("key"), 2)
        self.assertEqual(self.double.count("revoke"), 0)

    def test_another_account_brings_its_own_and_the_old_sign_in_is_revoked(self):
        self.sign_in()
        old = self.stored()
        self.store(old, mine="gone")
        self.double.account, self.double.organization = "acct-2", None
        self.sign_in()
        self.assertNotIn("api_key", self.stored())
        self.assertNotIn("mine", self.stored())
        self.assertEqual(self.stored()["account_id"], "acct-2")
        self.assertNotIn(old["refresh_token"], self.double.refresh_tokens)
        sent = [e for e in self.double.requests if e["grant"] == "revoke"][0]["fields"]
        self.assertEqual(sent["token_type_hint"], "refresh_token")
        self.assertEqual(sent["client_id"], self.double.client_id)

    def test_a_broken_sign_in_leaves_the_old_one_alone(self):
        before = self.store()
        self.double.faults["code"] = lambda handler, _: self.double.reply(handler, 400, b"{}")
        running = self.start("auth", "--no-browser")
        page = visit(running.url())[-1]
        self.assertEqual(page[1], 400)
        self.assertIn("The sign-in failed", page[3])
        self.assert_fails(running.end(), 1, "exchanging the authorization code failed (HTTP 400)")
        self.assertEqual(self.stored(), before)

    def test_a_declined_consent_is_explained_in_page_and_terminal(self):
        for error, description, words in (
            ("access_denied", "The <b>user</b> \x1b[31mdeclined", "the sign-in was refused"),
            ("access_denied", "missing_codex_entitlement", "administrator"),
        ):
            running = self.start("auth", "--no-browser")
            fields = urllib.parse.parse_qs(urllib.parse.urlsplit(running.url()).query)
            answer = {"error": error, "error_description": description, "state": fields["state"][0]}
            page = visit(fields["redirect_uri"][0] + "?" + urllib.parse.urlencode(answer))[-1]
            self.assertIn(words, page[3])
            self.assertNotIn("<b>user", page[3])
            err = self.assert_fails(running.end(), 1, words)
            self.assertNotIn("\x1b", err + page[3])

    def test_nothing_secret_is_in_the_process_list(self):
        self.double.delay = 0.15
        running = self.start("auth", "--no-browser")
        seen = []
        stop = threading.Event()

        def watch():
            while not stop.is_set():
                seen.append(subprocess.run(["ps", "axww"], stdout=subprocess.PIPE).stdout.decode())
                time.sleep(0.03)

        if not shutil.which("ps"):
            self.skipTest("no ps here")
        watcher = threading.Thread(target=watch)
        watcher.start()
        visit(running.url())
        self.assertEqual(running.end()[0], 0)
        stop.set()
        watcher.join()
        self.assertTrue(any(PROGRAM in each for each in seen))
        self.assert_no_secret(*seen)


if __name__ == "__main__":
    unittest.main()
