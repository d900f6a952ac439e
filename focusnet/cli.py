"""What all commands share: configuration on the command line, one-line errors, exit codes."""

import io
import os
import re
import signal
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt
from rich.console import Console

from .config import Config
from .errors import FocusNetError

if TYPE_CHECKING:
    import torch

PRESETS = Path(__file__).parent / "presets"
SCRIPT = "focusnet"
EXAMPLES = "examples (in options, - does for _):"
PIPE_WIDTH = 120
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


SECTIONS = tuple(section.name for section in fields(Config))


class _Parser(ArgumentParser):
    def dump(self, namespace: Namespace, *options: Any, **more: Any) -> str:
        """What `--print_config` prints: a file for `--config`, so the settings without the command's own options."""
        settings = Namespace({name: namespace[name] for name in SECTIONS if name in namespace})
        dumped: str = super().dump(settings, *options, **more)
        return dumped


class _ConfigFile(ActionConfigFile):
    def __call__(self, parser: Any, found: Any, value: Any, option: str | None = None) -> None:
        """Read the file, unless it has what is no setting of `Config`: that would pass for the command's options."""
        if not Path(value).is_file():
            raise FocusNetError(f"--config {value}: no such file; presets are {', '.join(_presets())}")
        try:
            content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise FocusNetError(f"--config {value} is no YAML: {_one_line(error)}") from error
        _check_names(value, content, Config())
        try:
            super().__call__(parser, found, value, option)
        except ArgumentError as error:
            raise FocusNetError(f"--config {value}: {_explained(parser, error)}") from error


def _check_names(file: str, content: Any, settings: Any, prefix: str = "") -> None:
    """Refuse what the settings do not have."""
    if not isinstance(content, dict):
        what = "null" if content is None else content
        raise FocusNetError(f"--config {file}: {prefix.removesuffix('.') or 'it'} is {what}, expected settings")
    sections = {one.name: getattr(settings, one.name) for one in fields(settings)}
    for name, value in content.items():
        if name not in sections:
            raise FocusNetError(f"--config {file} has {prefix}{name}, expected only {', '.join(sections)}")
        if is_dataclass(sections[name]):
            _check_names(file, value, sections[name], f"{prefix}{name}.")


class _HelpFormatter(DefaultHelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLES) else super()._fill_text(text, width, indent)


def command_parser(name: str, arguments: str, description: str, examples: Sequence[str]) -> ArgumentParser:
    """A parser for `python -m focusnet.<name> [options] <arguments>` whose help shows defaults and `examples`, each
    the rest of a command line."""
    prog = f"focusnet {name}" if Path(sys.argv[0]).stem == SCRIPT else f"python -m focusnet.{name}"
    return _Parser(
        prog=prog,
        usage=f"{prog} [options] {arguments}",
        description=description,
        epilog="\n".join([EXAMPLES, *(f"  {prog} {example}" for example in examples)]),
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )


def add_config(parser: ArgumentParser, shown: Sequence[str] = SECTIONS) -> None:
    """Add `--config NAME|FILE` and one option for every setting of `Config`; the help has the sections of `shown`, the
    others are accepted so that one file serves all commands."""
    parser.add_argument(
        "--config",
        action=_ConfigFile,
        help=f"a YAML file, or the name of a preset: {', '.join(_presets())}; later options override it",
    )
    parser.add_class_arguments(Config, None)
    for action in parser._actions:
        section = action.dest.partition(".")[0]
        if section in SECTIONS and section not in shown:
            action.help = SUPPRESS


def parse(parser: ArgumentParser, argv: list[str] | None) -> Namespace:
    """Parse `argv` (default: the command line); options may have - for _, and preset names after `--config`
    stand for their files.

    Raises:
        FocusNetError: an option or value is wrong.
    """
    arguments = _with_preset_files(_with_underscores(sys.argv[1:] if argv is None else argv))
    try:
        parsed = parser.parse_args(arguments)
        for section in _sections(Config()):
            if parsed.get(section, section) is None:
                raise FocusNetError(f"--{section} null: expected settings")
        return parser.instantiate(parsed)
    except (ArgumentError, RecursionError) as error:
        raise FocusNetError(_explained(parser, error)) from error


