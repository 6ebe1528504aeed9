"""Commands in the documentation, checked against the parsers of what they call, never run."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from documentation import ROOT
from torch.distributed.run import get_args_parser as make_torchrun_parser

from benchmarks import cli
from benchmarks.everything import ALL
from densenet_fast.train import rules, setup
from densenet_fast.train.arguments import make_parser as make_train_parser
from densenet_fast.train.errors import UsageError

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

TOP_FOLDERS = (".ci", "benchmarks", "csrc", "densenet_fast", "docs", "examples", "tests")
# Programs of others whose arguments are not checked, but for paths.
OTHERS = ("cat", "cd", "clang-format", "cp", "echo", "export", "find", "git", "ls", "mkdir")
OTHERS += ("mkdocs", "mypy", "ruff", "source", ".", "head", "tail", "nvidia-smi", "bash")
OTHERS += ("auditwheel",)
PYTEST_FLAGS = ("-n", "--dist", "-m", "-k", "-x", "-q", "-v", "-s", "-rs", "--durations")
PYTEST_FLAGS += ("--benchmark-save", "--benchmark-compare", "--benchmark-only", "-p", "--lf")
PYTEST_WITH_VALUE = ("-n", "--dist", "-m", "-k", "-p")
# Flags named in texts that belong to programs of others.
OTHER_FLAGS = ("--nproc-per-node", "--max-restarts", "--nnodes", "--rdzv-backend", "--standalone")
OTHER_FLAGS += ("--rdzv-endpoint", "--rdzv-id", "--only")
# What inline code must begin with to be a command; a name alone is none.
INLINE = re.compile(r"(densenet-fast|python|pip install|pytest|\.ci/run)\s+\S")
_PATH = re.compile(r"[\w.*/+-]+")


class CommandError(Exception):
    """A command that would not do what the page says; the text says why."""


def configuration() -> dict[str, Any]:
    """The project's pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def script_problems(text: str, line: int = 1) -> list[str]:
    """What is wrong with the commands of a shell script that begins in a line of a page."""
    problems, pending, begin = [], "", line
    for number, part in enumerate(text.splitlines(), line):
        if not pending:
            begin = number
        pending += part
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        problems += [f"line {begin}: {problem}" for problem in line_problems(pending)]
        pending = ""
    if pending:
        problems.append(f"line {begin}: nothing follows the line's backslash")
    return problems


def line_problems(line: str, *, inline: bool = False) -> list[str]:
    """What is wrong with the commands of one line; of `inline` ones, parts may be left out."""
    try:
        commands = _commands(line)
    except ValueError as error:  # of quotes
        return [f"{line!r}: {error}"]
    problems = []
    for command in commands:
        try:
            check(command, inline=inline)
        except CommandError as error:
            problems.append(f"{shlex.join(command)}: {error}")
    return problems


def _commands(line: str) -> list[list[str]]:
    """Split a line at what joins commands, without comments, assignments and redirections."""
    line = re.sub(r"\s\d?>&\d", "", re.sub(r"(^|\s)#.*", "", line))
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    commands: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if redirected:
            redirected = False
        elif re.fullmatch(r"[<>]+", word):
            redirected = True
        elif re.fullmatch(r"[();|&]+", word):
            commands.append([])
        elif commands[-1] or not re.match(r"[A-Za-z_]\w*=", word):
            commands[-1].append(word)
    return [command for command in commands if command]


def check(command: Sequence[str], *, inline: bool = False) -> None:
    """Raises `CommandError` if the command is unknown, or not as its program expects."""
    program, *arguments = command
    if program in CHECKS:
        CHECKS[program](arguments, inline)
    elif "/" in program:
        if not (ROOT / program).is_file():
            raise CommandError(f"there is no file {program!r}")
    elif program not in OTHERS:
        raise CommandError(f"unknown program {program!r}: nothing checks it")
    for argument in arguments:
        path_exists(argument)


def path_exists(text: str) -> None:
    """Raises `CommandError` if this is a path into the repository and nothing is there."""
    text = text.partition("::")[0]
    if not _PATH.fullmatch(text):
        return
    if re.fullmatch(r"test_\w+\.py", text):
        text = f"tests/**/{text}"  # in whichever folder
    if "/" in text and text.partition("/")[0] in TOP_FOLDERS and not text.endswith(".so"):
        # The compiled module is where it has been built.
        if not any(ROOT.glob(text.rstrip("/"))):
            raise CommandError(f"there is no file {text!r}")


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace | None:
    """The parsed arguments, None where the program would print its help."""
    parser.allow_abbrev = False
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return parser.parse_args(arguments)
    except SystemExit as end:
        if end.code:
            raise CommandError(said.getvalue().strip().splitlines()[-1]) from end
        return None


def _densenet_fast(arguments: list[str], inline: bool) -> None:
    if inline and len(arguments) == 1:
        arguments = [*arguments, "--help"]
    parsed = _parse(make_train_parser(), arguments)
    if parsed is None or inline:
        return
    try:
        if parsed.command == "train":
            parsed.model = parsed.model or setup.default_model(parsed)
            rules.complete(parsed)
        else:
            rules.one_of_checkpoint_and_weights(parsed)
    except UsageError as error:
        raise CommandError(str(error)) from error


