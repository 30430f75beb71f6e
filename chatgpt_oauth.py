#!/usr/bin/env python3
"""Sign in with ChatGPT the way OpenAI's Codex CLI does, with one Python file and no dependencies.

    auth      sign in with ChatGPT and import its models
    status    show who is signed in and which models are imported
    models    list the account's models and import them into Code Puppy
    env       print shell code that exports the API key
    exec      run a command with the API key in its environment
    token     print a valid access token, refreshed if needed
    accounts  list all accounts that are signed in here
    logout    sign out and remove the tokens and imported models
    install   install this file as the command chatgpt-oauth (uninstall removes it)

How a sign-in works.  `auth` opens the browser at an authorization URL (RFC 6749, section 4.1, with
PKCE, RFC 7636) and listens on the loopback interface (RFC 8252, section 7.3) for the authorization
response.  Pasting the URL that the browser ends on, or entering a device code (RFC 8628), leads to
the same authorization code.  The code is exchanged for tokens, and the tokens are saved before
anything else happens.  If the account belongs to an organization, the ID token is then exchanged
for an API key (RFC 8693).  Finally, the models that the key or the ChatGPT plan pays for are
written to the file in which Code Puppy looks for them.

After that, everything that needs an access token calls `Session.valid_tokens`, which refreshes
expiring tokens under a lock shared by all processes.  The lock is necessary because each of
OpenAI's refresh tokens works only once: if two programs refreshed at the same moment, one of them
would be signed out.

`auth --official` uses OpenAI's official sign-in for apps instead, with a client ID that OpenAI
issues to this installation.  The file can also be imported as a module (`get_access_token` and six
more functions).  In Code Puppy's plugin directory it is a plugin with similar commands.

Anyone who can read the token file can use the account.  The file is therefore readable only by its
owner, and `env` and `token` are the only commands that print a secret from it.  `exec` passes the
key to a single process.

Unofficial: not made, endorsed or supported by OpenAI.  License: MIT.
"""

from __future__ import annotations

# On Python before 3.8, the next line is a syntax error. Its traceback shows this name, which tells
# the person what is needed.
(PYTHON_3_8_OR_LATER_IS_NEEDED := True)

# Heavier modules than these (HTTP, TLS, argparse, even base64) are imported in the functions that
# need them, because `env`, `token` and `status` run every time a shell starts. E402 doesn't apply
# because the version check has to come first.
import sys  # noqa: E402

# Python puts the directory of a script first in its search path, or the current directory if it
# was started with -m or reads the script from standard input. A file named json.py there, say in a
# downloads folder, would be imported instead of Python's own module. With -I and -P there is no
# such entry. In a frozen program (PyInstaller), the first entry holds Python's own modules.
IS_SAFE_PATH = sys.flags.isolated or getattr(sys.flags, "safe_path", False)
if __name__ == "__main__" and not IS_SAFE_PATH and not hasattr(sys, "frozen"):
    del sys.path[0]

COMPLETE_PYTHON = "install a complete Python (Debian and Ubuntu: apt install python3)"
try:
    import builtins
    import contextlib
    import errno
    import json
    import os
    import re
    import stat
    import time
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: this Python has no module {error.name}\nhint: {COMPLETE_PYTHON}")

# Type checkers treat TYPE_CHECKING as true. Importing it from `typing` would slow down each start
# by several milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from concurrent.futures import Future
    from socket import socket as Socket  # noqa: N812
    from typing import Any, Callable, Dict, Iterator, List, NoReturn, Optional, Set, Tuple, Union

    # Python 3.8 cannot subscript Future, but it never runs this block. "novm" tells that to vermin,
    # the tool that checks which Python versions this file supports.
    AnyFuture = Future[Any]  # novm
    AnyCallable = Callable[..., Any]
    # A JSON object.
    Fields = Dict[str, Any]
    # Receives a kind of message, a text, and optionally a command: see Terminal.notify.
    Notify = Callable[..., None]

__version__ = "1.2.0"


# ---------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------
# All defaults are in CHATGPT_OAUTH_CONFIG, which may be edited. Each key can be overridden for one
# run by the environment variable CHATGPT_OAUTH_ + the key in capitals. Every value, edited or not,
# is checked against its rule in RULES before anything is read, written or sent, so the rest of the
# program can rely on the form of each setting.

CHATGPT_OAUTH_CONFIG: Dict[str, Any] = {
    "issuer": "https://auth.openai.com",
    # The Codex CLI's client ID. It is public (RFC 6749 §2.1) and authenticates nobody. The sign-in
    # is protected by PKCE and by the loopback redirect.
    "client_id": "app_EMoamEEZ73f0CkXaXp7hrann",
    "scope": "openid profile email offline_access",
    # OpenAI compares the whole redirect URI and has registered only these two ports.
    "redirect_host": "http://localhost",
    "redirect_path": "auth/callback",
    "required_port": 1455,
    "fallback_port": 1457,
    # An address to listen on instead of the loopback addresses, such as 0.0.0.0 for the published
    # port of a container. Other machines may be able to reach it.
    "callback_bind": "",
    # Seconds for the whole sign-in in the browser.
    "callback_timeout": 120,
    "api_base_url": "https://api.openai.com",
    "codex_base_url": "https://chatgpt.com/backend-api/codex",
    # The plan's usage, for `status --online`. OpenAI doesn't document this endpoint.
    "usage_url": "https://chatgpt.com/backend-api/wham/usage",
    # The Codex backend lists only the models that this version of the Codex CLI supports. The
    # current one is at https://github.com/openai/codex/releases.
    "codex_client_version": "0.171.0",
    # None means $XDG_DATA_HOME/code_puppy if that variable is set, otherwise ~/.code_puppy. Code
    # Puppy chooses its directory the same way.
    "home": None,
    # The name of the account to use, or "" for the account without a name.
    "account": "",
    # The name of each imported model begins with this.
    "prefix": "chatgpt-",
    # The context length, in tokens, of models for which it's unknown. None means API_CONTEXT_LENGTH
    # for models of the API and PLAN_CONTEXT_LENGTH for those of the ChatGPT plan.
    "default_context_length": None,
    # Shell globs: which models are imported, and which of these are left out. --include
    # replaces both, and --exclude adds to the second.
    "model_patterns": "gpt-*,o1-*,o3-*",
    "model_excludes": "*-audio*,*-image*,*-realtime*,*-transcribe*,*-tts*",
    # API models that Code Puppy calls through /v1/chat/completions. It calls all others through
    # /v1/responses, because since gpt-5.4 the chat completions endpoint rejects requests that
    # combine tools with a reasoning effort.
    "chat_patterns": "gpt-3*,gpt-4*",
    # Where the models come from: "api" (billed to the API account), "codex" or "official" (covered
    # by the ChatGPT plan). "auto" means "official" if that is the only sign-in, otherwise "api" if
    # there is an API key, otherwise "codex".
    "model_source": "auto",
    # The ID of the only ChatGPT workspace to sign in to, or "" to allow any.
    "workspace": "",
    # The name under which the official sign-in lists this app.
    "agent_name": "Code Puppy (chatgpt_oauth)",
    # Tells the authorization page and the Codex backend which program this is.
    "originator": "chatgpt_oauth",
    # Seconds for one whole request, name lookup included.
    "request_timeout": 30,
    # A failed refresh may be tried again for this many seconds after the first try.
    "retry_window": 20,
    # Seconds to wait for another process's refresh or sign-in.
    "lock_timeout": 60,
    # The variable that `env` and `exec` set, and that the models' entries refer to.
    "api_key_env_var": "CHATGPT_OAUTH_API_KEY",
}

# The longest context, in tokens, that is accepted. The limit is our own, far above that of any
# model, so a larger number must be a mistake.
MAX_CONTEXT_LENGTH = 10**9
MODEL_ID = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"
LOOPBACK = r"(?:localhost|127\.[0-9]+\.[0-9]+\.[0-9]+|\[::1\])"
# The parts of a host name have 1 to 63 characters each (RFC 1035 §2.3.4). Python raises ValueError
# for other names. IPv6 addresses in brackets aren't accepted, except [::1].
HOST_NAME = r"[\w-]{1,63}(?:\.[\w-]{1,63})*\.?"


class Rule:
    """The format of a setting: a regular expression, and a description of it for error messages.

    The value is the group named `value`, if the pattern has one, otherwise the whole text. It is
    converted by calling `kind`. A group named `number` must be between `low` and `high`. If the
    setting is `optional`, None is valid, too, and stays None.
    """

    def __init__(
        self,
        pattern: str,
        meaning: str,
        kind: Any = str,
        low: float = 0,
        high: float = 0,
        optional: bool = False,
    ) -> None:
        self.pattern, self.meaning, self.kind = pattern, meaning, kind
        self.low, self.high, self.optional = low, high, optional

    def check(self, name: str, value: object) -> Any:
        """Return `value` in its normal form. Raises UsageError, naming `name`, if it is invalid."""
        if value is None and self.optional:
            return None
        text = str(value)
        found = re.fullmatch(self.pattern, text, re.ASCII)
        groups = found.groupdict() if found else {}
        number = groups.get("number")
        if not found or (number and not self.low <= float(number) <= self.high):
            raise UsageError(f"{name} must be {self.meaning}")
        return self.kind(groups.get("value", text))


# With Any, type checkers accept declarations such as `issuer: str = URL_RULE` in Settings.
new_rule: Any = Rule
DECIMAL = r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,9})?)"
INTEGER = r"(?P<number>[0-9]{1,10})"
_SCHEME_AND_HOST = rf"(?:https://{HOST_NAME}|https?://{LOOPBACK})"
_PATH = r"/[\w.~%/-]*"
# Trailing slashes are removed because the paths of endpoints, which start with a slash, are
# appended to the URL. `low` and `high` limit the port.
URL_RULE = new_rule(
    rf"(?P<value>{_SCHEME_AND_HOST}(?::{INTEGER})?(?:{_PATH})?)",
    "an https URL (http for localhost)",
    kind=lambda url: url.rstrip("/"),
    low=1,
    high=65535,
)
WORD_RULE = new_rule(r"[!-~]+", "printable ASCII without spaces")
SECONDS_RULE = new_rule(DECIMAL, "0.001 to 86400 seconds", float, 0.001, 86400)
PORT_RULE = new_rule(INTEGER, "a number from 1 to 65535", int, 1, 65535)
# An IPv4 address, or roughly an IPv6 address.
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
_ADDRESS = rf"{_OCTET}(?:\.{_OCTET}){{3}}|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*"
_GLOBS = "glob patterns separated by commas"
WORKSPACE_RULE = new_rule(r"[\w.-]{1,128}", "an ID of letters, digits and . _ -")
# The name is part of a directory's path, of models' names and of variables' names. Windows reserves
# the names of devices. The models of the account `plan` would be named like those of the official
# sign-in. The API key of the account `env-var` would be in CHATGPT_OAUTH_API_KEY_ENV_VAR, which
# overrides the setting `api_key_env_var`.
ACCOUNT_RULE = new_rule(
    r"(?!(?:plan|env-var|con|prn|aux|nul|(?:com|lpt)[0-9])$)[a-z0-9][a-z0-9-]{0,31}",
    "1 to 32 of a-z, 0-9 and - (not plan or con)",
)


class Settings:
    """The settings of one account: CHATGPT_OAUTH_CONFIG, overridden by environment variables.

    `account` is the account's name, or "" for the account without a name. None means that the
    setting `account` decides. The name is part of `directory` (where the account's files are),
    `prefix` and `api_key_env_var`. `suffix` is appended to the names of other variables.

    Each key of the configuration is an attribute: its rule in the class, its value in an instance.
    `environ` is a copy of the environment with which this process was started, and `home_variable`
    is the variable that decides where `home` is. Raises UsageError, naming the setting, for an
    invalid value.
    """

    issuer: str = URL_RULE
    client_id: str = WORD_RULE
    scope: str = new_rule(r"[!-~][ -~]*", "a list of scopes separated by spaces")
    redirect_host: str = new_rule(
        r"http://(?:localhost|127\.0\.0\.1)", "http://localhost or http://127.0.0.1"
    )
    # The listener serves its own page at /success, to which the browser is sent after a sign-in.
    redirect_path: str = new_rule(
        r"/?(?P<value>(?!success$)[\w.~-][\w.~/-]*)", "a path such as auth/callback"
    )
    required_port: int = PORT_RULE
    fallback_port: int = PORT_RULE
    callback_bind: str = new_rule(f"(?:{_ADDRESS})?", "an IP address")
    callback_timeout: float = SECONDS_RULE
    api_base_url: str = URL_RULE
    codex_base_url: str = URL_RULE
    usage_url: str = URL_RULE
    codex_client_version: str = new_rule(r"[\w.+-]{1,64}", "a version such as 0.171.0")
    # Settings expands a leading ~ first. If it is still there, it couldn't be expanded.
    home: str = new_rule(r"(?!~)[^\0]+", "a directory path")
    account: str = new_rule(f"(?:{ACCOUNT_RULE.pattern})?", ACCOUNT_RULE.meaning)
    prefix: str = new_rule(MODEL_ID, "letters, digits and . _ : - (128 at most)")
    default_context_length: Optional[int] = new_rule(
        INTEGER, f"a number up to {MAX_CONTEXT_LENGTH}", int, 1, MAX_CONTEXT_LENGTH, optional=True
    )
    model_patterns: str = new_rule(r"[!-~]+", _GLOBS)
    model_excludes: str = new_rule(r"[!-~]*", _GLOBS)
    chat_patterns: str = new_rule(r"[!-~]*", _GLOBS)
    model_source: str = new_rule("auto|api|codex|official", "auto, api, codex or official")
    workspace: str = new_rule(f"(?:{WORKSPACE_RULE.pattern})?", WORKSPACE_RULE.meaning)
    # OpenAI's limit for this name is unknown, so this one is our own.
    agent_name: str = new_rule(r"[!-~](?:[ -~]{0,98}[!-~])?", "printable ASCII text (100 at most)")
    originator: str = WORD_RULE
    request_timeout: float = SECONDS_RULE
    retry_window: float = SECONDS_RULE
    lock_timeout: float = SECONDS_RULE
    api_key_env_var: str = new_rule(r"[A-Za-z_][A-Za-z0-9_]*", "a name of letters, digits and _")

    def __init__(self, account: Optional[str] = None) -> None:
        self.environ = original_environ()
        self.home_variable = "CHATGPT_OAUTH_HOME"
        for key, rule in RULES.items():
            variable = "CHATGPT_OAUTH_" + key.upper()
            name, value = f'CHATGPT_OAUTH_CONFIG["{key}"]', CHATGPT_OAUTH_CONFIG.get(key)
            if variable in self.environ:
                name, value = variable, self.environ[variable]
            if key == "account" and account is not None:
                name, value = "account", account
            if key == "home":
                # Errors name the variable even if the value comes from the configuration, because
                # inside Code Puppy the plugin sets that key.
                name = variable
                value = self._default_home() if value is None else os.path.expanduser(str(value))
            setattr(self, key, rule.check(name, value))
        try:
            self.home = os.path.abspath(self.home)
        except OSError:
            raise UsageError(
                "CHATGPT_OAUTH_HOME is a relative path and the current directory is gone"
            ) from None
        # Windows turns device names such as CON, NUL and COM1 into paths that start like this.
        if self.home.startswith("\\\\.\\"):
            raise UsageError("CHATGPT_OAUTH_HOME must be a directory path, not a device's name")
        self.directory, self.suffix = self.home, ""
        if self.account:
            self.directory = os.path.join(self.home, "accounts", self.account)
            self.suffix = "_" + self.account.upper().replace("-", "_")
            self.prefix += self.account + "-"
            self.api_key_env_var += self.suffix

    def account_names(self) -> List[str]:
        """Return the names of all accounts that have a directory, starting with "" for no name."""
        names: List[str] = []
        with contextlib.suppress(OSError):
            names = os.listdir(os.path.join(self.home, "accounts"))
        return ["", *sorted(name for name in names if re.fullmatch(ACCOUNT_RULE.pattern, name))]

    def _default_home(self) -> str:
        base = self.environ.get("XDG_DATA_HOME")
        if base:
            self.home_variable = "XDG_DATA_HOME"
            return os.path.expanduser(os.path.join(base, "code_puppy"))
        self.home_variable = "USERPROFILE" if sys.platform == "win32" else "HOME"
        home = os.path.expanduser("~/.code_puppy")
        # The path still starts with ~ if the variable isn't set and the system's account database
        # has no home directory for this user either.
        if home.startswith("~"):
            variable = self.home_variable
            raise UsageError(f"{variable} is not set", f"set {variable} or CHATGPT_OAUTH_HOME")
        return home


RULES = {name: each for name, each in vars(Settings).items() if isinstance(each, Rule)}


def original_environ() -> Dict[str, str]:
    """Return the environment without the locale that Python has added to it (PEP 538).

    If there isn't a locale, as in cron, Python sets LC_CTYPE to one of three values, and the
    programs that we start would inherit that.
    """
    # A variable whose name is empty is dropped because it can't be passed to another process.
    environ = {name: value for name, value in os.environ.items() if name}
    is_one_of_three = environ.get("LC_CTYPE") in ("C.UTF-8", "C.utf8", "UTF-8")
    # Python leaves LC_CTYPE alone if LC_ALL is set.
    if not is_one_of_three or environ.get("LC_ALL"):
        return environ
    try:
        with os.fdopen(os.open("/proc/self/environ", os.O_RDONLY), "rb") as file:
            entries = file.read().decode(errors="surrogateescape").split("\0")
        original = [entry for entry in entries if entry.startswith("LC_CTYPE=")]
    except OSError:
        # Without /proc, UTF-8 mode is the sign that Python has added the locale. Python doesn't
        # turn that mode on for a locale that the person has set.
        original = [] if sys.flags.utf8_mode else ["LC_CTYPE=" + environ["LC_CTYPE"]]
    del environ["LC_CTYPE"]
    for entry in original:
        environ["LC_CTYPE"] = entry.partition("=")[2]
    return environ


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------
# Every failure that a person can do something about is an OAuthError: one line that says what
# happened, the next step, and the exit code of the command. The commands report it with
# `report_error`. Its text never contains a secret, and printable() makes it safe for a terminal.
#
#     OAuthError                   1  refused or failed
#     ├── UsageError               2  the command line or a setting is wrong
#     ├── NotSignedInError         3  nobody is signed in
#     │   └── OfficialOnlyError    1  the only sign-in is the official one
#     ├── NoApiKeyError            1  the account has no API key
#     ├── SignInEndedError         4  only a new sign-in helps
#     │   └── InvalidGrantError    4  the server refused the refresh token
#     ├── RefusedError             1  the server refused the API key or the access token
#     ├── UnavailableError         5  network, proxy, certificate or lock trouble
#     │   └── RequestError         5  a request got no usable response
#     └── StorageError             6  a file cannot be read or written

# The commands that have the option --account.
ACCOUNT_COMMANDS = ("auth", "status", "models", "env", "exec", "token", "logout")


def printable(text: str, limit: int = 2000) -> str:
    """Return `text`, cut after `limit` characters, with unprintable characters replaced by "?".

    str.isprintable() is false for everything that could control a terminal: control characters,
    escape sequences, bidirectional overrides and line breaks.
    """
    if len(text) > limit:
        text = text[:limit] + "..."
    return "".join(c if c.isprintable() else "?" for c in text)


def with_account(command: str, account: str) -> str:
    """Return `command`, such as "auth --device", with the option that selects `account`.

    It stays as it is if it already names an account, or if it is a command for all accounts.
    """
    name, space, rest = command.partition(" ")
    if not account or name not in ACCOUNT_COMMANDS or "--account" in rest:
        return command
    return f"{name} --account {account}{space}{rest}"


def for_account(notify: Notify, account: str) -> Notify:
    """Return a function like `notify` that names `account` in the commands of its messages."""

    def notify_for_account(kind: str, text: str, command: str = "") -> None:
        # The text of such a message is a command itself.
        if kind == "command":
            text = with_account(text, account)
        notify(kind, text, with_account(command, account))

    return notify_for_account if account else notify


class Hint:
    """A hint to give later: its text, and the command with which it ends, or ""."""

    def __init__(self, text: str, command: str = "") -> None:
        self.text, self.command = text, command


class OAuthError(Exception):
    """A reason why a command failed, in one line.

    `hint` is the next step, or None if a UsageError or a StorageError is raised without one.
    `command` is the command with which the hint ends, such as "auth --device", or "". Reporting the
    error adds the program's name. A Hint can be passed instead of these two. `exit_code` is the
    exit code of the command that failed.
    """

    exit_code = 1
    # The hint of an error that comes without one. Most of these are unexpected responses.
    usual_hint = "try again later; if that does not help, update this program"

    def __init__(self, message: str, hint: Union[str, Hint] = "", command: str = "") -> None:
        super().__init__(printable(message))
        if isinstance(hint, Hint):
            command, hint = hint.command, hint.text
        self.hint = printable(hint or self.usual_hint) or None
        self.command = command

    def set_default_hint(self, command: str, text: str = "to try again, run") -> None:
        """Replace the usual hint by `text` with `command`. A more specific hint stays."""
        # If the class has no usual hint (""), `hint` is None or specific, so it never matches.
        if self.hint == self.usual_hint:
            self.hint, self.command = text, command

    def to_members(self) -> Fields:
        """Return everything about this error as JSON values, for another process."""
        return {"type": type(self).__name__, "message": str(self), **vars(self)}

    @staticmethod
    def from_members(members: Fields) -> OAuthError:
        """Return the error that `to_members` was called for."""
        members = dict(members)
        kind = globals()[members.pop("type")]
        # __init__ isn't called, because the subclasses have different parameters.
        error: OAuthError = kind.__new__(kind, members.pop("message"))
        vars(error).update(members)
        return error


class UsageError(OAuthError):
    """An error in the command line or in a setting."""

    exit_code = 2
    usual_hint = ""


class NotSignedInError(OAuthError):
    """An attempt to use a sign-in when nobody is signed in."""

    exit_code = 3


class OfficialOnlyError(NotSignedInError):
    """The only sign-in is the official one, and its tokens can't be used for this command."""

    exit_code = 1


class NoApiKeyError(OAuthError):
    """The account has no API key."""


class SignInEndedError(OAuthError):
    """The end of a sign-in that can't be continued, so that the person must sign in again."""

    exit_code = 4

    def __init__(self, message: str, command: str) -> None:
        super().__init__(message, "to sign in again, run", command)


class RefusedError(OAuthError):
    """A refusal of the API key or the access token by a server."""


class UnavailableError(OAuthError):
    """Trouble with the network, a proxy, a certificate or a lock. Nothing is lost."""

    exit_code = 5


class StorageError(OAuthError):
    """A file that can't be read or written, or whose content isn't what it should be."""

    exit_code = 6
    usual_hint = ""


# The errors of a system that is out of resources, and what to do then.
AT_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
LIMITS_HINT = "close some programs, then try again"


def limits_error(error: OSError) -> UnavailableError:
    """Return the error for a system call that failed because the system is out of resources."""
    return UnavailableError(f"this system is at its limits ({error.strerror})", LIMITS_HINT)


@contextlib.contextmanager
def as_oauth_errors() -> Iterator[None]:
    """Raise OAuthError if this Python lacks a module or the system is out of resources."""
    try:
        yield
    except ImportError as error:
        # An interpreter that is shutting down can't import anything any more.
        if not error.name:
            raise UnavailableError("Python is shutting down", "try again") from None
        # Some distributions split Python into packages and install only a part (python3-minimal).
        raise OAuthError(f"this Python has no module {error.name}", COMPLETE_PYTHON) from None
    except MemoryError:
        raise UnavailableError("this program cannot get enough memory", LIMITS_HINT) from None
    except OSError as error:
        if error.errno not in AT_LIMITS:
            raise
        raise limits_error(error) from None


def unexpected_error(error: Exception) -> OAuthError:
    """Return the OAuthError that reports an exception that nothing else has handled."""
    if isinstance(error, OAuthError):
        return error
    if isinstance(error, OSError):
        what = f"cannot use {error.filename}" if error.filename else "a system call failed"
        return StorageError(f"{what}: {error.strerror}")
    import traceback

    # The error's text might contain a secret, so only its type is reported, and the line of this
    # file that was running, even if the exception was raised in another file.
    this_file = unexpected_error.__code__.co_filename
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == this_file]
    name = type(error).__name__
    text = f"internal error: {name} at line {lines[-1]}; this is a bug"
    return OAuthError(text, "report it, with the command and what --version prints")


def report_error(notify: Notify, error: OAuthError, kind: str = "error") -> None:
    """Report `error` and its hint to a person. `kind` is "error" or "warning"."""
    notify(kind, str(error))
    if error.hint:
        notify("hint", error.hint, error.command)


# ---------------------------------------------------------------------------------------------
# Wire: how requests reach OpenAI's servers, and what their responses say
# ---------------------------------------------------------------------------------------------
# Every request to OpenAI goes through `request_json`. It ends within its timeout, follows no
# redirect, and reads a limited number of bytes. A failure is an OAuthError whose text contains
# nothing secret. A RequestError tells whether the server may have processed the request, because a
# refresh token or an authorization code must not be sent twice unless it certainly wasn't used.
# Nothing here reads or writes a file of ours.

MEBIBYTE = 1 << 20
# The largest list of models that is read from a server or a file, in bytes.
MODELS_LIMIT = 8 * MEBIBYTE
# Seconds before the second try of a request. It doubles with each further try, up to the limit.
RETRY_PAUSE = 0.5
RETRY_PAUSE_LIMIT = 4.0
# Seconds. Windows can't interrupt a wait, so Ctrl-C takes up to this long there.
WAIT_SLICE = 0.05
# Seconds after which another address of the same host is tried as well (RFC 8305 §8).
ATTEMPT_DELAY = 0.25
# The `retry_after` of an error that trying again can't fix.
NEVER = float("inf")
# The values of all other fields of a request are removed from the server's error messages.
PUBLIC_FIELDS = (
    "grant_type",
    "client_id",
    "redirect_uri",
    "resource",
    "requested_token",
    "subject_token_type",
    "token_type_hint",
)
# A string of this form and length in a server's error message may be a token, or a part of a URL
# that contains one.
LONG_WORD = r"[A-Za-z0-9._~+/=%-]{32,}"
# The longest text of a server that is shown or stored as a reason, in characters.
REASON_LIMIT = 200
# If a response is nested too deeply for Python's parser, everything below this level is dropped.
DEPTH_LIMIT = 20
# The longest token or key, in characters. No server accepts a longer one in a header, and a file of
# tokens stays well below the size that can be read.
TOKEN_LIMIT = 65536
# Larger numbers aren't accepted as seconds, because arithmetic with them could overflow. As a time
# since 1970, this is the year 5138.
NUMBER_LIMIT = 1e11
# 3000-12-31T23:59:59Z in seconds since 1970, the latest time that Windows can convert.
LAST_MOMENT = 32535215999
# The variables that can name a file of CA certificates. The first one that is set is used.
CA_VARIABLES = ("CODEX_CA_CERTIFICATE", "SSL_CERT_FILE")
# OpenSSL's most common reasons for refusing a certificate (X509_V_ERR_…, unnamed in Python).
# CERT_MISMATCH means that it is for another host name or IP address.
CERT_NOT_YET_VALID, CERT_EXPIRED = 9, 10
CERT_UNTRUSTED = (18, 19, 20, 21)
CERT_MISMATCH = (62, 64)
# The reasons that are shown in one word. All others are shown in OpenSSL's words.
CERTIFICATE_FAULTS = {
    CERT_EXPIRED: "expired",
    **dict.fromkeys(CERT_UNTRUSTED, "untrusted"),
    **dict.fromkeys(CERT_MISMATCH, "wrong"),
}
# The TLS contexts made so far, by the path of their CA certificates ("" for the system's).
_tls_contexts: Dict[str, Any] = {}


class RequestError(UnavailableError):
    """A request that got no usable response.

    `unprocessed` is true only if the request certainly had no effect. `retry_after` is how many
    seconds the server asks us to wait before the next try, or NEVER.
    """

    def __init__(
        self, message: str, hint: str = "", unprocessed: bool = False, retry_after: float = 0.0
    ) -> None:
        super().__init__(message, hint)
        self.unprocessed, self.retry_after = unprocessed, retry_after


class Retry:
    """The schedule for trying a request again, up to `window` seconds after the first try.

    The first time that a request is to be repeated, `notify` gets a warning with the reason.
    """

    def __init__(self, window: float, notify: Optional[Notify] = None) -> None:
        self.notify = notify
        self.deadline = time.monotonic() + window
        self.pause = RETRY_PAUSE

    def wait(self, error: RequestError) -> None:
        """Wait until the next try is due, or raise `error` if the request must not be repeated."""
        # Retry-After can be 0, which must not lead to a flood of requests.
        pause = max(self.pause, error.retry_after)
        if not error.unprocessed or time.monotonic() + pause > self.deadline:
            raise error
        if self.notify:
            self.notify("warning", str(error))
            self.notify("info", "Still trying...")
            self.notify = None
        time.sleep(pause)
        self.pause = min(self.pause * 2, RETRY_PAUSE_LIMIT)


def is_b64token(value: object) -> bool:
    """Whether `value` has the form of a bearer token (RFC 6750 §2.1).

    Such a string needs no quoting in an HTTP header or in a shell.
    """
    if not isinstance(value, str) or len(value) > TOKEN_LIMIT:
        return False
    return re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", value) is not None


def is_loopback(url: str) -> bool:
    """Whether the host in `url` is this machine, by name or by address."""
    return re.match(rf"https?://{LOOPBACK}(?:[:/]|$)", url) is not None


def parse_json(content: bytes) -> Any:
    """Return the value of a JSON text from a server, or None if the text isn't valid.

    Arrays and objects that are nested too deeply for Python's parser are taken as empty, so that
    one useless member of a response doesn't make us lose the tokens in it.
    """
    # A byte order mark may come first (RFC 8259 §8.1).
    text = content.decode("utf-8", "replace").lstrip("\ufeff")
    try:
        try:
            return json.loads(text, parse_int=parse_digits)
        except RecursionError:
            return json.loads(without_deep_parts(text), parse_int=parse_digits)
    except ValueError:
        return None


def parse_digits(digits: str) -> float:
    """Return the value of an integer in a JSON text, as a float if it has many digits."""
    # int() raises ValueError for thousands of digits (Python 3.11). A 64-bit integer has 19.
    return int(digits) if len(digits) <= 19 else float(digits)


def without_deep_parts(text: str) -> str:
    """Return a JSON text in which the arrays and objects at level DEPTH_LIMIT are empty."""
    kept, depth = [], 0
    # Each part is a string, text without strings and brackets, or a single bracket.
    for part in re.findall(r'"(?:[^"\\]|\\.)*"|[^"\[\]{}]+|.', text, re.DOTALL):
        # Both brackets of a pair are judged by the depth outside of it, so none is kept alone.
        if part in ("]", "}"):
            depth -= 1
        if depth < DEPTH_LIMIT:
            kept.append(part)
        if part in ("[", "{"):
            depth += 1
    return "".join(kept)


def decode_claims(jwt: Optional[str]) -> Fields:
    """Return the claims of a JWT (RFC 7519 §3), or {} if `jwt` isn't one.

    The signature isn't verified. The tokens came straight from the token endpoint over TLS, and the
    claims are used only for display and for telling accounts apart, never as proof of anything.
    """
    # Importing `base64` instead would make every start of a shell slower.
    from binascii import a2b_base64

    try:
        _, payload, _ = (jwt or "").split(".")
        # A JWT leaves out the padding (RFC 7515 §2), and a2b_base64 ignores excess padding.
        claims = parse_json(a2b_base64(payload.replace("-", "+").replace("_", "/") + "=="))
    except ValueError:
        claims = {}
    return claims if isinstance(claims, dict) else {}


def auth_claims(token: Optional[str], kind: str = "auth") -> Fields:
    """Return OpenAI's own claims in a token, or {}. `kind` is "auth" or "profile"."""
    claims = decode_claims(token).get(f"https://api.openai.com/{kind}")
    return claims if isinstance(claims, dict) else {}


def text_or_none(value: object) -> Optional[str]:
    """Return `value` if it is a string that isn't empty, otherwise None."""
    return value if isinstance(value, str) and value else None


def number_or_none(value: object) -> Optional[float]:
    """Return `value`, a number or a string of digits, as a number.

    Return None for anything else, and for a number that is negative or too large.
    """
    if isinstance(value, str) and re.fullmatch(DECIMAL, value, re.ASCII):
        return float(value)
    # In Python, True and False are integers, too.
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)) and 0 <= value < NUMBER_LIMIT:
        return value
    return None


def timestamp(moment: float) -> str:
    """Return `moment` (seconds since 1970) as a UTC time in ISO 8601, ending in Z."""
    # A clock that is centuries off must not cause an error here, because the caller is about to
    # store new tokens.
    moment = min(max(0.0, moment), LAST_MOMENT)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def timestamp_or_none(moment: Optional[float]) -> Optional[str]:
    return None if moment is None else timestamp(moment)


def parse_timestamp(value: object) -> Optional[float]:
    """Return an ISO 8601 time, or a number of seconds, as seconds since 1970, otherwise None.

    A time without a zone is UTC.
    """
    from datetime import datetime, timezone

    if not isinstance(value, str):
        return number_or_none(value)
    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    return None


def without_secrets(text: str, private: Set[str]) -> str:
    """Return a server's text without the `private` strings and without anything like a token."""
    for secret in private - {""}:
        text = text.replace(secret, "[...]")

    def replacement(found: Any) -> str:
        # Only letters of one case, underscores and versions such as v2: this is an error code, not
        # a token.
        is_error_code = re.fullmatch(r"(?:[a-z_]|_v\d_)+|[A-Z_]+", found[0]) is not None
        return found[0] if is_error_code else "[...]"

    return printable(re.sub(LONG_WORD, replacement, text), REASON_LIMIT)


class Response:
    """A server's response: its `status`, its `data` (parsed JSON or None), and its error.

    `code` and `text` are the error's code and description, or "". `detail` is the Codex backend's
    description, which may be a code. These three are for decisions. They must not be shown, because
    they may contain secrets. `reason` is the code and the description as a person may see them:
    without the values in `private` and without anything that looks like a token.
    """

    def __init__(self, status: int, body: bytes, retry_after: str, private: Set[str]) -> None:
        self.status = status
        self.is_success = 200 <= status < 300
        self.is_html = body.lstrip()[:1] == b"<"
        # A 401 with a web page comes from a proxy, not from OpenAI.
        self.is_unauthorized = status == 401 and not self.is_html
        self.retry_after = parse_retry_after(retry_after)
        self.data = parse_json(body)
        outer = self.data if isinstance(self.data, dict) else {}
        error, detail = outer.get("error"), outer.get("detail")
        # OpenAI's errors have the form {"error": {"code", "message"}}, and RFC 6749 §5.2's have
        # {"error", "error_description"}. A code may stand outside of `error`.
        if isinstance(error, dict):
            code = error.get("code") or outer.get("code") or error.get("type")
            text = error.get("message")
        else:
            code = error or outer.get("code")
            text = outer.get("error_description")
        # The Codex backend has {"detail"}, which is a text or another object with a code.
        if isinstance(detail, dict):
            detail = detail.get("code")
        else:
            text = text or detail
        self.code, self.detail = text_or_none(code) or "", text_or_none(detail) or ""
        self.text = text_or_none(text) or ""
        shown = (without_secrets(each, private) for each in (self.code, self.text))
        self.reason = ": ".join(each for each in shown if each)

    def error(self, what: str) -> OAuthError:
        """Return the error that reports this response as the reason why we could not `what`."""
        failed = f"could not {what} (HTTP {self.status})"
        if self.status == 429 or self.status >= 500:
            reason = "server error"
            if self.status == 429:
                reason = "too many requests"
            # A server that answers 429 or 503 did not process the request (RFC 6585 §4, RFC 9110
            # §15.6.4). With the code temporarily_unavailable it may have processed a part.
            unprocessed = self.status in (429, 503) and self.code != "temporarily_unavailable"
            text = f"{failed}: {reason}"
            return RequestError(text, "try again later", unprocessed, self.retry_after)
        if self.code == "unsupported_country_region_territory":
            text = f"{failed}: OpenAI does not serve your region"
            hint = "use a network in a supported region, then try again"
            return RequestError(text, hint, unprocessed=True, retry_after=NEVER)
        if self.is_html:
            return RequestError(
                f"{failed}: got a web page, not JSON",
                "a proxy, a bot check or a regional block sent it; check HTTPS_PROXY",
            )
        if 300 <= self.status < 400:
            hint = "check HTTPS_PROXY and your network, then try again"
            return OAuthError(f"{failed}: unexpected redirect", hint)
        # A proxy that asks for a password hasn't forwarded the request (RFC 9110 §15.5.8).
        if self.status == 407:
            text = f"{failed}: a proxy asks for a password"
            return cannot_send_error(text, proxy_password_hint(""))
        return OAuthError(f"{failed}: {self.reason}" if self.reason else failed)

    @property
    def members(self) -> Fields:
        """The JSON object of a successful response, otherwise {}."""
        return self.data if self.is_success and isinstance(self.data, dict) else {}

    def json_object(self, what: str) -> Fields:
        """Return the JSON object of a successful response. Raises OAuthError for any other."""
        if not self.is_success or self.is_html:
            raise self.error(what)
        if not isinstance(self.data, dict):
            raise OAuthError(f"could not {what}: the response is not a JSON object")
        return self.data


def parse_retry_after(header: str) -> float:
    """Return the seconds that Retry-After (RFC 9110 §10.2.3) asks for, 0.0 if it isn't valid."""
    from email.utils import parsedate_to_datetime

    # A date has 29 characters, and 9 digits are 31 years. Parsing no more than that is always fast.
    if header.isdecimal():
        return float(header[:9])
    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError, OSError):
        return max(0.0, parsedate_to_datetime(header[:40]).timestamp() - time.time())
    return 0.0


def tls_context(settings: Settings) -> Any:
    """Return the TLS context that all requests share.

    A sign-in calls this early, so that the slow modules and the certificates are loaded, and faults
    reported, before the first request. Raises RequestError, naming the variable at fault.
    """
    # This module isn't used here, but every request needs it, and importing it is slow.
    import urllib.request  # noqa: F401

    variable = next((name for name in CA_VARIABLES if settings.environ.get(name)), "")
    path = settings.environ.get(variable, "")
    if path not in _tls_contexts:
        _tls_contexts[path] = new_tls_context(settings, variable, path)
    return _tls_contexts[path]


def new_tls_context(settings: Settings, variable: str, path: str) -> Any:
    """Return a TLS context with the system's CA certificates and those in `path`, if it isn't "".

    `variable` is the one that names the path. Raises RequestError, naming the variable at fault.
    """
    try:
        import ssl
    except ImportError as error:
        text = f"this Python cannot use TLS ({error})"
        raise cannot_send_error(text, "use another Python") from None
    try:
        context = ssl.create_default_context()
    except OSError as error:
        # Either SSLKEYLOGFILE can't be opened, or this is PyPy, which raises an error without a
        # file name if the system has no CA certificates.
        if error.filename:
            fault = f"SSLKEYLOGFILE={settings.environ.get('SSLKEYLOGFILE')}"
            hint = "unset SSLKEYLOGFILE, or make the file writable"
        else:
            fault, hint = "CA certificates", untrusted_ca_hint(settings)
        raise cannot_send_error(f"cannot set up TLS: {fault}: {os_reason(error)}", hint) from None
    # OpenSSL doesn't know CODEX_CA_CERTIFICATE. It reads SSL_CERT_FILE on its own, but silently
    # ignores a file without certificates.
    if path:
        try:
            context.load_verify_locations(path)
        except OSError as error:
            reason = os_reason(error)
            if isinstance(error, ssl.SSLError):
                reason = "it holds no PEM certificate"
            text = f"cannot set up TLS: {variable}={path}: {reason}"
            hint = f"set {variable} to a PEM file of CA certificates, or unset it"
            raise cannot_send_error(text, hint) from None
    # Python 3.10 made this the default.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Python 3.13 turns on VERIFY_X509_STRICT, which rejects corporate CAs without a key usage
    # extension. Browsers, curl and older Pythons accept them.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def cannot_send_error(text: str, hint: str) -> RequestError:
    """Return the error for a request that can't be sent, now or later."""
    return RequestError(text, hint, unprocessed=True, retry_after=NEVER)


def os_reason(error: OSError) -> str:
    """Return the system's text for `error`. PyPy leaves `strerror` empty for some errors."""
    return error.strerror or os.strerror(error.errno or 0)


def certificate_hint(settings: Settings, code: int, place: str) -> str:
    """Return what to do if a server's certificate was refused.

    `code` is OpenSSL's reason. `place` is where the proxy is set, or "".
    """
    if code in (CERT_NOT_YET_VALID, CERT_EXPIRED):
        return f"check this computer's clock: its date is {time.strftime('%Y-%m-%d')}"
    if code in CERT_MISMATCH:
        if place:
            return f"check {place}: the proxy may have answered for the server"
        return "open a web page in a browser: this network may ask you to sign in first"
    return untrusted_ca_hint(settings)


def untrusted_ca_hint(settings: Settings) -> str:
    """Return what to do if a server's certificate comes from a CA that isn't trusted here."""
    import ssl

    for name in (*CA_VARIABLES, "SSL_CERT_DIR"):
        if settings.environ.get(name):
            return f"{name} does not include the CA that signed it; add it"
    paths = ssl.get_default_verify_paths()
    has_certificates = bool(paths.cafile)
    if not has_certificates and paths.capath:
        with contextlib.suppress(OSError):
            has_certificates = bool(os.listdir(paths.capath))
    # On Windows the certificates are in the system's store, not in files.
    if has_certificates or sys.platform == "win32":
        return "if your network inspects TLS, set SSL_CERT_FILE to its CA certificates"
    # The installer from python.org leaves this step to the person.
    if paths.openssl_cafile.startswith("/Library/Frameworks/Python.framework/"):
        folder = f"/Applications/Python {sys.version_info.major}.{sys.version_info.minor}"
        return f'run "{folder}/Install Certificates.command"'
    return "there are no CA certificates here (Debian: apt install ca-certificates)"


def wait_for(future: AnyFuture, seconds: float) -> bool:
    """Wait up to `seconds` for `future`, and return whether it is done.

    The time during which this process is suspended (Ctrl-Z, a frozen container) doesn't count, so a
    response that arrived meanwhile is still used.
    """
    from concurrent.futures import wait

    # Each slice of the wait counts at most its own length, however long it really took.
    while not future.done() and seconds > 0:
        began = time.monotonic()
        wait([future], min(WAIT_SLICE, seconds))
        seconds -= min(WAIT_SLICE, time.monotonic() - began)
    # The process may have been suspended during the last slice.
    wait([future], WAIT_SLICE)
    return future.done()


def find_proxy(settings: Settings, url: str) -> Tuple[str, str]:
    """Return the proxy for a request to `url` and where it is set, or two empty strings."""
    import urllib.parse
    import urllib.request

    proxies = urllib.request.getproxies()
    # An empty HTTPS_PROXY also means that ALL_PROXY applies, as for curl.
    proxy = proxies.get("https") or proxies.get("all") or ""
    host = urllib.parse.urlsplit(url).netloc
    if not proxy or is_loopback(url) or urllib.request.proxy_bypass(host):
        return "", ""
    for variable in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        if settings.environ.get(variable) == proxy:
            return proxy, variable
    return proxy, "the system's settings"


def proxy_password_hint(place: str) -> str:
    """Return what to do if a proxy, which is set in `place`, doesn't accept our password."""
    place = place or "HTTPS_PROXY"
    return f"check the name and password in {place} (http://NAME:PASSWORD@HOST:PORT)"


def parse_proxy(proxy: str, place: str) -> Tuple[str, int, Dict[str, str]]:
    """Return an HTTP proxy's host, its port, and the headers that authenticate us to it.

    `place` is where the proxy is set. Raises RequestError, naming the place.
    """
    import urllib.parse
    from binascii import b2a_base64

    # The scheme is often left out. Even if it is https, the connection to the proxy itself doesn't
    # use TLS.
    url = proxy if "://" in proxy else "http://" + proxy
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        is_valid = parts.scheme in ("http", "https") and bool(host)
    except ValueError:
        is_valid = False
    if not is_valid:
        fault = "it is not the URL of an HTTP proxy"
        if url.lower().startswith("socks"):
            fault = "SOCKS is not supported"
        text = f"cannot use the proxy in {place}: {fault}"
        raise cannot_send_error(text, "set HTTPS_PROXY to the URL of an HTTP proxy")
    headers = {}
    if parts.username:
        name = urllib.parse.unquote(parts.username)
        password = urllib.parse.unquote(parts.password or "")
        basic = b2a_base64(f"{name}:{password}".encode(), newline=False).decode()
        headers["Proxy-Authorization"] = "Basic " + basic
    return host, port, headers


def new_connection(settings: Settings, url: str, timeout: float) -> Any:
    """Return an http.client connection for one request to `url`, through the proxy if one is set.

    It isn't connected yet. `timeout` is the limit for each step of connecting, in seconds. Raises
    RequestError, naming the setting at fault, if the proxy or TLS can't be used.
    """
    import http.client
    import urllib.parse

    class FinalResponse(http.client.HTTPResponse):
        def begin(self) -> None:
            super().begin()
            # Interim responses can come first (RFC 9110 §15.2), and http.client skips only 100.
            # begin() reads the next response only if there are no headers yet.
            while 100 < self.status < 200 and self.status != 101:
                self.headers = None  # type: ignore[assignment]
                super().begin()

    server = urllib.parse.urlsplit(url)
    host, port = server.hostname or "", server.port
    proxy, place = find_proxy(settings, url)
    if proxy:
        host, port, proxy_headers = parse_proxy(proxy, place)
    connection: Any
    if server.scheme == "https":
        context = tls_context(settings)
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    if proxy:
        connection.set_tunnel(server.hostname, server.port, proxy_headers)
    connection.response_class = FinalResponse
    # By default, http.client tries a host's addresses one after the other and gives each of them
    # the whole timeout. It keeps that function in this attribute so that it can be replaced.
    connection._create_connection = connect_to_first
    return connection


def connect_to_first(host_and_port: Tuple[str, int], timeout: float, _: object = None) -> Socket:
    """Connect to a host and port, and return the first connection that is established.

    If an address doesn't answer within ATTEMPT_DELAY, the next one is tried as well (RFC 8305 §5).
    The name lookup comes first and isn't limited by `timeout`. If no address answers, the last
    error is raised, which is an OSError. http.client's third argument is always None here.
    """
    import selectors
    import socket

    waiting = in_turns(socket.getaddrinfo(*host_and_port, type=socket.SOCK_STREAM))
    deadline = time.monotonic() + timeout
    failure: OSError = TimeoutError()
    with selectors.DefaultSelector() as attempts, contextlib.ExitStack() as sockets:
        while waiting or attempts.get_map():
            if waiting:
                family, kind, protocol, _, address = waiting.pop(0)
                try:
                    attempt = sockets.enter_context(socket.socket(family, kind, protocol))
                    attempt.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        attempt.connect(address)
                except OSError as error:
                    failure = error
                    continue
                # The socket becomes writable when the attempt succeeds or fails.
                attempts.register(attempt, selectors.EVENT_WRITE)
            remaining = max(0.0, deadline - time.monotonic())
            pause = min(remaining, ATTEMPT_DELAY) if waiting else remaining
            for key, _ in attempts.select(pause):
                attempt = key.fileobj  # type: ignore[assignment]
                attempts.unregister(attempt)
                code = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    # All sockets in `sockets` are closed at the end, so return a duplicate.
                    connection = attempt.dup()
                    # This limits each step of the TLS and proxy handshakes that follow. 0 would
                    # make the socket non-blocking.
                    connection.settimeout(max(remaining, WAIT_SLICE))
                    return connection
                text = os.strerror(code)
                if sys.platform == "win32":
                    text = socket.errorTab.get(code, text)
                failure = OSError(code, text)
            if remaining == 0:
                raise TimeoutError
    raise failure


def in_turns(addresses: List[Any]) -> List[Any]:
    """Return the results of getaddrinfo with IPv6 and IPv4 taking turns (RFC 8305 §4).

    The family of the first address, which the system prefers, stays first.
    """
    from itertools import zip_longest

    preferred = [each for each in addresses if each[0] == addresses[0][0]]
    others = [each for each in addresses if each[0] != addresses[0][0]]
    return [each for pair in zip_longest(preferred, others) for each in pair if each]


class Exchange:
    """One request and its response.

    A name lookup can't be interrupted, and a socket's timeout starts again with each byte. So `run`
    is called in a thread of its own, and the caller of `wait` measures the time.
    """

    def __init__(
        self, connection: Any, request: Tuple[str, str, Optional[bytes], Dict[str, str]], limit: int
    ) -> None:
        from concurrent.futures import Future

        self.connection, self.request, self.limit = connection, request, limit
        # Receives the socket once the connection, including the proxy and TLS, is established,
        # before the request is sent. It is cancelled if connecting fails or takes too long.
        self.connected: AnyFuture = Future()
        # Done when the response is complete or there was an error.
        self.answered: AnyFuture = Future()
        # The parts of the body that have arrived.
        self.parts: List[bytes] = []
        # The response, and whether the request was sent. They are valid after `wait`.
        self.status, self.body, self.retry_after = 0, b"", ""
        self.was_sent = False

    def run(self) -> None:
        """Send the request and read the response."""
        import http.client

        try:
            self.connection.connect()
            # From here on, the caller enforces the deadline by closing the connection.
            self.connection.sock.settimeout(None)
            # If connecting took too long, the caller has cancelled `connected`. The request must
            # not be sent then, because it could use up a token for nothing.
            if not self.connected.set_running_or_notify_cancel():
                return
            self.connected.set_result(self.connection.sock)
            self.connection.request(*self.request)
            with self.connection.getresponse() as response:
                self.status = response.status
                self.retry_after = response.getheader("Retry-After", "")
                # If the end of a chunked body is missing, what arrived may be the whole JSON.
                with contextlib.suppress(http.client.IncompleteRead):
                    self._read_body(response)
                self.answered.set_result(None)
        except Exception as error:
            # The traceback would keep the response to a refused CONNECT, which Python before 3.12
            # leaves open, until the garbage collector finds it.
            self.answered.set_exception(error.with_traceback(None))
            # If connecting failed, the caller still waits for `connected`. cancel() alone doesn't
            # wake it up from concurrent.futures.wait(), but set_running_or_notify_cancel() does.
            if self.connected.cancel():
                self.connected.set_running_or_notify_cancel()
        finally:
            self.connection.close()

    def _read_body(self, response: Any) -> None:
        # The extra byte shows that the body is larger than the limit.
        wanted = self.limit + 1
        while wanted > 0:
            part = response.read1(min(wanted, MEBIBYTE))
            if not part:
                return
            self.parts.append(part)
            wanted -= len(part)

    def wait(self, timeout: float) -> Optional[BaseException]:
        """Wait up to `timeout` seconds for `run`, and make it end if it isn't done by then.

        Returns why there is no response, or None if there is one.
        """
        began = time.monotonic()
        try:
            wait_for(self.connected, timeout / 2)
            # If there is no connection by now, cancelling succeeds, and `run` sends nothing.
            if not self.connected.cancel():
                # If this process was suspended meanwhile, `remaining` may be negative. The server
                # gets half of the timeout anyway.
                remaining = timeout - (time.monotonic() - began)
                wait_for(self.answered, max(timeout / 2, remaining))
        # A KeyboardInterrupt also ends the exchange.
        finally:
            is_in_time = self.answered.done()
            self.connected.cancel()
            self.was_sent = not self.connected.cancelled()
            if self.was_sent and not is_in_time:
                hang_up(self.connected.result())
        self.body = b"".join(self.parts)
        # The thread isn't waited for, because Windows may not wake it up until the server hangs up.
        error = self.answered.exception() if is_in_time else TimeoutError()
        # The whole JSON may have arrived without the sign of its end.
        return error if parse_json(self.body) is None else None


def request_json(
    settings: Settings,
    url: str,
    what: str,
    fields: Optional[Dict[str, str]] = None,
    *,
    as_json: bool = False,
    bearer: str = "",
    headers: Optional[Dict[str, str]] = None,
    timeout: float = float("inf"),
    limit: int = MEBIBYTE,
) -> Response:
    """GET `url`, or POST `fields` to it as a form or `as_json`, and return the response.

    `what` is the purpose as error messages name it: "could not <what>". The whole request, from the
    name lookup to the last byte, may take `timeout` seconds, but never more than the setting
    request_timeout. If connecting takes more than half of that, nothing is sent, so the server has
    at least the other half to respond. `limit` is the largest body in bytes. The response may have
    any status. Raises RequestError if there was no response, and OAuthError if it was too large.
    """
    import threading

    timeout = min(timeout, settings.request_timeout)
    fields = fields or {}
    request = build_request(url, fields, as_json, bearer, headers or {})
    exchange = Exchange(new_connection(settings, url, timeout / 2), request, limit)
    try:
        threading.Thread(target=exchange.run, daemon=True).start()
    # No more threads are allowed, or Python 3.12 is shutting down.
    except RuntimeError as error:
        raise cannot_send_error(f"could not {what}: {error}", "try again later") from None
    failure = exchange.wait(timeout)
    if isinstance(failure, MemoryError):
        raise failure
    if failure:
        raise connection_error(settings, url, what, timeout, failure, exchange.was_sent)
    if len(exchange.body) > limit:
        raise OAuthError(f"could not {what}: the response is too large")
    private = {value for name, value in fields.items() if name not in PUBLIC_FIELDS}
    return Response(exchange.status, exchange.body, exchange.retry_after, private | {bearer})


def build_request(
    url: str, fields: Dict[str, str], as_json: bool, bearer: str, headers: Dict[str, str]
) -> Tuple[str, str, Optional[bytes], Dict[str, str]]:
    """Return method, target, body and headers of a POST of `fields`, or of a GET without any."""
    import urllib.parse

    head = {
        "User-Agent": f"chatgpt_oauth/{__version__}",
        "Accept": "application/json",
        # No connection is used for a second request.
        "Connection": "close",
        **headers,
    }
    # RFC 6750 §2.1
    if bearer:
        head["Authorization"] = "Bearer " + bearer
    parts = urllib.parse.urlsplit(url)
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    if as_json:
        head["Content-Type"] = "application/json"
        return "POST", target, json.dumps(fields).encode(), head
    if fields:
        head["Content-Type"] = "application/x-www-form-urlencoded"
        return "POST", target, urllib.parse.urlencode(fields).encode(), head
    return "GET", target, None, head


def hang_up(connection: Socket) -> None:
    """Shut down a connection. Except on Windows, this wakes up a thread that reads from it."""
    import socket

    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def connection_error(
    settings: Settings, url: str, what: str, timeout: float, error: BaseException, was_sent: bool
) -> RequestError:
    """Return the error for a request that got no response because of `error`."""
    import socket
    import urllib.parse

    host = urllib.parse.urlsplit(url).netloc
    hint = "check your network connection, then try again"
    place = find_proxy(settings, url)[1]
    if place:
        hint = f"check {place} and your network connection, then try again"
    retry_after = 0.0
    # In Python 3.8 and 3.9, socket.timeout is another class.
    if isinstance(error, (TimeoutError, socket.timeout)):
        fault = f"no answer from {host} in {timeout:g} s"
        if not was_sent:
            fault = f"no connection to {host} in {timeout / 2:g} s"
    elif is_tls_fault(error):
        fault = f"no TLS with {host} ({getattr(error, 'reason', '') or 'SSLError'})"
        retry_after = NEVER
        # Only an SSLCertVerificationError has these attributes.
        unverified = getattr(error, "verify_message", "")
        if unverified:
            code = getattr(error, "verify_code", 0)
            fault = f"bad certificate from {host} ({unverified})"
            if code in CERTIFICATE_FAULTS:
                fault = f"{CERTIFICATE_FAULTS[code]} certificate from {host}"
            hint = certificate_hint(settings, code, place)
    elif isinstance(error, socket.gaierror):
        fault = f"the host in {place} was not found" if place else f"host {host} not found"
    elif isinstance(error, OSError):
        # If a proxy is set, only the proxy itself can have refused the connection.
        name = place if place and isinstance(error, ConnectionRefusedError) else host
        fault = f"{name}: {error.strerror or type(error).__name__}"
        # Only the status is shown, because http.client appends the proxy's own text, which may
        # contain our password.
        tunnel = re.match(r"Tunnel connection failed: ([0-9]{3})", str(error))
        if tunnel:
            fault = f"the proxy answered HTTP {tunnel[1]}"
            if tunnel[1] == "407":
                hint = proxy_password_hint(place)
        elif isinstance(error, ConnectionError) and not error.strerror:
            # http.client raises this error without the system's text.
            fault = f"{host}: connection closed"
    else:
        fault = f"no valid HTTP from {host}"
    return RequestError(f"could not {what}: {fault}", hint, not was_sent, retry_after)


def is_tls_fault(error: BaseException) -> bool:
    """Whether `error` comes from TLS. Always false if this Python has no TLS."""
    try:
        import ssl
    except ImportError:
        return False
    return isinstance(error, ssl.SSLError)


# ---------------------------------------------------------------------------------------------
# Clients: the two ways to sign in, and the requests that they make
# ---------------------------------------------------------------------------------------------
# A Client holds what differs between the two sign-ins: names, endpoints, parameters and checks. The
# functions below the classes send the requests of the protocol and check the responses. They use
# only the rooms above, get the tokens as arguments, and read and write no file, because storing a
# response is the caller's task. A response without a valid access token is refused here.

# If this scope was granted, the ChatGPT plan may pay for requests.
PLAN_SCOPE = "chatgpt.tokens.use.direct"
USAGE_PAGE = "https://chatgpt.com/settings/usage"
# Seconds by which this machine's clock may be ahead when a sign-in checks whether its ID token has
# expired. RFC 7519 §4.1.4 allows for usually no more than a few minutes.
CLOCK_SKEW = 300
# Seconds between two polls if the server gives no interval (RFC 8628 §3.5).
DEFAULT_POLL_INTERVAL = 5.0
# The shortest and the longest time between two polls, in seconds, whatever a server asks for.
POLL_FLOOR = 1.0
POLL_CEILING = 60.0
# Seconds for which a device code is valid, unless the server gives a shorter time. OpenAI's device
# codes expire after 15 minutes.
DEVICE_CODE_LIFETIME = 900.0
# Seconds to add to the polling interval when the server answers slow_down (RFC 8628 §3.5).
SLOW_DOWN = 5.0
# The error codes, OpenAI's and RFC 6749 §5.2's, for a refresh token that can't be used any more.
INVALID_GRANT_CODES = {
    "refresh_token_reused": "another program used its refresh token",
    "refresh_token_expired": "it has expired",
    "refresh_token_invalidated": "it was revoked",
    "token_expired": "it has expired",
    "invalid_grant": "it has expired or was revoked",
    "invalid_refresh_token": "it has expired or was revoked",
}
# An unknown code with one of these words means the same, for example app_session_terminated.
END_WORDS = ("expired", "invalidated", "revoked", "reused", "terminated")
# RFC 6749 §5.2's codes for a request that is wrong, although the sign-in may be good.
REQUEST_ERROR_CODES = (
    "invalid_request",
    "invalid_client",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
)
# Stored as the reason when a refresh has brought another account's tokens. No server sends it.
OTHER_ACCOUNT = "other_account"
# What error messages call a refresh.
REFRESH = "refresh the token"
# Seconds. Signing out must not take long, even if the server doesn't answer.
REVOKE_TIMEOUT = 10.0


class InvalidGrantError(SignInEndedError):
    """A refusal of the refresh token. It is stored, so that the token isn't sent again.

    `reason` is the server's code for it, or OTHER_ACCOUNT.
    """

    def __init__(self, reason: str, command: str) -> None:
        why = INVALID_GRANT_CODES["invalid_grant"]
        if reason == OTHER_ACCOUNT:
            why = "a refresh brought another account's tokens"
        elif reason in INVALID_GRANT_CODES:
            why = INVALID_GRANT_CODES[reason]
        elif "expired" in reason:
            why = "it has expired"
        super().__init__(f"your session has ended: {why}", command)
        self.reason = reason


class Client:
    """Everything that differs between the two ways of signing in.

    This is the Codex CLI's client (RFC 6749 §2). OfficialClient is the other one.
    """

    # Marks this client's sign-in in messages that can be about either one.
    label = ""
    file_name = "chatgpt_oauth.json"
    # Whether this is the official sign-in. There, OpenAI registers each installation as a client of
    # its own, other programs must not use the tokens, and there is no choice of models.
    is_official = False
    authorization_path = "/oauth/authorize"
    # S105 takes this path for a password.
    token_path = "/oauth/token"  # noqa: S105
    revocation_path = "/oauth/revoke"
    # OpenAI accepts only `localhost` in this client's redirect URI, and the browser may take that
    # for either of these addresses (RFC 8252 §7.3 and §8.3).
    addresses: Tuple[str, ...] = ("127.0.0.1", "::1")
    sign_in_command, sign_out_command = "auth", "logout"
    # The command that signs in without a listener, or "" if this client has no device codes.
    device_command = "auth --device"
    # The type of the entries for the plan's models, in the models file.
    model_type = "chatgpt_oauth"
    # Comes after the setting `prefix` in the names of this client's models.
    model_prefix = ""
    # What to do after a sign-in without an API key.
    next_step_hint = Hint("To get an access token, run", "token")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client_id, self.scope = settings.client_id, settings.scope
        self.redirect_host = settings.redirect_host
        self.ports: Tuple[int, ...] = (settings.required_port, settings.fallback_port)
        if settings.callback_bind:
            self.addresses = (settings.callback_bind,)
        # The ID of the only workspace to sign in to, or "" to allow any.
        self.workspace: str = settings.workspace
        if self.workspace and not self.is_official:
            self.sign_in_command += f" --workspace {self.workspace}"
            self.device_command += f" --workspace {self.workspace}"
        # Additional parameters of token requests.
        self.token_parameters: Dict[str, str] = {}

    def resume(self, registration: Fields, stored: Fields) -> None:
        """Continue an earlier registration and the stored sign-in, if there are any."""

    def registration(self) -> Fields:
        """Return what is stored about this installation's registration. None of it is secret."""
        return {}

    def authorization_parameters(self, nonce: str) -> Dict[str, str]:
        """Return the additional parameters of an authorization request.

        OpenAI's own parameters ask for the organizations in the ID token and for the short consent
        page. `nonce` is meant for clients that expect it in the ID token.
        """
        parameters = {
            "id_token_add_organizations": "true",
            "codex_cli_simplified_flow": "true",
            "originator": self.settings.originator,
        }
        if self.workspace:
            parameters["allowed_workspace_id"] = self.workspace
        return parameters

    def accept_response(self, response: Dict[str, str]) -> None:
        """Process the parameters besides code and state. Raises OAuthError if one is invalid."""

    def sign_in_fields(self, response: Fields, nonce: str) -> Fields:
        """Return the fields to store, besides the tokens, from the token response of a sign-in.

        Raises OAuthError if the response doesn't belong to the request with this `nonce`.
        """
        return {}

    def refresh_fields(self, response: Fields) -> Fields:
        """Return the fields to store, besides the tokens, from the token response of a refresh.

        The response hasn't been stored yet, so nothing is checked here and nothing can fail.
        """
        return {}

    def id_token_fault(self, tokens: Tokens) -> str:
        """Return what is wrong with the ID token of a refresh, or "".

        The tokens have already been stored, so this must not raise an error.
        """
        return ""

    def is_other_account(self, old: Tokens, new: Tokens) -> bool:
        """Whether a refresh of the `old` tokens has brought tokens of another account.

        Each token is compared with its own predecessor, because the access token and the ID token
        of one sign-in may name different accounts. The account ID in the token file may have been
        edited, so it isn't compared.
        """
        pairs = ((old.access_token, new.access_token), (old.id_token, new.id_token))
        for before, after in pairs:
            known = auth_claims(before).get("chatgpt_account_id")
            account = auth_claims(after).get("chatgpt_account_id")
            if known and account and known != account:
                return True
        return False

    def can_use_plan(self, fields: Fields) -> bool:
        """Whether the sign-in that is stored as `fields` may use the ChatGPT plan."""
        return True


class OfficialClient(Client):
    """The client of OpenAI's official sign-in for open-source apps, `auth --official`.

    It is documented at https://developers.openai.com/siwc. Each installation is a separate client.
    The first authorization request uses a shared entry point instead of a client ID, and OpenAI
    issues the client ID in its response. The ChatGPT plan then pays for requests to the API if the
    person has allowed that. OpenAI's terms reserve the tokens for the connected app.
    """

    # OpenAI's client ID for the first request. It is never stored or sent to the token endpoint.
    ENTRY_POINT = "dynamic_agent_client"

    label = " (official sign-in)"
    file_name = "chatgpt_plan.json"
    is_official = True
    authorization_path = "/api/accounts/authorize"
    token_path = "/api/accounts/oauth/token"  # noqa: S105
    revocation_path = "/api/accounts/oauth/revoke"
    # OpenAI accepts only this address here, with any port.
    addresses = ("127.0.0.1",)
    sign_in_command, sign_out_command = "auth --official", "logout --official"
    device_command = ""
    model_type = "chatgpt_plan"
    model_prefix = "plan-"
    next_step_hint = Hint("To use one of the models, type in Code Puppy: /model NAME")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.client_id = self.ENTRY_POINT
        # The ID of this installation. It is generated once and survives sign-outs.
        self.host_id = ""
        # The account (`sub`) to which the client ID belongs, and its email address. Either may be
        # "", because it isn't known before the first sign-in.
        self.subject = self.email = ""
        self.scope = f"openid profile email offline_access resource.invoke {PLAN_SCOPE}"
        self.redirect_host = "http://127.0.0.1"
        # Port 0 lets the system choose one. A container can't publish such a port.
        if not settings.callback_bind:
            self.ports = (0,)
        # The setting applies only to the Codex CLI's client.
        self.workspace = ""
        self.token_parameters = {"resource": settings.api_base_url + "/v1"}
        # Whether to make OpenAI ask again for permission to use the plan.
        self.asks_consent_again = False

    def resume(self, registration: Fields, stored: Fields) -> None:
        import uuid

        self.host_id = text_or_none(registration.get("host_id")) or ""
        if not re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", self.host_id):
            self.host_id = uuid.uuid4().urn
        client_id = text_or_none(registration.get("client_id")) or ""
        if registration.get("issuer") != self.settings.issuer:
            return
        if not re.fullmatch(WORD_RULE.pattern, client_id):
            return
        self.client_id = client_id
        self.subject = text_or_none(registration.get("sub")) or ""
        if stored.get("access_token") and stored.get("client_id") == client_id:
            self.email = text_or_none(stored.get("email")) or ""
            self.asks_consent_again = not self.can_use_plan(stored)

    def registration(self) -> Fields:
        fields = {"host_id": self.host_id, "issuer": self.settings.issuer}
        if self.client_id != self.ENTRY_POINT:
            fields["client_id"] = self.client_id
        if self.subject:
            fields["sub"] = self.subject
        return fields

    def authorization_parameters(self, nonce: str) -> Dict[str, str]:
        parameters = {
            **self.token_parameters,
            "nonce": nonce,
            "ext_agent_host_id": self.host_id,
        }
        if self.client_id == self.ENTRY_POINT:
            parameters["agent_name_hint"] = self.settings.agent_name
            return parameters
        if self.email:
            parameters["login_hint"] = self.email
        if self.asks_consent_again:
            parameters["prompt"] = "consent"
        return parameters

    def accept_response(self, response: Dict[str, str]) -> None:
        """Use the client ID that OpenAI issues in the first authorization response.

        Raises OAuthError if it is missing or invalid, or if a later response has another client ID.
        """
        issued = response.get("client_id", "")
        if self.client_id == self.ENTRY_POINT:
            if issued == self.ENTRY_POINT or not re.fullmatch(WORD_RULE.pattern, issued):
                raise OAuthError("authorization failed (the response has no valid client ID)")
            self.client_id = issued
        elif issued not in ("", self.client_id):
            raise OAuthError("authorization failed (the response is for another client ID)")

    def sign_in_fields(self, response: Fields, nonce: str) -> Fields:
        """Return who signed in, according to the ID token, and which scopes were granted.

        Raises OAuthError if the ID token isn't valid for the request with this `nonce`, or if it
        belongs to a different account from the registration.
        """
        claims = decode_claims(text_or_none(response.get("id_token")))
        fault = self._claims_fault(claims, self.client_id)
        if fault:
            raise id_token_error(fault)
        if claims.get("nonce") != nonce:
            raise id_token_error("is for another sign-in")
        expiry = number_or_none(claims.get("exp")) or 0
        if expiry < time.time() - CLOCK_SKEW:
            hint = "check this computer's clock, then run"
            raise id_token_error("has expired", hint)
        sub = text_or_none(claims.get("sub"))
        if sub is None:
            raise id_token_error("does not say whose it is")
        if self.subject and sub != self.subject:
            raise OAuthError(
                "this is not the account of your earlier sign-in; nothing was stored",
                "to add another account, run",
                self.sign_in_command + " --account NAME",
            )
        return {
            "sub": sub,
            "email": text_or_none(claims.get("email")),
            # A sign-in starts without scopes. Only those that the response names are granted.
            "scopes": [],
            **self.refresh_fields(response),
        }

    def refresh_fields(self, response: Fields) -> Fields:
        """Return which scopes were granted and when the next refresh is allowed.

        A response without a scope leaves the granted scopes as they were (RFC 6749 §6).
        """
        fields: Fields = {"earliest_refresh_at": None}
        moment = parse_timestamp(response.get("earliest_refresh_at"))
        if moment is not None:
            fields["earliest_refresh_at"] = timestamp(moment)
        granted = response.get("scope")
        if isinstance(granted, str):
            words = granted.split()
            fields["scopes"] = [scope for scope in self.scope.split() if scope in words]
        return fields

    def id_token_fault(self, tokens: Tokens) -> str:
        # The response may omit the ID token.
        if not tokens.id_token:
            return ""
        return self._claims_fault(decode_claims(tokens.id_token), tokens.client_id)

    def is_other_account(self, old: Tokens, new: Tokens) -> bool:
        """Whether a refresh of the `old` tokens has brought an ID token for somebody else."""
        subject = text_or_none(decode_claims(new.id_token).get("sub"))
        known = text_or_none(old.fields.get("sub"))
        return bool(subject and known and subject != known)

    def can_use_plan(self, fields: Fields) -> bool:
        """Whether the person allowed the use of the plan. Only the granted scopes show that."""
        scopes = fields.get("scopes")
        return isinstance(scopes, list) and PLAN_SCOPE in scopes

    def _claims_fault(self, claims: Fields, client_id: str) -> str:
        """Return what is wrong with the issuer or the audience of an ID token, or "".

        The signature isn't checked because the token came straight from the token endpoint over TLS
        (OpenID Connect Core §3.1.3.7, 6).
        """
        issuer = text_or_none(claims.get("iss")) or ""
        if issuer.rstrip("/") != self.settings.issuer:
            return "is from another issuer"
        # The audience is a string or a list of strings (RFC 7519 §4.1.3).
        if claims.get("aud") not in (client_id, [client_id]):
            return "is for another client"
        return ""


def id_token_error(fault: str, hint: str = "to try again, run") -> OAuthError:
    """Return the error for an ID token with the fault `fault`, such as "has expired"."""
    text = f"could not check who signed in: the ID token {fault}"
    return OAuthError(text, hint, OfficialClient.sign_in_command)


def token_response(response: Response, what: str) -> Fields:
    """Return the JSON object of a token endpoint's response (RFC 6749 §5.1).

    Raises OAuthError unless it has a valid access token. Optional fields are checked where they are
    used, so that the access token isn't lost if one of them is invalid.
    """
    fields = response.json_object(what)
    if not is_b64token(fields.get("access_token")):
        reason = response.reason or "the response has no valid access_token"
        raise OAuthError(f"could not {what}: {reason}")
    return fields


def has_bearer_type(response: Fields) -> bool:
    """Whether a token response is for bearer tokens, or doesn't say for what."""
    token_type = response.get("token_type")
    if isinstance(token_type, str):
        return token_type.lower() in ("bearer", "")
    return token_type is None


def exchange_code(client: Client, code: str, verifier: str, redirect_uri: str) -> Fields:
    """Exchange an authorization code for tokens (RFC 6749 §4.1.3, RFC 7636 §4.5).

    Returns the token response. Raises OAuthError, also if it isn't for bearer tokens.
    """
    form = {
        "grant_type": "authorization_code",
        "client_id": client.client_id,
        "code": code,
        "redirect_uri": redirect_uri,
        "code_verifier": verifier,
        **client.token_parameters,
    }
    what = "exchange the code"
    url = client.settings.issuer + client.token_path
    response = request_json(client.settings, url, what, form)
    # OpenAI may answer this for an account whose plan can't be used, such as a free one.
    if response.code.lower() == "invalid_grant" and client.is_official:
        hint = "not every ChatGPT plan is eligible; to try again, run"
        raise OAuthError(str(response.error(what)), hint, client.sign_in_command)
    fields = token_response(response, what)
    if not has_bearer_type(fields):
        raise OAuthError(f"could not {what}: the token_type is not Bearer")
    return fields


def exchange_id_token(settings: Settings, id_token: str) -> Optional[str]:
    """Exchange an ID token for an API key (a token exchange as in RFC 8693 §2.1).

    The parameter requested_token is OpenAI's own. Returns None if the account has no organization,
    such as one that was created for a ChatGPT plan. Raises OAuthError for any other refusal.
    """
    # The noqa marks are for names of token types, which aren't secrets.
    form = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "client_id": settings.client_id,
        "requested_token": "openai-api-key",  # noqa: S105
        "subject_token": id_token,
        "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",  # noqa: S105
    }
    what = "get an API key"
    response = request_json(settings, settings.issuer + Client.token_path, what, form)
    if response.status < 500 and "missing organization_id" in response.text:
        return None
    key = str(token_response(response, what)["access_token"])
    # An access token is a JWT, an API key isn't.
    if decode_claims(key):
        raise OAuthError(f"could not {what}: the response holds an access token instead")
    return key


def request_refresh(client: Client, tokens: Tokens) -> Response:
    """Use the refresh token (RFC 6749 §6) at the issuer that issued it, and return the response.

    The response is returned unchecked, because its tokens must be stored before anything else.
    Raises RequestError if there is no response.
    """
    form = {
        "grant_type": "refresh_token",
        "client_id": tokens.client_id,
        "refresh_token": tokens.refresh_token or "",
        **client.token_parameters,
    }
    url = tokens.issuer + client.token_path
    try:
        return request_json(client.settings, url, REFRESH, form)
    except UnavailableError:
        raise
    except OAuthError as error:
        # The response is too large, and the server has used up the refresh token.
        raise RequestError(str(error)) from None


def refresh_error(client: Client, response: Response) -> Optional[OAuthError]:
    """Return the reason why a refresh brought no access token, or None if it brought one.

    - InvalidGrantError: the sign-in has ended, which is worth remembering.
    - SignInEndedError: the server refuses the refresh token for another reason.
    - RequestError: there is no usable response, and the refresh token may be spent unless the
      error has `unprocessed` set.
    - UnavailableError: only the access token is missing.
    - any other OAuthError: the request is wrong, and the refresh token is still good.
    """
    try:
        token_response(response, REFRESH)
        return None
    except OAuthError as error:
        failure = error
    reason = end_reason(response)
    if reason:
        return InvalidGrantError(reason, client.sign_in_command)
    # The network, the region or the server is the reason, not the sign-in.
    if isinstance(failure, UnavailableError):
        return failure
    # The response has a new refresh token, which can be used for the next try.
    if is_b64token(response.members.get("refresh_token")):
        return UnavailableError(str(failure), "try again")
    if not response.is_success and response.code.lower() in REQUEST_ERROR_CODES:
        hint = "check the settings (CHATGPT_OAUTH_CONFIG, CHATGPT_OAUTH_... variables)"
        return OAuthError(str(failure), hint)
    is_refusal = response.status in (400, 403) and bool(response.reason)
    # The Codex CLI takes every 401 of this endpoint as the end.
    if is_refusal or response.status == 401:
        return SignInEndedError(str(failure), client.sign_in_command)
    # A RequestError means that the server may have used up the refresh token.
    return RequestError(str(failure))


def end_reason(response: Response) -> str:
    """Return the code with which the token endpoint says that a sign-in has ended, or "".

    It comes in any letter case and in several places. A response with status 200 can contain it.
    """
    if response.status >= 500 or response.status == 429:
        return ""
    for text in (response.code, response.detail):
        code = text.lower()
        if code in INVALID_GRANT_CODES or any(word in code for word in END_WORDS):
            return code[:REASON_LIMIT]
    return ""


def revoke(client: Client, tokens: Tokens) -> None:
    """Revoke the refresh token, or the access token if there is no refresh token (RFC 7009 §2.1).

    Raises OAuthError.
    """
    # The Codex CLI sends its client ID only with a refresh token.
    body = {"token": tokens.access_token, "token_type_hint": "access_token"}
    if tokens.refresh_token:
        body = {
            "token": tokens.refresh_token,
            "token_type_hint": "refresh_token",
            "client_id": tokens.client_id,
        }
    what = "revoke the token"
    # The issuer comes from the token file, which may have been edited. A refresh compares it with
    # the setting (see require_refreshable), but a revocation doesn't.
    url = URL_RULE.check("the issuer", tokens.issuer) + client.revocation_path
    # For the Codex CLI's client, OpenAI expects JSON, although RFC 7009 §2.1 asks for a form.
    as_json = not client.is_official
    response = request_json(
        client.settings, url, what, body, as_json=as_json, timeout=REVOKE_TIMEOUT
    )
    if not response.is_success:
        raise response.error(what)


class DeviceCode:
    """A device code in OpenAI's form (compare RFC 8628 §3.2), with the user code for a person.

    `interval` is the polling interval in seconds, which grows with each slow_down. `pause` is the
    number of seconds until the next poll. It is longer than `interval` if the server asks for that.
    """

    def __init__(self, settings: Settings, response: Fields) -> None:
        self.settings = settings
        # The page where the person enters the user code.
        self.page = settings.issuer + "/codex/device"
        self.redirect_uri = settings.issuer + "/deviceauth/callback"
        self.device_auth_id = text_or_none(response.get("device_auth_id")) or ""
        # Older servers call it usercode.
        user_code = response.get("user_code") or response.get("usercode")
        self.user_code = text_or_none(user_code) or ""
        interval = number_or_none(response.get("interval"))
        if interval is None:
            interval = DEFAULT_POLL_INTERVAL
        self.interval = min(max(POLL_FLOOR, interval), POLL_CEILING)
        self.pause = self.interval
        # Seconds until the code expires.
        lifetime = number_or_none(response.get("expires_in")) or DEVICE_CODE_LIFETIME
        self.lifetime = min(lifetime, DEVICE_CODE_LIFETIME)

    def poll(self) -> Optional[Tuple[str, str]]:
        """Ask once for the authorization code (RFC 8628 §3.4), and return it with its verifier.

        Returns None if the person hasn't entered the user code yet. Raises RequestError if polling
        may continue, and OAuthError if it must end.
        """
        url = self.settings.issuer + "/api/accounts/deviceauth/token"
        what = "check the code"
        body = {"device_auth_id": self.device_auth_id, "user_code": self.user_code}
        try:
            response = request_json(self.settings, url, what, body, as_json=True)
        # RFC 8628 §3.5 asks clients to poll less often after a timeout.
        except RequestError:
            self.interval = min(self.interval * 2, POLL_CEILING)
            self.pause = self.interval
            raise
        # OpenAI puts this prefix before some of RFC 8628's codes.
        code = re.sub("^deviceauth_", "", response.code)
        is_pending = code in ("authorization_pending", "slow_down")
        if response.is_html:
            raise response.error(what)
        if response.is_success and not is_pending:
            return self._authorization(response.json_object(what))
        if code == "access_denied":
            raise device_code_error("the sign-in was denied in the browser")
        # RFC 8628 calls this expired_token. Every code that contains "expired" is treated the same.
        if "expired" in code.lower():
            raise device_code_error()
        # RFC 8628 §3.5: the longer interval applies to this poll and all later ones.
        if code == "slow_down":
            self.interval += SLOW_DOWN
        self.pause = max(self.interval, min(response.retry_after, POLL_CEILING))
        # OpenAI answers 403 or 404, without a code, until the person has entered the user code.
        if is_pending or response.status in (403, 404, 429):
            return None
        # This is a RequestError for a server error, after which polling continues.
        raise response.error(what)

    def _authorization(self, response: Fields) -> Tuple[str, str]:
        """Return the authorization code and its verifier, which OpenAI's server has chosen."""
        code, verifier = response.get("authorization_code"), response.get("code_verifier")
        if not is_b64token(code) or not is_b64token(verifier):
            text = "could not use the device code: the response has no authorization code"
            raise device_code_error(text)
        return str(code), str(verifier)


def device_code_error(why: str = "timed out waiting for the code to be entered") -> OAuthError:
    """Return the error for a device code that can't be used any more."""
    return OAuthError(why, "to get a new code, run", "auth --device")


def request_device_code(settings: Settings) -> DeviceCode:
    """Request a device code in OpenAI's form (compare RFC 8628 §3.1). Raises OAuthError."""
    url = settings.issuer + "/api/accounts/deviceauth/usercode"
    what = "get a device code"
    response = request_json(settings, url, what, {"client_id": settings.client_id}, as_json=True)
    if response.status == 404:
        raise OAuthError(
            "device code sign-in is turned off for this account",
            "turn it on in ChatGPT under Settings > Security, or ask your administrator",
        )
    device = DeviceCode(settings, response.json_object(what))
    if not (device.device_auth_id and device.user_code):
        raise OAuthError(f"could not {what}: the response has no code")
    return device


# ---------------------------------------------------------------------------------------------
# Store: the token file and the models file, each with the lock under which it changes
# ---------------------------------------------------------------------------------------------
# Reading needs no lock. This program changes a file only under its lock, and replaces the file as a
# whole, so a reader sees the old or the new contents. Code Puppy's own plugin does neither. The
# order for tokens is:
#
#     1. Take the lock.
#     2. Replace the file with a copy of itself, to prove that this works.
#     3. Reserve disk space in a temporary file beside the file.
#     4. Send the request.
#     5. Write the response to the temporary file.
#     6. Rename the temporary file into place.
#
# If the process is killed before step 6, or step 6 fails, the next process that reads the file or
# takes the lock renames it. Nothing is written that couldn't be read again: `save` refuses contents
# above the limit of `read`, and values from a server are checked or converted first. A symbolic
# link is kept, and root never follows or changes another user's link.

# How long to retry on Windows while another program, such as a virus scanner, has a file open.
SHARING_SECONDS = 5.0
# An access token with less time left than this is refreshed before it is returned, so that the
# caller has time to use it.
REFRESH_MARGIN = 300  # seconds
# The Codex CLI refreshes its tokens eight days after the last refresh (TOKEN_REFRESH_INTERVAL in
# its sources). A token whose expiry is unknown is assumed to live that long.
ASSUMED_LIFETIME = 8 * 86400  # seconds
# A file that is being written in place may be complete a moment later.
REREAD_SECONDS = 0.5
# How much larger than the present token file the next one may be. At a sign-in, all of the tokens
# must fit into this. An access token and an ID token usually have 2 to 3 KB each.
RESERVE = 16384  # bytes
# The mode of a file that only its owner can read.
PRIVATE = 0o600
# New contents are written to a temporary file beside the file. A killed process leaves it there.
TEMPORARY_SUFFIX = ".tmp"
GROUP_AND_OTHERS = 0o077
# The errors of flock on a file system without locks, such as NFS without its lock daemon.
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
# Symbolic links are not followed.
READ_WRITE = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
# The tokens in a token response (RFC 6749 §5.1, OpenID Connect Core §3.1.3.3).
TOKEN_NAMES = ("access_token", "refresh_token", "id_token")
SECRET_KEYS = (*TOKEN_NAMES, "api_key")
# Who issued the tokens, and to which client, if a file doesn't say that. Code Puppy's own plugin
# writes such files.
DEFAULT_ISSUER = str(CHATGPT_OAUTH_CONFIG.get("issuer"))
DEFAULT_CLIENT_ID = str(CHATGPT_OAUTH_CONFIG.get("client_id"))


class Tokens:
    """The contents of a token file. `fields` holds all members, including ones we don't know.

    Raises ValueError, naming the member, if a token or key isn't a b64token (RFC 6750 §2.1).
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
        # Code Puppy's own plugin stores the access token as `api_key` too, and doesn't update that
        # copy when it refreshes. A JWT there is therefore an old access token.
        if self.api_key == self.access_token or decode_claims(self.api_key):
            self.api_key = None
        account_id = fields.get("account_id") or self.auth_claims().get("chatgpt_account_id")
        # It is sent in a header, so it must have a form that needs no quoting.
        self.account_id = account_id if is_b64token(account_id) else None
        self.issuer = (text_or_none(fields.get("issuer")) or DEFAULT_ISSUER).rstrip("/")
        self.client_id = printable(text_or_none(fields.get("client_id")) or DEFAULT_CLIENT_ID)
        # `account_key` identifies the account, or is None if nothing in the file does. For the
        # official sign-in that is `sub`, combined with the client ID, because one person may
        # register several workspaces.
        self.account_key: Optional[Tuple[str, ...]] = None
        sub = text_or_none(fields.get("sub"))
        if sub:
            self.account_key = (self.issuer, self.client_id, sub)
        elif self.account_id:
            self.account_key = (self.issuer, self.account_id)

    def same_account(self, other: Tokens) -> bool:
        """Whether both belong to one account. If either doesn't say, compare the access tokens."""
        if self.account_key and other.account_key:
            return self.account_key == other.account_key
        return self.access_token == other.access_token

    def auth_claims(self) -> Fields:
        """Return OpenAI's own claims. The ID token's override those of the access token."""
        return {**auth_claims(self.access_token), **auth_claims(self.id_token)}

    def expires_at(self) -> Optional[float]:
        """Return when the access token expires (seconds since 1970), or None if unknown.

        If both are known, that is the earlier of its `exp` claim and the stored `expires_at`.
        """
        # An `exp` of 0 counts as unknown.
        claimed = number_or_none(decode_claims(self.access_token).get("exp")) or None
        stored = parse_timestamp(self.fields.get("expires_at"))
        refreshed = parse_timestamp(self.fields.get("last_refresh"))
        # Code Puppy's own plugin stores new tokens without changing `expires_at`.
        if stored is not None and refreshed is not None and stored < refreshed:
            stored = None
        dates = [date for date in (claimed, stored) if date is not None]
        if dates:
            return min(dates)
        return None if refreshed is None else refreshed + ASSUMED_LIFETIME

    def valid_for(self, seconds: float) -> bool:
        """Whether the access token is valid for more than `seconds` from now.

        If its expiry is unknown, it counts as valid now, but not for any longer. So it gets
        refreshed, and if that fails, it is still used.
        """
        expiry = self.expires_at()
        if expiry is None:
            return seconds <= 0
        return expiry > time.time() + seconds

    def is_fresh(self) -> bool:
        """Whether the access token doesn't need a refresh yet."""
        margin = float(REFRESH_MARGIN)
        expiry = self.expires_at()
        refreshed = parse_timestamp(self.fields.get("last_refresh"))
        # A token that lives less than twice the margin is refreshed after half its life.
        if expiry and refreshed and expiry > refreshed:
            lifetime = expiry - refreshed
            margin = min(margin, lifetime / 2)
        return self.valid_for(margin)

    def refresh_allowed_at(self) -> float:
        """Return when OpenAI allows the next refresh (seconds since 1970), or 0.0 if unknown."""
        return parse_timestamp(self.fields.get("earliest_refresh_at")) or 0.0

    def fingerprint(self) -> str:
        """Return the SHA-256 of the refresh token in hexadecimal."""
        import hashlib

        return hashlib.sha256((self.refresh_token or "").encode()).hexdigest()


def encode(value: Fields, indent: Optional[int] = 2) -> bytes:
    """Return `value` as the JSON text of a file. Raises StorageError if it is nested too deeply."""
    try:
        return json.dumps(value, indent=indent).encode() + b"\n"
    except RecursionError:
        raise StorageError(
            "the file holds another program's entry that is nested too deeply to keep"
        ) from None


def storage_error(verb: str, path: str, error: OSError, hint: str = "") -> StorageError:
    """Return the StorageError for a system call that failed because of `error`.

    `verb` is what it should have done with `path`, such as "lock". Without a `hint`, it gets one
    that suggests only steps that don't fail for the same reason.
    """
    usual_hint = "check the free space and the permissions, then try again"
    # Windows reports a directory in the place of a file as a missing permission.
    is_directory = sys.platform == "win32" and os.path.isdir(path)
    if is_directory or error.errno in (errno.EISDIR, errno.ELOOP):
        usual_hint = "remove it yourself, then try again"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        usual_hint = "make its directory writable, then try again"
        # Windows also denies access to a file that another program has open.
        if sys.platform == "win32":
            usual_hint = "close programs that use it, or make its directory writable; try again"
    # A mount of a single file, as in a container, can't be replaced or removed.
    elif error.errno == errno.EBUSY:
        usual_hint = "mount the directory instead of the file, then try again"
    elif error.errno in AT_LIMITS:
        usual_hint = LIMITS_HINT
    elif verb == "lock" and error.errno in CANNOT_LOCK:
        usual_hint = "this file system has no locks; set CHATGPT_OAUTH_HOME to a local directory"
    return StorageError(f"cannot {verb} {path}: {error.strerror}", hint or usual_hint)


def home_hint(settings: Settings) -> str:
    """Return the next step if this user can't create the account's files, otherwise ""."""
    # Look at the lowest directory that exists, in which the missing ones would be made.
    place = settings.directory
    while not os.path.lexists(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    # Windows has no effective IDs.
    has_effective_ids = os.access in os.supports_effective_ids
    if not os.path.isdir(place):
        problem = f"{place} is not a directory"
    elif os.access(place, os.W_OK | os.X_OK, effective_ids=has_effective_ids):
        return ""
    elif can_change_mode(place):
        return f"make {place} writable, or set CHATGPT_OAUTH_HOME to another directory"
    elif place == settings.directory:
        problem = f"you cannot write to {place}"
    else:
        problem = f"you cannot create {settings.directory}"
    variables = settings.home_variable
    if variables != "CHATGPT_OAUTH_HOME":
        variables += " or CHATGPT_OAUTH_HOME"
    return f"{problem}; set {variables} to one of yours"


def can_change_mode(path: str) -> bool:
    """Whether this user can change the permissions of `path`. Windows has no such permissions."""
    if sys.platform == "win32":
        return False
    # PyPy 3.9 has no os.ST_RDONLY, which is 1 on every system.
    is_read_only = os.statvfs(path).f_flag & getattr(os, "ST_RDONLY", 1)
    return os.stat(path).st_uid == os.geteuid() and not is_read_only


class NotReplacedError(StorageError):
    """New contents are on disk beside the file, but couldn't be renamed into place."""


class Replacement:
    """A new version of the file at `path`, written beside it and then renamed into place.

    The temporary file is created with `mode` (minus the umask). The caller must hold the lock.
    Every method may raise OSError.
    """

    def __init__(self, path: str, mode: int = PRIVATE) -> None:
        # A symbolic link is kept. The file it points to is replaced.
        self.path = os.path.realpath(path)
        self.temporary = self.path + TEMPORARY_SUFFIX
        with contextlib.suppress(FileNotFoundError):
            _retry_on_windows(os.unlink, self.temporary)
        descriptor = _retry_on_windows(_create, self.temporary, self.path, mode)
        self.file = os.fdopen(descriptor, "r+b", buffering=0)

    def write(self, data: bytes) -> None:
        """Make `data` the contents of the temporary file."""
        try:
            _overwrite(self.file, data)
        except OSError:
            # A copy-on-write file system needs free space even to overwrite the blocks of a file.
            # Truncating the file frees the blocks that were reserved.
            self.file.truncate(0)
            _overwrite(self.file, data)

    def sync(self) -> None:
        """Wait until the temporary file is on the disk."""
        os.fsync(self.file.fileno())

    def commit(self) -> None:
        """Rename the temporary file into place."""
        # Windows can't rename an open file.
        self.file.close()
        _rename(self.temporary, self.path)

    def discard(self) -> None:
        """Remove the temporary file, if it hasn't been renamed."""
        self.file.close()
        with contextlib.suppress(OSError):
            os.unlink(self.temporary)


def _retry_on_windows(call: AnyCallable, *arguments: Any) -> Any:
    """Make a system call. On Windows, retry while another program has the file open."""
    deadline = time.monotonic() + SHARING_SECONDS
    while True:
        try:
            return call(*arguments)
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _rename(source: str, target: str) -> None:
    """Rename a file, replacing `target`, and sync the directory."""
    _retry_on_windows(os.replace, source, target)
    if sys.platform != "win32":
        # Some network file systems can't sync a directory. The rename itself is done.
        with contextlib.suppress(OSError):
            directory = os.open(os.path.dirname(target), os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def _create(path: str, owner_source: str, mode: int) -> int:
    """Create a file with the owner of `owner_source`. Raises FileExistsError if it exists."""
    descriptor = os.open(path, READ_WRITE | os.O_CREAT | os.O_EXCL, mode)
    _chown_like(descriptor, owner_source)
    return descriptor


def _overwrite(file: Any, data: bytes) -> None:
    # The file is cut to its new length last. If the process is killed before that, only the blanks
    # that `reserve` wrote follow the data, and JSON with trailing blanks is valid.
    file.seek(0)
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    file.truncate()


def file_owner(path: str) -> Tuple[int, int]:
    """Return the user and group ID of `path`, or of its directory if `path` doesn't exist."""
    info = os.stat(path if os.path.exists(path) else os.path.dirname(path))
    return info.st_uid, info.st_gid


def _is_own_file(path: str, owner_source: str) -> bool:
    """Whether `path` is a regular file of this user. Root counts as the owner of `owner_source`."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(info.st_mode):
        return False
    if sys.platform == "win32":
        return True
    user = os.geteuid()
    if user == 0:
        user, _ = file_owner(owner_source)
    return info.st_uid == user


def _chown_like(descriptor: int, path: str) -> None:
    """If we are root, give a new file to the owner of `path`, or of its directory.

    Without this, root in a container would lock out the user whose home directory is mounted there.
    """
    if sys.platform != "win32" and os.geteuid() == 0:
        os.fchown(descriptor, *file_owner(path))


def make_directory(path: str, mode: int = 0o700) -> None:
    """Make a directory and its missing parents, each with the owner of the directory above it."""
    parent = os.path.dirname(path)
    if os.path.isdir(path) or parent == path:
        return
    make_directory(parent, mode)
    # Another process may make the directory at the same time.
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, mode)
        if sys.platform != "win32":
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _chown_like(descriptor, parent)
            finally:
                os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Take an exclusive lock on an open file and return True, or return False if it is taken."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def acquire_lock(path: str, deadline: float) -> int:
    """Lock the file at `path` and return its descriptor.

    Raises UnavailableError if another process still holds the lock at `deadline`
    (time.monotonic()).
    """
    while True:
        descriptor = os.open(path, READ_WRITE)
        try:
            while not _try_lock(descriptor):
                _pause_for_lock(path, deadline)
            # The previous holder of the lock may have replaced or removed the file.
            is_current = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except BaseException:
            os.close(descriptor)
            raise
        if is_current:
            return descriptor
        os.close(descriptor)
        # If the file system has no stable file IDs, samestat is always false, so the deadline
        # applies here, too.
        _pause_for_lock(path, deadline)


def _pause_for_lock(path: str, deadline: float) -> None:
    """Wait until the next try to lock `path`. Raises UnavailableError after the `deadline`."""
    if time.monotonic() >= deadline:
        raise UnavailableError(
            f"timed out waiting for another process to release {path}",
            "try again; if it keeps happening, stop the process that has this file open",
        )
    time.sleep(0.01)


def acquire_lock_file(path: str, deadline: float) -> int:
    """Create the lock file at `path` if it doesn't exist, and lock it: see acquire_lock."""
    while True:
        with contextlib.suppress(FileExistsError):
            os.close(_create(path, os.path.dirname(path), PRIVATE))
        try:
            return acquire_lock(path, deadline)
        except FileNotFoundError:
            # Another process has just removed the file.
            if time.monotonic() >= deadline:
                raise


def release_lock(descriptor: int) -> None:
    if sys.platform != "win32":
        import fcntl

        # Closing the file isn't enough, because a forked child process may have it open too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def remove_lock_file(descriptor: int, path: str) -> None:
    """Release the lock of the file at `path` and remove the file, if the system allows that.

    A process that waits for the lock notices that: see acquire_lock.
    """
    # Windows can't remove an open file. Another process may have it open.
    if sys.platform == "win32":
        release_lock(descriptor)
    with contextlib.suppress(OSError):
        os.unlink(path)
    if sys.platform != "win32":
        release_lock(descriptor)


class JsonFile:
    """A JSON object in a file below `home`, read without a lock and replaced under a lock.

    Every method may raise StorageError.
    """

    limit = MODELS_LIMIT  # bytes
    broken_hint = Hint("fix or delete the file, then try again")

    def __init__(self, settings: Settings, directory: str, name: str) -> None:
        self.settings, self.directory = settings, directory
        self.path = os.path.join(directory, name)
        self.reserved: Optional[Replacement] = None
        # The descriptors of the locks while this object holds them, otherwise None.
        self.locks: Optional[List[int]] = None
        # Whether a child process has inherited the locks and may still hold them.
        self.are_locks_shared = False

    @property
    def real_path(self) -> str:
        """The path of the file itself, after symbolic links. Lock and temporary files are there."""
        return os.path.realpath(self.path)

    @property
    def temporary(self) -> str:
        """The path of the temporary file that replaces the file."""
        return self.real_path + TEMPORARY_SUFFIX

    @property
    def lock_path(self) -> str:
        """The path of the lock file, which stays when the file is removed."""
        return self.real_path + ".lock"

    @property
    def broken_copy(self) -> str:
        """The path to which a sign-in moves the file if it is broken."""
        return self.real_path + ".bad"

    def read(self) -> Fields:
        """Return the JSON object, or {} if the file doesn't exist.

        A fault that may be gone a moment later is an error only if it lasts for REREAD_SECONDS.
        """
        deadline = time.monotonic() + REREAD_SECONDS
        while True:
            is_late = time.monotonic() > deadline
            try:
                value = json.loads(self._read_bytes())
                break
            except FileNotFoundError:
                return {}
            except OSError as error:
                # The file isn't broken, so a sign-in must not move it aside.
                if error.errno in AT_LIMITS:
                    raise limits_error(error) from None
                # Windows denies access to a file at the moment when it is being replaced.
                may_pass = sys.platform == "win32" and isinstance(error, PermissionError)
                if is_late or not may_pass:
                    raise self.broken_error(f"cannot read: {error.strerror}") from None
            except (ValueError, RecursionError):
                # Another program may be writing the file.
                if is_late:
                    raise self.broken_error("not valid JSON") from None
            time.sleep(0.02)
        if not isinstance(value, dict):
            raise self.broken_error("not a JSON object")
        return value

    def _read_bytes(self) -> bytes:
        """Return the contents of the file. May raise OSError."""
        # Opening a FIFO would otherwise block until another process writes to it.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
        with os.fdopen(os.open(self.path, flags), "rb") as file:
            self._check_open_file(file.fileno())
            return file.read(self.limit)

    def broken_error(self, fault: str) -> StorageError:
        """Return the error for a file whose contents or type aren't acceptable."""
        hint = home_hint(self.settings) or self.broken_hint
        return StorageError(f"{self.path}: {fault}", hint)

    def _check_open_file(self, descriptor: int) -> None:
        """Raise StorageError unless the open file is a regular file within the size limit."""
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise self.broken_error("not a regular file")
        if info.st_size > self.limit:
            raise self.broken_error(f"larger than {self.limit // MEBIBYTE} MiB")
        self._check_link(self.path, info)

    def _check_link(self, path: str, info: os.stat_result) -> None:
        """As root, raise StorageError if `path` is another user's link to a file they don't own.

        Without this check, that user could make root read or replace the file.
        """
        if sys.platform != "win32" and os.geteuid() == 0:
            owner = os.lstat(path).st_uid
            if owner not in (0, info.st_uid):
                text = f"{path}: another user (uid {owner}) made it a link to somebody else's file"
                raise StorageError(text, "remove it, then try again")

    @contextlib.contextmanager
    def lock(self, timeout: Optional[float] = None) -> Iterator[None]:
        """Hold the lock under which this program changes the file.

        Raises UnavailableError if another process holds the lock for `timeout` seconds.
        """
        timeout = self.settings.lock_timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        locks: List[int] = []
        try:
            try:
                self._prepare_directory()
                self._take_locks(locks, deadline)
            except OSError as error:
                raise self._lock_error(error) from None
            with self.holding(locks):
                yield
        finally:
            # Unlocking would also unlock for a child process. Closing leaves the lock to it.
            release = os.close if self.are_locks_shared else release_lock
            self.are_locks_shared = False
            for descriptor in reversed(locks):
                release(descriptor)

    @contextlib.contextmanager
    def holding(self, locks: List[int]) -> Iterator[None]:
        """Act as the holder of the lock, whose descriptors are `locks`, while the block runs.

        A child process that has inherited the lock uses this. At the end, a reserved replacement
        that wasn't used is removed.
        """
        self.locks = locks
        try:
            yield
        finally:
            self.locks = None
            self._discard_reserved()

    def _discard_reserved(self) -> None:
        if self.reserved:
            self.reserved.discard()
            self.reserved = None

    def _lock_error(self, error: OSError) -> StorageError:
        """Return the StorageError for a system call that failed to take the locks."""
        path = error.filename or self.lock_path
        return storage_error("lock", path, error, home_hint(self.settings))

    def _prepare_directory(self) -> None:
        """Check the links on the way from `home` to the file, and make the file's directory."""
        places = [self.path]
        while places[-1] != self.settings.home:
            places.append(os.path.dirname(places[-1]))
        for path in reversed(places):
            if os.path.exists(path):
                self._check_link(path, os.stat(path))
            elif os.path.lexists(path):
                # Creating the file would create the target of the link, which may be anywhere.
                text = f"{path}: a broken symbolic link"
                raise StorageError(text, "remove it, then try again")
        try:
            make_directory(self.directory)
        except OSError as error:
            path = error.filename or self.directory
            raise storage_error("create", path, error, home_hint(self.settings)) from None

    def _take_locks(self, locks: List[int], deadline: float) -> None:
        """Lock the lock file beside the file, then the file itself, then its temporary file.

        The descriptors are added to `locks`. The lock file alone isn't enough if somebody deletes
        it, or if only the file is mounted into a container, which then has another lock file beside
        it. The temporary file is locked because it takes the place of the file when it is renamed.
        """
        locks.append(acquire_lock_file(self.lock_path, deadline))
        # On Windows, a lock on a file would keep others from reading it.
        if sys.platform != "win32":
            for path in (self.real_path, self.temporary):
                # The file may not exist. If it can't be opened, `reserve` raises an error.
                with contextlib.suppress(OSError):
                    locks.append(acquire_lock(path, deadline))

    def _new_replacement(self) -> Replacement:
        """Create the temporary file and lock it. The caller must hold the lock."""
        replacement = Replacement(self.path)
        if sys.platform != "win32" and self.locks is not None:
            # A duplicate keeps the lock after the file has been closed and renamed.
            descriptor = os.dup(replacement.file.fileno())
            self.locks.append(descriptor)
            _try_lock(descriptor)
        return replacement

    def reserve(self, present: Fields) -> None:
        """Make sure that `present`, with RESERVE more bytes, can be stored by the next `save`.

        Call this before a request whose response must not be lost: a full disk, or a file that
        can't be replaced, then raises StorageError before a refresh token is spent. The caller must
        hold the lock.
        """
        contents = encode(present)
        # At most half of the limit may be used already, so that the new tokens certainly fit.
        if len(contents) > self.limit // 2:
            hint = "remove what other programs have stored in it, then try again"
            raise StorageError(f"{self.path}: too large for new tokens", hint)
        size = len(contents) + RESERVE
        # There is a reserved replacement already if an earlier request had no effect.
        self._discard_reserved()
        try:
            self._replace_with_copy()
            self.reserved = self._new_replacement()
            self.reserved.write(b" " * size)
            self.reserved.sync()
        except OSError as error:
            raise self._write_error(error) from None

    def _replace_with_copy(self) -> None:
        """Replace the file with a copy of itself to prove that it can be replaced.

        Renaming fails if only this file is mounted (a container), if it is immutable, or if the
        directory is append-only. May raise OSError.
        """
        version = self._version()
        try:
            contents = _retry_on_windows(self._read_bytes) if version else b"{}\n"
        except (StorageError, IsADirectoryError, PermissionError):
            # A sign-in renames a file that can't be read before it spends an authorization code
            # (see `set_aside`).
            return
        copy = self._new_replacement()
        try:
            copy.write(contents)
            copy.sync()
            # Don't undo what Code Puppy's own plugin has just written.
            if self._version() != version:
                raise UnavailableError(f"another program is changing {self.path}", "try again")
            copy.commit()
            # An empty object means the same as no file, if we are killed between these two steps.
            if not version:
                os.unlink(self.real_path)
        finally:
            copy.discard()

    def _version(self) -> Optional[Tuple[int, ...]]:
        """Return numbers that change when another program writes the file. None without a file."""
        try:
            info = os.stat(self.path)
        except FileNotFoundError:
            return None
        return info.st_ino, info.st_size, info.st_mtime_ns

    def save(self, value: Fields) -> None:
        """Replace the contents of the file with `value`. The caller must hold the lock.

        Raises NotReplacedError if `value` is on disk beside the file, and StorageError if it isn't.
        """
        data = encode(value)
        if len(data) > self.limit:
            text = f"cannot write {self.path}: it would be larger than {self.limit // MEBIBYTE} MiB"
            raise StorageError(
                text, "keep fewer models in it (see models --include), then try again"
            )
        try:
            # If writing fails, `holding` discards this.
            self.reserved = self.reserved or self._new_replacement()
            self.reserved.write(data)
        except OSError as error:
            raise self._write_error(error) from None
        replacement, self.reserved = self.reserved, None
        # If this fails, go on anyway. The new contents may still reach the disk, and the old tokens
        # may already be spent.
        with contextlib.suppress(OSError):
            replacement.sync()
        try:
            replacement.commit()
        except OSError as error:
            failure = self._write_error(error)
            raise NotReplacedError(str(failure), failure.hint or "") from None

    def remove(self) -> None:
        """Remove the file, its temporary file and its `.bad` copy. The caller must hold the lock.

        If the file is reached through a symbolic link, the link is removed, too.
        """
        # Once the link is gone, the properties would lead elsewhere.
        names = (self.temporary, self.path, self.real_path, self.broken_copy)
        try:
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    _retry_on_windows(os.unlink, name)
        except OSError as error:
            raise storage_error("remove", error.filename or self.path, error) from None

    def _write_error(self, error: OSError, verb: str = "write") -> StorageError:
        """Return the StorageError for a system call that failed to replace the file."""
        # For a failed rename, `filename2` is the file, and `filename` the temporary file.
        return storage_error(verb, error.filename2 or error.filename or self.path, error)

    def require_removable(self) -> None:
        """Raise StorageError if the file can't be removed. The caller must hold the lock."""
        try:
            self._replace_with_copy()
        except OSError as error:
            # A full disk doesn't keep a file from being removed.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise self._write_error(error, "remove") from None


class TokenFile(JsonFile):
    """A file that holds the tokens of one sign-in. Only its owner can read it."""

    limit = MEBIBYTE

    def __init__(self, client: Client, notify: Notify) -> None:
        super().__init__(client.settings, client.settings.directory, client.file_name)
        self.notify = notify
        hint = "to start over (the file is kept beside it as .bad), run"
        self.broken_hint = Hint(hint, client.sign_in_command)

    def load(self) -> Optional[Tokens]:
        """Return the stored tokens, or None if nobody is signed in."""
        fields = self.read()
        try:
            return Tokens(fields) if fields.get("access_token") else None
        except ValueError as error:
            raise self.broken_error(str(error)) from None

    def holds_sign_in(self) -> bool:
        """Whether the file holds a sign-in. A broken file doesn't."""
        with contextlib.suppress(StorageError):
            return self.load() is not None
        return False

    def read(self) -> Fields:
        """Return the JSON object, or {} if the file doesn't exist.

        First, recover tokens that a killed process received, unless another process is at work.
        """
        failure: Optional[StorageError] = None
        if self.locks is None and os.path.lexists(self.temporary):
            try:
                # Taking the lock recovers the tokens.
                with self.lock(timeout=0):
                    pass
            except UnavailableError:
                # The temporary file belongs to the process that holds the lock.
                pass
            except StorageError as error:
                failure = error
        fields = super().read()
        if failure and not fields.get("access_token"):
            raise failure
        return fields

    @contextlib.contextmanager
    def lock(self, timeout: Optional[float] = None) -> Iterator[None]:
        """Hold the lock. First, recover tokens that a killed process received."""
        with super().lock(timeout):
            try:
                # Only these tokens are valid, because the refresh token in the file has been spent.
                if self._holds_newer_tokens(self.temporary):
                    _rename(self.temporary, self.real_path)
            except OSError as error:
                raise self._write_error(error) from None
            # A temporary file that can't be removed does no harm.
            with contextlib.suppress(OSError):
                os.unlink(self.temporary)
            yield

    def _holds_newer_tokens(self, path: str) -> bool:
        """Whether the file at `path` is ours, complete and newer than the token file."""
        if not _is_own_file(path, self.real_path):
            return False
        with os.fdopen(os.open(path, READ_WRITE), "rb") as file:
            try:
                fields = json.loads(file.read(self.limit))
                if not isinstance(fields, dict) or not Tokens(fields).access_token:
                    return False
            except (ValueError, RecursionError):
                return False
            # The process may have been killed before it synced the file.
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
        # If the token file is newer, Code Puppy's own plugin wrote it.
        if not self.holds_sign_in():
            return True
        return os.path.getmtime(self.path) <= os.path.getmtime(path)

    def _check_open_file(self, descriptor: int) -> None:
        """Check the open file as JsonFile does, reject another user's, and make it private."""
        super()._check_open_file(descriptor)
        if sys.platform == "win32":
            return
        info = os.fstat(descriptor)
        # Containers mount secrets as files that belong to root and that nobody else can write.
        is_secret = info.st_uid == 0 and not info.st_mode & 0o022
        if os.geteuid() not in (0, info.st_uid) and not is_secret:
            raise self.broken_error(f"owned by another user (uid {info.st_uid})")
        if info.st_mode & GROUP_AND_OTHERS:
            # On some mounts, chmod fails or changes nothing. There is nothing to report then.
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, PRIVATE)
                if not os.fstat(descriptor).st_mode & GROUP_AND_OTHERS:
                    text = f"{self.path} was readable by other users; changed to 0600"
                    self.notify("warning", text)

    def _lock_error(self, error: OSError) -> StorageError:
        # If this user can neither write to the directory nor make it writable, it is probably a
        # read-only mount.
        is_unwritable = self.holds_sign_in() and home_hint(self.settings)
        if is_unwritable and not can_change_mode(self.directory):
            hint = "set CHATGPT_OAUTH_HOME to a writable directory with its own sign-in"
            return storage_error("change", self.path, error, hint)
        return super()._lock_error(error)

    def set_aside(self) -> str:
        """Rename a broken file to `….bad` and return that path. The caller must hold the lock."""
        path = self.real_path
        try:
            _retry_on_windows(os.replace, path, self.broken_copy)
        except OSError as error:
            raise storage_error("remove", path, error) from None
        return self.broken_copy


# ---------------------------------------------------------------------------------------------
# Session: the one place that decides to refresh
# ---------------------------------------------------------------------------------------------
# A fresh access token costs one read: no lock, no write, no network. A refresh token is sent only
# under the lock of the token file, and only after room for the response has been reserved. It is
# sent again only if the server certainly hasn't processed the first request.
#
# Nothing may interrupt the program between the request and the moment when the response is on disk
# (see `run_task`). Therefore a child process does both. It has its own session, ignores signals and
# inherits the lock, so it finishes even if the process that waits for it is killed. That process
# delays signals, too, because its end may be the end of a container, which kills the child. If no
# child can be started, the process does the work itself and delays signals and its own exit.
#
# The tokens of a response are stored before anything else in it is checked (see `refresh_once`). A
# fault that is found afterwards is a warning, or it marks the stored sign-in as ended. Neither a
# wrong clock nor a wrong `earliest_refresh_at` in the token file locks a user out (see `_refreshed`
# and `accept_new_tokens`).

# At exit, the program waits for a refresh that runs in a thread, for at most the request timeout
# plus this.
EXIT_GRACE = 5.0  # seconds
# Signals that ask a process to end. They are delayed even if the program that imports this module
# handles them. The handler of the first one, SIGINT, is restored last (see signals_deferred).
ENDING_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
# Signals that are delayed only if they would end the process. If the program that imports this
# module has a handler (for an alarm, say), it is called without delay.
OTHER_SIGNALS = ("SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGVTALRM", "SIGPROF")
# The code that a child process runs. It imports this file instead of running it, so that Python can
# use the compiled code of the installed program or of the plugin. The file may have any name.
CHILD_CODE = """
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
spec = spec_from_loader("chatgpt_oauth", SourceFileLoader("chatgpt_oauth", sys.argv[1]))
module = module_from_spec(spec)
spec.loader.exec_module(module)
module.child_main()
"""
# The file names of interpreters, such as python3.13t, python3-dbg, pythonw.exe and pypy3.10-c. The
# name of an embedding program may begin in the same way.
PYTHON_NAME = r"(python|pypy|graalpy)w?[0-9.]*[a-z]{0,2}(-(c|dbg|debug|intel64))?(\.exe)?"
# The first line that a child process prints. It shows that Python runs this release of the program.
CHILD_GREETING = f"chatgpt_oauth {__version__} is ready\n".encode()
# How long a child process may take to start. A program that only looks like Python may never greet.
GREETING_TIMEOUT = 10.0  # seconds
# A child process is given up after the request timeout plus this. Besides sending its request, it
# writes to the disk and may try twice to revoke a token, for REVOKE_TIMEOUT each.
CHILD_GRACE = 30.0  # seconds
# How often to look for a Ctrl-C while a child process is at work.
INTERRUPT_SLICE = 0.1  # seconds
# How long to wait for the lock if the access token is still valid for a while.
BRIEF_LOCK_TIMEOUT = 2.0  # seconds
# The access tokens that had already expired by this machine's clock when they arrived in this run.
_expired_on_arrival: Set[str] = set()


def to_log(kind: str, text: str, command: str = "") -> None:
    """Log a message to the logger `chatgpt_oauth`. Programs that import the module use this."""
    import logging

    if command:
        text = f"{text}: python3 {__file__} {command}"
    # A URL to visit ("verbatim") is logged as a warning, because Python hides lower levels.
    level = logging.WARNING if kind in ("warning", "verbatim") else logging.DEBUG
    logging.getLogger("chatgpt_oauth").log(level, "%s", printable(text))


class Session:
    """A stored sign-in, whose tokens are refreshed when needed.

    The account is the one that `settings` names. The default client is the Codex CLI's. Messages
    for the user go to `notify`.
    """

    def __init__(
        self, settings: Settings, notify: Notify = to_log, client: Optional[Client] = None
    ) -> None:
        self.settings = settings
        self.notify = for_account(notify, settings.account)
        self.client = client or Client(settings)
        self.token_file = TokenFile(self.client, self.notify)
        self.models_file = JsonFile(settings, settings.home, "chatgpt_models.json")
        # The registration of the official sign-in. A sign-out leaves it.
        self.registration_file = JsonFile(settings, settings.directory, "chatgpt_agent.json")
        # The tokens of the last request.
        self.used_tokens: Optional[Tokens] = None
        # The failed refreshes of this run, by refresh token. They aren't tried again.
        self._failures: Dict[Optional[str], OAuthError] = {}
        # The access token that is used until it expires, because its refresh failed.
        self._kept_token: Optional[str] = None
        # The names of the models that this session has imported.
        self.imported: List[str] = []
        # Whether a server has refused the access token although it was a new one.
        self.is_rejected = False

    def tokens(self) -> Tokens:
        """Return the stored tokens without refreshing them. Raises NotSignedInError."""
        tokens = self.token_file.load()
        if tokens:
            return tokens
        command = self.client.sign_in_command
        if not self.client.is_official and self.official_session().token_file.holds_sign_in():
            text = "the official sign-in works only in Code Puppy"
            raise OfficialOnlyError(text, "for other programs, run", command)
        message = f"not signed in (no tokens in {self.token_file.path})"
        hint = home_hint(self.settings)
        if hint:
            # Signing in wouldn't help, because the tokens couldn't be stored.
            raise NotSignedInError(message, hint)
        raise NotSignedInError(message, "to sign in, run", command)

    def official_session(self) -> Session:
        return Session(self.settings, self.notify, OfficialClient(self.settings))

    def all_sessions(self) -> List[Session]:
        """Return the sessions of all sign-ins of the account, starting with this one."""
        other = Client if self.client.is_official else OfficialClient
        return [self, Session(self.settings, self.notify, other(self.settings))]

    def sessions_of_all_accounts(self) -> List[Session]:
        """Return the sessions of all accounts, starting with the account without a name."""
        names = self.settings.account_names()
        each_account = [Session(Settings(name), self.notify) for name in names]
        return [session for account in each_account for session in account.all_sessions()]

    @contextlib.contextmanager
    def naming_account(self) -> Iterator[Session]:
        """Name the account in the command of an OAuthError that the block raises."""
        try:
            yield self
        except OAuthError as error:
            error.command = with_account(error.command, self.settings.account)
            raise

    def valid_tokens(self, refresh: bool = False) -> Tokens:
        """Return the tokens after refreshing them if that is due, or in any case if `refresh`.

        If the refresh fails although the access token is still valid, report that as a warning,
        unless `refresh` is true. Raises OAuthError.
        """
        stored = self.tokens()
        if not refresh and stored.access_token in _expired_on_arrival:
            return stored
        if refresh or not stored.valid_for(0):
            return self._refreshed(stored)
        if stored.is_fresh() or stored.access_token == self._kept_token:
            return stored
        timeout = self.settings.lock_timeout
        if stored.valid_for(timeout):
            # The process that holds the lock may be suspended, so don't wait for long.
            timeout = min(timeout, BRIEF_LOCK_TIMEOUT)
        try:
            return self._refreshed(stored, timeout)
        except NotSignedInError:
            raise
        except OAuthError as error:
            self._kept_token = stored.access_token
            self.notify("warning", str(error))
            self.notify("info", "Using the current token, which is still valid.")
            if isinstance(error, SignInEndedError):
                self.notify("hint", error.hint or "", error.command)
            return stored

    def request(self, what: str, send: Callable[[Tokens], Response]) -> Response:
        """Return the response to `send(tokens)`, a request with the access token.

        After a 401 the request is sent once more, with another token. If that one is refused, too,
        this raises SignInEndedError, and later 401s no longer trigger a refresh in this session.
        `what` names the request in that error. Raises OAuthError.
        """
        self.used_tokens = tokens = self.valid_tokens()
        response = send(tokens)
        if response.is_unauthorized and not self.is_rejected:
            self.used_tokens = tokens = self.refresh_after_401(tokens.access_token)
            response = send(tokens)
            self.is_rejected = response.is_unauthorized
        if response.is_unauthorized:
            raise SignInEndedError(str(response.error(what)), self.client.sign_in_command)
        return response

    def refresh_after_401(self, rejected: str) -> Tokens:
        """Return new tokens after a server has answered 401 to the access token `rejected`.

        A 401 means that a token is invalid, whatever its expiry says. If another process has stored
        a newer token meanwhile, return that one and spend nothing. Otherwise refresh. If many
        processes do this at once, only one refreshes, because `_refreshed` looks again under the
        lock. Raises OAuthError.
        """
        stored = self.tokens()
        if stored.access_token != rejected:
            return self.valid_tokens()
        return self._refreshed(stored, rejected=True)

    def _refreshed(
        self, old: Tokens, timeout: Optional[float] = None, rejected: bool = False
    ) -> Tokens:
        """Return newer tokens than `old`, from another process's refresh or from our own.

        `timeout` is how many seconds to wait for the lock. It is given only if the access token can
        still be used, and then a failed refresh isn't tried again. `rejected` is true if a server
        has refused the access token, whatever its expiry says.
        """
        with self.token_file.lock(timeout):
            tokens = self.tokens()
            # Another process has stored these a moment ago, while we waited for the lock.
            if tokens.access_token != old.access_token:
                return self.accept_new_tokens(tokens)
            self.require_refreshable(tokens)
            if tokens.refresh_token in self._failures:
                raise self._failures[tokens.refresh_token]
            # The date before which OpenAI allows no refresh matters only while the access token is
            # good. It must not lock anybody out, because it or the clock may be wrong.
            is_too_early = tokens.refresh_allowed_at() > time.time()
            if is_too_early and tokens.valid_for(0) and not rejected:
                return tokens
            try:
                window = self.settings.retry_window if timeout is None else 0.0
                return self.accept_new_tokens(self._refresh_with_retry(tokens, window))
            except OAuthError as error:
                # An attempt with a `timeout` was brief. After a 401 it is repeated with more time.
                if timeout is None or isinstance(error, SignInEndedError):
                    self._failures[tokens.refresh_token] = error
                raise

    def accept_new_tokens(self, tokens: Tokens) -> Tokens:
        """Return `tokens`, which have just arrived, and use them for the rest of this run.

        If the clock is ahead, they seem to have expired. Refreshing them again wouldn't help.
        """
        if not tokens.valid_for(0) and tokens.access_token not in _expired_on_arrival:
            _expired_on_arrival.add(tokens.access_token)
            text = "the new access token has expired by this computer's clock; is it right?"
            self.notify("warning", text)
        return tokens

    def require_refreshable(self, tokens: Tokens) -> None:
        """Raise SignInEndedError if it is already known that a refresh will fail."""
        mark, command = tokens.fields.get("ended"), self.client.sign_in_command
        if isinstance(mark, dict) and mark.get("refresh_token_sha256") == tokens.fingerprint():
            raise InvalidGrantError(str(mark.get("reason")), command)
        if tokens.issuer != self.settings.issuer:
            text = f"the stored tokens come from another issuer, {tokens.issuer}"
            raise SignInEndedError(text, command)
        if not tokens.refresh_token:
            text = "cannot refresh the access token: there is no refresh token"
            raise SignInEndedError(text, command)

    def _refresh_with_retry(self, old: Tokens, window: float) -> Tokens:
        """Refresh. Try again for `window` seconds if the refresh token certainly isn't spent."""
        tries = Retry(window)
        while True:
            try:
                return Tokens(run_task(self, Session.refresh_once, old.fields))
            except RequestError as error:
                if not error.unprocessed:
                    raise UnavailableError(
                        str(error),
                        "try again; if that fails, sign in again with",
                        self.client.sign_in_command,
                    ) from None
                tries.wait(error)

    def refresh_once(self, fields: Fields) -> Fields:
        """Send one refresh request, store the tokens in the response, and only then check it.

        `fields` are the stored members, and the new ones are returned. If another program has
        stored other tokens in the meantime, return those. This is a function for `run_task`.
        """
        # The refresh token can be used only once. Reserve room for its successor first.
        self.token_file.reserve(fields)
        old = Tokens(fields)
        response = request_refresh(self.client, old)
        current = old
        # Another program may be writing the file in place at this moment.
        with contextlib.suppress(StorageError):
            current = self.tokens()
        if current.refresh_token == old.refresh_token:
            new, was_stored = self._store(response.members, current)
            return self._check_response(response, current, new, was_stored).fields
        if current.valid_for(0):
            return current.fields
        error = refresh_error(self.client, response)
        if error is None:
            # The new tokens aren't stored, because another process has stored others meanwhile.
            error = OAuthError("another process changed the stored tokens", "try again")
        raise error

    def _store(self, response: Fields, current: Tokens) -> Tuple[Tokens, bool]:
        """Store the valid tokens of a refresh's response.

        Returns the resulting tokens and whether they were stored. If there is nothing to store, the
        result is the `current` tokens. A refresh token without an access token is stored, too,
        because the one before is spent.
        """
        received = received_tokens(response)
        if not ("access_token" in received or "refresh_token" in received):
            return current, False
        fields = merged(current.fields, response)
        fields.update(self.client.refresh_fields(response))
        if fields.get("api_key") == current.access_token:
            # Code Puppy's own plugin stores the access token as `api_key` too (see Tokens).
            fields["api_key"] = fields["access_token"]
        self.token_file.save(fields)
        return Tokens(fields), True

    def _check_response(
        self, response: Response, old: Tokens, new: Tokens, was_stored: bool
    ) -> Tokens:
        """Return the `new` tokens after a refresh of the `old` ones, if the `response` is in order.

        `was_stored` tells whether the response brought tokens. Faults in it are warnings, or end
        the sign-in. Raises OAuthError if it brought no access token.
        """
        refusal = refresh_error(self.client, response)
        if refusal and self._is_too_early(refusal, old):
            raise UnavailableError(
                "OpenAI does not refresh the token yet",
                f"try again after {timestamp(old.refresh_allowed_at())}; if that fails, run",
                self.client.sign_in_command,
            )
        # If the response brought new tokens despite its error code, they aren't marked as ended.
        if isinstance(refusal, InvalidGrantError) and not was_stored:
            self._store_end(refusal.reason, old)
        if refusal:
            raise refusal
        warn_about_invalid_members(response.members, self.notify)
        fault = self.client.id_token_fault(new)
        if fault:
            self.notify("warning", f"ignored the id_token in the response, which {fault}")
            new = Tokens({**new.fields, "id_token": old.id_token})
            self.token_file.save(new.fields)
        if self.client.is_other_account(old, new):
            # The other account's tokens must not be used. Only the refresh token is kept, so that
            # a sign-out can revoke it.
            kept = Tokens({**old.fields, "refresh_token": new.refresh_token})
            self._store_end(OTHER_ACCOUNT, kept)
            raise InvalidGrantError(OTHER_ACCOUNT, self.client.sign_in_command)
        return new

    def _is_too_early(self, refusal: OAuthError, tokens: Tokens) -> bool:
        """Whether `refusal` may only mean that the refresh came before the date that OpenAI set.

        OpenAI documents no code for that, so every general one counts.
        """
        if tokens.refresh_allowed_at() <= time.time() or isinstance(refusal, UnavailableError):
            return False
        return not isinstance(refusal, InvalidGrantError) or refusal.reason == "invalid_grant"

    def _store_end(self, reason: str, tokens: Tokens) -> None:
        """Store `tokens`, marked as ended for `reason`."""
        mark = {"reason": reason, "refresh_token_sha256": tokens.fingerprint()}
        self.token_file.save({**tokens.fields, "ended": mark})


def received_tokens(response: Fields) -> Fields:
    """Return the valid tokens in a token response. A token that isn't valid is left out."""
    return {name: response[name] for name in TOKEN_NAMES if is_b64token(response.get(name))}


def merged(fields: Fields, response: Fields) -> Fields:
    """Return `fields` updated from a token response.

    A token that is missing or invalid keeps its old value.
    """
    new = {**fields, **received_tokens(response)}
    new.pop("ended", None)
    # Without a new access token, the dates of the old one stay.
    if is_b64token(response.get("access_token")):
        new["last_refresh"] = timestamp(time.time())
        new.pop("expires_at", None)
        lifetime = number_or_none(response.get("expires_in"))
        if lifetime:
            new["expires_at"] = timestamp(time.time() + lifetime)
    return new


def warn_about_invalid_members(response: Fields, notify: Notify) -> None:
    """Report the members of a stored token response that aren't what they should be."""
    for name in TOKEN_NAMES:
        value = response.get(name)
        if value not in (None, "") and not is_b64token(value):
            notify("warning", f"ignored the {name} in the response, which is not a valid token")
    if not has_bearer_type(response):
        notify("warning", "the response has a token_type that is not Bearer; using it anyway")


def run_task(session: Session, function: AnyCallable, *arguments: Any) -> Any:
    """Call `function(session, *arguments)` so that nothing interrupts it, and return the result.

    The function is one of TASK_FUNCTIONS: it spends a token or a code and stores the response. It
    gets a process of its own if that is possible. The caller must hold the lock of the token file.
    The arguments and the result must be JSON values. Raises the function's errors. After a
    KeyboardInterrupt, the child process may still go on.
    """
    task = {
        "function": function.__name__,
        "arguments": arguments,
        "settings": without(vars(session.settings), "environ"),
        "client": type(session.client).__name__,
        "client_members": without(vars(session.client), "settings"),
    }
    line = encode(task, indent=None)
    # If ask_child is interrupted, this stays true, and the child keeps the locks.
    session.token_file.are_locks_shared = True
    reply = ask_child(session, line)
    session.token_file.are_locks_shared = False
    if reply is None:
        with uninterrupted(session.settings):
            return function(session, *arguments)
    # A process that was killed has sent nothing, or a part of its reply.
    if not reply.endswith(b"\n"):
        raise RequestError("the process that sends the request has been killed")
    answer = json.loads(reply)
    for message in answer["messages"]:
        session.notify(*message)
    if "error" in answer:
        raise OAuthError.from_members(answer["error"])
    return answer["result"]


def without(members: Fields, name: str) -> Fields:
    return {key: value for key, value in members.items() if key != name}


def ask_child(session: Session, task: bytes) -> Optional[bytes]:
    """Start a process that runs `task` (see child_main), and return its reply.

    Returns None if the process couldn't be started or didn't receive the whole task, so nothing
    has been sent. The task goes through a pipe, because other users can read a command line.
    """
    import subprocess

    command = child_command()
    if not command:
        return None
    try:
        child: Any = subprocess.Popen(  # noqa: S603 - a list of arguments, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=session.settings.environ,
            # The locks stay taken until the child has ended, even if this process ends before it.
            pass_fds=session.token_file.locks or (),
            # Signals to our process group or from our terminal don't reach another session.
            start_new_session=True,
        )
    # No more processes are allowed, or Python 3.12 is shutting down.
    except (OSError, RuntimeError):
        return None
    # If we are interrupted here, the child's input is closed. The child then exits, unless it has
    # already received the whole task.
    with signals_deferred() as delayed, child.stdin, child.stdout:
        if not send_task(child, task):
            # It may be another program, which may not exit when its input is closed.
            child.kill()
            child.wait()
            return None
        reply = read_reply(session, child, delayed)
        child.wait()
        return reply


def send_task(child: Any, task: bytes) -> bool:
    """Send a child process its task when it is ready, and return whether it got all of it."""
    try:
        # A child of ours writes its greeting in one piece.
        if read_pipe(child.stdout, len(CHILD_GREETING), GREETING_TIMEOUT) != CHILD_GREETING:
            return False
        child.stdin.write(task)
        child.stdin.flush()
    # The child has ended before it could read the whole task.
    except BrokenPipeError:
        # close() tries to write the rest of the task, which fails again.
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        return False
    return True


def read_pipe(pipe: Any, size: int, seconds: float) -> Optional[bytes]:
    """Return up to `size` bytes from a pipe, b"" at its end, or None if none come in `seconds`."""
    import selectors

    # Unlike other selectors, this one needs no file descriptor, and there may be none left.
    with selectors.PollSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    return os.read(pipe.fileno(), size)


def read_reply(session: Session, child: Any, delayed: List[int]) -> bytes:
    """Return everything that comes from a child process.

    Signals that arrive meanwhile are appended to `delayed` (see signals_deferred) and don't end the
    wait. Raises UnavailableError if the child takes much longer than its request may. It has
    probably been stopped, and goes on when it is resumed. Until then, it keeps the locks.
    """
    import signal

    seconds = session.settings.request_timeout
    waited, reply, reported = 0.0, b"", 0
    while waited < seconds + CHILD_GRACE:
        began = time.monotonic()
        part = read_pipe(child.stdout, MEBIBYTE, INTERRUPT_SLICE)
        if part == b"":
            return reply
        reply += part or b""
        # The time during which this process was suspended doesn't count.
        waited += min(INTERRUPT_SLICE, time.monotonic() - began)
        interrupts = delayed.count(signal.SIGINT)
        if interrupts > reported:
            reported = interrupts
            session.notify("info", f"Waiting for the response first ({seconds:g} s at most)...")
    raise UnavailableError(
        f"the request is still running in process {child.pid}",
        f"let it finish (if it is stopped: kill -CONT {child.pid}), then try again",
    )


def own_python() -> str:
    """Return the path of this Python interpreter, or "" if it can't be started as one.

    A frozen program, or a program that embeds Python, isn't an interpreter and would start itself.
    """
    python = sys.executable or ""
    is_python = re.fullmatch(PYTHON_NAME, os.path.basename(python).lower()) is not None
    if is_python and not getattr(sys, "frozen", False):
        return python
    return ""


def child_command() -> List[str]:
    """Return the command that runs this file as a child process, or [] if that isn't possible.

    A program that is read from standard input has no file. On Windows, a child can't inherit a
    lock. The end of process 1 of a container would kill the child.
    """
    program, python = str(globals().get("__file__", "")), own_python()
    if sys.platform == "win32" or os.getpid() == 1:
        return []
    if not python or not os.path.isfile(program):
        return []
    # -I -S keeps Python from running code from the current directory, PYTHONPATH or site-packages.
    # -B keeps it from writing a compiled file. -X makes it decode paths the way this process does.
    flags = ["-I", "-S", "-B", "-X", f"utf8={sys.flags.utf8_mode}"]
    return [python, *flags, "-c", CHILD_CODE, program]


@contextlib.contextmanager
def uninterrupted(settings: Settings) -> Iterator[None]:
    """Delay signals and interpreter exit until the block is done, so that a response is saved.

    This is for programs that can't start a child process. In a thread other than the main one,
    signals can't be delayed, but the interpreter's exit can.
    """
    import atexit
    import threading

    process = os.getpid()
    done = threading.Event()

    # If the block runs in a thread, the interpreter calls this when the main thread has ended.
    def wait() -> None:
        # In a forked child process, the thread that runs the block doesn't exist.
        if os.getpid() == process:
            done.wait(settings.request_timeout + EXIT_GRACE)

    atexit.register(wait)
    try:
        with signals_deferred():
            yield
    finally:
        done.set()
        atexit.unregister(wait)


@contextlib.contextmanager
def signals_deferred() -> Iterator[List[int]]:
    """Delay signals that would end the process until the block is done.

    The block gets a list to which each of them is added. Afterwards, they take effect. In a thread
    other than the main one, nothing is delayed.
    """
    import signal

    handlers: Dict[int, Any] = {}
    delayed: List[int] = []
    wakeup = -1

    def hold(number: int, _: object) -> None:
        delayed.append(number)

    # ValueError: signal handlers can only be set in the main thread.
    with contextlib.suppress(ValueError):
        # asyncio learns of signals through this descriptor, so do without it while they are
        # delayed. raise_signal writes to it afterwards.
        wakeup = signal.set_wakeup_fd(-1)
        for name in ENDING_SIGNALS + OTHER_SIGNALS:
            number = getattr(signal, name, 0)
            handler = signal.getsignal(number) if number else None
            asks_to_end = name in ENDING_SIGNALS and callable(handler)
            if asks_to_end or handler == signal.SIG_DFL:
                handlers[number] = signal.signal(number, hold)
    try:
        yield delayed
    finally:
        # Restore the handlers in reverse order, so that the one for SIGINT comes last. It may raise
        # KeyboardInterrupt at once.
        for number, handler in reversed(list(handlers.items())):
            signal.signal(number, handler)
        # asyncio turns this warning off, too. What another program chose can't be found out.
        if wakeup != -1:
            signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        # An ExitStack runs its callbacks last to first, so add them in reverse. It runs the rest
        # even if a handler raises an exception.
        with contextlib.ExitStack() as stack:
            for number in reversed(delayed):
                stack.callback(signal.raise_signal, number)


@contextlib.contextmanager
def module_session(account: Optional[str]) -> Iterator[Session]:
    """Open the session of `account` for a caller of the module, who gets only OAuthErrors.

    A command that helps is written out in the error's hint.
    """
    try:
        with as_oauth_errors(), Session(Settings(account)).naming_account() as session:
            yield session
    except OAuthError as error:
        if error.command:
            error.hint, error.command = f"{error.hint}: chatgpt_oauth.py {error.command}", ""
        raise


def get_access_token(*, refresh: bool = False, account: Optional[str] = None) -> str:
    """Return a valid access token. Refresh it first if that is due, or if `refresh` is true.

    In all functions of the module, `account` is the name of an account. None means the one that the
    settings name, and "" the one without a name. All of them raise only OAuthError, for example
    NotSignedInError or SignInEndedError.
    """
    with module_session(account) as session:
        return session.valid_tokens(refresh).access_token


def get_account_id(*, account: Optional[str] = None) -> Optional[str]:
    """Return the account ID that some requests must contain, or None if it is unknown."""
    with module_session(account) as session:
        return session.tokens().account_id


def get_api_key(*, account: Optional[str] = None) -> Optional[str]:
    """Return the stored API key, or None if the account doesn't have one."""
    with module_session(account) as session:
        return session.tokens().api_key


# ---------------------------------------------------------------------------------------------
# Callback: the loopback listener that receives the authorization response
# ---------------------------------------------------------------------------------------------
# This room promises one authorization response whose state and issuer have been checked. It has no
# access to tokens and never sends a request. It listens on loopback addresses only, unless the
# setting callback_bind names another one. It answers GET requests only, and trusts nothing in a
# request: a response with the wrong state, a prefetch, or a foreign host name gets a page and
# changes nothing. Nothing from a request is logged. A browser tab that brings the response waits
# until the sign-in has set the outcome, and then shows it. The listener answers until the sign-in
# is finished, so that every such tab gets its last page.

# A server keeps at most this many connections whose request isn't complete yet. Browsers open spare
# connections, and a local program that opens many must not exhaust our threads.
MAX_CONNECTIONS = 64
# The time for a request line and its headers.
HEAD_TIMEOUT = 10.0  # seconds
# The part of a request that is kept. The rest is usually cookies that other local sites have set
# for localhost, and http.server rejects a single line that is longer.
HEAD_LIMIT = 65536  # bytes
# The first byte of a connection that uses TLS (RFC 8446 §5.1).
TLS_HANDSHAKE = b"\x16"
# The time for the browser to fetch the page that follows the redirect.
SUCCESS_PAGE_TIMEOUT = 5.0  # seconds
# The time for the waiting tabs to load the page about a failure.
FAILURE_PAGE_TIMEOUT = 2.0  # seconds
# The errors of an address that this system doesn't have.
MISSING_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
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
    """Return a self-contained HTML page (`kind`: yes, no or note) and escape its paragraphs."""
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


def stray_page(text: str) -> bytes:
    """Return the page for a request that isn't the authorization response."""
    hint = "If you are signing in, continue in the other tab."
    return render_page("Nothing to do here", text, hint, kind="note")


class AuthorizationRequest:
    """One authorization request: its URL, and the secrets that its response is checked against."""

    def __init__(self, client: Client, port: int) -> None:
        import hashlib
        import secrets
        import urllib.parse
        from base64 import urlsafe_b64encode

        # The state ties the response to this request (RFC 6749 §10.12).
        self.state = secrets.token_urlsafe(32)
        # The nonce ties the ID token to this request (OpenID Connect Core §3.1.2.1).
        self.nonce = secrets.token_urlsafe(32)
        # The verifier ties the code to this process (RFC 7636 §4.1 and §4.2).
        self.code_verifier = secrets.token_urlsafe(64)
        digest = hashlib.sha256(self.code_verifier.encode()).digest()
        self.port = port
        self.issuer = client.settings.issuer
        self.path = "/" + client.settings.redirect_path
        self.redirect_uri = f"{client.redirect_host}:{port}{self.path}"
        # RFC 6749 §4.1.1 and RFC 7636 §4.3
        parameters = {
            "response_type": "code",
            "client_id": client.client_id,
            "redirect_uri": self.redirect_uri,
            "scope": client.scope,
            "code_challenge": urlsafe_b64encode(digest).rstrip(b"=").decode(),
            "code_challenge_method": "S256",
            "state": self.state,
            **client.authorization_parameters(self.nonce),
        }
        query = urllib.parse.urlencode(parameters, quote_via=urllib.parse.quote)
        self.url = f"{self.issuer}{client.authorization_path}?{query}"

    def parse_response(self, query: str) -> Dict[str, str]:
        """Return the authorization response (RFC 6749 §4.1.2) in `query`, checking its state first.

        Raises ValueError if it isn't a response to this request.
        """
        import hmac
        import urllib.parse

        # parse_qs raises ValueError if there are more fields. A response has about five.
        fields = urllib.parse.parse_qs(query, keep_blank_values=True, max_num_fields=50)
        # A parameter must not appear more than once (RFC 6749 §3.1). One that does is ignored.
        response = {name: values[0] for name, values in fields.items() if len(values) == 1}
        state = response.get("state", "").encode("utf-8", "replace")
        if not hmac.compare_digest(state, self.state.encode()):
            raise ValueError("it belongs to a different sign-in")
        # If iss appears more than once, treat it as an empty issuer, which isn't ours.
        if "iss" in fields:
            response.setdefault("iss", "")
        # A response from another issuer ends the sign-in, whatever else it contains.
        if self.has_other_issuer(response) or response.get("error"):
            return response
        # The limit is our own, far above the length of a code.
        if not re.fullmatch("[!-~]{1,4096}", response.get("code", "")):
            raise ValueError("it has no authorization code")
        return response

    def has_other_issuer(self, response: Dict[str, str]) -> bool:
        """Whether the response names an issuer other than ours (RFC 9207 §2.4).

        It may name none. If the browser was led to another authorization server, its code must not
        be sent to ours.
        """
        return response.get("iss", self.issuer).rstrip("/") != self.issuer

    def parse_pasted(self, text: str) -> Dict[str, str]:
        """Return the authorization response in pasted text: in a URL or in its query alone.

        Any host is accepted, because a forwarded port can have another address. Raises ValueError
        if the text contains no response to this request.
        """
        faults = []
        for url in pasted_urls(text):
            try:
                return self._parse_pasted_url(url)
            except ValueError as error:
                faults.append(error)
        # The first string is the one that is most likely to be the URL.
        raise faults[0]

    def _parse_pasted_url(self, url: str) -> Dict[str, str]:
        # If there is no question mark, all of it is the query, and `start` is empty.
        start, _, query = url.partition("#")[0].rpartition("?")
        # The paste may start in the middle of the path.
        if not (start.endswith(self.path) or self.path.endswith(start)):
            raise ValueError(f"it must contain {self.path}?code=")
        found = re.search("(?:^|&)state=([^&]*)", query)
        state = found[1] if found else ""
        if not state and "code=" in query:
            raise ValueError("it has no state; copy all of it from the address bar")
        # Only the beginning of our state has been pasted, or nothing of it.
        if state != self.state and self.state.startswith(state):
            raise ValueError("it is not complete; copy all of it from the address bar")
        return self.parse_response(query)


def pasted_urls(text: str) -> List[str]:
    """Return the strings in pasted `text` that could be a URL, without what was added to it."""
    # Some terminals mark the beginning and the end of what is pasted ("bracketed paste").
    text = re.sub(r"\x1b\[20[01]~", "", text)
    # A chat or a web page may add a space without width. The URL itself is ASCII.
    text = re.sub(r"[^\x00-\x7f]", " ", text)
    # HTML, JSON and shells escape the & in different ways. The URL itself has no backslash.
    text = text.replace("&amp;", "&").replace("\\u0026", "&").replace("\\", "")
    words = text.split()
    candidates = [word for word in words if "state=" in word]
    # A terminal or a mail program may have broken the URL into lines.
    candidates.append("".join(words))
    return [each.strip("<>()[]{}\"'`,;.") for each in candidates]


def is_navigation(headers: Any) -> bool:
    """Whether the request looks like a page that a person opened (W3C Fetch Metadata)."""
    destination = headers.get("Sec-Fetch-Dest", "document")
    prefetch = "prefetch" in headers.get("Sec-Purpose", "")
    return destination in ("document", "iframe", "frame") and not prefetch


def is_served_host(hosts: List[str]) -> bool:
    """Whether the values of the Host header name this machine by a loopback name.

    A website can point its own host name at 127.0.0.1 (DNS rebinding). Any port is fine, because
    the browser may use a forwarded port, and it omits the port if that is 80.
    """
    if len(hosts) != 1:
        return False
    return re.fullmatch(rf"{LOOPBACK}(?::[0-9]+)?", hosts[0].lower()) is not None


class Answer:
    """The answer to one request at the listener.

    `is_last` is true if the browser tab won't request anything else.
    """

    def __init__(self, status: int, page: bytes = b"", is_last: bool = False) -> None:
        self.status, self.page, self.is_last = status, page, is_last


class Callback:
    """The listener at the redirect URI of one authorization request.

    Two futures connect the browser with the sign-in. The first valid authorization response sets
    `response`, whether it came from a browser or was pasted. The sign-in sets `outcome` when the
    tokens are stored or when it has failed. Every browser tab that brings the response waits for
    `outcome` and shows it. The servers answer until `close`. `can_paste` says whether a person can
    paste a URL into the terminal.
    """

    def __init__(
        self, request: AuthorizationRequest, servers: List[Any], can_paste: bool = False
    ) -> None:
        import threading
        from concurrent.futures import Future

        self.request, self.servers, self.can_paste = request, servers, can_paste
        self.response: AnyFuture = Future()
        self.outcome: AnyFuture = Future()
        # The number of tabs that have brought the response and haven't shown the outcome yet.
        self.waiting_tabs = 0
        # Done when a browser has tried to speak TLS to a server.
        self.tls_attempt: AnyFuture = Future()
        self.tabs_changed = threading.Condition()
        self.started: List[Any] = []
        for server in servers:
            # The server's request handler finds this object through it.
            server.callback = self
            # server.shutdown() waits for the server's next poll, which is 10 ms away at most.
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self.close()
                raise OAuthError(f"cannot listen for the browser: {error}", "try again") from None
            self.started.append(server)

    def answer(self, target: str, headers: Any) -> Answer:
        """Return the answer to a GET of `target`. For a valid response, wait for the outcome."""
        path, _, query = target.partition("?")
        if not is_served_host(headers.get_all("Host") or []):
            text = "This host name is not served here."
            if self.can_paste and self.request.state in query:
                text += " To sign in anyway, paste this page's URL into the terminal."
            return Answer(400, stray_page(text))
        if path == "/success" and self._has_succeeded():
            text = "You can close this tab and return to your terminal."
            page = render_page("You're signed in", text, kind="yes")
            # An image on another site's page can request this URL, too.
            return Answer(200, page, is_last=is_navigation(headers))
        if path != self.request.path:
            return Answer(404, stray_page("There is no page at this URL."))
        try:
            response = self.request.parse_response(query)
            if not is_navigation(headers):
                raise ValueError("it was not opened by a person")
        except ValueError as error:
            return Answer(400, stray_page(f"This request was ignored: {error}."))
        # do_GET counts the tab down after its last page: the failure page, or else /success.
        self.count_tab(1)
        set_once(self.response, response)
        failure_page = self._wait_for_failure_page()
        if failure_page:
            return Answer(400, failure_page, is_last=True)
        # A redirect to /success removes the code from the address bar.
        return Answer(303)

    def _has_succeeded(self) -> bool:
        """Whether the sign-in is done and the tokens are stored."""
        if not self.outcome.done() or self.outcome.cancelled():
            return False
        return self.outcome.exception() is None

    def _wait_for_failure_page(self) -> bytes:
        """Wait for the outcome and return the page that explains a failure, b"" after success."""
        from concurrent.futures import CancelledError

        try:
            error: Any = self.outcome.exception()
        except CancelledError:
            return render_page("Sign-in stopped", "Return to your terminal and start again.")
        if error is None:
            return b""
        # The sign-in sets only OAuthErrors.
        hint = error.hint
        # A command is of no use in a browser. The terminal shows it.
        if error.command or not hint:
            hint = "return to your terminal and try again"
        sentences = (f"{text[:1].upper()}{text[1:]}." for text in (str(error), hint))
        return render_page("Sign-in failed", *sentences)

    def count_tab(self, change: int) -> None:
        """Add `change` to the number of tabs that wait for the outcome."""
        with self.tabs_changed:
            # Someone may open the success page without having brought the response.
            self.waiting_tabs = max(0, self.waiting_tabs + change)
            self.tabs_changed.notify_all()

    def wait_until_shown(self, seconds: float) -> None:
        """Wait up to `seconds` until no tab waits for the outcome anymore."""
        with self.tabs_changed:
            self.tabs_changed.wait_for(lambda: self.waiting_tabs == 0, max(0.0, seconds))

    def close(self) -> None:
        """Stop the servers and free the port at once."""
        self.outcome.cancel()
        for server in self.started:
            server.shutdown()
        for server in self.servers:
            server.server_close()


def set_once(future: AnyFuture, result: object) -> None:
    """Set the result of `future` unless it is already done."""
    from concurrent.futures import InvalidStateError

    with contextlib.suppress(InvalidStateError):
        future.set_result(result)


def open_servers(addresses: Tuple[str, ...], port: int) -> List[Any]:
    """Return a server on `port` for each of the `addresses` that this system has.

    With `port` 0 the system chooses one. Raises OSError if the port is taken on any address,
    because the browser could resolve `localhost` to that address and reach the other program.
    """
    import socket

    server_class = callback_server_class()
    servers: List[Any] = []
    with contextlib.ExitStack() as opened:
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                server = server_class(family, (address, port))
            except OSError as error:
                if error.errno not in MISSING_ADDRESS:
                    raise
                # A system may have only IPv4 or only IPv6.
                missing = error
                continue
            servers.append(opened.enter_context(server))
        if not servers:
            raise missing
        # All servers are open, so the caller closes them.
        opened.pop_all()
    return servers


def callback_server_class() -> Any:
    """Return the server class for one address."""
    import socket
    from http.server import ThreadingHTTPServer

    handler = callback_handler_class()

    class CallbackServer(ThreadingHTTPServer):
        request_queue_size = 128
        callback: Callback

        def __init__(self, family: int, address: Tuple[str, int]) -> None:
            self.address_family = family
            # Connections that haven't sent a complete request, oldest first.
            self.incomplete: Dict[Socket, None] = {}
            super().__init__(address, handler)

        def server_bind(self) -> None:
            # HTTPServer.server_bind would look up this host's name, which can take seconds.
            # An old connection in TIME_WAIT must not block the port, but another listener must.
            # On Windows SO_REUSEADDR would allow a second listener.
            option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
            self.socket.setsockopt(socket.SOL_SOCKET, option, 1)
            self.socket.bind(self.server_address)

        def get_request(self) -> Any:
            try:
                return super().get_request()
            except OSError:
                # Without a free descriptor, the server's loop would retry at full speed.
                time.sleep(0.01)
                raise

        def process_request(self, request: Any, client_address: Any) -> None:
            self.incomplete[request] = None
            for oldest in list(self.incomplete)[:-MAX_CONNECTIONS]:
                # Its thread then removes it in shutdown_request.
                hang_up(oldest)
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            self.incomplete.pop(request, None)
            super().shutdown_request(request)

        def server_close(self) -> None:
            super().server_close()
            for connection in list(self.incomplete):
                hang_up(connection)

        def handle_error(self, *_: Any) -> None:
            """Ignore a client that disconnected and a thread that could not start."""

    return CallbackServer


def callback_handler_class() -> Any:
    """Return the handler class for the redirect URI. It serves one request per connection."""
    import hashlib
    import io
    from base64 import b64encode
    from http.server import BaseHTTPRequestHandler

    style = b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{style}'; frame-ancestors 'none'"

    class CallbackHandler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server: Any

        def setup(self) -> None:
            super().setup()
            # The file that http.server reads from would keep the connection open in PyPy, which
            # closes it only much later.
            self.rfile.close()
            head = read_head(self.connection)
            if head.startswith(TLS_HANDSHAKE):
                set_once(self.server.callback.tls_attempt, True)
                # Without a request, the connection is closed at once.
                head = b""
            self.rfile = io.BytesIO(head)
            self.server.incomplete.pop(self.connection, None)

        # http.server calls the method by this name.
        def do_GET(self) -> None:  # noqa: N802
            callback = self.server.callback
            answer = callback.answer(self.path, self.headers)
            try:
                self._send(answer.status, answer.page)
            finally:
                if answer.is_last:
                    callback.count_tab(-1)

        def send_error(self, code: int, *_: Any) -> None:
            # http.server reports an unknown method as 501. Every path allows only GET.
            status = 405 if code == 501 else code
            page = b"" if self.command == "HEAD" else stray_page("This request is not valid.")
            self._send(status, page)

        def log_message(self, *_: Any) -> None:
            """Log nothing, because the request line contains the authorization code."""

        def _send(self, status: int, page: bytes) -> None:
            headers = {
                "Server": "chatgpt_oauth",
                "Date": self.date_time_string(min(time.time(), LAST_MOMENT)),
                "Content-Type": "text/html; charset=utf-8",
                "Content-Length": str(len(page)),
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "Content-Security-Policy": policy,
                "X-Content-Type-Options": "nosniff",
                "Connection": "close",
            }
            if status == 303:
                headers["Location"] = "/success"
            if status == 405:
                headers["Allow"] = "GET"
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(page)

    return CallbackHandler


def read_head(connection: Socket) -> bytes:
    """Return a request line and its headers, or b"" if the client hangs up before their end.

    If the client speaks TLS, the beginning of its first message is returned at once. A browser that
    was told to use https for localhost (HSTS) sends that and waits for an answer.

    Everything beyond HEAD_LIMIT bytes is dropped. Raises OSError if the connection breaks or the
    head isn't complete after HEAD_TIMEOUT seconds, however often the client sends something.
    """
    head = b""
    # The newest bytes, and the two before them: the blank line may arrive in pieces.
    tail = b""
    deadline = time.monotonic() + HEAD_TIMEOUT
    is_complete = False
    while not is_complete:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the request is not complete")
        connection.settimeout(seconds)
        part = connection.recv(16384)
        if not part:
            return b""
        tail = tail[-2:] + part
        # The one extra byte makes http.server reject a request line that is too long.
        head = (head + part)[: HEAD_LIMIT + 1]
        has_blank_line = re.search(rb"\n\r?\n", tail) is not None
        is_complete = has_blank_line or head.startswith(TLS_HANDSHAKE)
    # From now on, this limits each write of the response.
    connection.settimeout(HEAD_TIMEOUT)
    return head


# ---------------------------------------------------------------------------------------------
# Models: the models that the account can use, and Code Puppy's entries for them
# ---------------------------------------------------------------------------------------------
# This room lists models and rewrites our entries in the models file. An entry is ours if it has our
# `oauth_source`, our prefix, and the account and the type of the sign-in. All other entries stay as
# they are. Entries change only under the models file's lock. They refer to the API key by the name
# of its variable, so the models file contains no secret.

OAUTH_SOURCE = "chatgpt-oauth-plugin"
# The types of entries for API models, which use /v1/chat/completions or /v1/responses.
CHAT_TYPE, RESPONSES_TYPE = "custom_openai", "custom_openai_responses"
# The context lengths to assume if the real one is unknown. The API's list has no lengths: 128000 is
# that of GPT-4o, and most newer models have more. A plan's models have a window of 272000 tokens,
# of which the Codex CLI uses 95 percent.
API_CONTEXT_LENGTH, PLAN_CONTEXT_LENGTH = 128000, 258400  # tokens
# A shorter context in the catalog must be a mistake and is ignored, like one that is longer than
# MAX_CONTEXT_LENGTH. The limit is our own, far below that of any model in the catalog.
MIN_CONTEXT_LENGTH = 16000  # tokens
# The effort levels that Code Puppy knows (0.0.946, model_utils.py), weakest first. The catalog
# has others, such as `ultra`.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# What error messages call the requests of this room.
LIST_MODELS = "list models"
GET_USAGE = "get the usage"
NO_API_KEY = "this account has no API key"
ORGANIZATION_HINT = "create an organization and a project at https://platform.openai.com"


def no_api_key_error(message: str = NO_API_KEY) -> OAuthError:
    return NoApiKeyError(message, f"{ORGANIZATION_HINT}, then run", "auth")


def plan_not_allowed_error() -> OAuthError:
    return OAuthError(
        "this sign-in was not allowed to use your ChatGPT plan",
        "allow it in ChatGPT under Settings > Security and login, or here with",
        OfficialClient.sign_in_command,
    )


class ModelFilter:
    """The choice of models to import: glob patterns to include and exclude, and the source.

    `is_explicit` is true if any pattern came from the command line rather than from the settings.
    """

    def __init__(
        self,
        settings: Settings,
        include: Optional[List[str]] = None,
        exclude: Optional[List[str]] = None,
        source: Optional[str] = None,
    ) -> None:
        self.include = include or settings.model_patterns.split(",")
        self.exclude = list(exclude or [])
        # An explicit `include` replaces all patterns of the settings, the excludes as well.
        if not include:
            self.exclude += settings.model_excludes.split(",")
        self.source = source or settings.model_source
        self.is_explicit = bool(include or exclude)

    def matches(self, name: str) -> bool:
        return matches_any(name, self.include) and not matches_any(name, self.exclude)


def matches_any(name: str, globs: List[str]) -> bool:
    """Whether all of `name` matches one of the shell patterns. Case matters."""
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, glob) for glob in globs)


def base_url(settings: Settings, source: str) -> str:
    """Return the URL below which the models of `source` are listed and used."""
    return settings.codex_base_url if source == "codex" else f"{settings.api_base_url}/v1"


def account_headers(tokens: Tokens) -> Dict[str, str]:
    """Return the headers that identify the account to the Codex backend.

    A workspace whose data must stay in one region has a residency in its access token. Without the
    header, OpenAI answers 401 ("Workspace is not authorized in this region"). The Codex CLI sends
    the same header.
    """
    headers = {}
    if tokens.account_id:
        headers["ChatGPT-Account-Id"] = tokens.account_id
    residency = auth_claims(tokens.access_token).get("chatgpt_compute_residency")
    if is_b64token(residency) and residency != "no_constraint":
        headers["x-openai-internal-codex-residency"] = str(residency)
    return headers


def request_models(settings: Settings, source: str, tokens: Tokens) -> Response:
    """Request the list of models from `source`: "api", "codex" or "official".

    For the token of an official sign-in, the API lists the plan's models in the same form as the
    Codex backend. Raises OAuthError if there is no response. Any status counts as a response.
    """
    url = base_url(settings, source) + "/models"
    bearer = tokens.api_key or ""
    headers = {}
    if source != "api":
        url += f"?client_version={settings.codex_client_version}"
        bearer = tokens.access_token
    if source == "codex":
        headers = {**account_headers(tokens), "originator": settings.originator}
    return request_json(
        settings, url, LIST_MODELS, bearer=bearer, headers=headers, limit=MODELS_LIMIT
    )


class Usage:
    """How much of the ChatGPT plan is used, from the usage endpoint's response.

    A plan limits the usage in each of several periods, called windows, such as 5 hours and a week.
    `windows` has an object for each, shortest first, as in `status --json`. `plan` is the plan's
    name at this moment, and `credits` is the balance as a text. Both are None if the response
    doesn't have them.
    """

    def __init__(self, response: Fields) -> None:
        self.plan = text_or_none(response.get("plan_type"))
        self.credits = _credits_text(response.get("credits"))
        limits = response.get("rate_limit")
        limits = limits if isinstance(limits, dict) else {}
        listed = [_usage_window(limits.get(f"{name}_window")) for name in ("primary", "secondary")]
        self.windows = [window for window in listed if window]
        self.windows.sort(key=lambda window: float(window["window_seconds"]))


def request_usage(session: Session) -> Usage:
    """Request how much of the plan is used. Raises OAuthError.

    The Codex CLI uses this endpoint. It is undocumented and may disappear.
    """
    settings = session.settings
    response = session.request(
        GET_USAGE,
        lambda tokens: request_json(
            settings,
            settings.usage_url,
            GET_USAGE,
            bearer=tokens.access_token,
            headers=account_headers(tokens),
        ),
    )
    return Usage(response.json_object(GET_USAGE))


def _credits_text(listed: object) -> Optional[str]:
    """Return the balance of the account's credits, or None if it has none."""
    if not isinstance(listed, dict):
        return None
    if listed.get("unlimited") is True:
        return "unlimited"
    if listed.get("has_credits") is not True:
        return None
    balance = str(listed.get("balance"))
    return balance if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", balance) else "available"


def _usage_window(listed: object) -> Optional[Fields]:
    """Return one window for `status --json`, or None if its length or its usage is missing."""
    if not isinstance(listed, dict):
        return None
    length = number_or_none(listed.get("limit_window_seconds"))
    used = number_or_none(listed.get("used_percent"))
    if length is None or used is None:
        return None
    resets_at = timestamp_or_none(reset_time(listed, "reset_at", "reset_after_seconds"))
    return {"window_seconds": length, "used_percent": used, "resets_at": resets_at}


def reset_time(listed: Fields, at: str, after: str) -> Optional[float]:
    """Return when a usage limit resets, in seconds since 1970, or None if that is unknown.

    OpenAI gives the time in two members of `listed`. `at` is in seconds since 1970. `after` is in
    seconds from now, which is right even if this machine's clock is wrong.
    """
    seconds_left = number_or_none(listed.get(after))
    if seconds_left is not None:
        return time.time() + seconds_left
    return number_or_none(listed.get(at))


def resolve_source(session: Session, source: str) -> Tuple[Session, str]:
    """Return the session that provides the models of `source`, and the actual source.

    The actual source is "api", "codex" or "official", because "auto" is resolved here. The official
    sign-in has only one source, its own. Raises NotSignedInError.
    """
    if session.client.is_official:
        return session, "official"
    official = session.official_session()
    if source == "official":
        return official, "official"
    if source != "auto":
        return session, source
    if not session.token_file.holds_sign_in() and official.token_file.holds_sign_in():
        return official, "official"
    return session, "api" if session.tokens().api_key else "codex"


def list_models(session: Session, source: str) -> Dict[str, Fields]:
    """Return the models of `source` by ID, each with the server's description of it.

    `session` and `source` are those that `resolve_source` returns. A plan's models keep the
    server's order. The API's list has no order, so its models are sorted newest first. Raises
    OAuthError, also if `source` is "api" and the account has no API key.
    """
    response = _models_response(session, source)
    try:
        listed = response.json_object(LIST_MODELS).get("data" if source == "api" else "models")
        if not isinstance(listed, list):
            raise OAuthError(f"could not {LIST_MODELS}: the response has no list of models")
    except RequestError:
        # The reason is the network or the server, not the account.
        raise
    except OAuthError as error:
        raise _list_error(session, source, response, error) from None
    id_name = "id" if source == "api" else "slug"
    models: Dict[str, Fields] = {}
    skipped = 0
    for entry in listed:
        # The Codex backend marks models that it doesn't offer to users.
        if not isinstance(entry, dict) or entry.get("visibility", "list") != "list":
            continue
        if is_shut_down(entry):
            continue
        name = entry.get(id_name)
        if isinstance(name, str) and re.fullmatch(MODEL_ID, name):
            models[name] = entry
        else:
            skipped += 1
    if skipped:
        plural = "s" if skipped > 1 else ""
        session.notify("warning", f"skipped {skipped} model{plural} with unsupported names")
    if source == "api":
        # A model whose creation time is unknown comes last.
        created = {name: number_or_none(models[name].get("created")) or 0 for name in models}
        newest = sorted(models, key=lambda name: -created[name])
        return {name: models[name] for name in newest}
    return models


def _list_error(session: Session, source: str, response: Response, error: OAuthError) -> OAuthError:
    """Return the error for a failed listing: `error` with a hint, or a more specific one."""
    if response.status not in (401, 403):
        error.set_default_hint("status --online", "to see what OpenAI accepts, run")
        return error
    if source == "official" and "scope_not_authorized" in response.code:
        return plan_not_allowed_error()
    hint, command = "to use another account, run", session.client.sign_in_command
    if source == "api" and response.status == 403:
        # `auth` would keep the key, because it is valid. It just isn't allowed to list models.
        hint, command = "to use your plan's models, run", "models --source codex"
    elif source == "api":
        hint = "to get a new API key, run"
    elif "invalid_authorization_context" in response.code:
        # With this code, OpenAI refuses an official sign-in's token until there is a new sign-in.
        hint = "to sign in again, run"
    return RefusedError(str(error), hint, command)


def _models_response(session: Session, source: str) -> Response:
    """Request the models of `source`.

    A 401 for an API key doesn't trigger a refresh, because the tokens weren't used.
    """
    tokens = session.tokens()
    if not session.client.can_use_plan(tokens.fields):
        raise plan_not_allowed_error()
    if source != "api":
        return session.request(
            LIST_MODELS, lambda valid: request_models(session.settings, source, valid)
        )
    if not tokens.api_key:
        raise no_api_key_error()
    return request_models(session.settings, source, tokens)


def is_shut_down(listed: Fields) -> bool:
    """Whether a model's `shutdown_date` (YYYY-MM-DD) has passed everywhere on earth."""
    date = str(listed.get("shutdown_date"))
    # The day ends twelve hours later in the westernmost time zone than in UTC.
    today = timestamp(time.time() - 43200)[:10]
    return re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", date) is not None and date < today


def is_ours(session: Session, name: str, entry: object) -> bool:
    """Whether this program wrote an entry of the models file for this sign-in."""
    if not isinstance(entry, dict) or entry.get("oauth_source") != OAUTH_SOURCE:
        return False
    if not name.startswith(session.settings.prefix):
        return False
    if entry.get("account", "") != session.settings.account:
        return False
    # Only entries of the official sign-in have its type.
    is_official_entry = entry.get("type") == OfficialClient.model_type
    is_official_session = session.client.is_official
    return is_official_entry == is_official_session


def registered_entries(*sessions: Session) -> Dict[str, Fields]:
    """Return the entries of `sessions` in the models file, one sign-in after the other.

    Raises StorageError.
    """
    entries = sessions[0].models_file.read()
    return {
        name: entry
        for session in sessions
        for name, entry in entries.items()
        if is_ours(session, name, entry)
    }


def register_models(session: Session, entries: Dict[str, Fields]) -> List[str]:
    """Replace this sign-in's entries in the models file by `entries` and return their names.

    An entry with the same name that another program or the other sign-in wrote stays, with a
    warning, and its name isn't returned. Raises StorageError.
    """
    with session.models_file.lock():
        before = session.models_file.read()
        after = {k: v for k, v in before.items() if not is_ours(session, k, v)}
        taken = sorted(name for name in entries if name in after)
        for name in taken:
            session.notify("warning", f"kept the entry {name}, which another program added")
        ours = {name: entry for name, entry in entries.items() if name not in taken}
        after.update(ours)
        # Lists are compared because the order of the entries counts, too.
        if list(after.items()) != list(before.items()):
            session.models_file.save(after)
        return list(ours)


def use_chat_completions(session: Session) -> None:
    """Change this sign-in's entries of RESPONSES_TYPE to CHAT_TYPE.

    The plugin calls this in a release of Code Puppy that has only CHAT_TYPE. Such a release would
    silently use another model instead. Raises StorageError or UnavailableError.
    """
    entries = registered_entries(session)
    if not any(entry.get("type") == RESPONSES_TYPE for entry in entries.values()):
        return
    # Code Puppy's start waits for this.
    with session.models_file.lock(BRIEF_LOCK_TIMEOUT):
        entries = session.models_file.read()
        for name, entry in entries.items():
            if is_ours(session, name, entry) and entry.get("type") == RESPONSES_TYPE:
                entry["type"] = CHAT_TYPE
        session.models_file.save(entries)


def model_entry(settings: Settings, source: str, model: str, listed: Fields) -> Fields:
    """Return Code Puppy's entry for `model`. `listed` is the server's description of it."""
    if source == "api":
        entry = _api_entry(settings, model)
    else:
        entry = _plan_entry(settings, source, model, listed)
    return {**entry, "account": settings.account} if settings.account else entry


def _api_entry(settings: Settings, model: str) -> Fields:
    # Not the type `openai`: Code Puppy would ignore the URL of such an entry (model_factory.py).
    uses_chat = matches_any(model, settings.chat_patterns.split(","))
    return {
        "type": CHAT_TYPE if uses_chat else RESPONSES_TYPE,
        "name": model,
        "custom_endpoint": {
            "url": base_url(settings, "api"),
            "api_key": "$" + settings.api_key_env_var,
        },
        "context_length": settings.default_context_length or API_CONTEXT_LENGTH,
        "oauth_source": OAUTH_SOURCE,
    }


def _plan_entry(settings: Settings, source: str, model: str, listed: Fields) -> Fields:
    entry: Fields = {
        "type": (Client if source == "codex" else OfficialClient).model_type,
        "name": model,
        "custom_endpoint": {"url": base_url(settings, source)},
        "context_length": _context_length(settings, listed),
        "oauth_source": OAUTH_SOURCE,
        "supported_settings": ["reasoning_effort", "summary", "verbosity"],
    }
    efforts = _efforts(listed.get("supported_reasoning_levels"))
    if efforts:
        entry["setting_choices"] = {"reasoning_effort": efforts}
    if listed.get("default_reasoning_level") in efforts:
        entry["setting_defaults"] = {"reasoning_effort": listed["default_reasoning_level"]}
    # Code Puppy hides these two levels unless the entry has a flag for them.
    for effort in ("xhigh", "max"):
        if effort in efforts:
            entry[f"supports_{effort}_reasoning"] = True
    return entry


def _efforts(levels: object) -> List[str]:
    """Return the effort levels in a catalog entry that Code Puppy knows, weakest first."""
    if not isinstance(levels, list):
        return []
    named = [level.get("effort") for level in levels if isinstance(level, dict)]
    return [effort for effort in EFFORTS if effort in named]


def _context_length(settings: Settings, listed: Fields) -> int:
    """Return a plan model's context length in tokens.

    The Codex backend lists the whole window and the percentage of it that is effective.
    """
    percent = number_or_none(listed.get("effective_context_window_percent")) or 0
    # If the percentage is missing or invalid, use the Codex CLI's default.
    if not 0 < percent <= 100:
        percent = 95
    for name in ("context_window", "max_context_window"):
        length = int((number_or_none(listed.get(name)) or 0) * percent / 100)
        if MIN_CONTEXT_LENGTH <= length <= MAX_CONTEXT_LENGTH:
            return length
    return settings.default_context_length or PLAN_CONTEXT_LENGTH


def import_models(
    session: Session, models: ModelFilter, dry_run: bool = False
) -> Tuple[str, List[str]]:
    """Register the models that match the filter. Return their source and the entries' names.

    `dry_run` changes nothing. Raises OAuthError, also if patterns were given and none matches.
    """
    settings = session.settings
    source_session, source = resolve_source(session, models.source)
    tokens_before = source_session.tokens()
    listed = list_models(source_session, source)
    # list_models may have refreshed the access token, which same_account below compares if there is
    # no account ID.
    tokens = source_session.used_tokens or tokens_before
    prefix = settings.prefix + source_session.client.model_prefix
    entries = {
        prefix + name: model_entry(settings, source, name, described)
        for name, described in listed.items()
        if models.matches(name)
    }
    if not entries:
        error = OAuthError(
            f"none of the account's {len(listed)} models match the filter",
            "to see them all, run",
            f"models --source {source} --all --dry-run",
        )
        # Patterns that the person gave must match something. Those in the settings need not.
        if models.is_explicit:
            raise error
        report_error(session.notify, error, "warning")
    if dry_run:
        return source, list(entries)
    # The token file's lock keeps other processes from signing in or out until the entries of this
    # account are written.
    with source_session.token_file.lock():
        if not tokens.same_account(source_session.tokens()):
            raise OAuthError("another account has signed in meanwhile", "try again")
        session.imported = register_models(source_session, entries)
    payment = "covered by your ChatGPT plan"
    if source == "api":
        payment = "billed to your OpenAI API account"
    count = f"{len(session.imported)} of {len(listed)}"
    session.notify("done", f"Imported {count} models for Code Puppy ({payment})")
    return source, session.imported


def fetch_chatgpt_models(*, source: str = "auto", account: Optional[str] = None) -> List[str]:
    """Return the IDs of all models of the account, unfiltered.

    `source` is "api" (the models that the API key pays for), "codex" (those that the ChatGPT plan
    pays for), "official" (the plan's, through the official sign-in) or "auto" ("api" if there is
    a key, otherwise the plan). Raises OAuthError.
    """
    with module_session(account) as session:
        source = RULES["model_source"].check("source", source)
        source_session, source = resolve_source(session, source)
        return list(list_models(source_session, source))


# ---------------------------------------------------------------------------------------------
# Sign-in: browser, paste and device code
# ---------------------------------------------------------------------------------------------
# Each way of signing in ends in exchange_and_store and then complete_sign_in. The old sign-in stays
# until the new tokens are stored, and room for them is reserved before the code is spent. After
# they are stored, a failure is a warning. Tokens that can't be stored are revoked, unless that
# could end the old sign-in.

# A real user code has about nine characters. This keeps a broken one from flooding the screen.
USER_CODE_LIMIT = 64  # characters
# The remaining time is shown when it reaches one of these. Screen readers read every change aloud,
# so it isn't shown every second.
TIME_LEFT_MARKS = (90, 60, 30, 10)  # seconds
# The shortest --timeout to suggest after a sign-in has timed out: twice the default.
LONGER_TIMEOUT = 240.0  # seconds
# After this many lines that aren't the URL, no more are read, unless they come from a terminal. The
# input could be the output of `yes`.
PASTE_LIMIT = 20
# The longest pasted line. An authorization response is shorter.
LINE_LIMIT = 8192  # bytes
# A plan with one of these words in its name belongs to a workspace, not to a single person. The
# newest Enterprise plan is called `ent26`.
WORKSPACE_PLANS = ("team", "business", "enterprise", "ent26", "edu")
# The command that shows which program listens on a port, by sys.platform. All systems that aren't
# listed use Linux's.
PORT_OWNERS = {
    "win32": "netstat -ano | findstr :{0}",
    "darwin": "lsof -nP -iTCP:{0} -sTCP:LISTEN",
    "linux": "ss -ltnp 'sport = :{0}'",
}
# The command that shows which ports the system keeps from ordinary programs. Hyper-V reserves whole
# ranges of them on Windows, and Linux keeps the ports below 1024 for root.
RESERVED_PORTS = {
    "win32": "netsh interface ipv4 show excludedportrange protocol=tcp",
    "linux": "sysctl net.ipv4.ip_unprivileged_port_start",
}


def prepare_sign_in(session: Session) -> None:
    """Check that tokens can be stored, and say whose sign-in the new one will replace.

    Raises StorageError or UnavailableError before the browser opens.
    """
    stored: Fields = {}
    # A broken file is reported later, by exchange_and_store. The registration is what identifies
    # this installation to OpenAI: see OfficialClient.
    with contextlib.suppress(StorageError):
        move_registration(session)
        stored = session.token_file.read()
    with session.token_file.lock():
        session.token_file.reserve({})
    if session.client.is_official:
        session.client.resume(session.registration_file.read(), stored)
        store_registration(session)
    # Without a sign-in that works, there is nothing to replace.
    with contextlib.suppress(NotSignedInError, SignInEndedError, StorageError):
        tokens = session.tokens()
        # The access token of a sign-in that has ended may still seem to be valid.
        if "ended" in tokens.fields or not tokens.valid_for(0):
            session.require_refreshable(tokens)
        who = identity(tokens)["email"] or "an unknown account"
        session.notify("info", f"You are signed in as {who}. A new sign-in replaces it.")


def move_registration(session: Session) -> None:
    """Move the registration, which earlier versions stored in the token file, to its own file.

    After a sign-out, such a token file holds no tokens. Raises StorageError.
    """
    token_file, file = session.token_file, session.registration_file
    if not session.client.is_official or "host_id" not in token_file.read():
        return
    with token_file.lock(), file.lock():
        # A file that was left by a sign-out has no issuer.
        stored = {"issuer": session.settings.issuer, **token_file.read()}
        names = ("host_id", "client_id", "sub", "issuer")
        file.save({name: stored[name] for name in names if text_or_none(stored.get(name))})
        stored.pop("host_id", None)
        if stored.get("access_token"):
            token_file.save(stored)
        else:
            token_file.remove()


def store_registration(session: Session, subject: Optional[str] = None) -> None:
    """Store the client's registration, and the account (`sub`) if it is known now.

    Raises StorageError or UnavailableError.
    """
    if not session.client.is_official:
        return
    fields = session.client.registration()
    if subject:
        fields["sub"] = subject
    with session.registration_file.lock():
        if session.registration_file.read() != fields:
            session.registration_file.save(fields)


def exchange_and_store(
    session: Session, code: str, verifier: str, redirect_uri: str, nonce: str = ""
) -> Optional[Tokens]:
    """Exchange the authorization code, store the tokens, and return the previous tokens.

    A broken token file is moved aside. If the account is the same as before, its API key stays
    until `obtain_api_key` has checked it. Raises OAuthError, also if the sign-in belongs to a
    workspace other than the one in the settings.
    """
    with session.token_file.lock():
        retry = Retry(session.settings.retry_window, session.notify)
        while True:
            try:
                old = run_task(session, exchange_once, code, verifier, redirect_uri, nonce)
                return Tokens(old) if old else None
            except RequestError as error:
                retry.wait(error)
            except KeyboardInterrupt:
                # The code may have been exchanged already.
                session.notify(
                    "warning",
                    "you may be signed in anyway; to sign out, run",
                    session.client.sign_out_command,
                )
                raise


def exchange_once(
    session: Session, code: str, verifier: str, redirect_uri: str, nonce: str
) -> Optional[Fields]:
    """Exchange the code, store the tokens and return the old fields.

    `run_task` runs this, in a process of its own if possible.
    """
    old = None
    try:
        old = session.token_file.load()
    except StorageError as error:
        broken_copy = session.token_file.set_aside()
        session.notify("warning", f"{error}; moved to {broken_copy}")
    session.token_file.reserve(old.fields if old else {})
    response = exchange_code(session.client, code, verifier, redirect_uri)
    _store_sign_in(session, response, old, nonce)
    return old.fields if old else None


def _store_sign_in(session: Session, response: Fields, old: Optional[Tokens], nonce: str) -> None:
    """Store the tokens in `response`. If they can't be stored, revoke them and raise OAuthError."""
    client = session.client
    origin = {"issuer": session.settings.issuer, "client_id": client.client_id}
    tokens = Tokens(merged(origin, response))
    try:
        # If the ID token is invalid, this raises an error, and the tokens above are revoked.
        tokens = Tokens({**tokens.fields, **client.sign_in_fields(response, nonce)})
        if client.workspace and tokens.account_id != client.workspace:
            raise OAuthError(
                f"signed in to the wrong workspace, {tokens.account_id or 'unknown'}",
                f"choose {client.workspace} in the browser; to try again, run",
                client.sign_in_command,
            )
        session.token_file.save(_fields_to_store(tokens, old))
    except NotReplacedError:
        # The tokens are on disk. The next process puts them into place.
        raise
    except OAuthError:
        # An old sign-in with the same client may belong to the same grant as the new tokens, and
        # revoking one of them could end all of it.
        is_same_client = old and (old.issuer, old.client_id) == (tokens.issuer, tokens.client_id)
        if not is_same_client:
            revoke_or_warn(session, tokens)
        raise
    warn_about_invalid_members(response, session.notify)


def _fields_to_store(tokens: Tokens, old: Optional[Tokens]) -> Fields:
    """Return the members to store for a new sign-in.

    Members of the `old` one that don't describe its tokens are kept if the account is the same.
    """
    fields = dict(tokens.fields)
    if tokens.account_id:
        fields["account_id"] = tokens.account_id
    if not (old and tokens.same_account(old)):
        return fields
    replaced = (*SECRET_KEYS, "expires_at", "ended")
    kept = {name: value for name, value in old.fields.items() if name not in replaced}
    # All members of a workspace have the same account ID, but each one has their own API key.
    before, now = identity(old)["email"], identity(tokens)["email"]
    is_other_person = before and now and before != now
    if old.api_key and not is_other_person:
        kept["api_key"] = old.api_key
    return {**kept, **fields}


def complete_sign_in(session: Session, models: ModelFilter, old: Optional[Tokens]) -> None:
    """Finish a sign-in whose tokens are stored: get the API key and import the models.

    Revokes the `old` sign-in if it belongs to another account. Failures are warnings, except that
    it raises OAuthError if an official sign-in isn't allowed to use the plan.
    """
    client = session.client
    tokens = session.accept_new_tokens(session.tokens())
    with errors_as_warnings(session):
        store_registration(session, text_or_none(tokens.fields.get("sub")))
    email = identity(tokens)["email"]
    name = f" as {email}" if email else ""
    session.notify("done", f"Signed in{name}{workspace_label(tokens)}")
    plan_allowed = client.can_use_plan(tokens.fields)
    if not client.is_official:
        with errors_as_warnings(session):
            obtain_api_key(session)
    with errors_as_warnings(session):
        if plan_allowed:
            import_models(session, models)
        else:
            # Entries of an earlier sign-in can no longer be used.
            register_models(session, {})
    if old and can_revoke_previous(old, tokens):
        who = identity(old)["email"] or "the previous account"
        session.notify("info", f"Signed out of {who}")
        revoke_or_warn(session, old)
    session.notify("info", f"Tokens saved in {session.token_file.path}")
    if not plan_allowed:
        raise plan_not_allowed_error()
    if client.is_official:
        text = f"Using ChatGPT plan. To see or limit what it pays for: {USAGE_PAGE}"
        session.notify("info", text)


@contextlib.contextmanager
def errors_as_warnings(session: Session) -> Iterator[None]:
    """Report an OAuthError in the block as a warning and go on after the block."""
    try:
        yield
    except OAuthError as error:
        report_error(session.notify, error, "warning")


def can_revoke_previous(old: Tokens, new: Tokens) -> bool:
    """Whether the `old` refresh token can be revoked without ending the `new` sign-in.

    Two tokens of one account may belong to one grant, and RFC 7009 §2.1 allows the server to end
    all of it. So the accounts must be known to differ.
    """
    if not old.refresh_token or old.refresh_token == new.refresh_token:
        return False
    if not old.account_key or not new.account_key:
        return False
    return old.account_key != new.account_key


def revoke_or_warn(session: Session, tokens: Tokens) -> None:
    """Revoke `tokens`, with a second try if the server can't be reached. A failure is a warning."""
    try:
        try:
            revoke(session.client, tokens)
        except RequestError:
            time.sleep(RETRY_PAUSE)
            revoke(session.client, tokens)
    except OAuthError as error:
        session.notify("warning", str(error))
        session.notify("info", "The token may still be valid at OpenAI.")
        if session.client.is_official:
            place = "Settings > Security and login > Sign in with ChatGPT"
            session.notify("hint", f"end it in ChatGPT: {place}")


def obtain_api_key(session: Session) -> None:
    """Keep the stored API key if the API accepts it, otherwise exchange the ID token for one.

    A refused key is removed. An account without an organization has no key, which is not an error.
    Raises OAuthError if the exchange fails.
    """
    tokens = session.tokens()
    if tokens.api_key and not is_api_key_refused(session.settings, tokens):
        session.notify("done", "API key available (unchanged)")
        return
    api_key: Optional[str] = None
    failure: Optional[OAuthError] = None
    try:
        api_key = exchange_id_token(session.settings, tokens.id_token or "")
    except UnavailableError as error:
        # The network or the server failed, so the account may have a key.
        failure = OAuthError(str(error), "to try again, run", session.client.sign_in_command)
    except OAuthError as error:
        failure = no_api_key_error(str(error))
    with session.token_file.lock():
        current = session.tokens()
        # The key belongs to the person in the ID token. Another process may have signed in somebody
        # else meanwhile, perhaps in the same workspace.
        if current.id_token != tokens.id_token:
            text = "another process changed the stored tokens; the API key was not stored"
            raise OAuthError(text, "to try again, run", session.client.sign_in_command)
        fields = without(current.fields, "api_key")
        if api_key:
            fields["api_key"] = api_key
        session.token_file.save(fields)
    if failure:
        raise failure
    if api_key:
        session.notify("done", "API key available")
    else:
        text = "No API key (this account has no organization). A plan's models don't need one."
        session.notify("info", text)


def is_api_key_refused(settings: Settings, tokens: Tokens) -> bool:
    """Whether the API refuses the stored key. Return False if the API can't be reached."""
    try:
        return request_models(settings, "api", tokens).is_unauthorized
    except OAuthError:
        return False


def identity(tokens: Tokens) -> Dict[str, Optional[str]]:
    """Return `email`, `plan` and `organization_id` from the tokens' claims, None if unknown."""
    auth = tokens.auth_claims()
    email = text_or_none(decode_claims(tokens.id_token).get("email"))
    if not email:
        # OpenAI's access tokens have the email address in a claim named `profile`.
        email = text_or_none(auth_claims(tokens.access_token, "profile").get("email"))
    organization = auth.get("organization_id") or _organization(auth).get("id")
    return {
        "email": email,
        "plan": text_or_none(auth.get("chatgpt_plan_type")),
        "organization_id": text_or_none(organization),
    }


def _organization(auth: Fields) -> Fields:
    """Return the default organization in the claims, otherwise the first one, otherwise {}."""
    listed = auth.get("organizations")
    if not isinstance(listed, list):
        return {}
    known: List[Fields] = [entry for entry in listed if isinstance(entry, dict)]
    defaults = [entry for entry in known if entry.get("is_default") is True]
    return next(iter(defaults + known), {})


def workspace_label(tokens: Tokens) -> str:
    """Return the workspace of a sign-in as " (workspace ...)", or "" for a personal account."""
    auth = tokens.auth_claims()
    plan = str(auth.get("chatgpt_plan_type"))
    if not tokens.account_id or not any(word in plan for word in WORKSPACE_PLANS):
        return ""
    title = text_or_none(_organization(auth).get("title"))
    name = f"{title}, {tokens.account_id}" if title else tokens.account_id
    return f" (workspace {name})"


def is_terminal(descriptor: int) -> bool:
    # Windows' isatty is also true for NUL, which isn't a console.
    return os.isatty(descriptor) and is_console(descriptor)


def is_console(descriptor: int, bits: int = 0) -> bool:
    """Whether `descriptor` is a Windows console. On other systems, this is always true.

    If there are `bits`, they are also set in the console's mode. The result is false if that fails.
    """
    if sys.platform != "win32":
        return True
    import ctypes
    import msvcrt

    kernel, mode = ctypes.WinDLL("kernel32"), ctypes.c_ulong()
    handle = ctypes.c_void_p(msvcrt.get_osfhandle(descriptor))
    if not kernel.GetConsoleMode(handle, ctypes.byref(mode)):
        return False
    return not bits or bool(kernel.SetConsoleMode(handle, mode.value | bits))


class PastedInput:
    """A reader that fetches one line of standard input at a time, in a thread.

    If the program itself was read from standard input, as in `curl ... | python3 - auth`, it reads
    from the process's terminal instead.

    `usable` is true if a line can arrive, and `at_terminal` if a person types there. Both are false
    unless `reading`. The thread is necessary because a Windows console has no other way to wait.
    Nothing is read beyond the requested line, so the rest is left for the next program.
    """

    line: AnyFuture

    def __init__(self, reading: bool) -> None:
        self.usable = self.at_terminal = False
        # Standard input may be closed, or an object without a descriptor.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            self.descriptor = sys.stdin.fileno()
            # sys.argv[0] is "-" in `python3 -`, and "" in `python3 < chatgpt_oauth.py`.
            holds_program = __name__ == "__main__" and sys.argv[0] in ("-", "")
            if holds_program and not is_terminal(self.descriptor):
                terminal = "CONIN$" if sys.platform == "win32" else "/dev/tty"
                self.descriptor = os.open(terminal, os.O_RDONLY)
            if reading and is_terminal(self.descriptor):
                # The system stops a background job that reads from its terminal.
                self.usable = self.at_terminal = self._is_in_foreground()
            elif reading:
                # A character device that isn't a terminal, such as /dev/null, has no lines to read.
                self.usable = not stat.S_ISCHR(os.fstat(self.descriptor).st_mode)
        self.ask()

    def _is_in_foreground(self) -> bool:
        if sys.platform == "win32":
            return True
        try:
            return os.tcgetpgrp(self.descriptor) == os.getpgrp()
        except OSError:
            # A terminal that doesn't control this process can't stop it.
            return True

    def ask(self) -> None:
        """Start to read the next `line`, a future whose result is "" at the end of the input."""
        import threading
        from concurrent.futures import Future

        self.line = Future()
        if self.usable:
            threading.Thread(target=self._read, args=(self.line,), daemon=True).start()

    def close(self) -> None:
        self.usable = self.at_terminal = False
        self.line.cancel()

    def _read(self, line: AnyFuture) -> None:
        text = bytearray()
        # A Windows console accepts no more characters than the read asks for, or 254 if it asks for
        # fewer. It returns only one line at a time.
        size = LINE_LIMIT if sys.platform == "win32" and self.at_terminal else 1
        # A terminal that has disappeared counts as the end of the input.
        with contextlib.suppress(OSError):
            while len(text) < LINE_LIMIT and not text.endswith(b"\n"):
                is_ready = self._wait_for_input()
                if line.cancelled():
                    return
                if not is_ready:
                    continue
                data = os.read(self.descriptor, size)
                if not data:
                    break
                text += data
        # From here on, close() can't cancel the future, so setting the result can't fail.
        if line.set_running_or_notify_cancel():
            line.set_result(text.decode("utf-8", "replace"))

    def _wait_for_input(self) -> bool:
        """Wait up to 0.1 seconds for input, and return whether there is any.

        On Windows, select works only with sockets, so this returns True at once.
        """
        import select

        if sys.platform == "win32":
            return True
        ready, _, _ = select.select([self.descriptor], [], [], 0.1)
        return bool(ready)


class Countdown:
    """A report of the time that is left until time.monotonic() reaches `deadline`."""

    def __init__(self, notify: Notify, deadline: float) -> None:
        self.notify, self.deadline = notify, deadline
        self.seconds = self._seconds_left()

    def _seconds_left(self) -> int:
        import math

        return math.ceil(self.deadline - time.monotonic())

    def update(self) -> float:
        """Report the time if it has reached a mark, and return the seconds until the next update.

        The result is 0 after the deadline.
        """
        before, self.seconds = self.seconds, self._seconds_left()
        if any(self.seconds <= mark < before for mark in TIME_LEFT_MARKS) and self.seconds > 0:
            self.notify("info", f"{self.seconds} seconds left")
        return max(0.0, min(1.0, self.deadline - time.monotonic()))


class BrowserSignIn:
    """The authorization code flow through the loopback redirect or a pasted URL (RFC 8252 §7.3).

    `timeout` is in seconds, `callback_timeout` by default. `browser` is whether to open a browser,
    and `reading` whether a URL can be pasted into standard input. `at_prompt` is whether this is
    Code Puppy's prompt, where people may keep typing commands.
    """

    def __init__(
        self,
        session: Session,
        models: ModelFilter,
        timeout: Optional[float],
        browser: bool,
        reading: bool = False,
        at_prompt: bool = False,
    ) -> None:
        from concurrent.futures import Future

        self.session, self.models, self.browser = session, models, browser
        self.timeout = timeout or session.settings.callback_timeout
        # This imports ssl before any thread starts. In Python 3.8, two threads that import from a
        # zip file at the same time break each other's import.
        tls_context(session.settings)
        # A proxy that can't be used must be reported before the person signs in.
        new_connection(session.settings, session.settings.issuer, session.settings.request_timeout)
        self.stdin = PastedInput(reading)
        self.at_prompt = at_prompt
        self.paste_note = " and press Enter (it does not show while you paste)" if at_prompt else ""
        self.pastes_left = PASTE_LIMIT
        # The last lines that were pasted. Together they may be one URL.
        self.pasted = ""
        # If the command that opens the browser fails, this gets an explanation.
        self.browser_failure: AnyFuture = Future()

    def run(self) -> None:
        """Sign in. Raises OAuthError, also when the time is up."""
        try:
            self._sign_in()
        finally:
            self.stdin.close()

    def _sign_in(self) -> None:
        client, notify = self.session.client, self.session.notify
        servers: List[Any] = []
        try:
            port, servers = open_port(client)
        except OAuthError as error:
            # Without a listener, the URL that the browser ends on can still be pasted.
            if not self.stdin.usable:
                raise
            notify("warning", str(error))
            # The redirect URI needs a port even without a listener. A client that accepts any port
            # (0) gets the Codex CLI's.
            port = client.ports[0] or client.settings.required_port
        if servers and client.settings.callback_bind:
            self._warn_of_bind(port)
        request = AuthorizationRequest(client, port)
        callback = Callback(request, servers, can_paste=self.stdin.usable)
        try:
            deadline = time.monotonic() + self.timeout
            self._show_url(callback)
            with self._echo_off():
                self._await_response(callback, deadline)
            # Everything that is typed from now on is for the next program.
            self.stdin.close()
            redeem(self.session, self.models, callback)
        finally:
            callback.close()

    def _show_url(self, callback: Callback) -> None:
        notify, url = self.session.notify, callback.request.url
        obstacle: Optional[str] = None
        if self.browser:
            obstacle = open_browser(self.session, url, self.browser_failure)
        is_opening = self.browser and not obstacle
        lead = "Opening your browser. If nothing opens, visit" if is_opening else "To sign in, open"
        notify("info", f"{lead} this URL within {self.timeout:g} seconds:")
        notify("verbatim", url)
        if obstacle:
            notify("info", f"No browser was opened ({obstacle}).")
            notify("info", "Use a browser on any machine:")
        if not is_opening or not callback.servers:
            self._show_ways(callback)
        elif self.stdin.at_terminal:
            page = "If the browser ends on an error page, paste that page's URL here"
            notify("info", f"{page}{self.paste_note}.")
        if self.stdin.at_terminal:
            notify("info", "Waiting for you to sign in... (Ctrl-C to cancel)")

    def _show_ways(self, callback: Callback) -> None:
        """Explain how to sign in when the browser runs on another machine."""
        notify, client, port = self.session.notify, self.session.client, callback.request.port
        in_container = is_in_container()
        if self.stdin.usable:
            page = "- If the browser ends on a page that does not load, paste its URL here"
            notify("info", f"{page}{self.paste_note}.")
        # Forwarding with SSH doesn't lead into a container, but a published port does.
        if callback.servers and not in_container:
            lead = "- Or forward" if self.stdin.usable else "- Forward"
            notify("info", f"{lead} the port first. On the machine with the browser, run:")
            notify("info", f"    ssh -L {port}:localhost:{port} USER@THIS-MACHINE")
        elif callback.servers and client.settings.callback_bind:
            notify("info", f"- Open the URL on the machine that publishes port {port}.")
        if client.device_command:
            notify("info", "- To sign in with a code instead, press Ctrl-C and run:")
            notify("command", client.device_command)
        elif not self.stdin.usable:
            place = "with a terminal (-it)" if in_container else "in a terminal"
            notify("info", f"- To paste the browser's last URL, run this {place}:")
            notify("command", client.sign_in_command)

    def _await_response(self, callback: Callback, deadline: float) -> None:
        """Wait until a browser or a paste brings the response.

        Raises OAuthError when time.monotonic() reaches `deadline`.
        """
        from concurrent.futures import FIRST_COMPLETED, wait

        countdown = Countdown(self.session.notify, deadline)
        # The functions to call when one of these futures is done.
        reports = {
            callback.tls_attempt: self._report_tls,
            self.browser_failure: self._report_browser_failure,
        }
        while not callback.response.done():
            seconds = countdown.update()
            if not seconds:
                raise self._timeout_error()
            wait([callback.response, self.stdin.line, *reports], seconds, FIRST_COMPLETED)
            for future, report in list(reports.items()):
                if future.done():
                    del reports[future]
                    report()
            if self.stdin.line.done():
                self._paste(callback, self.stdin.line.result())

    def _report_browser_failure(self) -> None:
        self.session.notify("warning", self.browser_failure.result())
        self.session.notify("hint", "open the URL above in any browser")

    def _report_tls(self) -> None:
        """Explain what to do if the browser uses https for localhost."""
        notify = self.session.notify
        notify("warning", "the browser used https for this sign-in, which needs http")
        if self.stdin.usable:
            notify("hint", f"paste the https URL of its error page here{self.paste_note}")
        else:
            notify("hint", "in its address bar, change https://localhost to http://127.0.0.1")

    def _timeout_error(self) -> OAuthError:
        # Suggest twice as long, but not more than the option allows.
        longer = max(LONGER_TIMEOUT, min(2 * self.timeout, SECONDS_RULE.high))
        return OAuthError(
            f"timed out after {self.timeout:g} seconds waiting for you to sign in",
            "to try again with more time, run",
            f"{self.session.client.sign_in_command} --timeout {longer:g}",
        )

    def _warn_of_bind(self, port: int) -> None:
        address = self.session.settings.callback_bind
        if not is_loopback(f"http://{address}") and address != "::1":
            text = f"other machines may reach this sign-in on {address}, port {port}"
            self.session.notify("warning", text)

    def _paste(self, callback: Callback, line: str) -> None:
        """Use a line of the input as the response, or explain why not and ask for another line.

        `line` is "" at the end of the input. Raises OAuthError if no response can arrive any more.
        """
        # A line without the beginning of a response may continue the line before it.
        if re.search("://|code=|error=", line):
            self.pasted = ""
        self.pasted = (self.pasted + line.strip())[-LINE_LIMIT:]
        try:
            set_once(callback.response, callback.request.parse_pasted(self.pasted))
            return
        except ValueError as error:
            if line:
                self.session.notify("info", self._refusal(line, str(error)))
        if not self.stdin.at_terminal:
            self.pastes_left -= 1
        if not line or not self.pastes_left:
            self.stdin.close()
            if not callback.servers:
                fault = "cannot listen on a port, and standard input is closed"
                raise OAuthError(fault, no_port_hint(self.session.client))
        self.stdin.ask()

    @contextlib.contextmanager
    def _echo_off(self) -> Iterator[None]:
        """At Code Puppy's prompt, hide what is typed, because it would mix with our messages."""
        if sys.platform == "win32" or not (self.at_prompt and self.stdin.at_terminal):
            yield
            return
        import termios
        import tty

        before = termios.tcgetattr(self.stdin.descriptor)
        silent = list(before)
        silent[tty.LFLAG] &= ~termios.ECHO
        termios.tcsetattr(self.stdin.descriptor, termios.TCSADRAIN, silent)
        try:
            yield
        finally:
            termios.tcsetattr(self.stdin.descriptor, termios.TCSADRAIN, before)

    def _refusal(self, line: str, fault: str) -> str:
        """Return what to say about a `line` that isn't the response because of `fault`."""
        if self.stdin.at_terminal and line.startswith("/"):
            return "Still waiting for the sign-in; press Ctrl-C first to use another command."
        if self.stdin.at_terminal and not re.search("=|://", line):
            return (
                "Still waiting for the sign-in; only the URL that the browser ends on helps here."
            )
        return f"That URL does not work: {fault}"


def redeem(session: Session, models: ModelFilter, callback: Callback) -> None:
    """Exchange the code in the response that has arrived at `callback`, and finish the sign-in.

    The browser receives the outcome as soon as the tokens are stored. Raises OAuthError.
    """
    response, request = callback.response.result(), callback.request
    try:
        if request.has_other_issuer(response):
            other = printable(response["iss"], REASON_LIMIT) or "an unnamed issuer"
            raise OAuthError(f"the response came from {other}, not from {request.issuer}")
        if response.get("error"):
            raise authorization_error(response)
        session.client.accept_response(response)
        # If the exchange fails, the next sign-in uses the client ID in this response.
        store_registration(session)
        old = exchange_and_store(
            session, response["code"], request.code_verifier, request.redirect_uri, request.nonce
        )
    except OAuthError as error:
        error.set_default_hint(session.client.sign_in_command)
        callback.outcome.set_exception(error)
        callback.wait_until_shown(FAILURE_PAGE_TIMEOUT)
        raise
    callback.outcome.set_result(None)
    # The browser fetches the success page while the rest is being done.
    deadline = time.monotonic() + SUCCESS_PAGE_TIMEOUT
    try:
        complete_sign_in(session, models, old)
    finally:
        callback.wait_until_shown(deadline - time.monotonic())


def authorization_error(response: Dict[str, str]) -> OAuthError:
    """Return the error that an error response (RFC 6749 §4.1.2.1) stands for."""
    code, description = response["error"], response.get("error_description", "")
    if "missing_codex_entitlement" in description:
        return OAuthError(
            "Codex is not enabled for this workspace",
            "ask your workspace administrator to enable it, or use another workspace",
        )
    reason = f"{code}: {description}" if description else code
    return OAuthError(f"authorization failed ({printable(reason, REASON_LIMIT)})")


def open_port(client: Client) -> Tuple[int, List[Any]]:
    """Return one of the client's ports and the servers on it. Raises OAuthError if none works."""
    faults = []
    for port in client.ports:
        try:
            servers = open_servers(client.addresses, port)
        except OSError as error:
            faults.append(error)
        else:
            # Port 0 is replaced by the one that the system has chosen.
            return servers[0].socket.getsockname()[1], servers
    raise port_error(client, faults[0])


def no_port_hint(client: Client) -> Hint:
    """Return the next step if `client` can't listen on a port."""
    if client.device_command:
        return Hint("to sign in without a port, run", client.device_command)
    text = "to paste the URL that the browser ends on, run in a terminal"
    return Hint(text, client.sign_in_command)


def port_error(client: Client, error: OSError) -> OAuthError:
    import shutil

    hint = no_port_hint(client)
    reason = error.strerror or "error"
    if error.errno == errno.EADDRINUSE:
        explanation, commands = "see", PORT_OWNERS
    elif error.errno == errno.EACCES:
        explanation, commands = "the system reserves them", RESERVED_PORTS
    else:
        fault = f"cannot listen on {' or '.join(client.addresses)} ({reason})"
        return OAuthError(fault, hint)
    ports = " or ".join(str(port) for port in client.ports)
    command = commands.get(sys.platform, commands["linux"]).format(client.ports[0])
    fault = f"cannot listen on port {ports} ({reason})"
    # A container may not have the program.
    if shutil.which(command.split()[0]):
        fault += f"; {explanation}: {command}"
    return OAuthError(fault, hint)


def sign_in_with_device(session: Session, models: ModelFilter, timeout: Optional[float]) -> None:
    """Sign in with the device code flow (RFC 8628), in any browser on any machine.

    `timeout` is in seconds, and the code's lifetime by default. Raises OAuthError.
    """
    notify, client = session.notify, session.client
    try:
        device = request_device_code(session.settings)
    except OAuthError as error:
        error.set_default_hint(client.sign_in_command, "to sign in without a code, run")
        raise
    notify("info", "To sign in, open this page in any browser:")
    notify("verbatim", device.page)
    minutes = int(device.lifetime // 60)
    left = f"{minutes} minutes" if minutes > 1 else "less than 2 minutes"
    notify("info", f"Then enter this one-time code (valid for {left}):")
    notify("verbatim", printable(device.user_code, USER_CODE_LIMIT))
    notify("info", "Beware of phishing: use this code only if you started this sign-in yourself.")
    notify("info", "Waiting for you to enter the code... (Ctrl-C to cancel)")
    deadline = time.monotonic() + min(timeout or device.lifetime, device.lifetime)
    try:
        code, verifier = await_device_code(session, device, deadline)
        old = exchange_and_store(session, code, verifier, device.redirect_uri)
    except OAuthError as error:
        error.set_default_hint(client.device_command)
        # The next attempt needs the options of this one.
        if error.command.startswith("auth"):
            error.command = client.device_command
        raise
    complete_sign_in(session, models, old)


def await_device_code(session: Session, device: DeviceCode, deadline: float) -> Tuple[str, str]:
    """Poll until the person has entered the code, then return the authorization code and verifier.

    Raises OAuthError if the code is refused or time.monotonic() reaches `deadline`.
    """
    countdown = Countdown(session.notify, deadline)
    last_fault = ""
    while True:
        next_poll = time.monotonic() + device.pause
        while time.monotonic() < next_poll:
            seconds = countdown.update()
            if not seconds:
                raise device_code_error()
            time.sleep(max(0.0, min(seconds, next_poll - time.monotonic())))
        try:
            authorization = device.poll()
            if authorization:
                return authorization
        except RequestError as error:
            # A fault that lasts is reported only once.
            if str(error) != last_fault:
                last_fault = str(error)
                session.notify("warning", last_fault)
                session.notify("info", "Still trying...")


def end_sign_in(session: Session, revoking: bool) -> bool:
    """Revoke the sign-in, remove its file and model entries, and return whether there were any.

    A failed revocation is a warning. A broken token file is removed, too. Raises OAuthError after
    everything else is done if the model entries can't be removed.
    """
    token_file = session.token_file
    # This stays true if the file is broken.
    has_file = True
    with contextlib.suppress(StorageError):
        # Reading recovers tokens that a killed process received.
        token_file.read()
        move_registration(session)
        # A sign-in that failed may have left only the broken copy, which may hold tokens.
        has_file = any(map(os.path.lexists, (token_file.path, token_file.broken_copy)))
    if not has_file and not registered_entries(session):
        return False
    with token_file.lock():
        tokens = None
        try:
            tokens = token_file.load()
        except StorageError as error:
            session.notify("warning", f"{error}; removing it anyway")
        if tokens and revoking:
            token_file.require_removable()
            revoke_or_warn(session, tokens)
        models_error: Optional[OAuthError] = None
        try:
            token_file.remove()
        finally:
            # The models are removed even if the token file can't be. In that case, the error about
            # the token file is raised.
            try:
                register_models(session, {})
            except OAuthError as error:
                models_error = error
    email = identity(tokens)["email"] if tokens else None
    owner = f" of {email}" if email else ""
    removed = "" if models_error else "; imported models removed"
    session.notify("done", f"Signed out{owner}{session.client.label}{removed}")
    if tokens and tokens.api_key:
        url = "https://platform.openai.com/api-keys"
        session.notify("info", f"The API key stays valid until you delete it at {url}")
    if models_error:
        raise models_error
    return True


# How long to watch for a failure of the command that opens the browser.
BROWSER_WATCH = 2.0  # seconds
# The arguments with which Python opens a URL. -I keeps it from importing anything from the current
# directory.
PYTHON_OPENER = ("-I", "-c", "import sys, webbrowser; sys.exit(not webbrowser.open(sys.argv[1]))")
_RUNDLL = ("rundll32.exe", "url.dll,FileProtocolHandler")
# The commands that open a URL in the default browser, in the order in which they are tried, by
# sys.platform. All systems that aren't listed use Linux's.
LINUX_OPENERS = (("termux-open-url",), ("xdg-open",), PYTHON_OPENER)
WSL_OPENERS = (("wslview",), _RUNDLL)
URL_OPENERS = {
    "win32": (PYTHON_OPENER, _RUNDLL),
    "darwin": (("open",), PYTHON_OPENER),
    "cygwin": (("cygstart",), PYTHON_OPENER),
}
# These browsers run in the terminal, which `auth` needs, and can't show OpenAI's page.
TEXT_BROWSERS = {"lynx", "w3m", "links", "links2", "elinks", "www-browser", "browsh"}


def open_browser(session: Session, url: str, failure: AnyFuture) -> Optional[str]:
    """Open `url` in the person's browser. Return the reason if that failed, otherwise None.

    If the command exits with an error soon after its start, `failure` gets an explanation.
    """
    import subprocess
    import threading

    command, obstacle = browser_command(session.settings.environ, url)
    if not command:
        return obstacle
    try:
        process = subprocess.Popen(  # noqa: S603 - a list of arguments, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=browser_environ(session),
            start_new_session=True,
        )
    except OSError as error:
        return f"it could not be started: {error.strerror}"

    def watch() -> None:
        try:
            code = process.wait(BROWSER_WATCH)
        except subprocess.TimeoutExpired:
            # The command is the browser itself, or has one open. Without a wait, it would become a
            # zombie process at its end.
            process.wait()
            return
        if code:
            name = os.path.basename(command[0])
            failure.set_result(f"the browser did not open ({name}: exit code {code})")

    threading.Thread(target=watch, daemon=True).start()
    return None


def browser_environ(session: Session) -> Dict[str, str]:
    """Return the environment for a browser. It holds no token or key, under any name."""
    stored: Set[Optional[str]] = set()
    for each in session.sessions_of_all_accounts():
        with contextlib.suppress(OAuthError):
            tokens = each.tokens()
            stored.update(getattr(tokens, key) for key in SECRET_KEYS)
    # Without TERM, `webbrowser` doesn't start a text browser.
    left_out = ("TERM", session.settings.api_key_env_var)
    return {
        name: value
        for name, value in session.settings.environ.items()
        if name not in left_out and not name.startswith("CHATGPT_OAUTH_") and value not in stored
    }


def browser_command(environ: Dict[str, str], url: str) -> Tuple[List[str], str]:
    """Return a command that opens `url` here, or an empty one and the reason for that."""
    import shutil

    path = environ.get("PATH")
    if environ.get("BROWSER", "").strip():
        return chosen_browser(environ["BROWSER"], url, path)
    openers = URL_OPENERS.get(sys.platform, LINUX_OPENERS)
    has_display = environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY")
    # Termux opens URLs in Android's browser, so it needs no display.
    is_termux = shutil.which("termux-open-url", path=path) is not None
    if "WSL_DISTRO_NAME" in environ or "WSL_INTEROP" in environ:
        openers = WSL_OPENERS
    elif "SSH_CONNECTION" in environ or "SSH_TTY" in environ:
        return [], "this is an SSH session"
    elif sys.platform not in URL_OPENERS and not has_display and not is_termux:
        return [], "this is a container" if is_in_container() else "there is no display"
    for opener in openers:
        if opener == PYTHON_OPENER:
            python = own_python()
            if python:
                return [python, *opener, url], ""
        elif shutil.which(opener[0], path=path):
            return [*opener, url], ""
    return [], "no program that opens URLs was found"


def chosen_browser(value: str, url: str, path: Optional[str]) -> Tuple[List[str], str]:
    """Return what browser_command returns if the environment variable BROWSER is `value`.

    It is a command line in which %s stands for the URL. Without a %s, the URL is appended. An older
    convention is a list of such command lines, separated like the directories of PATH.
    """
    import shlex
    import shutil

    # The whole value is tried first, because a single command line may contain the separator.
    for line in (value, *value.split(os.pathsep)):
        try:
            words = shlex.split(line, posix=sys.platform != "win32")
        except ValueError:
            # A quotation mark is missing.
            continue
        if sys.platform == "win32":
            # In this mode, shlex leaves backslashes alone, but keeps the quotation marks.
            words = [word.strip("\"'") for word in words]
        if words[-1:] == ["&"]:
            words.pop()
        if not words:
            continue
        if os.path.basename(words[0]) in TEXT_BROWSERS:
            return [], "OpenAI's page needs a graphical browser"
        program = shutil.which(words[0], path=path)
        if program:
            arguments = words[1:] if "%s" in line else [*words[1:], "%s"]
            return [program, *(word.replace("%s", url) for word in arguments)], ""
    return [], f"BROWSER names no program that is installed: {value}"


def is_in_container() -> bool:
    """Whether this looks like a container of Docker or Podman."""
    return os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")


# ---------------------------------------------------------------------------------------------
# Shells: the statements that set and unset variables in each shell
# ---------------------------------------------------------------------------------------------
# This room turns names and values into code for a shell and prints nothing. One row of SHELLS
# holds everything that differs between shells, except how they quote (`shell_quote`). Only tokens,
# keys and identifiers are ever put between a row's quotes, so no value can break out of them.


class Shell:
    """The syntax of a family of shells.

    `names` maps the name of each shell of the family to the path of its profile, or to "" if it has
    none. The other texts are templates for str.format:

    - `assign` sets the variable {name} to {value}, `unset` unsets the variable {name}, and
      `separator` stands between two such statements.
    - `profile` is the line for the profile that sets the API key. It evaluates the output of
      {command}. For shells that `env` has no code for (`has_env_code` is false), it calls {program}
      with {options}, which select the account, and sets {variable} itself.
    - `search` adds a directory to the search path. {path} is in quotes if it needs them, {quoted}
      always is.
    - `call` isn't a template. It stands before a quoted command.
    """

    def __init__(
        self,
        names: Dict[str, str],
        profile: str = "",
        search: str = "",
        assign: str = "",
        unset: str = "",
        separator: str = ";\n",
        call: str = "",
        has_env_code: bool = True,
    ) -> None:
        self.names, self.profile, self.search, self.call = names, profile, search, call
        self.assign, self.unset, self.separator = assign, unset, separator
        self.has_env_code = has_env_code


# To support a new shell, add a row here and its way of quoting to `shell_quote`.
SHELLS = {
    "sh": Shell(
        {
            "bash": "~/.bashrc",
            "zsh": "~/.zshrc",
            **dict.fromkeys(("sh", "dash", "ash", "busybox", "yash", "posh"), "~/.profile"),
            **dict.fromkeys(("ksh", "mksh", "lksh", "oksh", "rksh", "rbash"), "~/.profile"),
        },
        profile='eval "$({command})"',
        search='export PATH={path}:"$PATH"',
        assign="export {name}='{value}'",
        unset="unset {name}",
    ),
    "fish": Shell(
        {"fish": "~/.config/fish/config.fish"},
        profile="{command} | source",
        search="fish_add_path {path}",
        assign="set -gx {name} '{value}'",
        unset="set -e {name}",
    ),
    "csh": Shell(
        {"csh": "~/.cshrc", "tcsh": "~/.tcshrc"},
        profile="eval `{command}`",
        search='setenv PATH {path}:"$PATH"',
        assign="setenv {name} '{value}'",
        unset="unsetenv {name}",
    ),
    "powershell": Shell(
        dict.fromkeys(("powershell", "pwsh"), "PowerShell's $PROFILE"),
        # PowerShell passes each line of the output to iex by itself. Many examples join the lines
        # with Out-String, which would pass on an empty string if the command fails. iex rejects it.
        profile="{command} | iex",
        search="$env:PATH = {quoted} + [IO.Path]::PathSeparator + $env:PATH",
        assign="$env:{name} = '{value}'",
        unset="Remove-Item Env:{name} -ErrorAction SilentlyContinue",
        call="& ",
    ),
    "cmd": Shell(
        {"cmd": ""},
        profile="for /f \"delims=\" %i in ('{command}') do @%i",
        assign='set "{name}={value}"',
        unset='set "{name}="',
        separator="\n",
    ),
    "dotenv": Shell({"dotenv": ""}, assign="{name}={value}", unset="{name}=", separator="\n"),
    "json": Shell({"json": ""}),
    # When a command fails, nu and elvish abort the rest of the profile. The `try` keeps the profile
    # running while nobody is signed in.
    "nu": Shell(
        {"nu": "$nu.config-path"},
        profile="try {{ {program} env{options} --shell json | from json | load-env }}",
        search="$env.PATH = ($env.PATH | prepend {path})",
        call="^",
        has_env_code=False,
    ),
    "elvish": Shell(
        {"elvish": "~/.config/elvish/rc.elv"},
        profile="try {{ set-env {variable} ({program} token{options} --api-key) }} catch e {{ }}",
        search="set paths = [{path} $@paths]",
        has_env_code=False,
    ),
    "xonsh": Shell(
        {"xonsh": "~/.xonshrc"},
        profile="${variable} = !({program} token{options} --api-key).out.strip()",
        search="$PATH.insert(0, {quoted})",
        has_env_code=False,
    ),
}
# Text that needs no quotes. The second pattern is the one that shlex.quote uses. Debian's
# python3-minimal doesn't include shlex.
UNQUOTED = r"[\w.:\\/-]+" if sys.platform == "win32" else r"(?a:[\w@%+=:,./-]+)"


def shell_quote(shell: str, text: str) -> str:
    """Return `text` in the quotes of `shell`, which is a key of SHELLS.

    The quoting for sh also works in most other shells. It is used for hints, because nobody knows
    into which shell a hint will be pasted. csh cannot quote a newline, or a backtick inside the
    backticks of its `eval`.
    """
    if shell in ("powershell", "elvish"):
        return "'" + text.replace("'", "''") + "'"
    if shell in ("nu", "xonsh"):
        return json.dumps(text, ensure_ascii=False)
    # An apostrophe is easier to read between double quotes, if nothing else is special in those.
    if "'" in text and not re.search(r'["$`\\!]', text):
        return f'"{text}"'
    if shell == "fish":
        text = text.replace("\\", "\\\\")
    quoted = "'" + text.replace("'", "'\"'\"'") + "'"
    # csh expands the history at a "!" even between quotes.
    if shell == "csh":
        quoted = quoted.replace("!", r"'\!'")
    return quoted


def shell_name(settings: Settings, name: str) -> str:
    """Return the name of a shell without its version. "auto" means the shell in $SHELL."""
    if name == "auto":
        environ = settings.environ
        name = os.path.basename(environ.get("SHELL") or "sh")
        if sys.platform == "win32":
            # Git Bash and MSYS2 set MSYSTEM. They also set SHELL, to a path that ends in .exe.
            name = os.path.splitext(name)[0]
            if not (environ.get("SHELL") or environ.get("MSYSTEM")):
                name = "powershell"
    # Some systems add the version to the name: ksh93, bash-5.2, mksh-R59.
    versioned = re.fullmatch(r"([a-z]+)[0-9.-][0-9A-Za-z.+-]*", name)
    return versioned[1] if versioned else name


def shell_key(name: str) -> Optional[str]:
    """Return the key in SHELLS for the shell `name`, or None if the shell is unknown."""
    for key, shell in SHELLS.items():
        if name in shell.names:
            return key
    return None


def shell_code(key: str, variables: Dict[str, Optional[str]]) -> str:
    """Return code that sets the `variables`, and unsets those whose value is None.

    `key` selects the shell in SHELLS. The values must be tokens or identifiers, because nothing in
    them is escaped.
    """
    if key == "json":
        return json.dumps(variables)
    shell = SHELLS[key]
    statements = []
    for name, value in variables.items():
        if value is None:
            statements.append(shell.unset.format(name=name))
        else:
            statements.append(shell.assign.format(name=name, value=value))
    return shell.separator.join(statements)


def profile_line(key: str, program: str, variable: str, account: str = "") -> str:
    """Return the line for a shell's profile that sets the API key.

    `key` selects the shell in SHELLS. `program` is the text that starts this program there, and
    `variable` is the variable to set.
    """
    options = f" --account {account}" if account else ""
    command = f"{program} env{options} --shell {key}"
    return SHELLS[key].profile.format(
        command=command, program=program, variable=variable, options=options
    )


# ---------------------------------------------------------------------------------------------
# Terminal: messages for a person
# ---------------------------------------------------------------------------------------------
# Messages go to standard error, because standard output holds nothing except a command's result.
# All text from servers and files passes through `printable`, so none of it can steer the terminal.
# Rooms above this one don't print. They call the `notify` function that a command has passed down.

# The name under which `install` installs this program.
COMMAND = "chatgpt-oauth"
# The launcher's file name on POSIX systems and on Windows.
LAUNCHERS = (COMMAND, COMMAND + ".cmd")
# ENABLE_VIRTUAL_TERMINAL_PROCESSING in the mode of a Windows console:
# https://learn.microsoft.com/en-us/windows/console/setconsolemode
ESCAPES = 4
# SGR parameters (ECMA-48 §8.3.117): green, yellow and red.
COLORS = {"done": 32, "warning": 33, "error": 31}
# A URL that can be clicked even if the terminal breaks it into lines (OSC 8):
# https://gist.github.com/egmontkob/eb114294efbcd5adb1944c9f3cb5feda
HYPERLINK = "\033]8;;{0}\033\\{0}\033]8;;\033\\"
# The longest message. An authorization URL, the longest one that is needed, has about 800.
MESSAGE_LIMIT = 5000  # characters


def started_file() -> str:
    """Return the path with which this program was started, or chatgpt_oauth.py if there is none."""
    path = sys.argv[0] if sys.argv else ""
    # If another program has imported this file, the path is that program's. `python3 -c CODE` sets
    # it to "-c".
    return path if path not in ("", "-", "-c") and has_program_file() else "chatgpt_oauth.py"


def program_name(shell: str = "") -> str:
    """Return the words that start this program again, for hints.

    With `shell` (a key of SHELLS), they are quoted for that shell.
    """
    path = started_file()
    name = os.path.basename(path)
    # After -m, a module's name is enough, because Python searches the current directory.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec and spec.name != "__main__" and name not in LAUNCHERS:
        return f"{python_name()} -m {spec.name}"
    if is_in_search_path(path):
        # Git Bash finds a command without its suffix only if that is .exe.
        launcher = name if is_in_git_bash() else COMMAND
        return launcher if name in LAUNCHERS else quote_path(name)
    return start_command(path, shell)


def absolute_program_name(shell: str) -> str:
    """Return the words that start this program in any directory and with any PATH, for a profile.

    They are quoted for `shell`, which is a key of SHELLS.
    """
    return start_command(os.path.abspath(started_file()), shell)


def start_command(path: str, shell: str) -> str:
    """Return the words that start the program at `path` in `shell`."""
    quoted = quote_path(path, shell)
    if os.path.basename(path) not in LAUNCHERS:
        return f"{python_name()} {quoted}"
    # Some shells run a command in quotes only after a call operator.
    if shell and quoted != path:
        return SHELLS[shell].call + quoted
    return quoted


def typed_command(command: str) -> str:
    """Return `command` as a person types it here, with a note if that needs a file first."""
    note = "" if has_program_file() else " (download that file first)"
    return f"{program_name()} {command}{note}"


def has_program_file() -> bool:
    """Whether this program was started from a file and can be started from it again."""
    if __name__ != "__main__":
        return True
    path = sys.argv[0]
    # A pipe, as in `python3 <(curl ...)`, exists but isn't a file. A path into a zip file doesn't
    # exist, but the program can be started from it.
    is_pipe = os.path.exists(path) and not os.path.isfile(path)
    return path not in ("-", "") and not is_pipe


def python_name() -> str:
    """Return the command that starts this Python, for hints."""
    # A person who typed "python3.11" must not be advised to type "python3", which may be an older
    # version. sys.orig_argv exists since Python 3.10. It is empty in a program that embeds Python.
    started = (getattr(sys, "orig_argv", None) or [""])[0]
    if started and not os.path.dirname(started):
        return quote_path(started)
    if sys.platform != "win32":
        return "python3"
    # The installer of python.org adds `python` to PATH only on request, and `py` by default. `py`
    # starts Python by its full path, so sys.orig_argv doesn't tell whether it was used.
    directories = os.environ.get("PATH", "").split(os.pathsep)
    has_py = any(os.path.isfile(os.path.join(each, "py.exe")) for each in directories)
    return "py" if has_py else "python"


def is_in_git_bash() -> bool:
    """Whether this is Windows and the person's shell is probably Git Bash, MSYS2 or Cygwin.

    Those set SHELL to a path with slashes.
    """
    environ = os.environ
    has_marks = bool(environ.get("MSYSTEM")) or "/" in environ.get("SHELL", "")
    return sys.platform == "win32" and has_marks


def is_in_search_path(path: str) -> bool:
    """Whether a person can run the program `path` without typing its directory."""
    for directory in os.environ.get("PATH", "").split(os.pathsep):
        found = os.path.join(directory, os.path.basename(path))
        if os.path.isfile(found) and os.access(found, os.X_OK):
            # Another program of that name may come first.
            with contextlib.suppress(OSError):
                return os.path.samefile(found, path)
    return False


def quote_path(path: str, shell: str = "") -> str:
    """Return `path` as a person types it in `shell`, in quotes if it needs them.

    Without a `shell`, the quoting suits sh or, on Windows, both PowerShell and the command prompt.
    """
    # In other shells, a backslash is an escape character. Windows accepts slashes as well.
    takes_backslashes = shell in ("powershell", "cmd") or not (shell or is_in_git_bash())
    if sys.platform == "win32" and not takes_backslashes:
        path = path.replace("\\", "/")
    if re.fullmatch(UNQUOTED, path):
        return path
    if sys.platform == "win32" and shell != "powershell":
        return f'"{path}"'
    quoted = shell_quote(shell, path)
    # In a xonsh command, @() inserts the value of a Python expression, here a string.
    return f"@({quoted})" if shell == "xonsh" else quoted


def print_result(text: str) -> None:
    """Print a command's result. Raises StorageError if standard output is closed or full."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise StorageError(f"cannot write to standard output: {error.strerror}") from None


class Terminal:
    """Prints messages for a person on standard error."""

    def __init__(self, environ: Dict[str, str]) -> None:
        # Without TERM, it is unknown whether the terminal understands escape sequences. A Windows
        # console doesn't set TERM, so it is asked below.
        default = "console" if sys.platform == "win32" else "dumb"
        is_smart = environ.get("TERM", default) != "dumb" and sys.stderr.isatty()
        # Whether escape sequences work. In a Windows console, is_console turns them on.
        self.has_escapes = is_smart and is_console(sys.stderr.fileno(), ESCAPES)
        # Whether URLs become hyperlinks. The Linux console prints parts of the escape sequences.
        self.links = self.has_escapes and environ.get("TERM") != "linux"
        self.color = self.has_escapes and not environ.get("NO_COLOR")
        # This is b"" if the encoding has no check mark.
        tick = "\u2713".encode(sys.stderr.encoding or "ascii", "ignore")
        self.tick = "\u2713 " if self.has_escapes and tick else ""

    def notify(self, kind: str, text: str, command: str = "") -> None:
        """Print a message, followed by `command` as the person would type it here.

        `kind` is info, done, warning, error, hint, verbatim (printed between empty lines) or
        command (`text` is a command to type).
        """
        if kind == "command":
            text = f"    {typed_command(text)}"
        elif command:
            text = f"{text}: {typed_command(command)}"
        text = self._lead(kind) + printable(text, MESSAGE_LIMIT)
        if self.links and text.startswith("http"):
            text = HYPERLINK.format(text)
        self._print(f"\n{text}\n" if kind == "verbatim" else text)

    def _lead(self, kind: str) -> str:
        """Return the beginning of a message, in color if the terminal shows colors."""
        leads = {"done": self.tick, "warning": "warning: ", "error": "error: ", "hint": "hint: "}
        lead = leads.get(kind, "")
        if lead and self.color and kind in COLORS:
            return f"\033[{COLORS[kind]}m{lead}\033[0m"
        return lead

    def interrupted(self) -> None:
        """Report that Ctrl-C was pressed, on a new line because the terminal shows ^C."""
        self._print(("\n" if self.has_escapes else "") + "Interrupted.")

    def _print(self, text: str) -> None:
        # If standard error is closed, nobody can read the message.
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------
# Status: the report that `status` prints
# ---------------------------------------------------------------------------------------------
# This room collects what is known about both sign-ins, judges it, and puts it into words. It prints
# nothing and changes nothing, except that --online refreshes tokens that are due. A report holds no
# secret. Without --online nothing is sent, and every fault becomes part of the report.

# `status` lists this many models, each on one line.
SHOWN_MODELS = 10
# The facts of `status --json` that `accounts --json` has for each account.
ACCOUNT_FACTS = (
    "account",
    "email",
    "plan",
    "authenticated",
    "has_api_key",
    "access_token_expires_at",
    "official",
    "problem",
)


class OnlineCheck:
    """Whether a server accepts a token or key: a request for the models of `source`.

    `result` is accepted, refused or unreachable. `texts` is the result in words, one line each, and
    `error` is the reason if it isn't accepted.
    """

    def __init__(self, session: Session, source: str) -> None:
        self.error: Optional[OAuthError] = None
        try:
            count = len(list_models(session, source))
        except OAuthError as error:
            self.error = error
            self.result = "unreachable"
            if isinstance(error, (RefusedError, SignInEndedError)):
                self.result = "refused"
            self.texts = [self.result, str(error)]
        else:
            models = "1 model" if count == 1 else f"{count} models"
            self.result = "accepted"
            self.texts = [f"accepted, {models}"]


class SignInStatus:
    """The state of one sign-in.

    `tokens` is None if nobody is signed in or the file is broken. `problem` is None if all is well.
    `check` says whether OpenAI accepts the access token, or is None if it wasn't asked. `usable`
    says whether requests can be made with the tokens, perhaps after a refresh.
    """

    def __init__(self, session: Session, online: bool) -> None:
        # OpenAI is asked first, because that may refresh the tokens or end the sign-in.
        source = "official" if session.client.is_official else "codex"
        check = OnlineCheck(session, source) if online else None
        self.tokens: Optional[Tokens] = None
        fault: Optional[OAuthError] = None
        try:
            self.tokens = session.tokens()
            session.require_refreshable(self.tokens)
        except OAuthError as error:
            fault = error
        self.fields = self.tokens.fields if self.tokens else {}
        self.plan_allowed = session.client.can_use_plan(self.fields)
        # Without tokens or without the plan, nothing was sent, so the result isn't OpenAI's.
        was_asked = self.tokens is not None and self.plan_allowed
        self.check = check if was_asked else None
        # Tokens that aren't allowed to use the plan are usable, so only `fault` counts here.
        self.usable = self._is_usable(fault)
        self.problem = fault
        if not fault and not self.plan_allowed:
            self.problem = plan_not_allowed_error()
        self.path = session.token_file.path
        # A broken file counts as a sign-in that exists.
        self.exists = os.path.lexists(self.path) and not isinstance(fault, NotSignedInError)
        self.expires_at = timestamp_or_none(self.tokens.expires_at() if self.tokens else None)

    def refusal(self) -> Optional[OAuthError]:
        """Return the error with which OpenAI refused the tokens, or None if it didn't."""
        if self.check and self.check.result == "refused":
            return self.check.error
        return None

    def _is_usable(self, fault: Optional[OAuthError]) -> bool:
        if not self.tokens or self.refusal():
            return False
        # Even if the tokens can't be refreshed, the access token works until it expires.
        return not fault or self.tokens.valid_for(0)


class Status:
    """What is known about both sign-ins and, if `online`, OpenAI's answers about them.

    `problem` is the main problem, or None. `exit_code` is the exit code of `status`. `to_typed`
    turns a command into the text that a person types.
    """

    def __init__(
        self, session: Session, to_typed: Callable[[str], str], online: bool = False
    ) -> None:
        self.session, self.online = session, online
        self.to_typed = to_typed
        self.stored = SignInStatus(session, online)
        self.official = SignInStatus(session.official_session(), online)
        self.api_key_check: Optional[OnlineCheck] = None
        if online and self.stored.tokens and self.stored.tokens.api_key:
            self.api_key_check = OnlineCheck(session, "api")
        self.usage: Optional[Usage] = None
        self.usage_error: Optional[OAuthError] = None
        if self.stored.check:
            try:
                self.usage = request_usage(session)
            except OAuthError as error:
                self.usage_error = error
        # The names of our entries in the models file, or None if it can't be read.
        self.models: Optional[List[str]] = None
        self.models_error: Optional[StorageError] = None
        try:
            self.models = list(registered_entries(*session.all_sessions()))
        except StorageError as error:
            self.models_error = error
        # The official sign-in is the main one only if it's the only one.
        stored, official = self.stored, self.official
        main = official if official.exists and not stored.exists else stored
        reason, self.exit_code = self._failure(main)
        # If the main sign-in has a problem, it's reported even if the command fails for another
        # reason, or succeeds.
        self.problem = main.problem or reason

    def _failure(self, main: SignInStatus) -> Tuple[Optional[OAuthError], int]:
        """Return why `status` fails and its exit code, or None and 0. The first reason counts."""
        stored, official, problem = self.stored, self.official, main.problem
        # Nobody is signed in, the file is broken, or the sign-in has ended. An ended sign-in
        # doesn't fail the command while the official one works.
        is_replaced = official.usable and isinstance(problem, SignInEndedError)
        if problem and not main.usable and not is_replaced:
            return problem, problem.exit_code
        # OpenAI was asked and refused the tokens.
        refusal = main.refusal()
        if refusal:
            return refusal, SignInEndedError.exit_code
        # OpenAI was asked and nothing got an answer, so the network or the server is down.
        checks = [each for each in (stored.check, official.check, self.api_key_check) if each]
        if checks and all(each.result == "unreachable" for each in checks):
            return checks[0].error, UnavailableError.exit_code
        if self.models_error:
            return self.models_error, self.models_error.exit_code
        # The sign-in can be used, even if it can't use the plan or can't be refreshed any more.
        return None, 0

    @property
    def facts(self) -> Fields:
        """The object that `status --json` prints. It holds no secret."""
        stored, official, settings = self.stored, self.official, self.session.settings
        # If nobody is signed in, these are the issuer and the client that `auth` would use.
        signed_out = {"issuer": settings.issuer, "client_id": settings.client_id}
        tokens = stored.tokens or Tokens(signed_out)
        facts: Fields = {
            "account": settings.account or None,
            "authenticated": stored.usable or official.usable,
            **self._identity(tokens),
            "account_id": tokens.account_id,
            "has_api_key": bool(tokens.api_key),
            "has_refresh_token": bool(tokens.refresh_token),
            "access_token_expires_at": stored.expires_at,
            "last_refresh": timestamp_or_none(parse_timestamp(stored.fields.get("last_refresh"))),
            "models": self.models,
            "token_file": stored.path,
            "models_file": self.session.models_file.path,
            "model_source": self._model_source(),
            "issuer": tokens.issuer,
            "client_id": tokens.client_id,
            "problem": self._sentence(self.problem),
            "official": None,
        }
        if official.exists:
            facts["official"] = {
                "email": text_or_none(official.fields.get("email")),
                "plan_allowed": official.plan_allowed,
                "access_token_expires_at": official.expires_at,
                "problem": self._sentence(official.problem),
            }
        if self.online:
            facts["online"] = {
                "api_key": self.api_key_check and self.api_key_check.result,
                "access_token": stored.check and stored.check.result,
                "usage": self.usage.windows if self.usage else [],
            }
        return facts

    def _identity(self, tokens: Tokens) -> Dict[str, Optional[str]]:
        """Return `identity(tokens)`, with the plan that OpenAI has just named, if it was asked."""
        who = identity(tokens)
        # The tokens name the plan of the time when they were issued.
        if self.usage and self.usage.plan:
            who["plan"] = self.usage.plan
        return who

    def _model_source(self) -> str:
        """Return the source of the models. "auto" is resolved if somebody is signed in."""
        source: str = self.session.settings.model_source
        if source != "auto":
            return source
        if self.stored.tokens:
            return "api" if self.stored.tokens.api_key else "codex"
        return "official" if self.official.exists else "auto"

    def _typed(self, command: str) -> str:
        return self.to_typed(with_account(command, self.session.settings.account))

    def _hint(self, error: OAuthError) -> str:
        return hint_text(error, self._typed)

    def _sentence(self, error: Optional[OAuthError]) -> Optional[str]:
        """Return the text of `error` with its hint, or None without an error."""
        if not error:
            return None
        hint = self._hint(error)
        return f"{error}; {hint}" if hint else str(error)

    def text(self, as_json: bool, to_terminal: bool = False) -> str:
        """Return the text that `status` prints. With `to_terminal`, usage is shown as bars."""
        if as_json:
            return json.dumps(self.facts, indent=2)
        lines = [*self._headlines(), ""]
        for label, texts in self._rows(to_terminal).items():
            # The label stands only before the first text.
            heading = f"{label}:"
            for text in texts:
                lines.append(heading.ljust(14) + text)
                heading = ""
        return "\n".join(map(printable, lines))

    def _headlines(self) -> List[str]:
        """Return the lines above the rows: the state, in the words of README.md, and problems."""
        tokens = self.stored.tokens
        lines = ["ChatGPT OAuth: Not authenticated"]
        if self.stored.usable or self.official.usable:
            lines = ["ChatGPT OAuth: Authenticated"]
            if not tokens:
                lines[0] += OfficialClient.label
        if tokens and tokens.api_key:
            lines.append("API key available")
        elif tokens:
            command = self._typed("auth")
            lines.append(f"No API key; to get one, {ORGANIZATION_HINT}, then run: {command}")
        if isinstance(self.problem, NotSignedInError) and self.problem.command:
            lines.append(f"To sign in, run: {self._typed(self.problem.command)}")
        elif self.problem:
            lines += self._problem_texts(self.problem)
        return lines

    def _problem_texts(self, problem: OAuthError) -> List[str]:
        texts = [f"Problem: {problem}"]
        if problem.hint:
            texts.append(f"Hint: {self._hint(problem)}")
        return texts

    def _rows(self, to_terminal: bool) -> Dict[str, List[str]]:
        """Return the texts of the other lines, by label."""
        stored, official = self.stored, self.official
        rows: Dict[str, List[str]] = {}
        if self.session.settings.account:
            rows["Name"] = [self.session.settings.account]
        if stored.tokens:
            who = self._identity(stored.tokens)
            refreshable = stored.usable and not stored.problem
            rows["Account"] = [who["email"] or "unknown"]
            rows["Plan"] = [who["plan"] or "unknown"]
            rows["Access token"] = expiry_texts(stored.expires_at, refreshable)
        if stored.check:
            check = self.api_key_check
            rows["API key"] = [*check.texts] if check else ["none"]
            # A refused key isn't the main problem, so this hint isn't in the lines above the rows.
            if check and check.error and check.result == "refused":
                rows["API key"].append(self._hint(check.error))
            rows["ChatGPT plan"] = stored.check.texts
            rows["Usage"] = self._usage_texts(to_terminal)
            if self.usage and self.usage.credits:
                rows["Credits"] = [self.usage.credits]
        if official.exists:
            rows["Official"] = [text_or_none(official.fields.get("email")) or "unknown"]
            if official.usable:
                plan = "Using ChatGPT plan" if official.plan_allowed else "ChatGPT plan not allowed"
                rows["Official"].append(f"{plan}; {USAGE_PAGE}")
            rows["Plan token"] = self._plan_token_texts()
        rows["Models"] = self._model_texts()
        files = [each.path for each in (stored, official) if each.exists]
        rows["Token file"] = files or [stored.path]
        rows["Models file"] = [self.session.models_file.path]
        return rows

    def _usage_texts(self, to_terminal: bool) -> List[str]:
        if self.usage:
            texts = [usage_line(each, to_terminal) for each in self.usage.windows]
            return texts or ["OpenAI reports no limits"]
        return ["unknown", str(self.usage_error)]

    def _plan_token_texts(self) -> List[str]:
        official = self.official
        texts = expiry_texts(official.expires_at, not official.problem)
        # The first lines of the report already show the main problem.
        if official.problem and official.problem is not self.problem:
            texts += self._problem_texts(official.problem)
        if official.check:
            first, *rest = official.check.texts
            texts += [f"OpenAI says: {first}", *rest]
        return texts

    def _model_texts(self) -> List[str]:
        if self.models is None:
            return ["unknown"]
        texts = self.models[:SHOWN_MODELS]
        if len(self.models) > SHOWN_MODELS:
            texts.append(f"and {len(self.models) - SHOWN_MODELS} more")
        return texts or ["none imported"]

    def account_facts(self) -> Fields:
        """Return what `accounts --json` prints about the account."""
        all_facts = self.facts
        facts = {name: all_facts[name] for name in ACCOUNT_FACTS}
        if self.online:
            facts["usage"] = self.usage.windows if self.usage else []
        return facts

    def account_columns(self) -> List[str]:
        """Return what `accounts` prints about the account: name, email, plan, and expiry."""
        facts, official = self.facts, self.official
        expires_at = self.stored.expires_at or official.expires_at
        state = f"expires {distance(expires_at)}" if expires_at else "expiry unknown"
        if self.problem:
            state = str(self.problem)
        elif expires_at and (parse_timestamp(expires_at) or 0.0) < time.time():
            state = f"expired {distance(expires_at)}, refreshed on next use"
        email = facts["email"] or text_or_none(official.fields.get("email")) or "unknown"
        return [facts["account"] or "(no name)", email, facts["plan"] or "unknown", state]


def hint_text(error: OAuthError, to_typed: Callable[[str], str]) -> str:
    """Return the hint of `error` with its command as a person types it, or "" without a hint."""
    command = f": {to_typed(error.command)}" if error.command else ""
    return f"{error.hint or ''}{command}"


def account_statuses(
    session: Session, to_typed: Callable[[str], str], online: bool
) -> List[Status]:
    """Return the status of each account that has a token file, the one without a name first.

    With `online`, the requests for all accounts are made at the same time.
    """
    from concurrent.futures import ThreadPoolExecutor

    names = session.settings.account_names()
    sessions = [Session(Settings(name), session.notify) for name in names]
    if online:
        pool = ThreadPoolExecutor(len(sessions))
        try:
            statuses = list(pool.map(lambda each: Status(each, to_typed, True), sessions))
        finally:
            # After Ctrl-C, don't wait for the requests that are still running.
            pool.shutdown(wait=False)
    else:
        statuses = [Status(each, to_typed) for each in sessions]
    return [each for each in statuses if each.stored.exists or each.official.exists]


def accounts_text(statuses: List[Status]) -> str:
    """Return one line for each account, followed by the usage windows of its plan if known."""
    rows = [status.account_columns() for status in statuses]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for status, row in zip(statuses, rows):
        columns = [text.ljust(width) for text, width in zip(row, widths)]
        lines.append("  ".join(columns).rstrip())
        if status.usage:
            lines += [
                "    " + usage_line(window, to_terminal=True) for window in status.usage.windows
            ]
        elif status.usage_error:
            lines.append(f"    usage unknown: {status.usage_error}")
    return "\n".join(map(printable, lines))


def usage_line(window: Fields, to_terminal: bool) -> str:
    """Describe a usage window of the plan: `5 hours: 32% used, resets in 2 hours 5 minutes`."""
    percent, resets_at = window["used_percent"], window["resets_at"]
    line = f"{duration(window['window_seconds'], is_exact=True)}: "
    if to_terminal:
        tenths = min(10, max(0, round(percent / 10)))
        line += "#" * tenths + "." * (10 - tenths) + f" {percent:g}%"
    else:
        line += f"{percent:g}% used"
    if resets_at:
        line += f", resets {distance(resets_at)}"
    return line


def duration(seconds: float, is_exact: bool = False) -> str:
    """Return a duration in words: `5 hours`, `1 hour 59 minutes`, `45 seconds`.

    Unless `is_exact` is true, it's rounded to at most two units.
    """
    left = round(abs(seconds))
    # From a day on, round to hours. From an hour on, round to minutes.
    if left >= 86400 and not is_exact:
        left = (left + 1800) // 3600 * 3600
    elif left >= 3600 and not is_exact:
        left = (left + 30) // 60 * 60
    words = []
    for name, size in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count, left = divmod(left, size)
        if count:
            words.append(f"{count} {name}" if count == 1 else f"{count} {name}s")
    return " ".join(words) or "0 seconds"


def distance(when: str) -> str:
    """Return the distance from now to a timestamp: `in 2 hours 5 minutes`, `3 seconds ago`."""
    seconds = round((parse_timestamp(when) or 0.0) - time.time())
    return f"{duration(seconds)} ago" if seconds < 0 else f"in {duration(seconds)}"


def expiry_texts(when: Optional[str], refreshable: bool) -> List[str]:
    """Describe when a token expires, and on a second line what happens then if it's `refreshable`.

    `when` is a timestamp, or None if that is unknown.
    """
    note = "refreshes automatically"
    if when is None:
        text = "expiry unknown"
    elif (parse_timestamp(when) or 0.0) >= time.time():
        # The slice cuts off the seconds.
        text = f"expires {distance(when)} ({when[:16]}Z)"
    else:
        text, note = f"expired {distance(when)}", "refreshes at its next use"
    return [text, note] if refreshable else [text]


# ---------------------------------------------------------------------------------------------
# Commands: one function for each command
# ---------------------------------------------------------------------------------------------
# A command gets a session and its options, prints its result on standard output and returns its
# exit code (None means 0). A command that raises an OAuthError has not printed a result. Only `env`
# and `token` print secrets. `env`, `token` and `status` must stay fast.


def sign_in(
    *,
    device: bool = False,
    open_browser: bool = True,
    timeout: Optional[float] = None,
    account: Optional[str] = None,
) -> Dict[str, Any]:
    """Sign in, get the API key, import the models. Return the object that `status --json` prints.

    With `device`, a device code is used. If `open_browser` is false, the URL is only logged as a
    warning. `timeout` is in seconds (default: `callback_timeout`). Raises OAuthError.
    """
    with module_session(account) as session:
        if timeout is not None:
            timeout = SECONDS_RULE.check("timeout", timeout)
        models = ModelFilter(session.settings)
        prepare_sign_in(session)
        if device:
            sign_in_with_device(session, models, timeout)
        else:
            BrowserSignIn(session, models, timeout, open_browser).run()
        return Status(session, lambda command: f"chatgpt_oauth.py {command}").facts


def sign_out(*, revoke: bool = True, account: Optional[str] = None) -> None:
    """Revoke the sign-in if possible, remove its file and its models. Raises OAuthError."""
    with module_session(account) as session:
        end_sign_in(session, revoke)


def sign_in_with_options(
    session: Session, options: Namespace, reading: bool, at_prompt: bool = False
) -> None:
    """Sign in according to the options of `auth`.

    `reading` and `at_prompt` are explained in BrowserSignIn.
    """
    models = ModelFilter(session.settings, options.include, options.exclude, options.source)
    prepare_sign_in(session)
    if options.device:
        sign_in_with_device(session, models, options.timeout)
    else:
        browser = not options.no_browser
        BrowserSignIn(session, models, options.timeout, browser, reading, at_prompt).run()


def open_session(notify: Notify, options: Namespace) -> Session:
    """Return a session for the sign-in that the options select. Raises UsageError."""
    # Not every command has these options.
    settings = Settings(getattr(options, "account", None))
    settings.workspace = getattr(options, "workspace", None) or settings.workspace
    if getattr(options, "official", False):
        return Session(settings, notify, OfficialClient(settings))
    return Session(settings, notify)


def shell_with_env_code(settings: Settings, name: str) -> str:
    """Return the key in SHELLS for a shell that `env` can print statements for.

    Raises UsageError for any other shell.
    """
    name = shell_name(settings, name)
    key = shell_key(name)
    if key is None:
        known = ", ".join(each for each, shell in SHELLS.items() if shell.has_env_code)
        raise UsageError(f"unknown shell: {name}", f"use --shell with one of: {known}")
    if not SHELLS[key].has_env_code:
        program, variable = absolute_program_name(key), settings.api_key_env_var
        line = profile_line(key, program, variable, settings.account)
        hint = f"use --shell with another name, or in {name}: {line}"
        raise UsageError(f"env prints no code for {name}", hint)
    return key


def command_auth(session: Session, options: Namespace) -> None:
    """Sign in and show how to use the API key."""
    sign_in_with_options(session, options, reading=True)
    if not session.tokens().api_key:
        step = session.client.next_step_hint
        session.notify("info", step.text, step.command)
        return
    key = shell_key(shell_name(session.settings, "auto"))
    if key is None or not SHELLS[key].has_env_code:
        session.notify("info", "To use the API key in a shell, see", "env --help")
        return
    command = with_account("env", session.settings.account)
    line = SHELLS[key].profile.format(command=f"{program_name(key)} {command}")
    # On Windows, this process can't tell whether it was started from PowerShell or cmd.
    place = "PowerShell" if key == "powershell" else "this shell"
    # Without a program file, there is nothing that the line could start.
    if not has_program_file():
        place += ", download chatgpt_oauth.py, then run"
    session.notify("info", f"To use the API key in {place}: {line}")


def command_status(session: Session, options: Namespace) -> int:
    status = Status(session, typed_command, options.online)
    print_result(status.text(options.json, sys.stdout.isatty()))
    return status.exit_code


def command_accounts(session: Session, options: Namespace) -> int:
    statuses = account_statuses(session, typed_command, options.online)
    if options.json:
        print_result(json.dumps([each.account_facts() for each in statuses], indent=2))
    else:
        nobody = f"No account is signed in (no tokens in {session.settings.home})."
        nobody += f"\nTo sign in, run: {typed_command('auth')}"
        print_result(accounts_text(statuses) or nobody)
    can_use_one = any(each.facts["authenticated"] for each in statuses)
    return 0 if can_use_one else NotSignedInError.exit_code


def command_models(session: Session, options: Namespace) -> None:
    include = ["*"] if options.all else options.include
    models = ModelFilter(session.settings, include, options.exclude, options.source)
    source, names = import_models(session, models, options.dry_run)
    if options.json:
        print_result(json.dumps({"model_source": source, "models": names}, indent=2))
    elif names:
        print_result("\n".join(names))


def command_env(session: Session, options: Namespace) -> int:
    name = "auto" if options.shell is None else options.shell
    shell = shell_with_env_code(session.settings, name)
    chosen = "" if options.shell is None else f"--shell {options.shell} "
    try:
        variables = exported_variables(
            session, options, f"env {chosen}--access-token", options.unset
        )
    except (NotSignedInError, NoApiKeyError) as error:
        # A profile runs `env` in every new shell, so this message takes only one line.
        session.notify("error", f"{error}; {error.hint}", error.command)
        return error.exit_code
    print_result(shell_code(shell, variables))
    return 0


def exported_variables(
    session: Session, options: Namespace, command_without_key: str, unset: bool = False
) -> Dict[str, Optional[str]]:
    """Return the variables that `env` and `exec` set, by name.

    They hold the API key or, with --access-token, a valid access token and the account ID. With
    `unset`, all values are None. Raises OAuthError. If there is no API key, its hint names
    `command_without_key`.
    """
    token_name = "CHATGPT_OAUTH_ACCESS_TOKEN" + session.settings.suffix
    account_name = "CHATGPT_OAUTH_ACCOUNT_ID" + session.settings.suffix
    name = options.name
    if name is None:
        name = token_name if options.access_token else session.settings.api_key_env_var
    name = RULES["api_key_env_var"].check("--name", name)
    if name == account_name:
        raise UsageError(f"--name cannot be {account_name}", "choose another name")
    if options.access_token:
        if unset:
            return {name: None, account_name: None}
        tokens = session.valid_tokens()
        return {name: tokens.access_token, account_name: tokens.account_id}
    if unset:
        return {name: None}
    api_key = session.tokens().api_key
    if not api_key:
        hint = "to use an access token instead, run"
        raise NoApiKeyError(NO_API_KEY, hint, command_without_key)
    return {name: api_key}


def command_exec(session: Session, options: Namespace) -> int:
    """Run a command with the API key in its environment. The shell itself never sees the key."""
    # An empty name counts as missing: `exec -- "$EDITOR"` passes one if EDITOR isn't set.
    if not options.command or not options.command[0]:
        raise UsageError("no command to run was given", "to run one, type", "exec -- COMMAND")
    variables = exported_variables(session, options, "exec --access-token -- COMMAND")
    environ = dict(session.settings.environ)
    for name, value in variables.items():
        if value is None:
            environ.pop(name, None)
        else:
            environ[name] = value
    try:
        return run_instead(options.command, environ)
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        why = "command not found" if missing else f"cannot run it: {error.strerror}"
        hint = "check the spelling and PATH" if missing else "check the file and its permissions"
        if missing and sys.platform == "win32":
            hint += " (commands of cmd, such as dir, need cmd /c)"
        failed = OAuthError(f"{options.command[0]}: {why}", hint)
        # POSIX.1-2017, Shell Command Language, section 2.8.2
        failed.exit_code = 127 if missing else 126
        raise failed from None


def run_instead(command: List[str], environ: Dict[str, str]) -> int:
    """Replace this process with `command`. On Windows, run it and return its exit code.

    Raises OSError if the command can't be run.
    """
    if sys.platform != "win32":
        import signal

        # Python ignores these two signals. Without a reset, the new program would inherit that.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(command[0], command, environ)  # noqa: S606 - a list of arguments, no shell
    import shutil
    import subprocess

    # CreateProcess finds only .exe files, and commands such as `npm` are .cmd files.
    program = shutil.which(command[0], path=environ.get("PATH")) or command[0]
    process = subprocess.Popen([program, *command[1:]], env=environ)  # noqa: S603 - no shell
    code: Optional[int] = None
    while code is None:
        # Windows sends Ctrl-C to the command as well, and the command decides what to do.
        with contextlib.suppress(KeyboardInterrupt):
            code = process.wait()
    # run_program passes the code to os._exit, which takes a signed number of 32 bits.
    return code - (1 << 32) if code >= 1 << 31 else code


def command_token(session: Session, options: Namespace) -> None:
    if options.api_key:
        api_key = session.tokens().api_key
        if not api_key:
            raise no_api_key_error()
        print_result(api_key)
        return
    tokens = session.valid_tokens(options.refresh)
    if options.json:
        facts = {
            "access_token": tokens.access_token,
            "account_id": tokens.account_id,
            "expires_at": timestamp_or_none(tokens.expires_at()),
        }
        print_result(json.dumps(facts))
    else:
        print_result(tokens.access_token)


def command_logout(session: Session, options: Namespace) -> None:
    """Revoke both sign-ins (with --official, only that one) and remove their files and models."""
    sessions = [session] if options.official else session.all_sessions()
    ended, failures = False, []
    for each in sessions:
        try:
            if end_sign_in(each, not options.local):
                ended = True
        except OAuthError as error:
            failures.append(error)
    for failure in failures[1:]:
        # Both sign-ins use the same models file, so both may fail with the same error.
        if str(failure) != str(failures[0]):
            report_error(session.notify, failure, "warning")
    if failures:
        raise failures[0]
    if not ended:
        place = session.settings.directory
        session.notify("info", f"Not signed in (no tokens in {place}); nothing to do.")


# ---------------------------------------------------------------------------------------------
# Install: make this file a command and Code Puppy's plugin
# ---------------------------------------------------------------------------------------------
# `install` writes a copy of this program, a launcher for it, and the plugin, which is another copy.
# A record beside the program lists every launcher and every directory that it made. Each file
# contains a mark that is the same in every version. A file without its mark belongs to somebody
# else: neither command touches it. Files are replaced atomically and all together, under one lock.
# Nothing that the launcher executes is writable by other users. `uninstall` removes what `install`
# created, and the stored registrations, but never a sign-in.

# Each of our files contains this text, so it must never change.
MARK = "Made by chatgpt_oauth.py install; to remove it, run chatgpt-oauth uninstall."
# The defaults of earlier releases. `edited_settings` doesn't take them for a person's own values.
FORMER_DEFAULTS = {
    "codex_client_version": "0.169.0",
    "default_context_length": 128000,
    "responses_patterns": "*-codex*,*-pro,*-pro-*",
}
# The replaced copy of an edited file is kept under its name and this suffix.
KEPT_SUFFIX = ".old"
# Our files in Code Puppy's directory, with their locks and temporary files.
OWN_FILES = r"chatgpt_(oauth|models|plan|agent)\.json(\.[a-z]+)?"
# The permission of the group and of all other users to write.
WRITE_BY_OTHERS = 0o022
# The Python code in the launcher. It imports the program, because Python caches the compiled code
# of an import. A script would be compiled at every start, which takes longer than everything else
# that `env` does. The directory comes last in the search path, so that no file in it can hide a
# standard module. If the compiled code is damaged, sys.pycache_prefix is set to the path of a file,
# so that Python finds no compiled code and compiles the program. The code must not contain an
# apostrophe, because POSIX_LAUNCHER puts it between apostrophes.
LAUNCH_CODE = """\
import sys
_, launcher, directory, *arguments = sys.argv
sys.argv = [launcher, *arguments]
sys.path.append(directory)
try:
    import chatgpt_oauth
except Exception:
    # The compiled code may be damaged, because the disk was full.
    import contextlib, importlib.util, os
    damaged = importlib.util.cache_from_source(os.path.join(directory, "chatgpt_oauth.py"))
    with contextlib.suppress(OSError):
        os.unlink(damaged)
    sys.pycache_prefix = launcher
    sys.dont_write_bytecode = True
    import chatgpt_oauth
chatgpt_oauth.run_program()
"""
# -I -S keeps Python from running code from the current directory, PYTHONPATH or site-packages.
# A #! line can't hold a long path or one with a space, so the launcher is a shell script. It sets
# no variables, because if the person exports one of that name, the program would see our value.
POSIX_LAUNCHER = """\
#!/bin/sh
# {mark}
gone() {{
  printf 'error: %s is gone\\n' "$1" >&2
  echo 'hint: to install it again, run: python3 chatgpt_oauth.py install' >&2
  exit 6
}}
[ -f {python} ] || gone {python}
[ -f {program} ] || gone {program}
exec {python} -I -S -c '{code}' "$0" {directory} "$@"
"""
# cmd reads the next line of the file only after it has run the last one. `uninstall` removes the
# file meanwhile, so nothing may follow the line that starts Python. `goto :eof` keeps the exit
# code.
WINDOWS_LAUNCHER = """\
@echo off
rem {mark}
if exist {python} if exist {program} goto start
echo error: {python} or {program} is gone 1>&2
echo hint: to install it again, run: py chatgpt_oauth.py install 1>&2
exit /b 6
:start
{python} -I -S -c "{code}" "%~f0" {directory} %* & goto :eof
"""
RESTART_CODE_PUPPY = "If Code Puppy is running, restart it."
# How long the installed command may take to print its version.
FIRST_RUN_TIMEOUT = 60  # seconds


class InstallPaths:
    """The paths of the program, its launcher (in `bin_directory`) and the plugin."""

    def __init__(self, environ: Dict[str, str], options: Namespace) -> None:
        if sys.platform == "win32":
            data = environ.get("LOCALAPPDATA") or r"~\AppData\Local"
            # No other program sees what Python from the Microsoft Store creates in AppData:
            # https://docs.python.org/3/using/windows.html (redirection of local data)
            if "\\WindowsApps\\" in sys.base_prefix:
                data = r"~\.local"
            default_bin = os.path.join(data, "Programs", "chatgpt_oauth")
            launcher_name = LAUNCHERS[1]
        else:
            data = environ.get("XDG_DATA_HOME", "")
            # The XDG Base Directory Specification: a relative path must be ignored.
            if not os.path.isabs(data):
                data = "~/.local/share"
            default_bin = "~/.local/bin"
            launcher_name = LAUNCHERS[0]
        self.bin_directory = absolute_path(options.bin or default_bin)
        self.launcher = os.path.join(self.bin_directory, launcher_name)
        self.environ = environ
        self.code_puppy = absolute_path("~/.code_puppy")
        self.plugin_directory = os.path.join(self.code_puppy, "plugins", "chatgpt_oauth_file")
        self.plugin = os.path.join(self.plugin_directory, "register_callbacks.py")
        self.set_directory(absolute_path(os.path.join(data, "chatgpt_oauth")))

    def set_directory(self, directory: str) -> None:
        self.directory = directory
        self.program = os.path.join(directory, "chatgpt_oauth.py")
        # Python keeps the compiled code of the program there.
        self.cache = os.path.join(directory, "__pycache__")
        self.record = os.path.join(directory, "install.json")
        self.lock = os.path.join(directory, "install.lock")

    def content(self, path: str) -> bytes:
        """Return the content of our file at `path`, or b"" if nothing is there.

        Raises StorageError if the file can't be read or isn't ours.
        """
        # Anything that isn't a regular file counts as a file without our mark.
        content = b""
        try:
            if stat.S_ISREG(os.lstat(path).st_mode):
                content = file_content(path)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StorageError(f"{path}: cannot read: {error.strerror}") from None
        if MARK.encode() not in content:
            hint = "rename or remove it"
            if path == self.launcher:
                hint += ", or use --bin DIR"
            elif path == self.plugin:
                hint += ", or use --no-code-puppy"
            raise StorageError(f"{path}: not made by chatgpt_oauth, so it is left alone", hint)
        return content


def recorded_paths(paths: InstallPaths) -> Set[str]:
    """Return the paths of the launchers and directories that `install` has made.

    If the record is missing or damaged, the result is empty, and `uninstall` finds only the
    launcher that it was started with or told to remove.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return set(map(str, json.loads(file_content(paths.record))["made"]))
    return set()


def absolute_path(path: str) -> str:
    """Return the absolute form of `path` with a leading `~` expanded.

    Raises UsageError if the home directory is unknown.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UsageError("the home directory is not known", "set HOME, then try again")
    try:
        return os.path.abspath(expanded)
    except OSError:
        raise UsageError(
            f"{path} is a relative path and the current directory is gone",
            "use an absolute path, or change to another directory",
        ) from None


def launcher_content(paths: InstallPaths) -> bytes:
    """Return the launcher: a script that runs the installed program with this Python."""
    template, code = POSIX_LAUNCHER, LAUNCH_CODE
    words = [permanent_python(), paths.program, paths.directory]
    if sys.platform == "win32":
        # A command of a batch file is one line, and a double quote would end the argument.
        literal = repr(LAUNCH_CODE).replace('"', r"\x22")
        template = WINDOWS_LAUNCHER
        code = f"exec({literal})"
        words = [batch_quote(path, paths.environ) for path in words]
    else:
        words = [quote_path(path) for path in words]
    python, program, directory = words
    text = template.format(
        mark=MARK, code=code, python=python, program=program, directory=directory
    )
    if sys.platform != "win32":
        return os.fsencode(text)
    try:
        # cmd reads batch files in the OEM code page, unless the person has changed it.
        return text.replace("\n", "\r\n").encode("oem")
    except UnicodeEncodeError:
        raise StorageError(
            f"the command prompt cannot read one of {', '.join(words)}",
            "use a Python whose path has only ASCII characters",
        ) from None


def launched_directory(launcher: bytes, environ: Dict[str, str]) -> Optional[str]:
    """Return the directory of the program that a launcher runs, or None if that isn't clear.

    The directory is an argument in the last line of both launcher templates.
    """
    import shlex

    if sys.platform == "win32":
        found = re.search(r'"%~f0" "(?:%(\w+)%)?(.*)" %\*', launcher.decode("oem"))
        if not found:
            return None
        start = environ.get(found[1], "") if found[1] else ""
        return start + found[2].replace("%%", "%")
    _, _, end = os.fsdecode(launcher).partition('\' "$0" ')
    # A quotation mark is missing in a launcher that is damaged.
    with contextlib.suppress(ValueError):
        return shlex.split(end)[0] if end else None
    return None


def batch_quote(path: str, environ: Dict[str, str]) -> str:
    """Return `path` as a word of a batch file, where a % would begin a variable.

    A path that isn't ASCII begins with a variable if possible. Its value doesn't depend on the code
    page, and a user name is usually in it.
    """
    start = ""
    for name in ("LOCALAPPDATA", "USERPROFILE"):
        value = environ.get(name, "")
        if value and path.startswith(os.path.join(value, "")) and not path.isascii():
            start, path = f"%{name}%", path[len(value) :]
            break
    return f'"{start}' + path.replace("%", "%%") + '"'


def permanent_python() -> str:
    """Return the path of this Python, or of the one that its virtual environment was made from.

    The launcher needs no packages, so it should keep working when the environment is deleted.
    Links are followed only until they lead out of the environment, because a name such as
    /usr/bin/python3 still works after an update, and the file that it points to may not.
    """
    python = sys.executable
    if not python:
        raise OAuthError("Python cannot find its own executable", "start it by its full path")
    if sys.prefix == sys.base_prefix:
        return python
    if sys.platform == "win32":
        # On Windows the environment's python.exe isn't a link. It is a program that starts Python.
        return str(getattr(sys, "_base_executable", python))
    while os.path.islink(python) and python.startswith(os.path.join(sys.prefix, "")):
        target = os.path.join(os.path.dirname(python), os.readlink(python))
        python = os.path.normpath(target)
    return python


def own_source() -> bytes:
    """Return the content of this file. Raises UsageError if the program isn't run from a file."""
    source = b""
    # A program that is read from standard input has no __file__.
    path = str(globals().get("__file__", ""))
    with contextlib.suppress(OSError):
        source = file_content(path)
    # Compiled code contains the mark, too, but it also contains NUL bytes.
    if MARK.encode() not in source or b"\0" in source:
        raise UsageError(
            "the program was not started from a file that could be installed",
            f"download chatgpt_oauth.py, then run: {python_name()} chatgpt_oauth.py install",
        )
    return source


def file_content(path: str) -> bytes:
    """Return the first mebibyte of the file at `path`. All of our files are smaller than that."""
    import pathlib

    with pathlib.Path(path).open("rb") as file:
        return file.read(MEBIBYTE)


def has_code_puppy(paths: InstallPaths, environ: Dict[str, str]) -> bool:
    """Whether Code Puppy is installed, or at least our plugin for it.

    A ~/.code_puppy that holds only our own files and empty directories doesn't count.
    """
    import shutil

    if shutil.which("code-puppy", path=environ.get("PATH")):
        return True
    for _, _, names in os.walk(paths.code_puppy):
        if not all(re.fullmatch(OWN_FILES, name) for name in names):
            return True
    return False


def edited_settings(installed: bytes) -> List[str]:
    """Return the names of the settings that were edited in an installed copy of this program.

    These are the ones whose value neither this file nor an earlier release has.
    """
    import ast

    pattern = rb"^CHATGPT_OAUTH_CONFIG.*?= (\{.*?^\})"
    found = re.search(pattern, installed, re.MULTILINE | re.DOTALL)
    try:
        settings = ast.literal_eval(found[1].decode()) if found else {}
    except (SyntaxError, ValueError):
        # The person has written more than values there.
        return ["CHATGPT_OAUTH_CONFIG"]
    edited = []
    for name, value in settings.items():
        defaults = [each[name] for each in (CHATGPT_OAUTH_CONFIG, FORMER_DEFAULTS) if name in each]
        if value not in defaults:
            edited.append(name)
    return edited


def command_install(session: Session, options: Namespace) -> None:
    notify, environ = session.notify, session.settings.environ
    paths = InstallPaths(environ, options)
    source = own_source()
    contents = {paths.program: source, paths.launcher: launcher_content(paths)}
    wants_plugin = options.code_puppy or has_code_puppy(paths, environ)
    if wants_plugin and not options.no_code_puppy:
        contents[paths.plugin] = source
    try:
        replace_files(contents, paths, session)
    except OSError as error:
        raise install_error(error, paths) from None
    # Hints name the command that the person typed. From now on they should name the new one.
    sys.argv[0] = paths.launcher
    notify("done", f"Installed the command {paths.launcher}")
    notify("info", f"It runs a copy of this file: {paths.program}")
    if paths.plugin in contents:
        notify("done", f"Installed the Code Puppy plugin {paths.plugin}")
        notify("info", RESTART_CODE_PUPPY)
    report_next_steps(session, paths)


def install_error(error: OSError, paths: InstallPaths) -> StorageError:
    """Return the error for a file of ours that can't be written, with a hint that may help."""
    path, hint = error.filename or paths.directory, ""
    directory = os.path.dirname(path)
    is_own_directory = os.path.exists(directory) and can_change_mode(directory)
    # On Windows, the file may just be open in another program.
    if isinstance(error, PermissionError) and not is_own_directory and sys.platform != "win32":
        # `path` may be a directory that couldn't be made, on the way to one or more places.
        start = os.path.join(path, "")
        is_for_program = paths.program.startswith(start)
        is_for_launcher = paths.launcher.startswith(start) or directory == paths.bin_directory
        if path.startswith(paths.code_puppy):
            hint = "use --no-code-puppy to install only the command"
        elif is_for_launcher and not is_for_program:
            hint = "use --bin with a directory of yours"
        else:
            hint = "set HOME or XDG_DATA_HOME to a directory of yours"
    return storage_error("write", path, error, hint)


def replace_files(contents: Dict[str, bytes], paths: InstallPaths, session: Session) -> None:
    """Replace each file with its new content, and run the command once.

    All files are written before the first one is replaced. If one can't be written, all stay as
    they are. If the command doesn't run, the files that are new are removed. Raises OSError and
    OAuthError.
    """
    directories: Set[str] = set()
    lock = locked_directory(paths, session.settings.lock_timeout, directories)
    with lock, contextlib.ExitStack() as stack:
        # This raises StorageError for a file that isn't ours, before anything is written.
        previous = {path: paths.content(path) for path in (*contents, paths.record)}
        make_directories(contents, paths, directories)
        made = {paths.launcher, *directories, *recorded_paths(paths)}
        record = encode({"comment": MARK, "made": sorted(made)})
        edited: Dict[str, List[str]] = {}
        kept: Dict[str, bytes] = {}
        for path, content in previous.items():
            names = edited_settings(content)
            if names:
                edited[path] = names
                kept[path + KEPT_SUFFIX] = content
        # The record comes first, so that it lists the launcher if this process is killed.
        files = {paths.record: record, **kept, **contents}
        # Windows can't replace a file that is open, and the launcher may be running now.
        if sys.platform == "win32" and previous[paths.launcher] == contents[paths.launcher]:
            del files[paths.launcher]
        # Before make_directories restricted it, others may have written to __pycache__.
        remove_compiled_code(paths.program)
        replacements = []
        for path, content in files.items():
            with contextlib.suppress(FileNotFoundError):
                require_owner(path, os.lstat(path))
            replacement = Replacement(path, 0o755 if path == paths.launcher else 0o644)
            stack.callback(replacement.discard)
            replacement.write(content)
            replacement.sync()
            replacements.append(replacement)
        for replacement in replacements:
            replacement.commit()
        try:
            require_working_launcher(paths)
        except OAuthError:
            for path, content in previous.items():
                if not content:
                    remove_file(path)
            raise
    for path, names in edited.items():
        text = f"the installed copy had edited settings: {', '.join(names)}"
        session.notify("warning", text)
        session.notify("info", f"That copy is kept as {path}{KEPT_SUFFIX}")


def require_working_launcher(paths: InstallPaths) -> None:
    """Run the installed command once, which also makes Python compile the program.

    Raises StorageError if the command doesn't print its version.
    """
    import subprocess

    version = f"chatgpt_oauth {__version__}"
    try:
        result = subprocess.run(  # noqa: S603 - our own launcher, no shell
            [paths.launcher, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=FIRST_RUN_TIMEOUT,
        )
    except PermissionError:
        raise StorageError(
            f"{paths.bin_directory} does not allow programs (is it mounted noexec?)",
            "to use another directory, run",
            "install --bin DIR",
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        fault = str(error)
    else:
        if result.stdout.decode(errors="replace").strip() == version:
            # Without this, the owner still has a command that works.
            with contextlib.suppress(OSError):
                give_to_owner(paths.cache)
            return
        lines = result.stderr.decode(errors="replace").strip().split("\n")
        fault = lines[-1] or f"exit code {result.returncode}"
    raise StorageError(f"{paths.launcher} does not work: {fault}")


def give_to_owner(directory: str) -> None:
    """If we are root, give the compiled code in `directory` to the directory's owner.

    The owner can put links into the directory, or in its place, at any time. So each file is opened
    first, and one that has another link stays root's. Raises OSError.
    """
    if sys.platform == "win32" or os.geteuid() != 0:
        return
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        owner = os.fstat(opened)
        for name in os.listdir(opened):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with os.fdopen(os.open(name, flags, dir_fd=opened), "rb") as file:
                info = os.fstat(file.fileno())
                if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
                    os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
    finally:
        os.close(opened)


@contextlib.contextmanager
def locked_directory(paths: InstallPaths, timeout: float, made: Set[str]) -> Iterator[None]:
    """Hold the lock of the program's directory, which is made if necessary.

    At the end, the directories in `made` that are empty are removed. If nothing is installed, the
    lock's file is removed, too. Raises OSError and OAuthError.
    """
    deadline = time.monotonic() + timeout
    tries_left = 100
    while True:
        try:
            make_own_directory(paths.directory, made)
            lock = acquire_lock_file(paths.lock, deadline)
            break
        except FileNotFoundError:
            # Either `uninstall` has just removed the directory, or nobody can create it.
            tries_left -= 1
            if not tries_left:
                raise
    try:
        yield
    finally:
        # The directories that contain the lock's file can be removed only after that file.
        last = {path for path in made if paths.lock.startswith(os.path.join(path, ""))}
        remove_empty_directories(made - last)
        if os.path.lexists(paths.record):
            release_lock(lock)
        else:
            remove_lock_file(lock, paths.lock)
        remove_empty_directories(last)


def remove_empty_directories(paths: Set[str]) -> None:
    # The longest path is first, so that a directory comes before its parent.
    for path in sorted(paths, key=len, reverse=True):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def make_directories(contents: Dict[str, bytes], paths: InstallPaths, made: Set[str]) -> None:
    """Make the directories of all files, and add them to `made`. Raises OSError, StorageError."""
    make_own_directory(paths.cache, made)
    # Other programs use this directory, too, so its permissions stay as they are.
    make_recorded_directory(os.path.dirname(paths.launcher), made)
    if paths.plugin in contents:
        # Tokens may be stored in this directory later.
        make_recorded_directory(paths.code_puppy, made, 0o700)
        make_own_directory(paths.plugin_directory, made)


def make_recorded_directory(path: str, made: Set[str], mode: int = 0o755) -> None:
    """Make a directory and its missing parents, and add them to `made`. Raises OSError."""
    missing = path
    while not os.path.isdir(missing) and missing != os.path.dirname(missing):
        made.add(missing)
        missing = os.path.dirname(missing)
    make_directory(path, mode)


def make_own_directory(path: str, made: Set[str]) -> None:
    """Make a directory, and make sure that only its owner can write to it.

    It and its missing parents are added to `made`. Raises OSError, and StorageError if the
    directory belongs to another user.
    """
    make_recorded_directory(path, made)
    if sys.platform == "win32":
        return
    flags = os.O_RDONLY | os.O_DIRECTORY
    if os.geteuid() == 0:
        # If root installs into another user's home directory, that user could make this path a
        # link to any directory.
        flags |= os.O_NOFOLLOW
    descriptor = os.open(path, flags)
    try:
        info = os.fstat(descriptor)
        require_owner(path, info)
        if info.st_mode & WRITE_BY_OTHERS:
            # Some file systems have no permissions.
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, stat.S_IMODE(info.st_mode) & ~WRITE_BY_OTHERS)
    finally:
        os.close(descriptor)


def require_owner(path: str, info: os.stat_result) -> None:
    """Raise StorageError unless `path` belongs to this user (for root: to its directory's owner).

    Anyone else could replace what the launcher executes.
    """
    if sys.platform == "win32":
        return
    user = os.geteuid()
    if user == 0:
        user = os.stat(os.path.dirname(path)).st_uid
    if info.st_uid != user:
        raise StorageError(
            f"{path}: owned by another user (uid {info.st_uid})", "remove it, then try again"
        )


def login_shell() -> str:
    """Return the file name of the user's login shell, or "sh" for a user without one."""
    import pwd

    with contextlib.suppress(KeyError):
        return os.path.basename(pwd.getpwuid(os.getuid()).pw_shell)
    return "sh"


def bash_profiles() -> str:
    """Return the files that need a line so that each new bash runs it.

    A login shell reads the first of three files that exists. That file usually reads ~/.bashrc.
    """
    for name in ("~/.bash_profile", "~/.bash_login", "~/.profile"):
        with contextlib.suppress(OSError):
            content = file_content(os.path.expanduser(name))
            return "~/.bashrc" if b"bashrc" in content else f"~/.bashrc and {name}"
    return "~/.bashrc and ~/.profile"


def report_next_steps(session: Session, paths: InstallPaths) -> None:
    """Report which lines to add to the shell's profile, and the command to type next."""
    import shutil

    notify, settings = session.notify, session.settings
    user_shell = shell_name(settings, "auto")
    # Containers often leave $SHELL unset.
    if sys.platform != "win32" and not settings.environ.get("SHELL"):
        user_shell = shell_name(settings, login_shell())
    # An unknown shell probably understands the line for sh.
    shell = shell_key(user_shell) or "sh"
    profile = SHELLS[shell].names.get(user_shell, "~/.profile")
    if user_shell == "bash":
        profile = bash_profiles()
    found = shutil.which(COMMAND, path=settings.environ.get("PATH"))
    if found is None:
        notify("warning", f"{paths.bin_directory} is not on your PATH")
        notify("info", f"To change that, add this line to {profile}:")
        path = quote_path(paths.bin_directory, shell)
        if sys.platform == "win32" and shell == "sh":
            # The colon after a drive letter would separate two directories.
            path = f'"$(cygpath {path})"'
        line = SHELLS[shell].search.format(
            path=path,
            quoted=shell_quote(shell, paths.bin_directory),
        )
        notify("info", f"    {line}")
    elif not os.path.samefile(found, paths.launcher):
        notify("warning", f"another {COMMAND} comes first on your PATH: {found}")
        notify("hint", f"remove that one, or put {paths.bin_directory} before it")
    api_key = None
    next_step, next_command = "To see who is signed in, run:", "status"
    try:
        api_key = session.tokens().api_key
    except OAuthError as error:
        # Nobody is signed in, or the sign-in has ended. `status` explains every other error.
        if error.exit_code == NotSignedInError.exit_code and error.command:
            next_step, next_command = "To sign in, run:", error.command
    if api_key:
        program, variable = absolute_program_name(shell), settings.api_key_env_var
        line = profile_line(shell, program, variable, settings.account)
        notify("info", f"To set the API key in each new shell, add this line to {profile}:")
        notify("info", f"    {line}")
    notify("info", next_step)
    command = with_account(next_command, settings.account)
    notify("info", f"    {program_name(shell)} {command}")


def command_uninstall(session: Session, options: Namespace) -> None:
    paths = InstallPaths(session.settings.environ, options)
    started = os.path.realpath(sys.argv[0])
    if os.path.basename(started) in LAUNCHERS and not options.bin:
        # The person ran the installed command, so remove that one, wherever it is.
        paths.launcher = started
    launcher = paths.content(paths.launcher)
    if options.bin and not launcher:
        hint = "use --bin with the directory that was given to install"
        raise UsageError(f"there is no command {paths.launcher}", hint)
    # The program is elsewhere if XDG_DATA_HOME was different when it was installed.
    paths.set_directory(launched_directory(launcher, paths.environ) or paths.directory)
    try:
        removed = remove_installation(paths, session, options)
    except OSError as error:
        raise storage_error("remove", error.filename or paths.directory, error) from None
    sessions = session.sessions_of_all_accounts()
    has_removed_registration = False
    # If another launcher stays, the program stays, too, and needs the registrations.
    if not os.path.lexists(paths.program):
        for each in sessions:
            if each.client.is_official and remove_registration(each):
                has_removed_registration = True
    if not removed:
        if not has_removed_registration:
            session.notify("info", "Not installed; nothing to do.")
        return
    if paths.plugin in removed:
        session.notify("info", RESTART_CODE_PUPPY)
    for each in sessions:
        if os.path.lexists(each.token_file.path):
            session.notify("info", f"Your sign-in stays in {each.token_file.path}")
    session.notify("info", "If you added lines for it to your shell's profile, remove them.")


def remove_installation(paths: InstallPaths, session: Session, options: Namespace) -> List[str]:
    """Remove the installation, and return the paths of the files that were there.

    With --bin, if there are other launchers of the same program, only that launcher is removed.
    Raises OSError and OAuthError.
    """
    places = (paths.launcher, paths.program, paths.record, paths.plugin)
    if not any(os.path.lexists(path) for path in places):
        return []
    plugins = os.path.dirname(paths.plugin_directory)
    directories = {paths.directory, paths.plugin_directory, plugins}
    with locked_directory(paths, session.settings.lock_timeout, directories):
        recorded = recorded_paths(paths)
        # These are launchers as well as directories. Only empty directories will be removed at the
        # end of the block.
        directories.update(recorded)
        others = [path for path in sorted(recorded) if is_other_launcher(path, paths)]
        files = [paths.launcher]
        if not (options.bin and others):
            files += [*others, paths.program, paths.program + KEPT_SUFFIX, paths.record]
            if not options.no_code_puppy:
                files += [paths.plugin, paths.plugin + KEPT_SUFFIX]
        # This raises StorageError for a file that isn't ours, before anything is removed.
        removed = [path for path in files if paths.content(path)]
        for path in files:
            remove_file(path)
            if path in removed and path != paths.record:
                session.notify("done", f"Removed {path}")
    return removed


def is_other_launcher(path: str, paths: InstallPaths) -> bool:
    """Whether `path` is a launcher of the same program, other than `paths.launcher`."""
    # One of the paths may lead through a symbolic link.
    if os.path.realpath(path) == os.path.realpath(paths.launcher):
        return False
    with contextlib.suppress(StorageError):
        directory = launched_directory(paths.content(path), paths.environ)
        return directory is not None and os.path.samefile(directory, paths.directory)
    return False


def remove_registration(official: Session) -> bool:
    """Remove the registration of the official sign-in, and return whether there was one.

    The sign-in itself stays. Raises StorageError.
    """
    # A broken token file may hold a sign-in, so it stays.
    with contextlib.suppress(StorageError):
        move_registration(official)
    file = official.registration_file
    was_there = os.path.lexists(file.path)
    if was_there:
        with file.lock():
            file.remove()
        official.notify("done", f"Removed {file.path}")
    # This doesn't wait. If a sign-in is running, it holds the lock, and the lock's file stays.
    with contextlib.suppress(OSError, UnavailableError):
        lock = acquire_lock(file.lock_path, time.monotonic())
        remove_lock_file(lock, file.lock_path)
    return was_there


def remove_file(path: str) -> None:
    """Remove the file at `path`, its temporary file and its compiled code. May raise OSError."""
    # An `install` that was killed leaves its temporary file.
    for each in (path, path + TEMPORARY_SUFFIX):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(each)
    if path.endswith(".py"):
        remove_compiled_code(path)
        # The directory may be missing, or hold the compiled code of other files.
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(os.path.dirname(path), "__pycache__"))


def remove_compiled_code(path: str) -> None:
    """Remove the compiled code of the file at `path`. May raise OSError."""
    import pathlib

    file = pathlib.Path(path)
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        # Another process that compiles the program may just have renamed its temporary file.
        with contextlib.suppress(FileNotFoundError):
            compiled.unlink()


# ---------------------------------------------------------------------------------------------
# Prompts: requests to the models that a ChatGPT plan pays for
# ---------------------------------------------------------------------------------------------
# Code Puppy sends the prompts. This room and the next one call it the host, and version numbers are
# those of its releases. This room turns the host's requests into ones that OpenAI accepts, chooses
# their tokens and checks the responses. It gets the classes of pydantic-ai that it extends as
# arguments, and uses nothing else of the host.
#
# An answer is complete only after the event `response.completed`. If OpenAI refuses a prompt for
# good, the prompt ends with one message. After any other failure, the host repeats the request. It
# wouldn't do so after a failure in the middle of an answer, so we report that as a 503.

# A prompt that waits longer than this for a refresh shows a message.
SILENT_WAIT = 2.0  # seconds
# After a failed refresh, prompts use the access token for this long, if it is still valid, before
# one of them tries again.
REFRESH_PAUSE = 30.0  # seconds
# The fields that the API refuses when a ChatGPT plan pays (developers.openai.com/siwc).
PLAN_REFUSED_FIELDS = (
    "background",
    "conversation",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "moderation",
    "multi_agent",
    "previous_response_id",
    "prompt",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "temperature",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
)
# Web search is the only tool hosted by OpenAI that a plan pays for.
PLAN_TOOLS = ("function", "web_search")


def plan_request(body: Fields) -> Fields:
    """Return `body` (POST /v1/responses) in the form that the API accepts when a plan pays."""
    kept = {name: value for name, value in body.items() if name not in PLAN_REFUSED_FIELDS}
    items = [
        {**item, "role": "developer"} if item.get("role") == "system" else item
        for item in kept.get("input", [])
    ]
    tools = [tool for tool in kept.pop("tools", None) or [] if tool.get("type") in PLAN_TOOLS]
    if not takes_flat_tools(str(kept.get("model"))):
        functions = [tool for tool in tools if tool["type"] == "function"]
        tools = [tool for tool in tools if tool["type"] != "function"]
        if functions:
            item = {"type": "additional_tools", "role": "developer", "tools": functions}
            items.insert(0, item)
    if tools:
        kept["tools"] = tools
    # The API refuses a tool_choice that names a function.
    if isinstance(kept.get("tool_choice"), dict):
        kept["tool_choice"] = "auto"
    return {**kept, "input": items, "store": False, "stream": True}


def takes_flat_tools(model: str) -> bool:
    """Whether a model takes function tools in the field `tools`, as those up to gpt-5.5 do.

    Later ones take them in an input item of the type `additional_tools`.
    """
    version = re.match(r"gpt-([0-9]+)(?:\.([0-9]+))?", model)
    if version:
        return (int(version[1]), int(version[2] or 0)) <= (5, 5)
    # o1, o3 and o4-mini are older than gpt-5.
    return re.match("o[0-9]", model) is not None


async def shape_request(request: Any) -> None:
    """Rewrite a request so that the plan pays for it (an event hook of the host's HTTP client)."""
    if request.method == "POST":
        body = json.dumps(plan_request(json.loads(request.content))).encode()
        request.stream = http_library(request).ByteStream(body)
        request.headers["Content-Length"] = str(len(body))


async def check_response(response: Any) -> None:
    """Make the stream of a response raise ResponseError unless it ends well (an event hook)."""
    is_encoded = "content-encoding" in response.headers
    if response.status_code == 200 and response.request.method == "POST" and not is_encoded:
        response.stream = checked_stream(response.stream, http_library(response))


def http_library(message: Any) -> Any:
    """Return the module of the host's HTTP client: httpx, or httpx2 since 0.0.800."""
    return sys.modules[type(message).__module__.partition(".")[0]]


def checked_stream(source: Any, library: Any) -> Any:
    """Return a stream with the bytes of `source` that raises ResponseError unless it ends well.

    The bytes are server-sent events. The openai package raises its own error for some failures, and
    pydantic-ai 2.51 silently ignores others, so they are found here, before either sees them.
    """

    class CheckedStream(library.AsyncByteStream):  # type: ignore[misc]
        async def __aiter__(self) -> Any:
            unfinished, is_complete = b"", False
            async for chunk in source:
                *lines, unfinished = (unfinished + chunk).split(b"\n")
                for line in lines:
                    # Nothing after the completion matters, not even a failure.
                    if not is_complete:
                        is_complete = check_event_line(line)
                yield chunk
            if not is_complete and not check_event_line(unfinished):
                raise ResponseError({}, "the connection ended early")

        async def aclose(self) -> None:
            await source.aclose()

    return CheckedStream()


def check_event_line(line: bytes) -> bool:
    """Return whether a line of the event stream completes the response.

    Raises ResponseError if the line reports a failure.
    """
    if not line.startswith(b"data:"):
        return False
    data = line[len(b"data:") :].strip()
    if data == b"[DONE]":
        raise ResponseError({}, "the answer ended early")
    # Most events are parts of the answer, and parsing each one would cost time.
    if b'"error"' not in data and b'"response.' not in data:
        return False
    try:
        event = json.loads(data)
    except ValueError:
        return False
    if not isinstance(event, dict):
        return False
    kind, response = event.get("type"), event.get("response")
    response = response if isinstance(response, dict) else {}
    if kind == "error":
        nested = event.get("error")
        raise ResponseError(nested if isinstance(nested, dict) else event)
    if kind == "response.failed":
        raise ResponseError(response.get("error"))
    if kind == "response.incomplete":
        details = response.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        raise ResponseError({"code": reason}, is_final=True)
    return kind == "response.completed"


class ResponseError(Exception):
    """The failure of a response that had begun well. `fields` are the server's error object.

    If it `is_final`, repeating the request wouldn't help.
    """

    def __init__(self, fields: object, text: str = "", is_final: bool = False) -> None:
        self.fields = fields if isinstance(fields, dict) else {}
        reason = text or self.fields.get("message") or self.fields.get("code") or "no reason given"
        self.reason = printable(str(reason))
        self.is_final = is_final
        super().__init__(self.reason)


# Regular expressions for the codes with which OpenAI refuses a prompt for good, each with a message
# and a hint. The first one that is found in the code is used.
PLAN_REFUSALS = {
    "workplace_individual_usage_limit": (
        "your workspace's usage limit for you is reached",
        "ask your workspace administrator",
    ),
    "usage_limit": ("your ChatGPT plan's usage limit is reached", f"see {USAGE_PAGE}"),
    "usage_not_included": ("your ChatGPT plan does not include this model", "choose another model"),
    "credits_depleted|insufficient_quota": (
        "your account has no credits left",
        f"see {USAGE_PAGE}",
    ),
    "context_length": (
        "the conversation is too long for this model",
        "to shorten it, type /compact; to start a new one, type /clear",
    ),
    "user_not_eligible": (
        "OpenAI does not let this ChatGPT plan pay for requests here",
        "choose another model",
    ),
    "route_not_supported|unsupported_capability": (
        "OpenAI does not let a plan pay for this request",
        "choose another model",
    ),
    "usage_unavailable": ("OpenAI cannot check your plan's usage now", "try again later"),
    "user_unavailable": ("OpenAI cannot use your plan now", "try again later"),
    "invalid_prompt|policy": ("OpenAI refused this prompt", "rephrase it"),
    "content_filter": (
        "the answer is incomplete: OpenAI's content filter ended it",
        "rephrase the prompt",
    ),
    "max_output_tokens": (
        "the answer is incomplete: it reached the maximum length",
        "ask for the rest, or for less at a time",
    ),
}


def plan_refusal(status: int, fault: object, sign_in_command: str) -> Optional[OAuthError]:
    """Return the error for a refusal that is final, or None if the host should repeat the request.

    `status` is the response's, 0 if the failure came after the answer had begun. `fault` is the
    server's error object, or the text of the response if there is no such object.
    """
    fields = fault if isinstance(fault, dict) else {"message": fault}
    code = str(fields.get("code") or fields.get("type") or "").lower()
    reason = text_or_none(fields.get("message")) or text_or_none(fields.get("detail")) or ""
    if "exceeds the context window" in reason:
        code = "context_length"
    # For a model that the account doesn't have, the Codex backend gives no code.
    if "model is not supported" in reason:
        code = "usage_not_included"
    for pattern, (text, hint) in PLAN_REFUSALS.items():
        if re.search(pattern, code):
            return OAuthError(text + reset_note(fields), hint)
    if "scope_not_authorized" in code:
        return plan_not_allowed_error()
    must_sign_in = "invalid_user" in code or "invalid_authorization_context" in code
    if must_sign_in or (status == 401 and not is_web_page(reason)):
        return SignInEndedError("OpenAI does not accept this sign-in any more", sign_in_command)
    # 408, 409, 425 and 429 ask for another try.
    if not 400 <= status < 500 or status in (408, 409, 425, 429):
        return None
    if not reason or is_web_page(reason):
        reason = f"HTTP {status}"
    error = OAuthError(f"OpenAI refused this request ({reason})")
    if status == 403:
        error.set_default_hint("status --online", "to see what it says about this sign-in, run")
    return error


def is_web_page(body: object) -> bool:
    """Whether the body of a failed response is a web page, which comes from a proxy."""
    return isinstance(body, str) and body.lstrip().startswith("<")


def reset_note(fields: Fields) -> str:
    """Return when a usage limit resets, as the end of a message, or "" if that is unknown."""
    when = reset_time(fields, "resets_at", "resets_in_seconds")
    return "" if when is None else f"; it resets {distance(timestamp(when))} ({timestamp(when)})"


class Prompts:
    """The state that all plan models share: how messages are shown, and which tokens were refused.

    `stop` shows an error and returns the exception that ends a prompt.
    """

    def __init__(self, notify: Notify, stop: Callable[[OAuthError], Exception]) -> None:
        self.notify, self.stop = notify, stop
        # The access tokens that were answered with 401. They aren't sent again.
        self.refused_tokens: Set[str] = set()
        # The token files of the sign-ins whose token was refused although it was a new one.
        self.refused_files: Set[str] = set()
        # The time.monotonic() at which an access token whose refresh failed may be refreshed again.
        self.refresh_times: Dict[str, float] = {}
        # The access tokens whose failed refresh has been reported.
        self.reported_tokens: Set[str] = set()

    def report_success(self, token_file: str, token: str, messages: List[Tuple[str, ...]]) -> None:
        """Record that an access token was accepted. Show `messages` about a failed refresh once."""
        self.refused_files.discard(token_file)
        if messages and token not in self.reported_tokens:
            self.reported_tokens.add(token)
            for message in messages:
                self.notify(*message)


class PlanAccess:
    """The headers for one plan model's requests, and the exceptions for their failures.

    `name` is the name of the model's entry, `official` is whether the official sign-in provides its
    tokens, and `account` is the name of the account.
    """

    def __init__(self, prompts: Prompts, name: str, official: bool, account: str) -> None:
        self.prompts, self.name, self.official, self.account = prompts, name, official, account

    def program_headers(self) -> Dict[str, str]:
        """Return the headers that name the program. Raises UsageError."""
        # A compressed answer can't be checked while it arrives.
        headers = {"Accept-Encoding": "identity", "User-Agent": f"chatgpt_oauth/{__version__}"}
        if not self.official:
            version = Settings(self.account).codex_client_version
            # The Codex backend serves newer models only to the Codex CLI, which sends these two.
            headers.update({"originator": "codex_cli_rs", "User-Agent": f"codex_cli_rs/{version}"})
        return headers

    def model_settings(self, settings: Optional[Fields]) -> Fields:
        settings = dict(settings or {})
        # The host's command /model_settings offers these two for our type of model, but the host
        # sends them only for its own type (0.0.946).
        if self.official:
            settings.setdefault("openai_reasoning_summary", settings.get("summary", "auto"))
            settings.setdefault("openai_text_verbosity", settings.get("verbosity", "medium"))
        return settings

    def open_session(self, notify: Notify) -> Session:
        """Return the session that has the tokens. Raises OAuthError."""
        session = Session(Settings(self.account), notify)
        return session.official_session() if self.official else session

    async def authorize(self, session: Session) -> Tuple[Tokens, bool]:
        """Return tokens for a request, and whether they replace tokens that were refused.

        Raises OAuthError.
        """
        import asyncio

        loop = asyncio.get_running_loop()
        waiting = loop.run_in_executor(None, self._authorize, session)
        await asyncio.wait({waiting}, timeout=SILENT_WAIT)
        if not waiting.done():
            self.prompts.notify("info", "Waiting for OpenAI to refresh the sign-in...")
        return await waiting

    def _authorize(self, session: Session) -> Tuple[Tokens, bool]:
        stored = session.tokens()
        refresh_times = self.prompts.refresh_times
        was_refused = stored.access_token in self.prompts.refused_tokens
        is_paused = time.monotonic() < refresh_times.get(stored.access_token, 0)
        if was_refused:
            tokens = session.refresh_after_401(stored.access_token)
        elif is_paused and stored.valid_for(0):
            tokens = stored
        else:
            tokens = session.valid_tokens()
            # If a refresh fails, valid_tokens returns the stored token while it is still valid.
            if tokens.access_token == stored.access_token and not tokens.is_fresh():
                refresh_times[tokens.access_token] = time.monotonic() + REFRESH_PAUSE
        if not session.client.can_use_plan(tokens.fields):
            raise plan_not_allowed_error()
        return tokens, was_refused

    def headers(self, tokens: Tokens) -> Dict[str, str]:
        """Return the headers with which the plan pays for a request."""
        headers = {"Authorization": f"Bearer {tokens.access_token}"}
        return headers if self.official else {**headers, **account_headers(tokens)}

    def record_refusal(self, session: Session, tokens: Tokens, is_replacement: bool) -> bool:
        """Record that `tokens` were answered with 401, and return whether to try other ones.

        If they replaced refused tokens (`is_replacement`), no refresh will help, so none is tried
        at later prompts either. Without this rule, several processes would refresh in turns.
        """
        path = session.token_file.path
        if is_replacement:
            self.prompts.refused_files.add(path)
        if path in self.prompts.refused_files:
            return False
        self.prompts.refused_tokens.add(tokens.access_token)
        return True

    def host_exception(self, error: Any, http_error: Any) -> Optional[Exception]:
        """Return what to raise in the host instead of `error`, or None to raise `error` itself.

        `error` is an OAuthError, a ResponseError or an `http_error`, which is the host's class of
        errors for failed requests.
        """
        sign_in_command = (OfficialClient if self.official else Client).sign_in_command
        if isinstance(error, OAuthError):
            return self.stopped(error)
        if not isinstance(error, ResponseError):
            refusal = plan_refusal(error.status_code, error.body, sign_in_command)
            return self.stopped(refusal) if refusal else None
        refusal = plan_refusal(0, error.fields, sign_in_command)
        text = f"the answer is incomplete: {error.reason}"
        if refusal or error.is_final:
            return self.stopped(refusal or OAuthError(text))
        self.prompts.notify("warning", text)
        # The host repeats a request after this status, as often as its settings say.
        repeatable: Exception = http_error(503, self.name, {"message": error.reason})
        return repeatable

    def stopped(self, error: OAuthError) -> Exception:
        error.command = with_account(error.command, self.account)
        return self.prompts.stop(error)


def plan_model_class(base: Any, http_error: Any, access: PlanAccess) -> Any:
    """Return a subclass of `base` (OpenAIResponsesModel) whose requests a plan pays for.

    The built-in plugin's model gets one access token when it is built, and every request is refused
    once that has expired (0.0.946). This one asks for a valid token before each request, and after
    a 401 it tries once more with another token.
    """

    class PlanModel(base):  # type: ignore[misc]
        async def request(self, *arguments: Any, **options: Any) -> Any:
            async with self.request_stream(*arguments, **options) as stream:
                async for _ in stream:
                    pass
                return stream.get()

        @contextlib.asynccontextmanager
        async def request_stream(
            self, messages: Any, model_settings: Any, *rest: Any, **options: Any
        ) -> Any:
            settings = access.model_settings(model_settings)
            host_exception = None
            try:
                async with contextlib.AsyncExitStack() as stack:
                    yield await self._open_stream(stack, messages, settings, *rest, **options)
            except (OAuthError, ResponseError, http_error) as error:
                host_exception = access.host_exception(error, http_error)
                if host_exception is None:
                    raise
            # Raised outside of the `except`, because the host repeats a request if any exception in
            # the chain of contexts is a 429.
            if host_exception is not None:
                raise host_exception

        async def _open_stream(
            self, stack: Any, messages: Any, settings: Fields, *rest: Any, **options: Any
        ) -> Any:
            refresh_messages: List[Tuple[str, ...]] = []
            session = access.open_session(lambda *message: refresh_messages.append(message))
            is_replacement = False
            while True:
                tokens, replaces_refused = await access.authorize(session)
                is_replacement = is_replacement or replaces_refused
                settings = {**settings, "extra_headers": access.headers(tokens)}
                opening = super().request_stream(messages, settings, *rest, **options)
                try:
                    response = await stack.enter_async_context(opening)
                except http_error as error:
                    if error.status_code != 401 or is_web_page(error.body):
                        raise
                    if not access.record_refusal(session, tokens, is_replacement):
                        raise
                    is_replacement = True
                    # The messages may say that the token is still valid, which is wrong after a
                    # 401. The refresh that follows adds its own.
                    refresh_messages.clear()
                else:
                    path, token = session.token_file.path, tokens.access_token
                    access.prompts.report_success(path, token, refresh_messages)
                    return response

    return PlanModel


def refusing_model(base: Any, name: str, refusal: Callable[[], Exception]) -> Any:
    """Return a model that raises `refusal()` at each request. `base` is the host's class Model."""

    class RefusingModel(base):  # type: ignore[misc]
        model_name, system = name, "openai"

        async def request(self, *_: Any, **__: Any) -> Any:
            raise refusal()

        @contextlib.asynccontextmanager
        async def request_stream(self, *_: Any, **__: Any) -> Any:
            raise refusal()
            # This makes it an async generator, which asynccontextmanager requires.
            yield

    return RefusingModel()


class PromptEnded(getattr(builtins, "ExceptionGroup", Exception)):  # type: ignore[misc]
    """The end of a prompt without another try and without a traceback.

    The host prints a traceback for every exception except InterruptedError. It catches that one
    with `except*`, which gives it a group of exceptions, and prints the group's text (0.0.229 to
    0.0.946). This is such a group, without the "(1 sub-exception)" that ExceptionGroup adds to its
    text. Both ExceptionGroup and the host need Python 3.11. On an older Python, this class only has
    to exist.
    """

    def __str__(self) -> str:
        return str(self.args[0])

    def derive(self, members: Any) -> Any:
        """Return the group that `except*` catches, whose text the host prints below our message."""
        return PromptEnded("see the error above", members)

    def __reduce__(self) -> Any:
        # The host's DBOS plugin pickles exceptions, and may not find this class when it loads them.
        return InterruptedError, (str(self),)


# ---------------------------------------------------------------------------------------------
# Code Puppy: the commands and the plan's models inside Code Puppy
# ---------------------------------------------------------------------------------------------
# Code Puppy's own ChatGPT plugin is "the built-in one" here. We register our callbacks, then
# unregister the built-in's for the same phases (kinds of callbacks, see code_puppy/callbacks.py)
# and keep them for what we don't do, such as /codex-imagegen. `CodePuppy` contains everything that
# touches the host, `CodePuppyPlugin` what we do there. No exception of ours reaches the host,
# except from a request to a plan model.

# Two threads of the host display its messages. The pause lets one finish before the next begins.
MESSAGE_PAUSE = 0.05  # seconds
# The built-in plugin, by its name (the owner of its callbacks) and by its modules' names. It moved
# to a package of its own between 0.0.700 and 0.0.800.
BUILTIN_OWNER = "chatgpt_oauth"
BUILTIN_MODULES = ("code_puppy_core_plugins.chatgpt_oauth", "code_puppy.plugins.chatgpt_oauth")
# The types of model entries that a ChatGPT plan pays for.
PLAN_TYPES = (Client.model_type, OfficialClient.model_type)
PLUGIN_COMMANDS = {
    "chatgpt-auth": "Sign in with ChatGPT and import its models (--device, --official, see --help)",
    "chatgpt-status": "Show the ChatGPT account and the imported models",
    "chatgpt-logout": "Sign out of ChatGPT and remove its models",
    "codex-auth": "The same as /chatgpt-auth",
    "codex-status": "The same as /chatgpt-status",
    "codex-logout": "The same as /chatgpt-logout",
    "models": "List the models that Code Puppy can use",
}


def host_module(name: str) -> Any:
    """Import and return a module that exists only inside the host."""
    import importlib

    return importlib.import_module(name)


def has_module(name: str) -> bool:
    """Whether this release of the host has the module `name`."""
    with contextlib.suppress(ImportError):
        return bool(host_module(name))
    return False


def no_plan_models_error(consequence: str = "") -> OAuthError:
    text = "this release of Code Puppy cannot use models that a ChatGPT plan pays for" + consequence
    return OAuthError(text, "to use them, update it: pip install --upgrade code-puppy")


class CodePuppy:
    """The host: everything that reads or changes it."""

    def __init__(self) -> None:
        self.callbacks = host_module("code_puppy.callbacks")
        self.config = host_module("code_puppy.config")
        arguments = sys.argv[1:]
        # An editor started the host and reads JSON-RPC from its standard output.
        self.in_editor = "--acp" in arguments
        # With these options, nobody can type a command at a prompt.
        without_prompt = re.compile(r"-p.*|--prompt(=.*)?|--setup")
        self.has_prompt = not any(map(without_prompt.fullmatch, arguments))
        # 0.0.229 has no models that a plan can pay for.
        self.has_plan_models = has_module("code_puppy.chatgpt_codex_client")

    def emit(self, kind: str, text: str) -> None:
        """Show `text` (kinds as in Terminal.notify)."""
        messaging = host_module("code_puppy.messaging")
        # The host would interpret a plain string as markup.
        plain = host_module("rich.text").Text(text)
        name = {"done": "success", "warning": "warning", "error": "error"}.get(kind, "info")
        getattr(messaging, "emit_" + name)(plain)
        time.sleep(MESSAGE_PAUSE)

    def take_over(self, ours: Dict[str, AnyCallable]) -> Optional[Dict[str, List[AnyCallable]]]:
        """Register our callbacks and unregister the built-in plugin's for the same phases.

        `ours` has one callback for each phase. Returns the built-in's callbacks by phase, without
        those that are disabled. Returns None if our plugin is disabled, and raises an exception if
        this release of the host doesn't have a function that is needed here. In both cases, the
        built-in's callbacks stay registered, and `is_active` makes ours leave everything to them.
        """
        for phase, callback in ours.items():
            self.callbacks.register_callback(phase, callback)
        builtin, enabled_builtin = {}, {}
        for phase, callback in ours.items():
            enabled = self.callbacks.get_callbacks(phase)
            if callback not in enabled:
                return None
            others = [each for each in self._all_callbacks(phase) if each != callback]
            builtin[phase] = [each for each in others if self._is_builtin(each)]
            enabled_builtin[phase] = [each for each in builtin[phase] if each in enabled]
        for phase, callbacks in builtin.items():
            for each in callbacks:
                self.callbacks.unregister_callback(phase, each)
        return enabled_builtin

    def _all_callbacks(self, phase: str) -> List[AnyCallable]:
        try:
            return list(self.callbacks.get_callbacks(phase, include_disabled=True))
        except TypeError:
            # Releases up to 0.0.500 can't disable plugins.
            return list(self.callbacks.get_callbacks(phase))

    def _is_builtin(self, callback: AnyCallable) -> bool:
        # Releases up to 0.0.500 can't tell which plugin owns a callback.
        owner_of = getattr(self.callbacks, "get_callback_owner", lambda _: None)
        module = str(getattr(callback, "__module__", ""))
        return owner_of(callback) == BUILTIN_OWNER or module.startswith(BUILTIN_MODULES)

    def how_to_remove_override(self, name: str, value: Optional[str]) -> str:
        """Return how to remove the host's setting `name`, or "" if it doesn't override `value`.

        A value that was stored with /set overrides the environment. 0.0.229 reads only the
        environment.
        """
        if not hasattr(host_module("code_puppy.model_factory"), "get_api_key"):
            return ""
        if self.config.get_value(name.lower()) in (None, "", value):
            return ""
        # Releases with this module (0.0.848 and 0.0.946, for example) refuse to set an empty key,
        # so the key must be removed with --setup.
        if has_module("code_puppy.shared_credentials"):
            return f"to remove that setting, run: code-puppy --setup auth logout {name}"
        return f"to remove that setting, type: /set {name.lower()}="

    def suppresses_browser(self) -> bool:
        """Whether the host asks not to open a browser. 0.0.229 never does."""
        common = host_module("code_puppy.tools.common")
        return bool(getattr(common, "should_suppress_browser", lambda: False)())

    def model_names(self) -> List[str]:
        """Return the names of all models that /model can choose."""
        return list(host_module("code_puppy.model_factory").ModelFactory.load_config())

    def model_in_use(self) -> Optional[str]:
        """Return the name of the model that the next prompt will use."""
        return text_or_none(self.config.get_global_model_name())

    def chosen_model(self) -> Optional[str]:
        """Return the name of the model that the person chose. It may not exist any more."""
        return text_or_none(self.config.get_value("model"))

    def reload_model(self) -> None:
        """Make the current agent build its model again, with the current API key."""
        # If the model is gone, the host chooses another one and shows which. A failure shows at the
        # next prompt.
        with contextlib.suppress(Exception):
            self.config.clear_model_cache()
            host_module("code_puppy.agents").get_current_agent().reload_code_generation_agent()

    def plan_model(self, name: str, entry: Fields, access: PlanAccess) -> Any:
        endpoint = entry["custom_endpoint"]
        request_hooks = [shape_request] if access.official else []
        # This client changes each request into a form that the Codex backend understands. It
        # overwrites the User-Agent of a request, so the headers that name the program belong here.
        http_client = host_module("code_puppy.chatgpt_codex_client").create_codex_async_client(
            headers={**access.program_headers(), **endpoint.get("headers", {})},
            verify=host_module("code_puppy.http_utils").get_cert_bundle_path(),
            event_hooks={"request": request_hooks, "response": [check_response]},
        )
        client = host_module("openai").AsyncOpenAI(
            api_key="replaced-by-PlanAccess",
            # The entry may have been edited, and the access token goes to this URL.
            base_url=URL_RULE.check(f"the custom_endpoint of {name}", endpoint["url"]),
            # The host repeats failed requests itself.
            max_retries=0,
            http_client=http_client,
        )
        provider = host_module("pydantic_ai.providers.openai").OpenAIProvider(openai_client=client)
        http_error = host_module("pydantic_ai.exceptions").ModelHTTPError
        base = host_module("pydantic_ai.models.openai").OpenAIResponsesModel
        model = plan_model_class(base, http_error, access)
        return model(entry["name"], provider=provider, profile=self._profile(name, entry))

    def adapt(self) -> None:
        """Adjust our configuration to this release of Code Puppy."""
        # 0.0.229 has no DATA_DIR and ignores XDG_DATA_HOME.
        home = getattr(self.config, "DATA_DIR", None) or self.config.CONFIG_DIR
        CHATGPT_OAUTH_CONFIG["home"] = CHATGPT_OAUTH_CONFIG["home"] or str(home)
        if not self.has_responses_type():
            CHATGPT_OAUTH_CONFIG["chat_patterns"] = "*"

    # Names of the host that aren't public ---------------------------------------------------
    # Each method says in which releases the name exists, and what is lost without it.

    def has_responses_type(self) -> bool:
        """Whether a model's entry can have the type `custom_openai_responses`.

        0.0.700 to 0.0.946: _CUSTOM_OPENAI_MODEL_TYPES contains the types with a custom endpoint,
        and releases up to 0.0.598 lack this one. Without the name, our entries get an older type.
        """
        factory = host_module("code_puppy.model_factory")
        return RESPONSES_TYPE in getattr(factory, "_CUSTOM_OPENAI_MODEL_TYPES", ())

    def _profile(self, name: str, entry: Fields) -> Any:
        """Return a model's profile, which says what the model can do, or None.

        0.0.598 to 0.0.946: _thinking_tags_profile. pydantic-ai doesn't know the newest models, and
        without the host's profile it throws away their encrypted reasoning after each turn. Without
        the name, pydantic-ai's own profile is used, and a line says so.
        """
        try:
            return host_module("code_puppy.model_factory")._thinking_tags_profile(name, entry)
        except Exception:
            self.emit("info", f"{name} may forget its reasoning after each answer in this release")
            return None

    def is_answering(self) -> bool:
        """Whether a prompt is being answered while a command runs.

        0.0.700 to 0.0.946: the host pauses the answer for the command. Without the name, a sign-in
        during an answer delays that answer until the sign-in ends.
        """
        with contextlib.suppress(Exception):
            pausing = host_module("code_puppy.messaging.pause_controller").get_pause_controller()
            return bool(pausing.is_paused())
        return False


class CodePuppyPlugin:
    """The plugin: runs our commands inside the host and shows their output as its messages.

    `parse` is main's reader for the options of a command.
    """

    def __init__(self, parse: AnyCallable) -> None:
        self.host, self.parse = CodePuppy(), parse
        # Whether our callbacks are in use. Otherwise everything is left to the built-in plugin.
        self.is_active = False
        # The built-in plugin's callbacks by phase.
        self.builtin: Dict[str, List[AnyCallable]] = {}
        # The API keys that this plugin has exported, by variable.
        self.exported: Dict[str, Optional[str]] = {}
        self.prompts = Prompts(self.notify, self.stop_prompt)

    def register(self) -> None:
        """Register our commands and models in place of the built-in plugin's.

        Whether our plugin is enabled is decided here, once. The host asks for a restart when a
        person enables or disables a plugin.
        """
        ours: Dict[str, AnyCallable] = {
            "custom_command": self.on_command,
            "custom_command_help": self.on_help,
        }
        if self.host.has_plan_models:
            ours["register_model_type"] = self.model_types
        try:
            self.host.adapt()
            builtin = self.host.take_over(ours)
        except Exception as error:
            to_log("info", f"Code Puppy: {type(error).__name__}: {error}")
            with contextlib.suppress(Exception):
                text = "chatgpt_oauth does not fit this release of Code Puppy, whose own commands"
                self.notify("warning", f"{text} for ChatGPT are used instead")
            return
        if builtin is not None:
            self.is_active, self.builtin = True, builtin
            with contextlib.suppress(Exception):
                self.export_at_start()
                self.replace_unknown_types()
                self.host.callbacks.register_callback("startup", self.on_startup)

    # Callbacks ------------------------------------------------------------------------------

    def on_command(self, command: str, name: str) -> Any:
        """Run one of our commands and return True. Leave any other to the built-in plugin."""
        if not self.is_active:
            return None
        if name not in PLUGIN_COMMANDS:
            return self._run_builtin(command, name)
        import signal

        try:
            with contextlib.ExitStack() as stack:
                # Only the main thread may set a handler, and only it receives Ctrl-C.
                with contextlib.suppress(ValueError):
                    # The host ignores Ctrl-C. While we wait, it must interrupt the command.
                    before = signal.signal(signal.SIGINT, signal.default_int_handler)
                    # signal.signal returns None for a handler that wasn't set from Python. Python
                    # can't restore such a handler.
                    stack.callback(signal.signal, signal.SIGINT, before or signal.SIG_DFL)
                # /chatgpt-auth and /codex-auth both mean `auth`.
                self._run(name.rpartition("-")[2], command)
        except OAuthError as error:
            report_error(self.notify, error)
        except KeyboardInterrupt:
            # The line break keeps the text off the line on which the terminal has echoed ^C.
            self.notify("warning", "\nInterrupted.")
        return True

    def _run_builtin(self, command: str, name: str) -> Any:
        if name in map(command_name, self._builtin_help()):
            # The built-in plugin would refresh an expired token without a lock.
            with contextlib.suppress(OAuthError):
                Session(Settings(""), self.notify).valid_tokens()
        for callback in self.builtin["custom_command"]:
            result = callback(command=command, name=name)
            if result is not None:
                return result
        return None

    def on_startup(self) -> None:
        """Warn if the model that the person chose is gone. The host silently uses another one."""
        with contextlib.suppress(Exception):
            session = Session(Settings(""), self.notify)
            self._report_models(session, self.host.chosen_model())

    def on_help(self) -> List[Tuple[str, str]]:
        """Return the names and descriptions of our commands, and of the built-in's others."""
        if not self.is_active:
            return []
        return [*PLUGIN_COMMANDS.items(), *self._builtin_help()]

    def _builtin_help(self) -> List[Any]:
        entries = self._builtin_results("custom_command_help")
        return [entry for entry in entries if command_name(entry) not in PLUGIN_COMMANDS]

    def _builtin_results(self, phase: str) -> List[Any]:
        """Return the items in the lists that the built-in plugin's callbacks return."""
        return [item for callback in self.builtin[phase] for item in callback() or []]

    def model_types(self) -> List[Fields]:
        """Return the types of models that we build, and the built-in's others."""
        if not self.is_active:
            return []
        types = self._builtin_results("register_model_type")
        others = [each for each in types if each.get("type") not in PLAN_TYPES]
        return [{"type": kind, "handler": self.plan_model} for kind in PLAN_TYPES] + others

    def plan_model(self, name: str, entry: Fields, _: Fields) -> Any:
        """Return the model for an entry that the plan pays for.

        This must not fail, because the host would silently use another model, which may be billed
        to another account.
        """
        official = entry.get("type") == OfficialClient.model_type
        access = PlanAccess(self.prompts, name, official, str(entry.get("account") or ""))
        try:
            return self.host.plan_model(name, entry, access)
        except UsageError as error:
            refusal: OAuthError = error
        except Exception as error:
            fault = "its entry is incomplete" if isinstance(error, KeyError) else str(error)
            text = f"the model {name} cannot be used here ({fault})"
            refusal = OAuthError(text, "to import the models again, run", "models")
        base = host_module("pydantic_ai.models").Model
        return refusing_model(base, name, lambda: access.stopped(refusal))

    # Prompts --------------------------------------------------------------------------------

    def stop_prompt(self, error: OAuthError) -> Exception:
        """Show `error` and return an exception that ends the prompt."""
        if not self.host.in_editor:
            report_error(self.notify, error)
            return PromptEnded(str(error), [InterruptedError(str(error))])
        # An editor shows the text of an exception, and nothing else.
        hint = hint_text(error, self.typed)
        return RuntimeError(f"{error} ({hint})" if hint else str(error))

    # The API key ----------------------------------------------------------------------------

    def export_at_start(self) -> None:
        """Export each account's API key to the host, which reads it from its environment.

        A value that the person has set stays, unless it can't be a key.
        """
        for account in Settings().account_names():
            variable, key = self._stored_key(account)
            if not can_be_api_key(os.environ.get(variable)):
                self._export(variable, key)

    def export_again(self, account: str) -> None:
        """Export the key again in case another program has changed the sign-in.

        Also report a setting of the host that overrides the key.
        """
        variable, key = self._stored_key(account)
        held = os.environ.get(variable)
        was_set_by_person = held != self.exported.get(variable)
        is_overridden = self._warn_of_override(variable, key)
        if held == key:
            return
        # Without a stored key, the person's own stays.
        if was_set_by_person and not key:
            return
        # If a setting overrides both keys, it doesn't matter which one the variable contains.
        if was_set_by_person and can_be_api_key(held) and not is_overridden:
            text = f"{variable} held another API key; this session now uses the stored one"
            self.notify("warning", text)
        self._export(variable, key)
        self.host.reload_model()

    def _warn_of_override(self, variable: str, key: Optional[str]) -> bool:
        """Warn if a setting of the host overrides the key, and return whether one does."""
        way_out = self.host.how_to_remove_override(variable, key)
        if way_out:
            text = f"the Code Puppy setting {variable.lower()} overrides this API key"
            self.notify("warning", text)
            self.notify("hint", way_out)
        return bool(way_out)

    def _export(self, variable: str, key: Optional[str]) -> None:
        """Set `variable` in the host's environment to `key`, or remove it if that is None."""
        self.exported[variable] = key
        os.environ.pop(variable, None)
        if key:
            os.environ[variable] = key

    def _stored_key(self, account: str) -> Tuple[str, Optional[str]]:
        """Return the variable for the API key, and the key or None."""
        tokens = self._stored_tokens(account)
        key = tokens.api_key if tokens else None
        return Settings(account).api_key_env_var, key

    def _stored_tokens(self, account: str) -> Optional[Tokens]:
        # `status` reports what is wrong.
        with contextlib.suppress(OAuthError):
            return Session(Settings(account), self.notify).tokens()
        return None

    def replace_unknown_types(self) -> None:
        """Replace RESPONSES_TYPE in all entries if this release doesn't have that type.

        Code Puppy's directory may have been used by a later release, or by the command line.
        """
        session = Session(Settings(""), self.notify)
        if not self.host.has_responses_type():
            with errors_as_warnings(session):
                for each in session.sessions_of_all_accounts():
                    use_chat_completions(each)

    # Commands -------------------------------------------------------------------------------

    def typed(self, command: str) -> str:
        """Return what to type for a command: at the host's prompt if possible, else in a shell."""
        if self.host.has_prompt and f"chatgpt-{command.partition(' ')[0]}" in PLUGIN_COMMANDS:
            return f"/chatgpt-{command}"
        return self._typed_in_shell(command)

    def _typed_in_shell(self, command: str) -> str:
        import shutil

        program = COMMAND if shutil.which(COMMAND) else start_command(__file__, "")
        return f"{program} {command}"

    def notify(self, kind: str, text: str, command: str = "") -> None:
        """Show `text` as a message of the host (kinds as in Terminal.notify)."""
        if kind == "command":
            text = "    " + self.typed(text)
        elif command:
            text = f"{text}: {self.typed(command)}"
        text = "\n".join(printable(line, MESSAGE_LIMIT) for line in text.splitlines())
        # The host would break a URL into lines.
        if kind == "verbatim" and not self.host.in_editor:
            print(f"\n{text}\n", flush=True)
        else:
            self.host.emit(kind, f"hint: {text}" if kind == "hint" else text)

    def _run(self, name: str, command: str) -> None:
        """Run one of our commands: `name` without its prefix, `command` as it was typed."""
        in_use = self.host.model_in_use()
        if name == "models":
            names = self.host.model_names()
            lines = [f"{each} (in use)" if each == in_use else each for each in names]
            self.notify("info", "\n".join(lines or ["There are no models."]))
            return
        arguments = [word.strip("'\"") for word in command.split()[1:]]
        options = self.parse(name, arguments, "/chatgpt-" + name)
        if options.help:
            self.notify("info", options.help)
            return
        with open_session(self.notify, options).naming_account() as session:
            if name == "status":
                self._show_status(session, options)
                if options.json:
                    return
            elif name == "auth":
                self._sign_in(session, options)
            else:
                self._sign_out(session, options)
            self._report_models(session, in_use)

    def _show_status(self, session: Session, options: Namespace) -> None:
        self.replace_unknown_types()
        self.notify("info", Status(session, self.typed, options.online).text(options.json))
        self.export_again(session.settings.account)

    def _sign_in(self, session: Session, options: Namespace) -> None:
        if options.official and not self.host.has_plan_models:
            # Nothing could use the tokens.
            raise no_plan_models_error()
        if self.host.is_answering():
            # The answer would have to wait for the sign-in.
            text = "a prompt is being answered"
            raise UsageError(text, "when the answer is complete, run", "auth")
        options.no_browser = options.no_browser or self.host.suppresses_browser()
        if self.host.in_editor and (options.device or options.no_browser):
            raise UsageError(
                "an editor shows messages only after a command has ended",
                f"to sign in, run in a terminal: {self._typed_in_shell('auth --device')}",
            )
        is_reading = sys.stdin is not None and sys.stdin.isatty()
        account = session.settings.account
        before = self._stored_tokens(account)
        try:
            sign_in_with_options(session, options, is_reading, at_prompt=True)
        finally:
            # A sign-in can fail after it has stored new tokens.
            after = self._stored_tokens(account)
            if after and (not before or before.fields != after.fields):
                self._export_and_reload(account)
        variable, key = self._stored_key(account)
        self._warn_of_override(variable, key)

    def _sign_out(self, session: Session, options: Namespace) -> None:
        try:
            command_logout(session, options)
        finally:
            self._export_and_reload(session.settings.account)

    def _export_and_reload(self, account: str) -> None:
        variable, key = self._stored_key(account)
        self._export(variable, key)
        self.host.reload_model()

    def _report_models(self, session: Session, in_use: Optional[str]) -> None:
        """Report which of our models can be used now that `in_use` may be gone."""
        entries: Dict[str, Fields] = {}
        # The commands report it if the models file can't be read.
        with contextlib.suppress(StorageError):
            entries = registered_entries(*session.all_sessions())
        types = {entry.get("type") for entry in entries.values()}
        if not self.host.has_plan_models and not types.isdisjoint(PLAN_TYPES):
            error = no_plan_models_error("; prompts to them go to another provider")
            report_error(self.notify, error, "warning")
            entries = {}
        choice = next(iter(entries), "NAME")
        was_imported = in_use is not None and in_use.startswith(session.settings.prefix)
        if was_imported and in_use not in self.host.model_names():
            self.notify("warning", f"the model in use, {in_use}, is no longer there")
            # The host chooses a model now, and shows which.
            self.host.reload_model()
            text = "Code Puppy picks a model until you choose one. That model may cost money."
            self.notify("info", text)
            self.notify("hint", f"to choose another model, type: /model {choice}")
        elif session.imported and entries:
            self.notify("info", f"To use one of the models, type: /model {choice}")


def command_name(entry: Any) -> str:
    """Return the command of an entry in the host's help, which may name its arguments, too."""
    return str(entry[0].split()[0])


def can_be_api_key(value: Optional[str]) -> bool:
    """Whether `value` can be an API key. A JWT can't, because it is an access token.

    "null" can't either. A `jq` line in a shell's profile sets that if nobody is signed in.
    """
    return value != "null" and is_b64token(value) and not decode_claims(value)


def is_plugin() -> bool:
    """Whether Code Puppy is loading this file as a plugin.

    The name of a plugin's module depends on the release. Newer ones also have a loading context
    while they load a plugin.
    """
    if __name__ == "__main__" or "code_puppy" not in sys.modules:
        return False
    loading = getattr(sys.modules.get("code_puppy.callbacks"), "get_loading_context", None)
    named = __name__.endswith("register_callbacks") or __name__.startswith("code_puppy.plugins.")
    return named or bool(loading and loading())


# ---------------------------------------------------------------------------------------------
# main: the command line
# ---------------------------------------------------------------------------------------------
# OPTIONS and COMMANDS describe the command line. Both option readers and all help texts use these
# tables. Errors become messages and exit codes here, after everything else has finished.


class Option:
    """An option of the command line, as both option readers use it.

    `summary` and `metavar` (the placeholder for the value) are shown in the help. In both, %%
    stands for a percent sign. An option without a metavar takes no value. If there is a `rule`, the
    value must match it. The values of an option that `is_repeatable` are collected in a list.
    """

    def __init__(
        self,
        summary: str,
        metavar: str = "",
        rule: Optional[Rule] = None,
        is_repeatable: bool = False,
    ) -> None:
        self.summary, self.metavar = summary, metavar
        self.rule, self.is_repeatable = rule, is_repeatable


# Defaults that the help mentions.
DEFAULT_TIMEOUT = CHATGPT_OAUTH_CONFIG["callback_timeout"]
DEFAULT_VARIABLE = CHATGPT_OAUTH_CONFIG["api_key_env_var"]

OPTIONS = {
    "--device": Option("sign in with a one-time code, in a browser on any machine"),
    "--no-browser": Option("print the URL instead of opening a browser"),
    "--timeout": Option(
        f"how long to wait for you to sign in (default: {DEFAULT_TIMEOUT}; with --device: "
        f"{DEVICE_CODE_LIFETIME:g})",
        "SECONDS",
        SECONDS_RULE,
    ),
    "--include": Option(
        "import models that match, instead of the defaults (repeatable)", "GLOB", is_repeatable=True
    ),
    "--exclude": Option("skip models that match (repeatable)", "GLOB", is_repeatable=True),
    "--source": Option(
        "api (billed to the API account), codex or official (covered by the plan), or auto (the "
        "default: api if there is an API key)",
        "NAME",
        RULES["model_source"],
    ),
    "--account": Option("use the account NAME instead of the unnamed one", "NAME", ACCOUNT_RULE),
    "--workspace": Option("sign in to this ChatGPT workspace only (its ID)", "ID", WORKSPACE_RULE),
    "--all": Option("import every model"),
    "--dry-run": Option("print the models without importing them"),
    "--json": Option("output as JSON"),
    "--online": Option(
        "also ask OpenAI whether the key and token work and how much of the plan is used"
    ),
    "--shell": Option(
        "sh (also bash, zsh, ksh, dash and others of the POSIX family), fish, csh (also tcsh), "
        "powershell, cmd, dotenv, json, or auto (the default: the one in $SHELL)",
        "NAME",
    ),
    "--name": Option(f"variable to set (default: {DEFAULT_VARIABLE})", "VAR"),
    "--access-token": Option("export the access token and account ID instead"),
    "--unset": Option("print code that unsets the variables"),
    "--refresh": Option("refresh it first, even if it is still valid"),
    "--api-key": Option("print the API key instead"),
    "--local": Option("do not revoke the tokens at OpenAI"),
    "--official": Option("only OpenAI's official sign-in (for models in Code Puppy)"),
    "--bin": Option(
        r"directory for the command (default: ~/.local/bin; on Windows "
        r"%%LOCALAPPDATA%%\Programs\chatgpt_oauth)",
        "DIR",
        new_rule(r"[^\0]+", "the path of a directory"),
    ),
    "--code-puppy": Option("include the Code Puppy plugin even if Code Puppy is not found"),
    "--no-code-puppy": Option("leave the Code Puppy plugin as it is"),
}
# Options that can't be used together.
EXCLUSIVE = (
    ("--official", "--device"),
    ("--official", "--source"),
    ("--official", "--workspace"),
    ("--refresh", "--api-key"),
    ("--json", "--api-key"),
    ("--all", "--include"),
    ("--code-puppy", "--no-code-puppy"),
)


class Command:
    """A command: its function, summary, options and examples.

    In the examples, {0} stands for the command and {1} for Python.

    `tail` describes the arguments that may follow the options after a `--`.
    """

    def __init__(
        self,
        run: Callable[..., Optional[int]],
        summary: str,
        options: str,
        *examples: str,
        tail: str = "",
    ) -> None:
        self.run, self.summary, self.examples, self.tail = run, summary, examples, tail
        self.options = {flag: OPTIONS[flag] for flag in options.split()}


COMMANDS = {
    "auth": Command(
        command_auth,
        "sign in with ChatGPT and import its models",
        "--account --device --no-browser --timeout --include --exclude --source --workspace "
        "--official",
        "{0}",
        "{0} --device",
        "{0} --official",
        "{0} --account work",
    ),
    "status": Command(
        command_status,
        "show who is signed in and which models are imported",
        "--account --json --online",
        "{0}",
        "{0} --online",
        "{0} --json",
    ),
    "accounts": Command(
        command_accounts,
        "list all accounts that are signed in here",
        "--json --online",
        "{0}",
        "{0} --online",
    ),
    "models": Command(
        command_models,
        "list the account's models and import them into Code Puppy",
        "--account --include --exclude --all --source --dry-run --json",
        "{0} --all --dry-run",
        '{0} --include "gpt-5*" --exclude "*-sol"',
    ),
    "env": Command(
        command_env,
        "print shell code that exports the API key",
        "--account --shell --name --access-token --unset",
    ),
    "exec": Command(
        command_exec,
        "run a command with the API key in its environment",
        "--account --name --access-token",
        "{0} -- {1} my_script.py",
        "{0} --name OPENAI_API_KEY -- aider",
        tail=" -- COMMAND [ARGUMENT...]",
    ),
    "token": Command(
        command_token,
        "print a valid access token, refreshed if needed",
        "--account --refresh --api-key --json",
        "{0}",
        # Other users can see the arguments of curl, but not what a pipe carries.
        "printf 'Authorization: Bearer %s' \"$({0})\" |",
        "  curl -H @- https://...",
        "{0} --api-key",
    ),
    "logout": Command(
        command_logout,
        "sign out and remove the tokens and imported models",
        "--account --local --official",
        "{0}",
        "{0} --local",
    ),
    "install": Command(
        command_install,
        "install the chatgpt-oauth command and the Code Puppy plugin",
        "--bin --code-puppy --no-code-puppy",
        "{0}",
        "{0} --bin ~/bin",
    ),
    "uninstall": Command(
        command_uninstall,
        "remove what install added; you stay signed in",
        "--bin --code-puppy --no-code-puppy",
        "{0}",
    ),
}
ALIASES = {"login": "auth", "signin": "auth", "signout": "logout", "whoami": "status"}


def parse(name: str, arguments: List[str], prog: str = "") -> Any:
    """Return the options of the command `name`. Raises UsageError.

    The member `help` is the text to print for -h or --help, and "" without these options. In that
    text, `prog` is the command as the person would type it.
    """
    command = COMMANDS[name]
    end = len(arguments)
    if command.tail and "--" in arguments:
        end = arguments.index("--")
    options = read_plain_options(command, arguments[:end])
    if options is None:
        options = read_options(name, arguments[:end], prog or f"{program_name()} {name}")
    options.command = arguments[end + 1 :]
    if options.help:
        return options
    for flag, option in command.options.items():
        value = getattr(options, attribute_name(flag))
        if option.rule and value is not None:
            setattr(options, attribute_name(flag), option.rule.check(flag, value))
    for pair in EXCLUSIVE:
        if all(vars(options).get(attribute_name(flag)) for flag in pair):
            message = " and ".join(pair) + " cannot be used together"
            raise UsageError(message, "leave one of them out")
    return options


def read_plain_options(command: Command, arguments: List[str]) -> Any:
    """Return the options without importing argparse, or None if only argparse can read them.

    Importing argparse would take about a quarter of the time of `env`, `token` and `status`. This
    reads the form in which scripts and profiles write options. Everything else (-h, `--name=VALUE`,
    every mistake) is left to read_options, which reads that form as well, with the same result.
    """
    import types

    options = types.SimpleNamespace(help="")
    for flag, option in command.options.items():
        setattr(options, attribute_name(flag), None if option.metavar else False)
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if flag not in command.options:
            return None
        name, option = attribute_name(flag), command.options[flag]
        if not option.metavar:
            setattr(options, name, True)
            continue
        if not rest or rest[0].startswith("-"):
            return None
        value = rest.pop(0)
        if option.is_repeatable:
            setattr(options, name, [*(getattr(options, name) or []), value])
        else:
            setattr(options, name, value)
    return options


def attribute_name(flag: str) -> str:
    """Return the attribute in which argparse stores the value of `flag`."""
    return flag[2:].replace("-", "_")


def read_options(name: str, arguments: List[str], prog: str) -> Any:
    """Return the options as argparse reads them. See parse for the member `help`."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(message, "to see the options, run", f"{name} --help")

    command = COMMANDS[name]
    examples = [f"  {each.format(prog, python_name())}" for each in command.examples]
    ending = ["examples:", *examples]
    if name == "env":
        ending = profile_help()
    parser: Any = Parser(
        prog=prog,
        # argparse formats `usage` with %, so a % in `prog` would break it here.
        usage=f"%(prog)s [options]{command.tail}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog="\n".join(ending),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    # Python 3.14 colors the help, which Code Puppy can't show.
    parser.color = False
    # Before Python 3.10, this title is "optional arguments".
    parser._optionals.title = "options"
    parser.add_argument("-h", "--help", help="show this help", action="store_true")
    for flag, option in command.options.items():
        if not option.metavar:
            parser.add_argument(flag, help=option.summary, action="store_true")
            continue
        action = "append" if option.is_repeatable else "store"
        parser.add_argument(flag, help=option.summary, action=action, metavar=option.metavar)
    options, unknown = parser.parse_known_args(arguments)
    options.help = parser.format_help().rstrip() if options.help else ""
    if unknown and not options.help:
        raise unknown_argument_error(name, unknown)
    return options


def unknown_argument_error(name: str, unknown: List[str]) -> UsageError:
    """Return the error for an option that the command `name` doesn't have.

    Its hint is the option with the most similar spelling, if there is one.
    """
    from difflib import get_close_matches

    command = COMMANDS[name]
    hint, help_command = "to see the options, run", f"{name} --help"
    if command.tail:
        hint, help_command = "to run a command, type", name + command.tail
    # The dashes don't count, because otherwise --all and --local would be alike.
    words = [flag[2:] for flag in command.options]
    near = get_close_matches(unknown[0].partition("=")[0].lstrip("-"), words, 1)
    if near:
        hint, help_command = "did you mean", f"{name} --{near[0]}"
    return UsageError(f"unknown option or argument: {' '.join(unknown)}", hint, help_command)


def profile_help() -> List[str]:
    """Return the end of `env --help`: the line for each shell's profile.

    It names the variable without reading the settings, because help must work with a bad setting.
    """
    # The program may come from a pipe, without a file.
    if not os.path.isfile(started_file()):
        return ["to set the key in each new shell, save this program as a file first"]
    lines = ["add one of these to your shell's profile (in cmd, which has none, type it):"]
    for name, shell in SHELLS.items():
        if shell.profile:
            program = absolute_program_name(name)
            lines += [f"  {name}:", f"    {profile_line(name, program, DEFAULT_VARIABLE)}"]
    return lines


USAGE = """\
usage: {program} COMMAND [options]

Sign in with ChatGPT and use it from the command line.

commands:
{commands}

options:
  -h, --help     show help (after a command: for that command)
  -V, --version  show the version

examples:
  {program} auth
  {line}
  {program} auth --device

environment:
  CHATGPT_OAUTH_<SETTING> overrides one setting of CHATGPT_OAUTH_CONFIG, at the
  top of the file, for one run: CHATGPT_OAUTH_CALLBACK_TIMEOUT=240
  Also read: BROWSER, NO_COLOR, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE,
  SSL_CERT_DIR, CODEX_CA_CERTIFICATE"""


def usage() -> str:
    lines = []
    for name, command in COMMANDS.items():
        lines.append(f"  {name:11}{command.summary}")
        aliases = [alias for alias, target in ALIASES.items() if target == name]
        if aliases:
            lines.append(f"{'':13}(also: {', '.join(aliases)})")
    commands = "\n".join(lines)
    # This doesn't read the settings, because help must work with a bad setting.
    shell = "powershell" if sys.platform == "win32" and not is_in_git_bash() else "sh"
    line = SHELLS[shell].profile.format(command=f"{program_name(shell)} env")
    return USAGE.format(program=program_name(), commands=commands, line=line)


def unknown_command_error(name: str) -> UsageError:
    from difflib import get_close_matches

    kind = "option" if name.startswith("-") else "command"
    near = get_close_matches(name, COMMANDS, 1)
    if near:
        return UsageError(f"unknown {kind}: {name}", "did you mean", near[0])
    return UsageError(f"unknown {kind}: {name}", "to see the commands, run", "--help")


def run(arguments: List[str], notify: Notify) -> int:
    """Run the command line and return its exit code. Raises OAuthError."""
    if arguments[:1] == ["help"]:
        # `help COMMAND` means `COMMAND --help`. `help help` means `help`.
        command = arguments[1:2]
        arguments = ["--help"] if command == ["help"] else [*command, "--help"]
    if not arguments:
        print(usage(), file=sys.stderr)
        return UsageError.exit_code
    name = ALIASES.get(arguments[0], arguments[0])
    if name in ("-h", "--help"):
        print_result(usage())
        return 0
    if name in ("-V", "--version"):
        print_result(f"chatgpt_oauth {__version__}")
        return 0
    if name not in COMMANDS:
        raise unknown_command_error(name)
    options = parse(name, arguments[1:])
    if options.help:
        print_result(options.help)
        return 0
    with open_session(notify, options).naming_account() as session:
        return COMMANDS[name].run(session, options) or 0


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line `argv` (default: this process's) and return its exit code."""
    set_up_output()
    terminal = Terminal(dict(os.environ))
    try:
        with as_oauth_errors():
            return run(sys.argv[1:] if argv is None else list(argv), terminal.notify)
    except KeyboardInterrupt:
        terminal.interrupted()
        # Shells report a command that SIGINT (2) has ended as 128 + 2.
        return 130
    except Exception as error:
        failure = unexpected_error(error)
        report_error(terminal.notify, failure)
        return failure.exit_code


def set_up_output() -> None:
    """Make standard output and standard error accept all text."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        # The parent process may have closed the stream.
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif hasattr(stream, "reconfigure"):
            # Lines end in a bare newline on all systems, because bash on Windows would make a
            # carriage return part of the API key.
            stream.reconfigure(errors="backslashreplace", newline="\n")


def run_program() -> NoReturn:
    """Run this process's command line and exit, without waiting for threads."""
    exit_code = main()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # sys.exit() would wait for a thread that still reads from a connection, and would spend time
    # on cleaning up an interpreter that ends anyway.
    os._exit(exit_code)


def child_main() -> NoReturn:
    """Run as the child process of `run_task`: read a task, run it, print the reply."""
    import signal

    # Nobody needs to stop this process, because the time for its request is limited.
    for number in signal.valid_signals():
        # SIGKILL and SIGSTOP can't be ignored.
        with contextlib.suppress(OSError):
            signal.signal(number, signal.SIG_IGN)
    pipe: Any = sys.stdout.buffer
    pipe.write(CHILD_GREETING)
    pipe.flush()
    line = sys.stdin.buffer.readline()
    # The parent process has ended, or was interrupted, before it sent the whole task.
    if not line.endswith(b"\n"):
        os._exit(OAuthError.exit_code)
    reply = json.dumps(reply_to(json.loads(line))).encode() + b"\n"
    # The parent process may have ended.
    with contextlib.suppress(OSError):
        pipe.write(reply)
        pipe.flush()
    os._exit(0)


# The functions that a child process can run, by name.
TASK_FUNCTIONS: Dict[str, Callable[..., Optional[Fields]]] = {
    each.__name__: each for each in (Session.refresh_once, exchange_once)
}


def reply_to(task: Fields) -> Fields:
    """Run a task from the parent process, and return the reply."""
    messages: List[Any] = []

    def notify(*message: str) -> None:
        messages.append(message)

    # The parent has checked its settings. __init__ would read them from the environment again.
    settings = Settings.__new__(Settings)
    vars(settings).update(task["settings"], environ=dict(os.environ))
    is_official = task["client"] == OfficialClient.__name__
    client = OfficialClient(settings) if is_official else Client(settings)
    vars(client).update(task["client_members"])
    session = Session(settings, notify, client)
    function = TASK_FUNCTIONS[task["function"]]
    try:
        # The parent holds the locks, so this process has no descriptors of them.
        with as_oauth_errors(), session.token_file.holding([]):
            return {"messages": messages, "result": function(session, *task["arguments"])}
    except Exception as error:
        return {"messages": messages, "error": unexpected_error(error).to_members()}


if __name__ == "__main__":
    run_program()
if is_plugin():
    CodePuppyPlugin(parse).register()