def _explained(parser: ArgumentParser, error: Exception) -> str:
    """What jsonargparse found wrong, with the options, positional arguments and types as a user knows them."""
    said = _one_line(error).removeprefix("argument ")
    actions = {action.dest: action for action in parser._actions}
    names = {dest: (*action.option_strings, action.metavar or dest.upper())[0] for dest, action in actions.items()}
    if missing := re.fullmatch("the following arguments are required: (.+)", said):
        return f"required: {', '.join(str(names[dest]) for dest in missing[1].split(', '))}"
    odd = re.fullmatch(r'.*Parser key "([\w.]+)"(?:.* (?:Got|Given) value:( .*)|.*)', said)
    if odd is None or odd[1] not in actions:
        return said
    kind = getattr(actions[odd[1]], "_typehint", None)
    return f"{names[odd[1]]}{odd[2] or '':.60}: expected {'settings' if kind is None else _expected(kind)}"


_WORDS = {
    int: "a whole number",
    PositiveInt: "a whole number above 0",
    float: "a number",
    PositiveFloat: "a number above 0",
    bool: "true or false",
    NoneType: "null",
}


def _expected(kind: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return ", or ".join(_expected(part) for part in parts)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (list, tuple):
        return f"a list such as {_example(kind)}"
    return _WORDS.get(kind, "text")


def _example(kind: Any, number: int = 1) -> str:
    """A value of a type, another one for every number."""
    parts = get_args(kind) * (2 if get_origin(kind) is list else 1)
    if parts:
        return f"[{','.join(_example(part, i) for i, part in enumerate(parts, start=1))}]"
    return {int: f"{number}", float: f"{number}.5"}.get(kind, chr(ord("a") + number - 1))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _sections(settings: Any, prefix: str = "") -> Iterator[str]:
    """The names of all sections of settings, nested ones too."""
    for one in fields(settings):
        section = getattr(settings, one.name)
        if is_dataclass(section):
            yield f"{prefix}{one.name}"
            yield from _sections(section, f"{prefix}{one.name}.")


def config_of(arguments: Namespace) -> Config:
    """The configuration among parsed arguments, its values checked.

    Raises:
        FocusNetError: a value is out of range.
    """
    config = Config(**{section.name: arguments[section.name] for section in fields(Config)})
    config.check()
    return config


def pick_device(name: str) -> "torch.device":
    """The device of `--device auto|cpu|cuda|cuda:N`; "auto" is the GPU if there is one.

    Raises:
        FocusNetError: another name, or a GPU that this machine or this build of PyTorch does not have.
    """
    import torch  # here, because the commands that need no network start without it

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    kind, colon, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (colon and not (number.isascii() and number.isdigit()))):
        raise FocusNetError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= gpus:
        numbers = ", ".join(f"cuda:{i}" for i in range(gpus))
        found = f"there is only {numbers}" if gpus else "PyTorch finds no GPU here"
        raise FocusNetError(f"--device {name}: {found}")
    return torch.device(name)


def console(*, stderr: bool = False) -> Console:
    """Where a command reports; wide enough for the tables where the output is a file or a pipe."""
    stream = Console(stderr=stderr)
    return stream if stream.is_terminal else Console(stderr=stderr, width=PIPE_WIDTH)


def say(to: Console, line: str) -> None:
    """Print a line that may hold names and paths, which are no markup."""
    to.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _with_underscores(arguments: list[str]) -> list[str]:
    """`arguments` with every option, but no value, spelled as it is defined."""
    spelled = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        is_option = option.startswith("--") and len(option) > 2
        spelled.append(f"--{option[2:].replace('-', '_')}{equals}{value}" if is_option else argument)
    return spelled


def _with_preset_files(arguments: list[str]) -> list[str]:
    """`arguments` with `--config NAME` of a preset turned into `--config FILE`."""
    replaced = list(arguments)
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--config" and equals:
            replaced[position] = f"{option}={_preset_file(value)}"
        elif option == "--config" and position + 1 < len(arguments):
            replaced[position + 1] = _preset_file(arguments[position + 1])
    return replaced


def _presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _preset_file(name: str) -> str:
    file = PRESETS / f"{name}.yaml"
    return str(file) if file.is_file() and not Path(name).is_file() else name


class Terminated(KeyboardInterrupt):
    """SIGTERM, as from a cluster's scheduler: everything stops and is cleaned up as on Ctrl-C."""


def run(main: Callable[[], int]) -> None:
    """Run a command and exit: 0, 2 with one line on an error the user can fix, 130 on Ctrl-C, 143 on SIGTERM."""

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: file names may have any bytes
    try:
        status = main()
        sys.stdout.flush()
    except FocusNetError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_ERROR
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_ERROR
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        status = EXIT_ERROR
    except Terminated:
        print("terminated", file=sys.stderr)
        status = EXIT_TERMINATED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_INTERRUPTED
    sys.exit(status)