def _benchmarks(arguments: list[str], inline: bool) -> None:
    parsed = _parse(cli.make_parser(), arguments)
    if parsed is None:
        return
    if parsed.suite == ALL:
        given = [flag for name, flag in cli.SUITE_FLAGS.items() if getattr(parsed, name)]
        if given:
            raise CommandError(f"{', '.join(given)}: not with {ALL!r}")
        return
    parsed = copy.copy(parsed)
    if re.fullmatch(r"cuda(:\d+)?", parsed.device or ""):
        parsed.device = "cpu"
    try:
        with tempfile.TemporaryDirectory() as folder:
            parsed.output = Path(folder)
            cli.make_options(parsed)
    except cli.UsageError as error:
        # Names are checked before what is installed.
        if "not installed here" not in str(error):
            raise CommandError(str(error)) from error


def _python(arguments: list[str], inline: bool) -> None:
    if not arguments:
        raise CommandError("what shall Python run?")
    first, *others = arguments
    if first == "-c":
        if not others:
            raise CommandError("-c needs code")
        try:
            compile(others[0], "-c", "exec")
        except SyntaxError as error:
            raise CommandError(f"{error.msg} in {others[0]!r}") from error
    elif first == "-m":
        _module(others, inline)
    elif first.startswith("-"):
        raise CommandError(f"unknown flag {first!r} of Python: nothing checks it")
    elif not (ROOT / first).is_file():
        raise CommandError(f"there is no file {first!r}")


def _module(arguments: list[str], inline: bool) -> None:
    if not arguments:
        raise CommandError("-m needs a module")
    name, *others = arguments
    if name == "densenet_fast.train":
        _densenet_fast(["train", *others], inline)
    elif name == "benchmarks":
        _benchmarks(others, inline)
    elif name == "densenet_fast":
        if others:  # without arguments it says what is installed
            _densenet_fast(others, inline)
    elif name in ("pytest", "pip"):
        CHECKS[name](others, inline)
    elif name not in ("build", "mkdocs", "venv"):
        raise CommandError(f"unknown module {name!r}: nothing checks it")


def _torchrun(arguments: list[str], inline: bool) -> None:
    parsed = _parse(make_torchrun_parser(), arguments)
    if parsed is not None:
        script = [parsed.training_script, *parsed.training_script_args]
        _python(["-m", *script] if parsed.module else script, inline)


def _pip(arguments: list[str], inline: bool) -> None:
    command, *others = arguments or [""]
    if command not in ("install", "wheel", "uninstall"):
        raise CommandError(f"unknown command {command!r} of pip: nothing checks it")
    known = configuration()["project"]["optional-dependencies"]
    for argument in others:
        match = re.fullmatch(r"(?:\.|densenet[_-]fast)\[(.*)\](?:[=<>~!].*)?", argument)
        for extra in match[1].split(",") if match else ():
            if extra.strip() not in known:
                raise CommandError(f"unknown extra {extra!r}; there are {', '.join(known)}")


def _pytest(arguments: list[str], inline: bool) -> None:
    markers = configuration()["tool"]["pytest"]["ini_options"]["markers"]
    known = {marker.partition(":")[0] for marker in markers} | {"and", "or", "not"}
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            if not (ROOT / word.partition("::")[0]).exists():
                raise CommandError(f"there is no file {word!r}")
            continue
        if flag not in PYTEST_FLAGS:
            raise CommandError(f"unknown flag {flag!r} of pytest: nothing checks it")
        if flag in PYTEST_WITH_VALUE and not equals:
            value = next(words, "")
            if not value:
                raise CommandError(f"{flag} needs a value")
        unknown = set(re.findall(r"\w+", value)) - known
        if flag == "-m" and unknown:
            raise CommandError(f"unknown markers {', '.join(sorted(unknown))}")


CHECKS: dict[str, Callable[[list[str], bool], None]] = {
    "densenet-fast": _densenet_fast,
    "python": _python,
    "python3": _python,
    "pip": _pip,
    "pytest": _pytest,
    "torchrun": _torchrun,
}


def known_flags() -> set[str]:
    """All flags that a text may name."""
    parsers = [cli.make_parser(), make_train_parser()]
    for action in make_train_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    flags = {flag for parser in parsers for flag in parser._option_string_actions}
    return flags | {*PYTEST_FLAGS, *OTHER_FLAGS}


def flag_problems(text: str) -> list[str]:
    """Flags in a text that no program has."""
    named = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
    return [f"unknown flag {flag}" for flag in named if flag not in known_flags()]


def inline_problems(text: str) -> list[str]:
    """What is wrong with inline code: a command, flags, or a path; other code is left alone."""
    if INLINE.match(text):
        return line_problems(text, inline=True)
    if text.startswith("--"):
        return flag_problems(text)
    try:
        path_exists(text)
    except CommandError as error:
        return [str(error)]
    return []
